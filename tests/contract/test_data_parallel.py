"""``strategy="dp"``: each batch is split over the devices of one worker, here virtual ones of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import raylit
from raylit.driver.cluster import with_gpus
from raylit.errors import ConfigError, DataError, HookError
from raylit.strategies import DDP2, DataParallel
from raylit.strategies.dp import OnCopies
from tests.unit.engine.small import Net, Numbers, adamw, assert_same, batches, network, numbers, quiet, sgd

both = pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])


def halves(batch: tuple[Tensor, Tensor], devices: int = 2) -> list[tuple[Tensor, Tensor]]:
    """As even as can be, the larger parts first."""
    return [(x, y) for x, y in zip(*(tensor.tensor_split(devices) for tensor in batch)) if len(x)]


# -- numbers ---------------------------------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("devices", [1, 2, 3, 9])
def test_equals_a_loop_written_by_hand_to_the_bit(tmp_path, make, devices):
    model = network()
    optimizer = make(model.parameters())
    for _ in range(3):
        for batch in batches():  # of 4 samples, the last of 3: over 3 devices 2 + 1 + 1, over 9 one each
            total = len(batch[0])
            losses = [mse_loss(model(x), y) * (len(x) / total) for x, y in halves(batch, devices)]
            loss = losses[0]
            for other in losses[1:]:
                loss = loss + other
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    module = Net(make)
    quiet(tmp_path, max_epochs=3, strategy=DataParallel(devices=devices)).fit(module, batches())
    assert_same(module.net.state_dict(), dict(model.state_dict()))


@both
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "64"}],
    ids=["plain", "accumulated", "clipped", "double"],
)
def test_equals_the_run_on_one_device(tmp_path, make, arguments):
    plain, split = Net(make), Net(make)
    quiet(tmp_path, max_epochs=3, **arguments).fit(plain, batches())
    trainer = quiet(tmp_path, max_epochs=3, strategy="dp", **arguments)
    trainer.fit(split, batches())
    for mine, other in zip(split.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert trainer.global_step == 3 * (3 if "accumulate_grad_batches" in arguments else 7)


def test_lbfgs_and_closures(tmp_path):
    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    plain, split = Net(make), Net(make)
    for module, strategy in ((plain, "auto"), (split, "dp")):
        quiet(tmp_path, precision="64", strategy=strategy).fit(module, batches())
    for mine, other in zip(split.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, other)


class Pair(raylit.Module):
    """Two weights, an optimizer each; gradients are the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[float]]] = []

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.seen.append((optimizer_idx, batch.tolist()))
        return {"loss": (self.one, self.two)[optimizer_idx] * batch.mean(), "kept": batch * 2}

    def training_epoch_end(self, outputs):
        self.outputs = outputs

    def configure_optimizers(self):
        return [torch.optim.SGD([weight], lr=lr) for weight, lr in ((self.one, 1.0), (self.two, 10.0))]


def test_two_optimizers_and_their_outputs(tmp_path):
    module = Pair()
    trainer = quiet(tmp_path, strategy="dp")
    trainer.fit(module, [torch.tensor([1.0, 2, 6])])
    assert module.seen == [(0, [1.0, 2.0]), (0, [6.0]), (1, [1.0, 2.0]), (1, [6.0])]
    assert (module.one.item(), module.two.item()) == (-3.0, -30.0) and trainer.global_step == 1
    # A value for each sample is put together as the batch was.
    assert [[o["kept"].tolist() for o in own] for own in module.outputs] == [[[2.0, 4.0, 12.0]]] * 2


