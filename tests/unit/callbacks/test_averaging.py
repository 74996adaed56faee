"""StochasticWeightAveraging, WeightAveraging and EMAWeightAveraging against hand-written loops with torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

import raylit
from raylit.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from raylit.errors import ConfigError
from tests.unit.engine.small import FEATURES, TARGETS, assert_same, quiet, samples

EPOCHS = 5


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, TARGETS))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loader() -> DataLoader[Any]:
    return DataLoader(samples(24), batch_size=4)


class Net(raylit.Module):
    def __init__(self, schedule: bool = False) -> None:
        super().__init__()
        self.net, self.schedule = network(), schedule
        self.rates: list[float] = []
        self.seen: list[dict[str, Tensor]] = []  # weights in each validation

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: value.clone() for name, value in self.net.state_dict().items()})

    def configure_optimizers(self) -> Any:
        made = optimizer(self.parameters())
        return ([made], [torch.optim.lr_scheduler.ExponentialLR(made, 0.5)]) if self.schedule else made


def close(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )


def epoch_of(net: nn.Module, made: torch.optim.Optimizer) -> None:
    net.train()
    for x, y in loader():
        nn.functional.mse_loss(net(x), y).backward()
        made.step()
        made.zero_grad()


# -- stochastic weight averaging -------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize(("start", "first"), [(3, 2), (0.6, 2), (1, 0)])
def test_swa_equals_a_loop_with_torchs_own(start: float, first: int, schedule: bool, tmp_path: Path) -> None:
    module = Net(schedule)
    swa = StochasticWeightAveraging(0.02, start, annealing_epochs=2, annealing_strategy="linear", device=None)
    quiet(tmp_path, max_epochs=EPOCHS, callbacks=[swa]).fit(module, loader())

    net = network()
    made = optimizer(net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.5) if schedule else None
    averaged, swa_scheduler, rates = AveragedModel(net), None, []
    for epoch in range(EPOCHS):
        if epoch == first:
            swa_scheduler = SWALR(made, 0.02, anneal_epochs=2, anneal_strategy="linear")
        epoch_of(net, made)
        rates.append(made.param_groups[0]["lr"])
        if swa_scheduler is not None:
            averaged.update_parameters(net)
            swa_scheduler.step()
        elif scheduler is not None:
            scheduler.step()
    update_bn(loader(), averaged)
    assert swa.num_averaged == EPOCHS - first
    assert module.rates == pytest.approx(rates)
    close(module.net.state_dict(), averaged.module.state_dict())
    assert [layer.momentum for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)] == [0.1]
    assert module.training


def test_swa_with_a_function_and_rates_of_groups(tmp_path: Path) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            return optimizer([{"params": self.net[0].parameters()}, {"params": self.net[3].parameters()}])

    def last(average: Tensor, weights: Tensor, count: int) -> Tensor:
        return weights if count > 1 else average * 0

    swa = StochasticWeightAveraging([0.01, 0.03], 1, annealing_epochs=0, avg_fn=last)
    module = Groups()
    kept: list[dict[str, Tensor]] = []

    def keep(trainer: Any, module: Any) -> None:
        kept.append({name: p.detach().clone() for name, p in module.named_parameters()})

    watch = raylit.callbacks.LambdaCallback(on_train_epoch_end=keep)
    trainer = quiet(tmp_path, max_epochs=3, callbacks=[swa, watch])
    trainer.fit(module, loader())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.03]
    close(dict(module.named_parameters()), kept[-1])  # the function gave the third epoch's weights


def test_swa_leaves_frozen_batchnorm_alone(tmp_path: Path) -> None:
    module = Net()
    module.net[1].eval()
    before = module.net[1].running_mean.clone()
    quiet(tmp_path, max_epochs=2, callbacks=[StochasticWeightAveraging(0.01, 1)]).fit(module, loader())
    assert torch.equal(module.net[1].running_mean, before) and not module.net[1].training


def test_swa_averages_what_there_is_when_training_stops_early(tmp_path: Path) -> None:
    module, kept = Net(), []

    def stop(trainer: Any, module: Any) -> None:
        kept.append({name: p.detach().clone() for name, p in module.named_parameters()})
        trainer.should_stop = trainer.current_epoch == 1

    stopper = raylit.callbacks.LambdaCallback(on_train_epoch_end=stop)
    swa = StochasticWeightAveraging(0.05, 1)
    quiet(tmp_path, max_epochs=9, callbacks=[swa, stopper]).fit(module, loader())
    mean = {name: (kept[0][name] + kept[1][name]) / 2 for name in kept[0]}
    assert swa.num_averaged == 2
    close(dict(module.named_parameters()), mean)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"swa_lrs": 0}, "positive number"), ({"swa_lrs": "0.1"}, "positive number"), ({"swa_lrs": []}, "positive number"),
    ({"swa_lrs": 0.1, "swa_epoch_start": 0}, "at least 1"), ({"swa_lrs": 0.1, "swa_epoch_start": 1.5}, "fraction"),
    ({"swa_lrs": 0.1, "annealing_epochs": -1}, "at least 0"),
    ({"swa_lrs": 0.1, "annealing_strategy": "cosine"}, "'cos' or 'linear'"),
    ({"swa_lrs": 0.1, "avg_fn": 1}, "function"),
])  # fmt: skip
def test_swa_refused_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StochasticWeightAveraging(**arguments)


class TwoOptimizers(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [optimizer(self.net[0].parameters()), optimizer(self.net[3].parameters())]


class Manual(Net):
    automatic_optimization = False


@pytest.mark.parametrize(("module", "swa", "given", "words"), [
    (Net, (0.1,), {"max_epochs": -1, "max_steps": 3}, "fraction of max_epochs"),
    (Net, (0.1, 4), {"max_epochs": 3}, "nothing would be averaged"),
    (TwoOptimizers, (0.1,), {"max_epochs": 3}, "one optimizer and at most one scheduler"),
    (Manual, (0.1,), {"max_epochs": 3}, "needs automatic optimisation"),
    (Net, ([0.1, 0.2],), {"max_epochs": 3}, "has 2 rates, the optimizer 1 parameter groups"),
])  # fmt: skip
def test_swa_refused_in_a_run(module: Any, swa: Any, given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        quiet(tmp_path, callbacks=[StochasticWeightAveraging(*swa)], **given).fit(module(), loader())


# -- moving averages -------------------------------------------------------------------------------------------------
def test_ema_equals_a_loop_with_torchs_own_bit_for_bit(tmp_path: Path) -> None:
    module = Net()
    quiet(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(module, loader(), loader())
    net = network()
    made = optimizer(net.parameters())
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for epoch in range(2):
        for x, y in loader():
            nn.functional.mse_loss(net(x), y).backward()
            made.step()
            made.zero_grad()
            averaged.update_parameters(net)
        expected = averaged.module.state_dict()
        expected["1.num_batches_tracked"] = net[1].num_batches_tracked  # counted, not averaged
        assert_same(dict(module.seen[epoch * 6]), dict(expected))  # validation ran on the average
    assert_same(dict(module.net.state_dict()), dict(expected))


def test_training_goes_on_from_its_own_weights(tmp_path: Path) -> None:
    plain, averaged = Net(), Net()
    ended: list[dict[str, Tensor]] = []
    watch = raylit.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, module: ended.append({n: v.clone() for n, v in module.state_dict().items()})
    )
    quiet(tmp_path, max_epochs=3, callbacks=[watch]).fit(plain, loader(), loader())
    quiet(tmp_path, max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.5), watch]).fit(averaged, loader(), loader())
    assert_same(ended[:3], ended[3:])


def test_ema_when_to_update() -> None:
    every = EMAWeightAveraging(update_every_n_steps=3, update_starting_at_step=4)
    assert [step for step in range(14) if every.should_update(step_idx=step)] == [6, 9, 12]
    assert not any(every.should_update(epoch_idx=epoch) for epoch in range(5))
    epochs = EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=2)
    assert [epoch for epoch in range(5) if epochs.should_update(epoch_idx=epoch)] == [2, 3, 4]
    assert not any(epochs.should_update(step_idx=step) for step in range(5))


def test_before_the_first_update_validation_runs_on_the_weights_themselves(tmp_path: Path) -> None:
    module = Net()
    late = EMAWeightAveraging(update_starting_at_step=1000)
    quiet(tmp_path, max_epochs=1, callbacks=[late]).fit(module, loader(), loader())
    assert_same(module.seen[0], dict(module.net.state_dict()))


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    counted: list[int] = []

    class Counting(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            counted.append(step_idx if step_idx is not None else -1)
            return False

    quiet(tmp_path, accumulate_grad_batches=2, callbacks=[Counting()]).fit(Net(), loader())
    assert counted == [0, 1, 2, -1]


def test_the_plain_mean_and_buffers_left_alone(tmp_path: Path) -> None:
    module, kept = Net(), []
    watch = raylit.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: kept.append(
            {n: v.clone() for n, v in module.state_dict().items()}
        )
    )
    quiet(tmp_path, callbacks=[WeightAveraging(use_buffers=False), watch]).fit(module, loader())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.stack([each[name] for each in kept]).mean(0))
    assert torch.equal(module.net[1].running_mean, kept[-1]["net.1.running_mean"])


def test_an_average_of_16_bit_weights_is_kept_in_32(tmp_path: Path) -> None:
    class Half(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net[0](batch[0]).float().pow(2).mean()

    module, ema = Half(), EMAWeightAveraging(decay=0.999, use_buffers=False)
    quiet(tmp_path, max_epochs=4, precision="bf16-true", callbacks=[ema]).fit(module, loader())
    assert {tensor.dtype for tensor in ema._average.tensors.values()} == {torch.float32}
    assert module.net[0].weight.dtype is torch.bfloat16


def test_a_failing_validation_gives_the_weights_back(tmp_path: Path) -> None:
    class Failing(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    module, ended = Failing(), []
    watch = raylit.callbacks.LambdaCallback(
        on_validation_start=lambda trainer, module: ended.append({n: v.clone() for n, v in module.state_dict().items()})
    )
    with pytest.raises(ZeroDivisionError):
        quiet(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5), watch]).fit(module, loader(), loader())
    assert_same(ended[0], dict(module.state_dict()))


@pytest.mark.parametrize("arguments", [
    {"decay": 1.5}, {"decay": "0.9"}, {"update_every_n_steps": None}, {"update_every_n_steps": -1},
    {"update_starting_at_step": 1.5}, {"update_starting_at_epoch": -2},
])  # fmt: skip
def test_ema_refused_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        EMAWeightAveraging(**arguments)


# -- checkpoints -----------------------------------------------------------------------------------------------------
CALLBACKS = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(0.02, 2, annealing_epochs=3),
}


class Dropping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(nn.functional.dropout(batch[0], 0.3)), batch[1])
        return loss * torch.rand(())


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("name", CALLBACKS)
def test_going_on_from_a_checkpoint_is_as_never_having_stopped(name: str, schedule: bool, tmp_path: Path) -> None:
    def shuffled() -> DataLoader[Any]:
        return DataLoader(samples(24), batch_size=4, shuffle=True)

    whole = Dropping(schedule)
    quiet(tmp_path, max_epochs=5, seed=4, callbacks=[CALLBACKS[name]()]).fit(whole, shuffled(), loader())
    first = Dropping(schedule)
    half = quiet(tmp_path, max_epochs=3, seed=4, enable_checkpointing=True, callbacks=[CALLBACKS[name]()])
    result = half.fit(first, shuffled(), loader())
    saved = torch.load(Path(result.checkpoint.path) / "model.ckpt", weights_only=True)
    assert_same(dict(saved["state_dict"]), dict(first.state_dict()))  # the average
    again = Dropping(schedule)
    again.rates = list(first.rates)
    quiet(tmp_path, max_epochs=5, seed=4, callbacks=[CALLBACKS[name]()]).fit(
        again, shuffled(), loader(), ckpt_path=result.checkpoint
    )
    assert again.rates == whole.rates
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("steps", [8, 14])  # in the middle of the second and third of epochs of 6 batches
@pytest.mark.parametrize("name", CALLBACKS)
def test_going_on_in_the_middle_of_an_epoch(name: str, steps: int, tmp_path: Path) -> None:
    whole, first, again = Dropping(True), Dropping(True), Dropping(True)
    given: dict[str, Any] = {"max_epochs": 4, "seed": 4, "enable_checkpointing": True}
    quiet(tmp_path, **given, callbacks=[CALLBACKS[name]()]).fit(whole, loader(), loader())
    half = quiet(tmp_path, **given, max_steps=steps, callbacks=[CALLBACKS[name]()])
    result = half.fit(first, loader(), loader())
    quiet(tmp_path, **given, callbacks=[CALLBACKS[name]()]).fit(again, loader(), loader(), ckpt_path=result.checkpoint)
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))


def test_evaluating_a_checkpoint_uses_the_average(tmp_path: Path) -> None:
    module = Net()
    trainer = quiet(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[EMAWeightAveraging(decay=0.8)])
    result = trainer.fit(module, loader())
    other = Net()
    quiet(tmp_path, callbacks=[EMAWeightAveraging()]).validate(other, loader(), ckpt_path=result.checkpoint)
    assert_same(other.seen[0], dict(module.net.state_dict()))
