"""Contract 5.1 and 5.2: what ``configure_optimizers`` may return, seen in what is trained and in the learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau, StepLR

import raylit
from raylit.errors import OptimizerError
from tests.unit.engine.small import numbers, quiet


class Weights(raylit.Module):
    """Two weights whose gradient is 1 at each step; each value is minus the sum of its learning rates."""

    def __init__(self, configure: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.configure = configure
        self.turns: list[int] = []

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int = 0) -> Any:
        self.turns.append(optimizer_idx)
        return self.one + self.two

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.current_epoch + 1.0)  # gets worse

    def configure_optimizers(self) -> Any:
        return self.configure(SGD([self.one], lr=1.0), SGD([self.two], lr=10.0))

    @property
    def values(self) -> tuple[float, float]:
        return round(self.one.item(), 4), round(self.two.item(), 4)


def half(optimizer: Any) -> StepLR:
    """Half the rate after each epoch."""
    return StepLR(optimizer, step_size=1, gamma=0.5)


# Two epochs of two batches.
BOTH, ONE = (-4.0, -40.0), (-4.0, 0.0)
HALVED = (-3.0, -30.0)  # 1 + 1 + 0.5 + 0.5

FORMS: dict[str, tuple[Callable[[Any, Any], Any], tuple[float, float]]] = {
    "an optimizer": (lambda a, b: a, ONE),
    "a list": (lambda a, b: [a, b], BOTH),
    "a tuple": (lambda a, b: (a, b), BOTH),
    "a list of one": (lambda a, b: [a], ONE),
    "two lists": (lambda a, b: ([a, b], [half(a), half(b)]), HALVED),
    "two lists, a scheduler for one of them": (lambda a, b: ([a, b], [half(b)]), (-4.0, -30.0)),
    "two lists, scheduler dicts": (lambda a, b: [[a, b], [{"scheduler": half(a)}, half(b)]], HALVED),
    "two lists, no scheduler": (lambda a, b: ([a, b], []), BOTH),
    "a dict": (lambda a, b: {"optimizer": a}, ONE),
    "a dict with a scheduler": (lambda a, b: {"optimizer": a, "lr_scheduler": half(a)}, (-3.0, 0.0)),
    "a dict with lists": (lambda a, b: {"optimizer": [a, b], "lr_scheduler": [half(a), half(b)]}, HALVED),
    "a dict with lists, scheduler dicts": (
        lambda a, b: {"optimizer": [a, b], "lr_scheduler": [{"scheduler": half(b), "interval": "step"}]},
        (-4.0, -18.75),
    ),
    "dicts": (lambda a, b: ({"optimizer": a, "lr_scheduler": half(a)}, {"optimizer": b}), (-3.0, -40.0)),
    "dicts with lists of schedulers": (
        lambda a, b: [{"optimizer": a, "lr_scheduler": [half(a)]}, {"optimizer": b, "lr_scheduler": [half(b)]}],
        HALVED,
    ),
    "dicts with frequencies": (
        lambda a, b: [{"optimizer": a, "frequency": 1}, {"optimizer": b, "frequency": 2}],
        (-2.0, -20.0),
    ),
    "None": (lambda a, b: None, (0.0, 0.0)),
}


@pytest.mark.parametrize(("configure", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_trains_what_it_says(tmp_path, configure, expected):
    module = Weights(configure)
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(module, numbers(1, 1))
    assert module.values == expected
    assert trainer.global_step == (0 if expected == (0.0, 0.0) else 4)


def test_none_says_that_nothing_is_trained(tmp_path, capsys):
    quiet(tmp_path, enable_progress_bar=True).fit(Weights(lambda a, b: None), numbers(1))
    shown = capsys.readouterr()
    assert "configure_optimizers returned None: the loop runs forward only" in shown.out + shown.err


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda a, b: "adam", "configure_optimizers returned 'adam'"),
        (lambda a, b: [a, half(a)], "holds a StepLR object at position 1, where an optimizer should be"),
        (lambda a, b: {"optimizer": a, "lr_schedule": half(a)}, "unknown key 'lr_schedule'. Did you mean"),
        (lambda a, b: ([a], [{"scheduler": half(a), "freq": 1}]), "unknown key 'freq'. Did you mean 'frequency'?"),
        (lambda a, b: ([a], [ReduceLROnPlateau(a)]), "ReduceLROnPlateau needs the name of the logged metric"),
        (lambda a, b: [{"optimizer": a, "frequency": 1}, {"optimizer": b}], "missing for optimizer(s) [1]"),
        (lambda a, b: ([a], [half(b)]), "StepLR was built over a SGD that configure_optimizers does not return"),
    ],
    ids=["other", "no optimizer", "key", "scheduler key", "plateau", "frequency", "foreign scheduler"],
)
def test_errors_come_before_the_first_step_and_show_the_forms(tmp_path, configure, message):
    module = Weights(configure)
    with pytest.raises(OptimizerError) as caught:
        quiet(tmp_path, num_sanity_val_steps=2).fit(module, numbers(1), numbers(1))
    assert message in str(caught.value) and "Accepted forms of configure_optimizers" in str(caught.value)
    assert module.turns == [] and module.values == (0.0, 0.0)


# -- schedulers ------------------------------------------------------------------------------------------------------
def rates(tmp_path, scheduler: Callable[[Any], Any], **arguments: Any) -> list[float]:
    """The learning rate at each of three epochs' four steps."""

    class Module(Weights):
        def on_train_batch_start(self):
            self.rates = [*getattr(self, "rates", []), self.optimizers().param_groups[0]["lr"]]

    module = Module(lambda a, b: ([a], [scheduler(a)]))
    validation = numbers(1) if arguments.pop("validate", False) else None
    quiet(tmp_path, max_epochs=3, **arguments).fit(module, numbers(1, 1, 1, 1), validation)
    return module.rates


