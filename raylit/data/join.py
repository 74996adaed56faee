"""Putting together what the parts of a batch gave, where the batch was split over devices. Floor 2.

What the whole batch would have given is known of means over samples (losses) and of values for each sample
(predictions). Anything else comes as the list of the parts' values, so that nobody takes it for the batch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SAME_FOR_ALL = (str, bytes, bool, type(None))


def join_outputs(outputs: Sequence[Any], sizes: Sequence[int | None], *, training: bool) -> Any:
    """Return one step's output from those of its parts; ``sizes`` are the parts' numbers of samples.

    - a floating point number or 0-d tensor: the mean, weighted by the parts' sizes; so the loss of a training step,
      ``"loss"`` in a dict, also where it has one element in a dimension
    - tensors whose dimension 0 is the part's samples, and lists of one item a sample: put one behind the other
    - dicts, lists and tuples of the same structure: item by item
    - ``"hiddens"`` of a training step, and all else: the list of the parts' values

    Parts that gave None are left out; None where all did.
    """
    given = [(output, size) for output, size in zip(outputs, sizes, strict=True) if output is not None]
    if not given:
        return None
    values, weights = [output for output, _ in given], [size for _, size in given]
    if not training:
        return _joined(values, weights)
    if _all(values, Tensor):
        return _loss(values, weights)
    if _all(values, Mapping) and all(value.keys() == values[0].keys() for value in values):
        joined: dict[str, Any] = {}
        for key in values[0]:
            each = [value[key] for value in values]
            if key == "hiddens":
                joined[key] = each
            elif key == "loss":
                joined[key] = join_outputs(each, weights, training=True)
            else:
                joined[key] = _joined(each, weights)
        return joined
    return _joined(values, weights)


def weighted_mean(values: Sequence[Any], sizes: Sequence[int | None]) -> Any:
    """Return the mean of numbers or tensors of one shape, each counted as often as it has samples."""
    weights = [1.0 if size is None else float(size) for size in sizes]
    total = sum(weights)
    if not total:
        weights, total = [1.0] * len(weights), float(len(weights))
    mean = values[0] * (weights[0] / total)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        mean = mean + value * (weight / total)
    return mean


def _loss(values: list[Tensor], sizes: list[int | None]) -> Any:
    if all(value.numel() == 1 and value.is_floating_point() for value in values):
        return weighted_mean(values, sizes)
    return _joined(values, sizes)


def _joined(values: list[Any], sizes: list[int | None]) -> Any:
    first = values[0]
    if _all(values, Tensor):
        if all(value.dim() and value.shape[0] == size for value, size in zip(values, sizes, strict=True)):
            return torch.cat(values)
        if all(not value.dim() and value.is_floating_point() for value in values):
            return weighted_mean(values, sizes)
    elif _all(values, float):
        return weighted_mean(values, sizes)
    elif _all(values, Mapping) and all(value.keys() == first.keys() for value in values):
        return {key: _joined([value[key] for value in values], sizes) for key in first}
    elif _all(values, (list, tuple)) and all(type(value) is type(first) for value in values):
        one_a_sample = [len(value) for value in values] == sizes and not hasattr(first, "_fields")
        if one_a_sample and not any(_has_samples(item) for value in values for item in value):
            items = [item for value in values for item in value]
            return items if isinstance(first, list) else tuple(items)
        if all(len(value) == len(first) for value in values):
            items = [_joined(list(each), sizes) for each in zip(*values, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    elif _all(values, _SAME_FOR_ALL) and all(value == first for value in values):
        return first
    return values


def _has_samples(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0


def _all(values: Sequence[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)
