"""The digits example as a user starts it: in a process of its own, from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = Path(__file__).resolve().parents[2] / "examples" / "01_digits" / "main.py"


def run_example(tmp_path: Path, *arguments: str) -> tuple[float, Path]:
    """Run main.py and return the test accuracy and the run folder that it printed."""
    # HOME: Ray keeps results under it by default; the tests leave nothing in the person's own.
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(MAIN), *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    accuracy = re.search(r"^test accuracy: ([01]\.\d+)$", done.stdout, re.MULTILINE)
    folder = re.search(r"^run folder: (.+)$", done.stdout, re.MULTILINE)
    assert accuracy, f"no accuracy printed:\n{done.stdout}\n{done.stderr}"
    assert folder, f"no run folder printed:\n{done.stdout}\n{done.stderr}"
    return float(accuracy[1]), Path(folder[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reaches_the_promised_accuracy(tmp_path: Path, num_workers: int) -> None:
    accuracy, folder = run_example(tmp_path, "--num-workers", str(num_workers), "--max-epochs", "10")
    assert accuracy >= 0.97
    assert folder.is_dir()
