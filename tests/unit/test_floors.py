"""The floors of the house (docs/architecture.md): imports point downwards only.

The package's files are parsed, never imported, so a broken import is found here and not by who imports first. One set
of rules, each a function from the list of imports to a list of complaints; the tests print all complaints at once.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "raylit"

# Top-level names under raylit/ (a folder or a file without .py) and the floor each stands on.
FLOORS: dict[str, int] = {
    # 0: plain values, standard library only
    "errors": 0, "stage": 0, "progress": 0, "config": 0, "wire": 0, "version": 0, "uri": 0, "goal": 0,
    # 1: contracts; torch, never ray
    "ports": 1, "view": 1, "hooks": 1, "module": 1, "datamodule": 1, "callback": 1, "seed": 1, "hparams": 1,
    "plain": 1,
    # 2: parts; siblings do not import each other
    "optim": 2, "metrics": 2, "data": 2, "precision": 2, "strategies": 2,
    "checkpoint": 2, "callbacks": 2,
    "loggers": 2, "profilers": 2, "display": 2, "summary": 2, "export": 2, "plots": 2,
    # 3: the engine
    "engine": 3,
    # 4: worker side
    "assemble": 4, "worker": 4, "local": 4, "travel": 4,
    # 5: driver side
    "driver": 5, "trainer": 5,
    # 6: search, doctor
    "search": 6, "tuner": 6, "doctor": 6,
    # 7: command line
    "cli": 7,
}  # fmt: skip

# The public face, which collects names from every floor.
FACE = {"raylit", "raylit.__main__"}

FILE_ACCESS = {"os", "pathlib", "io", "shutil", "tempfile"}


@dataclass(frozen=True)
class Import:
    """One imported name, with all that the rules ask about it."""

    file: str  # dotted name of the importing file, "raylit.engine.fit"
    line: int
    module: str  # absolute dotted module that the statement names
    name: str | None  # what is taken from it; None for "import module"
    type_checking: bool  # under "if TYPE_CHECKING:", so never executed
    in_function: bool
    target: str | None  # the file of raylit's that the name comes from, dotted; None outside raylit

    def __str__(self) -> str:
        taken = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{self.file} line {self.line}: {taken}"


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES: dict[str, Path] = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(file: str, path: Path, source: str | None = None) -> Iterator[Import]:
    """Yield every import of one file, wherever it stands in it."""
    package = file if path.name == "__init__.py" else file.rpartition(".")[0]

    def walk(node: ast.AST, type_checking: bool, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield make(child.lineno, alias.name, None, type_checking, in_function)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                if child.level:
                    base = package.split(".")[: len(package.split(".")) - child.level + 1]
                    module = ".".join([*base, *([module] if module else [])])
                for alias in child.names:
                    yield make(child.lineno, module, alias.name, type_checking, in_function)
            elif isinstance(child, ast.If) and is_type_checking(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), True, in_function)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), type_checking, in_function)
            else:
                function = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, type_checking, function)

    def make(line: int, module: str, name: str | None, type_checking: bool, in_function: bool) -> Import:
        target = None
        if module == "raylit" or module.startswith("raylit."):
            # "from raylit.data import sampler" names the file raylit/data/sampler.py.
            target = f"{module}.{name}" if name and f"{module}.{name}" in FILES else module
        return Import(file, line, module, name, type_checking, in_function, target)

    yield from walk(ast.parse(path.read_text() if source is None else source, str(path)), False, False)


ALL: list[Import] = [found for file, path in FILES.items() for found in imports_of(file, path)]


def part(file: str) -> str:
    """Return the top-level name of a file: ``"engine"`` for ``"raylit.engine.fit"``, ``""`` for raylit itself."""
    return file.split(".")[1] if "." in file else ""


def floor(file: str) -> int | None:
    """Return the floor, or None for the public face."""
    return None if file in FACE else FLOORS[part(file)]


def takes(found: Import, *modules: str) -> bool:
    """Does this import load one of these modules, or something inside one?"""
    full = f"{found.module}.{found.name}" if found.name else found.module
    return any(full == module or full.startswith(module + ".") for module in modules)


# --- the rules: each returns its complaints -------------------------------------------------------------------------


def upwards(imports: list[Import]) -> list[str]:
    """Nothing imports from a higher floor. What is under TYPE_CHECKING counts too, but for same-floor siblings."""
    complaints = []
    for found in imports:
        here = floor(found.file)
        if here is None or found.target is None:
            continue
        if found.target in FACE:
            complaints.append(f"{found}: the package's face stands above every floor; name the file itself")
        elif floor(found.target) > here:
            there = floor(found.target)
            complaints.append(f"{found}: floor {here} must not reach up to floor {there} ({part(found.target)})")
    return complaints


def siblings(imports: list[Import]) -> list[str]:
    """Parts of floor 2 do not import each other."""
    return [
        f"{found}: {part(found.file)} and {part(found.target)} both stand on floor 2; siblings do not import each other"
        for found in imports
        if found.target is not None
        and not found.type_checking
        and floor(found.file) == floor(found.target) == 2
        and part(found.file) != part(found.target)
    ]


def forbidden_packages(imports: list[Import]) -> list[str]:
    complaints = []
    for found in imports:
        here, why = floor(found.file), None
        if here == 0 and found.target is None and found.module.split(".")[0] not in sys.stdlib_module_names:
            why = "floor 0 uses the standard library only"
        elif here is not None and here <= 3 and takes(found, "ray"):
            why = f"floor {here} never imports ray"
        elif here == 3 and takes(found, *FILE_ACCESS):
            why = "the engine opens no files"
        elif here == 3 and takes(found, "torch.distributed"):
            why = "the engine talks to other workers through ports.Collective only"
        elif here == 5 and takes(found, "torch.distributed"):
            why = "the driver takes no part in the workers' process group"
        elif here == 5 and found.target is not None and part(found.target) == "engine":
            why = "the driver never touches an engine file; the engine runs in a worker or through local/"
        if why:
            complaints.append(f"{found}: {why}")
    return complaints


def private_names(imports: list[Import]) -> list[str]:
    """A name with a leading underscore is used in its own file only."""

    def is_private(name: str | None) -> bool:
        return name is not None and name.startswith("_") and not (name.startswith("__") and name.endswith("__"))

    return [
        f"{found}: a private name is used in its own file only"
        for found in imports
        if found.target is not None and (is_private(found.name) or any(map(is_private, found.module.split("."))))
    ]


def ray_internals(imports: list[Import]) -> list[str]:
    return [
        f"{found}: private to Ray"
        for found in imports
        if takes(found, "ray") and any(p.startswith("_") for p in [*found.module.split("."), found.name or ""])
    ]


def ray_at_import(imports: list[Import]) -> list[str]:
    """Ray is loaded inside functions only, so that ``import raylit`` and a run in process stay without it."""
    return [
        f"{found}: import ray inside the function that uses it, or under TYPE_CHECKING"
        for found in imports
        if takes(found, "ray") and not found.in_function and not found.type_checking
    ]


RULES = [upwards, siblings, forbidden_packages, private_names, ray_internals, ray_at_import]


def test_every_file_stands_on_a_floor() -> None:
    homeless = sorted({part(file) for file in FILES if file not in FACE} - set(FLOORS))
    assert not homeless, f"no floor is given for {homeless}: add each to FLOORS here and to docs/architecture.md"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule) -> None:
    known = [found for found in ALL if found.file in FACE or part(found.file) in FLOORS]
    known = [found for found in known if found.target in FACE | {None} or part(found.target) in FLOORS]
    complaints = rule(known)
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (upwards, "raylit.engine.fit", "from raylit.trainer import Trainer"),
        (upwards, "raylit.module", "from .callbacks.early import EarlyStopping"),
        (upwards, "raylit.hooks.table", "import raylit"),
        (siblings, "raylit.data.shard", "from raylit.metrics.store import Store"),
        (forbidden_packages, "raylit.errors", "import torch"),
        (forbidden_packages, "raylit.loggers.csv", "def f():\n    import ray.train"),
        (forbidden_packages, "raylit.engine.fit", "from pathlib import Path"),
        (forbidden_packages, "raylit.engine.fit", "from torch import distributed"),
        (forbidden_packages, "raylit.driver.launch", "import torch.distributed as dist"),
        (forbidden_packages, "raylit.driver.launch", "from raylit.engine import fit"),
        (private_names, "raylit.trainer", "from raylit.data.shard import _order"),
        (ray_internals, "raylit.driver.launch", "def f():\n    from ray.train.v2 import _internal"),
        (ray_at_import, "raylit.driver.launch", "import ray"),
        (ray_at_import, "raylit.driver.launch", "class A:\n    from ray.train import Result"),
    ],
)
def test_rule_finds_a_breach(rule, file: str, source: str) -> None:
    """Each rule is shown what it is there for: a rule that finds nothing ever is no rule."""
    path = PACKAGE / Path(*file.split(".")[1:]).with_suffix(".py")
    assert rule(list(imports_of(file, path, source)))


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (upwards, "raylit.trainer", "from raylit.errors import ConfigError"),
        (siblings, "raylit.data.shard", "if TYPE_CHECKING:\n    from raylit.metrics.store import Store"),
        (siblings, "raylit.data.shard", "from .order import order"),
        (forbidden_packages, "raylit.wire", "from dataclasses import dataclass"),
        (ray_at_import, "raylit.driver.launch", "if TYPE_CHECKING:\n    import ray\ndef f():\n    import ray.train"),
        (private_names, "raylit.cli.main", "from raylit import __version__"),
    ],
)
def test_rule_lets_good_imports_pass(rule, file: str, source: str) -> None:
    path = PACKAGE / Path(*file.split(".")[1:]).with_suffix(".py")
    assert rule(list(imports_of(file, path, source))) == []


def test_import_raylit_loads_nothing_heavy() -> None:
    """``import raylit`` costs little more than ``import torch``: these are loaded by the run that needs them."""
    heavy = ["ray", "rich", "yaml", "tensorboardX", "pyarrow", "pandas", "torchmetrics"]
    code = f"import raylit, sys; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import raylit loaded {done.stdout.split()}: import them inside functions"
