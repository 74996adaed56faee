"""What an ``optimizer_step`` override does with its closure: did it zero the gradients, does it need one? Floor 2."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class GradsMark:
    """The gradients of one optimizer at one moment: each parameter that had one, the tensor, and its version then.

    Holds the gradient tensors, since only a held tensor's identity is sure not to be used again. Drop the mark before
    computing a pass anew, or the old gradients take their memory beside the new ones.
    """

    entries: tuple[tuple[Tensor, Tensor, int], ...]


def grads_mark(optimizer: Optimizer) -> GradsMark:
    """Note the gradients of ``optimizer``'s parameters, to be compared later. No device work."""
    return GradsMark(
        tuple(
            (parameter, parameter.grad, parameter.grad._version)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
    )


def were_zeroed(mark: GradsMark) -> bool:
    """Tell whether all gradients of the mark have been zeroed since, by ``zero_grad`` of either kind or by hand.

    A gradient counts as zeroed if it is None now, or if it was written to or replaced and is all zero. One that was
    only scaled, clipped or left alone does not, and then no other is looked at. Waits for the device only where every
    gradient is gone or was written to, as after an in-place clip; never where one was left alone.
    A gradient that was zero already and was written to (clipped, say) cannot be told from a zeroed one.
    """
    if not mark.entries:
        return False
    written: list[Tensor] = []
    for parameter, grad, version in mark.entries:
        now = parameter.grad
        if now is None:
            continue
        if now is grad and now._version == version:
            return False
        written.append(now)
    return not any(bool(flag) for flag in _nonzero_by_device(written))


def needs_closure(optimizer: Optimizer) -> bool:
    """Tell whether ``optimizer.step`` must be given a closure.

    True where it has no default (LBFGS), and where the code of ``step`` is not torch.optim's own: an unknown optimizer
    may use a closure that it calls optional. False for torch.optim's own with an optional closure, which would only
    call it once at the start, and for a ``step`` that takes none.
    """
    step = type(optimizer).step
    arguments = list(inspect.signature(step).parameters.values())[1:]  # without self
    closure = next(
        (argument for argument in arguments if argument.name == "closure"), arguments[0] if arguments else None
    )
    if closure is None:
        return False
    if closure.default is inspect.Parameter.empty and closure.kind is not inspect.Parameter.VAR_KEYWORD:
        return True
    # The module of the function, not of the class: a subclass of AdamW that leaves `step` alone is still torch's.
    module = step.__module__ or ""
    return not (module == "torch.optim" or module.startswith("torch.optim."))


def _nonzero_by_device(grads: list[Tensor]) -> list[Tensor]:
    """Return for each device one boolean tensor: is any element of its gradients not zero (nan counts as not zero)?"""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        values = grad.coalesce().values() if grad.is_sparse else grad
        by_device.setdefault(values.device, []).append(torch.any(values != 0))
    # One wait a device, not one a parameter.
    return [torch.stack(flags).any() for flags in by_device.values()]
