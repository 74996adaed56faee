"""Every form of configure_optimizers, every error, and which optimizer and scheduler is due."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, SequentialLR, StepLR

from raylit.errors import OptimizerError
from raylit.optim.plan import OptimPlan, SchedulerPlan, active_optimizers, parse_optimizers, scheduler_due


def sgd() -> SGD:
    return SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


class ForeignScheduler:
    """As timm's: of no class of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None: ...


def test_none_is_an_empty_plan() -> None:
    assert parse_optimizers(None) == OptimPlan()


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: [o], lambda o: (o,), lambda o: {"optimizer": o}])
def test_one_optimizer(wrap: Any) -> None:
    optimizer = sgd()
    assert parse_optimizers(wrap(optimizer)) == OptimPlan((optimizer,))


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_optimizers_keep_their_order(kind: Any) -> None:
    first, second = sgd(), sgd()
    assert parse_optimizers(kind([first, second])).optimizers == (first, second)
    assert parse_optimizers({"optimizer": kind([first, second])}).optimizers == (first, second)


@pytest.mark.parametrize("outer", [list, tuple])
@pytest.mark.parametrize("inner", [list, tuple])
def test_two_lists(outer: Any, inner: Any) -> None:
    first, second = sgd(), sgd()
    on_second, on_first = StepLR(second, 1), LambdaLR(first, lambda _: 1.0)
    plan = parse_optimizers(outer([inner([first, second]), inner([on_second, {"scheduler": on_first}])]))
    assert plan.optimizers == (first, second)
    assert plan.schedulers == (SchedulerPlan(on_second, 1), SchedulerPlan(on_first, 0))


def test_two_lists_with_no_scheduler_or_a_bare_one() -> None:
    optimizer = sgd()
    scheduler = StepLR(optimizer, 1)
    assert parse_optimizers(([optimizer], [])) == OptimPlan((optimizer,))
    assert parse_optimizers(([optimizer], scheduler)).schedulers == (SchedulerPlan(scheduler, 0),)


def test_a_dict_with_every_key() -> None:
    optimizer = sgd()
    scheduler = ReduceLROnPlateau(optimizer)
    options = {
        "scheduler": scheduler,
        "interval": "step",
        "frequency": 3,
        "reduce_on_plateau": True,
        "monitor": "val_loss",
        "strict": False,
        "name": "plateau",
    }
    plan = parse_optimizers({"optimizer": optimizer, "lr_scheduler": options})
    assert plan.schedulers == (SchedulerPlan(scheduler, 0, "step", 3, True, "val_loss", False, "plateau"),)


def test_monitor_beside_the_optimizer_goes_to_its_schedulers_unless_they_have_their_own() -> None:
    first, second = sgd(), sgd()
    a, b = ReduceLROnPlateau(first), ReduceLROnPlateau(second)
    plan = parse_optimizers(
        {"optimizer": [first, second], "lr_scheduler": [a, {"scheduler": b, "monitor": "acc"}], "monitor": "loss"}
    )
    assert [(s.optimizer_idx, s.monitor, s.reduce_on_plateau) for s in plan.schedulers] == [
        (0, "loss", True),
        (1, "acc", True),
    ]


@pytest.mark.parametrize("kind", [list, tuple])
def test_dicts_with_frequencies(kind: Any) -> None:
    first, second = sgd(), sgd()
    scheduler = StepLR(second, 1)
    entries = [
        {"optimizer": first, "frequency": 5, "lr_scheduler": None},
        {"optimizer": second, "frequency": 1, "lr_scheduler": scheduler},
    ]
    plan = parse_optimizers(kind(entries))
    assert plan == OptimPlan((first, second), (SchedulerPlan(scheduler, 1),), (5, 1))


def test_a_cycle_of_one_is_no_cycle() -> None:
    assert parse_optimizers({"optimizer": sgd(), "frequency": 4}).frequencies == ()


def test_other_libraries_schedulers_and_chained_ones() -> None:
    optimizer = sgd()
    foreign = ForeignScheduler(optimizer)
    chained = SequentialLR(optimizer, [StepLR(optimizer, 1), StepLR(optimizer, 2)], milestones=[3])
    plan = parse_optimizers(([optimizer], [foreign, chained]))
    assert [s.scheduler for s in plan.schedulers] == [foreign, chained]
    assert not any(s.reduce_on_plateau for s in plan.schedulers)


def test_a_foreign_plateau_scheduler_says_so() -> None:
    optimizer = sgd()
    plan = parse_optimizers(
        ([optimizer], [{"scheduler": ForeignScheduler(optimizer), "reduce_on_plateau": True, "monitor": "m"}])
    )
    assert plan.schedulers[0].reduce_on_plateau


def test_manual_optimisation_needs_no_monitor() -> None:
    optimizer = sgd()
    plan = parse_optimizers(([optimizer], [ReduceLROnPlateau(optimizer)]), automatic=False)
    assert plan.schedulers[0].monitor is None


O = sgd()  # one optimizer that the cases below share
SAME = StepLR(O, 1)