# -- training_step_end -----------------------------------------------------------------------------------------------
class Ends(Numbers):
    """Keeps what training_step_end is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def training_step(self, batch, batch_idx):
        return {"out": self.weight * batch, "part": batch.tolist()}

    def training_step_end(self, outputs):
        self.given.append([output["part"] for output in outputs])
        return torch.cat([output["out"] for output in outputs]).sum()


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("dp", [[1, 2], [3, 4]]),
        ("ddp2", [[1, 2], [3, 4]]),
        (DataParallel(), [[1, 2], [3, 4]]),
        (DataParallel(devices=3), [[1, 2], [3], [4]]),
        (DataParallel(devices=1), [[1, 2, 3, 4]]),
        (DDP2(devices=5), [[1], [2], [3], [4]]),
    ],
    ids=["dp", "ddp2", "default", "three", "one", "fewer samples than devices"],
)
def test_step_end_gets_the_list_of_the_parts_in_device_order(tmp_path, strategy, parts):
    module = Ends()
    quiet(tmp_path, strategy=strategy).fit(module, [torch.tensor([1.0, 2, 3, 4])])
    assert module.given == [parts]
    assert module.weight.item() == -10.0


def test_without_dp_step_end_gets_the_step_s_own_output(tmp_path):
    class Module(Numbers):
        def training_step_end(self, step_output):
            assert isinstance(step_output, Tensor)
            return step_output

    quiet(tmp_path).fit(Module(), numbers(1))


def test_none_in_some_parts_and_in_all(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            return None if float(batch[0]) < 0 else self.weight * batch.mean()

    module = Module()
    trainer = quiet(tmp_path, strategy="dp")
    trainer.fit(module, [torch.tensor([-1.0, 8]), torch.tensor([-1.0, -1]), torch.tensor([2.0, 4])])
    assert module.weight.item() == -(8 + 3) and trainer.global_step == 2


# -- evaluation ------------------------------------------------------------------------------------------------------
class Evaluated(Net):
    """The same step in all loops; outputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, Any] = {}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.log("mse", mse_loss(out, y))
        return {"out": out, "mse": mse_loss(out, y), "hits": (out > 0).sum(), "names": ["a"] * len(x), "tag": "t"}

    test_step = validation_step

    def validation_epoch_end(self, outputs):
        self.outputs["validation"] = outputs

    def test_epoch_end(self, outputs):
        self.outputs["test"] = outputs

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_evaluation_gives_the_numbers_of_one_device(tmp_path, entry):
    name = {"validate": "validation"}.get(entry, entry)
    plain, split = Evaluated(), Evaluated()
    expected = getattr(quiet(tmp_path), entry)(plain, batches())
    found = getattr(quiet(tmp_path, strategy="dp"), entry)(split, batches())
    assert found[0]["mse"] == pytest.approx(expected[0]["mse"], rel=1e-6)
    for mine, other in zip(split.outputs[name], plain.outputs[name], strict=True):
        assert torch.allclose(mine["out"], other["out"]) and torch.allclose(mine["mse"], other["mse"])
        assert mine["names"] == other["names"] and mine["tag"] == "t"
        # A count may be summed or averaged: only its writer knows. It comes as the parts' list.
        assert isinstance(mine["hits"], list) and sum(mine["hits"]) == other["hits"]


def test_predictions_are_those_of_one_device(tmp_path):
    expected = quiet(tmp_path).predict(Evaluated(), batches())
    found = quiet(tmp_path, strategy=DataParallel(devices=3)).predict(Evaluated(), batches())
    assert [len(each) for each in found] == [4] * 6 + [3]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_evaluation_step_end_gets_the_list(tmp_path, entry):
    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            return batch.tolist()

        def validation_step_end(self, outputs):
            return ("joined", outputs)

        def validation_epoch_end(self, outputs):
            self.outputs = outputs

        test_step, test_step_end, test_epoch_end = validation_step, validation_step_end, validation_epoch_end

    module = Module()
    getattr(quiet(tmp_path, strategy="dp"), entry)(module, [torch.tensor([1.0, 2, 3]), torch.tensor([4.0])])
    assert module.outputs == [("joined", [[1, 2], [3]]), ("joined", [[4]])]


# -- logging ---------------------------------------------------------------------------------------------------------
class Logs(Numbers):
    """Logs the mean of each part."""

    def training_step(self, batch, batch_idx):
        self.log("mean", batch.mean(), on_step=True, on_epoch=True)
        self.log("sum", batch.sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("most", batch.max(), on_step=True, on_epoch=True, reduce_fx=max)
        if float(batch[0]) == 1:
            self.log("first_part_only", 7.0)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self):
        live = self.trainer.callback_metrics
        steps = {name: float(live[name]) for name in ("mean_step", "sum_step", "most_step", "first_part_only")}
        self.steps = [*getattr(self, "steps", []), steps]

    def validation_step(self, batch, batch_idx):
        self.log("val", batch.mean())


def test_logged_values_are_those_of_the_batch(tmp_path):
    module = Logs()
    trainer = quiet(tmp_path, strategy="dp")
    data = [torch.tensor([1.0, 2, 9]), torch.tensor([3.0, 5])]
    trainer.fit(module, data, data)
    assert module.steps == [
        {"mean_step": 4.0, "sum_step": 12.0, "most_step": 9.0, "first_part_only": 7.0},
        {"mean_step": 4.0, "sum_step": 8.0, "most_step": 5.0, "first_part_only": 7.0},
    ]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["mean_epoch"] == metrics["val"] == pytest.approx(20 / 5)
    assert metrics["sum_epoch"] == 20.0 and metrics["most_epoch"] == 9.0


