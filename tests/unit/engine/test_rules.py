"""The rules of optimisation (contract, section 5): toggling, closures, outputs, counting steps, skipping, anomalies."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import raylit
from raylit.errors import HookError, OptimizerError
from tests.unit.engine.small import Net, Numbers, adamw, assert_same, batches, network, numbers, quiet, sgd


# -- 5.2 several optimizers ------------------------------------------------------------------------------------------
class Three(raylit.Module):
    """Three weights: two with an optimizer each, one in none; one weight of the first is frozen by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.rest = (nn.Parameter(torch.ones(())) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)
        self.seen: list[tuple[int, str]] = []

    def on_state(self) -> str:
        return "".join(str(int(p.requires_grad)) for p in (self.one, self.two, self.rest, self.frozen))

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.seen.append((optimizer_idx, self.on_state()))
        return (self.one + self.two + self.rest + self.frozen) * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.one, self.frozen], lr=0.1), torch.optim.SGD([self.two], lr=0.1)


def test_only_the_running_optimizers_parameters_require_gradients(tmp_path):
    module = Three()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert module.seen == [(0, "1000"), (1, "0100")] * 2
    assert module.on_state() == "1110"
    assert module.rest.grad is None


def test_requires_grad_is_restored_when_a_step_fails(tmp_path):
    class Failing(Three):
        def training_step(self, batch, batch_idx, optimizer_idx):
            if optimizer_idx == 1:
                raise ValueError("here")
            return super().training_step(batch, batch_idx, optimizer_idx)

    module = Failing()
    with pytest.raises(ValueError, match="here"):
        quiet(tmp_path).fit(module, numbers(1))
    assert module.on_state() == "1110"


def test_one_optimizer_is_not_toggled(tmp_path):
    class One(Three):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx, 0)

        def configure_optimizers(self):
            return torch.optim.SGD([self.one], lr=0.1)

    module = One()
    quiet(tmp_path).fit(module, numbers(1))
    assert module.seen == [(0, "1110")]


def test_a_group_added_between_epochs_trains(tmp_path):
    class Thawing(Three):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers()[0].add_param_group({"params": [self.rest]})

    module = Thawing()
    quiet(tmp_path, max_epochs=2).fit(module, numbers(1))
    assert module.seen == [(0, "1000"), (1, "0100"), (0, "1010"), (1, "0100")]
    assert module.rest.item() == pytest.approx(0.9)


def test_several_optimizers_without_optimizer_idx_are_refused(tmp_path):
    class Module(Three):
        def training_step(self, batch, batch_idx):
            return self.one.sum()

    with pytest.raises(OptimizerError, match=r"2 optimizers.*optimizer_idx.*manual optimisation"):
        quiet(tmp_path).fit(Module(), numbers(1))


def test_frequencies_under_manual_optimisation_are_the_persons_business(tmp_path):
    class Module(Three):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.manual_backward(self.one + self.two)
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [{"optimizer": o, "frequency": n} for o, n in zip(super().configure_optimizers(), (1, 2))]

        def training_epoch_end(self, outputs):
            pass

    trainer = quiet(tmp_path)
    trainer.fit(Module(), numbers(1, 1, 1, 1))
    assert trainer.global_step == 4


