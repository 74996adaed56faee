"""When a run on workers is started again: a pure decision over the faults so far."""

from __future__ import annotations

from typing import Any

import pytest

from raylit.driver.restarts import Fault, fault_of, start_again
from raylit.errors import ConfigError, ProgressTimeoutError, ResourceError, WorkerLostError
from raylit.wire import WorkerFailure

LOST, FINAL = Fault("lost"), Fault("final")


def error(kind: BaseException, message: str = "no", step: int = 3) -> BaseException:
    where = {"stage": "fit", "epoch": 0, "global_step": step, "batch_idx": step, "raised_at_s": 1.0}
    kind.__dict__["raylit_failure"] = WorkerFailure(1, "node", type(kind).__name__, message, None, (), where)
    return kind


def raised(message: str = "no", step: int = 3) -> Fault:
    return fault_of(error(ValueError(message), message, step))


@pytest.mark.parametrize(("fault", "before", "max_failures", "keeps", "expected"), [
    (LOST, [], None, True, True),  # the default: three restarts after a lost worker, where checkpoints are kept
    (LOST, [LOST, LOST], None, True, True),
    (LOST, [LOST, LOST, LOST], None, True, False),
    (LOST, [], None, False, False),
    (raised(), [], None, True, False),  # an exception is the person's, unless restarts were asked for
    (raised(), [], 2, True, True),
    (raised(), [raised()], 2, True, False),  # the same at the same place: a mistake
    (raised(), [raised(step=2)], 2, True, True),
    (raised("other"), [raised()], 2, True, True),
    (raised(), [raised(), LOST], 3, True, True),
    (raised("at 0x7f3a"), [raised("at 0x11")], 2, True, False),  # an address is none of it
    (LOST, [], 0, True, False),
    (LOST, [LOST] * 50, -1, True, True),
    (LOST, [], 1, False, True),  # from its beginning
    (FINAL, [], 5, True, False),
])  # fmt: skip
def test_start_again(fault: Fault, before: list[Fault], max_failures: Any, keeps: bool, expected: bool) -> None:
    assert start_again(fault, before, max_failures, keeps) is expected


def test_announced_losses_count_apart() -> None:
    taken = Fault("preempted")
    assert start_again(taken, [taken] * 9, 0, True) and not start_again(taken, [], None, False)
    assert start_again(taken, [taken], 0, True, 2) and not start_again(taken, [taken, taken], 0, True, 2)
    assert start_again(LOST, [taken, taken], 1, True) and not start_again(LOST, [taken, LOST], 1, True)
    unplaced = ResourceError("the workers could not be started")
    unplaced.__dict__["raylit_unplaced"] = True
    again = fault_of(unplaced)
    assert again == Fault("unplaced") and start_again(LOST, [again] * 4, 1, True)
    assert start_again(again, [again] * 4, 0, False) and not start_again(again, [again] * 5, 9, True)
    announced = WorkerLostError("the node of worker 1 was taken away")
    announced.__dict__["raylit_preempted"] = True
    assert fault_of(announced) == taken


@pytest.mark.parametrize(("given", "kind"), [
    (WorkerLostError("worker 1 died"), "lost"),
    (error(ProgressTimeoutError("worker 0 made no progress")), "raised"),
    (ProgressTimeoutError("worker 0 made no progress"), "raised"),
    (error(KeyError("x")), "raised"),
    (error(ConfigError("wrong")), "final"),  # raylit refused something: it would again
    (ResourceError("no GPU"), "final"),
    (KeyboardInterrupt(), "final"),
    (RuntimeError("of the driver"), "final"),
    (error(SystemExit(3)), "final"),
])  # fmt: skip
def test_faults(given: BaseException, kind: str) -> None:
    assert fault_of(given).kind == kind
