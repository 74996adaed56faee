"""Whatever a run holds, the checkpoint of it can be read with ``weights_only=True``; the hooks see it on its way."""

from __future__ import annotations

import enum
import math
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.checkpoint import FILE_NAME, read, write
from raylit.plain import made_safe


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 3


class Odd(enum.Enum):
    THING = object()


class Word(str):
    pass


class Tagged(Tensor):
    pass


Pair = namedtuple("Pair", "a b")


def through_file(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    write({"state_dict": {}, **made_safe(checkpoint)}, str(folder))
    return read(folder)


SAFE: dict[str, tuple[Any, Any]] = {
    "float64": (np.float64(0.5), 0.5),
    "numpy_bool": (np.bool_(True), True),
    "numpy_text": (np.str_("a"), "a"),
    "longdouble": (np.longdouble(0.5), 0.5),
    "ordered": (OrderedDict(a=np.int64(1)), {"a": 1}),
    "default": (defaultdict(list, a=[1]), {"a": [1]}),
    "counter": (Counter([2, 2]), {2: 2}),
    "path": (Path("a/b"), "a/b"),
    "enum": (Color.RED, "red"),
    "int_enum": (Level.LOW, 3),
    "text_subclass": (Word("w"), "w"),
    "deque": (deque([1, Path("x")], maxlen=3), [1, "x"]),
    "set": ({1, "a"}, {1, "a"}),
    "frozen_set": (frozenset({1}), {1}),
    "set_of_sets": ({frozenset({1})}, [{1}]),
    "range": (range(3), [0, 1, 2]),
    "named_tuple": (Pair(1, np.float32(0.5)), (1, 0.5)),
    "keys": ({np.int64(1): "a", Color.RED: "b", (1, Path("x")): "c"}, {1: "a", "red": "b", (1, "x"): "c"}),
    "text_array": (np.array(["a", "b"]), ["a", "b"]),
    "plain": ([None, 1, 2**70, math.inf, 1j, b"x", (True, "s")], [None, 1, 2**70, math.inf, 1j, b"x", (True, "s")]),
    "torch_values": ([torch.float16, torch.Size([2]), torch.device("cpu")],) * 2,
}


@pytest.mark.parametrize("case", SAFE)
def test_values_that_have_a_plain_form_are_kept_in_it(case: str, tmp_path: Path) -> None:
    given, expected = SAFE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = through_file({"own": given}, tmp_path)["own"]
    assert got == expected
    assert type(got) is type(expected)


TENSORS: dict[str, tuple[Any, Tensor]] = {
    "array": (np.arange(3), torch.arange(3)),
    "reversed_array": (np.arange(3)[::-1], torch.tensor([2, 1, 0])),
    "other_byte_order": (np.arange(3, dtype=">f4"), torch.arange(3.0)),
    "no_dimension": (np.array(2.0), torch.tensor(2.0, dtype=torch.float64)),
    "subclass": (torch.arange(3).as_subclass(Tagged), torch.arange(3)),
    "parameter": (nn.Parameter(torch.ones(2)), torch.ones(2)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_arrays_and_kinds_of_tensors_become_tensors(case: str, tmp_path: Path) -> None:
    given, expected = TENSORS[case]
    got = through_file({"own": [given]}, tmp_path)["own"][0]
    assert type(got) is Tensor and not got.requires_grad
    torch.testing.assert_close(got, expected)


def test_attributes_of_a_tensor_and_the_rest_of_its_storage_stay_behind(tmp_path: Path) -> None:
    tensor = torch.zeros(1_000_000)[:2]
    tensor.lock = threading.Lock()  # type: ignore[attr-defined]
    assert through_file({"own": tensor}, tmp_path)["own"].tolist() == [0, 0]
    assert (tmp_path / FILE_NAME).stat().st_size < 100_000


def test_the_rest_is_left_out_with_one_warning_that_names_it(tmp_path: Path) -> None:
    lock = threading.Lock()
    itself: list[Any] = []
    itself.append(itself)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    checkpoint = {
        "callbacks": {"X:0": {"lock": lock, "count": 1}},
        "optimizer_states": [{"param_groups": [{"lr": 0.1, "fn": len}]}],
        "items": {"all": [1, lock], "kept": 2},
        "odd": Odd.THING,
        "nested": {"itself": itself, "deep": deep, "big": 2**3000, SimpleNamespace: 1,
                   "day": np.datetime64("2020-01-01")},
        "lazy": [nn.parameter.UninitializedParameter()],
        "hyper_parameters": {"loss": nn.MSELoss(), "sizes": {"a": 1, "b": lock}, "width": np.int64(4)},
    }  # fmt: skip
    with pytest.warns(UserWarning, match="left out") as seen:
        got = through_file(checkpoint, tmp_path)
    assert len(seen) == 1
    text = str(seen[0].message)
    for named in (
        "callbacks['X:0']['lock'] (a lock)", "optimizer_states[0]['param_groups'][0]['fn'] (a builtin", "odd (holds a ",
        "items['all'] (holds a lock)", "nested['itself']", "nested['deep']", "nested['big']", "nested['day']", "lazy (",
        "hyper_parameters['loss'] (a MSELoss)", "hyper_parameters['sizes'] (holds a lock)", "load_from_checkpoint",
    ):  # fmt: skip
        assert named in text, (named, text)
    assert got == {
        "state_dict": {}, "callbacks": {"X:0": {"count": 1}}, "optimizer_states": [{"param_groups": [{"lr": 0.1}]}],
        "items": {"kept": 2}, "nested": {}, "hyper_parameters": {"width": 4},
    }  # fmt: skip


# -- in a fit --------------------------------------------------------------------------------------------------------
class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch / 10))
        return [optimizer], [scheduler]


class Keeper(raylit.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock(), "best": np.float32(0.5)}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2)


