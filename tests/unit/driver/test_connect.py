"""Where nobody answers, or the head refuses our token: one line at once, before Ray, which waits and writes pages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import torch

import raylit
from raylit.doctor.joining import join
from raylit.driver import cluster, entrance
from raylit.errors import ConfigError


class Net(raylit.Module):
    def training_step(self, batch: object, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_says_where_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "_init", lambda environment: pytest.fail("Ray was asked"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    trainer = raylit.Trainer(max_epochs=1, storage_path=str(tmp_path), use_gpu=False)
    with pytest.raises(ConfigError, match=rf"nobody answers at {address} \(Connection refused\); is Ray running"):
        trainer.fit(Net(), train_dataloaders=[torch.zeros(1)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["head:", "head:x", "head:0", ":70000", "1.2.3.4:-1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address: give HOST:PORT"):
        entrance.must_answer(address)


def test_who_listens_is_let_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        entrance.must_answer(f"127.0.0.1:{server.getsockname()[1]}")


TOKEN = "5" * 64


class Head(grpc.GenericRpcHandler):
    """A head that asks for ``TOKEN``, or with ``open`` for none, as far as the first question goes."""

    def __init__(self) -> None:
        self.open, self.asked = False, list[str]()
        self._server = grpc.server(futures.ThreadPoolExecutor(1), handlers=(self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.asked.append(call.method)
        shown = dict(call.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not self.open and shown != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)

    def __enter__(self) -> Head:
        self._server.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.stop(None).wait(60)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """A head, whose address ``ray start`` has noted; a home without a token, and no settings of Ray's."""
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    (tmp_path / "ray").mkdir()
    with Head() as head:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{head.address}\n")
        yield head


@pytest.mark.parametrize("named", ["auto", None, "ADDRESS"])
@pytest.mark.parametrize(("token", "has"), [(None, "there is no token here"), ("6" * 64, "the token here is another")])
def test_a_head_that_refuses_us(
    head: Head, monkeypatch: pytest.MonkeyPatch, named: str | None, token: str | None, has: str
) -> None:
    monkeypatch.setattr(cluster, "_init", lambda environment: pytest.fail("Ray was asked"))
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named.replace("ADDRESS", head.address))
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    for enter in (cluster.connect, lambda: join(None)):
        if named is None and enter is not cluster.connect:
            continue  # the doctor of no address examines this machine, in the same words
        with pytest.raises(ConfigError) as raised:
            enter()
        text = str(raised.value)
        how = "" if named == "ADDRESS" else " (auto)"
        assert text.startswith(f"{head.address}{how} refuses this machine: it asks for a token, and {has}")
        assert "RAY_AUTH_MODE=token" in text and "\n" not in text and TOKEN not in text
    assert set(head.asked) == {"/ray.rpc.NodeInfoGcsService/GetClusterId"}


@pytest.mark.parametrize(
    ("settings", "given", "lets_in"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": f" {TOKEN}\n"}, True, True),
        ({"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN_PATH": "FILE"}, True, True),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "FILE.not"}, True, False),
        ({"RAY_AUTH_MODE": "token"}, True, True),  # ~/.ray/auth_token
        ({"RAY_AUTH_TOKEN": TOKEN}, True, False),  # Ray shows none to an address that it is given
        ({"RAY_AUTH_TOKEN": TOKEN}, False, True),
        ({}, False, True),
        ({"RAY_AUTH_MODE": "disabled"}, False, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "6", "RAY_ENABLE_K8S_TOKEN_AUTH": "true"}, True, True),  # a pod's
        ({"RAY_AUTH_MODE": "other"}, True, True),  # what Ray does then is not known here: it may try
    ],
)
def test_the_token_that_ray_would_show(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], given: bool, lets_in: bool
) -> None:
    (tmp_path / ".ray").mkdir()
    for file in (tmp_path / "FILE", tmp_path / ".ray" / "auth_token"):
        file.write_text(f"{TOKEN}\n")
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "FILE")))
    asked = list[object]()
    monkeypatch.setattr(cluster, "_init", asked.append)
    monkeypatch.setattr(cluster, "_has_other_nodes", lambda: False)
    monkeypatch.setattr(cluster, "_job_id", lambda: "1")
    monkeypatch.setenv("RAY_ADDRESS", head.address if given else "auto")
    if lets_in:
        assert cluster.connect()
        assert asked == [{}]
    else:
        with pytest.raises(ConfigError, match="refuses this machine"):
            cluster.connect()
        assert asked == []


def test_a_head_without_a_token_and_what_is_no_head(head: Head) -> None:
    head.open = True
    entrance.must_let_in(head.address)
    entrance.must_let_in(f"127.0.0.1:{free_port()}")  # a note may be old: what then is Ray's to say
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with futures.ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: server.accept()[0].close())
            entrance.must_let_in(address)


def test_the_head_that_runs_here(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert entrance.running_here() == head.address
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    assert entrance.running_here() is None
    command = [sys.executable, "-c", "input()", "--gcs-address=10.0.0.9:6379"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        found = entrance.running_here()
        assert process.stdin is not None
        process.stdin.close()
    assert found is not None and ":" in found  # other Rays may run on this machine