# -- 5.3 the closure -------------------------------------------------------------------------------------------------
class Watched(Numbers):
    """Notes passes and what optimizer_step sees; loss = weight * batch."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[int, float]] = []  # (batch_idx, gradient before the pass)
        self.notes: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.passes.append((batch_idx, 0.0 if self.weight.grad is None else float(self.weight.grad)))
        return (self.weight + 1) * batch.sum()


def test_the_pass_is_done_before_optimizer_step_and_exactly_once(tmp_path):
    class Module(Watched):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu,
                           using_native_amp, using_lbfgs):  # fmt: skip
            self.notes.append(
                (epoch, batch_idx, optimizer_idx, float(self.weight.grad), on_tpu, using_native_amp, using_lbfgs)
            )
            optimizer.step()  # never calls the closure

    module = Module()
    quiet(tmp_path, max_epochs=2).fit(module, numbers(1, 2))
    assert module.notes == [(e, b, 0, b + 1.0, False, False, False) for e in (0, 1) for b in (0, 1)]
    assert module.passes == [(0, 0.0), (1, 0.0)] * 2
    assert module.weight.item() == -6.0


@pytest.mark.parametrize("style", ["step(closure)", "super-1.0", "super-2", "closure-first", "super-kwargs"])
def test_the_first_call_of_the_closure_returns_the_passes_loss_and_computes_nothing(tmp_path, style):
    class Module(Watched):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, **kwargs):
            if style == "step(closure)":
                optimizer.step(optimizer_closure)
            elif style == "super-1.0":
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, **kwargs)
            elif style == "super-2":
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            elif style == "super-kwargs":
                super().optimizer_step(
                    epoch=epoch, batch_idx=batch_idx, optimizer=optimizer, optimizer_closure=optimizer_closure
                )
            else:
                self.notes.append(float(optimizer_closure()))
                optimizer.step()

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert module.passes == [(0, 0.0), (1, 0.0)]
    assert module.weight.item() == -3.0
    if style == "closure-first":
        assert module.notes == [1.0, 0.0]  # (0 + 1) * 1, (-1 + 1) * 2


def test_later_calls_compute_the_pass_anew_from_zeroed_gradients(tmp_path):
    class Module(Watched):
        def optimizer_step(self, optimizer, optimizer_closure):
            self.notes.append(float(optimizer_closure()))
            with torch.no_grad():
                self.weight += 1
            self.notes.append(float(optimizer_closure()))
            self.notes.append(float(self.weight.grad))
            optimizer.step()

    module = Module()
    quiet(tmp_path).fit(module, numbers(3))
    assert module.notes == [3.0, 6.0, 3.0]
    assert module.passes == [(0, 0.0), (0, 0.0)]  # the gradient was zeroed before the second
    assert module.weight.item() == 1 - 3


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_zeroed_before_the_first_call_are_computed_anew(tmp_path, to_none):
    class Module(Watched):
        def optimizer_step(self, optimizer, optimizer_closure):
            optimizer.zero_grad(set_to_none=to_none)
            self.notes.append(float(optimizer_closure()))
            optimizer.step()

    module = Module()
    quiet(tmp_path).fit(module, numbers(2))
    assert module.notes == [2.0] and len(module.passes) == 2 and module.weight.item() == -2.0


def test_sam(tmp_path):
    class Sam(Net):
        def optimizer_step(self, optimizer, optimizer_closure):
            weights = list(self.net.parameters())
            optimizer_closure()
            with torch.no_grad():
                norm = torch.stack([w.grad.norm() for w in weights]).norm()
                steps = [w.grad * (0.05 / norm) for w in weights]
                for weight, step in zip(weights, steps):
                    weight += step
            optimizer_closure()
            with torch.no_grad():
                for weight, step in zip(weights, steps):
                    weight -= step
            optimizer.step()

    model = network()
    optimizer = sgd(model.parameters())
    weights = list(model.parameters())
    for _ in range(2):
        for x, y in batches():
            mse_loss(model(x), y).backward()
            with torch.no_grad():
                norm = torch.stack([w.grad.norm() for w in weights]).norm()
                steps = [w.grad * (0.05 / norm) for w in weights]
                for weight, step in zip(weights, steps):
                    weight += step
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            with torch.no_grad():
                for weight, step in zip(weights, steps):
                    weight -= step
            optimizer.step()
            optimizer.zero_grad()
    module = Sam(sgd)
    quiet(tmp_path, max_epochs=2).fit(module, batches())
    assert_same(module.net.state_dict(), dict(model.state_dict()))


def test_an_optimizer_that_calls_its_closure_without_gradients_on(tmp_path):
    class TwoPasses(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure):
            closure()
            closure()
            super().step()

    class Module(Watched):
        def configure_optimizers(self):
            return TwoPasses(self.parameters(), lr=1.0)

    module = Module()
    quiet(tmp_path).fit(module, numbers(2))
    assert module.passes == [(0, 0.0), (0, 0.0)] and module.weight.item() == -2.0


def test_warm_up(tmp_path):
    class Module(Numbers):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.global_step + 1) / 4)
            optimizer.step(closure=optimizer_closure)

    module = Module()
    quiet(tmp_path).fit(module, numbers(4, 4, 4, 4, 4))
    assert module.weight.item() == -(1 + 2 + 3 + 4 + 4)


def test_every_second_step(tmp_path):
    class Module(Numbers):
        def optimizer_step(self, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 1:
                optimizer.step(closure=optimizer_closure)

    module = Module()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 2, 4, 8))
    assert module.weight.item() == -(2 + 8)  # the gradients of a batch without a step are dropped
    assert trainer.global_step == 4


def test_the_closure_over_an_accumulated_group(tmp_path):
    class Module(Watched):
        def optimizer_step(self, optimizer, optimizer_closure):
            self.notes.append((float(self.weight.grad), float(optimizer_closure())))
            self.notes.append((float(optimizer_closure()), float(self.weight.grad)))
            optimizer.step()

    module = Module()
    quiet(tmp_path, accumulate_grad_batches=2).fit(module, numbers(1, 3, 8))
    # groups (1, 3) and the short (8): both divided by 2
    assert module.notes == [(2.0, 2.0), (2.0, 2.0), (4.0, -4.0), (-4.0, 4.0)]
    assert [index for index, _ in module.passes] == [0, 1, 0, 1, 2, 2]
    assert module.weight.item() == -6.0


def test_passes_computed_anew_are_not_logged_again(tmp_path):
    class Module(Net):
        losses: list[float]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            if not self.losses or self.losses[-1][0] != (self.current_epoch, batch_idx):
                self.losses.append(((self.current_epoch, batch_idx), loss.item(), len(batch[0])))
            return loss

    module = Module(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))
    module.losses = []
    trainer = quiet(tmp_path)
    trainer.fit(module, batches())
    weighted = sum(loss * size for _, loss, size in module.losses) / sum(size for *_, size in module.losses)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(weighted, rel=1e-6)


# -- 5.3 accumulation ------------------------------------------------------------------------------------------------
def test_accumulation_schedule_and_short_groups_by_hand(tmp_path):
    class Module(Numbers):
        def __init__(self):
            super().__init__()
            self.after: list[float] = []

        def on_train_batch_end(self):
            self.after.append(self.weight.item())

    module = Module()
    trainer = quiet(tmp_path, max_epochs=2, accumulate_grad_batches={0: 2, 1: 4})
    trainer.fit(module, numbers(4, 8, 16))
    # epoch 0: (4+8)/2 = 6, then 16/2 = 8; epoch 1: (4+8+16)/4 = 7 on the short group
    assert module.after == [0, -6, -14, -14, -14, -21]
    assert trainer.global_step == 3


def test_gradients_are_zeroed_and_global_step_counted_before_on_train_batch_end(tmp_path):
    class Module(Numbers):
        def on_train_batch_end(self):
            self.notes = [*getattr(self, "notes", []), (self.weight.grad, self.global_step)]

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert module.notes == [(None, 1), (None, 2)]


def test_short_group_of_a_stream_of_unknown_length(tmp_path):
    class Stream:
        def __iter__(self):
            return iter(numbers(4, 8, 16))

    module = Numbers()
    trainer = quiet(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, Stream())
    assert module.weight.item() == -2 * (6 + 8)
    assert trainer.global_step == 4 and trainer.num_training_batches == float("inf")


def test_a_stream_under_a_limit(tmp_path):
    class Stream:
        def __init__(self):
            self.taken = 0

        def __iter__(self):
            for value in numbers(4, 8, 16, 32, 64):
                self.taken += 1
                yield value

    module, stream = Numbers(), Stream()
    quiet(tmp_path, accumulate_grad_batches=2, limit_train_batches=3).fit(module, stream)
    assert module.weight.item() == -(6 + 8)
    assert stream.taken == 3


# -- 5.4 outputs -----------------------------------------------------------------------------------------------------
class Collecting(Numbers):
    """Returns what it was told to; keeps what the epoch-end hook was given."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.given, self.batch_ends = make, None, []

    def training_step(self, batch, batch_idx):
        return self.make(self.weight * batch.sum(), batch_idx)

    def training_epoch_end(self, outputs):
        self.given = outputs

    def on_train_batch_end(self, outputs):
        self.batch_ends.append(outputs)


