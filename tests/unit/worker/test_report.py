"""What a worker tells Ray Train of its checkpoints; Ray's own functions are put in a spy's place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raylit.assemble import RunSpec, worker_main
from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.store import Store
from raylit.config.trainer import parse_trainer_args
from raylit.stage import Stage
from raylit.travel import pack_spec, with_gpu
from raylit.wire import Job, World
from raylit.worker.report import report_newest
from tests.two_process.modules import Numbers, numbers
from tests.unit.checkpoint.faulty import Memory

Told = list[tuple[dict[str, float], Any, Any]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What was reported: metrics, checkpoint, and the mode of uploading."""
    import ray.train

    calls: Told = []

    def report(metrics: Any, checkpoint: Any = None, checkpoint_upload_mode: Any = None) -> None:
        calls.append((metrics, checkpoint, checkpoint_upload_mode))

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return calls


class Logs(Numbers):
    """Logs what follows from the data alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch.mean(), on_epoch=True)
        return super().training_step(batch, batch_idx)


def fit_on_a_worker(folder: Path, *callbacks: Any, **given: Any) -> None:
    config = parse_trainer_args(num_workers=1, use_gpu=False, logger=False, max_epochs=2, enable_progress_bar=False,
                                enable_model_summary=False, **given)  # fmt: skip
    spec = RunSpec(Stage.FIT, config, Logs(), loaders={"train": numbers(1, 2, 3)}, callbacks=list(callbacks),
                   run_folder=str(folder), storage=str(folder), looks_back=True)  # fmt: skip
    worker_main(Job("fit", with_gpu(pack_spec(spec), False)), World(storage_path=str(folder)), None)


def test_ray_train_is_told_of_the_newest_checkpoint_once_with_the_runs_metrics(told: Told, tmp_path: Path) -> None:
    import ray.train

    fit_on_a_worker(tmp_path, ModelCheckpoint(every_n_train_steps=1, save_top_k=-1))
    ((metrics, checkpoint, mode),) = told
    names = {each.name for each in (tmp_path / "checkpoints").iterdir()}
    assert len(names) == 7 and checkpoint.path == str(tmp_path / "checkpoints" / "epoch=1-step=6-v1")
    with checkpoint.as_directory() as there:
        assert torch.load(Path(there) / "model.ckpt", weights_only=True)["epoch"] == 2
    assert metrics == {"seen": 2.0, "seen_epoch": 2.0, "seen_step": 3.0}
    assert mode is ray.train.CheckpointUploadMode.NO_UPLOAD  # it is there already


def test_a_fit_that_keeps_nothing_reports_its_metrics(told: Told, tmp_path: Path) -> None:
    fit_on_a_worker(tmp_path, enable_checkpointing=False)
    assert [(metrics["seen_epoch"], checkpoint) for metrics, checkpoint, _ in told] == [(2.0, None)]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_names_the_checkpoint_on_whatever_storage_it_lies(
    rank: int, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks report as well, since it is a barrier."""
    import ray.train

    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))
    store: Store = Memory().store()
    report_newest(store, "a", {"loss": 1.0}, workers=2)
    ((metrics, checkpoint, _),) = told
    assert metrics == {"loss": 1.0} and (checkpoint is None) == (rank == 1)
    if rank == 0:
        assert (checkpoint.path, checkpoint.filesystem) == ("/run/checkpoints/a", store.given_filesystem)


@pytest.mark.parametrize(("workers", "reports"), [(1000, 1), (1001, 0)])
def test_more_workers_than_rays_barrier_takes_do_not_enter_it(workers: int, reports: int, told: Told) -> None:
    report_newest(Memory().store(), None, {}, workers)
    assert len(told) == reports
