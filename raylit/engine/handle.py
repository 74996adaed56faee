"""What a Module may ask of the run that it is in: the other end of ``Module._run``. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from raylit.engine.parts import Parts
from raylit.engine.step import TrainBatch
from raylit.errors import HookError
from raylit.optim.clip import clip_gradients
from raylit.optim.plan import OptimPlan
from raylit.optim.toggle import Toggle


class ModuleHandle:
    """Implements ``raylit.module.ModuleRun``. ``begin_training`` is called once the optimizers are known."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.trainer = parts.trainer
        self.log: Callable[..., None] = parts.metrics.log
        self._train: TrainBatch | None = None
        self._plan = OptimPlan()
        self._managed: list[Optimizer] = []
        self._toggle: Toggle | None = None
        self._group_done = True

    def begin_training(self, plan: OptimPlan, train: TrainBatch) -> None:
        """Hand over the optimizers of the fit."""
        self._plan, self._train = plan, train
        manual = not self._parts.module.automatic_optimization
        self._managed = (
            [_managed(o, self, i) for i, o in enumerate(plan.optimizers)] if manual else list(plan.optimizers)
        )
        self._toggle = Toggle(plan.optimizers, self._parts.module.parameters())
        train.without_logging = self._without_logging

    @contextmanager
    def _without_logging(self) -> Iterator[None]:
        log, self.log = self.log, _ignore
        try:
            yield
        finally:
            self.log = log

    def begin_epoch(self) -> None:
        """Take the parameters that were added to optimizers since the epoch before."""
        if self._toggle is not None:
            self._toggle.refresh()

    def batch_starts(self, group_done: bool) -> None:
        """Say whether this batch is the last of its accumulation group (manual optimisation)."""
        self._group_done = group_done

    # -- optimizers ----------------------------------------------------------------------------------------------
    def managed_optimizers(self) -> list[Optimizer]:
        return self._managed

    def schedulers(self) -> list[Any]:
        return [plan.scheduler for plan in self._plan.schedulers]

    def toggle(self, optimizer: Optimizer) -> None:
        self._toggler().toggle(self._index(optimizer))

    def untoggle(self, optimizer: Optimizer) -> None:
        self._toggler().untoggle(self._index(optimizer))

    def clip_gradients(self, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        settings = self._parts.settings
        value = settings.gradient_clip_val if value is None else value
        if value is not None:
            clip_gradients(optimizer, value, algorithm or settings.gradient_clip_algorithm)  # type: ignore[arg-type]

    def manual_backward(self, loss: Tensor, optimizer: Optimizer | None, args: tuple[Any, ...],
                        kwargs: dict[str, Any]) -> None:  # fmt: skip
        if self._parts.module.automatic_optimization:
            raise HookError(
                "manual_backward needs manual optimisation: set automatic_optimization = False on the Module"
            )
        self._refuse_in_a_part("manual_backward")
        event, own = self._parts.hooks.event, self._parts.hooks.own
        before, after, override = event("on_before_backward"), event("on_after_backward"), own("backward")
        if before is not None:
            before(loss)
        watch = self._train.watch if self._train is not None else None
        if watch is not None:
            watch.check_loss(loss, self._parts.state.batch_idx)
        target = self._parts.precision.scale(loss)
        if override is None:
            target.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            index = None if optimizer is None else self._index(optimizer)
            override(target, optimizer, index, *args, **kwargs)
        if after is not None:
            after()
        if watch is not None and not self._parts.precision.scaled:
            watch.check_gradients(self._parts.state.batch_idx)

    def manual_step(self, optimizer: Optimizer, force: bool, closure: Callable[[], Any] | None) -> Any:
        """Step and zero at the end of an accumulation group, or always where ``force`` says so.

        An override of ``optimizer_step`` gets the managed optimizer, whose ``step`` clips and counts, and ``closure``.
        """
        if not force and not self._group_done:
            return None
        index, train, state = self._index(optimizer), self._train, self._parts.state
        assert train is not None  # there is an optimizer, so training has begun
        override = self._parts.hooks.own("optimizer_step")
        if override is None:
            result = self.step_managed(index, closure)
        else:
            managed, given = self._managed[index], closure or _no_pass
            lbfgs, scaled = isinstance(managed, LBFGS), self._parts.precision.scaled
            result = override(state.epoch, state.batch_idx, managed, index, given, False, scaled, lbfgs)
        train.zero_grad(self._plan.optimizers[index], state.batch_idx, index)
        return result

    def step_managed(self, index: int, closure: Callable[[], Any] | None) -> Any:
        """What ``self.optimizers().step()`` does: average over workers, unscale, hooks, clip, step, count.

        A closure computes the gradients itself, perhaps several times: each time they are averaged and clipped.
        """
        self._refuse_in_a_part("an optimizer's step")
        parts, optimizer = self._parts, self._plan.optimizers[index]
        if closure is None or closure is _no_pass:
            self._ready(index)
            step = optimizer.step
            result = parts.precision.step(optimizer, step) if parts.precision.scaled else step()
        elif parts.precision.scaled:
            raise HookError("a closure needs gradients that are not scaled: use bf16-mixed or 32 instead of 16-mixed")
        else:
            result = optimizer.step(lambda: self._closed(index, closure))
        if self._train is not None:
            self._train.stepped.append(index)
        return result

    def _refuse_in_a_part(self, what: str) -> None:
        """Where the batch is split over devices, training_step sees a part of it, and runs several times a batch."""
        if self._train is not None and self._train.over is not None and self._train.over.running:
            raise HookError(
                f"{what} in training_step under strategy={self._parts.strategy.name!r}, where it runs once for each "
                "part of the batch: return what the loss needs from training_step, and do this in "
                "training_step_end(self, outputs), which gets the list of the parts' outputs"
            )

    def _ready(self, index: int) -> None:
        """Make the gradients that are there ready for a step."""
        parts, optimizer = self._parts, self._plan.optimizers[index]
        if parts.state.world.world_size > 1:
            parts.strategy.reduce_gradients(optimizer)
        if parts.precision.scaled:
            parts.precision.unscale(optimizer)
        before = parts.hooks.event("on_before_optimizer_step")
        if before is not None:
            before(optimizer, index)
        if self._train is not None:
            self._train.clip(optimizer, index)

    def _closed(self, index: int, closure: Callable[[], Any]) -> Any:
        """Call the person's closure; return its loss averaged over the workers, so that all ranks search alike."""
        with torch.enable_grad():
            loss = closure()
        self._ready(index)
        if self._parts.state.world.world_size > 1 and isinstance(loss, Tensor):
            return self._parts.strategy.collective.all_reduce(loss.detach(), "mean")
        return loss

    def _index(self, optimizer: Optimizer) -> int:
        for index, (managed, own) in enumerate(zip(self._managed, self._plan.optimizers, strict=True)):
            if optimizer is managed or optimizer is own:
                return index
        raise HookError("this optimizer is not one that configure_optimizers returned")

    def _toggler(self) -> Toggle:
        if self._toggle is None:
            raise HookError("optimizers are there from configure_optimizers on, in fit alone")
        return self._toggle

    def restore(self) -> None:
        """Undo what a hook toggled and, having failed, did not untoggle."""
        if self._toggle is not None:
            self._toggle.restore()

    # -- everything else -----------------------------------------------------------------------------------------
    def all_gather(self, data: Any, sync_grads: bool) -> Any:
        """Gather each tensor of a nested collection over the workers: a new leading dimension of world size."""
        if isinstance(data, Mapping):
            return {key: self.all_gather(value, sync_grads) for key, value in data.items()}
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(self.all_gather(value, sync_grads) for value in data))
        if isinstance(data, (list, tuple)):
            return type(data)(self.all_gather(value, sync_grads) for value in data)
        if isinstance(data, (bool, int, float, np.ndarray)):
            data = torch.tensor(data)
        if not isinstance(data, Tensor):
            return data
        collective = self._parts.strategy.collective
        if sync_grads and data.requires_grad:
            gathered: Tensor = _GatherWithGrad.apply(data, collective)  # type: ignore[no-untyped-call]
            return gathered
        device = data.device
        return torch.stack(collective.all_gather(data.detach().to(collective.device))).to(device)

    def print(self, text: str) -> None:
        self._parts.output.print(text)

    def progress_bar(self) -> dict[str, Any]:
        """The items of the progress bar before an override changes them: the loss, the version, the logged ones."""
        items: dict[str, Any] = {}
        if self._train is not None and self._train.loss is not None:
            items["loss"] = self._train.loss.detach()
        version = getattr(self.trainer.logger, "version", None)
        if version is not None:
            items["v_num"] = _short(version)
        items.update(self._parts.state.progress_bar_metrics)
        items.update(self._parts.metrics.step_metrics().progress_bar)  # newer than those of the last logged step
        return items

    def tbptt_split(self, batch: Any, split_size: int) -> list[Any]:
        assert self._parts.split_time is not None
        return self._parts.split_time(batch, split_size)

    def transfer(self, batch: Any, device: torch.device) -> Any:
        assert self._parts.move is not None
        return self._parts.move(batch, device)

    def restore_modes(self) -> None:
        self._parts.restore_modes()


