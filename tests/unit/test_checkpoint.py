"""Checkpoints of a fit, through the Trainer: written, loaded with ``weights_only``, gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

import raylit
from raylit.checkpoint import check_weights
from raylit.errors import CheckpointError
from tests.unit.engine.small import assert_same


class Factor:
    def __call__(self, epoch: int) -> float:
        return 0.9**epoch


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "step": lambda o: schedulers.StepLR(o, 1, gamma=0.5),
    "numpy_gamma": lambda o: schedulers.StepLR(o, 1, gamma=numpy.float64(0.5)),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "callable_object": lambda o: schedulers.LambdaLR(o, Factor()),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "warm_restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=100),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, scale_fn=lambda x: 1.0),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], [1]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "numpy_lr": lambda p: torch.optim.SGD(p, lr=numpy.float64(0.1)),
    "adamw": torch.optim.AdamW,
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
}


class Net(raylit.Module):
    def __init__(self, optimizer: str = "momentum", scheduler: str = "none") -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        torch.manual_seed(1)
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.norm(self.layer(batch)).pow(3).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        return {"optimizer": optimizer, "monitor": "loss"} | ({"lr_scheduler": scheduler} if scheduler else {})


def loader() -> DataLoader[Any]:
    return DataLoader(torch.randn(12, 3, generator=torch.Generator().manual_seed(2)), batch_size=4, shuffle=True)


def fit(tmp_path: Path, model: raylit.Module, epochs: int, ckpt_path: Any = None, **arguments: Any) -> Any:
    trainer = raylit.Trainer(
        max_epochs=epochs, num_workers=0, use_gpu=False, logger=False, enable_progress_bar=False, seed=3,
        enable_model_summary=False, storage_path=str(tmp_path), **arguments,
    )  # fmt: skip
    return trainer.fit(model, loader(), ckpt_path=ckpt_path), trainer


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((name, "none") for name in OPTIMIZERS), *(("momentum", name) for name in SCHEDULERS)],
)
def test_two_epochs_and_one_more_are_three(tmp_path: Path, optimizer: str, scheduler: str) -> None:
    whole, _ = fit(tmp_path, Net(optimizer, scheduler), 3)
    half, _ = fit(tmp_path, Net(optimizer, scheduler), 2)
    rest, trainer = fit(tmp_path, Net(optimizer, scheduler), 3, half.checkpoint)
    contents = [torch.load(Path(r.checkpoint.path) / "model.ckpt", weights_only=True) for r in (whole, rest)]
    assert (trainer.current_epoch, trainer.global_step) == (3, 9)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(contents[0][key], contents[1][key], key)


def test_paths_of_a_checkpoint(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, Net(), 1)
    folder = Path(result.checkpoint.path)
    for path in (folder, str(folder), folder / "model.ckpt", result.checkpoint):
        loaded = Net.load_from_checkpoint(path)
        assert torch.equal(loaded.norm.running_mean, Net.load_from_checkpoint(folder).norm.running_mean)


# Another model's --------------------------------------------------------------------------------------------------
def saved(module: nn.Module) -> dict[str, Any]:
    return {"state_dict": module.state_dict()}


def test_weights_that_fit_are_not_refused() -> None:
    check_weights(saved(Net()), Net())
    old = saved(Net())
    del old["state_dict"]["norm.num_batches_tracked"]  # files from before torch 0.4.1
    check_weights(old, Net())
    ready = Net()
    ready.register_load_state_dict_pre_hook(lambda module, state, *rest: state.clear())
    check_weights({"state_dict": {"anything": torch.ones(1)}}, ready)


class OwnRules(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None: ...


def test_a_layer_with_rules_of_its_own_is_left_to_itself() -> None:
    model = Net()
    model.layer = OwnRules(5, 5)
    check_weights(saved(Net()), model)


def test_faults_are_named_and_long_lists_cut() -> None:
    other = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1, bias=False) for i in range(9)})
    with pytest.raises(CheckpointError) as caught:
        check_weights(saved(other), Net())
    message = str(caught.value)
    assert "another model than Net" in message
    assert "not in the checkpoint: layer.bias, layer.weight, norm.bias, norm.running_mean, norm.running_var" in message
    assert "not in the model: layer0.weight, " in message and "and 4 more" in message


class MadeInSetup(Net):
    """Its head is made when the stage is known."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = None

    def setup(self, stage: str) -> None:
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.norm(self.layer(batch))).mean()


def test_going_on_with_layers_made_in_setup(tmp_path: Path) -> None:
    half, _ = fit(tmp_path, MadeInSetup(), 2)
    _, trainer = fit(tmp_path, MadeInSetup(), 3, half.checkpoint)
    assert trainer.global_step == 9
