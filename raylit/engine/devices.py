"""One step of a Module on the parts of a batch, where the strategy splits it over a worker's devices. Floor 3.

::

    batch -> parts, one a device -> *_step on each -> the list of outputs -> *_step_end
                                                                          or, without one, put together

Where the strategy keeps the batch whole, the step stays what it is and nothing here is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raylit.data.batch import batch_size_of, split_samples, to_device
from raylit.data.join import join_outputs
from raylit.engine.parts import Parts
from raylit.errors import HookError

Step = Callable[..., Any]


def over_devices(parts: Parts, step: Step, *, join: bool, training: bool = False) -> Step:
    """Return ``step(batch, ...)`` over the parts of the batch, or ``step`` itself where the batch stays whole.

    ``join``: the parts' outputs are put together; else the list of them is returned, for a ``*_step_end``.
    """
    devices = parts.strategy.each_device(parts.module, step)
    return step if devices is None else OverDevices(parts, devices, join, training)


class OverDevices:
    """A step over the devices of this worker. ``running`` says that it is within a part."""

    def __init__(self, parts: Parts, devices: list[tuple[torch.device, Step]], join: bool, training: bool) -> None:
        self._parts, self._devices, self._join, self._training = parts, devices, join, training
        self._home = parts.strategy.device
        self._split = parts.strategy.split
        self.running = False

    def __call__(self, batch: Any, *rest: Any) -> Any:
        """Call the step with each part and ``rest``; in training the last of these are the hiddens, one for each."""
        pieces = self._pieces(batch)
        hiddens = self._hiddens(rest[-1], len(pieces)) if self._training else None
        logged = self._parts.metrics.begin_parts()
        outputs, self.running = [], True
        try:
            for index, ((piece, size), (device, step)) in enumerate(zip(pieces, self._devices)):
                logged.begin(size)
                given = rest if hiddens is None else (*rest[:-1], hiddens[index])
                outputs.append(step(piece, *given) if device == self._home else self._away(device, step, piece, given))
                logged.end(size)
        finally:
            self.running = False
            logged.finish()
        return join_outputs(outputs, [size for _, size in pieces], training=self._training) if self._join else outputs

    def _pieces(self, batch: Any) -> list[tuple[Any, int | None]]:
        if self._split is None:
            return list(split_samples(batch, len(self._devices)))
        pieces = list(self._split(batch, len(self._devices)))
        if not 1 <= len(pieces) <= len(self._devices):
            raise HookError(
                f"the strategy's split returned {len(pieces)} parts of a batch; from 1 to {len(self._devices)} (the "
                "number of devices, its second argument) are accepted"
            )
        return [(piece, batch_size_of(piece)) for piece in pieces]

    def _hiddens(self, hiddens: Any, parts: int) -> list[Any] | None:
        if hiddens is None:
            return None
        if not isinstance(hiddens, list) or len(hiddens) != parts:
            raise HookError(
                f"the hiddens of a batch that is split over {parts} devices are a list with each part's own; "
                f"training_step_end returned a {type(hiddens).__name__}. Return {{'hiddens': [output['hiddens'] for "
                "output in outputs], ...}"
            )
        return hiddens

    def _away(self, device: torch.device, step: Step, piece: Any, given: Any) -> Any:
        """Run a part on another device than the Module's, and bring its output back."""
        with self._logging_home():
            return to_device(step(to_device(piece, device), *to_device(given, device)), self._home)

    @contextmanager
    def _logging_home(self) -> Iterator[None]:
        """Logged values come to the Module's device, where they are added up."""
        handle: Any = self._parts.module.__dict__["_run"]
        log = handle.log

        def home(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            log(name, value.to(self._home, non_blocking=True) if isinstance(value, Tensor) else value, *args, **kwargs)

        handle.log = home
        try:
            yield
        finally:
            handle.log = log
