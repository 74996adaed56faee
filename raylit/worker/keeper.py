"""Keeps a fit's checkpoints: asks every ModelCheckpoint at the fit's safe points, has their states written. Floor 4.

Every rank runs the same keeper and comes to the same decisions: from the step, the epoch, metrics that are reduced
over all workers, and one small message between the ranks where a decision needs more (a clock, a step's value, what
became of the save before). A safe point at which nothing is due costs two comparisons and no message.

A save that fails costs the checkpoint, never the training: a line says so, what was kept before stays, and the next
save is tried as ever.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, tensor

from raylit.callbacks.keeping import Decision, Kept, Moment, decide, due, restored, same_again
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Manifest, Store
from raylit.checkpoint.writer import Job, Outcome, Writer
from raylit.engine.parts import Parts
from raylit.errors import ConfigError, nearest
from raylit.ports import RunSnapshot
from raylit.stage import Loop, SafePoint

FOLDER = "checkpoints"  # within the run folder
_ASK_BATCHES = 20  # several workers agree on the time this often
_LAST_JOIN_S = 60.0  # after an exception: how long the save in flight may take
_NEVER = 1 << 62
_NOT = (-1, None)
_ENDS = (SafePoint.END, SafePoint.INTERRUPT)
_NEEDED = (*_ENDS, SafePoint.PREEMPTION)  # the state of now is wanted, whatever was measured on it
# What a state is, so that one that is there already is not written again:
# (the epoch is closed, epoch, step, batch of the epoch; a half less while the validation after it runs).
State = tuple[bool, int, int, float]


@dataclass
class _Keeping:
    """One ModelCheckpoint and what it has."""

    callback: ModelCheckpoint
    store: Store
    kept: Kept = field(default_factory=Kept)
    before: Kept = field(default_factory=Kept)  # kept, until the save in flight is done
    taken: set[str] = field(default_factory=set)  # names in use
    saved: tuple[State, str] | None = None  # the last one
    spares: set[str] = field(default_factory=set)  # kept for a notice alone: they go once a later state is whole
    due_at: float = 0.0  # by time, on this rank's clock

    @property
    def pause_s(self) -> float:
        """The time between two checkpoints, where the clock has a say."""
        return self.callback.when.every_s or self.callback.when.least_s

    @property
    def steps(self) -> int:
        """The rhythm by steps; 0: none."""
        return self.callback.when.every_n_steps


def store_of(callback: ModelCheckpoint, run_folder: str, filesystem: Any = None) -> Store:
    """Where a ModelCheckpoint keeps the checkpoints of a run."""
    if callback.own_folder is not None:
        return Store(Folder(callback.own_folder))
    return Store(Folder(f"{run_folder.rstrip('/')}/{FOLDER}", filesystem))


class CheckpointKeeper:
    """Implements ``ports.Checkpointer``. ``start`` it on every rank before the fit, ``close`` it after."""

    def __init__(self, parts: Parts, run_folder: str, filesystem: Any = None,
                 now: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._parts, self._state, self._now, self._run = parts, parts.state, now, run_folder
        self._collective, world = parts.strategy.collective, parts.state.world
        self._several, self._first = world.world_size > 1, world.global_rank == 0
        self._writer = Writer(world.global_rank, world.world_size)
        self._kept = [_Keeping(each, store_of(each, run_folder, filesystem)) for each in parts.state.callbacks
                      if isinstance(each, ModelCheckpoint)]  # fmt: skip
        self._next_step = 0
        self._timed = any(each.callback.when.every_s for each in self._kept)
        self._asked = 0  # safe points within epochs, for the clock
        self._closed_epoch = -1  # epochs done at the last safe point after an epoch
        self._validated = False  # a validation of this fit is done
        self._failing: dict[str, str] = {}  # folders that cannot be written now, and why
        self._failure = ""  # the last one

    # -- before and after ----------------------------------------------------------------------------------------
    def start(self) -> None:
        """Learn what a killed attempt of this run left; every rank calls it. One message for all stores."""
        mine = ([self._look(each) for each in self._kept], secrets.token_hex(4)) if self._first else None
        there, self._writer.attempt = self._collective.broadcast_object(mine)
        for keeping, (names, left, spares) in zip(self._kept, there):
            keeping.taken, keeping.spares = set(names), set(spares)
            kept = restored(keeping.callback.rules, left)
            keeping.kept = keeping.before = replace(kept, last=spares[-1]) if spares else kept
            keeping.callback.began(keeping.store.folder.path, keeping.kept)
            keeping.due_at = self._now() + keeping.pause_s

    def _look(self, keeping: _Keeping) -> tuple[list[str], list[tuple[str, float | None]], list[str]]:
        """Names in use, and this callback's checkpoints in this run; sweeps up what was never finished."""
        store, callback = keeping.store, keeping.callback
        names: list[str] = []
        mine: list[Manifest] = []
        whole: list[tuple[str, float | None]] = []
        spares: list[str] = []
        try:
            for found in store.survey():
                manifest = found.manifest
                if manifest is None and callback.own_folder is None and store.sweep(found.name):
                    continue
                names.append(found.name)
                if manifest is not None and (manifest.keeper, manifest.run) == (callback.state_key, self._run):
                    mine.append(manifest)
            # The state that this run goes on from was read to its end. One of the same step or a later one may have
            # been passed over because it is damaged.
            here = self._state.global_step
            for manifest in mine:
                seen = manifest.step < here or [each.step for each in mine if each.step >= here] == [here]
                if not store.faults(manifest, deep=not seen):
                    if manifest.notice:
                        spares.append(manifest.name)
                    else:
                        whole.append((manifest.name, manifest.score))
        except OSError as error:
            self._parts.output.note(f"the checkpoints in {store.folder.path} cannot be looked at: {error}")
        return names, whole, spares

    def close(self) -> None:
        """Let the save in flight come to its end; after an exception too, and without the other ranks."""
        for outcome in self._writer.wait(_LAST_JOIN_S):
            self._tell(outcome)
            if outcome.error is not None:
                self._fell_through(outcome)

    @property
    def newest(self) -> str | None:
        """The newest checkpoint in the run's own folder, by its name; where only the best are kept, the best."""
        for keeping in self._kept:
            if keeping.callback.own_folder is None and keeping.kept.names:
                best = keeping.kept.best
                return keeping.kept.last or best[0 if keeping.callback.rules.ranked else -1][0]
        return None

    # -- at safe points ------------------------------------------------------------------------------------------
    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> bool:
        """Save where something is due. Every rank calls it at the same points. False where a needed save failed."""
        if self._writer.failed is not None:
            self._tell(self._writer.failed)
            self._writer.failed = None
        if point is SafePoint.BATCH and self._state.global_step < self._next_step and not self._timed:
            return True
        if point is SafePoint.EPOCH:
            self._closed_epoch = self._state.epoch
        self._validated = self._validated or point is SafePoint.VALIDATION
        asking = [self._best_placed] if point is SafePoint.PREEMPTION else self._asking(point)
        if asking:
            self._save(point, asking, take)
        self._next_step = min((self._state.global_step // k.steps + 1) * k.steps if k.steps else _NEVER
                              for k in self._kept)  # fmt: skip
        failed = point in _NEEDED and self._settle()
        if failed and self._first and point is not SafePoint.PREEMPTION:
            warnings.warn(
                f"the state at the end of the fit could not be kept: {self._failure}. The weights are in the model, "
                "and trainer.save_checkpoint(path) writes them elsewhere",
                UserWarning,
                stacklevel=2,
            )
        return not failed

    @property
    def _best_placed(self) -> _Keeping:
        """The one that keeps a state for a run to go on from; where none does of its own accord, the first must."""
        for each in self._kept:
            if each.callback.rules.save_last is not False and not each.callback.save_weights_only:
                return each
        return self._kept[0]

    def _asking(self, point: SafePoint) -> list[_Keeping]:
        """Those that something is due for; the same on every rank."""
        state, epoch = self._state, self._epoch(point)
        over = state.batch_idx + 1 == state.num_training_batches
        by_time, asking = self._by_time(point), []
        for index, keeping in enumerate(self._kept):
            when, monitor = keeping.callback.when, keeping.callback.monitor
            measured = monitor is not None and state.measured.get(monitor, _NOT)[0] == state.global_step
            wants = due(when, Moment(point, state.global_step, epoch, over, measured), keeping.callback.asked_step)
            if point is SafePoint.EPOCH and when.least_s:
                wants = wants and by_time[index]
            elif point in _ENDS:
                wants = keeping.callback.rules.save_last is not False  # else this state was not asked for
            elif when.every_s and point is not SafePoint.EPOCH:
                wants = wants or by_time[index]
            if wants or (keeping.callback.owed and measured and (point is SafePoint.EPOCH or not over)):
                asking.append(keeping)
        return asking

    def _by_time(self, point: SafePoint) -> list[bool]:
        """Whose time has come, by rank 0's clock."""
        if point is SafePoint.EPOCH:
            ask = any(each.pause_s for each in self._kept)
        else:
            self._asked += 1
            ask = self._timed and (not self._several or self._asked % _ASK_BATCHES == 0)
        if not ask:
            return [False] * len(self._kept)
        now = self._now()
        mine = [each.pause_s > 0 and now >= each.due_at for each in self._kept]
        if not self._several:
            return mine
        flags = tensor([float(each and self._first) for each in mine])  # on the CPU: nothing waits for the device
        return [each > 0 for each in self._collective.all_reduce(flags, "max").tolist()]

    def _epoch(self, point: SafePoint) -> int:
        """The number of the epoch that a state at this point is of."""
        return self._state.epoch if self._within(point) else max(self._state.epoch - 1, 0)

    def _within(self, point: SafePoint) -> bool:
        """True for a point in the middle of an epoch."""
        within = (Loop.TRAIN, Loop.VALIDATION)
        return point not in (SafePoint.EPOCH, SafePoint.END) and self._state.loop in within

    def _here(self, point: SafePoint) -> State:
        """What state a snapshot at this point holds."""
        state = self._state
        if self._within(point):
            half = 0.5 if state.loop is Loop.VALIDATION else 0
            return (False, state.epoch, state.global_step, state.batch_idx - half)
        if point is not SafePoint.END:
            return (True, state.epoch, state.global_step, -1)
        if self._closed_epoch != state.epoch and state.epoch > 0 and state.batch_idx >= 0:
            return (False, state.epoch - 1, state.global_step, state.batch_idx)  # stopped within the epoch
        # A hook that ran after the last epoch may have changed anything.
        return (True, state.epoch, state.global_step, -1 if self._parts.hooks.event("on_train_end") is None else -2)

    # -- the metrics of a state ----------------------------------------------------------------------------------
    def _measured(self) -> dict[str, Tensor]:
        """What was reduced over all workers on the weights as they are."""
        step = self._state.global_step
        return {name: value for name, (at, value) in self._state.measured.items() if at == step}

    def _measure(self, point: SafePoint, asking: list[_Keeping]) -> dict[str, float]:
        """The metrics of a state, the monitored ones among them where they can be known; the same on every rank."""
        metrics = {name: float(value) for name, value in self._measured().items()}
        if point in _NEEDED:
            return metrics
        if point is SafePoint.EPOCH:
            for keeping in asking:
                self._check_monitor(keeping.callback.monitor)
            known = {name: value for name, value in self._state.callback_metrics.items()
                     if name not in self._state.measured}  # fmt: skip
        else:
            known = self._parts.metrics.step_metrics().callback
        # A monitored value that is logged by steps alone is that of the last batch, over all workers their mean.
        names = sorted({name for k in asking if (name := k.callback.monitor) is not None} - metrics.keys())
        if names:
            mine = {name: float(known[name]) for name in names if name in known}
            seen = self._collective.all_gather_object(mine)
            metrics |= {name: sum(each[name] for each in seen) / len(seen)
                        for name in names if all(name in each for each in seen)}  # fmt: skip
        return metrics

    def _check_monitor(self, monitor: str | None) -> None:
        """A metric that nobody logs is a mistake; one of a validation that is still to come is none."""
        state = self._state
        known = state.callback_metrics
        if monitor is None or monitor in known or (state.validates and not self._validated):
            return
        raise ConfigError(
            f"ModelCheckpoint(monitor={monitor!r}): no metric of this name is logged.{nearest(monitor, known)} "
            f"Logged are: {', '.join(sorted(known)) or 'none'}. Log it with self.log({monitor!r}, ...)"
        )

    # -- saving --------------------------------------------------------------------------------------------------
    def _save(self, point: SafePoint, asking: list[_Keeping], take: Callable[[], RunSnapshot]) -> None:
        metrics, here = self._measure(point, asking), self._here(point)
        for keeping in asking if point is not SafePoint.PREEMPTION else ():  # which changes no rhythm
            callback, rules = keeping.callback, keeping.callback.rules
            if point not in _ENDS:
                callback.asked_step, keeping.due_at = self._state.global_step, self._now() + keeping.pause_s
            score = metrics.get(callback.monitor or "")
            callback.owed = rules.ranked and rules.top_k > 0 and score is None and point is not SafePoint.EPOCH
            callback.saw(score)
        chosen = [self._decide(each, point, here, metrics) for each in asking]
        if not any(decision.save for decision, _ in chosen):
            return
        if self._settle():  # the save before was not written: what is kept, and so what is to do, is another
            chosen = [self._decide(each, point, here, metrics) for each in asking]
        jobs = [self._job(each, decision, name, here, metrics, point)
                for each, (decision, name) in zip(asking, chosen) if decision.save]  # fmt: skip
        if not jobs:
            return
        weights_only = all(job.manifest.weights_only for job in jobs) and point not in _NEEDED
        snapshot = self._state.take(True) if weights_only and self._state.take is not None else take()
        loop = (snapshot.common.get("loops") or {}).get("fit_loop") or {}
        # Counted alike at any number of workers: the newest state is found by it.
        batches = int(loop.get("total_batches", 0)) // self._state.world.turns
        self._writer.save([replace(job, manifest=replace(job.manifest, batches=batches)) for job in jobs], snapshot)

    def _decide(self, keeping: _Keeping, point: SafePoint, here: State,
                metrics: dict[str, float]) -> tuple[Decision, str]:  # fmt: skip
        callback, rules, at_end = keeping.callback, keeping.callback.rules, point in _NEEDED
        if point is SafePoint.PREEMPTION:  # the newest state, and never one of the best: those are the run's alone
            rules = replace(rules, ranked=True, top_k=0, save_last=None)
        light = callback.save_weights_only and point is SafePoint.PREEMPTION  # what is there is not enough
        if keeping.saved is not None and keeping.saved[0] == here and not light:
            name = keeping.saved[1]
            if point is not SafePoint.PREEMPTION:
                keeping.kept = same_again(rules, keeping.kept, name, at_end=at_end)
                callback.has(keeping.kept)
            return Decision(False, keeping.kept), name
        values = {**metrics, "epoch": self._epoch(point), "step": self._state.global_step}
        name = plain = callback.format_checkpoint_name(values)
        if point is SafePoint.PREEMPTION:  # it takes no name that another one would have had
            name = plain = f"{plain}-notice"
        version = 0
        while name in keeping.taken:
            version += 1
            name = f"{plain}{callback.CHECKPOINT_JOIN_CHAR}v{version}"
        decision = decide(rules, keeping.kept, name, metrics.get(callback.monitor or ""), at_end=at_end)
        if decision.save and not callback.enable_version_counter:
            for earlier in (each for each in decision.kept.names if each != name and callback.is_version(each, plain)):
                decision = replace(decision, kept=decision.kept.without(earlier), delete=(*decision.delete, earlier))
        whole = point is SafePoint.PREEMPTION or not callback.save_weights_only
        if decision.save and whole and keeping.spares:
            last = decision.kept.last if decision.kept.last not in keeping.spares else None
            gone = tuple(sorted(keeping.spares - set(decision.delete)))
            decision = replace(decision, kept=replace(decision.kept, last=last), delete=(*decision.delete, *gone))
        return decision, name

    def _job(self, keeping: _Keeping, decision: Decision, name: str, here: State, metrics: dict[str, float],
             point: SafePoint) -> Job:  # fmt: skip
        callback, state = keeping.callback, self._state
        keeping.before, keeping.kept, keeping.saved = keeping.kept, decision.kept, (here, name)
        for other in self._kept:  # those of one folder share its names
            if other.store.folder.path == keeping.store.folder.path:
                other.taken.add(name)
        callback.has(decision.kept)
        if point is SafePoint.PREEMPTION:
            keeping.spares.add(name)
        if callback.verbose:
            score = callback.current_score
            text = "" if score is None else f", {callback.monitor} = {float(score):.6g}"
            self._parts.output.note(f"ModelCheckpoint: saving {name} (step {state.global_step}{text})")
        light = callback.save_weights_only and point is not SafePoint.PREEMPTION
        manifest = Manifest(
            name, state.global_step, 0, self._epoch(point), state.world.world_size, metrics, callback.monitor,
            callback.mode, callback.state_key, self._run, light, point is SafePoint.PREEMPTION,
        )  # fmt: skip
        return Job(keeping.store, manifest, decision.delete)

    # -- what became of saves ------------------------------------------------------------------------------------
    def _settle(self) -> bool:
        """Wait for the save in flight; True where one failed, after which less is kept. Rank 0's word counts."""
        if not self._writer.busy:
            return False
        outcomes = [] if self._first else self._writer.wait()
        if self._several:
            # The others' own parts wait for nobody. Where a disk is so full that a rank cannot even leave word of its
            # failure there, rank 0 would wait for its part in vain.
            failed_parts = {o.job.key: o.error for o in outcomes if o.error is not None}
            for rank, told in enumerate(self._collective.gather_object(failed_parts) or ()):
                self._writer.lost.update({key: f"rank {rank}: {error}" for key, error in told.items()})
        if self._first:
            outcomes = self._writer.wait()
        said = self._collective.broadcast_object([(o.error is not None, o.deleted) for o in outcomes])
        for outcome, (failed, deleted) in zip(outcomes, said):
            self._tell(outcome)
            if failed:
                self._fell_through(outcome)
            for keeping in self._kept:
                if keeping.store.folder.path == outcome.job.store.folder.path:
                    keeping.taken.difference_update(deleted)
                    keeping.spares.difference_update(deleted)
        return any(failed for failed, _ in said)

    def _fell_through(self, outcome: Outcome) -> None:
        job = outcome.job
        for keeping in (each for each in self._kept if each.store is job.store and each.saved is not None):
            if keeping.saved is not None and keeping.saved[1] == job.manifest.name:
                keeping.kept, keeping.saved = keeping.before, None
                keeping.callback.has(keeping.kept)

    def _tell(self, outcome: Outcome) -> None:
        """Say on rank 0 what could not be written or deleted; of one reason once, and when it is over."""
        if not self._first:
            return
        folder, name = outcome.job.store.folder.path, outcome.job.manifest.name
        if outcome.error is not None:
            self._failure = f"{folder}/{name}: {outcome.error}"
            reason = outcome.error.replace(name, "")
            if self._failing.get(folder) != reason:
                self._failing[folder] = reason
                self._parts.output.note(f"a checkpoint could not be written, what was kept stays: {self._failure}")
        elif self._failing.pop(folder, None) is not None:
            self._parts.output.note(f"checkpoints are written again: {folder}/{name}")
        for left in outcome.left_over:
            self._parts.output.note(f"an old checkpoint could not be deleted: {left}")
