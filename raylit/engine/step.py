"""One training batch: from the batch on the device to the stepped optimizers. Floor 3.

::

    per split (truncated BPTT), per active optimizer:
        pass:  training_step -> training_step_end -> on_before_backward -> backward -> on_after_backward
        step, where the accumulation group is done:
               on_before_optimizer_step -> clip -> optimizer_step -> on_before_zero_grad -> optimizer_zero_grad

Everything that this file calls is bound in ``__init__``. A hook that nobody overrides is None there, and a batch
compares it with None and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from raylit.checkpoint.ranks import placed, put_back
from raylit.engine.anomaly import NonFinite
from raylit.engine.devices import OverDevices, over_devices
from raylit.engine.outputs import check_loss, detached, kept, loss_of
from raylit.engine.parts import Parts
from raylit.metrics.place import BATCH_TRAIN, SPLIT_TRAIN
from raylit.optim.clip import clip_gradients
from raylit.optim.closure import GradsMark, grads_mark, needs_closure, were_zeroed
from raylit.optim.plan import OptimPlan, active_optimizers
from raylit.optim.toggle import Toggle

Pass = tuple[Any, int, int, Any]  # what one pass was given: split, batch_idx, optimizer index, hiddens


class TrainBatch:
    """Runs training batches. ``stepped`` says which optimizers stepped in the last one (indices from 0)."""

    def __init__(self, parts: Parts, plan: OptimPlan, split_size: int) -> None:
        self._state, self._module = parts.state, parts.module
        self._metrics, self._precision, self._strategy = parts.metrics, parts.precision, parts.strategy
        self._settings, self._plan = parts.settings, plan
        own, event = parts.hooks.own, parts.hooks.event
        manual = not parts.module.automatic_optimization
        step, step_end = own("training_step"), own("training_step_end")
        assert step is not None  # refused long before
        step = over_devices(parts, step, join=step_end is None, training=True)
        self.over = step if isinstance(step, OverDevices) else None  # the batch is split over devices
        step = step if step_end is None else _then(step, step_end)
        self._several = parts.state.world.world_size > 1
        # Sequences may be of other lengths on other ranks; where nothing is averaged in backward nobody waits.
        self._even_out = bool(split_size) and self._several and not manual and bool(plan.optimizers)
        step = _skips_nothing(step) if self._even_out else step
        self._step = parts.strategy.wrap_training_step(
            parts.module, step, optimizers=len(plan.optimizers), manual=manual
        )
        # The common training_step(self, batch, batch_idx), called without anything in between.
        self._bare_step = parts.hooks.exact("training_step", 2) if self._step is own("training_step") else None
        autocast = parts.precision.forward_context
        self._autocast = None if autocast() is None else autocast
        self._no_sync = parts.strategy.no_sync if parts.state.world.world_size > 1 else None
        self._end_group = parts.strategy.end_group if parts.state.world.world_size > 1 else None
        self._scaled = parts.precision.scaled
        self._before_backward, self._after_backward = event("on_before_backward"), event("on_after_backward")
        self._backward = own("backward")
        self._before_step, self._before_zero = event("on_before_optimizer_step"), event("on_before_zero_grad")
        self._step_override, self._zero_override = own("optimizer_step"), own("optimizer_zero_grad")
        self._clip_override = own("configure_gradient_clipping")
        self._clip_val, self._clip_algorithm = parts.settings.gradient_clip_val, parts.settings.gradient_clip_algorithm
        # One call of training_step a batch where nothing, or the person, steps; else one for each optimizer.
        self._steps = bool(plan.optimizers) and not manual
        self._everyone = tuple(range(len(plan.optimizers))) if self._steps else (0,)
        several = self._steps and len(plan.optimizers) > 1
        self._toggle = Toggle(plan.optimizers, parts.module.parameters()) if several else None
        self._closures = [self._step_override is not None or needs_closure(o) for o in plan.optimizers]
        self.watch = NonFinite(parts.module, parts.state) if parts.settings.detect_anomaly else None
        # A context in which calls of log do nothing; set by the handle that log belongs to.
        self.without_logging: Callable[[], AbstractContextManager[Any]] = nullcontext
        # Several optimizers share one scale: it changes when all have stepped, not within a sum of gradients.
        self._late_update = self._scaled and len(plan.optimizers) > 1
        if self._late_update:
            parts.precision.update_each_step = False
        self._split_size = split_size
        self._split = (own("tbptt_split_batch") or parts.split_time) if split_size else None
        self._asks_for_hiddens = bool(split_size) and parts.hooks.names("training_step", "hiddens")
        self._note = parts.output.note
        self._keep = parts.hooks.wants_epoch_outputs or event("on_train_batch_end") is not None
        self._group: list[list[Pass]] = [[] for _ in self._everyone]  # passes to compute anew, per optimizer
        self._objective: list[Tensor | None] = [None for _ in self._everyone]  # the loss of these passes together
        self._took_part = [False for _ in self._everyone]  # a loss was back-propagated in this group
        self.lanes = len(self._everyone)  # outputs are kept for each
        self.accumulate = 1
        self.groups_done = 0  # accumulation groups since training began: the place in the cycle of frequencies
        self.stepped: list[int] = []
        self.loss: Tensor | None = None  # of the last pass; for the progress bar

    def run(self, batch: Any, batch_idx: int, last_of_group: bool) -> list[list[Any]] | None:
        """Train on one batch; return for each optimizer its splits' outputs, or None where nobody asks for them."""
        if self._steps:
            self.stepped = []  # in manual optimisation the loop empties it, since a hook may step after the batch
        plan, toggle = self._plan, self._toggle
        # In manual optimisation the person chooses who steps, and frequencies mean nothing.
        active = active_optimizers(plan, self.groups_done) if plan.frequencies and self._steps else self._everyone
        collected: list[list[Any]] | None = [[] for _ in self._everyone] if self._keep else None
        splits: Sequence[Any] = (batch,)
        hiddens: Any = None
        if self._split is not None:
            splits = self._split(batch, self._split_size)
            if self._even_out:
                splits = self._as_many_on_all_ranks(splits)
            self._metrics.place = SPLIT_TRAIN
        for split in splits:
            given = hiddens
            for index in active:
                if toggle is not None:
                    toggle.toggle(index)
                try:
                    output = self._pass(split, batch_idx, index, given, last_of_group)
                    if self._steps:
                        if self._closures[index]:
                            self._group[index].append((split, batch_idx, index, given))
                            self._objective[index] = self._add(self._objective[index])
                        if last_of_group:
                            self._finish_group(batch_idx, index)
                finally:
                    if toggle is not None:
                        toggle.restore()
                if collected is not None and output is not None:
                    collected[index].append(kept(output))
                if self._split is not None and isinstance(output, dict) and "hiddens" in output:
                    hiddens = detached(output["hiddens"])
        self._metrics.place = BATCH_TRAIN
        if self._asks_for_hiddens and hiddens is None and len(splits) > 1 and self.loss is not None:
            self._asks_for_hiddens = False
            self._note(
                "training_step asks for hiddens and returned none: every piece of a batch starts afresh. Return them "
                'beside the loss: {"loss": loss, "hiddens": state}'
            )
        if last_of_group:
            self.groups_done += 1
        if self._late_update and self.stepped:
            self._precision.update()
        return collected

    def _as_many_on_all_ranks(self, splits: Sequence[Any]) -> list[Any]:
        """Add empty splits up to the number of the rank that has most: it would wait for this one's gradients."""
        count = torch.tensor(float(len(splits)))  # on the CPU: asking must not wait for the device
        most = int(self._strategy.collective.all_reduce(count, "max").item())
        return [*splits, *[None] * (most - len(splits))]

    def begin_epoch(self, accumulate: int) -> None:
        """Take the epoch's number of batches in a group, and the parameters that were added to optimizers meanwhile."""
        self.accumulate = accumulate
        if self._toggle is not None:
            self._toggle.refresh()

    def drop_group(self) -> None:
        """Forget the accumulation group that is not done: the epoch ends here."""
        if any(self._took_part):
            for optimizer in self._plan.optimizers:
                optimizer.zero_grad()
        self._took_part = [False for _ in self._everyone]
        self._group, self._objective = [[] for _ in self._everyone], [None for _ in self._everyone]
        if self._end_group is not None:
            for index in range(len(self._plan.optimizers)):
                self._end_group(index)

    def group_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the accumulation group that is not done, on this rank."""
        return {
            "took_part": list(self._took_part),
            "objective": placed(self._objective),
            "passes": placed(self._group),  # their batches, which only a closure needs again
        }

    def load_group_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``group_state`` returned, as far as it is there."""
        self._took_part = list(state["took_part"])
        if "objective" in state:
            self._objective = put_back(state["objective"], self._strategy.device)
        if "passes" in state:
            passes = put_back(state["passes"], self._strategy.device)
            self._group = [[(split, *rest) for split, *rest in lane] for lane in passes]

    # -- the pass ------------------------------------------------------------------------------------------------
    def _pass(self, split: Any, batch_idx: int, index: int, hiddens: Any, sync: bool) -> Any:
        """Forward and backward of one split for one optimizer. ``self.loss`` is None where the batch was skipped.

        ``sync``: the gradients are averaged over the workers; not before the last batch of a group.
        """
        if not sync and self._no_sync is not None:
            context = self._no_sync()
            if context is not None:
                with context:
                    return self._pass(split, batch_idx, index, hiddens, True)
        if self._autocast is not None:
            with self._autocast() or nullcontext():
                output = self._step(split, batch_idx, index, hiddens)
        elif self._bare_step is not None:
            output = self._bare_step(split, batch_idx)
        else:
            output = self._step(split, batch_idx, index, hiddens)
        if not self._steps:
            loss = loss_of(output) if isinstance(output, (Tensor, dict)) and _has_loss(output) else None
            # Where no backward frees the graph, keeping it until the next batch would double the memory.
            self.loss = None if loss is None else loss.detach()
            return output
        loss = output if type(output) is Tensor else loss_of(output)
        self.loss = loss
        if loss is None:
            self._strategy.skip_pass()
            return None
        if not loss.requires_grad or loss.dim():
            check_loss(loss)
        if self.watch is not None:
            self.watch.check_loss(loss, batch_idx)
        if self.accumulate != 1:
            loss = loss / self.accumulate
        if self._before_backward is not None:
            self._before_backward(loss)
        target = self._precision.scale(loss) if self._scaled else loss
        if self._backward is None:
            target.backward()  # type: ignore[no-untyped-call]
        else:
            self._backward(target, self._plan.optimizers[index], index)
        if self._after_backward is not None:
            self._after_backward()
        if self.watch is not None and not self._scaled:  # scaled gradients may overflow: the scaler sees to it
            self.watch.check_gradients(batch_idx)
        self._took_part[index] = True
        return output

    # -- the step ------------------------------------------------------------------------------------------------
    def _finish_group(self, batch_idx: int, index: int) -> None:
        took_part, self._took_part[index] = self._took_part[index], False
        if not took_part and not self._strategy.anyone_took_part(index):
            self._group[index], self._objective[index] = [], None
            return
        optimizer = self._plan.optimizers[index]
        if self._scaled:
            self._precision.unscale(optimizer)
        if self._before_step is not None:
            self._before_step(optimizer, index)
        if self._clip_val is not None or self._clip_override is not None:
            self.clip(optimizer, index)
        if self._closures[index]:
            self._step_with_closure(optimizer, batch_idx, index)
        elif self._scaled:
            self._precision.step(optimizer, optimizer.step)
        else:
            optimizer.step()
        self.zero_grad(optimizer, batch_idx, index)
        if self._end_group is not None:
            self._end_group(index)
        self.stepped.append(index)

    def clip(self, optimizer: Optimizer, index: int) -> None:
        """Clip the optimizer's gradients as the Trainer or the Module's override says."""
        if self._clip_override is not None:
            self._clip_override(optimizer, index, self._clip_val, self._clip_algorithm)
        elif self._clip_val is not None:
            clip_gradients(optimizer, self._clip_val, self._clip_algorithm)  # type: ignore[arg-type]

    def zero_grad(self, optimizer: Optimizer, batch_idx: int, index: int) -> None:
        """Zero the optimizer's gradients, with the hooks around it."""
        if self._before_zero is not None:
            self._before_zero(optimizer)
        if self._zero_override is None:
            optimizer.zero_grad()
        else:
            self._zero_override(self._state.epoch, batch_idx, optimizer, index)

    def _step_with_closure(self, optimizer: Optimizer, batch_idx: int, index: int) -> None:
        """Step where the optimizer or an override is given a closure; contract 5.3."""
        closure = _Closure(self, optimizer, batch_idx, index, self._group[index], self._agreed(self._objective[index]))
        lbfgs = isinstance(optimizer, LBFGS)

        def step() -> Any:
            if self._step_override is None:
                return optimizer.step(closure)  # type: ignore[arg-type]
            return self._step_override(
                self._state.epoch, batch_idx, optimizer, index, closure, False, self._scaled, lbfgs
            )

        if self._scaled:
            self._precision.step(optimizer, step)
        else:
            step()
        self._group[index], self._objective[index] = [], None
        self._took_part[index] = False  # passes computed anew belong to the group that is done

    def recompute(self, passes: list[Pass], optimizer: Optimizer, batch_idx: int, index: int) -> Tensor | None:
        """Compute the group's passes anew from zeroed gradients; return the group's loss."""
        self.zero_grad(optimizer, batch_idx, index)
        total: Tensor | None = None
        # An optimizer may call its closure with gradients off. What the pass logs was logged by the first one: an
        # epoch's value counts each batch once.
        with torch.enable_grad(), self.without_logging():
            for position, given in enumerate(passes):
                self._pass(*given, position + 1 == len(passes))
                total = self._add(total)
        if self._scaled:
            self._precision.unscale(optimizer)
        if self._clip_val is not None or self._clip_override is not None:
            self.clip(optimizer, index)
        return self._agreed(total)

    def _add(self, total: Tensor | None) -> Tensor | None:
        if self.loss is None:
            return total
        loss = self.loss.detach()
        if self.accumulate != 1:
            loss = loss / self.accumulate
        return loss if total is None else total + loss

    def _agreed(self, loss: Tensor | None) -> Tensor | None:
        """Average the loss over the workers: an optimizer that searches along a line must decide alike on all ranks."""
        if self._no_sync is None:
            return loss
        if loss is None:  # this rank skipped; the others wait for its part
            loss = torch.zeros((), device=self._strategy.device)
        return self._strategy.collective.all_reduce(loss.float(), "mean")


class _Closure:
    """The closure that ``optimizer_step`` is given: the pass's loss at first, a new pass on each later call."""

    def __init__(
        self,
        batch: TrainBatch,
        optimizer: Optimizer,
        batch_idx: int,
        index: int,
        passes: list[Pass],
        loss: Tensor | None,
    ) -> None:
        self._batch, self._optimizer, self._batch_idx, self._index = batch, optimizer, batch_idx, index
        self._passes, self._loss = passes, loss
        self._mark: GradsMark | None = grads_mark(optimizer)

    def __call__(self) -> Tensor | None:
        mark, self._mark = self._mark, None
        if mark is not None and not were_zeroed(mark):
            return self._loss
        del mark  # before the new pass, or the old gradients take their memory beside the new ones
        return self._batch.recompute(self._passes, self._optimizer, self._batch_idx, self._index)


def _skips_nothing(step: Callable[..., Any]) -> Callable[..., Any]:
    """A split of None: this rank's sequence is over, and another rank's goes on."""
    return lambda split, *args: None if split is None else step(split, *args)


def _then(step: Callable[..., Any], step_end: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: step_end(step(*args))


def _has_loss(output: Any) -> bool:
    return isinstance(output, Tensor) or output.get("loss") is not None
