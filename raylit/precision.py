"""Number formats: the implementations of ``ports.Precision``. Floor 2, worker side; torch only.

::

    32-true      FullPrecision    nothing is converted, nothing is wrapped
    64-true      TruePrecision    module, batches and new tensors in float64
    bf16-true    TruePrecision    the same in bfloat16
    16-true      TruePrecision    the same in float16
    bf16-mixed   Bf16Mixed        float32 weights, forward pass under autocast
    16-mixed     Float16Mixed     the same in float16, with a gradient scaler

The engine asks for a context once a step and for the scaler's part only where ``scaled`` is true; under ``32-true``
the cost of this file is one call that returns None.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from raylit.errors import ConfigError, nearest
from raylit.ports import Precision

# What a person may write, and the name each stands for. The first five words are Lightning 2.x's, the rest 1.x's.
_NAMES: Final[dict[str, str]] = {
    "32-true": "32-true", "32": "32-true",
    "64-true": "64-true", "64": "64-true",
    "16-mixed": "16-mixed", "16": "16-mixed",
    "bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16-true": "16-true",
}  # fmt: skip
_TRUE_DTYPES: Final = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def canonical_name(name: str | int) -> str:
    """Return the full name of a precision (``16`` is ``"16-mixed"``); ConfigError for one that does not exist."""
    text = str(name)
    if isinstance(name, bool) or text not in _NAMES:
        accepted = ", ".join(repr(key) for key in _NAMES)
        raise ConfigError(f"precision={name!r} is not known.{nearest(text, _NAMES)} Accepted: {accepted}")
    return _NAMES[text]


def make_precision(name: str | int, device_type: str) -> Precision:
    """Return the precision of this name for ``"cpu"``, ``"cuda"`` or another torch device type.

    ConfigError for an unknown name, and for ``"16-mixed"`` without a GPU.
    """
    full = canonical_name(name)
    if full == "32-true":
        return FullPrecision()
    if full in _TRUE_DTYPES:
        return TruePrecision(full, _TRUE_DTYPES[full])
    if full == "bf16-mixed":
        return Bf16Mixed(device_type)
    if device_type == "cpu":
        raise ConfigError(
            f"precision={name!r} needs a GPU: on a CPU float16 is slower than float32 and gradients underflow. "
            "Use precision='bf16-mixed', which works on a CPU too, or use_gpu=True."
        )
    return Float16Mixed(device_type)


class FullPrecision:
    """``32-true``: the module and the batches as they are."""

    name: str = "32-true"
    scaled: bool = False
    update_each_step: bool = True

    def convert_module(self, module: nn.Module) -> None:
        """Leave the module as it is."""

    def convert_batch(self, batch: Any) -> Any:
        """Return the batch itself."""
        return batch

    def forward_context(self) -> AbstractContextManager[Any] | None:
        """No context is needed."""
        return None

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss itself."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Nothing was scaled."""

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        """Call ``step``."""
        return step()

    def update(self) -> None:
        """There is no scale."""

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing: a checkpoint of a 16-mixed run may go on in another precision."""


class TruePrecision(FullPrecision):
    """Weights, batches and tensors made inside a step in one number format other than float32."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def convert_module(self, module: nn.Module) -> None:
        """Convert floating point parameters and buffers in place."""
        module.to(self.dtype)

    def convert_batch(self, batch: Any) -> Any:
        """Return the batch with every floating point tensor in it converted; integers and masks stay."""
        return _map_tensors(batch, lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Return a context in which new floating point tensors have this format."""
        return _DefaultDtype(self.dtype)


class Bf16Mixed(FullPrecision):
    """``bf16-mixed``: autocast to bfloat16. Its exponents are float32's, so nothing needs scaling."""

    name = "bf16-mixed"

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Return a new autocast context: its cache of cast weights must not outlive the pass."""
        return torch.autocast(self._device_type, dtype=torch.bfloat16)


class Float16Mixed(FullPrecision):
    """``16-mixed``: autocast to float16, and a gradient scaler, since small gradients are zero in float16.

    The scale is revised after each optimizer's step. Where several optimizers accumulate gradients over the same
    batches, one's step would change the scale in the middle of another's sum: set ``update_each_step`` to False then,
    and call ``update`` when all of them have stepped. ``init_scale`` is torch's.
    """

    name = "16-mixed"
    scaled = True

    def __init__(self, device_type: str, *, init_scale: float = 2.0**16, update_each_step: bool = True) -> None:
        self._device_type = device_type
        self._scaler = torch.amp.GradScaler(device_type, init_scale=init_scale)
        self.update_each_step = update_each_step
        self.skipped = False  # the last step was left out
        self._rounds: dict[int, _Round] = {}  # by id(optimizer), which each round keeps alive
        self._finished: list[_Round] = []  # stepped since the scale was last revised

    def forward_context(self) -> AbstractContextManager[Any] | None:
        """Return a new autocast context."""
        return torch.autocast(self._device_type, dtype=torch.float16)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and note whether all are finite.

        Only the first call before a step does so: clipping and the step itself may both ask. While the step runs, a
        call means that its closure computed new gradients. Those are divided too; it is too late to leave the step
        out, so if they are not finite they become zero.
        """
        _refuse_lbfgs([optimizer])
        current = self._rounds.get(id(optimizer))
        if current is None:
            current = self._rounds[id(optimizer)] = _Round(optimizer)
            self._scaler.unscale_(cast(Optimizer, current))
        elif current.running:
            again = _Round(optimizer)
            self._scaler.unscale_(cast(Optimizer, again))
            current.again.append(again)
            _zero_unless_finite(optimizer)

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        """Call ``step`` and return what it returns, or None where the gradients were not finite."""
        self.unscale(optimizer)
        current = self._rounds[id(optimizer)]
        current.call = step
        try:
            # The scaler calls current.step(), which is ``step``: an override of optimizer_step is then left out
            # whole, and not only the optimizer in it. Costs one synchronisation with the device, as everywhere.
            result = self._scaler.step(cast(Optimizer, current))
        finally:
            # Kept until the scaler has forgotten this round: it knows rounds by id().
            self._finished.append(self._rounds.pop(id(optimizer)))
        self.skipped = not current.called
        if self.update_each_step:
            self.update()
        return result

    def update(self) -> None:
        """Revise the scale: halve it after gradients that were not finite, double it after 2000 good steps."""
        self._scaler.update()
        self._finished.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and its counters: numbers only."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take ``state_dict()``'s answer; an empty one (of a run in another precision) starts afresh."""
        if state:
            self._scaler.load_state_dict(dict(state))


def check_optimizers(precision: Precision, optimizers: Iterable[Optimizer]) -> None:
    """Refuse, before step 1, an optimizer that cannot work in this precision."""
    if precision.scaled:
        _refuse_lbfgs(optimizers)


class _Round:
    """One optimizer's gradients between two steps, in the shape in which a GradScaler sees an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.call: Callable[[], Any] | None = None
        self.running = False
        self.called = False
        self.again: list[_Round] = []

    def step(self) -> Any:
        self.called = self.running = True
        try:
            return self.call() if self.call is not None else None
        finally:
            self.running = False


class _DefaultDtype:
    """A context in which ``torch.get_default_dtype()`` is another; it counts for the whole process."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc_info: object) -> None:
        torch.set_default_dtype(self._before)


def _refuse_lbfgs(optimizers: Iterable[Optimizer]) -> None:
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ConfigError(
            "precision='16-mixed' does not go with LBFGS: it evaluates the loss several times inside one step, "
            "where the scaler can neither see nor leave out gradients that are not finite. Use precision='bf16-mixed' "
            "or '32'."
        )


def _zero_unless_finite(optimizer: Optimizer) -> None:
    """Zero all gradients if any is not finite (one synchronisation with the device)."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients and not torch.stack([g.isfinite().all() for g in gradients]).all():
        for gradient in gradients:
            gradient.zero_()


def _map_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``convert`` applied to each tensor in nested mappings, sequences and dataclass objects."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, convert) for item in value))
    if isinstance(value, tuple | list):
        items = [_map_tensors(item, convert) for item in value]
        return items if type(value) is list else tuple(items) if type(value) is tuple else type(value)(items)
    if isinstance(value, Mapping):
        changed = {key: _map_tensors(item, convert) for key, item in value.items()}
        if type(value) is dict:
            return changed
        if isinstance(value, dict | UserDict):  # a copy keeps what defaultdict and BatchEncoding hold beside the items
            kept = copy.copy(value)
            kept.update(changed)
            return kept
        return cast(Any, type(value))(changed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _map_tensors(getattr(value, f.name), convert) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value
