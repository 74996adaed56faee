"""Callbacks that say how a run is set up: accumulation, progress bar, summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylit
from raylit.callbacks import (
    GradientAccumulationScheduler,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from raylit.errors import ConfigError
from tests.two_process.harness import run_here
from tests.unit.engine.small import Numbers, numbers, quiet


# -- gradient accumulation -------------------------------------------------------------------------------------------
def test_accumulation_by_epoch_against_a_hand_calculation(tmp_path: Path) -> None:
    module, steps = Numbers(), []
    watch = raylit.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, module: steps.append(trainer.global_step)
    )
    scheduler = GradientAccumulationScheduler({1: 2, 3: 4})
    quiet(tmp_path, max_epochs=4, callbacks=[scheduler, watch]).fit(module, numbers(1, 2, 3, 4))
    assert steps == [4, 6, 8, 9]
    # Gradient: the batch's number. Epoch 0 moves by 10 in all, with groups of 2 by 10 / 2, with groups of 4 by 10 / 4.
    assert module.weight.item() == -(10 + 5 + 5 + 2.5)


def test_what_the_schedule_says() -> None:
    scheduler = GradientAccumulationScheduler({4: 8, 2: 3})
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(6)] == [1, 1, 3, 3, 8, 8]
    assert scheduler.scheduling == {0: 1, 2: 3, 4: 8} and scheduler.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({3: 1}).going_to_accumulate_grad_batches()


def test_the_trainer_knows_the_number(tmp_path: Path) -> None:
    seen = []
    watch = raylit.callbacks.LambdaCallback(
        on_train_epoch_start=lambda trainer, module: seen.append(trainer.accumulate_grad_batches)
    )
    callbacks = [GradientAccumulationScheduler({0: 2, 1: 3}), watch]
    quiet(tmp_path, max_epochs=2, callbacks=callbacks).fit(Numbers(), numbers(1))
    assert seen == [2, 3]


@pytest.mark.parametrize(("scheduling", "words"), [
    (4, r"expected a dict \{epoch: batches\}"), ({}, "is empty"), ({-1: 2}, "at least 0"), ({0: 0}, "at least 1"),
    ({0: 1.5}, "whole number"), ({"0": 2}, "whole number"),
])  # fmt: skip
def test_schedules_that_are_refused(scheduling: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^GradientAccumulationScheduler\\(.*{words}"):
        GradientAccumulationScheduler(scheduling)


# -- contradictions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("callbacks", "given", "words"), [
    ([GradientAccumulationScheduler({0: 2})], {"accumulate_grad_batches": 4}, "both say how many batches"),
    ([RichProgressBar()], {"enable_progress_bar": False}, "RichProgressBar in callbacks: leave one out"),
    ([RichProgressBar(), TQDMProgressBar()], {}, "RichProgressBar and TQDMProgressBar are both about the progress bar"),
    ([ModelSummary(), RichModelSummary()], {}, "both about the model summary"),
])  # fmt: skip
def test_contradictions_are_refused_when_the_trainer_is_made(callbacks: Any, given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        raylit.Trainer(max_epochs=1, num_workers=0, callbacks=callbacks, **given)


def test_a_contradicting_callback_of_the_module_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    class Own(Numbers):
        def configure_callbacks(self) -> Any:
            return [GradientAccumulationScheduler({0: 2})]

    with pytest.raises(ConfigError, match="both say how many batches"):
        quiet(tmp_path, accumulate_grad_batches=3).fit(Own(), numbers(1))
    assert not list(tmp_path.iterdir())


# -- the progress bar ------------------------------------------------------------------------------------------------
def loud(tmp_path: Path, **given: Any) -> raylit.Trainer:
    """A trainer that shows its epoch lines."""
    return quiet(tmp_path, **{"enable_progress_bar": True, **given})


def test_refresh_rate_0_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud(tmp_path, callbacks=[TQDMProgressBar(refresh_rate=0)]).fit(Numbers(), numbers(1, 2))
    assert capsys.readouterr().out == ""
    quiet(tmp_path, callbacks=[RichProgressBar(refresh_rate=0)]).fit(Numbers(), numbers(1, 2))  # says the same twice
    loud(tmp_path, callbacks=[TQDMProgressBar(leave=True)]).fit(Numbers(), numbers(1, 2))
    assert capsys.readouterr().out.startswith("epoch 1/1  2 steps")


def test_refresh_rate_counts_in_steps_of_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylit.worker.output._REFRESH_S", 0.0)  # an event a batch
    bar = RichProgressBar(refresh_rate=3)
    events = run_here(Numbers(), numbers(*range(7)), callbacks=[bar], enable_progress_bar=True).events
    assert [event["batch"] for event in events if event["kind"] == "progress"] == [0, 0, 3, 3, 3, 6, 7]


def test_get_metrics_chooses_what_the_bar_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(TQDMProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> Any:
            items = dict(super().get_metrics(trainer, module))
            items.pop("loss")
            return {**items, "step": trainer.global_step}

    monkeypatch.setattr("raylit.worker.output._REFRESH_S", 0.0)
    events = run_here(Numbers(), numbers(1, 2, 3), callbacks=[Own()], enable_progress_bar=True).events
    values = [event["values"] for event in events if event["kind"] == "progress"]
    assert values[-1] == {"step": 2}  # of one refresh ago: values are read late


@pytest.mark.parametrize(("make", "words"), [
    (lambda: RichProgressBar(refresh_rate=-1), "refresh_rate=-1.*0 turns the bar off"),
    (lambda: RichProgressBar(refresh_rate=None), "whole number"),
    (lambda: RichProgressBar(theme="dark"), "raylit has one bar, of one look"),
    (lambda: RichProgressBar(console_kwargs={"width": 3}), "console_kwargs"),
    (lambda: TQDMProgressBar(process_position=2), "process_position=2"),
    (lambda: TQDMProgressBar(colour=None), r"TQDMProgressBar\(colour=None\)"),
    (lambda: TQDMProgressBar(leave=2), "True or False"),
])  # fmt: skip
def test_what_the_bar_cannot_do_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_lightnings_own_defaults_are_taken() -> None:
    assert TQDMProgressBar(refresh_rate=1, process_position=0).is_enabled
    assert RichProgressBar(refresh_rate=0, theme=None, console_kwargs=None).is_disabled


# -- the summary -----------------------------------------------------------------------------------------------------
class Deep(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.outer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("make", "enabled", "rows"), [
    (None, True, ["outer"]), (None, False, None),
    (lambda: ModelSummary(), False, ["outer"]),  # the callback asks for it, whatever the argument says
    (lambda: ModelSummary(max_depth=2), True, ["outer", "outer.0"]),
    (lambda: RichModelSummary(max_depth=-1), True, ["outer", "outer.0", "outer.0.0"]),
    (lambda: ModelSummary(max_depth=0), True, None),
])  # fmt: skip
def test_depth_of_the_summary(make: Any, enabled: bool, rows: list[str] | None) -> None:
    callbacks = [] if make is None else [make()]
    ran = run_here(Deep(), [torch.ones(1, 2)], callbacks=callbacks, enable_model_summary=enabled)
    texts = [event["text"] for event in ran.events if event["kind"] == "summary"]
    if rows is None:
        assert not texts
    else:
        table = texts[0].splitlines()
        assert [line.split("|")[1].strip() for line in table if line[:1].isdigit() and "|" in line] == rows


@pytest.mark.parametrize("make", [lambda: ModelSummary(max_depth=-2), lambda: ModelSummary(max_depth="top"),
                                  lambda: RichModelSummary(header_style="bold")])  # fmt: skip
def test_refused_summaries(make: Any) -> None:
    with pytest.raises(ConfigError, match="ModelSummary"):
        make()
