"""DDP on 2 workers with batch size B gives what one process with 2B gives on the same samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.strategies import DDP
from tests.two_process.harness import Processes
from tests.two_process.modules import (
    FEATURES,
    TARGETS,
    Net,
    adamw,
    check_equals_one_process,
    loader,
    samples,
    sgd,
)

optimizers = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


@optimizers
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {"strategy": DDP(gradient_as_bucket_view=True), "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulated", "clipped", "clipped_by_value_accumulated", "own_ddp_object"],
)
def test_automatic_optimisation(two: Processes, optimizer: str, arguments: dict[str, Any]) -> None:
    # 32 samples, shuffled: 4 steps of 2 x 4, the last group of three being short.
    check_equals_one_process(
        two, lambda: Net(optimizer), lambda: loader(32, 4, shuffle=True), loader(32, 8, shuffle=True), **arguments
    )


@optimizers
def test_an_uneven_tail(two: Processes, optimizer: str) -> None:
    """27 over 2 x 4: three full steps, one sample for each rank, and one left over, which training drops."""
    x, y = samples(27).tensors
    whole = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)] + [(x[24:26], y[24:26])]
    check_equals_one_process(two, lambda: Net(optimizer), lambda: loader(27, 4), whole)


def test_on_three_workers(three: Processes) -> None:
    check_equals_one_process(three, Net, lambda: loader(24, 2, shuffle=True), loader(24, 6, shuffle=True))


class Gan(raylit.Module):
    """Two networks in turn on each batch; the first one's loss runs through the second."""

    def __init__(self, frequencies: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.generator, self.critic = nn.Linear(FEATURES, TARGETS), nn.Linear(TARGETS, 1)
        self.frequencies = frequencies

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        x, y = batch
        made = self.generator(x)
        if optimizer_idx == 0:
            return {"loss": self.critic(made).pow(2).mean() + mse_loss(made, y)}
        return (self.critic(made.detach()) - self.critic(y)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        made = [sgd(self.generator.parameters()), adamw(self.critic.parameters())]
        if self.frequencies is None:
            return made, []
        return [{"optimizer": o, "frequency": n} for o, n in zip(made, self.frequencies)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_optimizers(two: Processes, accumulate: int) -> None:
    check_equals_one_process(
        two, Gan, lambda: loader(24, 4), loader(24, 8), accumulate_grad_batches=accumulate, gradient_clip_val=1.0
    )


def test_two_optimizers_with_frequencies(two: Processes) -> None:
    check_equals_one_process(two, lambda: Gan((1, 2)), lambda: loader(40, 4), loader(40, 8))


class Manual(Gan):
    """The same by hand: manual_backward twice before one step, a step of the other every batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        generator, critic = self.optimizers()
        made = self.generator(x)
        self.toggle_optimizer(generator)
        self.manual_backward(self.critic(made).pow(2).mean(), generator, retain_graph=True)
        self.manual_backward(mse_loss(made, y), generator)
        self.manual_optimizer_step(generator)
        self.untoggle_optimizer(generator)
        self.manual_backward((self.critic(made.detach()) - self.critic(y)).pow(2).mean(), critic)
        critic.step()
        critic.zero_grad()


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_manual_optimisation(two: Processes, arguments: dict[str, Any]) -> None:
    check_equals_one_process(two, Manual, lambda: loader(24, 4), loader(24, 8), **arguments)


class Recurrent(raylit.Module):
    """A recurrent network over splits of the sequence, its state carried from split to split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 1)

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        x, y = batch
        out, hiddens = self.rnn(x, hiddens)
        return {"loss": mse_loss(self.head(out), y), "hiddens": hiddens}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def sequences(batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(12, 7, 3, generator=generator), torch.randn(12, 7, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_truncated_bptt(two: Processes, accumulate: int) -> None:
    check_equals_one_process(
        two, Recurrent, lambda: sequences(2), sequences(4), truncated_bptt_steps=3, accumulate_grad_batches=accumulate
    )


class SecondOrder(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(
            self.parameters(), lr=0.2, max_iter=4, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )


def test_lbfgs(two: Processes) -> None:
    """A line search takes decisions on the loss: the ranks must take the same ones, and one process's."""
    check_equals_one_process(two, SecondOrder, lambda: loader(32, 8), loader(32, 16), precision="64-true")


class StepEnd(Net):
    """``training_step`` leaves the loss to ``training_step_end``, and ``optimizer_step`` is overridden."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"out": self(x), "y": y}

    def training_step_end(self, step_output: Any) -> Any:
        return mse_loss(step_output["out"], step_output["y"])

    def optimizer_step(self, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


def test_step_end_and_an_overridden_step(two: Processes) -> None:
    check_equals_one_process(two, StepEnd, lambda: loader(24, 4), loader(24, 8))


class Dtypes(Net):
    """Half of the network in another memory format, buffers of all kinds, a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.head = nn.Linear(4, TARGETS)
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("strided", torch.arange(6.0).view(2, 3).t())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        image = x.view(-1, 2, 2, 1).contiguous(memory_format=torch.channels_last)
        return mse_loss(self.head(self.conv(image).mean((2, 3))) + self(x) * self.mask, y)


def test_every_kind_of_tensor(two: Processes) -> None:
    check_equals_one_process(two, Dtypes, lambda: loader(16, 4), loader(16, 8))


class Thaws(Net):
    """The first layer is frozen at first, learns from epoch 1 on, and the last is frozen in epoch 2."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
        if self.current_epoch == 2:
            self.net[2].requires_grad_(False)


def test_layers_that_are_frozen_and_thawed_meanwhile(two: Processes) -> None:
    check_equals_one_process(two, Thaws, lambda: loader(16, 4), loader(16, 8), max_epochs=4)


class Sleeps(Net):
    """Nothing learns until training starts."""

    def __init__(self) -> None:
        super().__init__()
        self.freeze()

    def on_train_start(self) -> None:
        self.unfreeze()


def test_a_model_that_is_frozen_whole_when_it_is_wrapped(two: Processes) -> None:
    check_equals_one_process(two, Sleeps, lambda: loader(16, 4), loader(16, 8))


class ThawsInTurn(Gan):
    def __init__(self) -> None:
        super().__init__()
        self.generator.weight.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.generator.weight.requires_grad_(True)


def test_layers_that_are_thawed_under_two_optimizers(two: Processes) -> None:
    check_equals_one_process(two, ThawsInTurn, lambda: loader(16, 4), loader(16, 8))
