"""A rank's random states: what is kept and what is set, for a CPU and for a GPU that torch does not have here."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from raylit.checkpoint.ranks import random_state, set_random


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_every_generator_of_the_process_goes_on_where_it_was_after_a_safe_file() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    file = io.BytesIO()
    torch.save(random_state(torch.device("cpu")), file)
    there = [draws() for _ in range(3)]
    file.seek(0)
    set_random(torch.load(file, weights_only=True), torch.device("cpu"))
    assert [draws() for _ in range(3)] == there


def test_a_gpus_generator_is_kept_of_its_own_device_and_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[Any, torch.Tensor] = {}
    asked: list[Any] = []

    def get(device: Any) -> torch.Tensor:
        asked.append(device)
        return torch.tensor([7, 8], dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    second = torch.device("cuda", 1)
    kept = random_state(second)
    assert asked == [second]
    set_random(kept, torch.device("cpu"))
    set_random(random_state(torch.device("cpu")), second)  # of a run without a GPU: the seed alone
    assert states == {}
    set_random(kept, torch.device("cuda", 0))
    assert list(states) == [torch.device("cuda", 0)]
    assert states[torch.device("cuda", 0)].tolist() == [7, 8]
