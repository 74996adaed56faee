"""``trainer.lr_find`` in process: against a loop by hand, what it leaves as it was, its suggestion, its errors."""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import raylit
from raylit.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from raylit.driver.copies import copied_datamodule, copied_loaders, copied_module
from raylit.driver.lr_finder import LRFinder
from raylit.driver.tuning import ladder
from raylit.errors import (
    ConfigError,
    DataError,
    HookError,
    MissingDependencyError,
    OptimizerError,
    RaylitError,
    UnknownArgumentError,
)
from raylit.view import WorkerTrainer

BETA = 0.98


def data(count: int = 30) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator))


class Net(raylit.Module):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def make(**arguments: Any) -> raylit.Trainer:
    given = {"num_workers": 0, "use_gpu": False, "max_epochs": 1, "enable_progress_bar": False, "logger": False,
             "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
    return raylit.Trainer(**{**given, **arguments})


def smoothed(losses: list[float]) -> list[float]:
    """The exponential average over the weights that are in it, as a sum written out."""
    result = []
    for n in range(1, len(losses) + 1):
        weights = [(1 - BETA) * BETA ** (n - k) for k in range(1, n + 1)]
        result.append(sum(w * loss for w, loss in zip(weights, losses)) / sum(weights))
    return result


def by_hand(rates: list[float], loader: Any, group: int = 1) -> list[float]:
    """A torch loop of the same steps; the loss of each step."""
    net = Net().net
    optimizer = torch.optim.SGD(net.parameters(), lr=123.0, momentum=0.9)
    losses: list[float] = []
    while True:
        batches = list(loader)
        for start in range(0, len(batches), group):
            part = batches[start : start + group]
            values = [mse_loss(net(x), y) for x, y in part]
            (sum(values) / group).backward()
            for each in optimizer.param_groups:
                each["lr"] = rates[len(losses)]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(value.item() for value in values) / len(values))
            if len(losses) == len(rates):
                return losses


class Busy(Net):
    """What could set another learning rate, schedulers and a warm-up in the step; and a validation."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
                      torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)]  # fmt: skip
        return [optimizer], [{"scheduler": schedulers[0], "interval": "step"}, {"scheduler": schedulers[1]}]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, optimizer_closure: Any,
                       **kwargs: Any) -> None:  # fmt: skip
        optimizer.param_groups[0]["lr"] = 77.0
        optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        raise AssertionError("a scheduler stepped")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("validation ran")

    def val_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=8)


# -- the steps ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [Net, Busy])
@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize("group", [1, 2])
def test_rates_and_losses_are_those_of_a_loop_by_hand(model: type[Net], mode: str, group: int) -> None:
    """30 steps of batches of 8: an epoch has 4, its last of 6 samples, so that the loader begins anew."""
    loader = DataLoader(data(), batch_size=8)
    found = make(accumulate_grad_batches=group, num_sanity_val_steps=2, val_check_interval=2).lr_find(
        model(), loader, min_lr=1e-4, max_lr=0.5, num_training=30, mode=mode, early_stop_threshold=None,
    )  # fmt: skip
    rates = found.results["lr"]
    if mode == "linear":
        assert rates == pytest.approx([1e-4 + (0.5 - 1e-4) * i / 29 for i in range(30)])
    else:
        assert rates == pytest.approx([10 ** (-4 + (math.log10(0.5) + 4) * i / 29) for i in range(30)])
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(0.5)
    assert found.results["loss"] == pytest.approx(smoothed(by_hand(rates, loader, group)), rel=1e-5)
    assert (found.mode, found.lr_min, found.lr_max, found.num_training) == (mode, 1e-4, 0.5, 30)


def test_a_callback_that_says_how_to_train_counts_and_the_others_are_silent() -> None:
    loader = DataLoader(data(), batch_size=8)
    stopping = EarlyStopping("never_logged")
    trainer = make(callbacks=[GradientAccumulationScheduler({0: 2}), stopping])
    found = trainer.lr_find(Net(), loader, min_lr=1e-4, max_lr=0.5, num_training=6, update_attr=False)
    assert found.results["loss"] == pytest.approx(smoothed(by_hand(found.results["lr"], loader, 2)), rel=1e-5)
    assert trainer.callbacks[1] is stopping


def test_the_pieces_of_truncated_backpropagation_count_as_one_step() -> None:
    class Pieces(raylit.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.lr, self.truncated_bptt_steps = nn.Parameter(torch.ones(())), 0.1, 2

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.weight * batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    # Means 1 and 3 in pieces of two steps in time; the learning rate is too small to matter.
    batch = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    found = make().lr_find(Pieces(), [batch] * 3, min_lr=1e-12, max_lr=1e-11, num_training=3, update_attr=False)
    assert found.results["loss"] == pytest.approx([2.0, 2.0, 2.0])


class Told(raylit.Module):
    """Losses as they are told, whatever is trained."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight, self.losses, self.lr = nn.Parameter(torch.zeros(())), losses, 0.5

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.weight * 0 + self.losses[self.global_step]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def told(losses: list[float], threshold: float | None = 4.0, batches: int = 4) -> list[float]:
    loader = [torch.ones(1) for _ in range(batches)]
    found = make().lr_find(
        Told(losses), loader, num_training=len(losses), early_stop_threshold=threshold, update_attr=False
    )
    assert len(found.results["lr"]) == len(found.results["loss"])
    return found.results["loss"]


