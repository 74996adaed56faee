"""Settings that follow the number of workers."""

from __future__ import annotations

import os

import pytest

from raylit.driver import cluster
from raylit.driver.launch import stored
from raylit.wire import Job

INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.1), (4, 0.1), (100, 0.1), (250, 0.25), (1000, 1.0)])
def test_many_workers_are_asked_less_often(ray_session: None, workers: int, seconds: float) -> None:
    with cluster.run_settings(workers):
        assert float(os.environ[INTERVAL]) == pytest.approx(seconds)
    assert INTERVAL not in os.environ


def test_an_interval_that_a_person_set_stays(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "5")
    with cluster.run_settings(1000):
        assert os.environ[INTERVAL] == "5"
    assert os.environ[INTERVAL] == "5"


def test_what_many_calls_would_carry_lies_in_the_object_store_once(ray_session: None) -> None:
    import ray

    job = Job("validate", payload=b"x" * 2000)
    assert stored(job) == stored(job, calls=500) == job
    shared = stored(job, calls=1000)
    assert shared.payload == b"" and ray.get(shared.payload_ref) == job.payload
