"""Results as Ray's ``ResultGrid`` gives them, without Ray."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass
class FakeResult:
    config: dict[str, Any] | None
    metrics: dict[str, Any] | None
    metrics_dataframe: pd.DataFrame | None = None
    error: Exception | None = None
    path: str = ""


class FakeGrid:
    def __init__(self, results: Iterable[FakeResult], experiment_path: str = "bucket/search") -> None:
        self.results, self.experiment_path = list(results), experiment_path

    def __iter__(self) -> Any:
        return iter(self.results)


def result(
    name: str, config: dict[str, Any] | None, values: Sequence[float] = (), metric: str = "val_loss", *,
    finished: bool = True, error: Exception | None = None, **more: float,
) -> FakeResult:  # fmt: skip
    """A trial that reported one value an epoch; ``more``: other metrics of every report."""
    rows = [{metric: value, "epoch": epoch, "step": 10 * epoch, "training_iteration": epoch,
             "finished": finished and epoch == len(values), **more}
            for epoch, value in enumerate(values, 1)]  # fmt: skip
    last = rows[-1] if rows else {}
    metrics = {**last, "trial_id": name, "time_total_s": 1.5, **({"config": config} if config is not None else {})}
    return FakeResult(config, metrics, pd.DataFrame(rows) if rows else None, error, f"/nowhere/{name}")


def realistic(count: int = 20, seed: int = 0) -> FakeGrid:
    """A search with ASHA: four hyperparameters, some trials stopped, two failed, one with NaN at its end."""
    draw = random.Random(seed)
    results = []
    for index in range(count):
        lr, hidden = 10 ** draw.uniform(-5, -0.5), draw.choice([32, 64, 128, 256, 512])
        optimizer, dropout = draw.choice(["sgd", "adam", "adamw"]), draw.uniform(0, 0.6)
        floor = 0.15 + 0.12 * abs(math.log10(lr) + 3) + 0.1 * abs(dropout - 0.2) + 0.1 * (optimizer == "sgd")
        speed = 1.5 + 3 * draw.random()
        curve = [floor + (2.3 - floor) * math.exp(-epoch / speed) for epoch in range(20)]
        config = {"lr": lr, "model": {"hidden": hidden, "dropout": dropout}, "optimizer": optimizer, "seed": 3}
        name = f"a3f1c_{index:05d}"
        stop = draw.choice([2, 4, 8]) if floor > 0.4 else 20
        if index in (5, 13):
            error = RuntimeError("CUDA out of memory\nmore")
            results.append(result(name, config, curve[: 3 if index == 5 else 0], finished=False, error=error))
        elif index == 9:
            results.append(result(name, config, [*curve[:4], math.nan]))
        else:
            results.append(result(name, config, curve[:stop], finished=stop == 20))
    return FakeGrid(results)
