"""What a run of the chaos test trains: ``python -m tests.chaos.train FOLDER``, with the cluster in ``RAY_ADDRESS``.

The folder has ``run.json`` (see ``faults.Run``); checkpoints go to ``disk`` in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import ModelCheckpoint
from tests.chaos.faults import BATCHES, EPOCHS, VALIDATED_EVERY, VALIDATION_BATCHES, Disturber, Run, leave

BATCH_SIZE, WORKERS = 4, 2
SAMPLES = WORKERS * BATCH_SIZE * BATCHES


class Net(raylit.Module):
    """Dropout, logged values, and ids of samples as outputs of its steps; writes into ``folder`` what happens."""

    def __init__(self, run: Run, folder: Path, undisturbed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(run.seed)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
        self.run, self.folder, self.undisturbed = run, folder, undisturbed
        self.disturber: Disturber | None = None
        self.attempt, self.told = 0, False

    def on_train_start(self) -> None:
        if self.undisturbed:
            return
        import ray
        import ray.util

        self.attempt = len(list(self.folder.glob(f"start-{self.global_rank}-*")))
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        leave(self.folder, f"start-{self.global_rank}-{self.attempt}", node=node, address=address,
              step=self.global_step)  # fmt: skip
        if self.attempt == 0:
            self.disturber = Disturber(self.run, self.folder, self.global_rank)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        if self.disturber is not None:
            self.disturber.before_step(self.global_step)
        loss = (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "ids": batch[1]}

    def on_train_batch_end(self) -> None:
        if not self.told and not self.undisturbed:
            self.told = True
            leave(self.folder, f"first-{self.global_rank}-{self.attempt}", step=self.global_step)

    def training_epoch_end(self, outputs: list[dict[str, Tensor]]) -> None:
        ids = sorted(int(each) for output in outputs for each in output["ids"])
        leave(self.folder, f"ids-{self.current_epoch}-{self.global_rank}", ids=ids)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.disturber is not None:
            self.disturber.before_validation_batch(self.global_step, batch_idx)
        self.log("val_loss", (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def loader(samples: int, shuffle: bool) -> DataLoader[Any]:
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(samples))
    return DataLoader(TensorDataset(inputs, torch.arange(samples)), BATCH_SIZE, shuffle=shuffle)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """To train and to validate with."""
    return loader(SAMPLES, True), loader(WORKERS * BATCH_SIZE * VALIDATION_BATCHES, False)


def settings(run: Run) -> dict[str, Any]:
    return {"max_epochs": EPOCHS, "seed": run.seed, "val_check_interval": VALIDATED_EVERY, "log_every_n_steps": 1}


def keeping(run: Run) -> ModelCheckpoint:
    return ModelCheckpoint(monitor="val_loss", every_n_train_steps=run.every_n_steps, save_top_k=2, save_last=True)


def main() -> None:
    import pyarrow.feather

    folder = Path(sys.argv[1])
    run = Run.read(folder)
    model, callback = Net(run, folder), keeping(run)
    trainer = raylit.Trainer(
        num_workers=WORKERS, placement_strategy="STRICT_SPREAD", storage_path=str(folder / "disk"), name="run",
        callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False, **settings(run),
    )  # fmt: skip
    trainer.fit(model, *loaders())
    torch.save(dict(model.state_dict()), folder / "weights.pt")
    pyarrow.feather.write_feather(trainer.history, str(folder / "history.arrow"))
    kept = [callback.last_model_path, *callback.best_k_models]
    leave(folder, "facts", kept=[Path(each).parent.name for each in kept], steps=trainer.global_step)


if __name__ == "__main__":
    from tests.chaos.train import main as run_it  # the Module travels by its module's name, not by its code

    run_it()
