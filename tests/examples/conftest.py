"""Fixtures for the examples: a main.py as a module, and as a script in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def load_example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports ``examples/NAME/main.py`` as a module."""

    def load(name: str) -> ModuleType:
        module_name = f"example_{name}"
        spec = importlib.util.spec_from_file_location(module_name, EXAMPLES / name / "main.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module_name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs ``examples/NAME/main.py`` as a user would, and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        # HOME: runs keep their folders under it by default; the tests leave nothing in the person's own.
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name / "main.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
