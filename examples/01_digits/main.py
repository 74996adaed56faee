"""Handwritten digits: a small conv net on scikit-learn's 1,797 scanned digits of 8 x 8 pixels.

    python main.py --num-workers 2 --max-epochs 10     two Ray workers, DDP
    python main.py --num-workers 0                     the same file in this process, without Ray
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit


class Digits(raylit.DataModule):
    """1,797 pictures, shuffled once with a fixed seed: 1,297 to train on, 200 to validate, 300 to test."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), 0 to 1
        labels = torch.tensor(digits.target, dtype=torch.long)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        # The split is the same in every run and on every worker; --seed does not touch it.
        self.train, self.val, self.test = (
            TensorDataset(images[part], labels[part]) for part in order.split([1297, 200, 300])
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=200)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=300)


class Net(raylit.Module):
    """Two convolutions, one hidden layer; about 43,000 weights."""

    def __init__(self, lr: float = 3e-3, max_epochs: int = 10, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(width * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_acc", accuracy(logits, labels), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{name}_loss", F.cross_entropy(logits, labels), on_epoch=True)
        self.log(f"{name}_acc", accuracy(logits, labels), on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        # The learning rate falls to zero along half a cosine, once an epoch.
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.max_epochs)]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray workers; 0: this process, without Ray")
    parser.add_argument("--max-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="per worker")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the samples")
    # On several machines a folder or URI that all of them see; the files in clusters/ set the variable.
    parser.add_argument("--storage-path", help="where run folders are kept; RAYLIT_STORAGE says it for all runs")
    args = parser.parse_args()

    raylit.seed_everything(args.seed)
    data = Digits(args.batch_size)
    model = Net(lr=args.lr, max_epochs=args.max_epochs)
    trainer = raylit.Trainer(
        num_workers=args.num_workers, max_epochs=args.max_epochs, seed=args.seed, storage_path=args.storage_path
    )
    result = trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data)
    print(f"test accuracy: {float(metrics['test_acc']):.4f}")
    print(f"run folder: {result.path}")


if __name__ == "__main__":
    main()
