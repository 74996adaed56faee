"""Contract 7: what ``save_hyperparameters`` keeps, in every form, and where it is written."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import functools
import inspect
import pickle
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import raylit
from raylit.checkpoint import read
from raylit.errors import ConfigError
from tests.unit.engine.small import Numbers, numbers, quiet


class Plain(raylit.Module):
    def __init__(self, lr: float, width: int = 3, *, depth: int = 2, **rest: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


# -- which ones ------------------------------------------------------------------------------------------------------
def test_all_arguments_defaults_keyword_only_and_kwargs_included() -> None:
    assert Plain(0.1, color="red").hparams == {"lr": 0.1, "width": 3, "depth": 2, "color": "red"}


def test_attribute_and_item_access_are_the_same() -> None:
    hparams = Plain(0.1).hparams
    assert hparams.lr == hparams["lr"] == 0.1
    hparams.lr = 0.5
    hparams.added = 1
    assert hparams["lr"] == 0.5 and hparams["added"] == 1
    del hparams.added
    assert "added" not in hparams
    with pytest.raises(AttributeError, match="no hyperparameter 'widht'. Did you mean 'width'"):
        _ = hparams.widht
    with pytest.raises(AttributeError, match="no hyperparameter 'nothing'"):
        del hparams.nothing
    assert pickle.loads(pickle.dumps(hparams)) == copy.deepcopy(hparams) == hparams


class Names(raylit.Module):
    def __init__(self, lr: float, width: int = 3, *args: Any, **rest: Any) -> None:
        super().__init__()
        self.save_hyperparameters("width", "color")


def test_names_keep_those_alone() -> None:
    assert Names(0.1, 4, color="red").hparams == {"width": 4, "color": "red"}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    class Wrong(raylit.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters("widht")

    with pytest.raises(ConfigError, match=r"save_hyperparameters\('widht'\).*no such argument. Did you mean 'width'"):
        Wrong(1)


@dataclasses.dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclasses.dataclass
class Config:
    width: int = 3
    optim: Optim = dataclasses.field(default_factory=Optim)


class OneObject(raylit.Module):
    def __init__(self, config: Any, ignore: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(config, ignore=ignore)


@pytest.mark.parametrize(
    "config", [{"width": 3, "lr": 0.1}, argparse.Namespace(width=3, lr=0.1), dataclasses.make_dataclass(
        "Made", [("width", int, 3), ("lr", float, 0.1)])()], ids=["dict", "namespace", "dataclass"],
)  # fmt: skip
def test_one_object_gives_its_contents(config: Any) -> None:
    assert OneObject(config).hparams == {"width": 3, "lr": 0.1}
    assert OneObject(config, ignore="lr").hparams == {"width": 3}
    assert OneObject(config, ignore=["lr", "width", "unknown"]).hparams == {}


def test_nested_objects_stay_as_they_are() -> None:
    config = Config(optim=Optim(lr=0.5))
    assert OneObject(config).hparams == {"width": 3, "optim": Optim(lr=0.5)}


@pytest.mark.parametrize("given", [3, ["lr"], Config, None, SimpleNamespace(a=1)], ids=repr)
def test_objects_of_another_kind_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="takes names of __init__'s arguments, or one dict, Namespace or dataclass"):
        OneObject(given)


def test_several_objects_in_one_call_are_refused() -> None:
    class Both(raylit.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config, "config")

    with pytest.raises(ConfigError, match="names or one object: call it once for each"):
        Both({"a": 1})


def test_ignore_leaves_out() -> None:
    class Some(raylit.Module):
        def __init__(self, a: int, b: int = 2, **rest: Any) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["b", "d"])

    assert Some(1, c=3, d=4).hparams == {"a": 1, "c": 3}


def test_calls_add_up() -> None:
    class Twice(raylit.Module):
        def __init__(self, a: int, b: int = 2, config: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters("a")
            self.save_hyperparameters(config)

    assert Twice(1, config={"x": 5}).hparams == {"a": 1, "x": 5}


# -- through classes -------------------------------------------------------------------------------------------------
class Base(raylit.Module):
    def __init__(self, lr: float = 0.1, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


class Mixin:
    def __init__(self, *args: Any, flavour: str = "mild", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Wide(Mixin, Base):
    def __init__(self, extra: str, lr: float = 0.2, **kwargs: Any) -> None:
        super().__init__(lr * 10, 64, **kwargs)


def test_through_subclasses_and_mixins_what_the_person_gave_wins() -> None:
    assert Wide("x").hparams == {"extra": "x", "lr": 0.2, "width": 64, "flavour": "mild"}
    assert Wide("x", 1.0, flavour="hot").hparams == {"extra": "x", "lr": 1.0, "width": 64, "flavour": "hot"}


def test_saved_in_the_subclass_too() -> None:
    class Sub(Base):
        def __init__(self, extra: int = 1, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.save_hyperparameters()

    assert Sub(width=5).hparams == {"lr": 0.1, "width": 5, "extra": 1}


def test_other_modules_made_meanwhile_do_not_mix() -> None:
    class Outer(raylit.Module):
        def __init__(self, lr: float, depth: int = 9) -> None:
            super().__init__()
            self.inner = Base(width=8)
            self.save_hyperparameters()

    outer = Outer(0.7)
    assert outer.hparams == {"lr": 0.7, "depth": 9}
    assert outer.inner.hparams == {"lr": 0.1, "width": 8}


def wrapped(init: Any) -> Any:
    @functools.wraps(init)
    def around(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    return around


def test_through_decorators_helpers_and_odd_signatures() -> None:
    class Decorated(Base):
        @wrapped
        def __init__(this, extra: int, /, lr: float = 0.3, *rest: Any, **kwargs: Any) -> None:
            super().__init__(lr)

    assert Decorated(1, 0.3, "lost", kind="k").hparams == {"extra": 1, "lr": 0.3, "width": 3, "kind": "k"}

    class Helper(raylit.Module):
        def __init__(self, a: int = 1) -> None:
            super().__init__()
            self.keep()

        def keep(self) -> None:
            self.save_hyperparameters()

    assert Helper().hparams == {"a": 1}

    class Open(Base):
        def __init__(*args: Any, **kwargs: Any) -> None:
            Base.__init__(*args, **kwargs)

    assert Open(width=7).hparams == {"lr": 0.1, "width": 7}


def test_a_dataclass_module_and_a_datamodule() -> None:
    @dataclasses.dataclass(eq=False)
    class Data(raylit.DataModule):
        batch_size: int = 4
        folder: str = "x"

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Data(folder="y").hparams == {"batch_size": 4, "folder": "y"}


def test_frame_names_another_call() -> None:
    class Framed(raylit.Module):
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()
            keep(self, inspect.currentframe())

    def keep(module: Any, frame: Any) -> None:
        module.save_hyperparameters(frame=frame)

    assert Framed(1).hparams == {"a": 1, "b": 2}

    def build(lr: float, width: int = 3) -> raylit.Module:
        module = Numbers()
        module.save_hyperparameters(frame=inspect.currentframe())
        return module

    module = build(0.5)
    assert module.hparams["lr"] == 0.5 and module.hparams["width"] == 3


def test_outside_init_the_arguments_are_gone() -> None:
    for names in ((), ("lr",)):
        with pytest.raises(ConfigError, match="must be called in it; elsewhere give it a dict"):
            exec("Numbers().save_hyperparameters(*names)", {"Numbers": Numbers, "names": names})
    module = Numbers()
    module.save_hyperparameters({"found": 1})
    assert module.hparams == {"found": 1}


# -- property: the signature decides -----------------------------------------------------------------------------------
NAMES = [f"p{index}" for index in range(6)]


@st.composite
def signatures(draw: Any) -> tuple[str, list[str], dict[str, Any], list[str], list[str]]:
    """The parameters of an __init__ in source, those without default, a call's keywords, names to save, to ignore."""
    count = draw(st.integers(0, len(NAMES)))
    kinds = sorted(draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=count, max_size=count)))
    parts, required = [], []
    keyword_only = False
    for name, kind in zip(NAMES, kinds):  # 0: positional, 1: with default, 2: keyword-only, 3: that with default
        if kind >= 2 and not keyword_only:
            parts.append("*")
            keyword_only = True
        parts.append(f"{name}={name!r}" if kind in (1, 3) else name)
        if kind in (0, 2):
            required.append(name)
    open_ended = draw(st.booleans())
    if open_ended:
        parts.append("**rest")
    values = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=2))
    call = {name: draw(values) for name in NAMES[:count] if name in required or draw(st.booleans())}
    if open_ended:
        call |= draw(st.dictionaries(st.sampled_from(["x", "y", "z"]), values))
    there = sorted({*NAMES[:count], *call})
    return ", ".join(parts), required, call, draw(st.lists(st.sampled_from(there), unique=True) if there else st.just(
        [])), draw(st.lists(st.sampled_from([*there, "unknown"]), unique=True))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(signatures())