def test_a_tensor_arrives_as_loss_detached_and_undivided(tmp_path):
    module = Collecting(lambda loss, i: loss + 5)
    quiet(tmp_path, accumulate_grad_batches=2).fit(module, numbers(1, 2))
    assert [list(o) for o in module.given] == [["loss"], ["loss"]]
    assert [float(o["loss"]) for o in module.given] == [5.0, 5.0]
    assert not any(o["loss"].requires_grad for o in module.given)
    assert_same(module.batch_ends, module.given)


def test_a_dict_keeps_its_keys_detached_and_drops_hiddens(tmp_path):
    def make(loss, i):
        return {"loss": loss, "i": i, "hiddens": loss * 2, "nested": {"two": [loss * 2, "text"]}}

    module = Collecting(make)
    quiet(tmp_path).fit(module, numbers(3))
    (output,) = module.given
    assert set(output) == {"loss", "i", "nested"} and output["i"] == 0
    assert not output["loss"].requires_grad and not output["nested"]["two"][0].requires_grad


def test_skipped_batches_leave_nothing(tmp_path):
    module = Collecting(lambda loss, i: None if i == 1 else loss)
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1, 2, 4))
    assert len(module.given) == 2 and module.batch_ends[1] is None
    assert module.weight.item() == -5.0 and trainer.global_step == 2


