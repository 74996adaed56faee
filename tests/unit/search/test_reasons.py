"""Why a trial failed, in one line: what the Module raised, or what Ray saw of a process that is gone."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError, RayTaskError

from raylit.errors import WorkerLostError
from raylit.search.display import worded

ENDED = "The actor died unexpectedly before finishing this task.\n\tclass_name: RaylitTrial\n\tip: 10.0.0.7\n"
NODE = "The actor died because its node has died. Node Id: 12ab"
KILLED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


@pytest.mark.parametrize(("error", "host", "line"), [
    (ValueError("no such\nkey"), "10.0.0.7", "ValueError: no such"),
    (KeyError(), "", "KeyError"),
    (RayActorError("ab", f"{ENDED}{NODE}\n\tmore"), "10.0.0.7", f"its process on 10.0.0.7 was lost: {NODE}"),
    (RayActorError("ab", f"{ENDED}{KILLED}"), "", f"its process was lost: {KILLED}"),
    (RayActorError("ab", "The actor ab is unavailable: Socket closed"), "10.0.0.7",
     "its process on 10.0.0.7 was lost: The actor ab is unavailable: Socket closed"),
])  # fmt: skip
def test_a_reason(error: BaseException, host: str, line: str) -> None:
    assert worded(error, host) == line


def test_what_a_worker_of_several_raised_is_told_as_it_is() -> None:
    lost = WorkerLostError("worker 1 of the trial, on b (10.0.0.8), was lost: killed")
    inside = RayTaskError("step", "a traceback", lost)
    assert worded(inside, "10.0.0.7") == f"WorkerLostError: {lost}"