def trainer(folder: Path, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(
        **{"max_epochs": 1, "num_workers": 0, "use_gpu": False, "logger": False, "storage_path": str(folder),
           "enable_progress_bar": False, "enable_model_summary": False, **given}
    )  # fmt: skip


def test_the_checkpoint_of_a_fit_with_numpy_rates_and_odd_callbacks_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"callbacks\['Keeper'\]\['lock'\] \(a lock\)"):
        result = trainer(tmp_path, callbacks=[Keeper()]).fit(Net(), loader())
    saved = read(result.checkpoint)
    assert saved["callbacks"] == {"Keeper": {"best": 0.5}}
    assert type(saved["lr_schedulers"][0]["_last_lr"][0]) is float
    again = trainer(tmp_path, max_epochs=2)
    again.fit(Net(), loader(), ckpt_path=result.checkpoint)
    assert again.current_epoch == 2


class Hooked(Net):
    heard: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.heard = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heard.append("module saves")
        assert self.trainer.global_step == 2
        checkpoint["seen"] = [*checkpoint["seen"], "module"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heard.append("module loads")
        assert self.trainer is not None
        checkpoint["state_dict"] = {k.replace("old", "layer"): v for k, v in checkpoint["state_dict"].items()}


class HookedCallback(raylit.Callback):
    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        module.heard.append("callback saves")
        assert trainer.global_step == 2
        checkpoint["seen"] = [np.float64(1)]

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        module.heard.append(f"callback loads {checkpoint['seen']}")


class HookedData(raylit.DataModule):
    def __init__(self, heard: list[str]) -> None:
        super().__init__()
        self.heard = heard

    def train_dataloader(self) -> Any:
        return loader()

    test_dataloader = train_dataloader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heard.append("data saves")
        checkpoint["seen"].append("data")
        checkpoint["state_dict"] = {k.replace("layer", "old"): v for k, v in checkpoint["state_dict"].items()}
        checkpoint["lock"] = threading.Lock()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heard.append("data loads")
        assert self.trainer is not None


def test_hooks_see_and_change_the_checkpoint_before_it_is_written_and_before_it_is_loaded(tmp_path: Path) -> None:
    module = Hooked()
    with pytest.warns(UserWarning, match=r"left out of the checkpoint.*: lock \(a lock\)"):
        result = trainer(tmp_path, callbacks=[HookedCallback()]).fit(module, datamodule=HookedData(module.heard))
    assert module.heard == ["callback saves", "module saves", "data saves"]
    saved = read(result.checkpoint)
    assert saved["seen"] == [1.0, "module", "data"]
    assert set(saved["state_dict"]) == {"old.weight", "old.bias"}

    loads = ["callback loads [1.0, 'module', 'data']", "module loads", "data loads"]
    other = Hooked()
    trainer(tmp_path, callbacks=[HookedCallback()]).test(
        other, datamodule=HookedData(other.heard), ckpt_path=result.checkpoint
    )
    assert other.heard == loads
    torch.testing.assert_close(other.layer.weight, module.layer.weight)

    other = Hooked()
    on = trainer(tmp_path, max_epochs=1, callbacks=[HookedCallback()])
    with pytest.warns(UserWarning, match="left out of the checkpoint"):
        on.fit(other, datamodule=HookedData(other.heard), ckpt_path=result.checkpoint)
    assert other.heard[:3] == loads
