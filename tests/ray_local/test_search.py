"""Searches on Ray Tune: what a trial is, what stays of it, what happens when one fails; none waits for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray import tune
from ray.tune.search import Searcher
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.errors import ConfigError, ResourceError
from raylit.plots.trials import read_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]


class Net(raylit.Module):
    """``fails``: raises in its second epoch; ``dies``: its process is killed there, once."""

    def __init__(self, lr: float = 0.1, hidden: int = 4, fails: bool = False, dies: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Dropout(0.2), torch.nn.Linear(hidden, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and self.hparams.fails:
            raise ValueError("this one fails")
        if self.current_epoch == 1 and self.hparams.dies and not Path(self.hparams.dies).exists():
            Path(self.hparams.dies).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Data(raylit.DataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def loader(self, first: int, last: int) -> Any:
        x = torch.arange(120.0).reshape(40, 3).sin()[first:last]
        data = TensorDataset(x, x.sum(1, keepdim=True))
        return DataLoader(data, batch_size=self.hparams.batch_size, shuffle=first == 0)

    def train_dataloader(self) -> Any:
        return self.loader(0, 32)

    def val_dataloader(self) -> Any:
        return self.loader(32, 40)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Trials begin with the random state of this process: which of them is better does not depend on other tests."""
    torch.manual_seed(5)


BY_LOSS: dict[str, Any] = {"metric": "val_loss", "mode": "min"}


