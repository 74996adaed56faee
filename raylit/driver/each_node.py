"""Ask every node of the cluster the same thing. Runs on the driver; imports Ray inside functions only.

One actor without CPUs on each node, so that a node whose CPUs are all taken answers too. What it runs is shipped as it
is here, not by name: a node without raylit, or with another one, is a node that this must be able to tell about.
A node that does not answer in time keeps nobody else waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

HEAD_RESOURCE = "node:__internal_head__"


@dataclasses.dataclass(frozen=True)
class Node:
    """An alive node as Ray lists it."""

    id: str
    address: str
    host: str
    resources: Mapping[str, float]
    temp_folder: str = ""  # of Ray's sessions, on that node
    session: str = ""  # the name of this cluster's folder in it

    @property
    def name(self) -> str:
        """Host name and address, as messages show them."""
        return self.address if self.host in ("", self.address) else f"{self.host} ({self.address})"

    @property
    def is_head(self) -> bool:
        """Whether the cluster's head runs here."""
        return HEAD_RESOURCE in self.resources


@dataclasses.dataclass(frozen=True)
class NoAnswer:
    """What came instead of a node's answer; ``reason`` is one line."""

    reason: str


def alive_nodes() -> list[Node]:
    """Every alive node, the head first, then in the order of their addresses."""
    import ray

    found = []
    for n in (each for each in ray.nodes() if each["Alive"]):
        # <temp folder>/session_<time>_<pid>/sockets/raylet
        temp_folder, _, rest = str(n.get("RayletSocketName", "")).partition("/session_")
        found.append(
            Node(
                id=str(n["NodeID"]),
                address=str(n["NodeManagerAddress"]),
                host=str(n.get("NodeManagerHostname", "")),
                resources={str(k): float(v) for k, v in n["Resources"].items()},
                temp_folder=temp_folder,
                session=f"session_{rest.partition('/')[0]}" if rest else "",
            )
        )
    return sorted(found, key=lambda node: (not node.is_head, [part.zfill(3) for part in node.address.split(".")]))


class NodeActors:
    """An actor on each of ``nodes``; a node may be listed twice, and then has two. Leaving it ends them all.

    ``gpus``: how many GPUs each actor reserves. ``environment``: variables of their processes.
    """

    def __init__(self, nodes: Sequence[Node], *, gpus: int = 0, environment: Mapping[str, str] | None = None) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.nodes = list(nodes)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 8}
        if environment:
            options["runtime_env"] = {"env_vars": dict(environment)}
        actor = ray.remote(_runner())
        self._actors = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), **options).remote()
            for node in self.nodes
        ]

    def __enter__(self) -> NodeActors:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def only(self, keep: Sequence[bool]) -> NodeActors:
        """Return those of the actors for which ``keep`` is true; they end with this object's."""
        return self._view([(n, a) for n, a, kept in zip(self.nodes, self._actors, keep, strict=True) if kept])

    def with_more(self, others: NodeActors) -> NodeActors:
        """Return these actors and ``others``, who end with the objects that they come from."""
        return self._view([*zip(self.nodes, self._actors), *zip(others.nodes, others._actors)])

    @staticmethod
    def _view(pairs: Sequence[tuple[Node, Any]]) -> NodeActors:
        view = object.__new__(NodeActors)
        view.nodes, view._actors = [node for node, _ in pairs], [actor for _, actor in pairs]
        return view

    def end(self) -> None:
        """End every actor, whatever it is doing."""
        import ray

        for actor in self._actors:
            with contextlib.suppress(Exception):  # the connection may be gone, and they with it
                ray.kill(actor)

    def ask(
        self, function: Callable[..., Any], *args: Any, within_s: float,
        each: Sequence[tuple[Any, ...] | None] | None = None, modules: Iterable[str] = (),
    ) -> list[Any]:  # fmt: skip
        """Call ``function(kept, *args, *each[i])`` in actor i; return what each answered, or a :class:`NoAnswer`.

        ``kept``: a dict that lives as long as the actor. An actor whose ``each`` is None is not asked, and has None.
        ``modules``: raylit's own, beside the function's, that it uses; none of them is imported over there.
        """
        payload = shipped(function, modules)
        given = each if each is not None else [()] * len(self._actors)
        refs = [
            None if more is None else actor.run.remote(payload, *args, *more)
            for actor, more in zip(self._actors, given, strict=True)
        ]
        return _answers(refs, within_s)

    def seconds_ahead(self, rounds: int, within_s: float) -> list[Any]:
        """Return how far each node's clock is ahead of this process's, or NoAnswer; right to half a round trip.

        Of ``rounds`` the quickest counts: the less time a call takes, the less its middle can be off.
        """
        ready = self.ask(_now, within_s=within_s)
        payload = shipped(_now, ())
        until = time.monotonic() + within_s
        for index, answer in enumerate(ready):
            if isinstance(answer, NoAnswer):
                continue
            best: tuple[float, float] | None = None
            for _ in range(rounds):
                sent = time.time()
                (there,) = _answers([self._actors[index].run.remote(payload)], max(until - time.monotonic(), 1.0))
                back = time.time()
                if isinstance(there, NoAnswer):
                    ready[index] = there
                    break
                if best is None or back - sent < best[0]:
                    best = (back - sent, there - (sent + back) / 2)
            else:
                ready[index] = best[1] if best else None
        return ready


def _now(kept: dict[str, Any]) -> float:
    return time.time()


def shipped(function: Callable[..., Any], modules: Iterable[str]) -> bytes:
    """Pickle a function with the code of its module and of ``modules``: it runs where they are not installed."""
    from ray import cloudpickle

    found = [sys.modules[name] for name in {function.__module__, *modules}]
    try:
        for module in found:
            cloudpickle.register_pickle_by_value(module)
        return bytes(cloudpickle.dumps(function))
    finally:
        for module in found:
            cloudpickle.unregister_pickle_by_value(module)


def _runner() -> type:
    """The actors' class. Made in a function: such a class travels whole, one of a module by its name."""

    class NodeRunner:
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}

        def run(self, payload: bytes, *args: Any) -> Any:
            from ray import cloudpickle

            return cloudpickle.loads(payload)(self.kept, *args)

    return NodeRunner


def _answers(refs: Sequence[Any], within_s: float) -> list[Any]:
    import ray

    asked = [ref for ref in refs if ref is not None]
    ready = ray.wait(asked, num_returns=len(asked), timeout=within_s)[0] if asked else []
    known = set(ready)
    answers: list[Any] = []
    for ref in refs:
        if ref is None:
            answers.append(None)
        elif ref not in known:
            answers.append(NoAnswer(f"no answer within {within_s:g} s"))
        else:
            try:
                answers.append(ray.get(ref))
            except Exception as error:  # whatever a node meets, the others are still to be told about
                answers.append(NoAnswer(_one_line(error)))
    return answers


def _one_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