def test_names_and_ignore_select_from_what_the_call_bound(drawn: Any) -> None:
    parameters, _, call, names, ignore = drawn
    scope: dict[str, Any] = {"raylit": raylit, "names": names, "ignore": ignore}
    exec(
        f"class Drawn(raylit.Module):\n"
        f"    def __init__(self{', ' if parameters else ''}{parameters}):\n"
        f"        super().__init__()\n"
        f"        self.save_hyperparameters(*names, ignore=ignore)\n"
        f"class Below(Drawn):\n"
        f"    def __init__(self, *args, **kwargs):\n"
        f"        super().__init__(*args, **kwargs)\n",
        scope,
    )
    bound = inspect.signature(scope["Drawn"]).bind(**call)
    bound.apply_defaults()
    every = {**bound.arguments, **bound.arguments.get("rest", {})}
    every.pop("rest", None)
    expected = {n: v for n, v in every.items() if (not names or n in names) and n not in ignore}
    for cls in ("Drawn", "Below"):
        module = scope[cls](**call)
        assert module.hparams == module.hparams_initial == expected


# -- as first saved --------------------------------------------------------------------------------------------------
def test_hparams_initial_is_the_copy_as_first_saved() -> None:
    module = OneObject({"sizes": [1, 2], "lr": 0.1})
    module.hparams.sizes.append(3)
    module.hparams.lr = 0.5
    assert module.hparams_initial == {"sizes": [1, 2], "lr": 0.1}
    module.save_hyperparameters({"lr": 0.7, "new": 1})
    assert module.hparams == {"sizes": [1, 2, 3], "lr": 0.7, "new": 1}
    assert module.hparams_initial == {"sizes": [1, 2], "lr": 0.1, "new": 1}
    module.hparams_initial["lr"] = 9
    assert module.hparams_initial.lr == 0.1
    assert Numbers().hparams_initial == {}


