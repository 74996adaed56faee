"""Whole Modules as they were written for Lightning 1.0 and for 2.x, in this process and on two workers.

Each is the way its documentation of the time wrote things. Two workers on shares of the data end with the weights and
the numbers of one process on all of it, and one process with those of a loop that is written by hand.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

import raylit as pl
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import FEATURES, TARGETS, assert_close, assert_equal, loader, samples

ROWS, BATCH, EPOCHS = 24, 4, 3


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, TARGETS))


# -- Lightning 1.0 -----------------------------------------------------------------------------------------------------
class Classic(pl.LightningModule):
    """Results as dicts, epoch-end hooks over outputs, the optimizer's hooks with all their arguments."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()
        self.history: list[Any] = []

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        return {"loss": loss, "size": torch.tensor(len(x))}

    def training_epoch_end(self, outputs: Any) -> None:
        losses = torch.stack([out["loss"] for out in outputs])
        self.history.append(("train", len(outputs), losses.requires_grad))
        self.log("avg_loss", losses.mean())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"val_loss": F.mse_loss(self(x), y)}

    def validation_epoch_end(self, outputs: Any) -> None:
        self.log("val_loss", torch.stack([out["val_loss"] for out in outputs]).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def backward(self, loss: Any, optimizer: Any, optimizer_idx: int) -> None:
        loss.backward()

    def optimizer_step(
        self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu, using_native_amp, using_lbfgs
    ):  # type: ignore[no-untyped-def]
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int) -> None:
        optimizer.zero_grad()

    def get_progress_bar_dict(self) -> Any:
        items = super().get_progress_bar_dict()
        items.pop("v_num", None)
        return items


class Modern(pl.LightningModule):
    """Lightning 2.x: everything logged, lists of one's own instead of outputs, hooks with fewer arguments."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()
        self.history: list[Any] = []
        self.kept: list[Any] = []

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.kept.append(loss.detach())
        self.log("avg_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.history.append(("train", len(self.kept), False))
        self.kept.clear()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "frequency": 1}}

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val,
                            gradient_clip_algorithm=gradient_clip_algorithm)  # fmt: skip


class ModernManual(Modern):
    """Manual optimisation, schedulers stepped by hand."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.trainer.num_training_batches == batch_idx + 1:
            self.lr_schedulers().step()


class ClassicManual(Classic):
    """Manual optimisation of 1.0: the Trainer's argument, the optimizer in each call."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int | None = None) -> Any:
        optimizer = self.optimizers()
        output = super().training_step(batch, batch_idx)
        self.manual_backward(output["loss"], optimizer)
        self.manual_optimizer_step(optimizer)
        return output

    def on_epoch_end(self) -> None:
        self.lr_schedulers().step()


STYLES: dict[str, Callable[[], pl.Module]] = {
    "1.0": Classic, "1.0 manual": ClassicManual, "2.x": Modern, "2.x manual": ModernManual,
}  # fmt: skip


def by_hand() -> tuple[nn.Sequential, float, float]:
    """What all of them are: the network after training, the last epoch's mean loss, and the last validation loss."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    losses: list[float] = []
    for _ in range(EPOCHS):
        losses = []
        for x, y in loader(ROWS, BATCH):
            loss = F.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    data = samples(ROWS)
    with torch.no_grad():
        val = F.mse_loss(net(data.tensors[0]), data.tensors[1]).item()
    return net, sum(losses) / len(losses), val