def test_an_epoch_scheduler_steps_after_each_epoch(tmp_path):
    assert rates(tmp_path, half) == [1.0] * 4 + [0.5] * 4 + [0.25] * 4


def test_an_epoch_scheduler_with_a_frequency(tmp_path):
    assert rates(tmp_path, lambda a: {"scheduler": half(a), "frequency": 2}) == [1.0] * 8 + [0.5] * 4


def test_a_step_scheduler_steps_after_each_step(tmp_path):
    found = rates(tmp_path, lambda a: {"scheduler": LambdaLR(a, lambda step: step + 1.0), "interval": "step"})
    assert found == [float(step) for step in range(1, 13)]


def test_a_step_scheduler_with_a_frequency_counts_on_over_epochs(tmp_path):
    found = rates(tmp_path, lambda a: {"scheduler": half(a), "interval": "step", "frequency": 3})
    assert found == [1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125] * 3


def test_a_step_scheduler_counts_accumulated_groups(tmp_path):
    found = rates(tmp_path, lambda a: {"scheduler": half(a), "interval": "step"}, accumulate_grad_batches=3)
    # Groups of three batches and of the one left, in each epoch.
    assert found == [1.0] * 3 + [0.5] + [0.25] * 3 + [0.125] + [0.0625] * 3 + [0.03125]


@pytest.mark.parametrize(
    "form",
    [
        lambda a: {"optimizer": a, "lr_scheduler": plateau(a), "monitor": "val"},
        lambda a: {"optimizer": a, "lr_scheduler": {"scheduler": plateau(a), "monitor": "val"}},
        lambda a: {"optimizer": a, "lr_scheduler": [{"scheduler": plateau(a), "monitor": "val", "strict": True}]},
        lambda a: ([a], [{"scheduler": plateau(a), "monitor": "val", "reduce_on_plateau": True, "name": "mine"}]),
        lambda a: [{"optimizer": a, "lr_scheduler": {"scheduler": plateau(a)}, "monitor": "val"}],
    ],
)
def test_plateau_follows_its_monitor_in_every_form(tmp_path, form):
    module = Weights(lambda a, b: form(a))
    trainer = quiet(tmp_path, max_epochs=4)
    trainer.fit(module, numbers(1), numbers(1))
    # The first validation is the best; each of the three after it halves the rate.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125
    assert module.values[0] == -(1 + 1 + 0.5 + 0.25)


def plateau(optimizer: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def test_plateau_by_step_with_a_frequency(tmp_path):
    class Module(Weights):
        def training_step(self, batch, batch_idx):
            self.log("loss", float(batch_idx))
            return super().training_step(batch, batch_idx)

    module = Module(lambda a, b: ([a], [
        {"scheduler": plateau(a), "interval": "step", "frequency": 2, "monitor": "loss"}
    ]))  # fmt: skip
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 1, 1, 1, 1, 1))
    # It sees 1, 3 and 5: two of them are no better than the first.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_each_scheduler_counts_the_steps_of_its_own_optimizer(tmp_path):
    def configure(a, b):
        return [
            {"optimizer": o, "frequency": n, "lr_scheduler": {"scheduler": half(o), "interval": "step", "frequency": 2}}
            for o, n in ((a, 1), (b, 3))
        ]

    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(Weights(configure), numbers(1, 1, 1, 1))
    # Two steps of the first, six of the second: every second of its own counts.
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [1.0 * 0.5, 10.0 * 0.5**3]


