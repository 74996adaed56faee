"""Reading what a step returned, and keeping it for the epoch-end hooks. Floor 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raylit.errors import HookError


def detached(value: Any) -> Any:
    """Return ``value`` with every tensor in it detached, on its device; dicts, lists and tuples are rebuilt."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(detached(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(detached(item) for item in value)
    return value


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in a training step's output, or None where the batch is skipped; HookError for anything else."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise HookError(
                f"training_step returned a dict without 'loss' (keys: {', '.join(map(repr, output)) or 'none'}). "
                "Put the loss there, or let training_step_end return it."
            )
        loss = output["loss"]
        if loss is None or isinstance(loss, Tensor):
            return loss
        raise HookError(f"training_step returned a dict whose 'loss' is a {type(loss).__name__}; it must be a tensor")
    raise HookError(
        f"training_step returned a {type(output).__name__}; accepted: the loss tensor, a dict with 'loss', "
        "or None to skip the batch"
    )


def check_loss(loss: Tensor) -> None:
    """Raise HookError unless the loss is one number that depends on parameters which require gradients."""
    if loss.numel() != 1:
        raise HookError(
            f"training_step returned a loss of shape {tuple(loss.shape)}; it must be one number: use .mean() or .sum()"
        )
    if not loss.requires_grad:
        raise HookError(
            "training_step returned a loss without grad: it does not depend on any parameter that requires gradients. "
            "Look for .detach(), .item(), torch.no_grad() or frozen parameters on its way; to skip a batch return None."
        )


def kept(output: Any) -> Any:
    """Return a step's output as epoch-end hooks see it: detached, ``{"loss": tensor}`` for a bare loss, no hiddens."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, Mapping):
        return {key: detached(value) for key, value in output.items() if key != "hiddens"}
    return detached(output)


class EpochOutputs:
    """The outputs of one training epoch, in order (contract 5.4).

    One optimizer: a list over batches. Several: a list per optimizer of lists over batches. Truncated BPTT: each
    batch's entry is the list of its splits' outputs. Skipped batches leave nothing.
    """

    def __init__(self, optimizers: int, splits: bool) -> None:
        self._per_optimizer: list[list[Any]] = [[] for _ in range(max(1, optimizers))]
        self._splits = splits

    def add(self, batch_outputs: list[list[Any]]) -> None:
        """Add one batch: for each optimizer the list of its splits' outputs (empty where it did not run)."""
        for collected, splits in zip(self._per_optimizer, batch_outputs, strict=True):
            if splits:
                collected.append(splits if self._splits else splits[0])

    def state(self) -> list[list[Any]]:
        """What was added so far, for a checkpoint in the middle of the epoch."""
        return self._per_optimizer

    def load_state(self, state: list[list[Any]]) -> None:
        """Go on from what ``state`` returned."""
        self._per_optimizer = [list(collected) for collected in state]

    def result(self) -> list[Any]:
        """What the epoch-end hooks are given."""
        return self._per_optimizer[0] if len(self._per_optimizer) == 1 else self._per_optimizer


def batch_result(batch_outputs: list[list[Any]], splits: bool) -> Any:
    """What ``on_train_batch_end`` is given, shaped as the same batch's entry in the epoch's outputs."""
    shaped = [(s if splits else s[0]) if s else None for s in batch_outputs]
    return shaped[0] if len(shaped) == 1 else shaped
