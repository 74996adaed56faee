"""Fits whose storage fails under them: a disk that is full, a permission that is taken away. Training goes on.

The disk is a real one: a small tmpfs in a mount namespace of a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import PyFileSystem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from tests.unit.checkpoint.faulty import Handler, Memory, no_permission

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
    import errno, json, os, sys, threading, time, warnings
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    import raylit
    from raylit.callbacks import ModelCheckpoint
    from raylit.checkpoint.folder import Folder
    from raylit.checkpoint.store import Store

    disk, elsewhere = sys.argv[1:]
    filler = os.path.join(disk, "filler")
    store = Store(Folder(os.path.join(disk, "run", "checkpoints")))
    found = {}


    class Net(raylit.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)


    class Neighbour(raylit.Callback):
        def on_train_batch_end(self, trainer, module):
            if trainer.global_step == 6:
                while not store.manifests():  # it is written beside training
                    time.sleep(0.01)
                with open(filler, "wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(b"x" * 4096)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
            if trainer.global_step == 14:
                while any(thread.name == "raylit-checkpoint" for thread in threading.enumerate()):
                    time.sleep(0.01)  # the one of step 12 has found the disk full, too
                found["while full"] = [[each.step, store.faults(each)] for each in store.manifests()]
                found["no manifest"] = [each.name for each in store.survey() if each.manifest is None]
                os.unlink(filler)


    def fit(storage, callbacks):
        torch.manual_seed(0)
        module = Net()
        raylit.Trainer(
            num_workers=0, use_gpu=False, max_epochs=1, logger=False, storage_path=storage, name="run",
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        ).fit(module, DataLoader(TensorDataset(torch.ones(16, 64))))
        return module


    saver = ModelCheckpoint(every_n_train_steps=4, save_last=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        module = fit(disk, [saver, Neighbour()])
    found["at the end"] = [[each.step, store.faults(each)] for each in store.manifests()]
    found["warned"] = [str(each.message) for each in warned]
    untouched = fit(elsewhere, [])
    weights = zip(module.state_dict().values(), untouched.state_dict().values())
    found["same"] = all(torch.equal(a, b) for a, b in weights)
    print("FOUND " + json.dumps(found))
"""


def may_mount() -> bool:
    """True where this process may make a mount namespace and a tmpfs in it."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs Linux and the right to mount a tmpfs in a namespace")
def test_a_full_disk_costs_the_checkpoints_that_it_has_no_room_for(tmp_path: Path) -> None:
    disk, script = tmp_path / "disk", tmp_path / "train.py"
    disk.mkdir()
    lines = SCRIPT.strip("\n").splitlines()
    script.write_text("\n".join(line[4:] for line in lines))
    inside = 'mount -t tmpfs -o size=512k tmpfs "$1" && exec "$2" "$3" "$1" "$4"'
    arguments = [str(disk), sys.executable, str(script), str(tmp_path / "elsewhere")]
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", *arguments], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.split("FOUND ")[1])
    assert found["while full"] == [[4, []]]  # whole, and not deleted for one that was never finished
    assert found["no manifest"] == []  # nor does half of one take the room
    assert found["at the end"] == [[16, []]]
    assert found["same"] and found["warned"] == []
    told = [line for line in (run.stdout + run.stderr).splitlines() if "checkpoint" in line and "FOUND" not in line]
    failed, again = told  # a line when it begins, though two saves failed, and one when it is over
    assert failed.startswith("a checkpoint could not be written, what was kept stays: ")
    assert "epoch=0-step=8: OSError: [Errno 28] No space left on device" in failed
    assert again.startswith("checkpoints are written again: ") and again.endswith("epoch=0-step=16")


class Net(raylit.Module):
    def __init__(self, lose: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.layer, self._lose = nn.Linear(4, 1), lose

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self) -> None:
        if self.global_step == 6:
            self._lose()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module: Net, **given: Any) -> Net:
    raylit.Trainer(
        num_workers=0, use_gpu=False, max_epochs=1, logger=False, name="run", log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **given,
    ).fit(module, DataLoader(TensorDataset(torch.ones(16, 4))))  # fmt: skip
    return module


def test_a_permission_that_is_lost_costs_the_checkpoints_after_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import RunConfig

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory, lost = Memory(), []

    def fault(operation: str) -> None:
        if lost:
            no_permission(operation)

    storage = RunConfig(name="run", storage_path="/store", storage_filesystem=PyFileSystem(Handler(memory.fs, fault)))
    store = Store(Folder("/store/run/checkpoints", PyFileSystem(Handler(memory.fs, lambda operation: None))))

    def lose() -> None:
        while not store.manifests():  # it is written beside training
            time.sleep(0.01)
        lost.append(True)

    torch.manual_seed(0)
    module = Net(lose)
    with pytest.warns(UserWarning, match="could not be kept|could not be copied") as warned:
        fit(module, run_config=storage, callbacks=[ModelCheckpoint(every_n_train_steps=4)])
    torch.manual_seed(0)
    untouched = fit(Net(), storage_path=str(tmp_path / "elsewhere"))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), untouched.state_dict().values()))

    (kept,) = store.manifests()
    assert kept.step == 4 and store.faults(kept) == ()
    told = [line for line in "".join(capfd.readouterr()).splitlines() if "could not be written" in line]
    assert len(told) == 1 and "epoch=0-step=8: PermissionError" in told[0]
    texts = [str(each.message) for each in warned]
    assert [text.split(":")[0] for text in texts if "end of the fit" in text] == [
        "the state at the end of the fit could not be kept"
    ]
    (left,) = tmp_path.glob("raylit-*/history.parquet")  # what could not go to the storage either
    assert any("could not be copied" in text and str(left.parent) in text for text in texts)
