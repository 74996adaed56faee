"""A search over hyperparameters on scikit-learn's handwritten digits: twenty trials with ASHA, or a population (PBT).

    python main.py                      20 trials, the worse ones stopped early
    python main.py --pbt                4 trials that copy the best of them and change its learning rate as they train
    python main.py --num-samples 4      a quick look
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from ray import tune
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit


class Digits(raylit.DataModule):
    """1,797 pictures of 8 x 8 pixels, the split the same in every trial: 1,297 to train on, 200 and 300 to look at."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16  # (1797, 64), 0 to 1
        labels = torch.tensor(digits.target, dtype=torch.long)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.train, self.val, self.test = (
            TensorDataset(images[part], labels[part]) for part in order.split([1297, 200, 300])
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=200)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=300)


class Net(raylit.Module):
    """One hidden layer. The defaults are a cautious guess; the search finds better ones."""

    def __init__(self, lr: float = 1e-3, hidden: int = 32, dropout: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.layers(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self.layers(images)
        self.log_dict({
            f"{stage}_loss": F.cross_entropy(logits, labels),
            f"{stage}_acc": (logits.argmax(1) == labels).float().mean(),
        })  # fmt: skip

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)


def main(argv: list[str] | None = None) -> float:
    """Search, test the winner and the defaults, and return the winner's accuracy on the test pictures."""
    parser = argparse.ArgumentParser(description="Search over a digit classifier's hyperparameters.")
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--max-epochs", type=int, default=12)
    parser.add_argument("--pbt", action="store_true", help="a population of 4 instead of independent trials")
    parser.add_argument("--num-workers", type=int, default=1, help="Ray workers of each trial")
    args = parser.parse_args(argv)

    trainer = raylit.Trainer(num_workers=args.num_workers, max_epochs=args.max_epochs, seed=1, use_gpu=False)
    rate = tune.loguniform(1e-3, 1e-1)
    if args.pbt:
        space = {"lr": rate, "hidden": 64}
        scheduler = tune.schedulers.PopulationBasedTraining(
            time_attr="epoch", perturbation_interval=3, hyperparam_mutations={"lr": rate}
        )
        config = tune.TuneConfig(metric="val_loss", mode="min", num_samples=4, scheduler=scheduler)
    else:
        space = {
            "lr": rate,
            "hidden": tune.choice([32, 64, 128]),
            "dropout": tune.uniform(0.0, 0.4),
            "data.batch_size": tune.choice([32, 64]),
        }
        scheduler = tune.schedulers.ASHAScheduler(time_attr="epoch", max_t=args.max_epochs, grace_period=2)
        config = tune.TuneConfig(metric="val_loss", mode="min", num_samples=args.num_samples, scheduler=scheduler)
    tuner = raylit.Tuner(Net, param_space=space, trainer=trainer, tune_config=config, datamodule=Digits())
    results = tuner.fit()

    best = results.get_best_result()
    tested = raylit.Trainer(num_workers=0, max_epochs=args.max_epochs, seed=1, logger=False, enable_progress_bar=False)
    winner = tested.test(Net.load_from_checkpoint(best.checkpoint), datamodule=Digits())[0]["test_acc"]
    torch.manual_seed(1)
    default = Net()
    tested.fit(default, datamodule=Digits())
    plain = tested.test(default, datamodule=Digits())[0]["test_acc"]
    print(f"test accuracy: {winner:.4f} with what was found, {plain:.4f} with the defaults")
    return winner


if __name__ == "__main__":
    main()
