"""Copies of the caller's objects, for a training of which nothing is to be kept. Floor 5, driver side.

What is trained is copied to the last tensor. Data are not: a data set in memory may be most of it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raylit.datamodule import DataModule
from raylit.hparams import HParams
from raylit.module import Module
from raylit.seed import get_random_state, set_random_state

# Where random numbers come from, beside the process's own generators.
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def copied_module(module: Module) -> Module:
    """Return a copy that shares no tensor with the Module; data sets are shared, and what has no copy (a lock)."""
    owners = list(module.modules())
    shared = [value.dataset if isinstance(value, DataLoader) else value for owner in owners
              for value in vars(owner).values() if isinstance(value, (Dataset, DataLoader))]  # fmt: skip
    memo = _memo(shared)
    try:
        twin = copy.deepcopy(module, memo)
    except Exception:  # whatever an object's own copying raises: find it
        own = frozenset(nn.Module().__dict__)
        for owner in owners:
            shared += [value for name, value in vars(owner).items() if name not in own and not _copies(value, shared)]
        memo = _memo(shared)
        twin = copy.deepcopy(module, memo)
    for name, value in module.hparams.items():
        if isinstance(value, nn.Module) and id(value) in memo:  # a layer: hyperparameters' own copies leave it as it is
            twin.hparams[name] = memo[id(value)]
    return twin


def copied_datamodule(datamodule: DataModule | None) -> DataModule | None:
    """Return another DataModule with the same contents; its hyperparameters and generators are copies."""
    if datamodule is None:
        return None
    twin = copy.copy(datamodule)
    for name, value in vars(twin).items():
        if isinstance(value, (HParams, *_GENERATORS)):
            twin.__dict__[name] = copy.deepcopy(value)
    return twin


def copied_loaders(source: Any) -> Any:
    """Return loaders like those that were passed, with samplers and generators of their own, over the same data."""
    if isinstance(source, DataLoader):
        shared = [source.dataset]
        return copy.deepcopy(source, _memo(shared)) if _copies(source, shared) else source
    if isinstance(source, Mapping):
        return {name: copied_loaders(each) for name, each in source.items()}
    if type(source) in (list, tuple) and any(isinstance(each, DataLoader) for each in source):
        return type(source)(copied_loaders(each) for each in source)
    return source


def _memo(shared: list[Any]) -> dict[int, Any]:
    """What ``deepcopy`` is to take for copied already."""
    return {id(each): each for each in shared}


def _copies(value: Any, shared: list[Any]) -> bool:
    try:
        copy.deepcopy(value, _memo(shared))
    except Exception:
        return False
    return True


@contextmanager
def parked(module: nn.Module) -> Iterator[None]:
    """Keep the Module's tensors off the GPU, so that it has the room for its copy that it has for itself alone."""
    moved: list[tuple[Tensor, torch.device]] = [
        (tensor, tensor.device) for tensor in [*module.parameters(), *module.buffers()] if tensor.device.type == "cuda"
    ]
    for tensor, _ in moved:
        tensor.data = tensor.data.cpu()
    try:
        yield
    finally:
        for tensor, device in moved:
            tensor.data = tensor.data.to(device)


@contextmanager
def random_states_kept(devices: bool) -> Iterator[None]:
    """Put the random states of this process back at the end; ``devices``: those of its GPUs too."""
    before = get_random_state()
    on_gpus = torch.cuda.get_rng_state_all() if devices and torch.cuda.is_available() else []
    try:
        yield
    finally:
        set_random_state(before, devices=False)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
