"""Which rank raylit's own actors get (evaluations, searches over several workers): node by node, from 0."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raylit.driver.pool import ranked

Place = tuple[str, str, str]  # node id, name for messages, address


def places_of(workers_of_nodes: list[int], order: random.Random) -> list[Place]:
    """A place for each worker, in the order in which Ray happened to start them."""
    places = [
        (f"id{node}", f"host{node}", f"10.0.0.{node + 1}")
        for node, count in enumerate(workers_of_nodes) for _ in range(count)
    ]  # fmt: skip
    order.shuffle(places)
    return places


def test_the_last_worker_of_the_tenth_node_of_four_is_rank_39() -> None:
    # Started node after node, with a worker of another node between each two: the usual order with PACK is plainer.
    places = [(f"id{node}", f"host{node}", f"10.0.0.{node + 1}") for _ in range(4) for node in range(10)]
    actors, worlds, first = ranked([f"actor{i}" for i in range(40)], places)
    last = worlds[-1]
    assert (last.global_rank, last.local_rank, last.node_rank) == (39, 3, 9)
    assert (last.world_size, last.local_world_size) == (40, 4)
    assert (actors[-1], last.node_name) == ("actor39", "host9")  # the actor that was started last, on the tenth node
    assert [world.global_rank for world in worlds if world.local_rank == 0] == list(range(0, 40, 4))
    assert (actors[0], first) == ("actor0", "10.0.0.1")


@given(nodes=st.integers(1, 12), workers=st.integers(1, 8), order=st.randoms(use_true_random=False))
def test_equal_nodes_in_any_order_of_starting(nodes: int, workers: int, order: random.Random) -> None:
    places = places_of([workers] * nodes, order)
    actors, worlds, first = ranked(list(range(len(places))), places)
    ids = [places[actor][0] for actor in actors]
    for rank, world in enumerate(worlds):
        node, local = divmod(rank, workers)
        assert (world.global_rank, world.node_rank, world.local_rank) == (rank, node, local)
        assert (world.world_size, world.local_world_size) == (nodes * workers, workers)
        assert ids[rank] == ids[node * workers]  # all of one node rank lie on one node
        assert world.node_name == places[actors[rank]][1]
    assert len(set(ids[::workers])) == nodes  # and two node ranks never do
    assert sorted(actors) == list(range(len(places)))
    assert first == places[actors[0]][2]  # where the others look for rank 0


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=10), order=st.randoms(use_true_random=False))
def test_nodes_of_different_sizes(sizes: list[int], order: random.Random) -> None:
    places = places_of(sizes, order)
    actors, worlds, _ = ranked(list(range(len(places))), places)
    here = Counter(node for node, _, _ in places)
    met: list[str] = []  # nodes in the order of their ranks
    for world, actor in zip(worlds, actors, strict=True):
        node = places[actor][0]
        if node not in met:
            met.append(node)
            assert world.local_rank == 0
        assert (world.node_rank, world.local_world_size) == (len(met) - 1, here[node])
    assert [world.global_rank for world in worlds] == list(range(sum(sizes)))
    for node_rank, node in enumerate(met):
        assert [w.local_rank for w in worlds if w.node_rank == node_rank] == list(range(here[node]))
        # Of one node the ranks follow the order of starting: the mapping does not depend on anything else.
        own = [actor for actor in actors if places[actor][0] == node]
        assert own == sorted(own)
    assert met == list(dict.fromkeys(node for node, _, _ in places))
