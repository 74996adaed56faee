"""The whole state of a fit: taking it, and going on from it bit for bit. Floor 3; no files here.

::

    take      position of the loops, metrics, gradients, random states, ... -> RunSnapshot(common, own)
    restore   the same back into a fit that has run its hooks up to the first batch

Two moments of restoring: optimizers, schedulers and callbacks are there before ``on_train_start``, so that hooks see
them (``content.apply``). Then, right before the next batch is drawn, everything is put as it was (``restore``): what
hooks have changed, logged or drawn since does not count. docs/checkpoints.md lists what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from raylit.checkpoint import ranks
from raylit.checkpoint.content import apply_optimizers, collect, load_weights
from raylit.checkpoint.memory import plain_copy, to_cpu
from raylit.engine.parts import Parts, Saved
from raylit.plain import is_faithful, made_safe
from raylit.ports import RunSnapshot
from raylit.seed import seed_everything
from raylit.stage import Loop, Stage

if TYPE_CHECKING:
    from raylit.engine.fit import Fit

_MARKED_BYTES = 1 << 19  # at once: they take sixteen times their size meanwhile


@dataclass
class Position:
    """Where a fit stands between two batches. Counts start at 0 and count what is done, on this rank."""

    batches: int = 0  # of the epoch that runs; 0: it has not begun
    samples: int = 0  # of the epoch, consumed by all ranks: ``start_sample`` of ``LoaderLike.set_epoch``
    complete: bool = False  # the epoch has no batch left, and its end-of-epoch hooks are still to come
    unfinished: str = ""  # of the last batch: "log": logging and validation are to come; "validation": the latter
    total_batches: int = 0  # since training began
    groups: int = 0  # accumulation groups since training began
    stepped: list[int] = field(default_factory=list)  # optimizers that stepped in the last batch, or after it
    steps_of: list[int] = field(default_factory=list)  # steps of each optimizer, for its schedulers

    @classmethod
    def of(cls, saved: Saved, optimizers: int) -> Position:
        """Read a checkpoint's position; a file without one begins at its epoch."""
        known = {each.name for each in fields(cls)}
        loop = (saved.common.get("loops") or {}).get("fit_loop") or {}
        position = cls(**{key: value for key, value in loop.items() if key in known})
        if len(position.steps_of) != optimizers:
            position.steps_of = [int(saved.common["global_step"])] * optimizers
        return position


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of epochs that are finished. Lightning 2's files count the one that ends as running."""
    loop = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    progress = loop.get("epoch_progress")
    if "batches" not in loop and isinstance(progress, Mapping):
        return int(progress["current"]["processed"])
    return int(checkpoint["epoch"])


# -- taking ----------------------------------------------------------------------------------------------------------
def take(fit: Fit, *, at_safe_point: bool, weights_only: bool = False) -> RunSnapshot:
    """Copy the state of a fit; every rank calls it. ``at_safe_point``: nothing of the last batch is left to do."""
    parts, state = fit.parts, fit.parts.state
    position = fit.position(at_safe_point)
    if position.complete and not position.unfinished and parts.metrics.running == Loop.TRAIN.value:
        # Reductions that are the user's own callables come back with a call of log, and there is none to come.
        parts.metrics.settle()
    first = state.world.global_rank == 0
    copied = fit.memory.copy
    fit.memory.begin()
    extra: dict[str, Any] = {
        "world_size": state.world.world_size,
        "shares": state.world.shares_of_a_step,
        "order_seed": parts.order_seed,
        "options": fit.options,
        "precision": to_cpu(parts.precision.state_dict()),
        "frozen": [name for name, parameter in parts.module.named_parameters() if not parameter.requires_grad],
        "evaluating": _evaluating(parts),
    }
    if first and state.history is not None:
        extra["history"] = state.history.state_dict(whole=True)
    common = collect(
        state, parts.on_save, loops=asdict(position), extra=extra, copied=copied if first else None,
        weights_only=weights_only,
    )  # fmt: skip
    own = {} if weights_only else made_safe(to_cpu(_own(fit, position), copied))
    return RunSnapshot(common if first else {}, own)


def take_weights(parts: Parts, weights_only: bool) -> RunSnapshot:
    """The checkpoint of a run that trains nothing: an evaluation, or a fit before its optimizers are there."""
    state = parts.state
    first = state.world.global_rank == 0
    copied = plain_copy if first else None
    common = collect(state, parts.on_save, copied=copied, weights_only=weights_only or state.stage is not Stage.FIT)
    return RunSnapshot(common if first else {}, {})


def _evaluating(parts: Parts) -> list[str]:
    """The submodules that are not in training mode; within an evaluation, those that were not before it."""
    within = parts.state.loop not in (None, Loop.TRAIN)
    modes = {id(module): mode for module, mode in parts.modes} if within else {}
    return [name for name, each in parts.module.named_modules() if not modes.get(id(each), each.training)]


