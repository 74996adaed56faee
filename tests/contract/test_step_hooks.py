"""The hooks of one optimizer step, as Modules of Lightning 1.0 and of 2.x override them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import raylit
from raylit.errors import HookError
from tests.unit.engine.small import Net, Numbers, assert_same, batches, network, numbers, quiet, sgd


# -- backward --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("era", ["1.0", "2.x", "super", "kwargs"])
def test_backward_that_retains_the_graph(tmp_path, era):
    class Module(Numbers):
        if era == "1.0":

            def backward(self, loss, optimizer, optimizer_idx, *args, **kwargs):
                assert isinstance(optimizer, torch.optim.SGD) and optimizer_idx == 0
                loss.backward(*args, retain_graph=True, **kwargs)

        elif era == "2.x":

            def backward(self, loss):
                loss.backward(retain_graph=True)

        elif era == "super":

            def backward(self, loss, optimizer, optimizer_idx):
                super().backward(loss, optimizer, optimizer_idx, retain_graph=True)

        else:

            def backward(self, loss, **kwargs):
                super().backward(loss, **{**kwargs, "retain_graph": True})

        def on_before_backward(self, loss):
            self.kept = loss

        def on_after_backward(self):
            self.kept.backward()  # a second time through the graph

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert module.weight.item() == -2 * (1 + 2)


def test_backward_is_given_each_optimizer_in_turn(tmp_path):
    class Module(Pair):
        def backward(self, loss, optimizer, optimizer_idx):
            self.notes.append((optimizer is self.optimizers()[optimizer_idx], optimizer_idx))
            loss.backward()

    module = Module()
    quiet(tmp_path).fit(module, numbers(1))
    assert module.notes == [(True, 0), (True, 1)] and module.weights == (-1.0, -1.0)


class Pair(raylit.Module):
    """Two weights and two optimizers; the gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.notes: list[Any] = []

    @property
    def weights(self) -> tuple[float, float]:
        return self.one.item(), self.two.item()

    def training_step(self, batch, batch_idx, optimizer_idx):
        return (self.one + self.two) * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.one], lr=1.0), torch.optim.SGD([self.two], lr=1.0)


# -- optimizer_step --------------------------------------------------------------------------------------------------
def test_a_generator_every_second_and_a_critic_every_fourth_batch(tmp_path):
    """The alternating schedule of Lightning 1.0's manual: other batches' gradients are dropped."""

    class Module(Pair):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu,
                           using_native_amp, using_lbfgs):  # fmt: skip
            every = (2, 4)[optimizer_idx]
            if (batch_idx + 1) % every == 0:
                optimizer.step(closure=optimizer_closure)

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2, 4, 8, 16))
    assert module.weights == (-(2 + 8), -8.0)


def test_one_optimizer_only_calls_its_closure_and_the_other_steps(tmp_path):
    """The way of 2.x: a batch without a step still calls the closure."""

    class Module(Pair):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure):
            if optimizer_idx == 1 or batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                self.notes.append(float(optimizer_closure()))

        def training_step(self, batch, batch_idx, optimizer_idx):
            self.passes = getattr(self, "passes", 0) + 1
            return super().training_step(batch, batch_idx, optimizer_idx) + 5

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2, 4))
    assert module.weights == (-2.0, -7.0)
    # Losses of the first optimizer's passes at batches 0 and 2; the closure computes nothing anew.
    assert module.notes == [5.0, 5 + 4 * (-2 - 3)] and module.passes == 6


def test_warm_up_of_both_eras_by_global_step(tmp_path):
    def fit(kind):
        module = kind(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        quiet(tmp_path, max_epochs=2).fit(module, batches())
        return module

    class OfOne(Net):
        def optimizer_step(self, current_epoch=0, batch_nb=0, optimizer=None, optimizer_idx=0, optimizer_closure=None,
                           on_tpu=False, using_native_amp=False, using_lbfgs=False):  # fmt: skip
            if self.trainer.global_step < 10:
                for group in optimizer.param_groups:
                    group["lr"] = min(1.0, (self.trainer.global_step + 1) / 10) * 0.1
            optimizer.step()
            optimizer.zero_grad()

    class OfTwo(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            if self.trainer.global_step < 10:
                for group in optimizer.param_groups:
                    group["lr"] = min(1.0, (self.trainer.global_step + 2) / 10) * 0.1

        def on_train_start(self):
            self.optimizers().param_groups[0]["lr"] = 0.01

    model = network()
    optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1), 0
    for _ in range(2):
        for x, y in batches():
            optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / 10) * 0.1
            mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for kind in (OfOne, OfTwo):
        assert_same(fit(kind).net.state_dict(), dict(model.state_dict()))


