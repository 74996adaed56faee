"""ModelCheckpoint in whole fits in this process: what lies in the folder, with whose metrics, and who finds it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import raylit
from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.content import FILE_NAME
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.errors import CheckpointError, ConfigError, RunExistsError, UnknownArgumentError


class Net(raylit.Module):
    """Loss and validation loss follow from the one weight, so that a file's score can be computed by hand."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.w = torch.nn.Parameter(torch.tensor([1.0]))
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = ((self.w * batch) ** 2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.score(batch))
        self.log("val/acc", -self.score(batch))

    def score(self, batch: Tensor) -> Tensor:
        return ((self.w * batch - 0.3) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def numbers(count: int = 12, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(torch.randn(count, 1, generator=torch.Generator().manual_seed(seed)), 2)  # type: ignore[arg-type]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., raylit.Trainer]:
    def make(**given: Any) -> raylit.Trainer:
        defaults: dict[str, Any] = {
            "num_workers": 0, "use_gpu": False, "max_epochs": 3, "storage_path": str(tmp_path / "runs"),
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        return raylit.Trainer(**{**defaults, **given})

    return make


def store(result: Any) -> Store:
    return Store(Folder(f"{result.path}/checkpoints"))


def kept(result: Any) -> list[str]:
    return [each.name for each in store(result).manifests()]


def weight(path: str) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["w"])


def by_hand(path: str) -> float:
    """The validation loss of a file's own weights."""
    module = Net.load_from_checkpoint(path)
    with torch.no_grad():
        return float(torch.stack([module.score(batch) for batch in numbers(4, seed=1)]).mean())


# -- what is kept ----------------------------------------------------------------------------------------------------
def test_a_fit_without_one_keeps_the_state_at_its_end(trainer: Any) -> None:
    fit = trainer()
    model = Net()
    result = fit.fit(model, numbers())
    assert kept(result) == ["epoch=2-step=18"]
    assert result.checkpoint.path == f"{result.path}/checkpoints/epoch=2-step=18"
    assert weight(f"{result.checkpoint.path}/{FILE_NAME}") == float(model.w.detach())
    assert fit.checkpoint_callback.best_model_path == f"{result.checkpoint.path}/model.ckpt"
    assert fit.checkpoint_callback.last_model_path == f"{result.checkpoint.path}/model.ckpt"
    second = fit.fit(Net(), numbers())
    assert kept(result) == kept(second) == ["epoch=2-step=18"] and second.path != result.path


def test_enable_checkpointing_false_keeps_nothing_and_refuses_one(trainer: Any) -> None:
    result = trainer(enable_checkpointing=False).fit(Net(), numbers())
    assert (
        result.checkpoint is None and result.best_checkpoints == [] and not os.path.exists(f"{result.path}/checkpoints")
    )
    with pytest.raises(ConfigError, match="enable_checkpointing=False.*ModelCheckpoint"):
        trainer(enable_checkpointing=False, callbacks=[ModelCheckpoint()]).fit(Net(), numbers())


@pytest.mark.parametrize(("lr", "best_epoch"), [(0.1, None), (0.0, 0)])
def test_the_best_by_a_metric_and_the_end(trainer: Any, lr: float, best_epoch: int | None) -> None:
    """lr=0: all are equal, and the first stays."""
    callback = ModelCheckpoint(monitor="val_loss", filename="{epoch:02d}-{val_loss:.4f}")
    result = trainer(callbacks=[callback], max_epochs=4).fit(Net(lr), numbers(), numbers(4, seed=1))
    manifests = [each for each in store(result).manifests() if each.monitor]
    best = min(manifests, key=lambda each: (each.metrics["val_loss"], each.step))
    assert callback.best_model_path == f"{result.path}/checkpoints/{best.name}/model.ckpt"
    assert float(callback.best_model_score) == pytest.approx(by_hand(callback.best_model_path))
    assert best.name.removesuffix("-v1") == f"epoch={best.epoch:02d}-val_loss={by_hand(callback.best_model_path):.4f}"
    assert best_epoch in (None, best.epoch)
    assert list(callback.best_k_models) == [callback.best_model_path] == [callback.kth_best_model_path]
    assert os.path.exists(callback.last_model_path) and len(manifests) <= 2
    assert {path.path for path, _ in result.best_checkpoints} == {
        f"{result.path}/checkpoints/{n}" for n in kept(result)
    }


@pytest.mark.parametrize("top_k", [0, 2, -1])
@pytest.mark.parametrize("save_last", [True, False, None])
def test_top_k_and_last(trainer: Any, top_k: int, save_last: bool | None) -> None:
    class Script(Net):
        """Validation losses as they are given."""

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", [3.0, 1.0, 2.0, 4.0][self.current_epoch])

    callback = ModelCheckpoint(monitor="val_loss", save_top_k=top_k, save_last=save_last, filename="{epoch}")
    result = trainer(callbacks=[callback], max_epochs=4).fit(Script(), numbers(), numbers(2))
    best = {0: [], 2: [1, 2], -1: [0, 1, 2, 3]}[top_k]
    names = {f"epoch={epoch}" for epoch in best} | ({"epoch=3"} if save_last is not False else set())
    assert set(kept(result)) == names  # the state at the end is that after the last epoch: not written twice
    assert bool(callback.last_model_path) == (save_last is not False)
    if top_k:
        assert callback.best_model_path.endswith("epoch=1/model.ckpt") and float(callback.best_model_score) == 1.0
        assert float(callback.kth_value) == (2.0 if top_k == 2 else 4.0)
    assert os.listdir(f"{result.path}/checkpoints") if names else True


def test_the_kept_best_has_the_score_of_its_own_weights(trainer: Any) -> None:
    """Lightning saves before the validation of the same step, and labels the file with a score of two steps before."""
    for monitor, mode in (("val_loss", "min"), ("val/acc", "max")):
        callback = ModelCheckpoint(monitor=monitor, mode=mode, every_n_train_steps=2, save_top_k=1, save_last=False)
        result = trainer(callbacks=[callback], val_check_interval=2).fit(Net(), numbers(), numbers(4, seed=1))
        sign = 1 if mode == "min" else -1
        assert sign * float(callback.best_model_score) == pytest.approx(by_hand(callback.best_model_path))
        (found,) = store(result).manifests()
        assert found.metrics["val_loss"] == pytest.approx(by_hand(callback.best_model_path))


def test_every_checkpoint_has_metrics_of_its_own_weights_alone(trainer: Any) -> None:
    callback = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    result = trainer(callbacks=[callback], val_check_interval=4).fit(Net(), numbers(), numbers(4, seed=1))
    seen = 0
    for each in store(result).manifests():
        if "val_loss" in each.metrics:
            seen += 1
            assert each.metrics["val_loss"] == pytest.approx(
                by_hand(f"{result.path}/checkpoints/{each.name}/model.ckpt")
            )
            assert each.step % 4 in (0, 2)  # validations: after batches 4 of 6, and with no wrap at ends
    assert seen and len(kept(result)) > 18


class Ends(Net):
    """Does something at the end of training: ``change`` says to what."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def on_train_end(self) -> None:
        if self.change == "weights":
            self.w.data.mul_(2.0)
        elif self.change == "rights":
            self.w.requires_grad_(False)


@pytest.mark.parametrize(("change", "carried"), [("nothing", True), ("rights", True), ("weights", False)])
def test_metrics_stay_with_the_weights_that_on_train_end_leaves_alone(trainer: Any, change: str, carried: bool) -> None:
    result = trainer().fit(Ends(change), numbers(), numbers(4, seed=1))
    assert ("val_loss" in store(result).manifests()[-1].metrics) is carried
    assert ("val_loss" in result.metrics_dataframe.columns) is carried


def test_a_wish_waits_for_the_metric(trainer: Any) -> None:
    """Steps 5, 10 and 15 ask; validation is at steps 6, 12 and 18 (an epoch's end each)."""
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=5, save_top_k=-1, save_last=False)
    top = ModelCheckpoint(
        monitor="val_loss", every_n_train_steps=5, save_top_k=3, filename="top-{step}", save_last=False
    )
    result = trainer(callbacks=[callback, top]).fit(Net(), numbers(), numbers(4, seed=1))
    names = kept(result)
    assert [name for name in names if name.startswith("top")] == ["top-step=6", "top-step=12", "top-step=18"]
    assert [name for name in names if not name.startswith("top")][:2] == ["epoch=0-step=5", "epoch=1-step=10"]


def test_a_training_metric_of_steps_may_be_monitored(trainer: Any) -> None:
    seen: list[float] = []

    class Falling(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(float(loss.detach()))
            return loss

    callback = ModelCheckpoint(monitor="train_loss", every_n_train_steps=1, save_last=False)
    trainer(callbacks=[callback], max_epochs=1).fit(Falling(), numbers())
    assert float(callback.best_model_score) == pytest.approx(min(seen))
    assert f"step={seen.index(min(seen)) + 1}/" in callback.best_model_path


def test_epochs_between_and_validation_points(trainer: Any) -> None:
    every = ModelCheckpoint(every_n_epochs=2, save_top_k=-1, filename="e-{epoch}", save_last=False)
    after = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=False, save_top_k=-1, filename="v-{step}",
                            save_last=False)  # fmt: skip
    result = trainer(callbacks=[every, after], max_epochs=4, val_check_interval=3).fit(Net(), numbers(), numbers(2))
    names = kept(result)
    assert [n for n in names if n.startswith("e-")] == ["e-epoch=1", "e-epoch=3"]
    assert [n for n in names if n.startswith("v-")] == [f"v-step={s}" for s in range(3, 25, 3)]


@pytest.mark.parametrize(("every_s", "steps"), [(1e-9, [1, 2, 3, 4, 5, 6]), (1e6, [])])
def test_by_time(trainer: Any, every_s: float, steps: list[int]) -> None:
    callback = ModelCheckpoint(every_n_seconds=every_s, save_top_k=-1, save_last=False)
    result = trainer(callbacks=[callback], max_epochs=1).fit(Net(), numbers())
    assert [each.step for each in store(result).manifests()] == steps


def test_weights_only_and_several_at_once(trainer: Any) -> None:
    light = ModelCheckpoint(save_weights_only=True, filename="w-{epoch}", save_top_k=-1, save_last=False)
    whole = ModelCheckpoint(filename="all")
    fit = trainer(callbacks=[light, whole])
    result = fit.fit(Net(), numbers())
    assert [n for n in kept(result) if n.startswith("w-")] == ["w-epoch=0", "w-epoch=1", "w-epoch=2"]
    saved = torch.load(light.best_model_path, weights_only=True)
    assert "optimizer_states" not in saved and set(saved["state_dict"]) == {"w"}
    assert os.listdir(os.path.dirname(light.best_model_path)) and fit.checkpoint_callbacks == [light, whole]
    with pytest.raises(CheckpointError, match="weights only"):
        trainer().fit(Net(), numbers(), ckpt_path=light.best_model_path)


def test_a_fixed_name_is_never_written_over(trainer: Any) -> None:
    callback = ModelCheckpoint(filename="only", every_n_epochs=1)
    result = trainer(callbacks=[callback], max_epochs=5).fit(Net(), numbers())
    assert len(kept(result)) == 1 and kept(result)[0].startswith("only")
    assert os.listdir(f"{result.path}/checkpoints") == kept(result)


def test_a_folder_of_its_own_is_shared_by_runs(trainer: Any, tmp_path: Path) -> None:
    results = [trainer(callbacks=[ModelCheckpoint(tmp_path / "mine", filename="x", every_n_epochs=9)]).fit(
        Net(), numbers()) for _ in range(2)]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "mine")) == ["x", "x-v1"]
    assert [os.path.basename(result.checkpoint.path) for result in results] == ["x", "x-v1"]
    assert [len(result.best_checkpoints) for result in results] == [1, 1]


