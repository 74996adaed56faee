"""What was found between the nodes means: pure functions, from values to rows. Floor 6; standard library only."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence

from raylit.doctor.report import CLUSTER, Row, green, red, yellow

_SLOW_SMALL_US = 5_000.0  # a step of a small model takes as long
_SLOW_LARGE_MB_PER_S = {"gloo": 100.0, "nccl": 1000.0}  # less than a link of 1, or 10, Gbit/s gives

_TOKEN = (
    "set RAY_AUTH_MODE=token on every host before ray start, with one token on all (ray get-auth-token --generate; "
    "mode 0600)"
)


@dataclasses.dataclass(frozen=True)
class Service:
    """One of Ray's listeners. ``tried``: what other nodes made of it (see ``node.get_in``), by their name."""

    name: str  # "GCS", "dashboard", "client server"
    host: str  # what it listens on: "0.0.0.0", an address
    port: int
    tried: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rank:
    """One rank's all-reduce: its times, or what went wrong and where it was then."""

    node: str
    small_s: float | None = None
    large_s: float | None = None
    fault: str | None = None
    stage: str = ""


def reach(node: str, faults: Mapping[str, str], targets: int) -> Row:
    """Whether a node's connections to the others and to the caller came about. ``faults``: by "name at host:port"."""
    if not faults:
        others = "every other node, and " if targets > 1 else ""
        return green("connections", node, f"{targets} of {targets}: {others}this process")
    told = [f"{target} ({fault})" for target, fault in list(faults.items())[:3]]
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return red(
        "connections",
        node,
        f"cannot reach {', '.join(told)}{more}",
        "open every TCP port between the nodes, in the firewall or security group: torch and Ray take free ones",
    )


def authentication(asks: bool | None, nodes: int, modes: Mapping[str, str]) -> Row:
    """Whether the cluster refuses who has no token: tried, from here. ``modes``: RAY_AUTH_MODE of each node's Ray."""
    check = "authentication"
    if asks is None:
        return yellow(check, CLUSTER, "could not be tried", f"try `ray status` without a token; if it works, {_TOKEN}")
    if asks:
        return green(check, CLUSTER, "on: without the token nobody gets in")
    if nodes > 1:
        on = [name for name, mode in modes.items() if mode == "token"]
        half = f"; RAY_AUTH_MODE=token is set on {', '.join(on[:3])}, and not on the head" if on else ""
        return red(check, CLUSTER, f"off: whoever reaches the head can run code on all {nodes} nodes{half}", _TOKEN)
    return yellow(check, CLUSTER, "off: whoever reaches this machine's ports can run code on it", _TOKEN)


def open_ports(services: Sequence[Service] | None, asks: bool | None, nodes: int) -> list[Row]:
    """Which of Ray's own ports others can use. ``services``: those of the head, None where they cannot be listed."""
    if services is None:
        remedy = "keep the ports of dashboard, GCS and client (8265, 6379, 10001) from other networks"
        return [yellow("open ports", CLUSTER, "cannot be listed: the head did not answer, or is no Linux", remedy)]
    return [_service(service, asks, nodes) for service in services]


def _service(service: Service, asks: bool | None, nodes: int) -> Row:
    check, where = "open ports", f"{service.name} on {at(service.host, service.port)}"
    if is_loopback(service.host):
        return green(check, CLUSTER, f"{where}: this host only")
    reached = [name for name, outcome in service.tried.items() if outcome != "closed"]
    serves = "serves" in service.tried.values()
    if nodes > 1 and not reached:
        return green(check, CLUSTER, f"{where}: not to be reached from the other nodes")
    by = f"open to {len(reached)} other node{'s' * (len(reached) != 1)}" if nodes > 1 else "open to other hosts"
    if asks and not serves:
        return green(check, CLUSTER, f"{where}: {by}; asks for the token")
    if asks is None and not serves:
        return yellow(check, CLUSTER, f"{where}: {by}", _TOKEN)
    value = f"{where}: {by}, asks for nothing"
    if service.name == "dashboard":
        return red(check, CLUSTER, value, f"ray start --dashboard-host=127.0.0.1, and a tunnel to it; and {_TOKEN}")
    if nodes == 1 and service.name == "GCS":  # every Ray opens it, a laptop's too; the row of authentication says more
        return yellow(check, CLUSTER, value, f"{_TOKEN}; or keep this machine behind a firewall")
    return red(check, CLUSTER, value, _TOKEN)


def at(host: str, port: int) -> str:
    """``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this host can connect to a listener there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def all_reduce(
    ranks: Sequence[Rank], backend: str, *, unreached: Sequence[str] = (), elsewhere: Mapping[str, str] = {},
    note: str = "",
) -> list[Row]:  # fmt: skip
    """The rows of latency and bandwidth, or one that names the ranks that failed.

    ``unreached``: what the test of connections found, as "A -> B at host:port". ``elsewhere``: the nodes whose own name
    resolves to another address than Ray's: gloo listens there. ``note``: why the backend is not the expected one.
    """
    check, count = "all-reduce", len(ranks)
    if any(rank.fault is not None for rank in ranks):
        return [_failed(ranks, backend, unreached, elsewhere)]
    small_us = max(rank.small_s or 0.0 for rank in ranks) * 1e6
    speed = 25.0 / max(rank.large_s or 1e-9 for rank in ranks)
    among = f"{count} workers, {backend}"
    rows = []
    for name, value, slow in (
        (f"{check} latency", f"{small_us:.0f} us for 4 bytes ({among})", small_us > _SLOW_SMALL_US),
        (f"{check} bandwidth", f"{speed:.0f} MB/s at 25 MB ({among})", speed < _SLOW_LARGE_MB_PER_S[backend]),
    ):
        remedy = "a faster network between the nodes, or fewer messages: accumulate_grad_batches, larger batches"
        rows.append(yellow(name, CLUSTER, value, remedy) if slow else green(name, CLUSTER, value))
    if note:
        rows[0] = yellow(rows[0].check, CLUSTER, rows[0].value, note)
    return rows


def _failed(ranks: Sequence[Rank], backend: str, unreached: Sequence[str], elsewhere: Mapping[str, str]) -> Row:
    bad = [(index, rank) for index, rank in enumerate(ranks) if rank.fault is not None]
    told = [f"rank {index} on {rank.node}, {rank.stage}: {rank.fault}" for index, rank in bad[:4]]
    value = "; ".join(told) + (f"; and {len(bad) - 4} more ranks" if len(bad) > 4 else "")
    if unreached:
        value += f". Could not be reached: {', '.join(unreached[:3])}"
        remedy = "open every TCP port between the nodes (firewall, security group), then try again"
    elif elsewhere:
        pairs = ", ".join(f"{node} to {address}" for node, address in list(elsewhere.items())[:3])
        value += f". Own names of hosts resolve elsewhere: {pairs}"
        remedy = (
            "gloo listens where the host's own name points: put that right in /etc/hosts, or set GLOO_SOCKET_IFNAME"
        )
    else:
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        remedy = f"set {variable} to the interface that joins the nodes; torch's own message is above"
    return red("all-reduce", CLUSTER, value, remedy)