class Assigns(raylit.Module):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams


@pytest.mark.parametrize("given", [{"lr": 0.1}, argparse.Namespace(lr=0.1)], ids=["dict", "namespace"])
def test_assigning_counts_as_saving(given: Any) -> None:
    module = Assigns(given)
    assert module.hparams.lr == 0.1 and module.hparams_initial == {"lr": 0.1}


# -- values of every kind --------------------------------------------------------------------------------------------
class Kind(enum.Enum):
    FAST = "fast"


def values() -> dict[str, Any]:
    return {
        "tensor": torch.arange(3.0), "scalar": np.float64(0.5), "array": np.array([1, 2]), "path": Path("a/b"),
        "kind": Kind.FAST, "optim": Optim(), "space": argparse.Namespace(a=1), "nested": {"deep": [1, (2, "x")]},
    }  # fmt: skip


UNSAFE: dict[str, Any] = {
    "lock": threading.Lock(), "fn": lambda x: x, "generator": (i for i in range(3)), "layer": nn.Linear(2, 2),
    "listed": [1, object()],
}  # fmt: skip


class Anything(Numbers):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_what_no_file_keeps_is_named_once_and_stays_in_hparams() -> None:
    with pytest.warns(UserWarning, match="cannot be written to checkpoints and hparams.yaml") as seen:
        module = Anything(lr=0.1, **UNSAFE)
    assert len(seen) == 1
    for named in (
        "lock (a lock)", "fn (a function)", "generator (a generator)", "layer (a Linear)", "listed (holds a object)",
        "Layers are saved with the weights already", "load_from_checkpoint",
    ):  # fmt: skip
        assert named in str(seen[0].message)
    assert seen[0].filename == __file__
    assert module.hparams == {"lr": 0.1, **UNSAFE}
    # What cannot be copied is the same object in the initial copy.
    assert module.hparams_initial.lock is UNSAFE["lock"] and module.hparams_initial.layer is UNSAFE["layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.save_hyperparameters({"more": 1})
    with pytest.warns(UserWarning, match=r": other \(a lock\)\. Leave") as seen:
        module.save_hyperparameters({"other": threading.Lock()})
    assert len(seen) == 1


def fit(folder: Path, module: raylit.Module, **arguments: Any) -> Any:
    return quiet(folder, enable_checkpointing=True, name="run", **arguments).fit(module, numbers(1, 2))


def test_a_fit_writes_them_to_checkpoint_and_yaml(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(tmp_path, Anything(lr=0.1, **values()))
    saved = read(result.checkpoint)["hyper_parameters"]
    torch.testing.assert_close(saved.pop("tensor"), torch.arange(3.0))
    torch.testing.assert_close(saved.pop("array"), torch.tensor([1, 2]))
    assert saved == {
        "lr": 0.1, "scalar": 0.5, "path": "a/b", "kind": "fast", "optim": {"lr": 0.1, "betas": (0.9, 0.99)},
        "space": {"a": 1}, "nested": {"deep": [1, (2, "x")]},
    }  # fmt: skip
    assert yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text()) == {
        "lr": 0.1, "tensor": [0.0, 1.0, 2.0], "scalar": 0.5, "array": [1, 2], "path": "a/b", "kind": "FAST",
        "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "space": {"a": 1}, "nested": {"deep": [1, [2, "x"]]},
    }  # fmt: skip


def test_a_fit_leaves_out_what_was_named_without_a_second_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be written"):
        module = Anything(lr=0.1, **UNSAFE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(tmp_path, module, max_epochs=2)
    assert read(result.checkpoint)["hyper_parameters"] == {"lr": 0.1}
    assert yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text()) == {"lr": 0.1}


def test_a_fit_names_what_came_after_saving(tmp_path: Path) -> None:
    module = Anything(lr=0.1)
    module.hparams.late = threading.Lock()
    module.hparams.large = torch.zeros(2000)
    with pytest.warns(UserWarning, match="hparams.yaml") as seen:
        result = fit(tmp_path, module)
    texts = [str(each.message) for each in seen]
    assert len(texts) == 2
    assert "checkpoints and hparams.yaml: late (a lock)." in texts[0]
    assert texts[1] == "not in hparams.yaml, but in the checkpoints: large"
    assert set(read(result.checkpoint)["hyper_parameters"]) == {"lr", "large"}


class Keeps(raylit.loggers.Logger):
    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None:
        self.params.update(params)


def test_logger_false_keeps_them_from_the_loggers_alone(tmp_path: Path) -> None:
    class Two(Numbers):
        def __init__(self, secret: int, shown: int) -> None:
            super().__init__()
            self.save_hyperparameters("secret", logger=False)
            self.save_hyperparameters("shown")

    logger = Keeps()
    result = fit(tmp_path, Two(1, 2), logger=logger)
    assert logger.params == {"shown": 2}
    assert read(result.checkpoint)["hyper_parameters"] == {"secret": 1, "shown": 2}
    assert yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text()) == {"secret": 1, "shown": 2}


def test_a_name_that_datamodule_and_module_share_is_lost_for_neither(tmp_path: Path) -> None:
    class Data(raylit.DataModule):
        def __init__(self, batch_size: int = 4, lr: float = 5.0) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return numbers(1)

    logger = Keeps()
    trainer = quiet(tmp_path, enable_checkpointing=True, name="run", logger=logger)
    result = trainer.fit(Anything(lr=0.1), datamodule=Data())
    expected = {"batch_size": 4, "data.lr": 5.0, "lr": 0.1}
    assert logger.params == expected == yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text())
    checkpoint = read(result.checkpoint)
    assert checkpoint["hyper_parameters"] == {"lr": 0.1}
    assert checkpoint["datamodule_hyper_parameters"] == {"batch_size": 4, "lr": 5.0}