def test_an_epoch_hook_s_value_weighs_each_sample_once(tmp_path):
    """What the parts said of their sizes must not be counted on top of the batch's."""

    class Module(Logs):
        def on_validation_epoch_end(self):
            frame = self._run._parts.metrics._frames[-1]
            self.counted = (frame.batches, frame.samples)

    module = Module()
    quiet(tmp_path, strategy="dp").validate(module, [torch.tensor([1.0, 2, 9]), torch.tensor([3.0, 5])])
    assert module.counted == (2, 5)


def test_logged_in_splits_of_truncated_bptt(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx, hiddens):
            self.log("mean", batch.mean(), on_step=True, on_epoch=True, batch_size=len(batch))
            return self.weight * batch.mean()

    trainer = quiet(tmp_path, strategy="dp", truncated_bptt_steps=1)
    batch = torch.tensor([[1.0, 2], [3, 4], [8, 3]])
    trainer.fit(Module(), [batch, torch.tensor([[10.0, 10]])])
    # Two splits with means 4 and 3: 3.5 for the batch of three samples, and 10 for the batch of one.
    assert float(trainer.callback_metrics["mean_epoch"]) == pytest.approx((3.5 * 3 + 10) / 4)


# -- truncated BPTT --------------------------------------------------------------------------------------------------
class Recurrent(raylit.Module):
    def __init__(self, step_end: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)

    def training_step(self, batch, batch_idx, hiddens):
        x, y = batch
        states, hiddens = self.lstm(x, hiddens)
        return {"loss": mse_loss(self.head(states), y), "hiddens": hiddens}

    def configure_optimizers(self):
        return sgd(self.parameters())


class RecurrentWithEnd(Recurrent):
    def training_step_end(self, outputs):
        if not isinstance(outputs, list):
            return outputs
        loss = (2 * outputs[0]["loss"] + outputs[1]["loss"]) / 3
        return {"loss": loss, "hiddens": [output["hiddens"] for output in outputs]}


@pytest.mark.parametrize("kind", [Recurrent, RecurrentWithEnd])
def test_each_part_keeps_its_own_hiddens(tmp_path, kind):
    generator = torch.Generator().manual_seed(9)
    data = [(torch.randn(3, 7, 3, generator=generator), torch.randn(3, 7, 1, generator=generator)) for _ in range(3)]
    plain, split = kind(), kind()
    for module, strategy in ((plain, "auto"), (split, "dp")):
        quiet(tmp_path, max_epochs=2, truncated_bptt_steps=3, strategy=strategy).fit(module, data)
    for mine, other in zip(split.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_hiddens_of_a_step_end_that_are_not_one_for_each_part(tmp_path):
    class Module(Recurrent):
        def training_step_end(self, outputs):
            return outputs[0]

    with pytest.raises(HookError, match="over 2 devices are a list with each part's own.*returned a tuple"):
        quiet(tmp_path, truncated_bptt_steps=3, strategy="dp").fit(
            Module(), [(torch.zeros(2, 7, 3), torch.zeros(2, 7, 1))]
        )


# -- how a batch is split --------------------------------------------------------------------------------------------
def test_nested_batches_are_split_by_samples(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch]
            return self.weight * batch["x"].sum()

    batch = {
        "x": torch.tensor([1.0, 2, 3]), "pair": (torch.arange(6).view(3, 2), [torch.tensor([True, False, True])]),
        "names": ["a", "b", "c"], "lengths": (4, 5, 6), "scale": torch.tensor(9.0), "what": "text", "n": 3,
    }  # fmt: skip
    module = Module()
    quiet(tmp_path, strategy="dp").fit(module, [batch])
    first, second = module.seen
    assert_same(first, {
        "x": torch.tensor([1.0, 2]), "pair": (torch.tensor([[0, 1], [2, 3]]), [torch.tensor([True, False])]),
        "names": ["a", "b"], "lengths": (4, 5), "scale": torch.tensor(9.0), "what": "text", "n": 3,
    })  # fmt: skip
    assert_same(second, {
        "x": torch.tensor([3.0]), "pair": (torch.tensor([[4, 5]]), [torch.tensor([True])]),
        "names": ["c"], "lengths": (6,), "scale": torch.tensor(9.0), "what": "text", "n": 3,
    })  # fmt: skip


class Graph:
    """An object that moves itself and cannot be cut."""

    def to(self, device):
        return self


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(4, 2), "e": torch.zeros(2, 9)}, r"one tensor has 4 samples and another the shape \(2, 9\)"),
        ({"n": 3}, "a batch of type dict cannot be split over devices"),
        ((torch.zeros(4), Graph()), "a Graph in the batch cannot be split"),
        ((torch.nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(2)]),), "a PackedSequence cannot be split"),
    ],
)
def test_a_batch_that_cannot_be_split(tmp_path, batch, message):
    with pytest.raises(DataError, match=message) as caught:
        quiet(tmp_path, strategy="dp").fit(Numbers(), [batch])
    assert "split=function" in str(caught.value)