def trainer(workers: int = 1, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(num_workers=workers, max_epochs=3, seed=3, logger=False, enable_progress_bar=False,
                          enable_model_summary=False, use_gpu=False, **given)  # fmt: skip


def search(
    folder: Path, space: dict[str, Any], workers: int = 1, tune_config: Any = None, **given: Any
) -> raylit.Tuner:
    return raylit.Tuner(
        Net, param_space=space, trainer=trainer(workers, storage_path=str(folder), name="search"),
        tune_config=tune_config or tune.TuneConfig(**BY_LOSS), datamodule=Data(), **given,
    )  # fmt: skip


def validated(checkpoint: Any) -> float:
    model = Net.load_from_checkpoint(checkpoint)
    return float(trainer(0).validate(model, datamodule=Data())[0]["val_loss"])


def test_what_a_search_gives(tmp_path: Path) -> None:
    """Four trials of one worker on two CPUs, one of which fails: Ray Train's own recipe waits for ever here."""
    space = {"lr": tune.grid_search([0.01, 0.05]), "hidden": 3, "fails": tune.grid_search([False, True]),
             "data.batch_size": 8}  # fmt: skip
    results = search(tmp_path, space).fit()
    assert len(results) == 4 and len(results.errors) == 2
    assert all("this one fails" in str(error) for error in results.errors)
    for result in results:
        folder = Path(result.path)
        saved = yaml.safe_load((folder / "hparams.yaml").read_text())
        own = {key: value for key, value in result.config.items() if "." not in key}
        assert {key: saved[key] for key in own} == own and saved["batch_size"] == 8
        assert result.checkpoint is not None  # of a failed one too: the state of its last report
        model = Net.load_from_checkpoint(result.checkpoint)
        assert {key: model.hparams[key] for key in own} == own
        assert validated(result.checkpoint) == pytest.approx(result.metrics["val_loss"], rel=1e-5)
        assert result.metrics["epoch"] == (1 if result.config["fails"] else 3)
    best = results.get_best_result()
    table = results.get_dataframe()
    assert best.metrics["val_loss"] == table["val_loss"].min() and set(table["config/lr"]) == {0.01, 0.05}


def test_a_trial_is_the_run_of_its_configuration_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    best = search(tmp_path, {"lr": 0.05, "hidden": 3}).fit().get_best_result()
    torch.set_rng_state(state)
    model = Net(lr=0.05, hidden=3)
    result = trainer(0, storage_path=str(tmp_path / "alone")).fit(model, datamodule=Data())
    theirs = Net.load_from_checkpoint(best.checkpoint).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert {name: best.metrics[name] for name in result.metrics} == result.metrics


def test_trials_of_two_workers_on_two_cpus_come_one_after_the_other(tmp_path: Path) -> None:
    results = search(tmp_path, {"lr": tune.grid_search([0.01, 0.05, 0.1])}, workers=2).fit()
    assert not results.errors and len(results) == 3
    for result in results:
        files = sorted(os.listdir(result.checkpoint.path))
        assert {"model.ckpt", "rank_00000.ckpt", "rank_00001.ckpt"} <= set(files)
        assert validated(result.checkpoint) == pytest.approx(result.metrics["val_loss"], rel=1e-5)


class Noted(Net):
    """Its workers leave their process ids in ``folder``."""

    def __init__(self, lr: float = 0.1, folder: str = "") -> None:
        super().__init__(lr)
        self.save_hyperparameters()

    def on_fit_start(self) -> None:
        (Path(self.hparams.folder) / f"{self.hparams.lr}-{self.global_rank}").write_text(str(os.getpid()))


class KillsAnIdleWorker(tune.Callback):
    """Once a trial has the processes of the one before, and has not begun."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        others = [file for file in self._folder.glob("*-1") if not file.name.startswith(str(trial.config["lr"]))]
        for each in others:
            process = psutil.Process(int(each.read_text()))
            process.kill()
            process.wait(60)


def test_a_worker_that_dies_between_two_trials_costs_neither(tmp_path: Path) -> None:
    run_config = tune.RunConfig(callbacks=[KillsAnIdleWorker(tmp_path)])
    results = raylit.Tuner(
        Noted, param_space={"lr": tune.grid_search([0.01, 0.05]), "folder": str(tmp_path)}, run_config=run_config,
        trainer=trainer(2, storage_path=str(tmp_path / "results"), name="search"), datamodule=Data(), dry_run=False,
    ).fit()  # fmt: skip
    assert not results.errors and [result.metrics["epoch"] for result in results] == [3, 3]
    pids = {rank: {(tmp_path / f"{lr}-{rank}").read_text() for lr in (0.01, 0.05)} for rank in (0, 1)}
    assert len(pids[0]) == len(pids[1]) == 2  # the other one's place is in a group that is gone


class EndsBadly(Net):
    """One trial's end takes the process with it."""

    def teardown(self, stage: str) -> None:
        if self.hparams.lr == 0.01:
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_end_of_a_stopped_trial_that_kills_its_process_is_not_the_end_of_the_next_one(tmp_path: Path) -> None:
    """Which has the process by then: to lose it is one of the failures that it may have."""
    results = raylit.Tuner(
        EndsBadly, param_space={"lr": tune.grid_search([0.01, 0.05, 0.02, 0.03])}, datamodule=Data(), dry_run=False,
        trainer=trainer(1, storage_path=str(tmp_path), name="search", max_failures=1),
        run_config=tune.RunConfig(stop={"epoch": 2}),
    ).fit()  # fmt: skip
    assert not results.errors and [result.metrics["epoch"] for result in results] == [2, 2, 2, 2]


def test_a_killed_trial_goes_on_to_the_bit(tmp_path: Path) -> None:
    """With FailureConfig; the mark is not a hyperparameter that training depends on."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = search(tmp_path / "whole", {"lr": 0.05, "dies": ""}).fit()[0]
    torch.set_rng_state(state)
    mark = tmp_path / "mark"
    run_config = tune.RunConfig(failure_config=tune.FailureConfig(max_failures=1))
    killed = search(tmp_path / "killed", {"lr": 0.05, "dies": str(mark)}, run_config=run_config, dry_run=False).fit()[0]
    assert mark.exists() and killed.error is None
    mine, theirs = (Net.load_from_checkpoint(each.checkpoint).state_dict() for each in (killed, whole))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_schedulers_stop_and_clone(tmp_path: Path) -> None:
    from ray.tune.schedulers.pb2 import PB2

    halving = tune.schedulers.ASHAScheduler(max_t=3, grace_period=1, reduction_factor=2)
    asha = tune.TuneConfig(**BY_LOSS, scheduler=halving)
    results = search(tmp_path / "asha", {"lr": tune.grid_search([0.02, 1e-6, 1e-7, 1e-8])}, tune_config=asha).fit()
    epochs = {result.config["lr"]: result.metrics["epoch"] for result in results}
    assert epochs[0.02] == 3 and min(epochs.values()) < 3  # by far the best after each epoch
    for result in results:  # a stopped one has a usable checkpoint of its last numbers
        assert validated(result.checkpoint) == pytest.approx(result.metrics["val_loss"], rel=1e-5)
    pbt = tune.schedulers.PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=1, quantile_fraction=0.5, resample_probability=0.0,
        hyperparam_mutations={"lr": [0.08, 0.0]},
    )  # fmt: skip
    bandit = PB2(
        time_attr="training_iteration", perturbation_interval=1, quantile_fraction=0.5,
        hyperparam_bounds={"lr": [0.001, 0.08]},
    )  # fmt: skip
    for name, scheduler, worse in (("pbt", pbt, 0.0), ("pb2", bandit, 0.001)):
        config = tune.TuneConfig(**BY_LOSS, scheduler=scheduler)
        results = search(tmp_path / name, {"lr": tune.grid_search([0.08, worse])}, tune_config=config).fit()
        assert not results.errors
        for result in results:
            saved = torch.load(Path(result.checkpoint.path) / "model.ckpt", weights_only=True)
            assert saved["hyper_parameters"]["lr"] == result.config["lr"]
            assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(result.config["lr"])


def test_what_is_found_before_a_trial_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric='val_los'.*Did you mean 'val_loss'\?.*Logged are: loss, val_loss"):
        search(tmp_path, {"lr": 0.1}, tune_config=tune.TuneConfig(metric="val_los", mode="min")).fit()
    fails = type("Fails", (Net,), {"on_train_start": _raises})
    tuner = raylit.Tuner(fails, param_space={"lr": 0.1}, datamodule=Data(), trainer=trainer(storage_path=str(tmp_path)))
    with pytest.raises(ValueError, match="this one fails"):
        tuner.fit()
    with pytest.raises(ResourceError, match="no trial of this search could ever run: num_workers=3 needs 3 x"):
        search(tmp_path, {"lr": 0.1}, workers=3).fit()
    assert not list(tmp_path.iterdir())


def _raises(self: Any) -> None:
    raise ValueError("this one fails")


def test_a_search_is_taken_up_and_finished_trials_are_not_run_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    space = {"lr": tune.grid_search([0.01, 0.05]), "dies": str(mark)}
    one_at_a_time = tune.TuneConfig(**BY_LOSS, max_concurrent_trials=1)
    first = search(tmp_path, space, dry_run=False, tune_config=one_at_a_time).fit()
    assert len(first.errors) == 1  # the first trial's process was killed, the second one went through
    done = next(result for result in first if result.error is None)
    before = (Path(done.path) / "result.json").read_text()
    taken_up = raylit.Tuner.restore(first.experiment_path, Net, param_space=space, trainer=trainer(), datamodule=Data())
    again = taken_up.fit()
    assert not again.errors and len(again) == 2
    assert (Path(done.path) / "result.json").read_text() == before
    assert [result.metrics["epoch"] for result in again] == [3, 3]
    # All of it lies where the search began, also what the trial that went on has left.
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["search"]
    assert all((Path(result.path) / "hparams.yaml").exists() for result in again)
    # Metric and mode are the search's own, though this time nobody has said them.
    assert read_search(again).best.config["lr"] == again.get_best_result("val_loss", "min").config["lr"]


def test_the_same_script_goes_on_with_resume_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tuner() -> raylit.Tuner:
        shown = raylit.Trainer(num_workers=1, max_epochs=3, seed=3, logger=False, enable_model_summary=False,
                               use_gpu=False, storage_path=str(tmp_path), name="search", resume="auto")  # fmt: skip
        space = {"lr": tune.grid_search([0.01, 0.05]), "dies": str(tmp_path / "mark")}
        config = tune.TuneConfig(**BY_LOSS, max_concurrent_trials=1)
        return raylit.Tuner(Net, param_space=space, trainer=shown, tune_config=config, datamodule=Data(), dry_run=False)

    assert len(tuner().fit().errors) == 1
    capsys.readouterr()
    results = tuner().fit()
    assert not results.errors and [result.metrics["epoch"] for result in results] == [3, 3]
    said = capsys.readouterr().out
    assert said.count("trial ") == 1, said  # the other one was done
    assert "best of 2 trials" in said
    tuner().fit()
    again = capsys.readouterr().out  # nothing is left to do
    assert "trial " not in again and said[said.index("best of 2 trials") :] == again[again.index("best of 2 trials") :]


class Halves(Searcher):
    """As Ax-like searchers: the next rate is half of the one whose result it has heard."""

    def __init__(self) -> None:
        super().__init__(metric="val_loss", mode="min")
        self.heard: list[float] = []
        self._rate = 0.08

    def suggest(self, trial_id: str) -> Any:
        return {"lr": self._rate}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        assert result is not None and not error
        self.heard.append(result["val_loss"])
        self._rate /= 2


class TakesItsFolder(tune.Callback):
    """The folder of the second trial is there before Tune makes it, as after a driver that was killed once the trial
    had begun, and before Tune had written that down."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id.endswith("00000"):
            (Path(trial.local_experiment_path) / trial.trial_id.replace("00000", "00001")).mkdir()


def test_a_trial_s_files_are_where_tune_says_they_are(tmp_path: Path) -> None:
    config = tune.TuneConfig(**BY_LOSS, max_concurrent_trials=1)
    run_config = tune.RunConfig(callbacks=[TakesItsFolder()])
    space = {"lr": tune.grid_search([0.08, 0.04])}
    results = search(tmp_path, space, tune_config=config, run_config=run_config).fit()
    named = [Path(result.path).name == result.metrics["trial_id"] for result in results]
    assert named == [True, False]  # Tune has found another name
    for result in results:
        assert yaml.safe_load((Path(result.path) / "hparams.yaml").read_text())["lr"] == result.config["lr"]
        assert (Path(result.path) / "history.parquet").exists()
    taken = Path(results[1].path).with_name(results[1].metrics["trial_id"])
    assert not any(taken.iterdir())


def test_a_searcher_hears_of_each_trial_before_it_suggests_the_next(tmp_path: Path) -> None:
    searcher = Halves()
    config = tune.TuneConfig(num_samples=3, max_concurrent_trials=1, search_alg=searcher)
    results = search(tmp_path, {}, tune_config=config).fit()
    assert not results.errors and [result.config["lr"] for result in results] == [0.08, 0.04, 0.02]
    assert searcher.heard == [result.metrics["val_loss"] for result in results]
    assert [dict(Net.load_from_checkpoint(result.checkpoint).hparams)["lr"] for result in results] == [0.08, 0.04, 0.02]


def _conditional(trial: Any) -> None:
    """Which learning rates are tried depends on the size."""
    hidden = trial.suggest_categorical("hidden", [2, 3])
    trial.suggest_float("lr", *((0.001, 0.01) if hidden == 2 else (0.05, 0.1)))


def test_searchers_and_schedulers_that_pause(tmp_path: Path) -> None:
    """Optuna with a point to begin with and a nested space; HyperBand, which pauses trials; median stopping."""
    from ray.tune.search.optuna import OptunaSearch

    searcher = OptunaSearch(points_to_evaluate=[{"lr": 0.07, "hidden": 2}], seed=1)
    config = tune.TuneConfig(**BY_LOSS, num_samples=3, search_alg=searcher)
    results = search(tmp_path / "optuna", {"lr": tune.uniform(0.01, 0.1), "hidden": tune.randint(2, 5)},
                     tune_config=config).fit()  # fmt: skip
    configs = [result.config for result in results]
    assert not results.errors and {"lr": 0.07, "hidden": 2} in configs and len({each["lr"] for each in configs}) == 3
    for result in results:
        assert dict(Net.load_from_checkpoint(result.checkpoint).hparams)["lr"] == result.config["lr"]
    drawn = OptunaSearch(space=_conditional, metric="val_loss", mode="min", seed=1)  # the space is a function
    found = search(tmp_path / "conditional", {}, tune_config=tune.TuneConfig(num_samples=4, search_alg=drawn)).fit()
    assert not found.errors and len({result.config["hidden"] for result in found}) == 2
    for result in found:
        low, high = (0.001, 0.01) if result.config["hidden"] == 2 else (0.05, 0.1)
        assert low <= result.config["lr"] <= high
    pauses = tune.schedulers.HyperBandScheduler(max_t=3, reduction_factor=3)
    rates = {"lr": tune.grid_search([0.05, 0.02, 1e-7])}
    paused = search(tmp_path / "hyperband", rates, tune_config=tune.TuneConfig(**BY_LOSS, scheduler=pauses)).fit()
    assert not paused.errors and paused.get_best_result().metrics["epoch"] == 3
    assert validated(paused.get_best_result().checkpoint) == pytest.approx(paused.get_best_result().metrics["val_loss"])
    median = tune.schedulers.MedianStoppingRule(grace_period=1, min_samples_required=2)
    stopped = search(tmp_path / "median", rates, tune_config=tune.TuneConfig(**BY_LOSS, scheduler=median)).fit()
    assert not stopped.errors and all(result.checkpoint is not None for result in stopped)
