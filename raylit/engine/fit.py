"""A fit, on one worker, from the first hook to the last. Floor 3.

::

    on_fit_start
    prepare_data                      (global rank 0; the rest wait)
    setup("fit"), configure_model
    configure_optimizers
    on_pretrain_routine_start, on_pretrain_routine_end
    [sanity check]
    on_train_start
    per epoch:
        on_epoch_start, on_train_epoch_start
        per batch:
            on_train_batch_start -> the batch (raylit/engine/step.py) -> on_train_batch_end -> [validation, when due]
        training_epoch_end -> on_train_epoch_end -> on_epoch_end
        [metrics reduced over all workers; epoch schedulers] -> on_train_epoch_settled (callbacks) -> [checkpoint]
    on_train_end
    teardown("fit")
    on_fit_end

The first three lines stand in ``raylit/engine/stages.py``, since all four entry points share them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from raylit.checkpoint.content import apply
from raylit.checkpoint.memory import CopyMemory
from raylit.checkpoint.ranks import random_state
from raylit.config.amounts import batches
from raylit.engine.decide import (
    epochs_reached,
    may_stop,
    resolve_val_interval,
    stepping_batches,
    steps_reached,
    total_or_inf,
    validation_due,
)
from raylit.engine.evaluate import Evaluation, Refresh
from raylit.engine.handle import ModuleHandle
from raylit.engine.notices import NoticeWatch
from raylit.engine.outputs import EpochOutputs, batch_result
from raylit.engine.parts import Parts, Saved
from raylit.engine.replay import replay
from raylit.engine.resume import Position, restore, take, weights_mark
from raylit.engine.schedules import Schedules
from raylit.engine.step import TrainBatch
from raylit.engine.turns import Turns
from raylit.engine.walk import NOTHING, Walk
from raylit.errors import CheckpointError, DataError, OptimizerError
from raylit.metrics.place import BATCH_TRAIN, EPOCH_TRAIN, NO_EPOCH
from raylit.optim.plan import OptimPlan, parse_optimizers
from raylit.optim.rebase import options_of, rebase
from raylit.ports import Collective, LoaderLike, RunSnapshot
from raylit.seed import get_random_state, set_random_state
from raylit.stage import Loop, SafePoint

_STOP_POLL_BATCHES = 20  # several workers agree on a request to stop this often, and at each epoch's end


class Fit:
    """The training loop of one run."""

    def __init__(self, parts: Parts, handle: ModuleHandle) -> None:
        self._parts, self._handle = parts, handle
        self._several = parts.state.world.world_size > 1
        self._turns = parts.state.world.turns  # batches of a step, one after the other: 1, but in elastic runs
        self._validation = Evaluation(parts, Loop.VALIDATION)
        self._sanity = Evaluation(parts, Loop.SANITY)
        self._val_loaders: list[LoaderLike] = []
        self._has_loader = False
        self._batches_done = 0  # since training began
        self._epoch_base = 0  # of these, before the epoch that runs
        self._walk: Walk | None = None
        self._half: Position | None = None  # of a half-done epoch that a checkpoint goes on with
        self._stop_now = self._cut = False  # the latter: a hook ended the epoch
        self._left: RunSnapshot | None = None  # the state at a stop in the middle of an epoch
        self.last: RunSnapshot | None = None  # the state at the end, where it is wanted
        self.outputs: EpochOutputs | None = None
        self.before_validation: dict[str, Any] = {}  # random states at the start of the last one
        self._deadline: float | None = None
        own, event = parts.hooks.own, parts.hooks.event
        self._batch_start, self._batch_end = event("on_train_batch_start"), event("on_train_batch_end")
        self._epoch_end = own("training_epoch_end")
        self._notices = NoticeWatch.of(parts, self._take)
        # A validation that is under way is not kept: it runs anew, from where it began.
        self._validation_notices = NoticeWatch.of(parts, lambda: take(self, at_safe_point=False))
        self.plan = OptimPlan()
        self.memory = CopyMemory()  # of the state, when it is taken
        self.options: dict[str, Any] = {}  # that optimizers and schedulers were made with

    def run(self) -> None:
        """Train until a limit is reached or someone asks to stop."""
        parts, state = self._parts, self._parts.state
        state.stepping_batches = self._stepping_batches
        self.plan = self._optimizers()
        self._train = TrainBatch(parts, self.plan, self._split_size())
        self._schedules = Schedules(parts, self.plan)
        self._handle.begin_training(self.plan, self._train)
        parts.metrics.place = NO_EPOCH
        self._call("on_pretrain_routine_start")
        self.options = options_of(state.optimizers, state.lr_schedulers)
        if parts.saved is not None:
            apply(parts.saved.common, state)
            self.rebase(parts.saved)
        self._call("on_pretrain_routine_end")
        self._ask_for_loader()
        if self._validation.possible:
            self._val_loaders = parts.loaders.evaluation("validate")
        state.validates = bool(self._val_loaders) and parts.settings.val_batch_limit != 0
        if parts.saved is None:
            self._sanity_check()
        if parts.settings.max_time_s is not None:
            self._deadline = time.monotonic() + parts.settings.max_time_s - parts.used_s
        parts.output.stage_start(state)
        state.live_metrics = parts.metrics.step_metrics
        state.replay = lambda: replay(parts, self._epoch_batches(), self._train.without_logging)
        state.take = lambda weights_only: take(self, at_safe_point=False, weights_only=weights_only)
        self._call("on_train_start")
        if parts.saved is not None:
            self._take_up(parts.saved)
        previous = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(previous or parts.settings.detect_anomaly)
        state.holds_interrupts = parts.checkpointer is not None
        try:
            # 0: limit_train_batches leaves nothing to train on. A half-done epoch is brought to its end in any case.
            while self._total != 0 and (self._half is not None or not self._done()):
                self.outputs = self._begin_epoch()
                self._batches(self.outputs)
                self._end_epoch(self.outputs)
                if parts.checkpointer is not None and self._left is None:
                    parts.checkpointer.safe_point(SafePoint.EPOCH, self._take)
        finally:
            state.holds_interrupts = False
            torch.autograd.set_detect_anomaly(previous)
        parts.metrics.place = NO_EPOCH
        self._end_of_training()
        if parts.checkpointer is not None:
            parts.checkpointer.safe_point(SafePoint.END, self._take_last)
        if parts.keeps_last:
            self._take_last()

    # -- the whole state -----------------------------------------------------------------------------------------
    def _take(self) -> RunSnapshot:
        return take(self, at_safe_point=True)

    def _end_of_training(self) -> None:
        """Call ``on_train_end``. Where it puts other weights in place, no metric was measured on them."""
        if self._parts.hooks.event("on_train_end") is None:
            return
        before = weights_mark(self._parts.module) if self._parts.checkpointer is not None else None
        self._call("on_train_end")
        if before is not None and weights_mark(self._parts.module) != before:
            self._parts.state.measured.clear()

    def _take_last(self) -> RunSnapshot:
        """The state to go on from: of a stop in the middle of an epoch, as it was before the epoch was closed."""
        self.last = self.last or self._left or self._take()
        return self.last

    def _stop_within(self, last: bool) -> None:
        """Training stops after this batch: keep the state, unless the epoch ends here anyway."""
        if not last and (self._parts.keeps_last or self._parts.checkpointer is not None):
            self._left = self._take()

    @property
    def parts(self) -> Parts:
        """What the run consists of."""
        return self._parts

    @property
    def train(self) -> TrainBatch:
        """What runs the batches."""
        return self._train

    def position(self, at_safe_point: bool) -> Position:
        """Where the fit stands; ``at_safe_point``: all that follows the last batch is done."""
        state, metrics = self._parts.state, self._parts.metrics
        done = self._batches_done - self._epoch_base
        position = Position(
            total_batches=self._batches_done, groups=self._train.groups_done, stepped=list(self._train.stepped),
            steps_of=list(self._schedules.steps_of),
        )  # fmt: skip
        if done and self._walk is not None:
            position.batches, position.samples = done, self._walk.samples(done)
            whole = state.batch_idx < done  # else a batch is under way, which a resume runs anew
            position.complete = self._cut or (whole and self._walk.complete(done))
            if not at_safe_point and whole:
                if state.loop is Loop.VALIDATION and metrics.running != Loop.TRAIN.value:
                    position.unfinished = "validation"
                elif state.loop is Loop.TRAIN and metrics.place is BATCH_TRAIN:
                    position.unfinished = "log"
        return position

    def loader_states(self) -> dict[str, Any]:
        """What loaders keep beside the position."""
        return {"train": self._loader.state_dict(), "validate": [each.state_dict() for each in self._val_loaders]}

    def looked_up_batch(self) -> Any:
        """The batch that was loaded ahead of its step; None where there is none."""
        return None if self._walk is None or self._walk.ahead is NOTHING else self._walk.ahead

    def _take_up(self, saved: Saved) -> None:
        """Go on from a checkpoint: at an epoch's start at once, within one when its loader is opened."""
        position, world, before = Position.of(saved, len(self.plan.optimizers)), self._parts.state.world, saved.turns
        ranks = saved.extra.get("world_size", world.world_size)
        if not saved.same_ranks or saved.extra.get("shares", ranks) != world.shares_of_a_step:
            if position.batches % before:
                raise CheckpointError(
                    f"the checkpoint was taken by a hook between the {before} turns of a step of an elastic run: only "
                    f"{saved.extra.get('world_size')} workers can go on from it"
                )
            if position.batches:  # in this run's batches, of other sizes
                position.batches = -(-position.samples // self._loader.samples_per_step) * self._turns
            position.total_batches = position.total_batches // before * self._turns
        self._batches_done, self._schedules.steps_of = position.total_batches, position.steps_of
        self._train.groups_done, self._train.stepped = position.groups, position.stepped
        if position.batches:
            self._half = position
            return
        self._load_loaders(saved, within=False)
        restore(self, saved)

    def _load_loaders(self, saved: Saved, within: bool) -> None:
        states = (saved.own or {}).get("loaders")
        if states is not None:
            self._loader.load_state_dict(states["train"], within)
            for loader, state in zip(self._val_loaders, states["validate"]):
                loader.load_state_dict(state, False)

    def rebase(self, saved: Saved) -> None:
        """Where a search goes on from another trial's state: its own learning rates and other options."""
        before = saved.extra.get("options")
        if self._parts.rebased and before is not None:
            rebase(self._parts.state.optimizers, self._parts.state.lr_schedulers, self.options, before)

    def _open(self, half: Position | None) -> Walk:
        """Open the epoch's loader; for a half-done epoch, put everything as it was at this point."""
        parts = self._parts
        self._cut, self._walk = False, self._new_walk()
        if half is None:
            self._walk.open(parts.state.epoch)
            return self._walk
        assert parts.saved is not None
        self._load_loaders(parts.saved, within=not half.complete)
        if half.complete:
            self._walk.over(half.batches, half.samples)
        else:
            ahead = (parts.saved.own or {}).get("next_batch")
            self._walk.open(parts.state.epoch, half.batches, half.samples, NOTHING if ahead is None else ahead["value"])
        if parts.saved.own is None or "random" not in parts.saved.own:
            self._walk.reseed_hooks(half.batches)
        restore(self, parts.saved)  # now: making the iterator has drawn random numbers
        self._train.stepped, self._cut = half.stepped, half.complete
        parts.state.batch_idx, parts.metrics.place = half.batches - 1, BATCH_TRAIN
        return self._walk

    # -- before the first batch ----------------------------------------------------------------------------------
    def _optimizers(self) -> OptimPlan:
        parts = self._parts
        automatic = parts.module.automatic_optimization
        configure = parts.hooks.own("configure_optimizers")
        if configure is None:
            raise OptimizerError(
                f"{type(parts.module).__name__} has no configure_optimizers; write it (return None to run forward only)"
            )
        plan = parse_optimizers(configure(), automatic=automatic)
        if automatic and len(plan.optimizers) > 1 and not parts.hooks.names("training_step", "optimizer_idx"):
            raise OptimizerError(
                f"configure_optimizers returned {len(plan.optimizers)} optimizers, but training_step does not take "
                "optimizer_idx. Add it: training_step(self, batch, batch_idx, optimizer_idx); or set "
                "automatic_optimization = False and step them yourself (manual optimisation)."
            )
        if automatic and len(plan.optimizers) > 1 and not plan.frequencies and parts.state.world.shares is not None:
            raise OptimizerError(
                f"configure_optimizers returned {len(plan.optimizers)} optimizers for each batch, and this run is "
                "elastic: a worker takes several batches of a step one after the other, so the second optimizer's "
                "passes would not all see what the first one's step changed. Give frequencies, one number of workers, "
                "or elastic_batch='scale'."
            )
        parts.state.optimizers = list(plan.optimizers)
        parts.state.lr_schedulers = [scheduler.scheduler for scheduler in plan.schedulers]
        parts.state.lr_scheduler_configs = list(plan.schedulers)
        if not plan.optimizers:
            parts.output.note("configure_optimizers returned None: the loop runs forward only, nothing is trained")
        return plan

    def _split_size(self) -> int:
        return self._parts.settings.truncated_bptt_steps or self._parts.module.truncated_bptt_steps

    def _ask_for_loader(self) -> None:
        """Ask for the training loader; once, also where configure_optimizers wanted to know its length."""
        if not self._has_loader:
            self._loader, self._has_loader = self._parts.loaders.train(), True
            self._set_length()

    def _stepping_batches(self) -> int | float:
        settings = self._parts.settings
        self._ask_for_loader()
        steps = -1 if settings.step_limit is None else settings.step_limit
        group = settings.accumulation_at
        return stepping_batches(self._total, settings.epoch_limit, steps, lambda epoch: group(epoch) * self._turns)

    def _set_length(self) -> None:
        settings, state, turns = self._parts.settings, self._parts.state, self._turns
        # What the Trainer's arguments count as a batch is a step's data, whatever the number of workers.
        own = self._loader.num_batches
        steps = None if own is None else own // turns
        limited = batches(settings.train_batch_limit, steps, "limit_train_batches")
        self._total = None if limited is None else limited * turns
        # An unknown length under a limit may turn out shorter: then the end must be looked for.
        self._known = self._loader.num_batches is not None and self._loader.equal_steps
        known = limited if self._known else None
        if self._total != 0:
            every = resolve_val_interval(settings.val_check_interval, known, settings.check_val_every_n_epoch)
            self._interval = None if every is None else every * turns
        state.num_training_batches = total_or_inf(self._total)

    @property
    def _agreeing(self) -> Collective | None:
        """What the ranks agree with on who has a batch; None where they need not."""
        return self._parts.strategy.collective if self._several and not self._loader.equal_steps else None

    def _sanity_check(self) -> None:
        limit = self._parts.settings.num_sanity_val_steps
        if limit == 0 or not self._val_loaders or self._parts.settings.val_batch_limit == 0:
            return
        state, event = self._parts.state, self._parts.hooks.event
        start, end = event("on_sanity_check_start"), event("on_sanity_check_end")
        # Training must draw the same random numbers with the check as without it.
        random_state = get_random_state()
        on_gpu = torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None
        state.loop = Loop.SANITY
        if start is not None:
            start()
        self._sanity.run(self._val_loaders, 1.0 if limit < 0 else limit, at_most=self._parts.settings.val_batch_limit)
        # Its numbers are of an untrained model: nobody may take them for a validation.
        state.callback_metrics.clear()
        if end is not None:
            end()
        state.loop = None
        set_random_state(random_state)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, state.device)

    # -- one epoch -----------------------------------------------------------------------------------------------
    def _begin_epoch(self) -> EpochOutputs | None:
        parts, state, metrics = self._parts, self._parts.state, self._parts.metrics
        settings = parts.settings
        if (
            settings.reload_dataloaders_every_n_epochs
            and state.epoch
            and state.epoch % settings.reload_dataloaders_every_n_epochs == 0
        ):
            self._loader = parts.loaders.train()
            self._val_loaders = parts.loaders.evaluation("validate") if self._validation.possible else []
            self._set_length()
        self._steps_before = state.global_step if self._half is None else -1
        self._epoch_base = self._batches_done - (0 if self._half is None else self._half.batches)
        state.batch_idx = -1
        state.loop = Loop.TRAIN
        metrics.begin(Loop.TRAIN.value)
        metrics.place = EPOCH_TRAIN
        parts.output.epoch_start(state, self._total)
        self._call("on_epoch_start")
        self._call("on_train_epoch_start")
        if not parts.hooks.wants_epoch_outputs:
            return None
        return EpochOutputs(self._train.lanes, bool(self._split_size()))

    def _end_epoch(self, outputs: EpochOutputs | None) -> None:
        parts, state, metrics = self._parts, self._parts.state, self._parts.metrics
        if self._train.stepped and not parts.module.automatic_optimization:  # in a hook after the last batch
            state.global_step += 1
            self._train.stepped = []
        hooks = parts.hooks
        if self._epoch_end or hooks.event("on_train_epoch_end") or hooks.event("on_epoch_end"):
            settled = metrics.settle()  # what the batches logged, for these hooks to read
            state.callback_metrics.update(settled.callback)
            state.progress_bar_metrics.update(settled.progress_bar)
        metrics.place = EPOCH_TRAIN
        collected = None if outputs is None else outputs.result()
        if self._epoch_end is not None:
            self._epoch_end(collected)
        ended = parts.hooks.event("on_train_epoch_end")
        if ended is not None:
            ended(collected)
        self._call("on_epoch_end")
        metrics.sync_steps()
        steps = metrics.step_metrics(graphs=False)  # the last step's values stay to be read
        state.callback_metrics.update(steps.callback)
        state.progress_bar_metrics.update(steps.progress_bar)
        logged = metrics.end()
        metrics.place = NO_EPOCH
        state.callback_metrics.update(logged.callback)
        state.measured.update({name: (state.global_step, value) for name, value in logged.callback.items()})
        state.logged_metrics.update(logged.logger)
        state.progress_bar_metrics.update(logged.progress_bar)
        parts.output.epoch_metrics(state, logged.logger, logged.progress_bar)
        self._schedules.epoch_done(state.epoch + 1)
        self._call("on_train_epoch_settled")
        self._check_that_something_stepped()
        parts.output.loop_end(state, Loop.TRAIN, logged.callback)
        state.epoch += 1
        state.loop, self._epoch_base, self.outputs = None, self._batches_done, None

    def _check_that_something_stepped(self) -> None:
        """Tell of an epoch without a step; an error where only ``max_steps`` limits the run, which would never end."""
        state, settings = self._parts.state, self._parts.settings
        if state.global_step != self._steps_before:
            return
        why = (
            "did training_step return the loss in any batch?" if self.plan.optimizers
            else "configure_optimizers returned None."
        )  # fmt: skip
        endless = settings.epoch_limit is None and self._deadline is None and settings.step_limit is not None
        if endless and not state.stop_requested and not self._stop_now:
            raise OptimizerError(
                f"no optimizer stepped in epoch {state.epoch}, and max_steps={settings.step_limit} counts optimizer "
                f"steps: training would never end. {why} To run forward only, give max_epochs."
            )
        if state.epoch == 0 and state.global_step == 0 and self.plan.optimizers:
            self._parts.output.note(f"nothing was trained in epoch 1: no optimizer stepped; {why}")

    def _batches(self, outputs: EpochOutputs | None) -> None:
        """Train on the epoch's batches. What stands in this loop is paid for at every step."""
        parts, state, metrics = self._parts, self._parts.state, self._parts.metrics
        train, transfer, output = self._train, parts.transfer, parts.output
        batch_start, batch_end, validation = self._batch_start, self._batch_end, self._validation
        accumulate = parts.settings.accumulation_at(state.epoch) * self._turns
        train.begin_epoch(accumulate)
        turns = Turns(self._turns, metrics) if self._turns > 1 else None
        self._handle.begin_epoch()
        manual, splits = not parts.module.automatic_optimization, bool(self._split_size())
        log_every = parts.settings.log_every_n_steps if output.wants_steps else 0
        refresh = Refresh(output.refresh_s) if output.refresh_s != float("inf") else None
        validate = bool(self._val_loaders) and validation.possible and parts.settings.val_batch_limit != 0
        schedules = self._schedules if self._schedules.by_step else None
        poll = self._turns * (_STOP_POLL_BATCHES if self._several or state.world.shares is not None else 1)
        timed = self._deadline is not None
        half, self._half = self._half, None
        walk, checkpointer, notices = self._open(half), parts.checkpointer, self._notices
        final, batch_idx, reseeds = walk.final, walk.first - 1, walk.reseeds
        if half is not None:
            self._finish_batch(half, log_every, validate)
        for batch_idx, batch in walk if not self._stop_now else ():
            last = batch_idx == final or walk.ended
            state.batch_idx = batch_idx
            if transfer is not None:
                batch = transfer(batch, 0)
            metrics.set_batch(batch)
            if turns is not None:
                turns.begin()
            metrics.place = BATCH_TRAIN
            if batch_start is not None and batch_start(batch, batch_idx, 0) == -1:
                train.drop_group()
                self._cut = True
                self._batches_done -= batch_idx % self._turns  # of the step nothing is done
                break
            done = last or (batch_idx + 1) % accumulate == 0
            if manual:
                self._handle.batch_starts(done)
            collected = train.run(batch, batch_idx, done)
            if splits:
                metrics.finish_splits()
            stepped = train.stepped
            if manual:
                train.stepped = []  # a hook that steps after this is counted with the next batch
            if stepped:
                state.global_step += 1
                if turns is not None:
                    turns.show()
                if schedules is not None:
                    schedules.stepped(stepped)
            self._batches_done += 1
            if collected is not None:
                if outputs is not None:
                    outputs.add(collected)
                if batch_end is not None:
                    batch_end(batch_result(collected, splits), batch, batch_idx, 0)
            if turns is not None and not turns.end(batch_idx):
                continue
            if reseeds:
                walk.reseed_hooks(batch_idx + 1)
            if log_every and stepped and state.global_step % log_every == 0:
                self._log_step()
            if refresh is not None and refresh.due():
                output.progress(state, batch_idx + 1, self._total, train.loss)
            validated = validate and self._validation_due(batch_idx, last)
            if validated:
                self._validate()
            if checkpointer is not None:
                checkpointer.safe_point(SafePoint.VALIDATION if validated else SafePoint.BATCH, self._take)
            if state.global_step == state.max_steps:
                self._stop_now = True
            elif (state.stop_requested or timed or self._several) and (batch_idx + 1) % poll == 0:
                self._ask_to_stop()
            if self._stop_now:
                self._stop_within(last)
                break
            if notices is not None:
                notices.batch_done()
        else:
            if batch_idx < final and not self._stop_now:
                raise DataError(
                    f"the training loader said that it has {final + 1} batches and gave {batch_idx + 1}; "
                    "its __len__ must be the number of batches that it yields"
                )
        if batch_idx < 0:
            raise DataError("the training loader gave no batch; look at its data set, batch_size and drop_last")

    def _finish_batch(self, half: Position, log_every: int, validate: bool) -> None:
        """Do what was still to come after the last batch when its checkpoint was taken, in a hook."""
        state = self._parts.state
        if half.unfinished == "log" and self._walk is not None and half.batches % self._turns == 0:
            self._walk.reseed_hooks(half.batches)  # as after any step
        stepped = self._train.stepped or not self._parts.module.automatic_optimization
        if half.unfinished == "log" and log_every and stepped and state.global_step % log_every == 0:
            self._log_step()
        if half.unfinished and validate and self._validation_due(half.batches - 1, half.complete):
            self._validate()
        if steps_reached(state.global_step, state.max_steps):
            self._stop_now = True
            self._stop_within(half.complete)

    def _epoch_batches(self) -> Iterator[tuple[int, Any]]:
        """All batches of an epoch with their index, for whoever passes over them once more."""
        walk = self._new_walk()
        walk.open(self._parts.state.epoch)
        return iter(walk)

    def _new_walk(self) -> Walk:
        parts = self._parts
        return Walk(self._loader, self._total, self._known, self._agreeing, parts.state.world, parts.reseed)

    def _validation_due(self, batch_idx: int, last: bool) -> bool:
        every = self._parts.settings.check_val_every_n_epoch
        return validation_due(batch_idx + 1, self._batches_done, last, self._interval, self._parts.state.epoch, every)

    def _validate(self) -> None:
        # One model is evaluated, not one a rank: its numbers must not depend on which rank saw which sample.
        self._parts.strategy.equalize_buffers(self._parts.module)
        self.before_validation = random_state(self._parts.state.device)
        limit = self._parts.settings.val_batch_limit
        self._validation.run(self._val_loaders, limit, notices=self._validation_notices)
        self._parts.metrics.place = BATCH_TRAIN

    def _log_step(self) -> None:
        parts, state = self._parts, self._parts.state
        parts.metrics.sync_steps()
        shown = parts.metrics.step_metrics(graphs=False)
        state.callback_metrics.update(shown.callback)
        state.progress_bar_metrics.update(shown.progress_bar)
        taken = parts.metrics.take_step_metrics()
        state.logged_metrics.update(taken)
        parts.output.step_metrics(state, taken)

    # -- stopping ------------------------------------------------------------------------------------------------
    def _ask_to_stop(self) -> None:
        """Grant a request to stop, where all ranks agree that one was made on any of them."""
        state, settings = self._parts.state, self._parts.settings
        if state.interrupt is not None:
            state.holds_interrupts = False  # one more ends the run at once, also while the state is written
            if self._parts.checkpointer is not None:
                self._parts.checkpointer.safe_point(SafePoint.INTERRUPT, self._take)
            raise state.interrupt
        wanted = state.stop_requested or (self._deadline is not None and time.monotonic() >= self._deadline)
        if self._several:
            collective = self._parts.strategy.collective
            flag = torch.tensor(1.0 if wanted else 0.0)  # on the CPU: asking must not wait for the device
            wanted = bool(collective.all_reduce(flag, "max").item())
        if wanted:
            state.stop_requested = True
            # A limit on epochs counts whole ones: the one that runs is not done yet.
            self._stop_now = may_stop(state.epoch, state.global_step, settings.min_epochs or 0, settings.min_steps or 0)

    def _done(self) -> bool:
        state, settings = self._parts.state, self._parts.settings
        if self._stop_now or steps_reached(state.global_step, state.max_steps):
            return True
        if epochs_reached(state.epoch, state.max_epochs):
            return True
        self._ask_to_stop()
        return self._stop_now and may_stop(
            state.epoch, state.global_step, settings.min_epochs or 0, settings.min_steps or 0
        )

    def _call(self, name: str) -> None:
        hook = self._parts.hooks.event(name)
        if hook is not None:
            hook()
