"""The network interface that gloo listens on. Runs on the worker, before its process group is made.

gloo listens at the address that the host's own name stands for. Debian and Ubuntu write 127.0.1.1 for it into
/etc/hosts: no other host can connect there. Ray knows an address of this node that the others reach; where gloo would
be deaf, it is told to listen on the interface of that one. ``raylit doctor`` ships this file to nodes as it is here:
nothing of raylit's is imported.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0xC0206921 if sys.platform == "darwin" else 0x8915  # an interface's IPv4 address


def name_interface(apart: bool) -> None:
    """Tell gloo, in this process's environment, where to listen, if it would listen where no other host connects.

    ``apart``: the workers are on several nodes. On one node loopback will do, and nobody else can connect to it.
    """
    if apart and not os.environ.get(VARIABLE):
        name = interface_for_gloo()
        if name is not None:
            os.environ[VARIABLE] = name


def name_interface_under_train() -> None:
    """As :func:`name_interface`, in a worker of Ray Train that has its place in the run already."""
    import ray.train

    context = ray.train.get_context()
    name_interface(apart=context.get_local_world_size() < context.get_world_size())


def interface_for_gloo() -> str | None:
    """The interface of Ray's address of this node; None where gloo needs no telling, or there is none to be found."""
    import ray.util

    address = str(ray.util.get_node_ip_address())
    if _is_loopback(address) or not gloo_is_deaf():
        return None
    return interface_of(address)


def gloo_is_deaf() -> bool:
    """Whether gloo, untold, listens on loopback: the host's own name stands for that, or for no address that is here.

    It takes the first of the name's addresses on which it can listen, and 127.0.0.1 where there is none. The name is
    looked up as gloo does; where it waits for DNS, so does gloo, which does not ask again once it is told.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return _is_loopback(str(address[0]))
    return True


def interface_of(address: str) -> str | None:
    """The name of this host's interface with that address, as gloo understands it; None where none is found."""
    with contextlib.suppress(ValueError, OSError, ImportError):
        wanted = ipaddress.ip_address(address)
        find = _with_ipv4 if wanted.version == 4 else _with_ipv6
        return find(wanted.packed)
    return None


def _with_ipv4(packed: bytes) -> str | None:
    import fcntl  # Windows has none

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                # struct ifreq: 16 bytes of name, then a sockaddr_in with the address at its fourth byte.
                answer = fcntl.ioctl(asker, _SIOCGIFADDR, os.fsencode(name).ljust(64, b"\0"))
                if answer[20:24] == packed:
                    return name
    return None


def _with_ipv6(packed: bytes) -> str | None:
    with open("/proc/net/if_inet6") as table:  # Linux alone has it
        for line in table:
            address, *_, name = line.split()
            if bytes.fromhex(address) == packed:
                return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
