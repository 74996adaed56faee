"""Which checkpoints are kept and when: pure decisions, against a plain recount of the whole sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit.callbacks.keeping import Kept, Moment, Rules, When, decide, due, restored, same_again
from raylit.stage import SafePoint

scores = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0, 1.0, 2.0, math.nan, math.inf]),
                            st.floats(-5, 5)), max_size=12)  # fmt: skip
rules = st.builds(
    Rules, top_k=st.integers(-1, 3), ranked=st.booleans(), mode=st.sampled_from(["min", "max"]),
    save_last=st.sampled_from([True, False, None]),
).filter(lambda rule: rule.ranked or rule.top_k < 2)  # fmt: skip


def through(rule: Rules, given: list[float | None]) -> tuple[Kept, dict[str, float | None], list[Any]]:
    """Decide about each state in turn, the last one at the end of the fit; return what lies on the disk."""
    kept, disk, decisions = Kept(), dict[str, Any](), []
    for index, score in enumerate(given):
        decision = decide(rule, kept, f"c{index}", score, at_end=index == len(given) - 1)
        decisions.append(decision)
        if decision.save:
            disk[f"c{index}"] = score
        for name in decision.delete:
            del disk[name]  # KeyError: deleted twice, or never there
        kept = decision.kept
        assert set(kept.names) == set(disk)
    return kept, disk, decisions


@given(rules, scores)
def test_what_is_kept_is_the_best_and_the_newest(rule: Rules, given: list[float | None]) -> None:
    kept, disk, _ = through(rule, given)
    names = [f"c{index}" for index in range(len(given))]

    def worth(name: str) -> float:
        score = given[int(name[1:])]
        return math.inf if score is None or math.isnan(score) else score if rule.mode == "min" else -score

    if rule.top_k == -1:
        best = set(names)
    elif not rule.ranked:
        best = set(names[-1:]) if rule.top_k else set()
    else:
        ranked = sorted((n for n in names if given[int(n[1:])] is not None), key=worth)  # stable: the earlier first
        best = set(ranked[: rule.top_k])
    assert {name for name, _ in kept.best} == best
    newest = names[-1] if names and rule.save_last is not False else None
    assert kept.last == newest
    assert set(disk) == best | ({newest} if newest else set())
    if rule.ranked and kept.best:
        assert worth(kept.best[0][0]) == min(worth(name) for name, _ in kept.best)


@given(rules, scores)
def test_a_state_that_is_not_kept_is_not_saved(rule: Rules, given: list[float | None]) -> None:
    for index, decision in enumerate(through(rule, given)[2]):
        assert decision.save == (f"c{index}" in decision.kept.names)
        assert f"c{index}" not in decision.delete and not (set(decision.delete) & set(decision.kept.names))


@given(rules, scores)
def test_a_restart_finds_what_was_kept(rule: Rules, given: list[float | None]) -> None:
    kept, disk, _ = through(rule, given)
    again = restored(rule, sorted(disk.items(), key=lambda each: int(each[0][1:])))
    assert [name for name, _ in again.best] == [name for name, _ in kept.best] and again.last == kept.last


def test_the_same_state_again_may_become_the_newest_without_being_written() -> None:
    kept = Kept((("a", 1.0),))
    assert same_again(Rules(1, True), kept, "a", at_end=True) == Kept((("a", 1.0),), "a")
    assert same_again(Rules(1, True), kept, "a", at_end=False) == kept
    assert same_again(Rules(1, True, save_last=False), kept, "a", at_end=True) == kept
    assert same_again(Rules(1, True), kept, "gone", at_end=True) == kept


B, V, E, END = SafePoint.BATCH, SafePoint.VALIDATION, SafePoint.EPOCH, SafePoint.END


@pytest.mark.parametrize(("when", "moment", "expected"), [
    (When(every_n_steps=3), Moment(B, 3, 0), True),
    (When(every_n_steps=3), Moment(V, 3, 0), True),
    (When(every_n_steps=3), Moment(E, 3, 0), False),
    (When(every_n_steps=3), Moment(B, 4, 0), False),
    (When(every_n_epochs=1), Moment(B, 4, 0), False),
    (When(every_n_epochs=1), Moment(E, 4, 0), True),
    (When(every_n_epochs=2), Moment(E, 4, 0), False),
    (When(every_n_epochs=2), Moment(E, 4, 1), True),
    (When(every_n_epochs=1), Moment(V, 4, 0, epoch_over=True), False),  # the epoch's own metrics come in a moment
    (When(every_n_epochs=1), Moment(V, 4, 0), True),
    (When(every_n_epochs=1), Moment(V, 4, 0, measured=False), False),
    (When(every_n_epochs=1, at_epoch_end=True), Moment(V, 4, 0), False),
    (When(every_n_epochs=1, at_epoch_end=False), Moment(V, 4, 0, epoch_over=True), True),
    (When(every_n_epochs=1, at_epoch_end=False), Moment(E, 4, 0), False),
    (When(), Moment(END, 4, 0), True),
    (When(), Moment(E, 4, 0), False),
])  # fmt: skip
def test_when_a_checkpoint_is_due(when: When, moment: Moment, expected: bool) -> None:
    assert due(when, moment, last_step=-1) is expected


def test_one_step_of_several_batches_is_due_once() -> None:
    assert not due(When(every_n_steps=3), Moment(B, 3, 0), last_step=3)
