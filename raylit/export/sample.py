"""What every export shares: a sample for ``forward``, and a Module that comes out as it went in. Floor 2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylit.errors import ConfigError

# What a run keeps on a Module, and what no exported file should hold.
_OF_A_RUN = ("_run", "_last_trainer")


def sample_of(module: nn.Module, given: Any, argument: str, call: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments for ``forward``, on the Module's device.

    A tuple is passed by position, a dict by name, anything else as the one argument. ConfigError where neither a sample
    is given nor ``example_input_array`` set.
    """
    sample = given if given is not None else getattr(module, "example_input_array", None)
    if sample is None:
        raise ConfigError(
            f"{call} runs forward once and needs an input: pass {argument}=, or set self.example_input_array to a "
            "batch that forward takes"
        )
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    sample = _moved(sample, torch.device("cpu") if first is None else first.device)
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample if type(sample) is tuple else (sample,)), {}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


@contextlib.contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and no run; each submodule's own mode and the run come back."""
    modes = [(each, each.training) for each in module.modules()]
    of_a_run = {name: module.__dict__.pop(name) for name in _OF_A_RUN if name in module.__dict__}
    for each, _ in modes:
        each.training = False  # not eval(), which an override may have given more to do
    try:
        with torch.no_grad():
            yield
    finally:
        module.__dict__.update(of_a_run)
        for each, training in modes:
            each.training = training


def ready_path(path: str | os.PathLike[str], call: str) -> Path:
    """Return the path with its folder made, so that a long export does not end for want of one."""
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ConfigError(f"{call} writes to a file of this machine; got {path!r}")
    target = Path(path).expanduser()
    if target.is_dir():
        raise ConfigError(f"{call} writes a file, and {str(path)!r} is a folder: give a file's name in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
