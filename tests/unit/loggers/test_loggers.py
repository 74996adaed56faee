"""Loggers: files read back, folders and versions, pickling, and what other ranks see."""

from __future__ import annotations

import copy
import csv
import importlib.util
import logging
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.errors import ConfigError, MissingDependencyError, NotAttachedError
from raylit.loggers import (
    CSVLogger,
    DummyLogger,
    Logger,
    MLFlowLogger,
    NullExperiment,
    TensorBoardLogger,
    WandbLogger,
    make_loggers,
)
from raylit.loggers.hparams import read_yaml
from raylit.ports import RunLogger

ROOT = Path(__file__).resolve().parents[3]


# -- reading TensorBoard files: a length, its checksum, the event, its checksum ---------------------------------------
def events(folder: Path) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events.out.tfevents.*"), key=os.path.getmtime):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: Path) -> list[tuple[int, dict[str, float]]]:
    rows = [(event.step, {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")})
            for event in events(folder)]  # fmt: skip
    return [(step, values) for step, values in rows if values]


def tags(folder: Path) -> set[str]:
    return {value.tag for event in events(folder) for value in event.summary.value}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def attached(logger: Any, folder: Path, rank: int = 0, **more: Any) -> Any:
    """As a worker gets it: through pickle, then told where it is."""
    logger = pickle.loads(pickle.dumps(logger))
    logger.attach(folder, rank, **more)
    return logger


# -- what every logger does -------------------------------------------------------------------------------------------
MAKERS = {"tensorboard": TensorBoardLogger, "csv": CSVLogger, "dummy": DummyLogger}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_nothing_is_written_before_the_first_value(make: type[Logger], tmp_path: Path) -> None:
    logger = attached(make(), tmp_path)
    assert isinstance(logger, Logger)
    port: RunLogger = logger
    port.log_hyperparams({"lr": 0.1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_other_ranks_accept_everything_and_do_nothing(make: type[Logger], tmp_path: Path) -> None:
    logger = attached(make(), tmp_path, rank=1)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.experiment.add_histogram("w", torch.ones(3), 0)
    logger.after_save_checkpoint(None)
    logger.save()
    logger.finalize("finished")
    assert isinstance(logger.experiment, NullExperiment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_used_logger_can_travel_too(make: type[Logger], tmp_path: Path) -> None:
    logger = attached(make(), tmp_path / "a")
    logger.log_metrics({"loss": 1.0}, 0)
    again = attached(logger, tmp_path / "b")
    again.log_metrics({"loss": 2.0}, 1)
    again.finalize("finished")
    logger.finalize("finished")
    copy.deepcopy(logger)
    if make is CSVLogger:
        assert [row["loss"] for row in rows(tmp_path / "b" / "metrics.csv")] == ["2.0"]


def test_the_null_experiment_accepts_every_call() -> None:
    null = NullExperiment()
    null.add_scalar("a", 1, step=0).then[3](4)
    null["x"] = null.y
    null.attribute = 5
    del null["x"], null.attribute
    with null.run() as run:
        run.log({})
    assert list(null) == [] and len(null) == 0 and "a" not in null
    assert null and repr(null.anything) == "NullExperiment()"
    assert isinstance(pickle.loads(pickle.dumps(null)), NullExperiment)
    assert isinstance(copy.deepcopy(null), NullExperiment)


def test_the_dummy_accepts_other_loggers_methods() -> None:
    logger = DummyLogger()
    logger.watch(torch.nn.Linear(1, 1)).unwatch()
    assert isinstance(pickle.loads(pickle.dumps(logger)), DummyLogger)


class Mine(Logger):
    """A person's own, with neither a constructor of the base nor names."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.seen.append((dict(metrics), step))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self.seen.append(dict(params))


def test_a_persons_own_logger_needs_two_methods(tmp_path: Path) -> None:
    logger = attached(Mine(), tmp_path)
    logger.log_metrics({"a": 1.0}, 3)
    logger.save()
    logger.finalize("finished")
    assert logger.seen == [({"a": 1.0}, 3)]
    assert logger.log_dir == str(tmp_path) and logger.name is None and logger.version is None


def test_what_the_trainer_argument_stands_for() -> None:
    assert [type(logger) for logger in make_loggers(True)] == [TensorBoardLogger]
    assert make_loggers(True)[0].log_dir is None
    assert make_loggers(False) == make_loggers(None) == []
    one, two = CSVLogger(), Mine()
    assert make_loggers(one) == [one] and make_loggers((one, two)) == [one, two]
    for wrong in ("csv", [CSVLogger], 3):
        with pytest.raises(ConfigError, match="TensorBoard files in the run folder"):
            make_loggers(wrong)  # type: ignore[arg-type]


# -- folders ----------------------------------------------------------------------------------------------------------
def test_without_a_folder_files_lie_in_the_run_folder(tmp_path: Path) -> None:
    for logger in (TensorBoardLogger(), CSVLogger()):
        assert logger.log_dir is None and logger.version is None
        with pytest.raises(NotAttachedError, match="save_dir='logs'"):
            _ = logger.experiment
        logger = attached(logger, tmp_path / "my_run")
        assert logger.log_dir == logger.save_dir == str(tmp_path / "my_run")
        assert logger.version == "my_run"


def test_with_a_folder_versions_count_up(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_7").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_x").mkdir()
    logger = TensorBoardLogger(tmp_path)
    assert logger.version == 8
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_8")
    logger.finalize("finished")
    assert TensorBoardLogger(tmp_path, name="", version="mine", sub_dir="s").log_dir == str(tmp_path / "mine" / "s")
    assert CSVLogger(tmp_path, name=None, version=3).log_dir == str(tmp_path / "version_3")


def test_all_workers_and_the_driver_agree_on_the_version(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    first = attached(logger, tmp_path / "run")
    first.log_metrics({"a": 1.0}, 0)
    second = attached(logger, tmp_path / "run", rank=1)
    assert first.log_dir == second.log_dir == logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_folder_of_its_own_gets_hparams_yaml(make: Any, tmp_path: Path) -> None:
    logger = attached(make(tmp_path / "logs"), tmp_path / "run")
    logger.log_hyperparams({"lr": 0.1, "fn": len})
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("finished")
    assert read_yaml(tmp_path / "logs" / "lightning_logs" / "version_0" / "hparams.yaml") == {"lr": 0.1}
    assert not (tmp_path / "run" / "hparams.yaml").exists()


# -- TensorBoard ------------------------------------------------------------------------------------------------------
def test_tensorboard_values_steps_and_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    logger = attached(TensorBoardLogger(), tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0 / (step + 1), "val/acc/dataloader_idx_0": step}, step * 50)
    logger.log_metrics({"bad (x)": float("nan")}, 150)
    logger.log_metrics({}, 200)
    logger.finalize("finished")
    found = scalars(tmp_path)
    assert [step for step, _ in found] == [0, 50, 100, 150]
    assert found[1][1] == {"loss": 0.5, "val/acc/dataloader_idx_0": 1.0}
    assert found[3][1]["bad__x_"] != found[3][1]["bad__x_"]
    assert not caplog.records


def test_tensorboard_experiment_is_the_writer(tmp_path: Path) -> None:
    logger = attached(TensorBoardLogger(prefix="p"), tmp_path)
    logger.experiment.add_histogram("weights", torch.arange(10.0), 1)
    logger.experiment.add_text("note", "hello")
    logger.log_metrics({"a": 1.0}, 2)
    logger.finalize("finished")
    assert {"weights", "note/text_summary", "p-a"} <= tags(tmp_path)


def test_tensorboard_goes_on_after_the_end_in_another_file(tmp_path: Path) -> None:
    logger = attached(TensorBoardLogger(), tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("finished")
    logger.log_metrics({"b": 1.0}, 1)  # within the same second
    logger.experiment.close()  # by the person
    logger.log_metrics({"c": 1.0}, 2)
    logger.finalize("finished")
    assert {"a", "b", "c"} == tags(tmp_path)


def test_tensorboard_hyperparameters(tmp_path: Path) -> None:
    logger = attached(TensorBoardLogger(), tmp_path)
    logger.log_hyperparams({"lr": 0.1, "optim": {"name": "sgd"}, "layers": [1, 2], "on": True, "fn": len})
    logger.log_metrics({"a": 1.0}, 5)
    logger.finalize("finished")
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "hp_metric", "a"} <= tags(tmp_path)
    assert (0, {"hp_metric": -1.0}) in scalars(tmp_path)
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    (start,) = (
        HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info.hparams
        for event in events(tmp_path) for value in event.summary.value if value.tag.endswith("session_start_info")
    )  # fmt: skip
    assert start["lr"].number_value == 0.1 and start["optim/name"].string_value == "sgd"
    assert start["layers"].string_value == "[1, 2]" and start["on"].bool_value
    assert start["fn"].string_value == "<built-in function len>"


def test_tensorboards_table_may_show_a_metric_as_it_is_logged(tmp_path: Path) -> None:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    logger = attached(TensorBoardLogger(default_hp_metric="val loss", prefix="own"), tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"val loss": 0.25}, 5)
    logger.finalize("finished")
    assert scalars(tmp_path) == [(5, {"own-val_loss": 0.25})]  # and no number of our own
    (table,) = (
        HParamsPluginData.FromString(value.metadata.plugin_data.content).experiment
        for event in events(tmp_path) for value in event.summary.value if value.tag.endswith("_/experiment")
    )  # fmt: skip
    assert [each.name.tag for each in table.metric_infos] == ["own-val_loss"]


def test_tensorboard_hyperparameters_alone_are_written_at_the_end(tmp_path: Path) -> None:
    logger = attached(TensorBoardLogger(default_hp_metric=False), tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("failed")
    assert "_hparams_/session_start_info" in tags(tmp_path) and "hp_metric" not in tags(tmp_path)


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    logger = attached(TensorBoardLogger(), tmp_path, purge_step=70)
    logger.log_metrics({"a": 1.0}, 70)
    logger.finalize("finished")
    marks = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [event.step for event in marks] == [70]


def test_tensorboard_graph_needs_the_package_or_draws(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    attached(TensorBoardLogger(), tmp_path).log_graph(model, torch.ones(1, 2))  # not asked for
    logger = attached(TensorBoardLogger(log_graph=True), tmp_path)
    logger.log_graph(model)  # no example
    assert list(tmp_path.iterdir()) == []
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(MissingDependencyError, match=r"raylit\[tensorboard\]"):
            logger.log_graph(model, torch.ones(1, 2))
    else:
        logger.log_graph(model, torch.ones(1, 2))
        logger.finalize("finished")
        assert any(event.HasField("graph_def") for event in events(tmp_path))


# -- CSV --------------------------------------------------------------------------------------------------------------
def test_csv_columns_grow(tmp_path: Path) -> None:
    logger = attached(CSVLogger(), tmp_path)
    logger.log_metrics({"loss": 0.1, "epoch": 0}, 0)
    logger.log_metrics({"loss": 1 / 3}, 1)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,epoch\n0,0.1,0\n1,0.3333333333333333,\n"
    logger.log_metrics({"val,acc": 0.5}, 2)
    logger.log_metrics({"loss": 0.2, "val,acc": 0.6}, 3)
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,loss,epoch,"val,acc"\n0,0.1,0,\n1,0.3333333333333333,,\n2,,,0.5\n3,0.2,,0.6\n'
    )
    logger.finalize("finished")
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_csv_goes_on_with_the_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,0.5\n50,0.4\n100,0.3\n,7\n150,0.")
    logger = attached(CSVLogger(), tmp_path, purge_step=100)
    logger.log_metrics({"acc": 0.9}, 100)
    logger.finalize("finished")
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,acc\n0,0.5,\n50,0.4,\n,7,\n100,,0.9\n"
    logger.log_metrics({"acc": 1.0}, 150)  # a test after the fit
    logger.finalize("finished")
    assert rows(tmp_path / "metrics.csv")[-1] == {"step": "150", "loss": "", "acc": "1.0"}
    assert len(rows(tmp_path / "metrics.csv")) == 5


def test_csv_an_empty_file_is_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,lo")
    logger = attached(CSVLogger(prefix="p"), tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("finished")
    assert rows(tmp_path / "metrics.csv") == [{"step": "0", "p-a": "1.0"}]


def test_csv_rows_may_wait(tmp_path: Path) -> None:
    logger = attached(CSVLogger(flush_logs_every_n_steps=100), tmp_path)
    for step in (0, 50, 99):
        logger.log_metrics({"a": 1.0}, step)
    assert len(rows(tmp_path / "metrics.csv")) == 1
    logger.log_metrics({"a": 1.0}, 100)
    assert len(rows(tmp_path / "metrics.csv")) == 4
    logger.log_metrics({"a": 1.0}, 101)
    logger.save()
    assert len(rows(tmp_path / "metrics.csv")) == 5


# -- optional extras --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "package"), [(MLFlowLogger, "mlflow"), (WandbLogger, "wandb")])
def test_extras_say_what_to_install(make: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert importlib.util.find_spec(package) is None
    with pytest.raises(MissingDependencyError, match=rf"{make.__name__} needs .* pip install 'raylit\[{package}\]'"):
        make()


# MLflow uses an option of SQLAlchemy's that 2.1 has deprecated.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_offline(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    logger = attached(MLFlowLogger(tags={"team": "a"}), tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 3}})
    logger.log_metrics({"loss": 0.5, "acc (x)": 1.0}, 10)
    logger.finalize("failed")
    again = attached(MLFlowLogger(), tmp_path)  # the resumed run
    again.log_metrics({"loss": 0.25}, 20)
    again.finalize("finished")
    client = again.experiment
    run = client.get_run(again.run_id)
    assert again.version == logger.version
    assert run.data.params == {"lr": "0.1", "net/width": "3"} and run.data.tags["team"] == "a"
    assert [(m.step, m.value) for m in client.get_metric_history(again.run_id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert "acc x" in run.data.metrics


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = attached(WandbLogger(offline=True), tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 0.5}, 10)
    assert logger.experiment.config["lr"] == 0.1
    assert logger.experiment.summary["trainer/global_step"] == 10
    logger.finalize("finished")
    again = attached(WandbLogger(offline=True), tmp_path)
    again.log_metrics({"loss": 0.25}, 20)
    assert again.version == logger.version
    again.finalize("finished")


class Config(dict[str, Any]):
    def update(self, values: Mapping[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        super().update(values)


class FakeRun:
    """What WandbLogger uses of a wandb.Run."""

    def __init__(self) -> None:
        self.id, self.calls = "abc", []
        self.config = Config()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of the name wandb that records: the real one is an extra."""
    code = "given = []\nrun = None\ndef init(**kw):\n    given.append(kw)\n    return run\n"
    (tmp_path / "wandb.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    wandb.run = FakeRun()
    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_calls(fake_wandb: Any, tmp_path: Path) -> None:
    logger = attached(WandbLogger(project="p", offline=True, prefix="x", group="g"), tmp_path / "run")
    logger.log_hyperparams({"net": {"width": 3}})
    logger.log_metrics({"loss": 0.5}, 10)
    logger.finalize("interrupted")
    (given,) = fake_wandb.given
    assert given == {"name": None, "project": "p", "id": None, "dir": str(tmp_path / "run"), "resume": "allow",
                     "mode": "offline", "group": "g"}  # fmt: skip
    assert fake_wandb.run.config == {"net/width": 3}
    assert fake_wandb.run.calls[-2:] == [
        ("log", ({"x-loss": 0.5, "trainer/global_step": 10},), {}),
        ("finish", (), {"exit_code": 1}),
    ]
    assert logger.version == "abc"
    again = attached(WandbLogger(), tmp_path / "run")
    again.log_metrics({"loss": 0.25}, 20)
    assert fake_wandb.given[1]["id"] == "abc"
    other = attached(WandbLogger(), tmp_path / "run", rank=1)
    other.log_metrics({"loss": 0.25}, 20)
    other.finalize("finished")
    other.watch(None)
    assert len(fake_wandb.given) == 2
    with pytest.raises(ConfigError, match="storage_path"):
        WandbLogger(log_model="all")


def test_importing_and_making_loggers_loads_no_library() -> None:
    code = (
        "import sys, pickle; from raylit.loggers import TensorBoardLogger, CSVLogger\n"
        "for logger in (TensorBoardLogger(), CSVLogger()):\n"
        "    logger.attach('/nonexistent', 0); logger.log_hyperparams({'a': 1}); pickle.dumps(logger)\n"
        "heavy = {'torch', 'tensorboardX', 'yaml', 'pyarrow', 'rich', 'mlflow', 'wandb', 'google', 'ray'}\n"
        "loaded = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "assert loaded <= ({'torch', 'google'} if 'torch' in sys.modules else set()), loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