def test_several_optimizers_give_a_list_each(tmp_path):
    class Module(Three):
        def training_step(self, batch, batch_idx, optimizer_idx):
            loss = super().training_step(batch, batch_idx, optimizer_idx)
            return {"loss": loss, "who": (optimizer_idx, batch_idx)}

        def training_epoch_end(self, outputs):
            self.given = outputs

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert [[o["who"] for o in own] for own in module.given] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]


def test_frequencies_give_each_optimizer_its_own_batches(tmp_path):
    class Module(Three):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return {"loss": super().training_step(batch, batch_idx, optimizer_idx), "i": batch_idx}

        def training_epoch_end(self, outputs):
            self.given = outputs

        def configure_optimizers(self):
            return [{"optimizer": o, "frequency": n} for o, n in zip(super().configure_optimizers(), (2, 1))]

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 1, 1, 1))
    assert [[o["i"] for o in own] for own in module.given] == [[0, 1, 3], [2]]


class Splitting(Numbers):
    """Truncated BPTT over batches of shape (1, time)."""

    truncated_bptt_steps = 2

    def training_step(self, batch, batch_idx, hiddens):
        seen = [] if hiddens is None else hiddens["seen"]
        return {"loss": self.weight * batch.sum(), "part": batch.tolist(), "hiddens": {"seen": [*seen, batch.shape[1]]}}

    def training_epoch_end(self, outputs):
        self.given = outputs


def test_truncated_bptt_gives_the_list_of_the_splits(tmp_path):
    module = Splitting()
    quiet(tmp_path).fit(module, [torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[6.0, 7]])])
    assert [[o["part"] for o in batch] for batch in module.given] == [[[[1, 2]], [[3, 4]], [[5]]], [[[6, 7]]]]
    assert all("hiddens" not in o for batch in module.given for o in batch)
    assert module.weight.item() == -28.0


def test_hiddens_reach_the_next_split_detached_and_not_the_next_batch(tmp_path):
    class Module(Numbers):
        truncated_bptt_steps = 1

        def training_step(self, batch, batch_idx, hiddens):
            self.seen = [*getattr(self, "seen", []), hiddens]
            state = self.weight * batch.sum()
            return {"loss": state, "hiddens": (state, batch_idx)}

    module = Module()
    quiet(tmp_path).fit(module, [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 4]])])
    first, second, third, fourth = module.seen
    assert first is None and third is None
    assert second[1] == 0 and fourth[1] == 1
    assert not second[0].requires_grad and not fourth[0].requires_grad


def test_own_split(tmp_path):
    class Module(Splitting):
        def tbptt_split_batch(self, batch, split_size):
            self.split_size = split_size
            return [batch[:, :1], batch[:, 1:]]

    module = Module()
    quiet(tmp_path, truncated_bptt_steps=7).fit(module, [torch.tensor([[1.0, 2, 3]])])
    assert module.split_size == 7  # the Trainer's goes before the Module's
    assert [o["part"] for o in module.given[0]] == [[[1]], [[2, 3]]]


