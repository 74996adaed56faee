"""clusters/slurm.sbatch: what it refuses, and the whole of it on two nodes that stand for Slurm's."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.nodes import NAMES, Nodes, can_be_made

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "clusters" / "slurm.sbatch"
DIGITS = ROOT / "examples" / "01_digits" / "main.py"


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    shared = Path(tempfile.mkdtemp(prefix="nodes", dir="/var/tmp"))  # the nodes' /tmp is another one
    try:
        yield Nodes(shared, job=4711)
    finally:
        shutil.rmtree(shared)


def token_in(nodes: Nodes) -> str:
    token = secrets.token_hex(32)
    file = nodes.home / ".ray" / "tokens" / "raylit-slurm"
    file.write_text(token)
    file.chmod(0o600)
    return token


def test_the_script_is_one_for_bash_and_its_first_lines_are_for_slurm() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    asked = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    # Slurm reads no further than the first command.
    assert asked and max(asked) < next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    wanted = {"--exclusive", "--ntasks-per-node=1", "--open-mode=append"}
    assert wanted <= {lines[number].split()[1] for number in asked}


def test_without_a_script_or_a_token_it_says_so_and_starts_nothing(nodes: Nodes) -> None:
    nothing = nodes.run(SCRIPT, timeout_s=30)
    assert nothing.returncode == 2 and "give the script: sbatch clusters/slurm.sbatch main.py" in nothing.stdout
    no_token = nodes.run(SCRIPT, "main.py", timeout_s=30)
    assert no_token.returncode == 2 and "raylit token raylit-slurm" in no_token.stdout


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_be_made(), reason="needs root, and `ip`, `unshare` and `nsenter`, for network namespaces")
@pytest.mark.long
def test_two_nodes_train_the_digits_and_nothing_is_left(nodes: Nodes) -> None:
    token = token_in(nodes)
    with nodes.up():
        done = nodes.run(SCRIPT, str(DIGITS), "--num-workers", "2", "--max-epochs", "1", timeout_s=500)
        assert done.returncode == 0, done.stdout
        assert "Ray's head: node-1 (10.99.7.1:24711), 2 nodes" in done.stdout
        assert "fit on 2 workers" in done.stdout
        accuracy = re.search(r"test accuracy: ([0-9.]+)", done.stdout)
        assert accuracy is not None and float(accuracy[1]) > 0.8
        # Each node has one CPU: the ranks were on both. The run is where both of them see it.
        (run,) = (nodes.home / "raylit-runs").iterdir()
        assert (run / "history.parquet").exists()
        assert token not in done.stdout
        # The script's own code comes through, past Ray's; and a second job may follow on the same nodes.
        (nodes.home / "fails.py").write_text("import sys, ray\nray.init()\nprint(sys.argv)\nsys.exit(3)\n")
        failed = nodes.run(SCRIPT, "fails.py", "two words", timeout_s=300)
        assert failed.returncode == 3 and "['fails.py', 'two words']" in failed.stdout
        assert [nodes.processes(each) for each in NAMES] == [[], []]
