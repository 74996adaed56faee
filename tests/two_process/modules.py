"""Modules and data that the cases share. Each class is small enough to be followed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit
from tests.two_process.harness import Processes, Ran, run_here

FEATURES, TARGETS = 4, 2


def samples(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, FEATURES, generator=generator, dtype=dtype),
        torch.randn(count, TARGETS, generator=generator, dtype=dtype),
    )


def loader(count: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(count), batch_size=batch_size, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    # A large eps: gradients near zero would turn a difference in the last bit into one of the step's size.
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


class Net(raylit.Module):
    """Two layers and the mean squared error."""

    def __init__(self, optimizer: str = "sgd", seed: int = 1) -> None:
        super().__init__()
        self.optimizer = optimizer
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, TARGETS))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Numbers(raylit.Module):
    """One weight, loss ``weight * batch.mean()``: gradients are the batch's mean, and steps can be done in the head."""

    def __init__(self, lr: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.lr, self.momentum = lr, momentum

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.weight * batch.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def numbers(*values: float) -> list[Tensor]:
    """A sequence of batches of one number each; of N ranks, rank r takes r, r+N, ..."""
    return [torch.tensor([float(value)]) for value in values]


def fit_case(
    rank: int, world_size: int, make: Callable[[], raylit.Module], loaders: Callable[[], Any], arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Fit and return weights and global step: the case of most tests."""
    ran = run_here(make(), loaders(), rank=rank, world_size=world_size, **arguments)
    return ran.weights, ran.outcome.state.global_step


def alone(make: Callable[[], raylit.Module], loaders: Any, **arguments: Any) -> Ran:
    return run_here(make(), loaders, **arguments)


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def check_equals_one_process(
    two: Processes, make: Callable[[], raylit.Module], shared: Callable[[], Any], whole: Any, **arguments: Any
) -> None:
    """The ranks end equal to each other, and to one process on ``whole``, which moved."""
    arguments.setdefault("max_epochs", 3)
    ranks = two(fit_case, make, shared, arguments)
    for weights, steps in ranks[1:]:
        assert_equal(weights, ranks[0][0])
        assert steps == ranks[0][1]
    reference = alone(make, whole, **arguments)
    assert ranks[0][1] == reference.outcome.state.global_step
    assert_close(ranks[0][0], reference.weights)
    before = dict(make().named_parameters())
    assert any(not torch.equal(before[n], w) for n, w in reference.weights.items() if n in before)
