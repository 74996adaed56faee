"""The search example: its space is one that the Module and the DataModule take, and it finds something better."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_as_a_script(run_script: Callable[..., str]) -> None:
    told = run_script("05_search", "--num-samples", "6", "--max-epochs", "8")
    assert "best of 6 trials" in told and "Net(lr=" in told and "data.batch_size=" in told
    found, default = (float(part.split(" with ")[0]) for part in told.rsplit("test accuracy: ", 1)[1].split(", "))
    assert found > default
