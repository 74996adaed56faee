"""Whether workers fit on nodes: the arithmetic, and how a refusal words it. Floor 5; no Ray."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = "node:__internal_head__"  # Ray gives this resource to the head alone


def misfit(num_workers: int, asked: Mapping[str, float], nodes: list[tuple[str, dict[str, float]]]) -> str | None:
    """Why ``num_workers`` bundles of ``asked`` cannot lie on ``nodes`` (address, resources), or None where they can.

    A bundle lies on one node. All bundles are alike, so filling each node in turn is exact, not an approximation.
    """
    room = [fitting(asked, has) for _, has in nodes]
    if sum(room) >= num_workers:
        return None
    each = ", ".join(f"{number(v)} {k}" for k, v in asked.items())
    total = ", ".join(f"{number(v * num_workers)} {k}" for k, v in asked.items())
    has_in_all = ", ".join(f"{number(sum(has.get(k, 0.0) for _, has in nodes))} {k}" for k in asked)
    lines = [
        f"num_workers={num_workers} needs {num_workers} x ({each}) = {total}; the cluster has {has_in_all} "
        f"on {len(nodes)} node{'s' * (len(nodes) != 1)}, room for {sum(room)} such worker{'s' * (sum(room) != 1)}.",
    ]
    for (address, has), count in list(zip(nodes, room, strict=True))[:8]:
        listed = ", ".join(f"{number(has.get(k, 0.0))} {k}" for k in asked)
        lines.append(f"  node {address}: {listed} -> {count}")
    hint = f"Use num_workers={sum(room)} or fewer" if sum(room) else "Ask for less per worker"
    if asked.get("GPU") and not any(has.get("GPU") for _, has in nodes):
        hint = "use_gpu=False trains on the CPUs"
    lines.append(f"{hint}, or lower resources_per_worker, or join a larger cluster (RAY_ADDRESS).")
    return "\n".join(lines)


def fitting(asked: Mapping[str, float], has: Mapping[str, float]) -> int:
    """How many bundles of ``asked`` a node that ``has`` so much holds."""
    # A small tolerance: 0.1 of a CPU, ten times, is one CPU.
    counts = [int(has.get(k, 0.0) / v + 1e-9) for k, v in asked.items()]
    return min(counts) if counts else sys.maxsize


def number(value: float) -> str:
    """As people write it."""
    return f"{value:g}"


def beyond_growth(
    problem: str, workers: int, bundle: Mapping[str, float], now: Sequence[tuple[str, dict[str, float]]],
    config: Mapping[str, Any],
) -> str | None:  # fmt: skip
    """Why a cluster of ``ray up`` cannot have the room, however far it grows; None where it can, or that is unknown.

    ``problem``: what is missing of it now; ``now``: its nodes, (address, resources); ``config``: its file.
    """
    provider, limit = config.get("provider"), int(config.get("max_workers", 2))
    if isinstance(provider, Mapping) and provider.get("type") == "local":
        # Machines of one's own: what a host has is known once it is there, and of the head's kind are all of them.
        there = sum(_HEAD not in has for _, has in now)
        return None if there < limit else f"{problem}\nAll {there} workers of the cluster's file are there."
    kinds = config.get("available_node_types")
    if not isinstance(kinds, Mapping):
        return None
    fits: list[tuple[int, int]] = []  # (workers on one node, nodes) of each kind that may be added
    for name, kind in kinds.items():
        has = kind.get("resources") if isinstance(kind, Mapping) else None
        if name == config.get("head_node_type"):
            continue
        if not isinstance(has, Mapping) or not has:
            return None  # the cloud tells Ray only when such a node is there
        each = fitting(bundle, {str(resource): float(amount) for resource, amount in has.items()})
        fits.append((each, int(kind.get("max_workers", 0))))
    head = sum(fitting(bundle, has) for _, has in now if _HEAD in has)
    left, most = int(config.get("max_workers", 2)), head
    for each, count in sorted(fits, reverse=True):
        taken = min(count, left)
        most, left = most + each * taken, left - taken
    if most >= workers:
        return None
    return f"{problem}\nGrown as far as its file allows, the cluster holds {most} such worker{'s' * (most != 1)}."
