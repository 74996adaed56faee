"""A cluster of two hosts, the second of which has not the script's folder: it must be shipped there.

The hosts are two raylets; the second runs in a mount namespace of its own, in which the folder is hidden.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")

SCRIPT = """
    import os
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader

    import raylit
    import neighbour  # a module beside the script


    class Net(raylit.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return neighbour.loss(self.layer(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_fit_start(self):
            told = Path("data/told.txt").read_text().strip()
            there = os.path.isdir(os.environ["RAYLIT_TEST_HIDDEN"])
            print(f"rank {self.global_rank} node {self.node_rank} read {told!r}, caller's folder there: {there}")


    if __name__ == "__main__":
        trainer = raylit.Trainer(
            num_workers=2, placement_strategy="STRICT_SPREAD", max_epochs=1, logger=False, enable_progress_bar=False,
            storage_path=os.environ["RAYLIT_TEST_STORAGE"],
        )
        trainer.fit(Net(), DataLoader(torch.ones(8, 1), batch_size=2))
        print("steps", trainer.global_step)
"""


def _may_hide_folders() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-m", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not _may_hide_folders(), reason="needs Linux and the right to make a mount namespace"),
]


@contextlib.contextmanager
def two_hosts(hidden: Path, environment: dict[str, str]) -> Iterator[str]:
    """Start two raylets of one CPU each, ``hidden`` being empty for the second; yield the cluster's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    own = ["--num-cpus=1", "--object-store-memory=100000000", "--block"]
    head = [str(RAY), "start", "--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    head += own
    member = [str(RAY), "start", f"--address={address}", "--node-ip-address=127.0.0.2", *own]
    hide = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    running: list[subprocess.Popen[str]] = []
    try:
        for command in (head, ["unshare", "-m", "sh", "-c", hide, "sh", str(hidden), *member]):
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
            )
            running.append(process)
            assert process.stdout is not None
            told: list[str] = []
            for line in process.stdout:  # ends if the process does
                told.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                pytest.fail("a host did not start:\n" + "".join(told))
        yield address
    finally:
        for process in reversed(running):
            process.terminate()  # ray start --block ends what it has started
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            if process.poll() is None:
                process.kill()
                process.communicate()


def run_script(project: Path, hidden: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    with two_hosts(hidden, environment) as address:
        return subprocess.run(
            [sys.executable, "train.py"], cwd=project, env={**environment, "RAY_ADDRESS": address},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip


def test_the_scripts_folder_reaches_a_host_that_has_it_not(tmp_path: Path) -> None:
    hidden = tmp_path / "caller"
    project = hidden / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "told.txt").write_text("42\n")
    (project / "neighbour.py").write_text("def loss(output):\n    return (output**2).mean()\n")
    (project / "train.py").write_text(textwrap.dedent(SCRIPT))
    environment = {
        **os.environ,
        "RAYLIT_TEST_HIDDEN": str(project),
        "RAYLIT_TEST_STORAGE": str(tmp_path / "results"),
        "PYTHONPATH": str(ROOT),
        # A head that finds a token on the machine asks everyone for it; this cluster has one of its own.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    environment.pop("RAY_ADDRESS", None)
    # A folder of its own for Ray, with a short name (sockets lie in it): what this cluster leaves would otherwise
    # be taken for a running one by everyone who starts Ray on this machine afterwards.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment["RAY_TMPDIR"] = folder
        run = run_script(project, hidden, environment)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    seen = sorted(line[line.index("rank") :] for line in lines if "caller's folder there" in line)
    assert len(seen) == 2, run.stdout
    assert {line.split("node ")[1].split()[0] for line in seen} == {"0", "1"}
    assert all("read '42'" in line for line in seen)
    # Else the second host was no other host, and the test would prove nothing.
    assert sum("there: False" in line for line in seen) == 1, seen
    assert lines[-1] == "steps 2"
