"""Which checkpoints are kept: pure decisions, the same on every rank from the same values. Floor 2.

Checkpoints go by their names. A decision says what is kept once the new checkpoint is whole; until then, and where it
cannot be written, everything that was kept before still is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raylit.stage import SafePoint


@dataclass(frozen=True)
class Rules:
    """What one ModelCheckpoint wants. ``top_k``: -1 keeps all, 0 none but the newest where ``save_last`` says so."""

    top_k: int = 1
    ranked: bool = False  # by a monitored metric; else the newest is the best
    mode: str = "min"
    save_last: bool | None = None  # None: at the end of the fit alone


@dataclass(frozen=True)
class Kept:
    """The checkpoints that are there."""

    best: tuple[tuple[str, float | None], ...] = ()  # (name, score), the best first; in the order of saving if unranked
    last: str | None = None  # the newest state

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys([*(name for name, _ in self.best), *([self.last] if self.last else [])]))

    def without(self, name: str) -> Kept:
        """The others."""
        return Kept(tuple(each for each in self.best if each[0] != name), None if self.last == name else self.last)


@dataclass(frozen=True)
class Decision:
    """What to do with a state. ``kept`` holds once it is saved; ``delete`` is what goes then."""

    save: bool
    kept: Kept
    delete: tuple[str, ...] = ()


def decide(rules: Rules, kept: Kept, name: str, score: float | None, *, at_end: bool = False) -> Decision:
    """Decide about a state that would be saved as ``name``. ``score``: None where none was measured on its weights."""
    best = kept.best
    if not rules.ranked:
        best = {0: (), -1: (*best, (name, score))}.get(rules.top_k, ((name, score),))
    elif rules.top_k == -1:
        best = _ranked((*best, (name, score)), rules.mode)
    elif rules.top_k > 0 and score is not None:
        best = _ranked((*best, (name, score)), rules.mode)[: rules.top_k]
    newest = rules.save_last or (at_end and rules.save_last is None)
    after = Kept(best, name if newest else kept.last)
    if name not in after.names:
        return Decision(False, kept)
    return Decision(True, after, tuple(each for each in kept.names if each not in after.names))


def same_again(rules: Rules, kept: Kept, name: str, *, at_end: bool) -> Kept:
    """What is kept where the state is that of ``name``, which is there already: it may become the newest."""
    newest = rules.save_last or (at_end and rules.save_last is None)
    return replace(kept, last=name) if newest and name in kept.names else kept


def restored(rules: Rules, there: list[tuple[str, float | None]]) -> Kept:
    """What is kept of the checkpoints that a killed attempt of this run left, oldest first."""
    kept = Kept()
    for name, score in there:
        kept = decide(rules, kept, name, score, at_end=True).kept
    return kept


def _ranked(best: tuple[tuple[str, float | None], ...], mode: str) -> tuple[tuple[str, float | None], ...]:
    """The best first; of two equal ones the earlier. What is no number counts as the worst."""

    def key(each: tuple[str, float | None]) -> float:
        score = each[1]
        if score is None or math.isnan(score):
            return math.inf
        return score if mode == "min" else -score

    return tuple(sorted(best, key=key))


@dataclass(frozen=True)
class When:
    """At which moments a ModelCheckpoint wants to save. 0: never for that reason."""

    every_n_steps: int = 0
    every_n_epochs: int = 0
    every_s: float = 0.0
    at_epoch_end: bool | None = None  # False: after validations; None: after those within an epoch, and at epoch ends
    least_s: float = 0.0  # at epoch ends, not more often than this


@dataclass(frozen=True)
class Moment:
    """A safe point as ``due`` needs it; the same on every rank."""

    point: SafePoint
    step: int  # optimizer steps done
    epoch: int  # number of the epoch that runs, or has just ended
    epoch_over: bool = False  # the epoch has no batch left
    measured: bool = True  # a metric is monitored, and was reduced on these weights


def due(when: When, moment: Moment, last_step: int) -> bool:
    """Does this safe point ask for a checkpoint? Time is not asked here. ``last_step``: of the last time by steps."""
    point, every = moment.point, when.every_n_steps
    if point in (SafePoint.END, SafePoint.INTERRUPT):
        return True
    if every and point is not SafePoint.EPOCH and moment.step != last_step and moment.step % every == 0:
        return True
    if not when.every_n_epochs or (moment.epoch + 1) % when.every_n_epochs:
        return False
    if point is SafePoint.EPOCH:
        return when.at_epoch_end is not False
    if point is not SafePoint.VALIDATION or when.at_epoch_end is True:
        return False
    # At the epoch's end the checkpoint waits for the epoch's own metrics, which come in a moment.
    return when.at_epoch_end is False or (moment.measured and not moment.epoch_over)