def test_dirpath_may_be_a_uri(trainer: Any, tmp_path: Path) -> None:
    uri = (tmp_path / "mine").as_uri()
    callback = ModelCheckpoint(uri, monitor="val_loss", filename="{epoch}")
    given: dict[str, Any] = {"name": "one", "resume": "auto"}
    model = Net()
    result = trainer(max_epochs=2, callbacks=[callback], **given).fit(model, numbers(), numbers(4, seed=1))
    assert not os.path.exists(f"{result.path}/checkpoints") and callback.dirpath == uri
    best = callback.best_model_path.split("/")[-2]
    assert callback.best_model_path == f"{uri}/{best}/model.ckpt" and (tmp_path / "mine" / best).is_dir()
    assert float(callback.best_model_score) == pytest.approx(by_hand(callback.best_model_path))
    for path in (result.checkpoint, callback.last_model_path):
        assert torch.equal(Net.load_from_checkpoint(path).w, model.w)
    again, whole = Net(), Net()
    trainer(callbacks=[ModelCheckpoint(uri, monitor="val_loss")], **given).fit(again, numbers(), numbers(4, seed=1))
    trainer().fit(whole, numbers(), numbers(4, seed=1))
    assert torch.equal(again.w, whole.w)


def test_monitors_that_nobody_logs(trainer: Any) -> None:
    with pytest.raises(ConfigError, match=r"monitor='val_los'.*Did you mean 'val_loss'.*Logged are: train_loss, val"):
        trainer(callbacks=[ModelCheckpoint(monitor="val_los")]).fit(Net(), numbers(), numbers(2))
    callback = ModelCheckpoint(monitor="val_loss")
    result = trainer(callbacks=[callback], check_val_every_n_epoch=2, max_epochs=3).fit(Net(), numbers(), numbers(2))
    assert [each.epoch for each in store(result).manifests()] == [1, 2]  # the best, and the end
    assert callback.best_model_path.endswith("epoch=1-step=12/model.ckpt")