@pytest.mark.parametrize("batches", [1, 3, 4, 5])  # the step that diverges is an epoch's first, last, or within one
def test_a_loss_above_the_threshold_times_the_best_stops_before_another_step(batches: int) -> None:
    losses = [1.0, 1.0, 1.0, 12.0, 12.0, 12.0, 12.0, 12.0]
    curve = smoothed(losses)
    first = next(i for i, loss in enumerate(curve) if loss > 3.0)
    assert told(losses, 3.0, batches) == pytest.approx(curve[: first + 1])
    assert told(losses, 100.0, batches) == told(losses, None, batches) == pytest.approx(curve)


def test_a_loss_that_is_not_finite_stops_unless_nothing_does() -> None:
    assert len(told([1.0, 1.0, math.nan, 1.0, 1.0])) == 3
    assert len(told([1.0, math.inf, 1.0])) == 2
    assert len(told([1.0, 1.0, math.nan, 1.0, 1.0], None)) == 5


def test_losses_below_zero() -> None:
    """4 times a best of -1 is less than it; a loss that stays about the same has not diverged."""
    assert len(told([-1.0, -0.9, -1.1, -0.9, -1.0])) == 5
    assert len(told([-1.0, 60.0, 60.0, 60.0])) == 2


def test_a_batch_without_a_loss_is_no_step() -> None:
    class Skips(Told):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    found = make().lr_find(Skips([1.0, 2.0, 3.0]), [torch.ones(1)] * 3, num_training=3, update_attr=False)
    assert found.results["loss"] == pytest.approx(smoothed([1.0, 2.0, 3.0]))


# -- what stays as it was ----------------------------------------------------------------------------------------------
class Changes(Net):
    """Changes itself in every way that training can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.calls: list[str] = []
        self.lock = threading.Lock()  # has no copy
        self.optimizer: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.calls.append("step")
        self.new = random.random() + numpy.random.rand()
        self.log("loss", 1.0)
        self.logger.experiment.add_scalar("x", 1.0)
        return mse_loss(self.net(self.drop(self.norm(x))), y)

    def training_epoch_end(self, outputs: Any) -> None:
        torch.stack([each["loss"] for each in outputs])
        self.net[0].weight.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        self.optimizer = super().configure_optimizers()
        return self.optimizer


class OwnOrder(Sampler[int]):
    """Draws from a generator of its own, over epochs."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(30), 24))


def fit_after(search: bool, folder: Path) -> tuple[dict[str, Tensor], list[float], Any]:
    raylit.seed_everything(5)
    model = Changes()
    model.net[2].eval()
    loader = DataLoader(data(), batch_size=8, sampler=OwnOrder(), generator=torch.Generator().manual_seed(4))
    trainer = make(max_epochs=2, logger=True, enable_checkpointing=True, storage_path=str(folder),
                   callbacks=[ModelCheckpoint(save_last=True)])  # fmt: skip
    if search:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attributes = dict(model.__dict__)
        found = trainer.lr_find(model, loader, num_training=20, update_attr=False)
        assert len(found.results["lr"]) > 2 and not list(folder.iterdir())
        assert model.__dict__ == attributes and model.calls == [] and model.net[2].training is False
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(each.requires_grad and each.grad is None for each in model.parameters())
        assert (trainer.global_step, trainer.current_epoch, trainer.model, trainer.optimizers) == (0, 0, None, [])
    drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(())),
             float(torch.rand((), generator=loader.generator))]  # fmt: skip
    trainer.fit(model, loader)
    return {**model.state_dict(), "lr": torch.tensor(model.optimizer.param_groups[0]["lr"])}, drawn, trainer