@pytest.mark.parametrize("keep", [False, True])
def test_outputs_are_kept_only_where_someone_asks(tmp_path, keep):
    alive: list[weakref.ref[Any]] = []
    most = [0]

    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            gc.collect()
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            extra = torch.zeros(3)
            alive.append(weakref.ref(extra))
            return {"loss": self.weight * batch.sum(), "extra": Box(extra)}

    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    if keep:
        Module.training_epoch_end = lambda self, outputs: None
    quiet(tmp_path).fit(Module(), numbers(1, 2, 3, 4, 5, 6))
    assert most[0] == 5 if keep else most[0] <= 1
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_forward_only_lets_go_of_the_graph(tmp_path):
    alive: list[weakref.ref[Any]] = []

    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            assert not any(ref() is not None for ref in alive)  # two graphs would be twice the memory
            hidden = self.weight * batch
            alive.append(weakref.ref(hidden))
            return (hidden * hidden).sum()  # saved for backward

        def configure_optimizers(self):
            return None

    trainer = quiet(tmp_path)
    trainer.fit(Module(), numbers(1, 2, 3))
    assert len(alive) == 3 and trainer.global_step == 0


# -- 5.5 global_step -------------------------------------------------------------------------------------------------
def test_global_step_counts_rounds_of_several_optimizers(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Three(), numbers(1, 1, 1))
    assert trainer.global_step == 3 * 2 and trainer.current_epoch == 3


def test_global_step_in_manual_optimisation_counts_batches_with_a_step(tmp_path):
    class Module(Numbers):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(batch_idx):  # none, one, two steps
                self.manual_backward(self.weight * batch.sum())
                self.optimizers().step()
                self.optimizers().zero_grad()

    trainer = quiet(tmp_path, max_epochs=2)
    module = Module()
    trainer.fit(module, numbers(1, 1, 1))
    assert trainer.global_step == 2 * 2 and module.weight.item() == -6.0


def test_manual_optimizer_step_by_force(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.weight * batch.sum())
            self.manual_optimizer_step(self.optimizers(), force_optimizer_step=batch_idx == 0)

    module = Module()
    trainer = quiet(tmp_path, automatic_optimization=False, accumulate_grad_batches=3)
    trainer.fit(module, numbers(1, 2, 4, 8))
    # batch 0 by force, batch 2 ends the group of three, batch 3 ends the epoch
    assert module.weight.item() == -15.0 and trainer.global_step == 3
    assert module.automatic_optimization is False


def test_manual_backward_under_automatic_optimisation_is_refused(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.weight)

    with pytest.raises(HookError, match="automatic_optimization = False"):
        quiet(tmp_path).fit(Module(), numbers(1))


def test_manual_backward_reaches_the_overrides_arguments(tmp_path):
    class Module(Numbers):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.weight * batch.sum()
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            self.optimizers().step()

        def backward(self, loss, *args, **kwargs):
            self.seen = [*getattr(self, "seen", []), (args, kwargs)]
            loss.backward(*args, **kwargs)

    module = Module()
    quiet(tmp_path).fit(module, numbers(3))
    assert module.seen == [((), {"retain_graph": True}), ((), {})] and module.weight.item() == -6.0


def test_max_steps_stops_within_an_epoch(tmp_path):
    module = Numbers()
    trainer = quiet(tmp_path, max_steps=5)
    trainer.fit(module, numbers(1, 1, 1))
    assert trainer.global_step == 5 and module.weight.item() == -5.0 and trainer.max_epochs == -1


@pytest.mark.parametrize("nothing", ["no optimizer", "no loss"])
def test_max_steps_without_a_step_is_an_error_and_no_endless_run(tmp_path, nothing):
    module = Numbers()
    if nothing == "no optimizer":
        module.configure_optimizers = lambda: None
    else:
        module.training_step = lambda batch, batch_idx: None
    with pytest.raises(OptimizerError, match=r"no optimizer stepped in epoch 0, and max_steps=5.*give max_epochs"):
        quiet(tmp_path, max_epochs=None, max_steps=5).fit(module, numbers(1.0, 2.0))
    quiet(tmp_path, max_epochs=2, max_steps=5).fit(module, numbers(1.0, 2.0))  # ends by itself


