"""Small Modules, data and a quiet Trainer for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit

FEATURES, HIDDEN, TARGETS = 5, 7, 2


def quiet(tmp_path: Path, **arguments: Any) -> raylit.Trainer:
    """A Trainer in this process that shows and keeps nothing."""
    defaults: dict[str, Any] = {
        "num_workers": 0, "use_gpu": False, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "storage_path": str(tmp_path),
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    if not {"max_epochs", "max_steps", "max_time"} & set(arguments):
        defaults["max_epochs"] = 1
    return raylit.Trainer(**{**defaults, **arguments})


def samples(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, FEATURES, generator=generator), torch.randn(count, TARGETS, generator=generator)
    )


def batches(count: int = 7, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """A sequence of batches; the last one is a sample short."""
    return [tuple(batch) for batch in DataLoader(samples(count * size - 1, seed), batch_size=size)]


def network(dropout: float = 0.0, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Dropout(dropout), nn.Linear(HIDDEN, TARGETS))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Net(raylit.Module):
    """A network with the mean squared error; optimizer and schedulers come from outside."""

    def __init__(self, configure: Callable[[Any], Any] = sgd, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = network(dropout)
        self._configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self._configure(self.parameters())


class Numbers(raylit.Module):
    """One weight; the loss is weight * batch, so gradients, and the steps of SGD(lr=1), can be done in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.weight * batch.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor([float(value)]) for value in values]


def assert_same(mine: Any, other: Any, where: str = "") -> None:
    """Compare nested states exactly, tensors bit for bit."""
    if isinstance(mine, Tensor):
        assert isinstance(other, Tensor) and torch.equal(mine, other), where
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys(), where
        for key in mine:
            assert_same(mine[key], other[key], f"{where}.{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(other), where
        for index, (one, two) in enumerate(zip(mine, other)):
            assert_same(one, two, f"{where}[{index}]")
    else:
        assert mine == other, where
