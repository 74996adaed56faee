"""A cluster of two hosts, the second of which has not the script's folder: it must be shipped there.

The hosts are two raylets; the second runs in a mount namespace of its own, in which the folder is hidden.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cluster.hosts import environment_of, hosts, may_hide_folders

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


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several raylets start and stop, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(not may_hide_folders(), reason="needs Linux and the right to make a mount namespace"),
]


def run_script(project: Path, hidden: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    with hosts(environment, [hidden]) as address:
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
    settings = {"RAYLIT_TEST_HIDDEN": str(project), "RAYLIT_TEST_STORAGE": str(tmp_path / "results")}
    with environment_of(**settings) as environment:
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