def test_max_steps_counts_accumulated_groups(tmp_path):
    module = Numbers()
    trainer = quiet(tmp_path, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(module, numbers(2, 2, 2, 2, 2))
    assert trainer.global_step == 2 and module.weight.item() == -4.0 and trainer.current_epoch == 1


def test_max_epochs_minus_one_runs_until_someone_stops_it(tmp_path):
    class Module(Numbers):
        def on_train_epoch_end(self):
            self.trainer.should_stop = self.current_epoch == 4

    trainer = quiet(tmp_path, max_epochs=-1)
    trainer.fit(Module(), numbers(1))
    assert trainer.current_epoch == 5


# -- what training_step may return -----------------------------------------------------------------------------------
def fit_returning(tmp_path, make, **arguments):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            return make(self.weight * batch.sum())

    trainer = quiet(tmp_path, **arguments)
    module = Module()
    trainer.fit(module, numbers(1, 2))
    return trainer, module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: "loss", "training_step returned a str; accepted: the loss tensor, a dict with 'loss', or None"),
        (lambda loss: 1.0, "training_step returned a float"),
        (lambda loss: (loss,), "training_step returned a tuple"),
        (lambda loss: {"los": loss}, "dict without 'loss' .keys: 'los'."),
        (lambda loss: {"loss": 1.0}, "'loss' is a float; it must be a tensor"),
        (lambda loss: loss.detach(), "a loss without grad"),
        (lambda loss: {"loss": loss.detach()}, "a loss without grad"),
        (lambda loss: loss * torch.ones(2), r"a loss of shape \(2,\); it must be one number"),
    ],
)
def test_a_wrong_return_is_an_error_at_the_first_step(tmp_path, make, message):
    with pytest.raises(HookError, match=message) as caught:
        fit_returning(tmp_path, make)
    assert caught.value.raylit_where["batch_idx"] == 0


def test_a_loss_with_one_element_is_taken(tmp_path):
    _, module = fit_returning(tmp_path, lambda loss: loss.reshape(1))
    assert module.weight.item() == -3.0


@pytest.mark.parametrize("nothing", [None, {"loss": None}])
def test_a_loss_of_none_skips_the_batch(tmp_path, nothing):
    trainer, module = fit_returning(tmp_path, lambda loss: nothing)
    assert trainer.global_step == 0 and module.weight.item() == 0.0


def test_none_within_a_group_leaves_the_others_gradients(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 2, 3) else self.weight * batch.sum()

    module = Module()
    trainer = quiet(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, numbers(2, 4, 8, 16, 32))
    assert module.weight.item() == -(2 / 2 + 32 / 2)  # group 0 has one loss, group 1 none, group 2 is short
    assert trainer.global_step == 2


