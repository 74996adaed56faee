"""Manual optimisation: the Module calls backward and steps itself, in the style of Lightning 1.0 or of 2.x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import StepLR

import raylit
from raylit.errors import HookError, NotAttachedError
from tests.unit.engine.small import Net, Numbers, adamw, assert_same, batches, network, numbers, quiet, sgd

both = pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])


class Manual(Numbers):
    """One weight, its gradient the batch; ``act`` says what the batch does."""

    automatic_optimization = False

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.act = act
        self.notes: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.weight * batch.sum())
        optimizer = self.optimizers()
        if self.act == "1.0":
            self.manual_optimizer_step(optimizer)
        else:
            optimizer.step()
            optimizer.zero_grad()


styles = pytest.mark.parametrize("style", ["1.0", "2.x"])


# -- numbers ---------------------------------------------------------------------------------------------------------
def by_hand(make, accumulate=1, clip=None):
    model = network()
    optimizer = make(model.parameters())
    data = batches()
    for _ in range(2):
        for index, (x, y) in enumerate(data):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mse_loss(model(x), y)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(data):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


@both
@styles
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)])
def test_bf16_mixed_accumulated_and_clipped(tmp_path, make, style, accumulate, clip):
    class Module(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) / accumulate
            optimizer = self.optimizers()
            if style == "1.0":
                self.manual_backward(loss, optimizer)
                self.manual_optimizer_step(optimizer)
                return
            self.manual_backward(loss)
            if (batch_idx + 1) % accumulate == 0 or batch_idx + 1 == self.trainer.num_training_batches:
                self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    # In the style of 2.x the Module clips and counts batches itself.
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip} if style == "1.0" else {}
    module = Module(make)
    trainer = quiet(tmp_path, max_epochs=2, precision="bf16-mixed", **arguments)
    trainer.fit(module, batches())
    assert_same(module.net.state_dict(), dict(by_hand(make, accumulate, clip).state_dict()))
    assert trainer.global_step == 2 * -(-7 // accumulate)


@pytest.mark.parametrize("by_trainer", [True, False])
def test_truncated_bptt(tmp_path, by_trainer):
    class Module(Manual):
        truncated_bptt_steps = 0 if by_trainer else 2

        def training_step(self, batch, batch_idx, hiddens):
            self.notes.append((batch.tolist(), hiddens))
            super().training_step(batch, batch_idx)
            return {"hiddens": [batch_idx, batch.shape[1]]}

    module = Module()
    trainer = quiet(tmp_path, **({"truncated_bptt_steps": 2} if by_trainer else {}))
    trainer.fit(module, [torch.tensor([[1.0, 2, 4]]), torch.tensor([[8.0]])])
    assert module.notes == [([[1, 2]], None), ([[4]], [0, 2]), ([[8]], None)]
    assert module.weight.item() == -15.0 and trainer.global_step == 2


def test_lbfgs_with_a_closure(tmp_path):
    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    class Module(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = Net.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            self.manual_optimizer_step(optimizer, optimizer_closure=closure)

    automatic, manual = Net(make), Module(make)
    for module in (automatic, manual):
        quiet(tmp_path, gradient_clip_val=0.5).fit(module, batches())
    assert_same(manual.net.state_dict(), dict(automatic.net.state_dict()))


@styles
def test_what_the_module_returns_is_shown_and_kept(tmp_path, style):
    class Module(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", batch.sum(), on_epoch=True)
            return {"loss": self.weight * 0 + batch.sum(), "i": batch_idx}

        def training_epoch_end(self, outputs):
            self.notes = [(float(output["loss"]), output["i"]) for output in outputs]

    module = Module(style)
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 4))
    assert module.notes == [(1.0, 0), (4.0, 1)]
    assert float(trainer.callback_metrics["loss_epoch"]) == 2.5


# -- the Trainer's part ----------------------------------------------------------------------------------------------
@styles
def test_the_trainer_clips_before_each_step(tmp_path, style):
    module = Manual(style)
    quiet(tmp_path, gradient_clip_val=0.5).fit(module, numbers(1, 0.25, 4))
    assert module.weight.item() == pytest.approx(-(0.5 + 0.25 + 0.5), rel=1e-4)


def test_trainer_argument_sets_the_modules_attribute(tmp_path):
    class Module(Manual):
        automatic_optimization = True

    module = Module("1.0")
    quiet(tmp_path, automatic_optimization=False).fit(module, numbers(1, 2))
    assert module.automatic_optimization is False and module.weight.item() == -3.0


@styles
def test_own_clipping_and_zeroing_are_called(tmp_path, style):
    class Module(Manual):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.notes.append(("clip", gradient_clip_val, gradient_clip_algorithm, self.weight.grad.item()))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer, optimizer_idx):
            self.notes.append(("zero", epoch, batch_idx, optimizer_idx, self.weight.grad.item()))
            optimizer.zero_grad()

        def on_before_zero_grad(self, optimizer):
            self.notes.append("before zero")

    module = Module(style)
    quiet(tmp_path, gradient_clip_val=9.0).fit(module, numbers(3))
    # zero_grad of 2.x is the person's own call, past the hooks.
    zeroing = ["before zero", ("zero", 0, 0, 0, 0.5)] if style == "1.0" else []
    assert module.notes == [("clip", 9.0, "norm", 3.0), *zeroing] and module.weight.item() == -0.5


@pytest.mark.parametrize("how", ["closure", "bare", "super"])
def test_manual_optimizer_step_goes_through_an_own_optimizer_step(tmp_path, how):
    class Module(Manual):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu,
                           using_native_amp, using_lbfgs):  # fmt: skip
            self.notes.append((epoch, batch_idx, optimizer_idx, on_tpu, using_native_amp, using_lbfgs))
            optimizer.param_groups[0]["lr"] = (self.global_step + 1) / 2  # warm-up
            if how == "closure":
                optimizer.step(closure=optimizer_closure)
            elif how == "bare":
                optimizer_closure()
                optimizer.step()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu)

    module = Module("1.0")
    trainer = quiet(tmp_path, gradient_clip_val=1.0)
    trainer.fit(module, numbers(5, 5, 5))
    assert module.notes == [(0, index, 0, False, False, False) for index in range(3)]
    assert module.weight.item() == pytest.approx(-(0.5 + 1 + 1.5), rel=1e-4) and trainer.global_step == 3


def test_the_order_of_hooks(tmp_path):
    class Module(Manual):
        def on_before_backward(self, loss):
            self.notes.append(f"before backward {loss.item()}")

        def backward(self, loss, optimizer, optimizer_idx):
            self.notes.append(("backward", None if optimizer is None else type(optimizer).__name__, optimizer_idx))
            loss.backward()

        def on_after_backward(self):
            self.notes.append("after backward")

        def on_before_optimizer_step(self, optimizer, optimizer_idx):
            self.notes.append(("before step", optimizer_idx, self.weight.grad.item()))

        def on_before_zero_grad(self, optimizer):
            self.notes.append(f"before zero {self.weight.item()}")

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.weight + 1, self.optimizers())
            self.manual_backward(self.weight)
            self.manual_optimizer_step(self.optimizers())

    module = Module()
    quiet(tmp_path).fit(module, numbers(1))
    assert module.notes == [
        "before backward 1.0", ("backward", "SGD", 0), "after backward",
        "before backward 0.0", ("backward", None, None), "after backward",
        ("before step", 0, 2.0), "before zero -2.0",
    ]  # fmt: skip


def test_two_optimizers_of_which_one_steps_every_second_batch(tmp_path):
    class Module(raylit.Module):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward((self.one + self.two) * batch.sum())
            self.manual_optimizer_step(first)
            if batch_idx % 2:
                self.manual_optimizer_step(second)
                for scheduler in self.lr_schedulers():
                    scheduler.step()

        def configure_optimizers(self):
            made = [torch.optim.SGD([weight], lr=1.0) for weight in (self.one, self.two)]
            return made, [StepLR(optimizer, 1, gamma=0.5) for optimizer in made]

    module = Module()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 2, 4, 8))
    # The second one's gradients add up over two batches; both rates are halved after them.
    assert module.one.item() == -(1 + 2 + 2 + 4) and module.two.item() == -(3 + 6)
    assert trainer.global_step == 4
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.25, 0.25]  # stepped by hand alone


def test_toggling_gives_back_what_the_person_had_set(tmp_path):
    class Module(raylit.Module):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.one, self.two, self.none = (nn.Parameter(torch.zeros(())) for _ in range(3))
            self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)
            self.notes = []

        def on(self):
            return "".join(str(int(p.requires_grad)) for p in (self.one, self.two, self.none, self.frozen))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second):
                self.toggle_optimizer(optimizer, optimizer_idx=0)
                self.notes.append(self.on())
                self.untoggle_optimizer(optimizer)
                self.notes.append(self.on())
            self.toggle_optimizer(second)  # left so at the end of the run

        def configure_optimizers(self):
            return torch.optim.SGD([self.one, self.frozen], lr=1.0), torch.optim.SGD([self.two], lr=1.0)

    module = Module()
    quiet(tmp_path).fit(module, numbers(1))
    assert module.notes == ["1000", "1110", "0100", "1110"]
    assert module.on() == "1110"


# -- errors ----------------------------------------------------------------------------------------------------------
def test_an_optimizer_that_is_not_of_this_run(tmp_path):
    class Module(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_optimizer_step(torch.optim.SGD(self.parameters(), lr=1.0))

    with pytest.raises(HookError, match="not one that configure_optimizers returned"):
        quiet(tmp_path).fit(Module(), numbers(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.optimizers(),
        lambda m: m.lr_schedulers(),
        lambda m: m.manual_backward(m.weight),
        lambda m: m.manual_optimizer_step(None),
        lambda m: m.toggle_optimizer(None),
        lambda m: m.untoggle_optimizer(None),
        lambda m: m.clip_gradients(None, 1.0),
    ],
)
def test_outside_a_run(call):
    with pytest.raises(NotAttachedError, match="needs a run: it works in hooks, while a Trainer runs this Module"):
        call(Manual())


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_clip_gradients_by_hand(tmp_path, algorithm):
    class Module(Manual):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.manual_backward(3 * self.weight + 4 * self.other)
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, 1.0, algorithm)
            optimizer.step()

    module = Module()
    quiet(tmp_path).fit(module, numbers(1))
    expected = (-1.0, -1.0) if algorithm == "value" else (-0.6, -0.8)
    assert (module.weight.item(), module.other.item()) == pytest.approx(expected, rel=1e-4)
