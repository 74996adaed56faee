"""Ask every node, the storage and the network, and put the answers together. Runs on the driver; Ray is initialised.

Each question has its own deadline. Who does not answer one is told about and not asked again, so one broken node costs
the others a wait, never their rows.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raylit.doctor import judge, network, node
from raylit.doctor.joining import Stranger
from raylit.doctor.network import Rank, Service
from raylit.doctor.report import CLUSTER, Report, Row, green, red
from raylit.driver import cluster
from raylit.driver.channel import DriverChannel
from raylit.driver.each_node import NoAnswer, Node, NodeActors, alive_nodes
from raylit.driver.folder import default_storage
from raylit.driver.storage_check import StorageReport, check_storage
from raylit.errors import ResourceError

ANSWER_S = 30.0  # to start a process and load torch, on each node at the same time
_CLOCK_ROUNDS = 5
# An object store that cannot be reached says so after some 20 s: its client tries again and again.
_STORAGE_S, _REACH_S, _GROUP_S, _GPU_S = 25.0, 10.0, 15.0, 15.0
# With it a process that reserves no GPU still sees those of its node; older Rays hide them else. Costs a fresh process.
_SEE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_REMEDY_SILENT = "look at this node: `ray status`, its raylet's log, its load; then run this again"


def examine(
    storage: str | None = None, workers: int | None = None, *, joined: bool, answer_s: float = ANSWER_S,
    say: Callable[[str], None] = lambda text: None,
) -> Report:  # fmt: skip
    """Examine the cluster that this process is connected to.

    ``storage``: a folder or URI, by default where runs are kept. ``workers``: of the all-reduce, by default one on each
    node, and two where there is one node only. ``joined``: whether the cluster was there before; then this process is a
    party of its own. ``answer_s``: how long a node may take to answer at first. ``say`` is told what is being done.
    """
    import ray

    began = time.monotonic()
    nodes = alive_nodes()
    stranger = Stranger(str(ray.get_runtime_context().gcs_address))
    has_gpus = any(each.resources.get("GPU") for each in nodes)
    with NodeActors(nodes, environment=_SEE_GPUS if has_gpus else None) as actors:
        say(f"asking {len(nodes)} node{'s' * (len(nodes) != 1)}")
        rows, facts, live = _ask_nodes(actors, answer_s)
        rows += judge.versions(facts, node.versions() if joined else None) if facts else []
        rows += _clocks(live)
        rows += _judged(live.nodes, facts)
        drivers = judge.gpu_drivers(facts)
        rows += [drivers] if drivers else []
        say("writing and reading files")
        rows += storage_rows(check_storage(storage or default_storage(), actors=live, within_s=_STORAGE_S))
        say("trying the network")
        reach_rows, unreached = _connections(live)
        rows += reach_rows
        services = _services(live, facts)
        asks = stranger.is_refused()
        rows.append(network.authentication(asks, len(nodes), {k: str(v["auth_mode"]) for k, v in facts.items()}))
        rows += network.open_ports(services, asks, len(nodes))
        more, figures = _all_reduce(live, facts, workers, unreached, answer_s, say)
    return Report(tuple(rows + more), tuple(each.name for each in nodes), time.monotonic() - began, figures)


def _ask_nodes(actors: NodeActors, answer_s: float) -> tuple[list[Row], dict[str, dict[str, Any]], NodeActors]:
    """The facts of each node by its name, the actors of those that answered, and a red row for each other node."""
    import ray

    gcs = str(ray.get_runtime_context().gcs_address)
    each: list[tuple[Any, ...] | None] = [(n.temp_folder, [m for m in (n.session, gcs) if m]) for n in actors.nodes]
    answers = actors.ask(node.facts, each=each, within_s=answer_s, modules=node.MODULES)
    rows, facts = list[Row](), dict[str, dict[str, Any]]()
    for asked, answer in zip(actors.nodes, answers, strict=True):
        if isinstance(answer, NoAnswer):
            rows.append(red("answers", asked.name, answer.reason, _REMEDY_SILENT))
        else:
            rows.append(green("answers", asked.name, "yes"))
            facts[asked.name] = answer
    return rows, facts, actors.only([not isinstance(answer, NoAnswer) for answer in answers])


def _judged(nodes: Sequence[Node], facts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows = []
    for each in nodes:
        found, has = facts[each.name], each.resources
        rows += [
            judge.cpus(each.name, has.get("CPU", 0.0), found["cpus"]),
            judge.memory(each.name, found["memory"], has.get("memory", 0.0)),
            judge.swap(each.name, found["memory"]),
            judge.shared_memory(each.name, found["shm"], has.get("object_store_memory", 0.0)),
            judge.gpus(each.name, has.get("GPU", 0.0), found["gpus"]),
            judge.open_files(each.name, found["limits"]),
            judge.processes(each.name, found["limits"]),
            judge.temp_disk(each.name, found["temp"]),
        ]
    return rows


def _clocks(live: NodeActors) -> list[Row]:
    ahead = live.seconds_ahead(_CLOCK_ROUNDS, _REACH_S)
    return [
        red("clock", each.name, seconds.reason, _REMEDY_SILENT)
        if isinstance(seconds, NoAnswer)
        else judge.clock(each.name, seconds)
        for each, seconds in zip(live.nodes, ahead, strict=True)
    ]


def storage_rows(report: StorageReport) -> list[Row]:
    """A row of the storage for each node, one of its disk where it has one, and one for what could not be removed."""
    check, rows = "storage", list[Row]()
    seen = ", ".join(each.node.name for each in report.sharing[:4])
    remedy = "give a folder that all nodes mount at this path (NFS), or the URI of an object store (--storage s3://...)"
    together = {each.node.id for each in report.sharing}
    for each in report.nodes:
        torn = [f"{reason}" for other, reason in each.unseen.items() if other in together]
        if each.fault is not None:
            rows.append(red(check, each.node.name, f"{report.storage}: {each.fault}",
                            "give a storage that this node may write to, or let it"))  # fmt: skip
        elif each in report.apart:
            only = (
                "a path that only the head can see; " if len(together) == 1 and report.sharing[0].node.is_head else ""
            )
            rows.append(red(check, each.node.name, f"{report.storage}: {only}does not see what {seen} wrote", remedy))
        elif torn:
            rows.append(red(check, each.node.name, f"{report.storage}: a file of another node {torn[0]}", remedy))
        else:
            others = f", read by {len(together)} nodes" if len(together) > 1 else " and read"
            rows.append(green(check, each.node.name, f"{report.storage}: written{others}"))
    disks = [judge.storage_disk(each.node.name, each.free_bytes) for each in report.nodes]
    rows += [row for row in disks if row is not None]
    if report.left:
        rows.append(
            red("storage removal", CLUSTER, report.left, "let every node delete: old checkpoints are deleted too")
        )
    return rows


def _connections(live: NodeActors) -> tuple[list[Row], list[str]]:
    """From every node to every other, on ports like those that torch takes, and to this process's event channel."""
    greetings = [secrets.token_bytes(16) for _ in live.nodes]
    ports = live.ask(node.listen, each=[(g, n.address) for g, n in zip(greetings, live.nodes, strict=True)],
                     within_s=_REACH_S)  # fmt: skip
    channel = DriverChannel(cluster.driver_host(), on_event=lambda event: None)
    try:
        targets = []
        for here in live.nodes:
            to: dict[str, tuple[str, int, bytes | None]] = {
                f"{there.name} at {there.address}:{port}": (there.address, port, greeting)
                for there, port, greeting in zip(live.nodes, ports, greetings, strict=True)
                if there is not here and not isinstance(port, NoAnswer)
            }
            to[f"{judge.HERE} at {channel.address.host}:{channel.address.port}"] = (
                channel.address.host, channel.address.port, None)  # fmt: skip
            targets.append((to,))
        answers = live.ask(node.reach, each=targets, within_s=_REACH_S + 2.0 * len(live.nodes) / 32)
    finally:
        channel.close()
    rows, unreached = list[Row](), list[str]()
    for here, answer, (to,), port in zip(live.nodes, answers, targets, ports, strict=True):
        if isinstance(answer, NoAnswer) or isinstance(port, NoAnswer):
            silent = answer if isinstance(answer, NoAnswer) else port
            rows.append(red("connections", here.name, silent.reason, _REMEDY_SILENT))
        else:
            rows.append(network.reach(here.name, answer, len(to)))
            unreached += [f"{here.name} -> {target}" for target in answer if judge.HERE not in target]
    return rows, unreached


