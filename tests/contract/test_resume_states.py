"""A fit that goes on: when each part has its state again, and what is a part's own to keep (contract 9)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.callbacks import ModelCheckpoint
from raylit.errors import LogError
from tests.contract.resuming import FEATURES, TARGETS, Net, shuffled
from tests.contract.test_resume_trainer import fit, same_end
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import Numbers, numbers


# -- a DataModule ----------------------------------------------------------------------------------------------------
class Rising(raylit.DataModule):
    """Each epoch's data follow from a level that the DataModule counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 1.0

    def train_dataloader(self) -> Any:
        return [(torch.full((2, FEATURES), self.level + batch), torch.ones(2, TARGETS)) for batch in range(3)]

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


class Raises(Net):
    def on_train_epoch_end(self) -> None:
        self.trainer.datamodule.level += 1.0


@pytest.mark.parametrize("steps", [3, 5])
def test_a_datamodule_has_its_state_again_before_it_is_asked_for_loaders(steps: int, tmp_path: Path) -> None:
    given: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1}
    whole_data, data = Rising(), Rising()
    _, whole = fit(tmp_path, Raises(), None, datamodule=whole_data, **given)
    _, half = fit(tmp_path, Raises(), None, datamodule=Rising(), max_steps=steps, **given)
    _, rest = fit(tmp_path, Raises(), None, datamodule=data, seed=77, ckpt_path=half.checkpoint, **given)
    same_end(whole, rest)
    assert data.level == whole_data.level == 4.0


