"""Objects like ``torchmetrics.Metric``: found by their methods, since torchmetrics is never imported here.

torchmetrics would gather its states itself, one collective a state, and waits for ever when a rank that had no batch
does not take part. So the states of all logged metrics travel in one exchange, through the run's collective, and
``compute`` then runs with torchmetrics' own synchronisation off. This uses torchmetrics' ``_reductions``, ``_to_sync``,
``_update_count``, ``_computed`` and ``_forward_cache`` (1.0 to 1.9; there is no public way). Other objects with these
three methods compute on their own and must synchronise themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_metric(value: Any) -> bool:
    """Return whether a value has ``update``, ``compute`` and ``reset``."""
    if isinstance(value, Tensor):
        return False
    return all(callable(getattr(value, method, None)) for method in ("update", "compute", "reset"))


def batch_value(metric: Any) -> Any:
    """Return what the metric's last call (its ``forward``) gave for that batch; None if only ``update`` was called."""
    return getattr(metric, "_forward_cache", None)


def _parts(metric: Any) -> list[Any]:
    """Return the metric and those inside it (wrappers, sums of metrics), in the same order on every rank."""
    inner = metric.modules() if isinstance(metric, nn.Module) else [metric]
    return [part for part in inner if hasattr(part, "_reductions") and hasattr(part, "metric_state")]


def metric_states(metric: Any, to_cpu: bool = True) -> list[dict[str, Any]]:
    """Return the states of the metric and of those inside it: name to tensor or list of tensors, and how many updates.

    With ``to_cpu`` this waits for the device: for loop ends only.
    """

    def sent(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu() if to_cpu else value.detach().clone()
        return [sent(item) for item in value] if isinstance(value, (list, tuple)) else value

    return [
        {"states": {k: sent(v) for k, v in part.metric_state.items()}, "updates": int(part._update_count)}
        for part in _parts(metric)
    ]


def load_metric_states(metric: Any, states: list[dict[str, Any]]) -> None:
    """Put back what :func:`metric_states` returned, on the metric's device."""
    for part, saved in zip(_parts(metric), states):
        for attribute, value in saved["states"].items():
            setattr(part, attribute, _on(part.device, value))
        part._update_count = saved["updates"]
        part._computed = None


def join_metric_states(metric: Any, gathered: list[list[dict[str, Any]]]) -> list[dict[str, Any]] | None:
    """Return the states of several ranks as those of one that goes on; None where they cannot be joined.

    Sums, minima, maxima and collected values can; a state that is reduced in another way cannot be updated afterwards.
    """
    joined = []
    for index, part in enumerate(_parts(metric)):
        states = {}
        for attribute, reduction in part._reductions.items():
            if getattr(reduction, "__name__", "") not in _JOINED:
                return None
            values = [rank[index]["states"][attribute] for rank in gathered]
            merged = _merge(part.device, reduction, values)
            listed = isinstance(values[0], list)
            states[attribute] = [merged] if listed and isinstance(merged, Tensor) else merged
        joined.append({"states": states, "updates": sum(rank[index]["updates"] for rank in gathered)})
    return joined


_JOINED = ("dim_zero_sum", "dim_zero_cat", "dim_zero_min", "dim_zero_max")


def _on(device: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on(device, item) for item in value] if isinstance(value, list) else value


def compute_over_ranks(metric: Any, gathered: list[list[dict[str, Any]]] | None) -> Any:
    """Return ``compute()`` over the states of all ranks, in rank order; the same on each.

    The metric's own states are put back afterwards; the caller resets it. None: one worker, nothing to merge.
    """
    parts = _parts(metric)
    if not parts:
        return metric.compute()
    synced = [part._to_sync for part in parts]
    own = [dict(part.metric_state) for part in parts]
    if gathered is not None:
        for index, part in enumerate(parts):
            for attribute, reduction in part._reductions.items():
                values = [rank[index]["states"][attribute] for rank in gathered]
                setattr(part, attribute, _merge(part.device, reduction, values))
            part._update_count = sum(rank[index]["updates"] for rank in gathered)
            part._computed = None
    for part in parts:
        part._to_sync = False
    try:
        return metric.compute()
    finally:
        for part, before, states in zip(parts, synced, own):
            part._to_sync = before
            for attribute, value in states.items():
                setattr(part, attribute, value)


def _merge(device: Any, reduction: Any, values: list[Any]) -> Any:
    """Reduce one state over ranks as torchmetrics does: stack tensors, join lists, then apply the reduction."""
    if all(isinstance(value, Tensor) for value in values):
        merged: Any = torch.stack([value.to(device) for value in values])
    else:
        merged = [_on(device, v) for value in values for v in (value if isinstance(value, list) else [value])]
        if not merged:
            return merged
    return reduction(merged) if callable(reduction) else merged