def _services(live: NodeActors, facts: Mapping[str, Mapping[str, Any]]) -> list[Service] | None:
    """Ray's own listeners on the head, as tried from the other nodes; None where they cannot be listed."""
    heads = [each for each in live.nodes if each.is_head]
    listed = facts[heads[0].name]["listening"] if heads else None
    if listed is None:
        return None
    # A service may listen on several addresses; the widest says who can use it.
    widest: dict[tuple[str, int], str] = {}
    for each in listed:
        key = (str(each["service"]), int(each["port"]))
        if key not in widest or network.is_loopback(widest[key]):
            widest[key] = str(each["host"])
    open_to_others = [key for key, host in widest.items() if not network.is_loopback(host)]
    asked = [(name, heads[0].address, port) for name, port in open_to_others]
    # Alone, the head tries itself, at its address: what the dashboard does with a stranger is then still known.
    others = [len(live.nodes) == 1 or each is not heads[0] for each in live.nodes]
    from_others = live.only(others)
    answers = from_others.ask(node.get_in, asked, within_s=_REACH_S) if asked else []
    services = []
    for (name, port), host in sorted(widest.items()):
        at = open_to_others.index((name, port)) if (name, port) in open_to_others else None
        tried = {
            each.name: answer[at]
            for each, answer in zip(from_others.nodes, answers)
            if at is not None and not isinstance(answer, NoAnswer)
        }
        services.append(Service(name, host, port, tried))
    return services


