"""``detect_anomaly``: stop at the first loss or gradient that is not finite, and say where. Floor 3.

Looking waits for the device at every step, so this is bound only where it was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raylit.errors import NonFiniteError
from raylit.view import RunState

_NAMED = 3  # parameters in the message


class NonFinite:
    """Looks at losses and gradients of one run."""

    def __init__(self, module: nn.Module, state: RunState) -> None:
        self._module, self._state = module, state

    def check_loss(self, loss: Tensor, batch_idx: int) -> None:
        """Raise NonFiniteError unless the loss is a finite number."""
        if not bool(torch.isfinite(loss).all()):
            bad = [name for name, p in self._module.named_parameters() if not bool(torch.isfinite(p).all())]
            why = f"; not finite already: {_some(bad)}" if bad else ""
            raise NonFiniteError(f"the loss is {loss.item()} in {self._place(batch_idx)}{why}")

    def check_gradients(self, batch_idx: int) -> None:
        """Raise NonFiniteError naming the parameters whose gradient is not finite."""
        named = [(name, p.grad) for name, p in self._module.named_parameters() if p.grad is not None]
        bad = [name for name, grad in named if not bool(torch.isfinite(grad).all())]
        if bad:
            raise NonFiniteError(f"the gradient of {_some(bad)} is not finite in {self._place(batch_idx)}")

    def _place(self, batch_idx: int) -> str:
        return f"epoch {self._state.epoch}, batch {batch_idx} (global_step {self._state.global_step})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
