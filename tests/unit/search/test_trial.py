"""A trial is the fit that ``Trainer.fit`` would do, stopped at each report; a clone takes state and not options."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import EarlyStopping
from raylit.loggers import TensorBoardLogger
from raylit.search.trial import Saved, TrialRun, TrialSpec, _loggers
from raylit.seed import get_random_state, set_random_state


class Net(raylit.Module):
    def __init__(self, lr: float = 0.1, momentum: float = 0.9, gamma: float = 1.0, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1))

    def loader(self, first: int, last: int) -> Any:
        x = torch.arange(60.0).reshape(20, 3).sin()[first:last]
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=first == 0)

    def train_dataloader(self) -> Any:
        return self.loader(0, 16)

    def val_dataloader(self) -> Any:
        return self.loader(16, 20)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.hparams.gamma)]


def spec(**given: Any) -> TrialSpec:
    arguments = {"max_epochs": 3, "logger": False, "num_workers": 0, "seed": 3, **given}
    return TrialSpec(Net, raylit.Trainer(**arguments)._config, random_state=begun_at(11), order_seed=3)


def ran(trial: TrialRun) -> list[Any]:
    reports = [trial.next()]
    while not reports[-1].done:
        reports.append(trial.next())
    return reports


def weights(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = Saved.of(str(folder)).common["state_dict"]
    return weights


def alone(tmp_path: Path, hparams: dict[str, Any], **given: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The same configuration trained by ``Trainer.fit``."""
    state = get_random_state()
    torch.manual_seed(11)
    model = Net(**hparams)
    raylit_trainer = raylit.Trainer(
        max_epochs=3, logger=False, num_workers=0, seed=3, enable_progress_bar=False, enable_model_summary=False,
        storage_path=str(tmp_path / "alone"), num_sanity_val_steps=2, **given,
    )  # fmt: skip
    result = raylit_trainer.fit(model)
    set_random_state(state)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, result.metrics


def begun_at(seed: int) -> dict[str, Any]:
    before = get_random_state()
    torch.manual_seed(seed)
    state = get_random_state()
    set_random_state(before)
    return state


def test_a_trial_is_the_fit_of_its_configuration(tmp_path: Path) -> None:
    theirs, metrics = alone(tmp_path, {"lr": 0.05, "gamma": 0.5})
    trial = TrialRun(spec(), {"lr": 0.05, "gamma": 0.5}, folder=str(tmp_path / "trial"))
    reports = ran(trial)
    assert [(each.epoch, each.step, each.done) for each in reports] == [(1, 4, False), (2, 8, False), (3, 12, True)]
    assert reports[-1].metrics == metrics and {"loss", "val_loss"} <= metrics.keys()
    trial.save(str(tmp_path))
    trial.stop()
    assert all(torch.equal(tensor, weights(tmp_path)[name]) for name, tensor in theirs.items())
    rebuilt = Net.load_from_checkpoint(str(tmp_path))
    assert (rebuilt.hparams.lr, rebuilt.hparams.gamma) == (0.05, 0.5)
    assert {"hparams.yaml", "history.parquet"} <= {file.name for file in (tmp_path / "trial").iterdir()}


def test_a_checkpoint_is_of_the_numbers_just_reported_and_the_trial_goes_on_from_it(tmp_path: Path) -> None:
    whole = TrialRun(spec(), {})
    reports = ran(whole)
    whole.save(str(tmp_path))
    whole.stop()
    begun = TrialRun(spec(), {})
    begun.next()
    (tmp_path / "one").mkdir()
    begun.save(str(tmp_path / "one"))
    begun.stop()
    model = Net.load_from_checkpoint(str(tmp_path / "one"))
    validated = raylit.Trainer(num_workers=0, logger=False, enable_progress_bar=False).validate(model)
    assert validated[0]["val_loss"] == pytest.approx(reports[0].metrics["val_loss"])
    again = TrialRun(spec(), {}, saved=Saved.of(str(tmp_path / "one")))
    (tmp_path / "kept").mkdir()
    again.save(str(tmp_path / "kept"))  # before it has gone on
    assert weights(tmp_path / "kept").keys() == weights(tmp_path / "one").keys()
    assert [each.metrics for each in ran(again)] == [each.metrics for each in reports[1:]]
    (tmp_path / "two").mkdir()
    again.save(str(tmp_path / "two"))
    again.stop()
    assert all(torch.equal(tensor, weights(tmp_path / "two")[name]) for name, tensor in weights(tmp_path).items())


