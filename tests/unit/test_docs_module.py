"""docs/module.md against the code: every member has a row, and every row a member with these arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import raylit
from raylit.hooks import CALLBACK_HOOKS, DATAMODULE_HOOKS, MODULE_HOOKS, HookSpec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "module.md").read_text()
BEFORE, DATA = PAGE.split("## DataModule\n")
BEFORE, OF_CALLBACKS = BEFORE.split("More of a Callback:\n")
MEMBERS, HOOKS = BEFORE.split("## Hooks\n")


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each table row after its name."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, flags=re.MULTILINE)
    assert len({name for name, _ in found}) == len(found)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def public(cls: type) -> dict[str, Any]:
    """What raylit itself puts into an open class."""
    classes = [each for each in reversed(cls.__mro__) if each.__module__.startswith("raylit.")]
    return {name: value for each in classes for name, value in vars(each).items() if not name.startswith("_")}


def arguments(value: Any, spec: HookSpec | None) -> str:
    """The arguments as the page writes them."""
    if spec is not None:
        parts = [*spec.plain, *(f"{name}†" for name in spec.named)]
        return ", ".join(parts + ["*args", "**kwargs"] * spec.extra)
    if isinstance(value, property):
        return "property"
    if isinstance(value, classmethod):
        value = value.__func__
    if not callable(value):
        return "attribute"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = list(inspect.signature(value).parameters.values())[1:]
    return ", ".join(stars.get(p.kind, "") + p.name for p in parameters)


def test_module() -> None:
    documented = {name: cells[0] for name, cells in rows(MEMBERS).items()}
    hooks = {name: cells[1] for name, cells in rows(HOOKS).items() if "M" in cells[0].split()}
    expected = {name: arguments(value, MODULE_HOOKS.get(name)) for name, value in public(raylit.Module).items()}
    assert set(documented) & set(hooks) == set()
    assert documented.pop("forward") == "any"  # torch's
    assert {**documented, **hooks} == expected
    assert set(MODULE_HOOKS) <= set(expected)


def test_callback() -> None:
    # setup and teardown stand twice on the page: among the Module's members, and here as a Callback's.
    documented = {name: cells[1] for name, cells in rows(HOOKS).items() if "C" in cells[0].split()}
    documented |= {name: cells[0] for name, cells in rows(OF_CALLBACKS).items()}
    expected = {}
    for name, value in public(raylit.Callback).items():
        spec = CALLBACK_HOOKS.get(name)
        if spec is not None:
            assert spec.plain[:2] == ("trainer", "module")
            spec = HookSpec(name, spec.plain[2:], spec.named)
        expected[name] = arguments(value, spec)
    assert documented == expected
    assert set(CALLBACK_HOOKS) <= set(expected)


def test_datamodule() -> None:
    documented = {name: cells[0] for name, cells in rows(DATA).items()}
    assert documented == {
        name: arguments(value, DATAMODULE_HOOKS.get(name)) for name, value in public(raylit.DataModule).items()
    }
    assert set(DATAMODULE_HOOKS) <= set(documented)


def test_by_name_is_said_where_it_is_so() -> None:
    said = {name for name, cells in rows(MEMBERS).items() if cells[1].startswith("by name.")}
    assert said == {name for name, spec in MODULE_HOOKS.items() if spec.by_name}


@pytest.mark.parametrize("cls", [raylit.Module, raylit.Callback, raylit.DataModule])
def test_every_member_of_the_class_has_words_of_its_own(cls: type) -> None:
    """Properties and methods that do something say so; hooks that do nothing are explained on the page."""
    hooks = {*MODULE_HOOKS, *CALLBACK_HOOKS}
    silent = [
        name
        for name, value in public(cls).items()
        if name not in hooks and (callable(value) or isinstance(value, (property, classmethod)))
        and not inspect.getdoc(getattr(cls, name))
    ]  # fmt: skip
    assert silent == []
