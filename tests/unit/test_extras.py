"""The extras that error messages name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def named_extras() -> set[str]:
    """What stands second in every call of ``errors.missing``."""
    found = set()
    for file in (ROOT / "raylit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "missing":
                assert isinstance(node.args[1], ast.Constant), f"{file}:{node.lineno}"
                found.add(node.args[1].value)
    return found


def test_every_extra_that_an_error_names_can_be_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    defined = set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    assert {"mlflow", "tensorboard", "wandb"} <= named_extras() <= defined
