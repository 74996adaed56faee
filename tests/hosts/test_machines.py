"""The hosts themselves, before any Ray: apart from each other, together through the switch, and gone afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hosts.machines import ROOT, SHARED, Host, Lab, lab, missing, wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def reaches(one: Host, other: Host) -> bool:
    """Whether one host gets a connection to the other's ssh."""
    command = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{other.address}/22'"
    return one.run(command, check=False).returncode == 0


def test_hosts_are_apart_and_together_and_then_gone() -> None:
    with lab([("one", 1), ("two", 3)]) as made:
        laptop, one, two = made.hosts.values()
        count = "hostname; python3 -c 'import os; print(os.cpu_count())'"
        assert [host.run(count).stdout.split() for host in (one, two)] == [["one", "1"], ["two", "3"]]
        # Files: home, /tmp and /dev/shm are a host's own, /mnt/shared is everyone's, the checkout nobody's to change.
        one.run(f"touch ~/mine /tmp/mine /dev/shm/mine {SHARED}/ours")
        assert two.run(f"ls ~ /tmp /dev/shm {SHARED}").stdout.count("mine") == 0
        assert "ours" in two.run(f"ls {SHARED}").stdout and not Path("/dev/shm/mine").exists()
        assert one.run(f"touch {ROOT}/mine", check=False).returncode != 0
        # The laptop logs in on both; processes of one are not seen from the other.
        ssh = "ssh -o StrictHostKeyChecking=accept-new"
        assert laptop.run(f"{ssh} one hostname && {ssh} {two.address} hostname").stdout.split()[-1] == "two"
        two.run("nohup sleep 1234.5 >/dev/null 2>&1 &")
        wait_for(lambda: two.processes() == ["sleep 1234.5"], "nohup becomes what it starts")
        assert one.processes() == []
        # The network is cut, and healed; then the plug is pulled.
        two.cut()
        assert not reaches(laptop, two) and reaches(laptop, one)
        two.heal()
        assert reaches(laptop, two)
        two.kill()
        assert not reaches(laptop, two)
        two.boot()
        assert reaches(laptop, two) and two.processes() == []
        assert two.run("ls ~ /tmp").stdout.count("mine") == 0 and one.run("ls ~/mine /tmp/mine").returncode == 0
        first = one._first
    assert not made.folder.exists() and not os.path.exists(f"/proc/{first}")


def test_a_lab_that_fails_leaves_nothing() -> None:
    made: list[Lab] = []

    def fail() -> None:
        with lab([("one", 1)]) as inside:
            made.append(inside)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (inside,) = made
    assert not inside.folder.exists() and not any(host.running for host in inside.hosts.values())
