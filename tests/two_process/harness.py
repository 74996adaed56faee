"""Several gloo processes that are kept for the session and run what tests give them; no Ray.

A test gives a function ``case(rank, world_size, *args)`` and gets each rank's result, in rank order. Processes cost
seconds to start and a case milliseconds, so that many cases can afford to be cases of their own.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

_START_S = 60.0
_CASE_S = 60.0
# A rank that waits in vain for another gives up after this long, so that a hang is an error.
_COLLECTIVE_S = 12.0


class RankFailed(Exception):
    """A case raised on some ranks: ``errors`` maps rank to exception (as a string where it did not travel)."""

    def __init__(self, errors: dict[int, Any], texts: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in texts.items()))
        self.errors = errors


class Processes:
    """``world_size`` processes in one gloo group, made anew for each case."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[tuple[Any, Any]] = []

    def __call__(self, case: Callable[..., Any], *args: Any, collective_s: float = _COLLECTIVE_S) -> list[Any]:
        """Run ``case(rank, world_size, *args)`` on every rank; RankFailed where it raised on any."""
        if not self._ranks:
            self._start()
        payload = cloudpickle.dumps((collective_s, cloudpickle.dumps((case, args))))
        for _, connection in self._ranks:
            connection.send_bytes(payload)
        results: list[Any] = []
        errors: dict[int, Any] = {}
        texts: dict[int, str] = {}
        for rank, (_, connection) in enumerate(self._ranks):
            if not connection.poll(_CASE_S):
                self.close()
                raise RankFailed({rank: None}, {rank: f"no answer within {_CASE_S} s"})
            answer = cloudpickle.loads(connection.recv_bytes())
            results.append(answer.get("result"))
            if "text" in answer:
                errors[rank], texts[rank] = answer["error"], answer["text"]
        if errors:
            raise RankFailed(errors, texts)
        return results

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        for _, connection in self._ranks:
            assert connection.poll(_START_S), "a process of the harness did not start"
            connection.recv_bytes()

    def close(self) -> None:
        """End the processes; the next case starts new ones."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()


def _serve(rank: int, world_size: int, port: int, connection: Any) -> None:
    """What a process does all its life: a fresh process group, the case, the answer."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a warning is an error here as everywhere in the tests
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    connection.send_bytes(b"ready")
    count = 0
    while True:
        try:
            collective_s, payload = cloudpickle.loads(connection.recv_bytes())
        except EOFError:
            return
        count += 1
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"case{count}", store), rank=rank, world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_s),
        )  # fmt: skip
        answer: dict[str, Any] = {}
        try:
            case, args = cloudpickle.loads(payload)
            answer["result"] = case(rank, world_size, *args)
            data = cloudpickle.dumps(answer)
        except BaseException as error:
            data = _failure(error)
        finally:
            dist.destroy_process_group()
        connection.send_bytes(data)


def _failure(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__)[-12:])
    try:
        data = cloudpickle.dumps({"error": error.with_traceback(None), "text": text})
        cloudpickle.loads(data)
    except Exception:
        return cloudpickle.dumps({"error": repr(error), "text": text})
    return data


# What cases are made of -------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """What a run left in one process."""

    outcome: Any
    module: Any
    trainer: Any
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Any]:
        """Copies of parameters and buffers, persistent or not."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}

    @property
    def metrics(self) -> dict[str, float]:
        """The callback metrics as floats."""
        return {name: float(value) for name, value in self.outcome.state.callback_metrics.items()}


def run_here(
    module: Any, loaders: Any = None, *, stage: str = "fit", rank: int = 0, world_size: int = 1, val: Any = None,
    datamodule: Any = None, callbacks: Any = (), loggers: Any = (), order_seed: int = 0, checkpoint: Any = None,
    own_states: Any = None, checkpointer: Any = None, nodes: int = 1, held: bool = False, storage: str | None = None,
    notices: Any = None, **arguments: Any,
) -> Ran:  # fmt: skip
    """Run one stage in this process as the given rank, past the driver: what a Ray worker does.

    ``nodes``: of how many it is told, though all ranks are on this one. ``held``: signals wait for the end of a batch.
    ``storage``: the run folder, whose newest checkpoint it goes on from; kept there is what ``callbacks`` say.
    ``notices``: who tells of nodes that will be taken away.
    """
    import contextlib

    from raylit.assemble import RunSpec, run
    from raylit.config.trainer import parse_trainer_args
    from raylit.stage import Stage
    from raylit.view import RunState, WorkerTrainer
    from raylit.wire import World
    from raylit.worker.signals import interrupts_held

    given: dict[str, Any] = {
        "num_workers": world_size, "use_gpu": False, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        **({} if storage is None else {"enable_checkpointing": True}),
    }  # fmt: skip
    if not {"max_epochs", "max_steps", "max_time"} & set(arguments):
        given["max_epochs"] = 1
    config = parse_trainer_args(**{**given, **arguments})
    kind = "train" if stage == "fit" else stage
    passed = {name: loader for name, loader in ((kind, loaders), ("validate", val)) if loader is not None}
    spec = RunSpec(
        Stage(stage), config, module, datamodule=datamodule, loaders=passed, callbacks=list(callbacks),
        loggers=list(loggers),
        order_seed=order_seed, checkpoint=checkpoint, own_states=own_states or {}, checkpointer=checkpointer,
        storage=storage, looks_back=storage is not None, notices=notices,
    )  # fmt: skip
    each = world_size // nodes
    world = World(rank, rank % each, rank // each, world_size, local_world_size=each)
    view, events = WorkerTrainer(RunState()), list[dict[str, Any]]()
    with interrupts_held(view._state) if held else contextlib.nullcontext():
        outcome = run(spec, world, view, events.append, False)
    return Ran(outcome, module, view, events)


def here_on_path() -> None:
    """Let spawned processes import test modules by name, as ``tests.two_process.x``."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