# -- names and arguments ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "metrics", "name"), [
    ({}, {"epoch": 1, "step": 30}, "epoch=1-step=30"),
    ({"filename": "{epoch:02d}-{loss:.2f}"}, {"epoch": 3, "loss": torch.tensor(0.123)}, "epoch=03-loss=0.12"),
    ({"filename": "{epoch:02d}-{loss:.2f}", "auto_insert_metric_name": False}, {"epoch": 3, "loss": 0.1}, "03-0.10"),
    ({"filename": "m-{val/acc:.1f}"}, {"val/acc": 0.55}, "m-val_acc=0.6"),
    ({"filename": "m-{val_loss:.2f}"}, {}, "m-val_loss=nan"),
    ({"filename": "plain.ckpt"}, {}, "plain"),
])  # fmt: skip
def test_names(given: dict[str, Any], metrics: dict[str, Any], name: str) -> None:
    callback = ModelCheckpoint(**given)
    assert callback.format_checkpoint_name(metrics) == name
    assert callback.format_checkpoint_name(metrics, ver=2) == f"{name}-v2"


@pytest.mark.parametrize(("given", "words"), [
    ({"save_top_k": 3}, "save_top_k=3.* without a monitor"),
    ({"save_top_k": -2}, "save_top_k=-2.*at least -1"),
    ({"mode": "auto"}, "mode='auto'.*'min' or 'max'"),
    ({"monitor": 3}, "monitor=3"),
    ({"every_n_epochs": 1, "every_n_train_steps": 5}, "every_n_train_steps and every_n_epochs exclude"),
    ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
    ({"train_time_interval": 5}, r"ModelCheckpoint\(train_time_interval=5\).*no unit"),
    ({"every_n_seconds": 0}, "every_n_seconds=0"),
    ({"filename": "a/{epoch}"}, "filename='a/{epoch}'.*dirpath"),
    ({"filename": "{epoch:.2q}"}, "cannot be formatted"),
    ({"filename": "{epoch"}, "open braces"),
    ({"dirpath": ""}, "dirpath=''"),
    ({"save_last": "yes"}, "save_last='yes'"),
])  # fmt: skip
def test_bad_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelCheckpoint(**given)


