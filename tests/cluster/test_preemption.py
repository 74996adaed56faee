"""A node is taken away with notice: a checkpoint of that moment, and the run ends on other nodes to the bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from tests.chaos.faults import wait_for
from tests.cluster.hosts import Cluster
from tests.cluster.preempted import BATCHES, EPOCHS, Net, loader
from tests.two_process.harness import Processes, run_here

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several raylets start and stop, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses"),
]
NOTICE_S = 20  # from the announcement to the node's end

SCRIPT = f"""
    from pathlib import Path

    import torch

    import raylit
    from tests.cluster.preempted import Net, loader

    if __name__ == "__main__":
        folder = Path({{folder!r}})
        model = Net(folder)
        trainer = raylit.Trainer(
            num_workers=2, placement_strategy="STRICT_SPREAD", max_epochs={EPOCHS}, max_failures=0, seed=3,
            logger=False, enable_progress_bar=False, storage_path=str(folder / "results"),
        )
        trainer.fit(model, loader())
        torch.save(dict(model.state_dict()), folder / "weights.pt")
"""


def undisturbed(rank: int, world_size: int) -> tuple[dict[str, Tensor], int]:
    ran = run_here(Net(), loader(), rank=rank, world_size=world_size, max_epochs=EPOCHS, seed=3, order_seed=3)
    return ran.weights, ran.outcome.state.global_step


def started(folder: Path, attempt: int) -> list[list[str]]:
    """(node, address, step) of both ranks of an attempt, once both are there."""
    files = [folder / f"start-{rank}-{attempt}" for rank in (0, 1)]
    return [file.read_text().split() for file in files] if all(file.exists() for file in files) else []


def test_a_run_outlives_the_node_of_a_worker(three_hosts: Cluster, two: Processes, tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, str(script)], cwd=script.parent, text=True,
                          env=three_hosts.driver_environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            wait_for(lambda: process.poll() is not None or started(tmp_path, 0), "training begins")
            places = started(tmp_path, 0)
            # The head must stay, and Ray may know it by another address of this machine than 127.0.0.1.
            lost, member = next((node, ip) for node, ip, _ in places if ip in three_hosts.members)
            three_hosts.drain(member, lost, NOTICE_S)
            (tmp_path / "drained").touch()
            both = [tmp_path / f"went-on-{rank}" for rank in (0, 1)]
            wait_for(lambda: process.poll() is not None or all(each.exists() for each in both), "it goes on")
            (run,) = (tmp_path / "results").iterdir()
            store = Store(Folder(str(run / "checkpoints")))
            kept = [(each, store.faults(each)) for each in store.manifests()]
            output = process.communicate(timeout=240)[0]
        finally:
            process.kill()
    assert process.returncode == 0, output
    # One checkpoint, in the middle of the first epoch, where nothing else keeps one.
    assert [(each.epoch, faults) for each, faults in kept] == [(0, ())], output
    step = kept[0][0].step
    assert 5 < step < BATCHES
    assert "will be taken away in" in output and f"going on from step {step}" in output
    again = started(tmp_path, 1)
    assert [int(at) for _, _, at in again] == [step, step]
    assert len({node for node, _, _ in again} - {lost}) == 2
    assert not started(tmp_path, 2)
    weights, steps = two(undisturbed)[0]
    assert steps == BATCHES * EPOCHS
    resumed = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
