"""Hosts with a network each: namespaces that a bridge joins. Needs root; everything goes with the ``with`` block."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator


def may_make_networks() -> bool:
    """Whether this process may make a network namespace, and a pair of interfaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"raylit-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return False
    made = subprocess.run(["ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"],
                          capture_output=True)  # fmt: skip
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=True)
    return made.returncode == 0


class Network:
    """This host, and ``count`` more, on one wire: ``addresses[0]`` is this host's, the others are namespaces'."""

    def __init__(self, count: int) -> None:
        number = os.getpid() % 250
        self.addresses = [f"10.213.{number}.{host}" for host in range(1, count + 2)]
        self.bridge, self._names = f"rl{number}b", [f"raylit-{os.getpid()}-{host}" for host in range(2, count + 2)]
        self._number = number

    def inside(self, address: str) -> list[str]:
        """A command's beginning, with which it runs on the host at this address."""
        return ["ip", "netns", "exec", self._names[self.addresses.index(address) - 1]]

    def cut(self, one: str, other: str) -> None:
        """Let every packet from ``one`` to ``other`` get lost, as a firewall does that drops them."""
        nobody = ["lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent"]
        _ip("-n", self._names[self.addresses.index(one) - 1], "neigh", "replace", other, *nobody)

    def mend(self, one: str, other: str) -> None:
        """Undo :meth:`cut`."""
        _ip("-n", self._names[self.addresses.index(one) - 1], "neigh", "del", other, "dev", "eth0")

    def make(self) -> None:
        """Make the bridge, the namespaces and the wires between them."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.addresses[0]}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for at, (name, address) in enumerate(zip(self._names, self.addresses[1:], strict=True)):
            here = f"rl{self._number}v{at}"
            _ip("netns", "add", name)
            _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", here, "master", self.bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "route", "add", "default", "via", self.addresses[0])

    def remove(self) -> None:
        """Remove all of it, as far as it was made."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """This host and ``count`` others with networks of their own."""
    made = Network(count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
