"""hparams.yaml: what goes in, what is left out, and that the file is whole."""

from __future__ import annotations

import enum
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raylit.loggers.hparams import flatten, plain_value, read_yaml, write_yaml


class Mode(enum.Enum):
    FAST = 1


class LoudText(str):
    def __str__(self) -> str:
        return "LOUD"


@dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Any = None


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    params = {"lr": 0.1, "layers": [1, 2], "name": "é: #x", "flag": True, "none": None, "optim": {"kind": "sgd", 3: 4}}
    assert write_yaml(tmp_path / "new" / "hparams.yaml", params) == []
    assert read_yaml(tmp_path / "new" / "hparams.yaml") == params
    assert list(read_yaml(tmp_path / "new" / "hparams.yaml")) == list(params)


def test_values_with_a_plain_form_are_written_in_it(tmp_path: Path) -> None:
    params = {
        "tuple": (1, (2, 3)), "set": {2, 1}, "path": Path("/data/x"), "mode": Mode.FAST, "text": LoudText("quiet"),
        "np": np.float64(0.5), "np32": np.int32(3), "tensor": torch.tensor(2.0), "ns": Namespace(a=1), "optim": Optim(),
        "nan": float("inf"), "weights": torch.ones(2, 1), "array": np.arange(3), "empty": torch.ones(0),
    }  # fmt: skip
    assert write_yaml(tmp_path / "h.yaml", params) == []
    assert read_yaml(tmp_path / "h.yaml") == {
        "tuple": [1, [2, 3]], "set": [1, 2], "path": "/data/x", "mode": "FAST", "text": "quiet", "np": 0.5, "np32": 3,
        "tensor": 2.0, "ns": {"a": 1}, "optim": {"lr": 0.1, "betas": [0.9, 0.99], "schedule": None},
        "nan": float("inf"), "weights": [[1.0], [1.0]], "array": [0, 1, 2], "empty": [],
    }  # fmt: skip


def test_unsafe_values_are_left_out_and_named(tmp_path: Path) -> None:
    holds_itself: dict[str, Any] = {}
    holds_itself["me"] = [holds_itself]
    params = {
        "lr": 0.1, "loss": torch.nn.MSELoss(), "fn": len, "weights": torch.ones(1001),
        "optim": Optim(schedule=object()),
        "mixed": [1, object()], "nested": [{"a": object()}], ("k",): 1, "me": holds_itself, "cls": Optim,
    }  # fmt: skip
    left_out = write_yaml(tmp_path / "h.yaml", params)
    assert left_out == ["loss", "fn", "weights", "optim.schedule", "mixed", "nested", "('k',)", "me.me", "cls"]
    assert read_yaml(tmp_path / "h.yaml") == {"lr": 0.1, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "me": {}}


def test_the_file_executes_nothing(tmp_path: Path) -> None:
    write_yaml(tmp_path / "h.yaml", {"text": "!!python/object/apply:os.system ['true']", "d": Optim()})
    assert "!!" not in (tmp_path / "h.yaml").read_text().replace("'!!", "")
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(yaml.YAMLError):
        read_yaml(tmp_path / "evil.yaml")


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_yaml(tmp_path / "h.yaml", {"a": 1})
    write_yaml(tmp_path / "h.yaml", {"a": 2})
    assert os.listdir(tmp_path) == ["h.yaml"]
    assert (tmp_path / "h.yaml").stat().st_mode & 0o777 == 0o666 & ~_mask()
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(OSError):
        write_yaml(tmp_path / "folder.yaml", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["folder.yaml", "h.yaml"]


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        read_yaml(tmp_path / "list.yaml")


def test_flatten_and_cells() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": 2}}, "o": Optim(), "e": {}}) == {
        "a": 1, "b/c/d": 2, "o/lr": 0.1, "o/betas": (0.9, 0.99), "o/schedule": None, "e": {},
    }  # fmt: skip
    assert plain_value(len) == "<built-in function len>"
    assert plain_value(np.float32(0.5)) == 0.5