# -- when states are there -------------------------------------------------------------------------------------------
class Counting(raylit.Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Late(raylit.Module):
    """Its layers are made in ``configure_model``; notes in each hook what of the saved state is there."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.net: Any = None
        self.counting, self.saved, self.notes = counting, Tensor(), list[Any]()

    def note(self, hook: str) -> None:
        layers = self.net is not None
        optimizer = self.optimizers() if self.notes and self.notes[-1][0].endswith(("optimizers", "start")) else None
        scheduler = None if optimizer is None else self.lr_schedulers()
        self.notes.append((
            hook, layers, layers and torch.equal(self.net[0].weight, self.saved),
            None if optimizer is None else len(optimizer.state), None if scheduler is None else scheduler.last_epoch,
            self.counting.count, self.trainer.datamodule.level,
        ))  # fmt: skip

    def setup(self, stage: str) -> None:
        self.note("setup")

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.3), nn.Linear(4, TARGETS))
        self.note("configure_model")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["state_dict"]["net.0.weight"].clone()
        self.note("on_load_checkpoint")

    def configure_optimizers(self) -> Any:
        self.note("configure_optimizers")
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_pretrain_routine_start(self) -> None:
        self.note("on_pretrain_routine_start")

    def on_pretrain_routine_end(self) -> None:
        self.note("on_pretrain_routine_end")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        self.trainer.datamodule.level += 1.0


def test_each_part_has_its_state_when_the_page_says_and_late_layers_go_on_to_the_bit(tmp_path: Path) -> None:
    def run(seed: int = 1, **given: Any) -> tuple[Late, Any]:
        counting = Counting()
        model = Late(counting)
        _, result = fit(tmp_path, model, None, seed=seed, datamodule=Rising(), callbacks=[counting],
                        reload_dataloaders_every_n_epochs=1, **given)  # fmt: skip
        return model, result

    _, whole = run()
    _, half = run(max_steps=5)
    model, rest = run(seed=77, ckpt_path=half.checkpoint)
    same_end(whole, rest)
    # hook, layers, weights, parameters that the optimizer knows, epochs of the scheduler, the callback, the DataModule
    assert model.notes == [
        ("setup", False, False, None, None, 0, 1.0),
        ("configure_model", True, False, None, None, 0, 1.0),
        ("on_load_checkpoint", True, False, None, None, 0, 1.0),
        ("configure_optimizers", True, True, None, None, 0, 1.0),
        ("on_pretrain_routine_start", True, True, 0, 0, 0, 1.0),
        ("on_pretrain_routine_end", True, True, 4, 1, 5, 2.0),
    ]


# -- limits ----------------------------------------------------------------------------------------------------------
def test_max_time_counts_the_time_of_one_run_and_its_stop_goes_on_within_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("raylit.engine.fit.time", SimpleNamespace(monotonic=lambda: now_s))

    class Slow(Net):
        """A second for each batch."""

        def on_train_batch_end(self) -> None:
            nonlocal now_s
            now_s += 1.0

    trainer, whole = fit(tmp_path, Slow(), shuffled()())
    assert trainer.global_step == 12
    half, places = None, []
    for seed in (1, 77, 78):
        trainer, result = fit(tmp_path, Slow(), shuffled()(), seed=seed, max_time=timedelta(seconds=5),
                              ckpt_path=None if half is None else half.checkpoint)  # fmt: skip
        half = result
        state = torch.load(Path(half.checkpoint.path) / "model.ckpt", weights_only=True)
        places.append((state["epoch"], state["global_step"], state["loops"]["fit_loop"]["batches"]))
    assert places == [(1, 5, 1), (2, 10, 2), (3, 12, 0)]
    same_end(whole, half)


# -- what cannot go on -----------------------------------------------------------------------------------------------
class OwnReduction(Numbers):
    """Logs with a reduction of its own, and saves in ``on_train_batch_end`` of batch ``at``."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__()
        self.path, self.at = path, at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("middle", batch.mean(), on_step=False, on_epoch=True, reduce_fx=lambda values: values.median())
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at and not self.path.exists():
            self.trainer.save_checkpoint(self.path)


def test_a_reduction_of_ones_own_saved_after_the_epochs_last_batch(tmp_path: Path) -> None:
    """Nothing calls log again, which would bring the callable: an error says so. One batch earlier all is well."""
    for at in (1, 2):
        path = tmp_path / f"{at}.ckpt"
        trainer, _ = fit(tmp_path, OwnReduction(path, at), numbers(1, 5, 3), max_epochs=1)
        assert float(trainer.callback_metrics["middle"]) == 3.0
        if at == 1:
            again, _ = fit(tmp_path, OwnReduction(path, at), numbers(1, 5, 3), max_epochs=1, ckpt_path=path)
            assert float(again.callback_metrics["middle"]) == 3.0
        else:
            with pytest.raises(LogError, match=r"'middle'.*was not logged again before the epoch ended"):
                fit(tmp_path, OwnReduction(path, at), numbers(1, 5, 3), max_epochs=1, ckpt_path=path)


# -- on_save_checkpoint and on_load_checkpoint -----------------------------------------------------------------------
class Shares(Numbers):
    """Each rank has a number that the others do not know; a checkpoint holds all of them, and who wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.loaded = 0, list[Any]()

    def on_train_start(self) -> None:
        self.mine = self.mine or 10 * (self.global_rank + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["everyones"] = self.all_gather(torch.tensor(self.mine)).tolist()
        checkpoint["writer"] = self.global_rank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ranks = self.all_gather(torch.tensor(self.global_rank)).tolist()
        self.mine = checkpoint["everyones"][self.global_rank]
        self.loaded.append((checkpoint["writer"], ranks))


def shares_case(rank: int, world_size: int, storage: str, max_epochs: int) -> Any:
    ran = run_here(Shares(), numbers(1, 2, 3, 4), rank=rank, world_size=world_size, storage=storage,
                   callbacks=[ModelCheckpoint()], max_epochs=max_epochs)  # fmt: skip
    return ran.module.mine, ran.module.loaded


def test_hooks_of_checkpoints_run_on_every_rank_and_rank_0s_dictionary_is_written(
    two: Processes, tmp_path: Path
) -> None:
    assert two(shares_case, str(tmp_path), 1) == [(10, []), (20, [])]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    common = torch.load(folder / "model.ckpt", weights_only=True)
    assert (common["everyones"], common["writer"]) == ([10, 20], 0)
    for rank in range(2):
        own = torch.load(folder / f"rank_{rank:05d}.ckpt", weights_only=True)
        assert not {"everyones", "writer"} & own.keys()
    assert two(shares_case, str(tmp_path), 2) == [(10, [(0, [0, 1])]), (20, [(0, [0, 1])])]
