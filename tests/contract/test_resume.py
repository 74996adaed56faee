"""Going on from a checkpoint in the middle of an epoch is the run that was never stopped, to the bit (contract 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylit
from raylit.precision import Float16Mixed
from raylit.stage import SafePoint
from tests.contract.resuming import (
    FEATURES,
    TARGETS,
    Net,
    Noisy,
    Unsized,
    WithOutputs,
    check_every_point,
    shuffled,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before:UserWarning")


def validation() -> Any:
    return DataLoader(Noisy(6, seed=1), batch_size=3)


def with_schedulers(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [
        {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7), "interval": "step"},
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]


def test_every_batch_with_shuffling_dropout_accumulation_schedulers_and_validation() -> None:
    whole = check_every_point(
        lambda: WithOutputs(with_schedulers), shuffled(), val=validation, max_epochs=3, accumulate_grad_batches=3,
        val_check_interval=2, log_every_n_steps=1, gradient_clip_val=0.5,
    )  # fmt: skip
    names = [point for point, _ in whole.points]
    assert names[:5] == [SafePoint.BATCH, SafePoint.VALIDATION, SafePoint.BATCH, SafePoint.VALIDATION, SafePoint.EPOCH]
    assert len(names) == 3 * 5 + 1


class Several(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        loss = self.loss(batch) * (optimizer_idx + 1)
        self.log(f"loss{optimizer_idx}", loss, on_step=True, on_epoch=False)
        return loss

    def training_epoch_end(self, outputs: Any) -> None: ...


def halves(module: Any, *frequencies: int) -> Any:
    layers = list(module.net)
    first, last = torch.optim.Adam(layers[0].parameters(), 0.01), torch.optim.SGD(layers[-1].parameters(), 0.1, 0.9)
    scheduler = {"scheduler": torch.optim.lr_scheduler.StepLR(last, 2), "interval": "step"}
    if not frequencies:
        return [first, last], [scheduler]
    return (
        {"optimizer": first, "frequency": frequencies[0]},
        {"optimizer": last, "frequency": frequencies[1], "lr_scheduler": scheduler},
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_optimizers(accumulate: int) -> None:
    check_every_point(lambda: Several(halves), shuffled(), max_epochs=2, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frequencies_run_on(accumulate: int) -> None:
    check_every_point(
        lambda: Several(lambda m: halves(m, 2, 1)), shuffled(), max_epochs=3, accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
    )  # fmt: skip


class Recurrent(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.rnn, self.head = nn.GRU(FEATURES, 4, batch_first=True), nn.Linear(4, TARGETS)

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        out, hiddens = self.rnn(batch, hiddens)
        loss = nn.functional.dropout(self.head(out), 0.2).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss, "hiddens": hiddens}

    def training_epoch_end(self, outputs: Any) -> None:
        self.log("last", outputs[-1][-1]["loss"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_truncated_backpropagation_through_time() -> None:
    sequences = torch.randn(9, 6, FEATURES, generator=torch.Generator().manual_seed(3))
    check_every_point(
        Recurrent, lambda: DataLoader(sequences, batch_size=2, shuffle=True), max_epochs=2, truncated_bptt_steps=2,
        accumulate_grad_batches=2, log_every_n_steps=1,
    )  # fmt: skip


class Manual(Net):
    """Gradients are kept over batches, and zeroed before they are computed."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        if batch_idx % 2 == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.log("loss", loss, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.optimizers().step()


def test_manual_optimisation() -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    check_every_point(lambda: Manual(configure), shuffled(), max_epochs=2, log_every_n_steps=1)


class ManualGroups(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch), optimizer)
        self.manual_optimizer_step(optimizer)


def test_manual_optimisation_with_accumulation() -> None:
    check_every_point(ManualGroups, shuffled(), max_epochs=2, accumulate_grad_batches=3)


def test_closures_over_a_group() -> None:
    check_every_point(
        lambda: Net(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=2)), shuffled(), max_epochs=2,
        accumulate_grad_batches=3,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [1.0, 3])
