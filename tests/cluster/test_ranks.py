"""Ranks on a cluster of several hosts, of a fit (Ray Train's workers) and of an evaluation (raylit's own actors).

The hosts are raylets of this machine, each with room for as many workers of a part of a CPU. How many there are can be
set: ``RAYLIT_TEST_NODES=10 RAYLIT_TEST_WORKERS=4 pytest tests/cluster/test_ranks.py`` has the last worker of the tenth
host be global rank 39, local rank 3. It takes about 16 GB of memory, and some minutes on a few cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apart import may_make_networks, network
from tests.cluster.hosts import Cluster, environment_of
from tests.cluster.wrong import WrongCluster

NODES = int(os.environ.get("RAYLIT_TEST_NODES", "2"))
WORKERS = int(os.environ.get("RAYLIT_TEST_WORKERS", "2"))  # of each
TIMEOUT_S = 240 + 30 * NODES * WORKERS  # for a machine that is busy with other things

SCRIPT = """
    import json
    import os

    import ray
    import ray.util
    import torch
    from torch.utils.data import DataLoader

    import raylit

    NODES, WORKERS = int(os.environ["RAYLIT_TEST_NODES"]), int(os.environ["RAYLIT_TEST_WORKERS"])


    class Net(raylit.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def tell(self, stage):
            ranks = [self.global_rank, self.local_rank, self.node_rank, self.world_size]
            where = {"node": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address()}
            gloo = os.environ.get("GLOO_SOCKET_IFNAME")
            print("TOLD", json.dumps({"stage": stage, "ranks": ranks, "pid": os.getpid(), "gloo": gloo, **where}))

        def on_fit_start(self):
            self.tell("fit")

        def on_validation_start(self):
            self.tell("validate")

        def training_step(self, batch, batch_idx):
            # Each rank's number must reach the others from where it says that it stands.
            seen = self.all_gather(torch.tensor([self.global_rank, self.local_rank, self.node_rank]))
            self.log("seen_ranks", float((seen[:, 0] == torch.arange(self.world_size)).all()))
            self.log("seen_nodes", float(seen[:, 2].unique().numel()))
            return self.layer(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("samples", float(len(batch)), reduce_fx="sum")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)


    if __name__ == "__main__":
        count = NODES * WORKERS
        trainer = raylit.Trainer(
            num_workers=count, use_gpu=False, resources_per_worker={"CPU": 1 / WORKERS}, max_epochs=1, logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
            storage_path=os.environ["RAYLIT_TEST_STORAGE"],
        )
        net, loader = Net(), DataLoader(torch.ones(count, 1), batch_size=1)
        result = trainer.fit(net, loader)
        print("FIT", json.dumps(result.metrics))
        print("VALIDATE", json.dumps(trainer.validate(net, loader)))
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the script printed."""
    with environment_of() as environment, Cluster(environment) as cluster:
        for _ in range(NODES - 1):
            cluster.join()
        return printed(cluster, tmp_path_factory.mktemp("ranks"), NODES, WORKERS)


def printed(cluster: Cluster, folder: Path, nodes: int, workers: int) -> list[str]:
    """What the script prints on this cluster."""
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    settings = {
        "RAYLIT_TEST_NODES": str(nodes), "RAYLIT_TEST_WORKERS": str(workers),
        "RAYLIT_TEST_STORAGE": str(folder / "results"),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env={**cluster.driver_environment, **settings}, capture_output=True,
        text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


def said(lines: list[str], word: str) -> list[Any]:
    """What follows ``word`` in each line that has it; another rank's line is shown behind that rank's number."""
    return [json.loads(line.split(f"{word} ", 1)[1]) for line in lines if f"{word} " in line]


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_ranks_are_the_nodes_and_the_workers_on_them(lines: list[str], stage: str) -> None:
    told = [each for each in said(lines, "TOLD") if each["stage"] == stage]
    ranks = sorted(tuple(each["ranks"]) for each in told)
    count = NODES * WORKERS
    assert ranks == [(rank, rank % WORKERS, rank // WORKERS, count) for rank in range(count)]
    assert ranks[-1] == (count - 1, WORKERS - 1, NODES - 1, count)  # of ten hosts of four: 39, 3, 9, 40
    # What they say of themselves against where they are: one host for each node rank, and another for each other.
    places = {(each["ranks"][2], each["node"], each["address"]) for each in told}
    assert len(places) == len({node for _, node, _ in places}) == len({rank for rank, _, _ in places}) == NODES
    assert len({address for _, _, address in places}) == NODES
    assert len({each["pid"] for each in told}) == count


def test_the_ranks_reach_each_other_in_their_order(lines: list[str]) -> None:
    (fitted,), ((validated,),) = said(lines, "FIT"), said(lines, "VALIDATE")
    assert (fitted["seen_ranks"], fitted["seen_nodes"]) == (1.0, float(NODES))
    assert validated["samples"] == float(NODES * WORKERS)


@pytest.mark.long
def test_hosts_whose_own_names_mean_loopback_to_them(tmp_path: Path) -> None:
    """Ranks on hosts with networks of their own, where gloo, untold, listens where nobody else can connect."""
    if not may_make_networks():
        pytest.skip("needs root, for network namespaces")
    with network(1) as wire, environment_of(GLOO_SOCKET_IFNAME="") as environment:
        head, other = wire.addresses
        with WrongCluster(environment, at=head) as cluster:
            # To it the machine's own name is an address that it has not got, or loopback.
            cluster.join_inside(wire.inside(other), address=other)
            told = said(printed(cluster, tmp_path, nodes=2, workers=1), "TOLD")
    assert sorted((each["stage"], each["address"]) for each in told) == [
        (stage, address) for stage in ("fit", "validate") for address in sorted([head, other])
    ]
    assert {each["gloo"] for each in told if each["address"] == other} == {"eth0"}
