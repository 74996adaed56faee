"""A run whose resources others hold: it says what it waits for, goes on when they are free, and ends after its time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import raylit
from raylit.driver import cluster, waiting
from raylit.errors import ResourceError


class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, workers: Any = 2, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(num_workers=workers, max_epochs=1, logger=False, use_gpu=False, storage_path=str(folder),
                          enable_model_summary=False, num_sanity_val_steps=0, **given)  # fmt: skip


def loader() -> Any:
    return DataLoader(torch.ones(8, 1), batch_size=2)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "TELL_S", 1.0)


@contextlib.contextmanager
def held(amount: float) -> Iterator[Any]:
    """So many CPUs are another's; gives a function that lets them go."""
    from ray.util import placement_group, remove_placement_group

    from raylit.driver import pool

    cluster.connect()
    pool.release()
    group = placement_group([{"CPU": amount}])
    assert group.wait(timeout_seconds=120)
    let_go = threading.Event()

    def release() -> None:
        if not let_go.is_set():
            let_go.set()
            remove_placement_group(group)

    try:
        yield release
    finally:
        release()


@pytest.mark.parametrize("stage", ["fit", "validate", "elastic"])
def test_a_run_waits_until_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It is let in when it has said what it waits for: otherwise this test would wait for ever."""
    said: list[str] = []
    with held(cluster_cpus() - 0.5) as release:
        told = waiting.told

        def then_release(*given: Any) -> str:
            said.append(told(*given))
            release()
            return said[-1]

        monkeypatch.setattr(waiting, "told", then_release)
        run = trainer(tmp_path, workers=(1, 2) if stage == "elastic" else 2)
        if stage == "validate":
            run.validate(Net(), loader())
        else:
            run.fit(Net(), loader())
            assert run.global_step == 2
    total = f"{cluster_cpus():g}"
    asked = "1 worker" if stage == "elastic" else "2 workers"
    assert said[0].startswith(f"waiting for {asked} x (1 CPU): free are 0.5 of {total} CPU on 1 node; ")
    assert said[0] in capsys.readouterr().out


def test_it_ends_after_its_time(tmp_path: Path) -> None:
    with held(cluster_cpus()):
        with pytest.raises(ResourceError, match=r"no room within 2 s. waiting for 2 workers x \(1 CPU\): free are 0"):
            trainer(tmp_path, start_timeout={"seconds": 2}).fit(Net(), loader())
        with pytest.raises(ResourceError, match="no room within 2 s"):
            trainer(tmp_path, workers=(1, 2), start_timeout={"seconds": 2}).fit(Net(), loader())
        with pytest.raises(ResourceError, match="no room within 2 s"):
            trainer(tmp_path, start_timeout={"seconds": 2}).test(Net(), loader())
    assert list(tmp_path.iterdir()) == []


def cluster_cpus() -> float:
    cluster.connect()
    return cluster.available()["CPU"]
