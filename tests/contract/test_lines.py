"""Every line of the contract has a test, and every test that is named exists."""

from __future__ import annotations

import ast
from functools import cache

import pytest

import raylit
from raylit.hooks import CALLBACK_HOOKS, MODULE_HOOKS
from tests.contract.lines import PAGE, ROOT, SOURCE, page, read

LINES = read(SOURCE.read_text())
# The only lines that may be without a test: they are refused, or not built. Empty this list, never add to it.
NOT_THERE_YET: set[str] = set()


@cache
def functions_of(path: str) -> set[str]:
    """The test functions of a file, by parsing it."""
    file = ROOT / path
    if not file.exists():
        return set()
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test")}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.id)
def test_a_line_has_tests_that_exist(line) -> None:  # type: ignore[no-untyped-def]
    assert bool(line.tests) != bool(line.missing), f"{line.id}: name a test, or say why there is none"
    lost = [test for test in line.tests if test.partition("::")[2] not in functions_of(test.partition("::")[0])]
    assert not lost, f"{line.id}: no such test: {lost}"
    assert line.text and line.section


def test_what_is_missing_is_known() -> None:
    assert {line.id for line in LINES if line.missing} == NOT_THERE_YET


def test_ids_are_unique() -> None:
    ids = [line.id for line in LINES]
    assert sorted(ids) == sorted(set(ids))


def test_every_member_and_hook_has_a_line() -> None:
    ids = {line.id for line in LINES}
    classes = [cls for cls in raylit.Module.__mro__ if cls.__module__.startswith("raylit.")]
    members = {name for cls in classes for name in vars(cls) if not name.startswith("_")}
    members |= {*MODULE_HOOKS, *CALLBACK_HOOKS, "state_dict", "load_state_dict", "state_key", "forward"}
    # One line says what holds for all of these.
    members -= {name for name in members if name.startswith(("on_test_", "on_predict_"))}
    members -= {
        "current_epoch", "global_step", "global_rank", "local_rank", "node_rank", "world_size", "device", "dtype",
        "logger", "loggers", "datamodule", "precision", "use_amp", "use_ddp", "use_ddp2", "use_dp", "use_tpu",
        "on_gpu",
    }  # fmt: skip
    assert not {name for name in members if f"3.{name}" not in ids}
    for loop in ("test", "predict"):
        assert f"3.on_{loop}_*" in ids


def test_the_page_is_made_from_the_lines() -> None:
    assert PAGE.read_text() == page(LINES), "run: python -m tests.contract.lines"
