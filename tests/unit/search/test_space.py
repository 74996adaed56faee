"""Which key of a search's space reaches what, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray import tune

import raylit
from raylit.errors import ConfigError
from raylit.search.space import Parts, built_datamodule, built_module, fit_config, split
from raylit.search.tuner import Tuner, first_of


class Net(raylit.Module):
    def __init__(self, lr: float, hidden: int = 4, model: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Data(raylit.DataModule):
    def __init__(self, batch_size: int = 2, path: str = "here") -> None:
        super().__init__()
        self.save_hyperparameters()


def trainer(**given: Any) -> raylit.Trainer:
    return raylit.Trainer(**{"max_epochs": 1, "logger": False, **given})


def tuner(space: dict[str, Any], module: type[raylit.Module] = Net, **given: Any) -> Tuner:
    return Tuner(module, param_space=space, trainer=given.pop("trainer", None) or trainer(), **given)


def test_keys_go_by_their_prefix() -> None:
    config = {"lr": 1, "data.batch_size": 2, "trainer.precision": "64", "model": {"a": 3}}
    assert split(config) == Parts({"lr": 1, "model": {"a": 3}}, {"batch_size": 2}, {"precision": "64"})


@pytest.mark.parametrize(
    ("space", "given", "text"),
    [
        ({}, {}, "param_space is empty"),
        ({"lr": 1.0, "hiden": 2}, {}, r"'hiden': Net.__init__ has no argument 'hiden'. Did you mean 'hidden'\?"),
        ({"hidden": 2}, {}, "Net.__init__ needs lr, and param_space has no such key"),
        ({"lr": 1.0, 3: 4}, {}, "param_space has the key 3"),
        ({"lr": 1.0, "data.batch_size": 2}, {}, "data.batch_size, and there is no DataModule"),
        ({"lr": 1.0, "data.batchsize": 2}, {"datamodule": Data()}, r"'data.batchsize': Data.*mean 'batch_size'\?"),
        ({"lr": 1.0, "trainer.percision": "64"}, {}, r"'trainer.percision': the Trainer has no such .*'precision'\?"),
        ({"lr": 1.0, "trainer.num_workers": 2}, {}, "where trials run is the same for all"),
        ({"lr": 1.0, "trainer.callbacks": ()}, {}, "which all trials copy"),
        ({"lr": 1.0, "trainer.precision": tune.choice(["64", "8"])}, {}, "precision='8'"),
        ({"lr": 1.0, "trainer.accumulate_grad_batches": tune.grid_search([1, 0])}, {}, "accumulate_grad_batches=0"),
        ({"lr": 1.0}, {"trainer": "elastic"}, r"num_workers=\(1, 2\)\): a trial has one number of workers"),
        ({"lr": 1.0}, {"tune_config": tune.TuneConfig(metric="val_loss")}, "needs mode='min' or mode='max'"),
        ({"lr": 1.0}, {"tune_config": tune.TuneConfig(mode="max")}, "needs metric="),
        ({"lr": 1.0}, {"tune_config": tune.TuneConfig(trial_name_creator=str)}, "called by their ids"),
    ],
)
def test_what_is_refused_when_the_tuner_is_made(space: dict[Any, Any], given: dict[str, Any], text: str) -> None:
    if given.get("trainer") == "elastic":
        given = {"trainer": trainer(num_workers=(1, 2))}
    with pytest.raises(ConfigError, match=text):
        tuner(space, **given)


def test_no_module_class() -> None:
    with pytest.raises(ConfigError, match="Tuner takes a Module class"):
        tuner({"lr": 1.0}, Net(1.0))  # type: ignore[arg-type]


def test_a_module_with_keywords_takes_any_key() -> None:
    class Any_(raylit.Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    tuner({"whatever": 1}, Any_)
    assert built_module(Any_, {"whatever": 1}).hparams == {"whatever": 1}


def test_a_trials_module_has_saved_what_the_search_gave_it() -> None:
    built = built_module(Net, {"lr": 0.5, "model": {"depth": 2}})
    assert dict(built.hparams) == {"lr": 0.5, "hidden": 4, "model": {"depth": 2}}

    class Forgets(raylit.Module):
        def __init__(self, lr: float) -> None:
            super().__init__()

    class Changes(raylit.Module):
        def __init__(self, lr: float) -> None:
            super().__init__()
            lr = lr * 2
            self.save_hyperparameters()

    with pytest.raises(ConfigError, match="Forgets does not save the hyperparameter 'lr'"):
        built_module(Forgets, {"lr": 1.0})
    with pytest.raises(ConfigError, match="Changes saved lr=2.0, and the search gave 1.0"):
        built_module(Changes, {"lr": 1.0})


def test_the_trainers_arguments_of_a_trial() -> None:
    base = trainer(max_epochs=7, precision="64")._config
    fit = fit_config(base, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2})
    assert (fit.max_epochs, fit.precision) == (7, "64-true")
    assert (fit.gradient_clip_val, fit.accumulate_grad_batches) == (0.5, 2)
    assert fit_config(base, {}) is base.fit
    with pytest.raises(ConfigError, match=r"param_space, trainer\.\*: .*max_epochs"):
        fit_config(base, {"max_epochs": "many"})


def test_a_datamodule_is_built_anew_with_its_other_hyperparameters() -> None:
    given = Data(path="there")
    assert built_datamodule(given, {}) is given and built_datamodule(None, {}) is None
    anew = built_datamodule(given, {"batch_size": 8})
    assert anew is not given and anew is not None and dict(anew.hparams) == {"batch_size": 8, "path": "there"}
    of_class = built_datamodule(Data, {"batch_size": 4})
    assert of_class is not None and dict(of_class.hparams) == {"batch_size": 4, "path": "here"}

    class Unsaved(raylit.DataModule):
        def __init__(self, path: str, batch_size: int = 2) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match="builds the Unsaved anew with its own batch_size"):
        built_datamodule(Unsaved("x"), {"batch_size": 3})


def test_the_first_configuration_of_a_space() -> None:
    space = {"lr": tune.loguniform(1e-3, 1e-1), "hidden": tune.grid_search([3, 5]),
             "model": {"depth": tune.choice([2])},
             "both": tune.sample_from(lambda spec: spec.config.hidden * 2)}  # fmt: skip
    first = first_of(space)
    assert 1e-3 <= first["lr"] <= 1e-1
    assert (first["hidden"], first["model"], first["both"]) == (3, {"depth": 2}, 6)