def fit(style: str, batch: int, rank: int = 0, world_size: int = 1) -> Any:
    arguments: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 2}
    if style == "1.0 manual":
        arguments["automatic_optimization"] = False
    return run_here(STYLES[style](), loader(ROWS, batch), val=loader(ROWS, batch), rank=rank, world_size=world_size,
                    **arguments)  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_one_process_is_the_loop_by_hand(style: str) -> None:
    net, train, val = by_hand()
    ran = fit(style, BATCH)
    assert_equal({f"net.{name}": tensor for name, tensor in net.state_dict().items()}, ran.weights)
    assert ran.metrics["avg_loss"] == pytest.approx(train, abs=1e-6)
    assert ran.metrics["val_loss"] == pytest.approx(val, abs=1e-6)
    assert ran.module.history == [("train", ROWS // BATCH, False)] * EPOCHS
    assert ran.trainer.global_step == EPOCHS * ROWS // BATCH


def case(rank: int, world_size: int, style: str) -> Any:
    ran = fit(style, BATCH // world_size, rank, world_size)
    return ran.weights, ran.metrics, ran.module.history, ran.trainer.global_step


@pytest.mark.parametrize("style", STYLES)
def test_two_workers_are_one_process(two: Processes, style: str) -> None:
    net, train, val = by_hand()
    weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    ranks = two(case, style)
    for mine, metrics, history, steps in ranks:
        assert_close(mine, weights)
        assert_equal(mine, ranks[0][0])
        assert metrics["avg_loss"] == pytest.approx(train, abs=1e-6)
        assert metrics["val_loss"] == pytest.approx(val, abs=1e-6)
        # Each worker is handed its own outputs: as many batches as in one process, each half as large.
        assert history == [("train", ROWS // BATCH, False)] * EPOCHS
        assert steps == EPOCHS * ROWS // BATCH


# -- 1.0: several optimizers, hiddens, step_end ------------------------------------------------------------------------
class ClassicPair(pl.LightningModule):
    """Two optimizers that take turns in each batch; ``training_step_end`` makes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = network(), network()
        self.history: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        x, y = batch
        net = (self.one, self.two)[optimizer_idx]
        return {"prediction": net(x), "target": y * (optimizer_idx + 1)}

    def training_step_end(self, step_output: Any) -> Any:
        return {"loss": F.mse_loss(step_output["prediction"], step_output["target"])}

    def training_epoch_end(self, outputs: Any) -> None:
        self.history.append([[sorted(out) for out in one] for one in outputs])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.one(batch[0])

    def validation_step_end(self, step_output: Any) -> Any:
        return step_output.sum(0)

    def validation_epoch_end(self, outputs: Any) -> None:
        self.history.append([tuple(out.shape) for out in outputs])

    def configure_optimizers(self) -> Any:
        return (torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.Adam(self.two.parameters(), lr=0.01))


def pair_by_hand() -> dict[str, Any]:
    one, two = network(), network()
    for net, factor, optimizer in (
        (one, 1, torch.optim.SGD(one.parameters(), lr=0.1)), (two, 2, torch.optim.Adam(two.parameters(), lr=0.01)),
    ):  # fmt: skip
        for x, y in loader(ROWS, BATCH):
            optimizer.zero_grad()
            F.mse_loss(net(x), y * factor).backward()
            optimizer.step()
    return {f"{name}.{key}": value for name, net in (("one", one), ("two", two)) for key, value in
            net.state_dict().items()}  # fmt: skip


def pair_case(rank: int, world_size: int) -> Any:
    size = BATCH // world_size
    ran = run_here(ClassicPair(), loader(ROWS, size), val=loader(ROWS, size), rank=rank, world_size=world_size)
    return ran.weights, ran.module.history


def test_two_optimizers_and_step_end(two: Processes) -> None:
    batches = ROWS // BATCH
    history = [[(TARGETS,)] * batches, [[["loss"]] * batches] * 2]  # validation comes before training_epoch_end
    weights, mine = pair_case(0, 1)
    assert_equal(weights, pair_by_hand())
    assert mine == history
    for weights, theirs in two(pair_case):
        assert_close(weights, pair_by_hand())
        assert theirs == history


class ClassicRecurrent(pl.LightningModule):
    """Truncated BPTT: hiddens from split to split, outputs a list of splits for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated_bptt_steps = 2
        torch.manual_seed(3)
        self.rnn = nn.LSTM(1, 3, batch_first=True)
        self.head = nn.Linear(3, 1)
        self.history: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        out, hiddens = self.rnn(batch, hiddens)
        return {"loss": self.head(out).pow(2).mean(), "hiddens": hiddens}

    def training_epoch_end(self, outputs: Any) -> None:
        self.history.append([[sorted(split) for split in batch] for batch in outputs])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def sequences(batch_size: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(torch.randn(8, 5, 1, generator=generator), batch_size=batch_size)  # type: ignore[arg-type]


def recurrent_by_hand() -> dict[str, Any]:
    module = ClassicRecurrent()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for batch in sequences(4):
        hiddens = None
        for split in batch.split(2, dim=1):
            out, hiddens = module.rnn(split, hiddens)
            optimizer.zero_grad()
            module.head(out).pow(2).mean().backward()
            optimizer.step()
            hiddens = tuple(h.detach() for h in hiddens)
    return dict(module.state_dict())


def recurrent_case(rank: int, world_size: int) -> Any:
    ran = run_here(ClassicRecurrent(), sequences(4 // world_size), rank=rank, world_size=world_size)
    return ran.weights, ran.module.history


def test_truncated_bptt(two: Processes) -> None:
    history = [[[["loss"]] * 3] * 2]  # one epoch, two batches, three splits
    weights, mine = recurrent_case(0, 1)
    assert_equal(weights, recurrent_by_hand())
    assert mine == history
    for weights, theirs in two(recurrent_case):
        assert_close(weights, recurrent_by_hand())
        assert theirs == history


# -- callbacks and DataModules of both eras ----------------------------------------------------------------------------
class ClassicCallback(pl.Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self.calls.append(f"batch {batch_idx} {dataloader_idx}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        self.calls.append(f"epoch {len(outputs)}")


class ModernCallback(ClassicCallback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.calls.append(f"batch {batch_idx} {sorted(outputs)}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # type: ignore[override]
        self.calls.append("epoch")


class ClassicData(pl.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: Any = None) -> None:
        if stage == "fit" or stage is None:
            self.train = samples(ROWS)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train, batch_size=self.batch_size)


def around_case(rank: int, world_size: int) -> Any:
    callbacks = [ClassicCallback(), ModernCallback()]
    run_here(Classic(), datamodule=ClassicData(8 // world_size), callbacks=callbacks, rank=rank, world_size=world_size)
    return [callback.calls for callback in callbacks]


def test_callbacks_and_datamodules(two: Processes) -> None:
    expected = [
        ["batch 0 0", "batch 1 0", "batch 2 0", "epoch 3"],
        [*(f"batch {i} ['loss', 'size']" for i in range(3)), "epoch"],
    ]
    assert around_case(0, 1) == expected
    assert two(around_case) == [expected] * 2


# -- names that raylit has and Lightning 2.x leaves free ---------------------------------------------------------------
class Named(Modern):
    def __init__(self) -> None:
        super().__init__()
        self.precision = torchmetrics.MeanMetric()  # as torchmetrics.Precision is often called
        self.datamodule = "a word"
        self.use_amp = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.precision(batch[0].mean())
        self.log("precision", self.precision)


def named_case(rank: int, world_size: int) -> Any:
    ran = run_here(Named(), loader(ROWS, 4), val=loader(ROWS, 4), rank=rank, world_size=world_size)
    return ran.module.datamodule, ran.module.use_amp, ran.metrics["precision"], ran.trainer.precision


def test_a_modules_own_attributes_go_before_those_that_lightning_2_has_not(two: Processes) -> None:
    mean = samples(ROWS).tensors[0].mean().item()
    for words, amp, logged, precision in [named_case(0, 1), *two(named_case)]:
        assert (words, amp, precision) == ("a word", True, "32-true")
        assert logged == pytest.approx(mean, abs=1e-6)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(Named())))
    assert isinstance(copied.precision, torchmetrics.MeanMetric) and copied.datamodule == "a word"
    assert "precision.mean_value" not in copied.state_dict()  # a metric's state is no weight
    assert Modern().precision == "32-true" and Modern().datamodule is None


def test_a_layer_and_a_class_attribute_of_such_a_name() -> None:
    class Own(pl.Module):
        use_dp = "mine"

        def __init__(self) -> None:
            super().__init__()
            self.use_ddp = nn.Linear(1, 1)

    module = Own()
    assert module.use_dp == "mine" and isinstance(module.use_ddp, nn.Linear) and module.use_ddp2 is False
    assert set(module.state_dict()) == {"use_ddp.weight", "use_ddp.bias"}