def test_sam_with_accumulation_clipping_and_bf16(tmp_path):
    """Two passes through the closure; each stands for the whole group and is clipped."""

    def climb(weights):
        with torch.no_grad():
            norm = torch.stack([w.grad.norm() for w in weights]).norm()
            steps = [w.grad * (0.05 / norm) for w in weights]
            for weight, step in zip(weights, steps):
                weight += step
        return steps

    def descend(weights, steps):
        with torch.no_grad():
            for weight, step in zip(weights, steps):
                weight -= step

    class Sam(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, **kwargs):
            weights = list(self.net.parameters())
            optimizer_closure()
            steps = climb(weights)
            optimizer_closure()
            descend(weights, steps)
            optimizer.step()

    model = network()
    optimizer, weights, data = sgd(model.parameters()), list(model.parameters()), batches()

    def gradients(group):
        optimizer.zero_grad()
        for x, y in group:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mse_loss(model(x), y)
            (loss / 3).backward()
        nn.utils.clip_grad_norm_(weights, 0.1)

    for start in (0, 3, 6):
        group = data[start : start + 3]
        gradients(group)
        steps = climb(weights)
        gradients(group)
        descend(weights, steps)
        optimizer.step()
    module = Sam(sgd)
    quiet(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1, precision="bf16-mixed").fit(module, data)
    assert_same(module.net.state_dict(), dict(model.state_dict()))


def test_what_an_override_is_told_of_lbfgs_and_mixed_precision(tmp_path):
    class Module(Net):
        def optimizer_step(self, optimizer, optimizer_closure, using_lbfgs, using_native_amp, on_tpu):
            self.told = (using_lbfgs, using_native_amp, on_tpu)
            optimizer.step(optimizer_closure)

    module = Module(lambda parameters: torch.optim.LBFGS(parameters, max_iter=2))
    quiet(tmp_path).fit(module, batches(1))
    assert module.told == (True, False, False)


def test_an_override_that_steps_other_optimizers_of_its_own(tmp_path):
    """A gradient that nobody zeroed in between is the one that was computed, whoever uses it."""

    class Module(Numbers):
        def optimizer_step(self, optimizer):
            with torch.no_grad():
                self.weight -= 0.5 * self.weight.grad  # by hand; optimizer.step is never called

    module = Module()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(2, 4))
    assert module.weight.item() == -3.0 and trainer.global_step == 2


def test_an_override_that_asks_for_what_it_is_never_given(tmp_path):
    class Module(Numbers):
        def optimizer_step(self, epoch, batch_idx, optimizer, second_order_closure):
            raise AssertionError

    with pytest.raises(HookError, match="optimizer_step asks for 'second_order_closure'.*optimizer_closure"):
        quiet(tmp_path).fit(Module(), numbers(1))


# -- zeroing and clipping --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("era", ["1.0", "2.x"])
def test_own_zeroing_keeps_or_drops_the_gradients(tmp_path, era):
    class Module(Numbers):
        if era == "1.0":

            def optimizer_zero_grad(self, epoch, batch_idx, optimizer, optimizer_idx):
                assert (epoch, optimizer_idx) == (0, 0)
                if batch_idx % 2:
                    optimizer.zero_grad(set_to_none=False)

        else:

            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                if batch_idx % 2:
                    optimizer.zero_grad(set_to_none=False)

        def on_train_batch_end(self):
            self.left = [*getattr(self, "left", []), float(self.weight.grad)]

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2, 4))
    assert module.left == [1.0, 0.0, 4.0]
    assert module.weight.item() == -(1 + 3 + 4)  # the second step has the first batch's gradient in it


def test_own_clipping_for_one_of_two_optimizers(tmp_path):
    class Module(Pair):
        def configure_gradient_clipping(self, optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm):
            self.notes.append((optimizer_idx, gradient_clip_val, gradient_clip_algorithm))
            if optimizer_idx == 1:
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    module = Module()
    quiet(tmp_path, gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(module, numbers(3))
    assert module.weights == (-3.0, -0.5) and module.notes == [(0, 0.5, "value"), (1, 0.5, "value")]


def test_own_clipping_without_the_trainers_argument(tmp_path):
    class Module(Numbers):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            assert gradient_clip_val is None
            self.clip_gradients(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="norm")

    module = Module()
    quiet(tmp_path).fit(module, numbers(3))
    assert module.weight.item() == pytest.approx(-0.25, rel=1e-4)


def test_clipping_sees_the_gradients_of_the_whole_group(tmp_path):
    module = Numbers()
    quiet(tmp_path, accumulate_grad_batches=2, gradient_clip_val=3.0, gradient_clip_algorithm="value").fit(
        module, numbers(4, 4, 10)
    )
    assert module.weight.item() == -(3 + 3)  # (4 + 4) / 2 and 10 / 2, each clipped once


def test_hooks_around_a_step_see_the_gradients_as_they_are_then(tmp_path):
    class Module(Numbers):
        notes: list[Any] = []

        def on_after_backward(self):
            self.notes = [*self.notes, ("after backward", float(self.weight.grad))]

        def on_before_optimizer_step(self, optimizer, optimizer_idx):
            self.notes = [*self.notes, ("before step", optimizer_idx, float(self.weight.grad))]

        def optimizer_step(self, optimizer):
            self.notes = [*self.notes, ("step", float(self.weight.grad))]
            optimizer.step()

        def on_before_zero_grad(self, optimizer):
            self.notes = [*self.notes, ("before zero", float(self.weight.grad))]

    module = Module()
    quiet(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(module, numbers(3))
    assert module.notes == [("after backward", 3.0), ("before step", 0, 3.0), ("step", 1.0), ("before zero", 1.0)]