def test_a_fit_after_it_is_the_fit_without_it(tmp_path: Path) -> None:
    runs = [tmp_path / "without", tmp_path / "with"]
    for each in runs:
        each.mkdir()
    (expected, drawn, _), (weights, drawn_after, trainer) = fit_after(False, runs[0]), fit_after(True, runs[1])
    assert drawn_after == drawn
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    assert len(list(runs[1].iterdir())) == 1
    # After a fit, too: the trainer still tells of that one, and its weights stay.
    kept = (trainer.global_step, trainer.callback_metrics, trainer.log_dir, trainer.checkpoint_callback, trainer.state)
    trainer.lr_find(trainer.model, DataLoader(data(), batch_size=8), num_training=3, update_attr=False)
    assert (trainer.global_step, trainer.callback_metrics, trainer.log_dir, trainer.checkpoint_callback,
            trainer.state) == kept  # fmt: skip
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert len(list(runs[1].iterdir())) == 1


def test_all_is_as_it_was_after_an_error_too() -> None:
    class Breaks(Changes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise ZeroDivisionError("by hand")
            return super().training_step(batch, batch_idx)

    model = Breaks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(9)
    expected = torch.rand(())
    torch.manual_seed(9)
    with pytest.raises(ZeroDivisionError, match="by hand"):
        make(logger=True).lr_find(model, DataLoader(data(), batch_size=8, shuffle=True))
    assert torch.equal(torch.rand(()), expected) and model.lr == 0.1 and model.calls == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_copies_share_data_and_nothing_else() -> None:
    class Holder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.data: Dataset[Any] = data()
            self.loader = DataLoader(self.data, batch_size=2, generator=torch.Generator())
            self.order, self.lock = [self.net[0]], threading.Lock()
            self.hparams.layer = self.net[2]
            self.hidden = self.net[0](torch.ones(4))  # not a leaf: has no deepcopy

    model = Holder()
    twin = copied_module(model)
    assert twin.data is model.data and twin.loader.dataset is model.data and twin.lock is model.lock
    assert twin.order[0] is twin.net[0] and twin.hparams["layer"] is twin.net[2]
    assert twin.loader.generator is not model.loader.generator
    mine = {each.data_ptr() for each in model.parameters()}
    assert not mine & {each.data_ptr() for each in twin.parameters()}
    loader = DataLoader(model.data, batch_size=2, shuffle=True, generator=torch.Generator())
    for copied in (copied_loaders([loader, loader])[1], copied_loaders({"a": loader})["a"], copied_loaders(loader)):
        assert copied is not loader and copied.dataset is model.data and copied.generator is not loader.generator
    batches = [torch.ones(1)]
    assert copied_loaders(batches) is batches and copied_loaders(None) is None

    module = raylit.DataModule()
    module.hparams["batch_size"], module.rows, module.generator = 3, [1, 2], torch.Generator()
    other = copied_datamodule(module)
    assert other is not None and other.rows is module.rows and other.generator is not module.generator
    other.hparams["batch_size"] = 4
    assert module.hparams["batch_size"] == 3 and copied_datamodule(None) is None


# -- the learning rate that is set -------------------------------------------------------------------------------------
def search(model: raylit.Module, **arguments: Any) -> LRFinder:
    loader = DataLoader(data(), batch_size=30)
    found = make().lr_find(model, loader, min_lr=1e-3, max_lr=0.5, num_training=30, **arguments)
    assert found.suggestion() is not None and found.suggestion() in found.results["lr"]
    return found


def test_attribute_and_hyperparameter_are_set() -> None:
    model = Net()
    found = search(model)
    assert model.lr == model.hparams.lr == found.suggestion() != 0.1
    assert model.hparams_initial.lr == 0.1
    assert search(Net(), update_attr=False).results == found.results
    untouched = Net()
    search(untouched, update_attr=False)
    assert untouched.lr == untouched.hparams.lr == 0.1


class Named(Net):
    def __init__(self, rate: float = 0.1, learning_rate: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        del self.lr, self.hparams["lr"]

    @property
    def rate(self) -> float:
        return self.hparams.rate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def test_the_names_that_are_looked_for() -> None:
    model = Named()
    assert model.hparams.learning_rate == 0.2
    found = search(model)
    assert model.hparams.learning_rate == found.suggestion() and model.hparams.rate == 0.1
    assert not hasattr(model, "learning_rate")
    other = Named()
    search(other, attr_name="rate")
    assert other.hparams.rate == other.rate == found.suggestion() and other.hparams.learning_rate == 0.2


def test_without_a_suggestion_a_warning_tells_so() -> None:
    model = Net()
    with pytest.warns(UserWarning, match="no suggestion, and lr stays as it is: of 5 steps") as caught:
        make().lr_find(model, DataLoader(data(), batch_size=8), num_training=5)
    assert model.lr == 0.1 and caught[0].filename == __file__


def test_lines_are_shown_where_the_trainer_shows_how_a_run_goes(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [4.0] * 12 + [3.0, 2.0, 1.0] + [900.0] * 5
    make(enable_progress_bar=True).lr_find(Told(losses), [torch.ones(1)] * 4, num_training=20, early_stop_threshold=3.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lr_find stopped after 16 of 20 steps: the loss diverged"
    assert lines[1].startswith("lr_find set lr to ") and len(lines) == 2
    make().lr_find(Told(losses), [torch.ones(1)] * 4, num_training=20)
    assert capsys.readouterr().out == ""


# -- the suggestion ----------------------------------------------------------------------------------------------------
def finder(losses: list[float], mode: str = "exponential", lrs: list[float] | None = None) -> LRFinder:
    lrs = ladder(1e-4, 1.0, len(losses), mode) if lrs is None else lrs
    return LRFinder(mode, 1e-4, 1.0, len(losses), lrs, losses)


def test_the_suggestion_is_where_the_loss_falls_most_steeply() -> None:
    # Slopes from 5.0 to 3.2, half the neighbours' difference: -0.1, -0.1, -0.3, -1.0, -1.05, -0.4, 0.5, 1.2. Of all
    # the first is -8, the last -3.1.
    losses = [9.0, 1.0, 9.0, 5.0, 4.9, 4.8, 4.3, 2.8, 2.2, 2.0, 3.2, 0.1]
    found = finder(losses)
    assert found.suggestion(skip_begin=3, skip_end=1) == found.results["lr"][7]
    assert found.suggestion(skip_begin=0, skip_end=0) == found.results["lr"][0]
    assert found.suggestion(skip_begin=8, skip_end=0) == found.results["lr"][11]


def test_the_slope_is_that_of_the_curve_as_it_is_drawn() -> None:
    # By 1 over two decades, then by 1.2 over one: steeper over log(lr); over lr the first is.
    lrs, losses = [1e-4, 1e-2, 1e-1], [5.0, 4.0, 2.8]
    assert finder(losses, "exponential", lrs).suggestion(0, 0) == 1e-1
    assert finder(losses, "linear", lrs).suggestion(0, 0) == 1e-4


def test_losses_that_are_not_finite_are_left_out() -> None:
    found = finder([5.0, math.nan, 4.9, 4.8, math.inf, 2.0, 1.9])
    assert found.suggestion(0, 0) == found.results["lr"][3]


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, math.nan], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
def test_no_suggestion(losses: list[float]) -> None:
    assert finder(losses, lrs=[1e-4, 1e-3, 1e-2][: len(losses)]).suggestion(0, 0) is None


def test_the_default_leaves_out_ten_points_and_the_last() -> None:
    assert finder([3.0 - 0.1 * i for i in range(12)]).suggestion() is None
    assert finder([3.0 - 0.1 * i for i in range(13)]).suggestion() is not None


# -- the picture -------------------------------------------------------------------------------------------------------
def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = finder([5.0, 4.9, 4.8, 2.0, 1.9, 3.0, 9.0] * 3)
    figure = found.plot(path=tmp_path / "lr.svg")
    axes = figure.axes[0]
    curve, mark = axes.lines
    assert list(curve.get_xdata()) == found.results["lr"] and list(curve.get_ydata()) == found.results["loss"]
    assert list(mark.get_xdata()) == [found.suggestion()]
    assert axes.get_xscale() == "log" and (tmp_path / "lr.svg").read_text().startswith("<?xml")
    assert finder([2.0, 1.0], "linear").plot(suggest=False).axes[0].get_xscale() == "linear"
    assert len(found.plot(suggest=False).axes[0].lines) == 1
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*raylit\[plots\]"):
        finder([1.0, 2.0]).plot()


# -- errors ------------------------------------------------------------------------------------------------------------
class Manual(Net):
    automatic_optimization = False


class ManualLater(Net):
    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class Two(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]


class Nothing(Net):
    def configure_optimizers(self) -> None:
        return None


class AlwaysSkips(Net):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


class Stepless(raylit.Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rateless(Net):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3, "name": "x"})
        self.momentum, self.rate = 0.9, 0.1
        del self.lr, self.hparams["lr"]


ERRORS = [
    (Net, {}, {"min_lr": 0.0}, ConfigError, r"lr_find\(min_lr=0.0\): expected a number above 0"),
    (Net, {}, {"min_lr": -1, "mode": "linear"}, ConfigError, r"min_lr=-1\): expected a number of at least 0"),
    (Net, {}, {"min_lr": 0.1, "max_lr": 0.1}, ConfigError, r"max_lr=0.1\): expected a number above min_lr=0.1"),
    (Net, {}, {"max_lr": math.inf}, ConfigError, r"max_lr=inf\)"),
    (Net, {}, {"num_training": 1}, ConfigError, r"num_training=1\): expected a whole number of at least 2"),
    (Net, {}, {"num_training": 10.0}, ConfigError, r"num_training=10.0\)"),
    (Net, {}, {"mode": "cosine"}, ConfigError, r"mode='cosine'\): expected 'exponential' or 'linear'"),
    (Net, {}, {"early_stop_threshold": 1}, ConfigError, r"threshold=1\): expected a number above 1, or None"),
    (Net, {"fast_dev_run": 2}, {}, ConfigError, r"Trainer\(fast_dev_run=2\)"),
    (Net, {"limit_train_batches": 0}, {}, ConfigError, r"limit_train_batches=0\) leaves nothing to train on"),
    (Net, {}, {"attr_name": "lrr"}, ConfigError, r"attr_name='lrr'\).*Net has no 'lrr'.*Did you mean 'lr'"),
    (Rateless, {}, {}, ConfigError, r"neither 'lr' nor 'learning_rate'.*It has: momentum, rate, width\."),
    (Net, {}, {"lr_min": 1e-3}, UnknownArgumentError, "lr_find has no argument 'lr_min' in raylit. Instead: min_lr"),
    (Manual, {}, {}, ConfigError, "manual optimisation"),
    (Net, {"automatic_optimization": False}, {}, ConfigError, "manual optimisation"),
    (ManualLater, {}, {}, ConfigError, "manual optimisation"),
    (Two, {}, {}, OptimizerError, "one optimizer; configure_optimizers of Two returned 2"),
    (Nothing, {}, {}, OptimizerError, "one optimizer; configure_optimizers of Nothing returned none"),
    (AlwaysSkips, {}, {}, OptimizerError, "no optimizer stepped in epoch 0"),
    (Stepless, {}, {"update_attr": False}, HookError, "no training_step"),
    (Net, {}, {"train_dataloaders": []}, DataError, "an empty collection"),
    (Net, {}, {"train_dataloaders": None}, DataError, "has no data"),
    (Net, {}, {"train_dataloaders": (b for b in [1])}, DataError, "a generator, which gives its batches once"),
    (Net, {}, {"datamodule": raylit.DataModule()}, ConfigError, r"trainer.lr_find\(\) got loaders and a datamodule"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "trainer", "arguments", "kind", "words"), ERRORS)
def test_errors(model: type[Any], trainer: Any, arguments: Any, kind: type[RaylitError], words: str) -> None:
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(kind, match=words):
        make(**trainer).lr_find(net, **{"train_dataloaders": DataLoader(data(), batch_size=8), **arguments})
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_is_no_model_and_a_call_within_a_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.lr_find\(\) needs a model"):
        make().lr_find()
    for call in ("lr_find", "scale_batch_size"):
        with pytest.raises(ConfigError, match=f"trainer.{call}.. cannot be called inside a run"):
            getattr(WorkerTrainer(), call)(Net())