def test_training_step_end_produces_the_loss(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            return {"predicted": self.weight * batch.sum()}

        def training_step_end(self, step_output):
            return {"loss": 2 * step_output["predicted"]}

        def training_epoch_end(self, outputs):
            self.given = outputs

    module = Module()
    quiet(tmp_path).fit(module, numbers(1, 2))
    assert module.weight.item() == -6.0 and [set(o) for o in module.given] == [{"loss"}, {"loss"}]


def test_forward_only(tmp_path):
    class Module(Net):
        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            self.count = getattr(self, "count", 0) + 1
            return super().training_step(batch, batch_idx)

    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quiet(tmp_path, max_epochs=2).fit(module, batches())
    assert module.count == 14
    assert_same(dict(module.state_dict()), before)


# -- hooks of the step -----------------------------------------------------------------------------------------------
def test_own_backward_zero_grad_and_clipping(tmp_path):
    class Module(Numbers):
        notes: list[Any] = []

        def backward(self, loss, optimizer, optimizer_idx):
            self.notes.append(("backward", type(optimizer).__name__, optimizer_idx))
            super().backward(loss, optimizer, optimizer_idx)

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            self.notes.append(("clip", args, kwargs))
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

        def optimizer_zero_grad(self, *args, **kwargs):
            self.notes.append(("zero", args[:2], kwargs, float(self.weight.grad)))
            super().optimizer_zero_grad(*args, **kwargs)

    module = Module()
    quiet(tmp_path, gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(module, numbers(3))
    assert module.notes == [
        ("backward", "SGD", 0),
        ("clip", (), {"optimizer_idx": 0, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
        ("zero", (0, 0), {"optimizer_idx": 0}, 0.5),
    ]
    assert module.weight.item() == -0.5 and module.weight.grad is None


@pytest.mark.parametrize("style", ["1.x", "2.x", "names"])
def test_clipping_handed_to_super_in_every_style(tmp_path, style):
    class Module(Numbers):
        def configure_gradient_clipping(self, optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm):
            if style == "1.x":
                super().configure_gradient_clipping(
                    optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm
                )
            elif style == "2.x":
                super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            else:
                super().configure_gradient_clipping(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="value")

    module = Module()
    quiet(tmp_path, gradient_clip_val=0.25, gradient_clip_algorithm="value").fit(module, numbers(3))
    assert module.weight.item() == -0.25


def test_own_lr_scheduler_step(tmp_path):
    class Module(Numbers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]

        def lr_scheduler_step(self, scheduler, optimizer_idx, metric):  # Lightning 1.x
            self.seen = (type(scheduler).__name__, optimizer_idx, metric)
            super().lr_scheduler_step(scheduler, optimizer_idx, metric)

    module = Module()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(1))
    assert module.seen == ("StepLR", 0, None)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("strict", [True, False])
def test_a_plateau_scheduler_whose_metric_is_missing(tmp_path, strict):
    class Module(Numbers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": plateau, "monitor": "val_loss", "strict": strict}]

        def training_step(self, batch, batch_idx):
            self.log("train_loss", batch.sum())
            return super().training_step(batch, batch_idx)

    if strict:
        with pytest.raises(
            OptimizerError, match="ReduceLROnPlateau monitors 'val_loss', which is not logged.*train_loss"
        ):
            quiet(tmp_path).fit(Module(), numbers(1))
    else:
        quiet(tmp_path).fit(Module(), numbers(1))


def test_minus_one_ends_the_epoch_and_drops_the_open_group(tmp_path):
    class Module(Numbers):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

        def on_train_epoch_end(self):
            self.ends = getattr(self, "ends", 0) + 1

    module = Module()
    trainer = quiet(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, numbers(2, 4, 8, 16, 32))
    assert module.weight.item() == -2 * 3.0 and module.weight.grad is None
    assert trainer.global_step == 2 and module.ends == 2


# -- 5.6 -------------------------------------------------------------------------------------------------------------
def test_detect_anomaly_names_step_and_loss(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            return self.weight * batch.sum() + (float("nan") if batch_idx == 2 else 0.0)

    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 0, batch 2 \(global_step 2\)"):
        quiet(tmp_path, detect_anomaly=True).fit(Module(), numbers(1, 1, 1))
    assert not torch.is_anomaly_enabled()


def test_detect_anomaly_names_the_parameter(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.weight.register_hook(lambda grad: grad / 0) if batch_idx == 1 else None
            return self.weight * batch.sum()

    with pytest.raises(
        FloatingPointError, match=r"gradient of weight is not finite in epoch 0, batch 1 \(global_step 1\)"
    ):
        quiet(tmp_path, detect_anomaly=True).fit(Module(), numbers(1, 1))


def test_without_detect_anomaly_nothing_looks(tmp_path):
    trainer, _ = fit_returning(tmp_path, lambda loss: loss * float("nan"))
    assert trainer.global_step == 2


@pytest.mark.parametrize("make", [sgd, adamw])
def test_add_param_group_is_clipped_too(tmp_path, make):
    class Module(Numbers):
        def __init__(self):
            super().__init__()
            self.late = nn.Parameter(torch.zeros(()))

        def on_train_start(self):
            self.optimizers().add_param_group({"params": [self.late]})

        def on_before_zero_grad(self, optimizer):
            self.norm = float(torch.stack([self.weight.grad, self.late.grad]).norm())

        def training_step(self, batch, batch_idx):
            return (3 * self.weight + 4 * self.late) * batch.sum()

        def configure_optimizers(self):
            return make([self.weight])

    module = Module()
    quiet(tmp_path, gradient_clip_val=1.0).fit(module, numbers(10))
    assert module.norm == pytest.approx(1.0, rel=1e-4)
