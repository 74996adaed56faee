"""Numbers that do not depend on the number of workers: 569 tumours, harmless or malignant, by logistic regression.

    python main.py                                     tests in this process, and on 1, 2 and 3 Ray workers
    python main.py --num-workers 0                     in this process alone, without Ray

169 tumours are for testing, 13 x 13: they divide evenly by none of these numbers of workers, nor into batches of 16.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryConfusionMatrix

import raylit


class Tumours(raylit.DataModule):
    """30 measurements of each of 569 tumours, shuffled once with a fixed seed; label 1: malignant."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        given = load_breast_cancer()
        values = torch.tensor(given.data, dtype=torch.float32)
        malignant = 1 - torch.tensor(given.target)
        train, test = torch.randperm(569, generator=torch.Generator().manual_seed(0)).split([400, 169])
        values = (values - values[train].mean(0)) / values[train].std(0)
        self.train, self.test = (TensorDataset(values[part], malignant[part]) for part in (train, test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)


class Logistic(raylit.Module):
    """A weight for each measurement."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(30, 1)
        self.train_accuracy, self.accuracy, self.auroc = BinaryAccuracy(), BinaryAccuracy(), BinaryAUROC()
        self.confusion = BinaryConfusionMatrix()

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values).squeeze(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        values, malignant = batch
        logits = self(values)
        self.train_accuracy(logits, malignant)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return F.binary_cross_entropy_with_logits(logits, malignant.float())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        values, malignant = batch
        logits = self(values)
        # A mean over all tumours of all workers, not a mean of the workers' means.
        self.log("loss", F.binary_cross_entropy_with_logits(logits, malignant.float()))
        # What is logged is the object: its state is gathered from all workers, and computed once at the end.
        self.accuracy.update(logits, malignant)
        self.auroc.update(logits, malignant)
        self.log_dict({"accuracy": self.accuracy, "auroc": self.auroc})
        self.confusion.update(logits, malignant)

    def on_test_epoch_end(self) -> None:
        # Not a single number, so it cannot be logged. torchmetrics adds up the workers' counts itself; the attribute
        # comes home to the script.
        self.counts = self.confusion.compute().flatten().tolist()
        self.confusion.reset()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).sigmoid()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def by_scikit_learn(chances: Tensor, malignant: Tensor) -> tuple[float, float, float, list[int]]:
    """Return loss, accuracy, AUROC and counts, computed from all predictions at once."""
    chances, malignant = chances.double().numpy(), malignant.numpy()
    return (
        sklearn_metrics.log_loss(malignant, chances),
        sklearn_metrics.accuracy_score(malignant, chances > 0.5),
        sklearn_metrics.roc_auc_score(malignant, chances),
        sklearn_metrics.confusion_matrix(malignant, chances > 0.5).flatten().tolist(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2, 3],
                        help="test with each of these; 0: this process; the first one also trains")  # fmt: skip
    parser.add_argument("--max-epochs", type=int, default=20)
    args = parser.parse_args()

    raylit.seed_everything(0)
    data, model = Tumours(), Logistic()
    raylit.Trainer(num_workers=args.num_workers[0], max_epochs=args.max_epochs, seed=0).fit(model, datamodule=data)

    data.setup("test")
    rows, first = [], None
    for number in args.num_workers:
        # Half a CPU each, so that three workers fit on a laptop of two.
        trainer = raylit.Trainer(num_workers=number, resources_per_worker={"CPU": 0.5})
        (found,) = trainer.test(model, datamodule=data)
        chances = torch.cat(trainer.predict(model, datamodule=data))  # in the order of the data set
        first = chances if first is None else first
        off = float((chances - first).abs().max())
        rows.append((str(number), found["loss"], found["accuracy"], found["auroc"], model.counts, f"{off:.0e}"))
    rows.append(("scikit-learn", *by_scikit_learn(first, data.test.tensors[1]), ""))

    print(f"\n{'workers':<13}{'loss':<19}{'accuracy':<19}{'AUROC':<19}{'confusion':<18}predictions differ by")
    for name, loss, accuracy, auroc, counts, off in rows:
        print(f"{name:<13}{loss:<19.15f}{accuracy:<19.15f}{auroc:<19.15f}{counts!s:<18}{off}")


if __name__ == "__main__":
    main()