def test_old_names_are_told() -> None:
    with pytest.raises(UnknownArgumentError, match="period.*every_n_epochs"):
        ModelCheckpoint(period=2)


# -- last, best, resume ----------------------------------------------------------------------------------------------
def test_the_same_script_again_goes_on(trainer: Any) -> None:
    """Two epochs, then the same name with four: the run of four epochs in one go, to the bit."""
    whole = Net()
    trainer(max_epochs=4, name="whole").fit(whole, numbers())
    trainer(max_epochs=2, name="one").fit(Net(), numbers())
    with pytest.raises(RunExistsError, match="resume='auto'"):
        trainer(max_epochs=4, name="one").fit(Net(), numbers())
    again = Net()
    fit = trainer(max_epochs=4, name="one", resume="auto")
    result = fit.fit(again, numbers())
    assert torch.equal(again.w, whole.w) and fit.global_step == 24
    assert kept(result) == ["epoch=3-step=24"]  # the older one went
    assert fit.history.num_rows == 0 or fit.history["step"].to_pylist() == sorted(fit.history["step"].to_pylist())
    third = trainer(max_epochs=4, name="one", resume="auto")
    third.fit(finished := Net(), numbers())
    assert torch.equal(finished.w, whole.w) and third.global_step == 24
    longer = Net()
    trainer(max_epochs=5, name="one").fit(longer, numbers(), ckpt_path="last")
    more = Net()
    trainer(max_epochs=5).fit(more, numbers())
    assert torch.equal(longer.w, more.w)


