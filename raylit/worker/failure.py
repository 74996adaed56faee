"""An exception's way from a worker to the caller: packed on the worker, rebuilt on the driver.

Both ends are in this file because they are one format. Standard library and cloudpickle only: Ray's controller
unpickles :class:`WorkerFailed` in a process that has neither torch nor the user's modules.
"""

from __future__ import annotations

import linecache
import sys
import sysconfig
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from raylit.errors import RaylitError
from raylit.wire import WorkerFailure, World

_FRAMES_SHOWN = 4
_FRAMES_KEPT = 12
# How collectives word the death of a peer (gloo, nccl, TCPStore, c10d); such an error is a consequence, not a cause.
_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "gloo",
    "nccl",
    "tcpstore",
    "process group",
    "remote process exited",
    "socket",
)


class WorkerFailed(Exception):
    """What a worker raises towards Ray Train: any process can unpickle it, whatever the user's exception was."""

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(f"{failure.type_name}: {failure.message}")
        self.failure = failure

    def __reduce__(self) -> tuple[type[WorkerFailed], tuple[WorkerFailure]]:
        return (WorkerFailed, (self.failure,))


def pack(error: BaseException, world: World) -> WorkerFailure:
    """On the worker: turn a caught exception into the value that travels.

    ``error.raylit_where``, a dict set by the engine, says where in the run it happened (stage, epoch, batch_idx).
    """
    where = dict(getattr(error, "raylit_where", {}))
    where.setdefault("raised_at_s", time.time())
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return WorkerFailure(
        rank=world.global_rank,
        node_name=world.node_name,
        type_name=f"{module}{kind.__qualname__}",
        message=_text(error),
        pickled=_pickle(error),
        frames=user_frames(error),
        where=where,
    )


def user_frames(error: BaseException) -> tuple[tuple[str, int, str, str], ...]:
    """The frames of the user's own files, outermost first; where there are none, the last three of all."""
    inside = library_folders()
    frames = [
        (frame.filename, frame.lineno or 0, frame.name, (frame.line or "").strip())
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    linecache.clearcache()
    own = [f for f in frames if not f[0].startswith(("<frozen", *inside))]
    if not own and not isinstance(error, RaylitError):  # raylit's own refusals say all in their message
        own = frames[-3:]
    return tuple(own[-_FRAMES_KEPT:])


def library_folders() -> tuple[str, ...]:
    """Folders whose frames say nothing about the user's code. Only modules already loaded are looked up."""
    folders = {sysconfig.get_path("stdlib"), str(Path(__file__).resolve().parents[1])}
    for name in ("torch", "ray"):
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            folders.add(str(Path(module.__file__).resolve().parent))
    # site-packages lies under the standard library's folder on most systems: all of it counts as not the user's.
    return tuple(f"{folder}/" for folder in folders)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # a user's __str__ must not hide the error it describes
        return f"<str() of the exception raised {type(broken).__name__}>"


def _pickle(error: BaseException) -> bytes | None:
    """Pickle the exception in the first form that also loads again here; None where there is no such form.

    Exceptions whose ``__init__`` takes other arguments than ``args`` pickle but do not unpickle: these travel as
    (type, args, attributes). Attributes that cannot be pickled are left out before the exception itself is given up.
    """
    state = {k: v for k, v in vars(error).items() if not k.startswith(("raylit_", "__"))}
    plain = {k: v for k, v in state.items() if isinstance(v, (str, int, float, bool, type(None)))}
    forms: tuple[Any, ...] = (error, (type(error), error.args, state), (type(error), error.args, plain))
    for form in forms:
        try:
            data: bytes = cloudpickle.dumps(form)
            if type(_load(data)) is type(error):
                return data
        except Exception:  # whatever a user's __reduce__ or __init__ raises: the next form may work
            continue
    return None


def _load(data: bytes) -> BaseException:
    loaded = cloudpickle.loads(data)
    if isinstance(loaded, BaseException):
        return loaded
    kind, args, state = loaded
    error: BaseException = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def rebuild(failure: WorkerFailure) -> BaseException:
    """On the driver: the same exception type, with the worker's place and the user's frames as a note.

    The whole :class:`WorkerFailure` is on the exception as ``raylit_failure``. A type that cannot be rebuilt becomes
    a RuntimeError that names it.
    """
    error: BaseException | None = None
    if failure.pickled is not None:
        try:
            error = _load(failure.pickled)
        except Exception:  # e.g. a module that exists on the worker only
            error = None
    if error is None:
        error = RuntimeError(f"{failure.type_name}: {failure.message} (the exception itself could not be pickled)")
    note = describe(failure)
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        # Python 3.10 prints no notes: the text joins the message, where str(error) and the traceback show it.
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
    error.__dict__["raylit_failure"] = failure
    return bare(error)


def bare(error: BaseException) -> BaseException:
    """Drop traceback, cause and context, so that ``raise bare(error)`` shows the caller's frames and nothing of Ray."""
    error.__cause__ = None
    error.__context__ = None
    error.__suppress_context__ = True
    return error.with_traceback(None)


def describe(failure: WorkerFailure, world_size: int | None = None) -> str:
    """At most five lines: where it was raised, and the innermost of the user's frames, one line each."""
    where: Mapping[str, Any] = failure.where
    place = [f"worker {failure.rank}" + (f" of {world_size}" if world_size else ""), f"node {failure.node_name}"]
    place += [str(where["stage"])] if "stage" in where else []
    names = {"epoch": "epoch", "batch_idx": "batch", "global_step": "step"}
    place += [f"{text} {where[key]}" for key, text in names.items() if where.get(key) is not None]
    lines = [f"raised on {', '.join(place)}"]
    for file, line, function, source in failure.frames[-_FRAMES_SHOWN:]:
        lines.append(f'  File "{file}", line {line}, in {function}' + (f": {source}" if source else ""))
    return "\n".join(lines)


def is_consequence(failure: WorkerFailure) -> bool:
    """Whether this looks like a collective that broke because another rank was gone."""
    message = failure.message.lower()
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "ConnectionError")
    return failure.type_name.rsplit(".", 1)[-1] in kinds and any(word in message for word in _PEER_WORDS)


def first_cause(failures: list[WorkerFailure]) -> WorkerFailure:
    """The failure to show: the earliest that is no consequence of another's, else the earliest of all.

    "Earliest" compares the nodes' own clocks, so it is approximate; causes are told from consequences first.
    """
    causes = [f for f in failures if not is_consequence(f)] or failures
    return min(causes, key=lambda f: (float(f.where.get("raised_at_s", 0.0)), f.rank))
