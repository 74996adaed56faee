"""How the values of one key become one: the accepted reductions, and the running sum of them on one worker.

Values are folded in chunks into float64 (float32 on devices that have no float64), so that an epoch's value is right to
rounding however many batches it has. Nothing here waits for a device, and nothing here talks to another worker.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from raylit.errors import LogError, nearest

CHUNK = 64  # values of a key held before they are folded: 64 scalars of memory, and a stack costs 0.2 us a value

_NAMED: dict[Any, str] = {
    "mean": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", torch.amin: "min", torch.amax: "max",
    torch.Tensor.mean: "mean", torch.Tensor.sum: "sum", torch.Tensor.min: "min", torch.Tensor.max: "max",
    sum: "sum", min: "min", max: "max",
}  # fmt: skip

_IDENTITY = {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf}


def parse_reduction(fx: Any, argument: str, name: str) -> tuple[str, Callable[[Tensor], Any] | None]:
    """Return the reduction's label, and the function for one that is not mean, sum, min or max.

    The label of another callable is its module, qualified name and first line: a lambda written in the hook is a new
    object at each call, and each rank has its own, but it is the same reduction.
    Raises LogError, naming what is accepted, for an unknown name or something that cannot be called.
    """
    try:
        label = _NAMED.get(fx)
    except TypeError:  # unhashable
        label = None
    if label is not None:
        return label, None
    if isinstance(fx, str) or not callable(fx):
        hint = nearest(fx, ["mean", "sum", "min", "max"]) if isinstance(fx, str) else ""
        raise LogError(
            f"log({name!r}): {argument}={fx!r} is unknown. Accepted: 'mean', 'sum', 'min', 'max', the torch functions "
            f"and builtins of these names, or a callable that is given all values as one 1-d tensor.{hint}"
        )
    return _callable_label(fx), fx


def _callable_label(fx: Any) -> str:
    if isinstance(fx, functools.partial):
        return f"partial({_callable_label(fx.func)}, {fx.args!r}, {sorted(fx.keywords.items())!r})"
    code = getattr(fx, "__code__", None)
    line = f":{code.co_firstlineno}" if code is not None else ""
    owner = fx if hasattr(fx, "__qualname__") else type(fx)
    return f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', repr(owner))}{line}"


def reduce_stacked(op: str, fx: Callable[[Tensor], Any] | None, stacked: Tensor) -> Any:
    """Apply a parsed reduction to a 1-d tensor of values."""
    if fx is not None:
        return fx(stacked)
    if op == "mean":
        return stacked.mean()
    if op == "sum":
        return stacked.sum()
    return stacked.amin() if op == "min" else stacked.amax()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has none (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _smallest(values: Sequence[float]) -> float:
    """Return the smallest; a NaN anywhere makes it NaN, as in torch, where Python's own min depends on the order."""
    return math.nan if any(v != v for v in values) else min(values)


