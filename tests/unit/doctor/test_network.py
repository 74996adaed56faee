"""From what was found between nodes to verdicts: connections, who may get in, all-reduce."""

from __future__ import annotations

import pytest

from raylit.doctor import network
from raylit.doctor.network import Rank, Service
from raylit.doctor.report import CLUSTER, Verdict

GREEN, YELLOW, RED = Verdict.GREEN, Verdict.YELLOW, Verdict.RED


def test_connections() -> None:
    assert network.reach("a", {}, 3).verdict is GREEN
    assert network.reach("a", {}, 3).value == "3 of 3: every other node, and this process"
    assert network.reach("a", {}, 1).value == "1 of 1: this process"
    faults = {f"n{i} at 10.0.0.{i}:4000": "no answer within 3 s" for i in range(4)}
    row = network.reach("a", faults, 5)
    assert row.verdict is RED and row.value.startswith("cannot reach n0 at 10.0.0.0:4000 (no answer within 3 s), n1 at")
    assert row.value.endswith(" and 1 more") and "firewall" in row.remedy


@pytest.mark.parametrize(
    ("asks", "nodes", "verdict"),
    [(True, 3, GREEN), (True, 1, GREEN), (False, 3, RED), (False, 1, YELLOW), (None, 3, YELLOW)],
)
def test_authentication(asks: bool | None, nodes: int, verdict: Verdict) -> None:
    row = network.authentication(asks, nodes, {})
    assert row.verdict is verdict and ("RAY_AUTH_MODE=token" in row.remedy) == (verdict is not GREEN)


def test_a_token_that_only_some_nodes_have_is_named() -> None:
    row = network.authentication(False, 2, {"a": "", "b": "token"})
    assert row.verdict is RED and "set on b, and not on the head" in row.value


ANY = "0.0.0.0"


@pytest.mark.parametrize(
    ("service", "asks", "nodes", "verdict"),
    [
        (Service("dashboard", "127.0.0.1", 8265), False, 3, GREEN),
        (Service("dashboard", "::1", 8265), False, 3, GREEN),
        (Service("dashboard", ANY, 8265, {"b": "serves"}), False, 2, RED),
        (Service("dashboard", ANY, 8265, {"b": "serves"}), True, 2, RED),  # it does what a stranger wants, token or not
        (Service("dashboard", ANY, 8265, {"b": "asks"}), True, 2, GREEN),
        (Service("dashboard", ANY, 8265, {"b": "closed"}), False, 2, GREEN),  # a firewall between
        (Service("dashboard", ANY, 8265, {"a": "serves"}), False, 1, RED),
        (Service("client server", "10.0.0.1", 10001, {"b": "open", "c": "closed"}), False, 3, RED),
        (Service("client server", "10.0.0.1", 10001, {"b": "open"}), True, 3, GREEN),
        (Service("client server", "10.0.0.1", 10001, {"a": "open"}), False, 1, RED),
        (Service("GCS", "::", 6379, {"b": "open"}), False, 2, RED),
        (Service("GCS", "::", 6379, {"b": "open"}), True, 2, GREEN),
        (Service("GCS", "::", 6379, {"b": "open"}), None, 2, YELLOW),
        (Service("GCS", "::", 6379, {"a": "open"}), False, 1, YELLOW),
        (Service("GCS", "127.0.0.1", 6379), False, 1, GREEN),
    ],
)
def test_open_ports(service: Service, asks: bool | None, nodes: int, verdict: Verdict) -> None:
    (row,) = network.open_ports([service], asks, nodes)
    assert row.verdict is verdict and str(service.port) in row.value and row.node == CLUSTER
    assert bool(row.remedy) == (verdict is not GREEN)


def test_how_many_others_reach_a_port() -> None:
    (row,) = network.open_ports([Service("GCS", "::", 6379, {"b": "open", "c": "open", "d": "closed"})], False, 4)
    assert row.value == "GCS on [::]:6379: open to 2 other nodes, asks for nothing"


def test_ports_that_cannot_be_listed_are_yellow() -> None:
    (row,) = network.open_ports(None, False, 2)
    assert row.verdict is YELLOW and "8265" in row.remedy


def test_all_reduce_takes_the_slowest_rank() -> None:
    latency, bandwidth = network.all_reduce([Rank("a", 100e-6, 0.05), Rank("b", 300e-6, 0.125)], "gloo")
    assert (latency.verdict, latency.value) == (GREEN, "300 us for 4 bytes (2 workers, gloo)")
    assert (bandwidth.verdict, bandwidth.value) == (GREEN, "200 MB/s at 25 MB (2 workers, gloo)")  # 25 MB / 0.125 s


@pytest.mark.parametrize(
    ("backend", "small_s", "large_s", "verdicts"),
    [("gloo", 6e-3, 0.1, [YELLOW, GREEN]), ("gloo", 1e-3, 0.3, [GREEN, YELLOW]), ("nccl", 1e-4, 0.1, [GREEN, YELLOW]),
     ("nccl", 1e-4, 0.01, [GREEN, GREEN])],
)  # fmt: skip
def test_a_slow_network_is_yellow(backend: str, small_s: float, large_s: float, verdicts: list[Verdict]) -> None:
    rows = network.all_reduce([Rank("a", small_s, large_s)] * 2, backend)
    assert [row.verdict for row in rows] == verdicts


def test_a_backend_that_was_not_the_expected_one_is_yellow() -> None:
    latency, _ = network.all_reduce([Rank("a", 1e-4, 0.01)] * 2, "gloo", note="the GPUs are taken")
    assert latency.verdict is YELLOW and latency.remedy == "the GPUs are taken"


def test_the_ranks_that_failed_are_named_with_what_they_were_doing() -> None:
    ranks = [Rank("a", 1e-4, 0.01), Rank("b", fault="no answer within 20 s", stage="meeting rank 0 at 10.0.0.1:4000")]
    (row,) = network.all_reduce(ranks, "gloo")
    assert row.verdict is RED and row.check == "all-reduce"
    assert row.value == "rank 1 on b, meeting rank 0 at 10.0.0.1:4000: no answer within 20 s"
    assert "GLOO_SOCKET_IFNAME" in row.remedy


def test_a_failure_is_explained_by_what_else_was_found() -> None:
    ranks = [Rank("a", fault="x", stage="s"), Rank("b", fault="x", stage="s")]
    (row,) = network.all_reduce(ranks, "gloo", unreached=["a -> b at 10.0.0.2:4000"], elsewhere={"a": "127.0.1.1"})
    assert "Could not be reached: a -> b at 10.0.0.2:4000" in row.value and "firewall" in row.remedy
    (row,) = network.all_reduce(ranks, "gloo", elsewhere={"a": "127.0.1.1"})
    assert "a to 127.0.1.1" in row.value and "/etc/hosts" in row.remedy