def _own(fit: Fit, position: Position) -> dict[str, Any]:
    parts, state = fit.parts, fit.parts.state
    within = position.batches > 0
    own: dict[str, Any] = {
        "schema": 1,
        "rank": state.world.global_rank,
        # A validation that is under way runs anew, from where it began.
        "random": fit.before_validation if position.unfinished == "validation" else ranks.random_state(state.device),
        "gradients": {name: parameter.grad for name, parameter in _parameters(parts) if parameter.grad is not None},
        "group": fit.train.group_state(),
        "strategy": parts.strategy.group_state(),
        "metrics": parts.metrics.state_dict(open_loops=1) if within else None,
        "outputs": ranks.placed(fit.outputs.state()) if within and fit.outputs is not None else None,
        "shown": ranks.placed(
            {"callback": state.callback_metrics, "logged": state.logged_metrics, "bar": state.progress_bar_metrics}
        ),
        "measured": dict(state.measured),
        "loaders": fit.loader_states(),
    }  # fmt: skip
    ahead = fit.looked_up_batch() if within else None
    if ahead is not None and is_faithful(ahead):
        own["next_batch"] = ranks.placed(ahead)
    if state.world.global_rank != 0:  # rank 0's are in model.ckpt
        persistent = parts.module.state_dict()
        own["buffers"] = {name: buffer for name, buffer in parts.module.named_buffers() if name in persistent}
    return own


def weights_mark(module: torch.nn.Module) -> list[tuple[int, int]]:
    """A mark of every parameter and buffer that changes with its bits: two sums over them. Waits for the device."""
    marks = []
    for tensor in (*module.parameters(), *module.buffers()):
        if is_lazy(tensor) or tensor.device.type == "meta" or tensor.layout is not torch.strided or not tensor.numel():
            continue
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in torch.split(data, _MARKED_BYTES):
            values = part.to(torch.int64)
            places = torch.arange(1, len(values) + 1, device=values.device)
            marks.append((int(values.sum()), int((values * places).sum())))
    return marks


def _parameters(parts: Parts) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter by a name: the Module's, and those that only an optimizer has."""
    known = set()
    for name, parameter in parts.module.named_parameters():
        known.add(id(parameter))
        yield name, parameter
    count = 0
    for optimizer in parts.state.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) not in known:
                known.add(id(parameter))
                yield f"<optimizer's {count}>", parameter
                count += 1


# -- going on --------------------------------------------------------------------------------------------------------
def restore(fit: Fit, saved: Saved) -> None:
    """Put everything as it was when the checkpoint was taken; the batch after it is drawn next."""
    parts, state = fit.parts, fit.parts.state
    extra, own = saved.extra, saved.own
    load_weights(saved.common, parts.module)
    apply_optimizers(saved.common, state)
    fit.rebase(saved)
    if "frozen" in extra:
        frozen, evaluating = set(extra["frozen"]), set(extra["evaluating"])
        for name, parameter in parts.module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for name, module in parts.module.named_modules():
            module.training = name not in evaluating
    parts.precision.load_state_dict(extra.get("precision") or {})
    if state.history is not None and "history" in extra:
        state.history.load_state_dict(extra["history"])
    if own is not None:
        _restore_own(fit, own)
    if own is None or "random" not in own:
        # Another number of ranks: streams of their own, not those of the run's first steps again.
        if extra and parts.reseed is None:
            seed_everything((int(extra["order_seed"]) + 7919 * state.global_step + state.world.global_rank) % 2**32)
        return
    ranks.set_random(own["random"], state.device)


def _restore_own(fit: Fit, own: Mapping[str, Any]) -> None:
    parts, state = fit.parts, fit.parts.state
    for name, parameter in _parameters(parts):
        gradient: Tensor | None = own["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
    fit.train.load_group_state(own["group"])
    if "shown" not in own:
        return
    if "strategy" in own:  # of as many ranks
        parts.strategy.load_group_state(own["strategy"])
    state.measured.clear()
    state.measured.update(own.get("measured", {}))
    shown = ranks.put_back(own["shown"], state.device)
    for mine, theirs in ((state.callback_metrics, "callback"), (state.logged_metrics, "logged"),
                         (state.progress_bar_metrics, "bar")):  # fmt: skip
        mine.clear()
        mine.update(shown[theirs])
    if own.get("metrics") is not None:
        parts.metrics.load_state_dict(own["metrics"])
    elif own.get("metrics_of") is not None:
        parts.metrics.take_over(own["metrics_of"], own["metrics_example"])
    if own.get("outputs") is not None and fit.outputs is not None:
        fit.outputs.load_state(ranks.put_back(own["outputs"], state.device))
    with torch.no_grad():
        for name, buffer in parts.module.named_buffers():
            if name in own.get("buffers", {}):
                buffer.copy_(own["buffers"][name])