def _weights_on(device: torch.device, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    host = torch.tensor(weights, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # From pageable memory this copy would wait for the stream; from pinned memory it does not.
    return host.pin_memory().to(device, non_blocking=True)


class Running:
    """The values of one key so far, on one worker.

    ``op`` is "mean", "sum", "min", "max" or "custom" (every value is kept, for a callable at the end). ``values`` and
    ``weights`` are the chunk not yet folded: Python numbers and detached 0-d tensors, with the weight of each.
    ``host`` and ``parts`` hold what was folded: of Python numbers, and of tensors by device. For a mean these are
    weighted sums; ``weight`` is the sum of weights and ``count`` the number of values.
    """

    __slots__ = ("count", "host", "kept", "op", "parts", "values", "weight", "weights")

    def __init__(self, op: str) -> None:
        self.op = op
        self.values: list[Any] = []
        self.weights: list[float] = []
        self.weight = 0.0
        self.count = 0
        self.host = _IDENTITY.get(op, 0.0)
        self.parts: dict[torch.device, Tensor] = {}
        self.kept: list[Tensor] = []

    def fold(self) -> None:
        """Empty the chunk into the totals. Launches work on the values' devices and waits for none."""
        if not self.values:
            return
        for device, values, weights in self._runs():
            if device is None:
                self._fold_numbers([float(v) for v in values], weights)
            else:
                self._fold_tensors(device, values, weights)
            self.weight += sum(weights)
            self.count += len(values)
        self.values.clear()
        self.weights.clear()

    def _runs(self) -> list[tuple[torch.device | None, Sequence[Any], Sequence[float]]]:
        """Return the chunk in runs of values of one device; None for Python numbers. Mostly it is one run."""
        kinds = set(map(type, self.values))
        if kinds == {float}:
            return [(None, self.values, self.weights)]
        if kinds == {Tensor} and len({value.device for value in self.values}) == 1:
            return [(self.values[0].device, self.values, self.weights)]
        runs: list[tuple[torch.device | None, Sequence[Any], Sequence[float]]] = []
        pairs = zip(self.values, self.weights)
        for device, run in groupby(pairs, key=lambda pair: pair[0].device if isinstance(pair[0], Tensor) else None):
            values, weights = zip(*run)
            runs.append((device, values, weights))
        return runs

    def _fold_numbers(self, values: list[float], weights: Sequence[float]) -> None:
        if self.op == "mean":
            self.host += sum(v * w for v, w in zip(values, weights))
        elif self.op == "sum":
            self.host += sum(values)
        elif self.op == "min":
            self.host = _smallest([self.host, *values])
        elif self.op == "max":
            self.host = -_smallest([-self.host, *(-v for v in values)])
        else:
            self.kept.append(torch.tensor(values, dtype=torch.float64))

    def _fold_tensors(self, device: torch.device, values: Sequence[Tensor], weights: Sequence[float]) -> None:
        dtype = accumulation_dtype(device)
        stacked = torch.stack(tuple(values)).to(dtype)
        if self.op == "custom":
            self.kept.append(stacked)
            return
        before = self.parts.get(device)
        if self.op == "mean" or self.op == "sum":
            if self.op == "mean" and weights.count(weights[0]) != len(weights):
                part = (stacked * _weights_on(device, weights, dtype)).sum()
            else:
                part = stacked.sum() * (weights[0] if self.op == "mean" else 1)
            self.parts[device] = part if before is None else before + part
        elif self.op == "min":
            part = stacked.amin()
            self.parts[device] = part if before is None else torch.minimum(before, part)
        else:
            part = stacked.amax()
            self.parts[device] = part if before is None else torch.maximum(before, part)

    def absorb(self, other: Running) -> None:
        """Take the values of another worker's too, which goes on with none."""
        self.fold()
        other.fold()
        self.weight += other.weight
        self.count += other.count
        self.kept += other.kept
        if self.op in ("mean", "sum"):
            self.host += other.host
        elif self.op in ("min", "max"):
            sign = 1 if self.op == "min" else -1
            self.host = sign * _smallest([sign * self.host, sign * other.host])
        combine = {"min": torch.minimum, "max": torch.maximum}.get(self.op, torch.add)
        for device, part in other.parts.items():
            mine = self.parts.get(device)
            self.parts[device] = part if mine is None else combine(mine, part)

    def total(self, device: torch.device) -> Tensor:
        """Return sum (weighted, for a mean), min or max of all values as a new 0-d tensor on ``device``."""
        total = torch.full((), self.host, dtype=accumulation_dtype(device), device=device)
        for part in self.parts.values():
            part = part.to(device=device, dtype=total.dtype)
            if self.op == "min":
                total = torch.minimum(total, part)
            elif self.op == "max":
                total = torch.maximum(total, part)
            else:
                total = total + part
        return total

    def all_values(self) -> Tensor:
        """Return the values of a "custom" key, [count], float64 on the CPU. Waits for the device."""
        return torch.cat([kept.to("cpu", torch.float64) for kept in self.kept])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors. The chunk is not folded: folding elsewhere would change the last bits."""
        tensors = [*self.values, *self.parts.values(), *self.kept]
        return {
            "op": self.op, "values": list(self.values), "weights": list(self.weights), "weight": self.weight,
            "count": self.count, "host": self.host, "parts": list(self.parts.values()), "kept": list(self.kept),
            # A map_location may move them; where each lay decides which total it was added to.
            "on_cpu": [not isinstance(t, Tensor) or t.device.type == "cpu" for t in tensors],
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Running:
        """Rebuild from :meth:`state_dict`; what lay on an accelerator goes to ``device``."""
        new = cls(state["op"])
        on_cpu = iter(state["on_cpu"])

        def placed(value: Any) -> Any:
            here = torch.device("cpu") if next(on_cpu) else device
            return value.to(here) if isinstance(value, Tensor) else value

        new.values = [placed(v) for v in state["values"]]
        parts = [placed(v) for v in state["parts"]]
        new.kept = [placed(v) for v in state["kept"]]
        new.parts = {part.device: part for part in parts}
        new.weights = list(state["weights"])
        new.weight, new.count, new.host = state["weight"], state["count"], state["host"]
        return new
