"""Loggers in a run: what is in their files, on which rank, and where a run keeps nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import raylit
from raylit.errors import ConfigError
from raylit.loggers import CSVLogger, DummyLogger, Logger, NullExperiment, TensorBoardLogger
from tests.two_process.harness import Processes, run_here
from tests.unit.engine.small import Numbers, numbers, quiet
from tests.unit.loggers.test_loggers import scalars, tags


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Logs(Numbers):
    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        self.log("loss", batch.sum(), on_step=True, on_epoch=True)
        self.log("quiet", 1.0, logger=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val", batch.mean())

    def test_step(self, batch, batch_idx):
        self.log("test", batch.mean())

    def on_train_epoch_end(self):
        self.logger.experiment.add_histogram("weights", self.weight.detach(), self.global_step)


# -- TensorBoard -----------------------------------------------------------------------------------------------------
def test_tensorboard_is_the_default_with_global_step_as_its_x_axis(tmp_path):
    trainer = quiet(tmp_path, name="run", logger=True, max_epochs=2, log_every_n_steps=2)
    trainer.fit(Logs(), numbers(1, 2, 3), numbers(4))
    assert isinstance(trainer.logger, TensorBoardLogger) and trainer.logger.log_dir == str(tmp_path / "run")
    by_name: dict[str, list[tuple[int, float]]] = {}
    for step, values in scalars(tmp_path / "run"):
        for name, value in values.items():
            by_name.setdefault(name, []).append((step, value))
    # Every second step, counted on over the epochs; an epoch's values at the step it ended with.
    assert by_name == {
        "hp_metric": [(0, -1.0)], "loss_step": [(2, 2.0), (4, 1.0), (6, 3.0)], "loss_epoch": [(3, 2.0), (6, 2.0)],
        "val": [(3, 4.0), (6, 4.0)],
    }  # fmt: skip
    assert {"weights", "_hparams_/session_start_info"} <= tags(tmp_path / "run")
    assert "lr" in (tmp_path / "run" / "hparams.yaml").read_text()


def test_tensorboards_own_reader_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    quiet(tmp_path, name="run", logger=True, log_every_n_steps=1).fit(Logs(), numbers(1, 2), numbers(4))
    reader = accumulator.EventAccumulator(str(tmp_path / "run"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss_step")] == [(1, 1.0), (2, 2.0)]
    assert reader.Histograms("weights")[0].step == 2


def test_a_test_after_the_fit_goes_to_the_same_place(tmp_path):
    trainer = quiet(tmp_path, name="run", logger=True, log_every_n_steps=1)
    trainer.fit(Logs(), numbers(1, 2))
    trainer.test(dataloaders=numbers(5, 6))
    assert (2, {"test": 5.5}) in scalars(tmp_path / "run")


# -- ranks -----------------------------------------------------------------------------------------------------------
def ranks_case(rank: int, world_size: int, folder: str) -> tuple[bool, bool, list[str]]:
    class Everywhere(Logs):
        def training_step(self, batch, batch_idx):
            experiment = self.logger.experiment  # the same code on every rank
            experiment.add_histogram("h", torch.ones(3), batch_idx)
            experiment.add_figure("f", None) if self.global_rank else None
            with experiment.anything(1)[2] if self.global_rank else torch.no_grad():
                pass
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.kind = isinstance(self.logger.experiment, NullExperiment)

    own = Path(folder, str(rank))
    own.mkdir()
    loggers = [TensorBoardLogger(own), CSVLogger(own)]
    ran = run_here(Everywhere(), numbers(1, 2, 3, 4), rank=rank, world_size=world_size, loggers=loggers,
                   log_every_n_steps=1)  # fmt: skip
    written = sorted(path.name.split(".")[0] for path in own.rglob("*") if path.is_file())
    return ran.module.kind, ran.trainer.logger is not None, written


def test_rank_0_writes_and_the_others_accept_every_call(two: Processes, tmp_path: Path) -> None:
    (zero, has_zero, files), (one, has_one, nothing) = two(ranks_case, str(tmp_path))
    assert (zero, one, has_zero, has_one) == (False, True, True, True)
    assert files == ["events", "hparams", "metrics"] and nothing == []


# -- CSV, a person's own, several ------------------------------------------------------------------------------------
def test_csv_rows_by_step(tmp_path):
    class Plain(Logs):
        on_train_epoch_end = raylit.Module.on_train_epoch_end

    trainer = quiet(tmp_path, name="run", logger=CSVLogger(), log_every_n_steps=2)
    trainer.fit(Plain(), numbers(1, 2, 3), numbers(4))
    found = rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in found] == ["2", "3", "3"]
    assert [row["loss_step"] for row in found] == ["2.0", "", ""]
    assert found[1]["val"] == "4.0" and found[2]["loss_epoch"] == "2.0" and "quiet" not in found[0]
    trainer.test(dataloaders=numbers(5))
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 4  # the fit's rows are still there


class Mine(Logger):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        self.seen.append(dict(params))

    def finalize(self, status):
        self.seen.append(status)


def test_several_loggers_and_a_persons_own(tmp_path):
    mine, other = Mine(), Mine()
    trainer = quiet(tmp_path, logger=[mine, other], log_every_n_steps=1)
    trainer.fit(Logs(), numbers(1, 2))
    assert trainer.loggers == [mine, other] and trainer.logger is mine
    assert mine.seen == other.seen == [
        {"lr": 0.5}, (1, {"loss_step": 1.0}), (2, {"loss_step": 2.0}), (2, {"loss_epoch": 1.5}), "finished",
    ]  # fmt: skip


def test_what_is_no_logger_is_refused_at_construction(tmp_path):
    with pytest.raises(ConfigError, match=r"logger=<object.*subclass raylit.loggers.Logger"):
        quiet(tmp_path, logger=object())


# -- runs that keep nothing, and runs without a fit before -----------------------------------------------------------
def test_a_dry_run_keeps_nothing_and_hooks_find_a_logger(tmp_path):
    mine = Mine()
    trainer = quiet(tmp_path / "runs", logger=[mine, CSVLogger()], fast_dev_run=True)
    trainer.fit(Logs(), numbers(1, 2), numbers(3))
    assert isinstance(trainer.logger, DummyLogger) and mine.seen == []
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_alone_keeps_what_given_loggers_write(tmp_path):
    for entry in ("validate", "test"):
        trainer = quiet(tmp_path, name="mine", logger=CSVLogger())
        getattr(trainer, entry)(Logs(), numbers(5, 6))
        folder = Path(trainer.log_dir)
        assert folder.parent == tmp_path and folder.name.startswith(f"mine-{entry}-")
        assert rows(folder / "metrics.csv")[0]["step"] == "0"
        trainer.fit(Logs_without_histogram(), numbers(1))  # the name is free for it
        assert Path(trainer.log_dir) == tmp_path / "mine"
        (tmp_path / "mine").rename(tmp_path / f"done-{entry}")


def Logs_without_histogram() -> Numbers:
    module = Logs()
    module.__class__ = type("Plain", (Logs,), {"on_train_epoch_end": raylit.Module.on_train_epoch_end})
    return module


def test_an_evaluation_alone_keeps_nothing_by_default_and_hooks_find_a_logger(tmp_path):
    class Uses(Logs):
        def test_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("x", 1.0, 0)

    trainer = quiet(tmp_path / "runs", logger=True)
    trainer.test(Uses(), numbers(5))
    assert not (tmp_path / "runs").exists() and trainer.log_dir is None


def test_without_loggers_there_is_none(tmp_path):
    trainer = quiet(tmp_path, logger=False)
    trainer.validate(Logs(), numbers(1))
    assert trainer.logger is None and trainer.loggers == []
