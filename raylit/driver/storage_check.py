"""Is the storage the same folder on every node? Runs on the driver.

A path of a machine's own disk looks right on each node, and each node then writes into a folder that no other one
sees: the classical mistake on a cluster. So every node writes a real file, the way a checkpoint is written, and reads
those of the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from raylit.driver.each_node import NoAnswer, Node, NodeActors, alive_nodes
from raylit.errors import ConfigError
from raylit.uri import redacted
from raylit.worker import storage_probe

WITHIN_S = 20.0
FOLDER_PREFIX = ".raylit-storage-check-"
_ALSO_SHIPPED = ("raylit.checkpoint.folder", "raylit.uri")
_READS = 16  # each node reads this many of the others' files: all of them on most clusters, some on a large one


@dataclasses.dataclass(frozen=True)
class NodeStorage:
    """What one node did. ``unseen``: the nodes (by id) whose file it did not read as written, and why."""

    node: Node
    fault: str | None = None  # why it could not write; or that it did not answer
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    free_bytes: int | None = None  # None for a storage that is no disk


@dataclasses.dataclass(frozen=True)
class StorageReport:
    """What every node did, the head first. ``left``: what could not be removed, and why."""

    storage: str  # without credentials
    nodes: tuple[NodeStorage, ...]
    left: str | None = None

    @property
    def sharing(self) -> tuple[NodeStorage, ...]:
        """The nodes that see one folder together: the first that could write, and who shares with it."""
        written = [each for each in self.nodes if each.fault is None]
        if not written:
            return ()
        first = written[0]
        return tuple(each for each in written if each is first or _see_each_other(first, each))

    @property
    def apart(self) -> tuple[NodeStorage, ...]:
        """The nodes that could write, and have a folder of their own."""
        return tuple(each for each in self.nodes if each.fault is None and each not in self.sharing)

    @property
    def problem(self) -> str | None:
        """Why a run must not begin here, in a few lines; None where nothing is wrong."""
        lines = [f"  {each.node.name}: {each.fault}" for each in self.nodes if each.fault is not None]
        if self.apart:
            seen = _named(self.sharing)
            lines += [f"  {each.node.name} does not see what was written on {seen}" for each in self.apart]
            lines += [f"A path that only {seen} can see is no storage for a run on {len(self.nodes)} nodes."]
        for each in self.sharing:
            torn = [reason for other, reason in each.unseen.items() if other in {n.node.id for n in self.sharing}]
            lines += [f"  {each.node.name}: a file {torn[0]}"] if torn else []
        if not lines:
            return None
        first = f"storage_path={self.storage!r} cannot be used from every node:"
        last = "Give a folder that all nodes mount at this path (NFS), or the URI of an object store (s3://, gs://)."
        return "\n".join([first, *lines, last])


def check_storage(
    storage: str, filesystem: Any = None, *, actors: NodeActors | None = None, nodes: Sequence[Node] | None = None,
    within_s: float = WITHIN_S,
) -> StorageReport:  # fmt: skip
    """Let every node write a file into ``storage`` and read those of the others; all of it is removed again.

    ``storage``: a path, a URI, or a path on ``filesystem`` (of pyarrow). ``nodes``: those to ask, all alive ones by
    default; or ``actors`` that are there already. ``within_s``: for each of writing, reading and removing; a node that
    takes longer has a fault. Ray must be initialised. Raises nothing for a storage that is bad: the report says so.
    """
    if filesystem is None and "://" not in storage:
        storage = os.path.abspath(os.path.expanduser(storage))  # as it reads here: other nodes have other homes
    with contextlib.ExitStack() as stack:
        if actors is None:
            actors = stack.enter_context(NodeActors(alive_nodes() if nodes is None else nodes))
        return _checked(actors, storage, filesystem, within_s)


def require_shared_storage(
    storage: str, filesystem: Any = None, *, nodes: Sequence[Node] | None = None, within_s: float = WITHIN_S
) -> None:
    """Raise :class:`ConfigError`, naming the nodes, where a run on ``nodes`` could not keep its checkpoints.

    Before a run starts: does nothing, and costs nothing, where there is one node only.
    """
    among = alive_nodes() if nodes is None else list(nodes)
    if len(among) < 2:
        return
    problem = check_storage(storage, filesystem, nodes=among, within_s=within_s).problem
    if problem is not None:
        raise ConfigError(problem)


_found_good: set[tuple[str, frozenset[str]]] = set()  # (storage, nodes' ids), of this process


def require_shared_folder(folder: str, filesystem: Any = None) -> None:
    """As ``require_shared_storage``, for the folder that a run is about to use, and once for the same nodes.

    An object store is the same place from everywhere: only a path is looked at, which costs a second or two.
    """
    if filesystem is not None or "://" in folder:
        return
    nodes = alive_nodes()
    storage = os.path.dirname(folder.rstrip("/"))
    key = (storage, frozenset(node.id for node in nodes))
    if key not in _found_good:
        require_shared_storage(storage, nodes=nodes)
        _found_good.add(key)


def _checked(actors: NodeActors, storage: str, filesystem: Any, within_s: float) -> StorageReport:
    check, nodes = FOLDER_PREFIX + secrets.token_hex(8), actors.nodes
    contents = {node.id: f"{node.name} {secrets.token_hex(32)}\n".encode() for node in nodes}
    ask: dict[str, Any] = {"within_s": within_s, "modules": _ALSO_SHIPPED}
    place = (storage, filesystem, check)
    mine: list[tuple[Any, ...]] = [(node.id, contents[node.id]) for node in nodes]
    wrote = actors.ask(storage_probe.write, *place, each=mine, **ask)
    faults = [answer.reason if isinstance(answer, NoAnswer) else answer["fault"] for answer in wrote]
    written = [node.id for node, fault in zip(nodes, faults, strict=True) if fault is None]
    asked: list[tuple[Any, ...] | None] = [
        ({other: contents[other] for other in _read_by(node.id, written)},) if fault is None else None
        for node, fault in zip(nodes, faults, strict=True)
    ]
    read = actors.ask(storage_probe.read, *place, each=asked, **ask)
    found = []
    for node, fault, first, then in zip(nodes, faults, wrote, read, strict=True):
        late = then.reason if isinstance(then, NoAnswer) else None
        unseen = then if isinstance(then, dict) else {}
        free = first["free_bytes"] if isinstance(first, dict) else None
        found.append(NodeStorage(node, redacted(fault or late or "") or None, unseen, free))
    report = StorageReport(redacted(storage), tuple(found))
    hung = {node.id for node, answer in zip(nodes, wrote, strict=True) if isinstance(answer, NoAnswer)}
    return dataclasses.replace(report, left=_removed(actors, place, report, hung, ask))


def _removed(
    actors: NodeActors, place: tuple[Any, ...], report: StorageReport, hung: set[str], ask: dict[str, Any]
) -> str | None:
    """Remove the files again; one of those that share a folder does it for all of them. What is left, and why."""
    shared = {each.node.id for each in report.sharing[1:]}
    own = {each.node.id for each in report.nodes if each.fault is None} - shared
    half_done = set[str]()
    if place[1] is None and "://" not in place[0]:  # a folder, perhaps, and no file; an object store has no folders
        half_done = {each.node.id for each in report.nodes} - own - shared - hung

    def asked(ids: set[str]) -> list[tuple[Any, ...] | None]:
        return [() if node.id in ids else None for node in actors.nodes]

    answers = actors.ask(storage_probe.remove, *place, each=asked(own), **ask)
    if half_done:
        actors.ask(storage_probe.remove, *place, each=asked(half_done), **ask)  # its fault is known already
    # A node that hangs in its storage would hang in this too.
    actors.ask(storage_probe.tidy, each=asked(own | shared | half_done), **ask)
    left = [
        f"{node.name}: {answer.reason if isinstance(answer, NoAnswer) else answer}"
        for node, answer in zip(actors.nodes, answers, strict=True)
        if answer is not None
    ]
    return redacted("; ".join(left)) or None


def _read_by(node: str, written: Sequence[str]) -> list[str]:
    """Whose files a node reads. The first reads all and all read the first's: that much decides who shares with it."""
    if node == written[0] or len(written) <= _READS:
        return list(written)
    at = written.index(node)
    return list(dict.fromkeys([written[0], *(written[(at + i) % len(written)] for i in range(_READS))]))


def _see_each_other(one: NodeStorage, other: NodeStorage) -> bool:
    return other.node.id not in one.unseen and one.node.id not in other.unseen


def _named(nodes: Sequence[NodeStorage]) -> str:
    names = [each.node.name for each in nodes]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
