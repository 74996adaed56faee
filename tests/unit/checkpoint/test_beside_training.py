"""Fits whose checkpoints are written while training goes on: what waits for what, and what is held meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import PyFileSystem
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import raylit
from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from tests.unit.checkpoint.faulty import Handler, Memory


class Net(raylit.Module):
    """``after(step)`` is called at the end of each batch."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self._after = nn.Linear(4, 1), after

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).pow(2).mean()

    def on_train_batch_end(self) -> None:
        self._after(self.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module: Net, batches: int, **given: Any) -> Any:
    return raylit.Trainer(
        num_workers=0, use_gpu=False, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        **given,
    ).fit(module, [torch.ones(2, 4)] * batches)  # fmt: skip


def on(memory: Memory, fault: Callable[[str], None]) -> Any:
    from ray.train import RunConfig

    return RunConfig(name="run", storage_path="/store", storage_filesystem=PyFileSystem(Handler(memory.fs, fault)))


def in_a_save() -> bool:
    return threading.current_thread().name == "raylit-checkpoint"


def test_training_goes_on_while_a_save_is_written() -> None:
    """The storage takes nothing of step 4's checkpoint until step 7 is done."""
    memory, go, order = Memory(), threading.Event(), list[str]()

    def fault(operation: str) -> None:
        if in_a_save() and operation == "open_output_stream" and not go.is_set():
            order.append("asked")
            assert go.wait(30), "training waits for the storage"
            order.append("written")

    def after(step: int) -> None:
        if step == 5:
            while "asked" not in order:  # so that the save has begun, and is held
                time.sleep(0.001)
        order.append(str(step))
        if step == 7:
            go.set()

    module = Net(after)
    fit(module, 9, run_config=on(memory, fault), callbacks=[ModelCheckpoint(every_n_train_steps=4, save_top_k=-1)])
    assert order.index("asked") < order.index("5") < order.index("7") < order.index("written")
    store = Store(Folder("/store/run/checkpoints", PyFileSystem(Handler(memory.fs, lambda operation: None))))
    assert [each.step for each in store.manifests()] == [4, 8, 9]
    with store.folder.fetched(store.manifests()[0].name) as folder:  # the copy of step 4, whatever came after it
        saved = torch.load(Path(folder) / "model.ckpt", weights_only=True)
    whole = Net()
    fit(whole, 4, enable_checkpointing=False)
    assert all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in whole.state_dict().items())


def test_at_most_one_copy_of_the_state_is_held_beside_the_model() -> None:
    """Each save is asked for while the one before is still being written: that waits for the next batch's end."""
    memory, next_batch, begun = Memory(), threading.Semaphore(0), set[threading.Thread]()
    taken, alive, busy = list[StorageWeakRef](), list[int](), list[bool]()

    def fault(operation: str) -> None:
        if in_a_save() and operation == "write":
            if threading.current_thread() not in begun:
                begun.add(threading.current_thread())
                assert next_batch.acquire(timeout=30)
            time.sleep(0.001)  # there is much to write yet

    def after(step: int) -> None:
        busy.append(any(thread.name == "raylit-checkpoint" for thread in threading.enumerate()))
        if step > 1:
            next_batch.release()

    class Watch(raylit.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            alive.append(sum(not each.expired() for each in taken))  # of the copies before this one
            held = [checkpoint["state_dict"], *checkpoint["optimizer_states"][0]["state"].values()]
            taken.extend(StorageWeakRef(tensor.untyped_storage()) for each in held for tensor in each.values())

        def on_train_end(self, trainer: Any, module: Any) -> None:
            next_batch.release(2)

    keeping = [ModelCheckpoint(filename=f"{name}-{{step}}", every_n_train_steps=1) for name in ("one", "two")]
    fit(Net(after), 5, run_config=on(memory, fault), callbacks=[*keeping, Watch()])
    assert len(taken) == 6 * 8 and busy == [False] + [True] * 4  # after each step, and at the end
    assert alive == [0] * 6 and all(each.expired() for each in taken)


@pytest.mark.parametrize("stored", [True, False])
def test_each_file_is_pickled_once(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files a checkpoint, on a disk and on a storage; whoever hashes or copies reads the file."""
    calls, save = list[Any](), torch.save

    def counted(content: Any, *args: Any, **kwargs: Any) -> None:
        calls.append("own" if "rank" in content else content["global_step"])
        save(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", counted)
    place = {"run_config": on(Memory(), lambda operation: None)} if stored else {"storage_path": str(tmp_path)}
    fit(Net(), 5, callbacks=[ModelCheckpoint(every_n_train_steps=2)], **place)
    assert calls == [2, "own", 4, "own", 5, "own"]