ERRORS: list[tuple[Any, str]] = [
    (3, "configure_optimizers returned 3"),
    ("adam", "configure_optimizers returned 'adam'"),
    (Adam, "the class Adam (call it to make an object)"),
    (torch.nn.Linear(1, 1), "configure_optimizers returned a Linear object"),
    ([], "an empty list: return None"),
    ((), "an empty tuple: return None"),
    (([], [SAME]), "the first list that configure_optimizers returned is empty"),
    ({"optimizer": []}, '"optimizer" of the dict that configure_optimizers returned is empty'),
    ((O, SAME), "holds a StepLR object at position 1, where an optimizer should be"),
    ([O, None], "holds None at position 1"),
    ([O, Adam], "holds the class Adam (call it to make an object) at position 1"),
    ([O, {"optimizer": sgd()}], "mixes optimizers and dicts"),
    ({}, 'has no "optimizer", only []'),
    ({"lr_scheduler": SAME}, "has no \"optimizer\", only ['lr_scheduler']"),
    ({"optimiser": O}, "the unknown key 'optimiser'. Did you mean 'optimizer'?"),
    ({"optimizer": O, "lr_schedulers": SAME}, "Did you mean 'lr_scheduler'?"),
    ({"optimizer": O, "interval": "step"}, "'interval', which belongs into the dict under \"lr_scheduler\""),
    ({"optimizer": O, 5: 1}, "the unknown key 5."),
    ({"optimizer": O, "monitor": 3}, '"monitor" of the dict that configure_optimizers returned is 3, not a name'),
    ([O, O], "optimizers 0 and 1 are the same SGD object"),
    (([O], [SAME, SAME]), "schedulers 0 and 1 are the same StepLR object"),
    (([O], [O]), "a SGD object is not a scheduler"),
    (([O], [StepLR]), "the class StepLR (call it to make an object) is not a scheduler"),
    (([O], None), "None is not a scheduler"),
    (([O], [StepLR(sgd(), 1)]), "StepLR was built over a SGD that configure_optimizers does not return"),
    (([O], [{"scheduler": SAME, "intervall": "step"}]), "unknown key 'intervall'. Did you mean 'interval'?"),
    (([O], [{"scheduler": SAME, "opt_idx": 0}]), "(the optimizer is read off the scheduler)"),
    (([O], [{"interval": "step"}]), "a scheduler's dict has no \"scheduler\", only ['interval']"),
    (([O], [{"scheduler": SAME, "interval": "epochs"}]), '"interval" is \'epochs\', not "epoch" or "step"'),
    (([O], [{"scheduler": SAME, "interval": None}]), '"interval" is None'),
    (([O], [{"scheduler": SAME, "frequency": 0}]), '"frequency" is 0, not a number of epochs of at least 1'),
    (([O], [{"scheduler": SAME, "frequency": True}]), '"frequency" is True'),
    (([O], [{"scheduler": SAME, "strict": "no"}]), "\"strict\" is 'no', not True or False"),
    (([O], [{"scheduler": SAME, "name": ""}]), "\"name\" is '', not a name"),
    (([O], [ReduceLROnPlateau(O)]), "ReduceLROnPlateau needs the name of the logged metric"),
    (([O], [{"scheduler": SAME, "reduce_on_plateau": True}]), "StepLR needs the name of the logged metric"),
    (
        ([O], [{"scheduler": ReduceLROnPlateau(O), "reduce_on_plateau": False, "monitor": "m"}]),
        '"reduce_on_plateau" is False for a ReduceLROnPlateau',
    ),
    (
        [{"optimizer": O, "frequency": 2}, {"optimizer": sgd()}],
        "for some optimizers only; it is missing for optimizer(s) [1]",
    ),
    ([{"optimizer": O, "frequency": 0}, {"optimizer": sgd(), "frequency": 1}], '"frequency" of dict 0 is 0'),
    ({"optimizer": [O, sgd()], "frequency": 1}, "beside a list of optimizers"),
]


@pytest.mark.parametrize(("returned", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_errors_say_what_was_given_and_show_the_accepted_forms(returned: Any, message: str) -> None:
    with pytest.raises(OptimizerError) as caught:
        parse_optimizers(returned)
    assert message in str(caught.value)
    assert "Accepted forms of configure_optimizers" in str(caught.value)


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.just(O), st.just(SAME), st.just(Adam)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(
            st.sampled_from(["optimizer", "lr_scheduler", "monitor", "frequency", "scheduler", "interval", "x"]), inner
        ),
    ),
    max_leaves=8,
)


@given(junk)
def test_anything_gives_a_plan_or_an_optimizer_error(returned: object) -> None:
    try:
        plan = parse_optimizers(returned)
    except OptimizerError:
        return
    assert all(each.optimizer_idx < len(plan.optimizers) for each in plan.schedulers)


def test_without_frequencies_all_run_on_every_batch() -> None:
    plan = OptimPlan((sgd(), sgd()))
    assert [active_optimizers(plan, k) for k in range(3)] == [(0, 1)] * 3
    assert active_optimizers(OptimPlan(), 0) == ()


def test_the_cycle_runs_on_over_epochs() -> None:
    plan = OptimPlan((sgd(), sgd()), (), (2, 1))
    epochs = [[active_optimizers(plan, 4 * epoch + batch)[0] for batch in range(4)] for epoch in range(3)]
    assert epochs == [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 1000))
def test_each_cycle_holds_each_block_whole(frequencies: list[int], start: int) -> None:
    plan = OptimPlan(tuple(sgd() for _ in frequencies), (), tuple(frequencies))
    cycle = sum(frequencies)
    chosen = [active_optimizers(plan, start * cycle + k) for k in range(cycle)]
    assert chosen == [(index,) for index, block in enumerate(frequencies) for _ in range(block)]


def test_scheduler_due() -> None:
    plan = SchedulerPlan(scheduler=None, optimizer_idx=0, interval="step", frequency=3)
    assert [scheduler_due(plan, "step", count) for count in range(1, 7)] == [False, False, True] * 2
    assert not scheduler_due(plan, "epoch", 3)
