"""After three epochs the weights are bit for bit those of a loop written by hand with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import raylit
from tests.unit.engine.small import Net, adamw, assert_same, batches, network, quiet, samples, sgd

EPOCHS = 3

both = pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
loaders = pytest.mark.parametrize(
    "loader",
    [batches, lambda: DataLoader(samples(27), batch_size=4, shuffle=False)],
    ids=["list", "dataloader"],
)


def by_hand(
    loader: Any, make: Callable[[Any], torch.optim.Optimizer], *, accumulate: int = 1, clip: Any = None,
    step_scheduler: Any = None, epoch_scheduler: Any = None, dropout: float = 0.0, autocast: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer]:  # fmt: skip
    model = network(dropout)
    optimizer = make(model.parameters())
    each_step = step_scheduler(optimizer) if step_scheduler else None
    each_epoch = epoch_scheduler(optimizer) if epoch_scheduler else None
    torch.manual_seed(77)
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = mse_loss(model(x), y)
            if accumulate > 1:
                loss = loss / accumulate
            loss.backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                if clip is not None:
                    clip(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
                if each_step is not None:
                    each_step.step()
        if each_epoch is not None:
            each_epoch.step()
    return model, optimizer


def check(
    tmp_path: Path, module: Net, loader: Any, expected: tuple[nn.Module, torch.optim.Optimizer], **arguments: Any
):
    trainer = quiet(tmp_path, max_epochs=EPOCHS, **arguments)
    before = [p.detach().clone() for p in module.parameters()]
    torch.manual_seed(77)
    trainer.fit(module, loader)
    model, optimizer = expected
    assert_same(module.net.state_dict(), dict(model.state_dict()))
    assert_same(trainer.optimizers[0].state_dict(), optimizer.state_dict())
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters()))  # it did train
    return trainer


@both
@loaders
def test_plain(tmp_path, make, loader):
    check(tmp_path, Net(make), loader(), by_hand(loader(), make))


@both
@loaders
@pytest.mark.parametrize("accumulate", [2, 3, 20])
def test_accumulated_with_a_short_last_group(tmp_path, make, loader, accumulate):
    expected = by_hand(loader(), make, accumulate=accumulate)
    check(tmp_path, Net(make), loader(), expected, accumulate_grad_batches=accumulate)


@both
def test_clipped_norm(tmp_path, make):
    expected = by_hand(batches(), make, clip=lambda p: nn.utils.clip_grad_norm_(p, 0.1))
    check(tmp_path, Net(make), batches(), expected, gradient_clip_val=0.1)


@both
def test_clipped_value(tmp_path, make):
    expected = by_hand(batches(), make, clip=lambda p: nn.utils.clip_grad_value_(p, 0.01))
    check(tmp_path, Net(make), batches(), expected, gradient_clip_val=0.01, gradient_clip_algorithm="value")


@both
def test_accumulated_and_clipped(tmp_path, make):
    # The whole group's gradient is clipped, not each batch's.
    expected = by_hand(batches(), make, accumulate=3, clip=lambda p: nn.utils.clip_grad_norm_(p, 0.1))
    check(tmp_path, Net(make), batches(), expected, gradient_clip_val=0.1, accumulate_grad_batches=3)


@both
def test_schedulers_of_both_intervals(tmp_path, make):
    def by_step(optimizer):
        return ExponentialLR(optimizer, gamma=0.97)

    def by_epoch(optimizer):
        return StepLR(optimizer, step_size=1, gamma=0.5)

    def configure(parameters):
        optimizer = make(parameters)
        return [optimizer], [{"scheduler": by_step(optimizer), "interval": "step"}, by_epoch(optimizer)]

    expected = by_hand(batches(), make, step_scheduler=by_step, epoch_scheduler=by_epoch, accumulate=3)
    check(tmp_path, Net(configure), batches(), expected, accumulate_grad_batches=3)


def test_scheduler_frequency(tmp_path):
    def configure(parameters):
        optimizer = sgd(parameters)
        scheduler = CosineAnnealingLR(optimizer, T_max=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}

    model = network()
    optimizer = sgd(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, T_max=9)
    steps = 0
    for _ in range(EPOCHS):
        for x, y in batches():
            mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % 2 == 0:
                scheduler.step()
    check(tmp_path, Net(configure), batches(), (model, optimizer))


@both
@loaders
def test_dropout_draws_from_the_same_generator(tmp_path, make, loader):
    check(tmp_path, Net(make, dropout=0.4), loader(), by_hand(loader(), make, dropout=0.4))


def test_sanity_check_leaves_the_random_numbers_alone(tmp_path):
    class Noisy(Net):
        def validation_step(self, batch, batch_idx):
            torch.randn(3)  # as a sampled validation would

    module = Noisy(sgd, dropout=0.4)
    trainer = quiet(tmp_path, max_epochs=EPOCHS, num_sanity_val_steps=2, check_val_every_n_epoch=EPOCHS + 1)
    training = batches()  # walks a DataLoader, which draws too
    torch.manual_seed(77)
    trainer.fit(module, training, DataLoader(samples(8), batch_size=4))
    assert_same(module.net.state_dict(), dict(by_hand(batches(), sgd, dropout=0.4)[0].state_dict()))


@both
def test_bf16_mixed(tmp_path, make):
    expected = by_hand(batches(), make, autocast=True)
    check(tmp_path, Net(make), batches(), expected, precision="bf16-mixed")
    assert not torch.equal(expected[0][0].weight, by_hand(batches(), make)[0][0].weight)  # it did matter


def test_reduce_lr_on_plateau_over_the_validation_loss(tmp_path):
    validation = batches(3, seed=5)

    class Watched(Net):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_loss", mse_loss(self.net(x), y))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=2.0)  # too much: the loss gets worse
            scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for _ in range(EPOCHS):
        for x, y in batches():
            mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            total = sum(mse_loss(model(x), y).double() * len(x) for x, y in validation)
        scheduler.step(total / sum(len(x) for x, _ in validation))
    assert optimizer.param_groups[0]["lr"] < 2.0
    trainer = quiet(tmp_path, max_epochs=EPOCHS)
    module = Watched()
    trainer.fit(module, batches(), validation)
    assert_same(module.net.state_dict(), dict(model.state_dict()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert trainer.lr_schedulers[0].best == pytest.approx(float(scheduler.best), rel=1e-12)


# -- several optimizers ----------------------------------------------------------------------------------------------
class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.generator = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
        self.critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def generator_loss(self, x: Tensor) -> Tensor:
        judged = self.critic(self.generator(x))
        return bce(judged, torch.ones_like(judged))

    def critic_loss(self, x: Tensor, y: Tensor) -> Tensor:
        real, fake = self.critic(y), self.critic(self.generator(x).detach())
        return (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2


class Gan(raylit.Module):
    def __init__(self, make, frequencies=None) -> None:
        super().__init__()
        self.pair, self._make, self._frequencies = Pair(), make, frequencies
        self.turns: list[int] = []

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns.append(optimizer_idx)
        mine, others = (self.pair.generator, self.pair.critic)[:: 1 if optimizer_idx == 0 else -1]
        assert all(p.requires_grad for p in mine.parameters())
        assert not any(p.requires_grad for p in others.parameters())
        x, y = batch
        return self.pair.generator_loss(x) if optimizer_idx == 0 else self.pair.critic_loss(x, y)

    def configure_optimizers(self):
        made = [self._make(self.pair.generator.parameters()), self._make(self.pair.critic.parameters())]
        if self._frequencies is None:
            return made
        return [{"optimizer": o, "frequency": n} for o, n in zip(made, self._frequencies)]


def step_alone(
    loss: Tensor, own: nn.Module, optimizer: torch.optim.Optimizer, scale: int = 1, step: bool = True
) -> None:
    """Gradients for ``own`` alone, added up as backward does."""
    for parameter, gradient in zip(
        own.parameters(), torch.autograd.grad(loss / scale if scale > 1 else loss, [*own.parameters()])
    ):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if step:
        optimizer.step()
        optimizer.zero_grad()


@both
def test_two_optimizers_on_every_batch(tmp_path, make):
    pair = Pair()
    first, second = make(pair.generator.parameters()), make(pair.critic.parameters())
    for _ in range(EPOCHS):
        for x, y in batches():
            step_alone(pair.generator_loss(x), pair.generator, first)
            step_alone(pair.critic_loss(x, y), pair.critic, second)
    module = Gan(make)
    trainer = quiet(tmp_path, max_epochs=EPOCHS)
    trainer.fit(module, batches())
    assert module.turns == [0, 1] * 7 * EPOCHS
    assert_same(dict(module.pair.state_dict()), dict(pair.state_dict()))
    assert_same([o.state_dict() for o in trainer.optimizers], [first.state_dict(), second.state_dict()])
    assert all(p.requires_grad for p in module.parameters())


@both
def test_two_optimizers_accumulated(tmp_path, make):
    pair = Pair()
    first, second = make(pair.generator.parameters()), make(pair.critic.parameters())
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(batches()):
            done = (index + 1) % 3 == 0 or index == 6
            step_alone(pair.generator_loss(x), pair.generator, first, scale=3, step=done)
            step_alone(pair.critic_loss(x, y), pair.critic, second, scale=3, step=done)
    module = Gan(make)
    quiet(tmp_path, max_epochs=EPOCHS, accumulate_grad_batches=3).fit(module, batches())
    assert_same(dict(module.pair.state_dict()), dict(pair.state_dict()))


@both
def test_two_optimizers_with_frequencies_run_on_over_epochs(tmp_path, make):
    pair = Pair()
    first, second = make(pair.generator.parameters()), make(pair.critic.parameters())
    turns = []
    for epoch in range(EPOCHS):
        for index, (x, y) in enumerate(batches()):
            if (epoch * 7 + index) % 4 < 3:
                step_alone(pair.generator_loss(x), pair.generator, first)
                turns.append(0)
            else:
                step_alone(pair.critic_loss(x, y), pair.critic, second)
                turns.append(1)
    module = Gan(make, frequencies=(3, 1))
    quiet(tmp_path, max_epochs=EPOCHS).fit(module, batches())
    assert module.turns == turns and turns[:8] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert_same(dict(module.pair.state_dict()), dict(pair.state_dict()))


# -- truncated back-propagation through time -------------------------------------------------------------------------
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, hiddens: Any) -> tuple[Tensor, Any]:
        states, hiddens = self.lstm(x, hiddens)
        return self.head(states), hiddens


def sequences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(2, 7, 3, generator=generator), torch.randn(2, 7, 1, generator=generator)) for _ in range(4)]


@both
@pytest.mark.parametrize("by_trainer", [True, False])
def test_truncated_bptt(tmp_path, make, by_trainer):
    class Module(raylit.Module):
        def __init__(self):
            super().__init__()
            self.model = Recurrent()
            self.truncated_bptt_steps = 0 if by_trainer else 3

        def training_step(self, batch, batch_idx, hiddens):
            x, y = batch
            output, hiddens = self.model(x, hiddens)
            return {"loss": mse_loss(output, y), "hiddens": hiddens}

        def configure_optimizers(self):
            return make(self.parameters())

    model = Recurrent()
    optimizer = make(model.parameters())
    for _ in range(EPOCHS):
        for x, y in sequences():
            hiddens = None
            for start in (0, 3, 6):  # the last split is one step long
                output, hiddens = model(x[:, start : start + 3], hiddens)
                mse_loss(output, y[:, start : start + 3]).backward()
                optimizer.step()
                optimizer.zero_grad()
                hiddens = tuple(h.detach() for h in hiddens)
    module = Module()
    trainer = quiet(tmp_path, max_epochs=EPOCHS, **({"truncated_bptt_steps": 3} if by_trainer else {}))
    trainer.fit(module, sequences())
    assert_same(dict(module.model.state_dict()), dict(model.state_dict()))
    assert_same(trainer.optimizers[0].state_dict(), optimizer.state_dict())
    assert trainer.global_step == EPOCHS * 4  # rounds: one a batch


# -- LBFGS -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lbfgs(tmp_path, search, clip, accumulate):
    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=5, line_search_fn=search)

    model = network()
    optimizer = make(model.parameters())
    passes = 0
    for _ in range(EPOCHS):
        data = batches()
        for start in range(0, len(data), accumulate):
            group = data[start : start + accumulate]

            def closure(group=group):
                nonlocal passes
                passes += len(group)
                optimizer.zero_grad()
                total = None
                for x, y in group:
                    loss = mse_loss(model(x), y)
                    if accumulate > 1:
                        loss = loss / accumulate
                    loss.backward()
                    total = loss.detach() if total is None else total + loss.detach()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                return total

            optimizer.step(closure)

    class Counted(Net):
        passes = 0

        def training_step(self, batch, batch_idx):
            self.passes += 1
            return super().training_step(batch, batch_idx)

    module = Counted(make)
    trainer = quiet(tmp_path, max_epochs=EPOCHS, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    trainer.fit(module, batches())
    assert_same(module.net.state_dict(), dict(model.state_dict()))
    assert module.passes == passes
    assert trainer.global_step == EPOCHS * -(-7 // accumulate)


# -- manual optimisation ---------------------------------------------------------------------------------------------
class ManualLightning2(Net):
    """The style of Lightning 2: the Module does it all through ``self.optimizers()``."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ManualLightning1(Net):
    """The style of Lightning 1.0: ``manual_backward(loss, optimizer)`` and ``manual_optimizer_step``."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss, optimizer)
        self.manual_optimizer_step(optimizer)
        return loss


@both
@loaders
@pytest.mark.parametrize("style", [ManualLightning1, ManualLightning2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_manual(tmp_path, make, loader, style, clip):
    clipping = None if clip is None else lambda p: nn.utils.clip_grad_norm_(p, clip)
    trainer = check(tmp_path, style(make), loader(), by_hand(loader(), make, clip=clipping), gradient_clip_val=clip)
    assert trainer.global_step == 7 * EPOCHS


@both
def test_manual_accumulated(tmp_path, make):
    class Module(ManualLightning1):
        def training_step(self, batch, batch_idx):
            loss = Net.training_step(self, batch, batch_idx) / 3  # nobody divides it for you here
            self.manual_backward(loss, self.optimizers())
            self.manual_optimizer_step(self.optimizers())

    trainer = check(
        tmp_path, Module(make), batches(), by_hand(batches(), make, accumulate=3), accumulate_grad_batches=3
    )
    assert trainer.global_step == 3 * EPOCHS


@both
def test_manual_with_a_scheduler_stepped_by_hand(tmp_path, make):
    def configure(parameters):
        optimizer = make(parameters)
        return [optimizer], [StepLR(optimizer, step_size=2, gamma=0.5)]

    class Module(ManualLightning2):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, 0.1)

    expected = by_hand(
        batches(), make, clip=clip, step_scheduler=lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5)
    )
    trainer = check(tmp_path, Module(configure), batches(), expected, gradient_clip_val=0.1)
    assert trainer.global_step == 7 * EPOCHS  # the scheduler wraps optimizer.step; the count must not be lost


@both
def test_manual_gan_with_toggling(tmp_path, make):
    class Module(Gan):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            assert not any(p.requires_grad for p in self.pair.critic.parameters())
            self.manual_backward(self.pair.generator_loss(x))
            first.step()
            first.zero_grad()
            self.untoggle_optimizer(first)
            with self.toggled_optimizer(second):
                assert not any(p.requires_grad for p in self.pair.generator.parameters())
                self.manual_backward(self.pair.critic_loss(x, y))
                second.step()
                second.zero_grad()

    pair = Pair()
    first, second = make(pair.generator.parameters()), make(pair.critic.parameters())
    for _ in range(EPOCHS):
        for x, y in batches():
            step_alone(pair.generator_loss(x), pair.generator, first)
            step_alone(pair.critic_loss(x, y), pair.critic, second)
    module = Module(make)
    trainer = quiet(tmp_path, max_epochs=EPOCHS)
    trainer.fit(module, batches())
    assert_same(dict(module.pair.state_dict()), dict(pair.state_dict()))
    assert trainer.global_step == 7 * EPOCHS  # a round, however many optimizers
    assert all(p.requires_grad for p in module.parameters())