@pytest.mark.parametrize("era", ["1.x", "2.x", "bare"])
def test_own_lr_scheduler_step_is_given_the_monitors_value(tmp_path, era):
    class Module(Weights):
        seen: list[Any] = []

        if era == "1.x":

            def lr_scheduler_step(self, scheduler, optimizer_idx, metric):
                self.seen = [*self.seen, (optimizer_idx, None if metric is None else float(metric))]
                super().lr_scheduler_step(scheduler, optimizer_idx, metric)

        elif era == "2.x":

            def lr_scheduler_step(self, scheduler, metric):
                self.seen = [*self.seen, None if metric is None else float(metric)]
                scheduler.step() if metric is None else scheduler.step(metric)

        else:

            def lr_scheduler_step(self, scheduler):
                self.seen = [*self.seen, type(scheduler).__name__]

    def configure(a, b):
        return [a, b], [{"scheduler": plateau(a), "monitor": "val"}, ExponentialLR(b, gamma=0.5)]

    module = Module(configure)
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(module, numbers(1), numbers(1))
    rates = [o.param_groups[0]["lr"] for o in trainer.optimizers]
    if era == "1.x":
        assert module.seen == [(0, 1.0), (1, None), (0, 2.0), (1, None)] and rates == [0.5, 2.5]
    elif era == "2.x":
        assert module.seen == [1.0, None, 2.0, None] and rates == [0.5, 2.5]
    else:
        assert module.seen == ["ReduceLROnPlateau", "ExponentialLR"] * 2 and rates == [1.0, 10.0]


# -- 5.2 several optimizers ------------------------------------------------------------------------------------------
def test_five_critic_steps_to_one_of_the_generator_run_on_over_epochs(tmp_path):
    class Module(Weights):
        def on_train_epoch_end(self, outputs):
            self.outputs = [*getattr(self, "outputs", []), [len(own) for own in outputs]]

    module = Module(lambda a, b: [{"optimizer": a, "frequency": 5}, {"optimizer": b, "frequency": 1}])
    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(module, numbers(1, 1, 1, 1))
    assert module.turns == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert module.values == (-10.0, -20.0) and trainer.global_step == 12
    assert module.outputs == [[4, 0], [3, 1], [3, 1]]


def test_frequencies_count_accumulated_groups(tmp_path):
    module = Weights(lambda a, b: [{"optimizer": a, "frequency": 2}, {"optimizer": b, "frequency": 1}])
    trainer = quiet(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, numbers(1, 1, 1, 1, 1, 1, 1, 1))
    # Two batches to a step: a group is never shared between two optimizers.
    assert module.turns == [0, 0, 0, 0, 1, 1, 0, 0]
    assert module.values == (-3.0, -10.0) and trainer.global_step == 4


def test_several_optimizers_run_in_turn_on_each_batch(tmp_path):
    module = Weights(lambda a, b: [b, a])  # the order in which they are returned
    quiet(tmp_path).fit(module, numbers(1, 1))
    assert module.turns == [0, 1, 0, 1] and module.values == (-2.0, -20.0)


def test_optimizers_and_lr_schedulers_are_one_object_or_a_list(tmp_path):
    class Module(Weights):
        def on_train_start(self):
            self.seen = self.optimizers(), self.lr_schedulers()

    def seen(configure):
        module = Module(configure)
        quiet(tmp_path).fit(module, numbers(1))
        return module.seen

    optimizer, schedulers = seen(lambda a, b: a)
    assert isinstance(optimizer, SGD) and schedulers is None
    optimizer, scheduler = seen(lambda a, b: ([a], [half(a)]))
    assert isinstance(optimizer, SGD) and isinstance(scheduler, StepLR) and scheduler.optimizer is optimizer
    optimizers, schedulers = seen(lambda a, b: ([a, b], [half(b), half(a)]))
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5, 5.0]  # after the epoch
    assert [s.optimizer for s in schedulers] == optimizers[::-1]