def test_a_split_of_one_s_own(tmp_path):
    strategy = DataParallel(devices=2, split=lambda batch, n: [batch[::n], batch[1::n]])
    module = Ends()
    quiet(tmp_path, strategy=strategy).fit(module, [torch.tensor([1.0, 2, 3])])
    assert module.given == [[[1, 3], [2]]]
    with pytest.raises(HookError, match="returned 3 parts of a batch; from 1 to 2"):
        quiet(tmp_path, strategy=DataParallel(split=lambda batch, n: [batch] * 3)).fit(Ends(), numbers(1))


# -- what the Module is told -----------------------------------------------------------------------------------------
NAMES = ("use_dp", "use_ddp", "use_ddp2", "use_amp", "use_tpu", "on_gpu")


class Asked(Numbers):
    def told(self):
        return {name for name in NAMES if getattr(self, name)}

    def training_step(self, batch, batch_idx):
        self.in_step = self.told()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.in_validation = self.told()


@pytest.mark.parametrize(
    ("strategy", "precision", "expected"),
    [
        ("auto", "32", set()),
        ("ddp", "bf16-mixed", {"use_amp"}),  # one worker: there is nobody to average with
        ("dp", "32", {"use_dp"}),
        (DataParallel(3), "bf16-mixed", {"use_dp", "use_amp"}),
        ("ddp2", "64", {"use_ddp2"}),
        (DDP2(), "bf16-true", {"use_ddp2"}),
    ],
)
def test_flags_tell_the_truth_in_hooks_and_afterwards(tmp_path, strategy, precision, expected):
    module = Asked()
    assert module.told() == set()
    trainer = quiet(tmp_path, strategy=strategy, precision=precision)
    trainer.fit(module, numbers(1, 2), numbers(1))
    assert module.in_step == module.in_validation == module.told() == expected
    trainer.validate(module, numbers(1))
    assert module.in_validation == module.told() == expected
    quiet(tmp_path).fit(module, numbers(1))  # the last run counts
    assert module.told() == set()


# -- manual optimisation ---------------------------------------------------------------------------------------------
def test_manual_optimisation_in_training_step_end(tmp_path):
    class Module(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]), batch[1]

        def training_step_end(self, outputs):
            loss = mse_loss(torch.cat([out for out, _ in outputs]), torch.cat([y for _, y in outputs]))
            self.manual_backward(loss)
            self.manual_optimizer_step(self.optimizers())

    plain, split = Net(), Module()
    quiet(tmp_path, max_epochs=2).fit(plain, batches())
    trainer = quiet(tmp_path, max_epochs=2, strategy="dp")
    trainer.fit(split, batches())
    assert trainer.global_step == 14
    for mine, other in zip(split.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["manual_backward", "an optimizer's step"])