def _all_reduce(
    live: NodeActors, facts: Mapping[str, Mapping[str, Any]], workers: int | None, unreached: Sequence[str],
    answer_s: float, say: Callable[[str], None],
) -> tuple[list[Row], dict[str, float]]:  # fmt: skip
    rows = list[Row]()
    with_gpu = [each for each in live.nodes if each.resources.get("GPU")]
    if workers is not None:
        room = _room(workers, bool(with_gpu))
        rows.append(room)
        workers = workers if room.verdict.value == "green" else None
    if not live.nodes:
        return rows, {}
    with contextlib.ExitStack() as stack:
        backend, note, ranks = "gloo", "", None
        if with_gpu:
            gpus = int(sum(each.resources["GPU"] for each in with_gpu))
            say("waiting for a GPU on each node")
            count = workers or (len(with_gpu) if len(with_gpu) > 1 else min(2, gpus))
            ranks = stack.enter_context(NodeActors(_dealt(with_gpu, count, "GPU"), gpus=1))
            if any(answer is not True for answer in ranks.ask(node.ready, True, within_s=_GPU_S)):
                note = "measured with gloo, over the CPUs: other jobs hold the GPUs, or torch cannot use them"
                ranks.end()
                ranks = None
            else:
                backend = "nccl"
        if ranks is None:
            count = workers or max(len(live.nodes), 2)
            # A node's first rank is the process that is there already, with torch loaded.
            placed = _dealt(live.nodes, count, "CPU")
            first = live.only([each in placed for each in live.nodes])
            again = list(placed)
            for each in first.nodes:
                again.remove(each)
            extra = stack.enter_context(NodeActors(again))
            extra.ask(node.ready, False, within_s=answer_s)
            ranks = first.with_more(extra)
        if len(ranks.nodes) == 1:
            return [*rows, green("all-reduce", CLUSTER, f"one worker ({backend}): nothing to send")], {}
        say(f"all-reduce of {len(ranks.nodes)} workers")
        found = _reduced(ranks, backend)
    elsewhere = {
        each.name: str(facts[each.name]["resolves_to"])
        for each in live.nodes
        if len(live.nodes) > 1 and not facts[each.name]["gloo_interface"]
        and facts[each.name]["resolves_to"] not in (None, each.address)
    }  # fmt: skip
    rows += network.all_reduce(found, backend, unreached=unreached, elsewhere=elsewhere, note=note)
    if any(rank.fault is not None for rank in found):
        return rows, {}
    small_s, large_s = (max(getattr(rank, name) for rank in found) for name in ("small_s", "large_s"))
    return rows, {
        "all_reduce_workers": float(len(found)),
        "all_reduce_latency_us": round(small_s * 1e6, 1),
        "all_reduce_mb_per_s": round(node.LARGE_BYTES / 1e6 / large_s, 1),
    }


def _dealt(nodes: Sequence[Node], count: int, resource: str) -> list[Node]:
    """A node for each of ``count`` ranks: one on each in turn, as long as it has ``resource`` left, then anyhow."""
    chosen = list[Node]()
    while len(chosen) < count:
        room = [each for each in nodes if each.resources.get(resource, 0.0) > chosen.count(each)] or nodes
        chosen += room[: count - len(chosen)]
    return sorted(chosen, key=nodes.index)


def _reduced(ranks: NodeActors, backend: str) -> list[Rank]:
    world = len(ranks.nodes)
    host = ranks.nodes[0].address
    port = ranks.ask(node.free_port, host, each=[(), *[None] * (world - 1)], within_s=_REACH_S)[0]
    if isinstance(port, NoAnswer):
        return [Rank(ranks.nodes[0].name, fault=port.reason), *[Rank(each.name) for each in ranks.nodes[1:]]]
    apart = len({each.id for each in ranks.nodes}) > 1
    answers = ranks.ask(node.all_reduce, host, port, world, apart, backend, _GROUP_S,
                        each=[(rank,) for rank in range(world)], within_s=_GROUP_S + 5.0,
                        modules=node.MODULES)  # fmt: skip
    failed = [isinstance(answer, NoAnswer) for answer in answers]
    stages = ranks.ask(node.stage, each=[() if bad else None for bad in failed], within_s=_REACH_S)
    return [
        Rank(each.name, fault=answer.reason, stage=stage if isinstance(stage, str) else "")
        if isinstance(answer, NoAnswer)
        else Rank(each.name, small_s=answer["small_s"], large_s=answer["large_s"])
        for each, answer, stage in zip(ranks.nodes, answers, stages, strict=True)
    ]


def _room(workers: int, use_gpu: bool) -> Row:
    """Whether so many workers of a run would find their CPU, and GPU, here."""
    each = "1 CPU and 1 GPU" if use_gpu else "1 CPU"
    try:
        cluster.check_fits(workers, None, use_gpu)
    except ResourceError as error:
        first, *_, last = str(error).splitlines()
        return red("room", CLUSTER, first, last)
    return green("room", CLUSTER, f"for {workers} workers of {each}")
