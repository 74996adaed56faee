"""A module's layers and their sizes as plain text. Floor 2; runs on rank 0 before training, or wherever it is asked.

Made without rich: the summary stands on the way to the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_UNKNOWN = "?"


def summarize(module: nn.Module, max_depth: int = 1) -> str:
    """Return a table of ``module``'s layers, one row each, and the totals below it.

    ``max_depth``: how many levels of children get a row; 0 for the totals alone, -1 for all. Where the module has an
    ``example_input_array``, each row also shows the shapes that went in and out of the layer in one forward pass on
    it: without gradients, in evaluation mode, with every mode and random number generator put back after it. A tuple
    is passed as positional arguments, a dict by name. If that pass fails, the reason is shown in place of the sizes.
    Parameters that are not initialised yet (lazy layers) count as ``?``, and no forward pass is run then.
    """
    if max_depth < -1:
        raise ValueError(f"max_depth={max_depth}: give -1 for all layers, 0 for the totals, or the number of levels")
    layers = dict(_layers(module, max_depth))
    lazy = any(is_lazy(parameter) for parameter in module.parameters())
    shapes: dict[str, tuple[str, str]] | None = None
    remarks = []
    example = getattr(module, "example_input_array", None)
    if layers and example is not None and not lazy:
        try:
            shapes = _shapes(module, layers, example)
        except Exception as error:  # a summary must not end a run that may well be right
            remarks = [f"No sizes: forward(example_input_array) raised {type(error).__name__}: {_first_line(error)}"]
    rows = []
    for index, (name, layer) in enumerate(layers.items()):
        row = [str(index), name, type(layer).__name__, _params(layer), "train" if layer.training else "eval"]
        rows.append(row + list(shapes.get(name, (_UNKNOWN, _UNKNOWN))) if shapes is not None else row)
    own = sum(p.numel() for p in module.parameters(recurse=False) if not is_lazy(p))
    if layers and own:
        rows.append(["", "other parameters", "", short_count(own), ""] + ([""] * 2 if shapes is not None else []))
    head = ["", "Name", "Type", "Params", "Mode"] + (["In sizes", "Out sizes"] if shapes is not None else [])
    return "\n".join([*(_table(head, rows) if rows else []), *_totals(module), *remarks])


def short_count(number: int) -> str:
    """Return ``650``, ``7.9 K``, ``1.2 M``, ``3.0 B``: a count in at most four characters and its unit."""
    value, units = float(number), ["", " K", " M", " B", " T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    if number < 1000:
        return str(number)
    return f"{value:.1f}{units[0]}" if value < 99.95 else f"{value:.0f}{units[0]}"


def _layers(module: nn.Module, max_depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that get a row, parents before their children."""
    if max_depth == 0:
        return
    for name, child in module.named_children():
        yield prefix + name, child
        yield from _layers(child, max_depth - 1, f"{prefix}{name}.")


def _params(module: nn.Module) -> str:
    """Count a layer's parameters; ``"?"`` where none is known, ``"7.9 K + ?"`` where some are."""
    known = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    if any(is_lazy(p) for p in module.parameters()):
        return f"{short_count(known)} + {_UNKNOWN}" if known else _UNKNOWN
    return short_count(known)


def _totals(module: nn.Module) -> list[str]:
    """Count each parameter once, however many layers share it."""
    trainable = fixed = size_bytes = 0
    lazy = 0
    for parameter in module.parameters():
        if is_lazy(parameter):
            lazy += 1
            continue
        trainable += parameter.numel() if parameter.requires_grad else 0
        fixed += 0 if parameter.requires_grad else parameter.numel()
        size_bytes += parameter.numel() * parameter.element_size()
    lines = [
        (short_count(trainable), "Trainable params"),
        (short_count(fixed), "Non-trainable params"),
        (short_count(trainable + fixed), "Total params"),
        (f"{size_bytes / 1e6:.3f}", "Total estimated model params size (MB)"),
    ]
    if lazy:
        lines.append((str(lazy), "Parameter tensors not initialised yet, not counted above"))
    return [f"{number:<9} {label}" for number, label in lines]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return [lines[0], rule, *lines[1:], rule]


def _shapes(module: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, tuple[str, str]]:
    """Run one forward pass on ``example`` and return each layer's shapes in and out; of several calls, the last."""
    found: dict[str, tuple[str, str]] = {}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    handles = []
    for name, layer in layers.items():
        if isinstance(layer, torch.jit.ScriptModule):
            continue  # compiled: it cannot take a hook

        def note(_: nn.Module, given: Any, kwargs: Any, out: Any, name: str = name) -> None:
            found[name] = (_shape(given if len(given) > 1 or kwargs else given[0] if given else None), _shape(out))

        handles.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.no_grad(), _evaluating(module), _same_random_numbers(device):
            example = _to_device(example, device)
            if isinstance(example, tuple):
                module(*example)
            elif isinstance(example, Mapping):
                module(**example)
            else:
                module(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that no running statistics change; each submodule's own mode comes back."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def _same_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Put the generators back after it: with and without a summary, a run must draw the same numbers."""
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


def _shape(value: Any) -> str:
    """Return ``[32, 10]`` for a tensor, a list of such for a collection, ``?`` for anything else."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_shape(item) for item in value) + "]"
    return _UNKNOWN


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
