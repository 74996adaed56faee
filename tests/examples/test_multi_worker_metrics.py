"""The evaluation example: the same numbers on one, two and three workers, and those of scikit-learn."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.two_process.harness import Processes, run_here

MAIN = str(Path(__file__).resolve().parents[2] / "examples" / "04_multi_worker_metrics" / "main.py")


def evaluate(rank: int, world_size: int, batch_size: int) -> dict[str, Any]:
    """Test and predict as one of the workers, with weights that leave some tumours on the wrong side."""
    example = runpy.run_path(MAIN)
    torch.manual_seed(1)
    model, data = example["Logistic"](), example["Tumours"](batch_size)
    place = {"rank": rank, "world_size": world_size}
    tested = run_here(model, stage="test", datamodule=data, **place).outcome.result.metrics[0]
    predicted = run_here(model, stage="predict", datamodule=data, **place).outcome.result.predictions
    found = {name: float(value) for name, value in tested.items()}
    chances = None if predicted is None else torch.cat(predicted[0])
    return {**found, "counts": model.counts, "chances": chances}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return evaluate(0, 1, 16)


def test_alone_the_numbers_are_scikit_learns(alone: dict[str, Any]) -> None:
    example = runpy.run_path(MAIN)
    data = example["Tumours"]()
    data.setup("test")
    loss, accuracy, auroc, counts = example["by_scikit_learn"](alone["chances"], data.test.tensors[1])
    assert alone["counts"] == counts
    assert min(counts) > 0, "weights that make every kind of mistake"
    assert alone["loss"] == pytest.approx(loss, rel=1e-6)
    assert alone["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert alone["auroc"] == pytest.approx(auroc, rel=1e-6)


# 64: two full batches and a tail of 41. 128 on three workers: nothing but a tail.
@pytest.mark.parametrize("batch_size", [16, 64, 128])
def test_on_workers_the_numbers_are_the_same(
    alone: dict[str, Any], two: Processes, three: Processes, batch_size: int
) -> None:
    for processes in (two, three):
        ranks = processes(evaluate, batch_size)
        for found in ranks:
            assert found["counts"] == alone["counts"]
            assert found["accuracy"] == alone["accuracy"]
            assert found["auroc"] == alone["auroc"]
            # A batch's mean is a float32, and the tail is cut into other batches.
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-7)
        torch.testing.assert_close(ranks[0]["chances"], alone["chances"])


def test_runs_as_a_script(run_script: Callable[..., str]) -> None:
    out = run_script("04_multi_worker_metrics", "--num-workers", "0", "--max-epochs", "3")
    here, sklearn = (line.split(maxsplit=4) for line in out.splitlines()[-2:])
    assert (here[0], sklearn[0]) == ("0", "scikit-learn")
    assert float(here[2]) > 0.9
    assert [float(value) for value in here[1:4]] == pytest.approx([float(value) for value in sklearn[1:4]], rel=1e-6)
    assert here[4].startswith(sklearn[4])