def test_a_clone_has_the_donors_state_and_its_own_options(tmp_path: Path) -> None:
    """By value: momentum buffers and the schedule so far are the donor's, rates and factors the clone's."""
    donor = TrialRun(spec(), {"lr": 0.1, "momentum": 0.9, "gamma": 0.5})
    donor.next()
    donor.save(str(tmp_path))
    donor.stop()
    theirs = Saved.of(str(tmp_path)).common
    assert theirs["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.05)  # one epoch: halved
    clone = TrialRun(spec(), {"lr": 0.4, "momentum": 0.7, "gamma": 0.1}, saved=Saved.of(str(tmp_path)))
    seen: list[Any] = []
    model_step = Net.training_step

    def watched(self: Net, batch: Any, batch_idx: int) -> Any:
        if not seen:
            group = self.optimizers().param_groups[0]
            buffers = [state["momentum_buffer"].clone() for state in self.optimizers().state.values()]
            weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
            seen.append((group["lr"], group["momentum"], self.lr_schedulers().gamma, self.lr_schedulers().base_lrs,
                         buffers, weights))  # fmt: skip
        return model_step(self, batch, batch_idx)

    Net.training_step = watched  # type: ignore[method-assign]
    try:
        clone.next()
    finally:
        Net.training_step = model_step  # type: ignore[method-assign]
    lr, momentum, gamma, base_lrs, buffers, begun = seen[0]
    assert (lr, momentum, gamma, base_lrs) == (pytest.approx(0.2), 0.7, 0.1, [pytest.approx(0.4)])
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in begun.items())
    saved = theirs["optimizer_states"][0]["state"]
    assert all(torch.equal(mine, saved[index]["momentum_buffer"]) for index, mine in enumerate(buffers))
    (tmp_path / "clone").mkdir()
    clone.save(str(tmp_path / "clone"))
    clone.stop()
    after = Saved.of(str(tmp_path / "clone")).common
    assert after["hyper_parameters"]["lr"] == 0.4
    assert after["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.02)


def test_reports_within_an_epoch_and_an_early_stop(tmp_path: Path) -> None:
    trial = TrialRun(spec(val_check_interval=2, max_epochs=1), {})
    reports = ran(trial)
    trial.stop()
    assert [(each.epoch, each.step) for each in reports] == [(0, 2), (1, 4)]  # the epoch's end has its own numbers
    assert "loss" not in reports[0].metrics and {"loss", "val_loss"} <= reports[1].metrics.keys()
    stops = TrialRun(spec(callbacks=[EarlyStopping("val_loss", patience=0, mode="max")], max_epochs=9), {})
    ended = ran(stops)
    stops.stop()
    assert len(ended) < 9 and ended[-1].done


def test_what_the_module_raises_arrives_and_a_stop_ends_the_thread() -> None:
    class Wrong(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                raise KeyError("a mistake")
            return super().training_step(batch, batch_idx)

    given = spec()
    given.module_class = Wrong
    trial = TrialRun(given, {})
    trial.next()
    with pytest.raises(KeyError, match="a mistake"):
        trial.next()
    trial.stop()
    waits = TrialRun(spec(), {})
    waits.next()
    waits.stop()
    assert not [each for each in threading.enumerate() if each.name == "raylit-trial"]
    TrialRun(spec(), {}).stop()  # never begun


def test_tensorboards_table_of_a_trial_has_what_the_search_compares_by() -> None:
    given = TensorBoardLogger(default_hp_metric="other")
    for logger, metric in ((True, "val_loss"), (given, "other"), (TensorBoardLogger(default_hp_metric=False), False)):
        (own,) = _loggers(raylit.Trainer(logger=logger)._config, "/folder", "val_loss")
        assert own.default_hp_metric == metric and own is not given


def test_trials_do_not_share_callbacks() -> None:
    given = spec(callbacks=[EarlyStopping("val_loss", patience=5)])
    first, second = TrialRun(given, {"lr": 0.1}), TrialRun(given, {"lr": 0.1})
    one, two = ran(first), ran(second)
    first.stop()
    second.stop()
    assert [each.metrics for each in one] == [each.metrics for each in two]


EVENTS: list[str] = []


class Told(Net):
    """Says which of the hooks around a fit have run."""

    def on_train_end(self) -> None:
        EVENTS.append("on_train_end")

    def teardown(self, stage: str) -> None:
        EVENTS.append(f"teardown {stage}")

    def on_fit_end(self) -> None:
        EVENTS.append("on_fit_end")


class Hears(raylit.Callback):
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        EVENTS.append("on_exception")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        EVENTS.append(f"callback {stage}")


def told(**hooks: Any) -> TrialRun:
    EVENTS.clear()
    made = spec(callbacks=[Hears()])
    made.module_class = type("Told", (Told,), hooks)
    return TrialRun(made, {})


def test_a_trial_that_is_done_has_run_all_hooks_of_a_fit(tmp_path: Path) -> None:
    trial = told()
    ran(trial)
    expected = ["on_train_end", "callback fit", "teardown fit", "on_fit_end"]
    assert EVENTS == expected
    trial.save(str(tmp_path))  # its end can be taken still
    assert Saved.of(str(tmp_path)).common["epoch"] == 3
    trial.stop()
    assert EVENTS == expected


def test_a_trial_that_is_stopped_is_torn_down_and_no_error() -> None:
    trial = told()
    trial.next()
    trial.stop()
    assert EVENTS == ["callback fit", "teardown fit"]


def _raises(self: Any, *given: Any) -> None:
    raise OSError("no connection")


def test_what_is_raised_at_the_end_is_told() -> None:
    with pytest.raises(OSError, match="no connection"):
        ran(told(on_fit_end=_raises))
    stopped = told(teardown=_raises)
    stopped.next()
    with pytest.warns(UserWarning, match=r"a trial that was stopped raised at its end: OSError\('no connection'\)"):
        stopped.stop()
