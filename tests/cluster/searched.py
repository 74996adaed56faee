"""What ``test_search.py`` searches over: ``python -m tests.cluster.searched FOLDER``, the cluster in ``RAY_ADDRESS``.

The folder has ``search.json`` (see ``Search``). Trials write into ``notes`` in it where they start and how far they
are, and wait where the test has asked them to; what came of the search is in ``results.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from tests.chaos.faults import wait_for
from tests.cluster.resized import said

SEED, EPOCHS, BATCHES, BATCH = 5, 3, 8, 2  # batches and samples of them for each worker
HELD_AT = (1, 5)  # epoch and batch at which trials wait; validation, and with it a checkpoint, was after 4 batches
GOAL = {"metric": "val_loss", "mode": "min"}


@dataclass(frozen=True)
class Search:
    """One search. Trials are called by their learning rates."""

    rates: list[float]
    workers: int = 1
    max_failures: int = 0
    at_once: int | None = None
    held: tuple[float, ...] = ()  # they wait at ``HELD_AT`` until there is a note "go", at their first start only
    worker_dies: float | None = None  # the last worker of this trial is killed there, once
    driver_dies: float | None = None  # the driver is killed when it has this trial's second checkpoint
    restored: bool = False  # goes on with the search that is there

    def write(self, folder: Path) -> None:
        """Leave it for the search's processes."""
        (folder / "notes").mkdir(parents=True, exist_ok=True)
        (folder / "search.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Search:
        """Read what ``write`` left."""
        return cls(**json.loads((folder / "search.json").read_text()))


class Net(raylit.Module):
    """Dropout, a schedule and logged values; ``folder``: where it says what happens, none: it just trains."""

    def __init__(self, lr: float = 0.05, folder: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.notes = Path(folder) / "notes" if folder else None
        self.held = self.dies = False

    def on_train_start(self) -> None:
        if self.notes is None:
            return
        import ray
        import ray.util

        search, mine = Search.read(self.notes.parent), f"{self.hparams.lr}-{self.global_rank}"
        attempt = len(list(self.notes.glob(f"start-{mine}-*")))
        self.held = attempt == 0 and self.hparams.lr in search.held
        self.dies = attempt == 0 and self.hparams.lr == search.worker_dies and self.global_rank == search.workers - 1
        said(self.notes / f"start-{mine}-{attempt}", {
            "node": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address(),
            "step": self.global_step, "pid": os.getpid(), "workers": self.world_size,
        })  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == HELD_AT and self.notes is not None:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.held:
                said(self.notes / f"held-{self.hparams.lr}-{self.global_rank}", self.global_step)
                wait_for((self.notes / "go").exists, "the test lets trials go on")
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Data(raylit.DataModule):
    """As many samples as ``workers`` see in ``BATCHES`` batches, in a new order each epoch."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> Any:
        return self._loader(self.workers * BATCHES * BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(self.workers * 3 * BATCH, shuffle=False)

    def _loader(self, samples: int, shuffle: bool) -> DataLoader[Any]:
        x = torch.arange(3.0 * samples).reshape(samples, 3).sin()
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=BATCH, shuffle=shuffle)


class KillsTheDriver(tune.Callback):
    """Kills it when a trial has its second checkpoint: the first is gone, and Tune has not yet written this down."""

    def __init__(self, rate: float, mark: Path) -> None:
        self._rate, self._mark, self._saved = rate, mark, 0

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._saved += trial.config["lr"] == self._rate
        if self._saved == 2 and not self._mark.exists():  # Tune takes its callbacks up again with the search
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(workers: int = 0, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(num_workers=workers, max_epochs=EPOCHS, val_check_interval=0.5, logger=False, use_gpu=False,
                          enable_model_summary=False, **given)  # fmt: skip


def alone(rate: float, workers: int = 0, **given: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fit the Module by itself, as a trial of this rate would; its metrics and weights."""
    raylit.seed_everything(SEED)
    model = Net(rate)
    result = trainer(workers, enable_progress_bar=False, **given).fit(model, datamodule=Data(max(workers, 1)))
    return result.metrics, dict(model.state_dict())


def main(folder: Path) -> None:
    search = Search.read(folder)
    raylit.seed_everything(SEED + search.restored)  # a search that is taken up goes on with what it began with
    storage = folder / "results"
    callbacks = [] if search.driver_dies is None else [KillsTheDriver(search.driver_dies, folder / "killed")]
    what: dict[str, Any] = {
        "param_space": {"lr": tune.grid_search(search.rates), "folder": str(folder)},
        "tune_config": tune.TuneConfig(**GOAL, max_concurrent_trials=search.at_once),
        "datamodule": Data(search.workers),
    }
    if search.restored:
        tuner = raylit.Tuner.restore(str(storage / "search"), Net, trainer=trainer(search.workers), **what)
    else:
        tuner = raylit.Tuner(
            Net, trainer=trainer(search.workers, storage_path=str(storage), name="search"), dry_run=False,
            run_config=tune.RunConfig(
                failure_config=tune.FailureConfig(max_failures=search.max_failures), callbacks=callbacks
            ), **what,
        )  # fmt: skip
    results = tuner.fit()
    rows = {result.config["lr"]: {
        "metrics": result.metrics, "error": None if result.error is None else str(result.error),
        "path": result.path, "checkpoint": None if result.checkpoint is None else result.checkpoint.path,
    } for result in results}  # fmt: skip
    said(folder / "results.json", {"best": results.get_best_result().config["lr"], "rows": list(rows.items())})


if __name__ == "__main__":
    from tests.cluster.searched import main as run_it  # the Module travels by its module's name, not by its code

    run_it(Path(sys.argv[1]))