def test_resume_auto_begins_where_nothing_is_and_needs_a_name(trainer: Any) -> None:
    result = trainer(name="new", resume="auto").fit(Net(), numbers())
    assert kept(result) == ["epoch=2-step=18"]
    with pytest.raises(ConfigError, match="resume='auto'.*give name"):
        trainer(resume="auto")
    with pytest.raises(ConfigError, match="resume='always'"):
        trainer(resume="always", name="x")


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_next_start_sweeps_up_what_was_never_finished(trainer: Any, tmp_path: Path, epochs: int) -> None:
    """Beside a whole checkpoint, and alone; what is not ours stays."""
    place = tmp_path / "runs" / "one" / "checkpoints"
    if epochs:
        trainer(max_epochs=epochs, name="one").fit(Net(), numbers())
    left = {"half": ["model.ckpt", "rank_00000.ckpt.partial"], "empty": [], "not ours": ["notes.txt"]}
    for name, files in left.items():
        (place / name).mkdir(parents=True)
        for file in files:
            (place / name / file).write_bytes(b"PK")
    again, whole = Net(), Net()
    result = trainer(name="one", resume="auto").fit(again, numbers())
    trainer().fit(whole, numbers())
    assert torch.equal(again.w, whole.w) and kept(result) == ["epoch=2-step=18"]
    assert sorted(os.listdir(place)) == ["epoch=2-step=18", "not ours"]