class _GatherWithGrad(torch.autograd.Function):
    """Gather whose backward sums each rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, collective: Any) -> Tensor:
        ctx.collective, ctx.device = collective, tensor.device
        parts = collective.all_gather(tensor.detach().contiguous().to(collective.device))
        return torch.stack(parts).to(tensor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed = ctx.collective.all_reduce(grads[0].contiguous().to(ctx.collective.device), "sum")
        return summed[ctx.collective.rank].to(ctx.device), None


def _short(version: int | str) -> int | str:
    """What the bar has room for: of a run folder's name what follows its last dash, at most eight characters."""
    return version if isinstance(version, int) or len(version) <= 8 else version.rsplit("-", 1)[-1][-8:]


def _no_pass() -> None:
    """The closure of an ``optimizer_step`` override in manual optimisation, where backward was called before."""


def _ignore(*args: Any, **kwargs: Any) -> None:
    """``log`` while a pass is computed anew."""


class _Step(property):
    """``step`` of a managed optimizer: goes before the one that a scheduler has put into the shared ``__dict__``."""

    hooked = True  # torch, which wraps each optimizer class's step once, takes it as done


def _managed(optimizer: Optimizer, handle: ModuleHandle, index: int) -> Optimizer:
    """Return an object that is ``optimizer`` in all but ``step``, which then clips, unscales and counts.

    A subclass made here, sharing the optimizer's ``__dict__``, so that ``isinstance`` and every attribute hold.
    """
    wrapped: list[Any] = []  # what a scheduler built over the managed optimizer put in place of its step

    def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return handle.step_managed(index, closure)

    members = {"step": _Step(lambda self: wrapped[-1] if wrapped else MethodType(step, self),
                             lambda self, value: wrapped.append(value)), "optimizer": optimizer}  # fmt: skip
    managed_class = type(type(optimizer).__name__, (type(optimizer),), members)
    managed: Optimizer = object.__new__(managed_class)
    object.__setattr__(managed, "__dict__", optimizer.__dict__)
    return managed
