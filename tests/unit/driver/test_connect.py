"""Where nobody answers: one line at once, before Ray, which would wait for minutes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

import raylit
from raylit.driver import cluster
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
        cluster.must_answer(address)


def test_who_listens_is_let_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster.must_answer(f"127.0.0.1:{server.getsockname()[1]}")