def test_a_damaged_newest_is_named_and_the_one_before_used(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ModelCheckpoint(save_top_k=-1)
    first = trainer(max_epochs=2, name="one", callbacks=[callback]).fit(Net(), numbers())
    assert kept(first) == ["epoch=0-step=6", "epoch=1-step=12"]
    file = Path(first.path, "checkpoints", "epoch=1-step=12", "model.ckpt")
    file.write_bytes(file.read_bytes()[:-10])
    again, whole = Net(), Net()
    fit = trainer(max_epochs=2, name="one", resume="auto", callbacks=[ModelCheckpoint(save_top_k=-1)],
                  enable_progress_bar=True)  # fmt: skip
    fit.fit(again, numbers())
    trainer(max_epochs=2).fit(whole, numbers())
    assert torch.equal(again.w, whole.w)
    told = "".join(capsys.readouterr())
    assert "passed over a damaged checkpoint" in told and "model.ckpt is truncated" in told and "from step 6" in told
    with pytest.raises(CheckpointError, match=r"epoch=1-step=12 is damaged: model.ckpt is truncated.*epoch=0-step=6"):
        trainer().fit(Net(), numbers(), ckpt_path=str(file.parent))


def test_a_missing_rank_file_is_named(trainer: Any) -> None:
    result = trainer().fit(Net(), numbers())
    os.unlink(f"{result.checkpoint.path}/rank_00000.ckpt")
    for path in (result.checkpoint, result.checkpoint.path, f"{result.checkpoint.path}/model.ckpt"):
        with pytest.raises(CheckpointError, match="rank_00000.ckpt is missing"):
            trainer(max_epochs=5).fit(Net(), numbers(), ckpt_path=path)


def test_after_a_fit_test_takes_the_best_and_says_so(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("test_w", self.w.detach().reshape(()))

    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    fit = trainer(callbacks=[callback], enable_progress_bar=True)
    model = Tested()
    fit.fit(model, numbers(), numbers(4, seed=1))
    end = float(model.w.detach())
    capsys.readouterr()
    best, other = (weight(path) for path in callback.best_k_models)
    assert fit.test(dataloaders=numbers(2))[0]["test_w"] == pytest.approx(best)
    assert f"test uses the best checkpoint, val_loss = {float(callback.best_model_score):.6g}" in "".join(
        capsys.readouterr()
    )
    assert fit.test(model, numbers(2), ckpt_path="last")[0]["test_w"] == pytest.approx(end)
    assert fit.test(model, numbers(2), ckpt_path="best")[0]["test_w"] == pytest.approx(best)
    assert fit.test(dataloaders=numbers(2), ckpt_path=callback.kth_best_model_path)[0]["test_w"] == pytest.approx(other)


def test_where_no_best_is_kept_test_uses_the_current_weights_and_says_so(
    trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("test_w", self.w.detach().reshape(()))

    kinds: list[dict[str, Any]] = [
        {}, {"callbacks": [ModelCheckpoint()]}, {"callbacks": [ModelCheckpoint(monitor="val_loss", save_top_k=0)]},
        {"enable_checkpointing": False},
    ]  # fmt: skip
    for given in kinds:
        fit = trainer(enable_progress_bar=True, **given)
        fit.fit(Tested(), numbers(), numbers(4, seed=1))
        fit.model.w.data.fill_(7.0)
        capsys.readouterr()
        assert fit.test(dataloaders=numbers(2)) == [{"test_w": 7.0}]
        assert "test uses the model's current weights" in "".join(capsys.readouterr())


def test_predict_uses_the_checkpoint_that_it_is_given(trainer: Any) -> None:
    class Predicts(Net):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.w * torch.ones(1)

    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    fit = trainer(callbacks=[callback], name="one")
    result = fit.fit(Predicts(), numbers(), numbers(4, seed=1))
    best, other = callback.best_k_models
    last = f"{result.checkpoint.path}/model.ckpt"
    assert len({weight(path) for path in (best, other, last)}) >= 2
    expected = {"best": best, "last": last, best: best, other: other, os.path.dirname(other): other}
    for given, path in expected.items():
        for maker in (fit, trainer(name="one")):  # of the fit before, and of the run of this name
            model = Predicts(lr=9.0)
            assert [float(each) for each in maker.predict(model, numbers(2), ckpt_path=given)] == [weight(path)]
            assert float(model.w.detach()) == weight(path)


def test_best_and_last_from_another_script(trainer: Any) -> None:
    callback = ModelCheckpoint(monitor="val_loss")
    first = trainer(callbacks=[callback], name="one").fit(Net(), numbers(), numbers(4, seed=1))
    other = Net()
    trainer(name="one").validate(other, numbers(4, seed=1), ckpt_path="best")
    assert float(other.w.detach()) == weight(callback.best_model_path)
    trainer(name="one").validate(other, numbers(4, seed=1), ckpt_path="last")
    assert float(other.w.detach()) == weight(f"{first.checkpoint.path}/model.ckpt")


def test_what_is_not_there(trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt_path='last' looks under the run's name, and none is given"):
        trainer().fit(Net(), numbers(), ckpt_path="last")
    with pytest.raises(CheckpointError, match=r"ckpt_path='last': there is no whole checkpoint in .*never/checkpoints"):
        trainer(name="never").fit(Net(), numbers(), ckpt_path="last")
    result = trainer(name="one").fit(Net(), numbers())
    with pytest.raises(CheckpointError, match=r"'best': no checkpoint in .* was ranked by a metric.*ModelCheckpoint"):
        trainer(name="one").validate(Net(), numbers(2), ckpt_path="best")
    shutil.rmtree(result.checkpoint.path)
    for which in ("best", "last"):
        with pytest.raises(CheckpointError, match=f"'{which}': there is no whole checkpoint in"):
            trainer(name="one").validate(Net(), numbers(2), ckpt_path=which)


# -- failures --------------------------------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_written_costs_the_checkpoint_alone(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"

    class Blocks(Net):
        def on_train_start(self) -> None:
            blocked.write_text("a file where a folder should be")

    model, whole = Blocks(), Net()
    callback = ModelCheckpoint(blocked / "in", monitor="val_loss")
    with pytest.warns(UserWarning, match="cannot be looked at|could not be kept") as caught:
        result = trainer(callbacks=[callback], enable_progress_bar=True).fit(model, numbers(), numbers(4, seed=1))
    trainer().fit(whole, numbers(), numbers(4, seed=1))
    assert torch.equal(model.w, whole.w) and result.checkpoint is None
    words = ["the state at the end of the fit could not be kept", "the checkpoints of the run cannot be looked at"]
    assert all(str(each.message).startswith(word) for each, word in zip(caught, words, strict=True))
    with pytest.raises(CheckpointError, match="Not a directory: .*blocked"):  # the next one is told before it begins
        trainer(callbacks=[callback]).fit(Net(), numbers())
    assert callback.best_model_path == "" and callback.best_k_models == {} and callback.last_model_path == ""
    assert "a checkpoint could not be written, what was kept stays" in "".join(capsys.readouterr())


def test_an_exception_leaves_what_was_kept_whole(trainer: Any) -> None:
    class Breaks(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.global_step == 14:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="broken"):
        trainer(name="one", callbacks=[ModelCheckpoint(every_n_train_steps=5)]).fit(Breaks(), numbers())
    again, whole = Net(), Net()
    result = trainer(name="one", resume="auto", callbacks=[ModelCheckpoint(every_n_train_steps=5)]).fit(
        again, numbers()
    )
    trainer().fit(whole, numbers())
    assert torch.equal(again.w, whole.w) and kept(result) == ["epoch=2-step=18"]


def test_state_dict_is_lightnings_and_goes_on_in_another_run(trainer: Any) -> None:
    callback = ModelCheckpoint(monitor="val_loss")
    result = trainer(callbacks=[callback]).fit(Net(), numbers(), numbers(4, seed=1))
    states = torch.load(f"{result.checkpoint.path}/model.ckpt", weights_only=True)["callbacks"]
    (state,) = [value for key, value in states.items() if key.startswith("ModelCheckpoint")]
    assert set(state) == {"monitor", "best_model_score", "best_model_path", "current_score", "dirpath", "best_k_models",
                          "kth_best_model_path", "kth_value", "last_model_path"}  # fmt: skip
    assert state["best_model_path"] == callback.best_model_path
    later = ModelCheckpoint(monitor="val_loss", save_top_k=0)
    trainer(callbacks=[later], max_epochs=4).fit(Net(), numbers(), numbers(4, seed=1), ckpt_path=result.checkpoint)
    assert later.best_model_path == callback.best_model_path and os.path.exists(later.best_model_path)
