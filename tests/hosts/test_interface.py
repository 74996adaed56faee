"""gloo between two hosts whose own names mean loopback to them, as Debian writes it: left alone, and told; no Ray runs.

A run's own way there, through Ray, is in tests/cluster/test_ranks.py, and all of test_onprem.py takes it.
"""

from __future__ import annotations

import sys

import pytest

from tests.hosts.machines import ROOT, Host, lab, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

SCRIPT = """
import datetime, os, sys
import torch, torch.distributed as dist
from raylit.worker.interface import VARIABLE, name_interface
rank, told, address, seconds = sys.argv[1:]
if told == "told":
    name_interface(apart=True)
print("interface:", os.environ.get(VARIABLE))
dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2,
                        timeout=datetime.timedelta(seconds=int(seconds)))
total = torch.tensor([int(rank) + 1])
dist.all_reduce(total)
print("sum:", total.item())
"""


def both(hosts: list[Host], told: str, port: int, timeout_s: int) -> list[str]:
    """What each host's process printed. gloo gives up after some five times ``timeout_s``."""
    at = f"tcp://{hosts[0].address}:{port}"
    running = [host.start(f"PYTHONPATH={ROOT} {sys.executable} group.py {rank} {told} {at} {timeout_s}")
               for rank, host in enumerate(hosts)]  # fmt: skip
    return [each.communicate(timeout=200)[0] for each in running]


def test_gloo_is_told_where_the_other_host_can_connect() -> None:
    with lab([("one", 1), ("two", 1)]) as made:
        hosts = [made.hosts["one"], made.hosts["two"]]
        for host in hosts:
            host.write("group.py", SCRIPT)
        for text in both(hosts, "untold", 4001, timeout_s=2):
            assert "interface: None" in text and "Gloo connectFullMesh failed" in text and "sum:" not in text, text
        for text in both(hosts, "told", 4002, timeout_s=60):
            assert "interface: eth0" in text and "sum: 3" in text, text
