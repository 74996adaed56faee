"""TerminateOnNaN: stop at the first loss that is not finite. Floor 2, on every worker.

What it costs: on the CPU one look at a scalar a step. On a GPU a look would make the host wait for the device at each
step, so the device itself notes the first bad step (a few small kernels a step) and is asked every
``check_every_n_steps``: the stop comes that much later, and names the step all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.callback import Callback
from raylit.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView

_NAMED = 3  # parameters in the message


class TerminateOnNaN(Callback):
    """Raise NonFiniteError when the training loss is nan or infinite, naming the step and the parameters concerned.

    Named are the parameters that are not finite, else those whose gradient is not; found late on a GPU, these are the
    ones of the step at which it was found. ``check_every_n_steps``: backward passes between two looks; None: 1 on the
    CPU, 20 on other devices; 1 on a GPU waits for the device at every step. The caller gets the error; on several
    workers one bad rank stops all.
    """

    _first: Tensor | None = None  # on the device: index of the first bad pass since the last look; -1: none
    _loss: Tensor | None = None

    def __init__(self, check_every_n_steps: int | None = None) -> None:
        every = check_every_n_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ConfigError(
                f"TerminateOnNaN(check_every_n_steps={every!r}): expected a whole number of at least 1, or None"
            )
        self._asked = every
        self._every = 1
        self._places: list[tuple[int, int, int]] = []  # (epoch, batch index, global step) of the passes since the look

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        self._every = self._asked or (1 if module.device.type == "cpu" else 20)
        self._forget()

    def on_before_backward(self, trainer: TrainerView, module: Module, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_after_backward(self, trainer: TrainerView, module: Module) -> None:
        loss, self._loss = self._loss, None
        if loss is None:
            return
        place = (trainer.current_epoch, trainer.batch_idx, trainer.global_step)
        if self._every == 1:
            if not bool(torch.isfinite(loss).all()):  # waits for the device, as was asked for
                self._raise(module, place, loss)
            return
        bad = ~torch.isfinite(loss).all()
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=loss.device)
        self._first = torch.where((self._first < 0) & bad, len(self._places), self._first)
        self._places.append(place)
        if len(self._places) >= self._every:
            self._look(module)

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        self._look(module)

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        self._look(module)
        self._forget()

    def _look(self, module: Module) -> None:
        if self._first is not None and self._places:
            index = int(self._first)  # waits for the device
            if index >= 0:
                self._raise(module, self._places[index], None)
        self._forget()

    def _forget(self) -> None:
        self._places, self._first, self._loss = [], None, None

    def _raise(self, module: Module, place: tuple[int, int, int], loss: Tensor | None) -> None:
        self._forget()
        epoch, batch_idx, step = place
        shown = "nan or infinite" if loss is None else f"{float(loss.sum())}"
        named = list(module.named_parameters())
        bad = [name for name, p in named if not bool(torch.isfinite(p).all())]
        if bad:
            why = f"not finite: the parameter{'s' * (len(bad) > 1)} {_some(bad)}"
        else:
            bad = [name for name, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            why = "all parameters are finite still" + (f", but not the gradient of {_some(bad)}" if bad else "")
        raise NonFiniteError(
            f"the loss is {shown} in epoch {epoch}, batch {batch_idx} (global_step {step}); {why}. "
            "Trainer(detect_anomaly=True) finds the operation that made it."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_first", "_loss")}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
