"""A storage path that the second host does not see: refused before training, with the host's name."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cluster.hosts import environment_of, hosts, may_hide_folders

SCRIPT = """
    import torch
    from ray import tune
    from torch.utils.data import DataLoader

    import raylit
    from raylit.errors import ConfigError


    class Net(raylit.Module):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, 1)

        def train_dataloader(self):
            return DataLoader(torch.ones(8, 1), batch_size=2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


    def trainer(**given):
        return raylit.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, **given)


    if __name__ == "__main__":
        here, shared = sys.argv[1:]
        for refused in (
            lambda: trainer(num_workers=2, storage_path=here).fit(Net()),
            lambda: raylit.Tuner(Net, param_space={"lr": 0.1}, trainer=trainer(storage_path=here)).fit(),
        ):
            try:
                refused()
            except ConfigError as error:
                print("REFUSED", " | ".join(str(error).splitlines()))
        run = trainer(num_workers=2, storage_path=shared)
        run.fit(Net())
        print("STEPS", run.global_step)
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not may_hide_folders(), reason="needs Linux and the right to make a mount namespace"),
]


def test_a_path_that_only_one_host_sees(tmp_path: Path) -> None:
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir()
    shared.mkdir()
    (tmp_path / "train.py").write_text("import sys\n" + textwrap.dedent(SCRIPT))
    with environment_of() as environment, hosts(environment, [here]) as address:
        run = subprocess.run(
            [sys.executable, "train.py", str(here), str(shared)], cwd=tmp_path, capture_output=True, text=True,
            env={**environment, "RAY_ADDRESS": address}, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    refused = [line for line in lines if line.startswith("REFUSED")]
    assert len(refused) == 2, run.stdout
    for line in refused:
        assert f"storage_path='{here}' cannot be used from every node" in line
        assert "127.0.0.2" in line and "Give a folder that all nodes mount" in line
    assert lines[-1] == "STEPS 2" and list(here.iterdir()) == []  # nothing was begun, and nothing is left of the check