def test_manual_optimisation_within_a_part_is_refused(tmp_path, what):
    class Module(Numbers):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if what == "manual_backward":
                self.manual_backward(self.weight * batch.sum())
            else:
                self.optimizers().step()

    with pytest.raises(HookError, match=f"{what} in training_step under strategy='dp'.*training_step_end"):
        quiet(tmp_path, strategy="dp").fit(Module(), numbers(1))


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [DataParallel, DDP2])
@pytest.mark.parametrize("devices", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_devices(kind, devices):
    with pytest.raises(ConfigError, match="expected a number of devices of at least 1"):
        kind(devices=devices)


def test_dp_over_several_workers_and_synchronised_batchnorm():
    for strategy in ("dp", DataParallel(3)):
        with pytest.raises(ConfigError, match="Use 'ddp2'"):
            raylit.Trainer(strategy=strategy, num_workers=2)
    for strategy in ("dp", "ddp2", DataParallel(), DDP2()):
        with pytest.raises(ConfigError, match="sync_batchnorm=True"):
            raylit.Trainer(strategy=strategy, sync_batchnorm=True)


def test_more_devices_than_there_are_gpus():
    gpus = [torch.device("cuda", index) for index in range(2)]
    with pytest.raises(ConfigError, match=r"devices=3, but the worker sees 2 GPU.*resources_per_worker=\{'GPU': 3\}"):
        DataParallel(devices=3).attach(gpus, None)


# -- other devices ---------------------------------------------------------------------------------------------------
class Counted(raylit.Module):
    """A layer with two names, a tied weight, an LSTM, batch norm's buffers, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.again, self.tied, self.rnn = self.layer, nn.Linear(3, 3), nn.LSTM(3, 3)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def training_step(self, batch, batch_idx):
        copied = not isinstance(self.rnn.weight_ih_l0, nn.Parameter)
        self.seen = (self.device, batch_idx, copied, self.rnn._flat_weights[0] is self.rnn.weight_ih_l0)
        out, _ = self.rnn(self.tied(self.again(batch)))
        return (self.norm(out) * self.frozen).square().sum() / 7


def test_a_step_on_copies_gives_its_gradients_to_the_modules_own_weights():
    module, other = Counted(), Counted()
    x = torch.randn(4, 3)
    loss = OnCopies(module, module.training_step, torch.device("cpu"))(x, 3)
    loss.backward()
    expected = other.training_step(x, 3)
    expected.backward()
    assert loss == expected
    for mine, same in zip(module.parameters(), other.parameters(), strict=True):
        assert isinstance(mine, nn.Parameter)  # in its place again
        assert (mine.grad is None) == (same.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, same.grad)
    assert module.seen == (torch.device("cpu"), 3, True, True)  # set on the Module itself
    # Statistics of another device's part are lost, as in torch's DataParallel.
    assert int(module.norm.num_batches_tracked) == 0 and int(other.norm.num_batches_tracked) == 1
    assert module.rnn._flat_weights[0] is module.rnn.weight_ih_l0 and module.tied.weight is module.layer.weight


def test_a_step_on_copies_that_fails_leaves_the_module_as_it_was():
    module = Counted()
    before = {name: id(tensor) for name, tensor in module.named_parameters()}
    with pytest.raises(ZeroDivisionError):
        OnCopies(module, lambda: 1 / 0, torch.device("cpu"))()
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == before


class Away(DataParallel):
    """The second device is the CPU too, and is treated as another: its part runs on copies and comes back."""

    def each_device(self, module, step):
        cpu = torch.device("cpu")
        return [(cpu, step), (torch.device("cpu", 0), OnCopies(module, step, cpu))]


@pytest.mark.parametrize("kind", [Net, Logs, Recurrent])
def test_a_run_with_another_device_is_the_run_with_virtual_ones(tmp_path, kind):
    generator = torch.Generator().manual_seed(9)
    recurrent = [(torch.randn(3, 7, 3, generator=generator), torch.randn(3, 7, 1, generator=generator))] * 3
    data = {Net: batches(), Logs: [torch.tensor([1.0, 2, 9]), torch.tensor([3.0, 5])], Recurrent: recurrent}[kind]
    arguments = {"truncated_bptt_steps": 3} if kind is Recurrent else {}
    results = []
    for strategy in ("dp", Away()):
        module = kind()
        trainer = quiet(tmp_path, max_epochs=2, strategy=strategy, **arguments)
        trainer.fit(module, data, data if kind is Logs else None)
        results.append((dict(module.state_dict()), dict(trainer.callback_metrics), getattr(module, "steps", [])))
    torch.testing.assert_close(*results)  # gradients meet in another order of additions


def test_each_device_has_its_step():
    cpu = torch.device("cpu")
    strategy = DataParallel().attach([cpu], None)
    step = Counted().training_step
    assert strategy.each_device(Counted(), step) == [(cpu, step)] * 2
    gpus = [torch.device("cuda", index) for index in range(3)]
    devices = DataParallel(devices=2).attach(gpus, None).each_device(Counted(), step)
    assert [device for device, _ in devices] == gpus[:2]
    assert devices[0][1] == step and devices[1][1] != step
    assert len(DataParallel().attach(gpus, None).each_device(Counted(), step)) == 3


@pytest.mark.parametrize(
    ("resources", "gpus", "expected"),
    [
        (None, 0, None),  # no GPU is used
        (None, 1, None),
        (None, 2, {"GPU": 2.0}),
        ({"CPU": 4}, 2, {"CPU": 4, "GPU": 2.0}),
        ({"GPU": 4}, 2, {"GPU": 4}),
    ],
)
def test_a_worker_asks_for_the_gpus_that_share_a_batch(resources, gpus, expected):
    assert with_gpus(resources, gpus) == expected