def test_loaders_of_unknown_length(limit: Any) -> None:
    check_every_point(
        WithOutputs, lambda: DataLoader(Unsized(14), batch_size=4), max_epochs=2, limit_train_batches=limit,
        accumulate_grad_batches=2,
    )  # fmt: skip


def test_a_sequence_of_batches_and_a_limit() -> None:
    batches = [tuple(batch) for batch in DataLoader(Noisy(20), batch_size=4)]
    check_every_point(Net, lambda: batches, max_epochs=2, limit_train_batches=3, accumulate_grad_batches=2)


def test_loader_workers_and_persistent_ones() -> None:
    check_every_point(
        Net, shuffled(6, 2, num_workers=2), max_epochs=2, val_check_interval=1,
        val=lambda: DataLoader(Noisy(4, seed=1), batch_size=2, num_workers=1, persistent_workers=True),
    )  # fmt: skip


def test_validation_that_counts_over_epochs_and_a_plateau() -> None:
    def plateau(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss", "interval": "step", "frequency": 5,
                                 "strict": False}}  # fmt: skip

    check_every_point(
        lambda: Net(plateau), shuffled(), val=validation, max_epochs=3, val_check_interval=3,
        check_val_every_n_epoch=None, log_every_n_steps=2,
    )  # fmt: skip


class Measured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("spread", batch[0].std(), on_step=False, on_epoch=True, reduce_fx=torch.var)
        return super().training_step(batch, batch_idx)


def test_logged_torchmetrics_and_reductions_of_ones_own() -> None:
    check_every_point(Measured, shuffled(), max_epochs=2, log_every_n_steps=1)


def test_several_loaders_walked_together() -> None:
    def loaders() -> Any:
        return {"long": shuffled(14, 4)(), "short": shuffled(6, 4)()}

    class Both(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch["long"]) + self.loss(batch["short"])

    check_every_point(Both, loaders, max_epochs=2)


class Frozen(Net):
    """What hooks of earlier epochs have frozen stays so; the epoch's own hooks run again, and change nothing."""

    def on_train_start(self) -> None:
        with torch.no_grad():
            self.net[0].weight.mul_(0.5)

    def on_train_epoch_start(self) -> None:
        self.started = torch.rand(())
        self.log("start", 1.0)
        if self.current_epoch == 0:
            self.net[-1].requires_grad_(False)
            self.net[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.started is not None
        return super().training_step(batch, batch_idx)


def test_what_hooks_have_frozen_and_changed() -> None:
    check_every_point(lambda: Frozen(lambda m: torch.optim.SGD(m.parameters(), 0.1)), shuffled(), max_epochs=3)


class Skips(Net):
    """Some batches give no loss, and one epoch is ended by a hook."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch_idx == 2 else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def test_skipped_batches_and_an_epoch_that_a_hook_ends() -> None:
    check_every_point(Skips, shuffled(), max_epochs=3, accumulate_grad_batches=2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_precision(precision: str) -> None:
    class Cast(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    check_every_point(Cast, shuffled(), max_epochs=2, precision=precision, accumulate_grad_batches=2)


class Overflows(Net):
    """The gradients of each epoch's second batch are not finite: that step is left out, and the scale is halved."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (torch.inf if batch_idx == 1 else 1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_of_16_mixed_and_its_count_of_good_steps(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's scaler has a form for CPUs, on which a Trainer refuses this precision: here it stands in for a GPU's."""

    def scaled(name: str, device_type: str) -> Any:
        precision = Float16Mixed(device_type, init_scale=4.0)
        precision._scaler.set_growth_interval(3)
        return precision

    monkeypatch.setattr("raylit.assemble.make_precision", scaled)
    whole = check_every_point(Overflows, shuffled(), max_epochs=3, accumulate_grad_batches=accumulate)
    state = whole.end.common["raylit"]["precision"]
    # Four batches an epoch. One by one: good, bad, good, good; the third good one in a row doubles the scale again, and
    # two are counted at the end. Two by two: bad, good; so 4, 2, 1, 0.5, and one is counted.
    assert (state["scale"], state["_growth_tracker"]) == ((2.0, 2) if accumulate == 1 else (0.5, 1))
