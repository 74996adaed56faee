"""What crosses between the driver process and the worker processes. Floor 0: standard library only.

Everything here must unpickle without torch: Ray's controller process handles the values without having
torch loaded. Tensors therefore travel inside ``bytes`` that only raylit opens, on a worker or on the driver.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class World:
    """Where one worker stands in the run. Ranks count from 0."""

    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_name: str = "localhost"
    # Storage folder of the run and the pyarrow filesystem path are the driver's to choose; None: nothing is kept.
    storage_path: str | None = None
    shares: int | None = None  # parts that each step's data are cut into; None: one for each worker

    @property
    def shares_of_a_step(self) -> int:
        """Parts that each step's data are cut into, over all workers."""
        return self.world_size if self.shares is None else self.shares

    @property
    def turns(self) -> int:
        """Shares of a step that each worker takes one after the other: as many on all, so all reach the same hooks."""
        return self.shares_of_a_step // self.world_size


@dataclass(frozen=True)
class Job:
    """One call of ``fit``, ``validate``, ``test`` or ``predict`` as a worker receives it.

    ``payload`` is cloudpickle of the parts that hold torch objects (module, loaders, callbacks, trainer settings);
    ``channel`` is the address of the driver's listener, or None where nothing is shown while the run goes on.
    """

    stage: str
    payload: bytes
    # A large payload lies in Ray's object store, once for each node rather than once a worker: its ObjectRef.
    payload_ref: Any = None
    channel: ChannelAddress | None = None
    sys_path: tuple[str, ...] = ()
    working_dir: str | None = None
    argv: tuple[str, ...] = ()  # of the caller's script: hooks that read the command line see the same
    refs: tuple[Any, ...] = ()  # Ray ObjectRefs that the payload names
    cpus: ClusterCpus | None = None  # None: unknown, or the cluster may grow
    elastic: Elastic | None = None  # None: the number of workers is fixed


def sizes(least: int, most: int, keeps_batch: bool) -> tuple[int, ...]:
    """The numbers of workers of an elastic run; where a step has ``most`` shares, those that have as many each."""
    return tuple(size for size in range(least, most + 1) if not keeps_batch or most % size == 0)


# What rank 0 returns in place of an outcome where the run is to go on with another number of workers.
RESIZED = b"raylit: resized"


@dataclass(frozen=True)
class Elastic:
    """Between which numbers of workers a run may be, and what one of them takes."""

    least: int
    most: int
    keeps_batch: bool  # a step's data are cut into ``most`` shares; see ``World.shares``
    bundle: dict[str, float]  # resources of one worker
    every_s: float = 60.0  # between two looks for room for more
    request: str = ""  # begins the names of the requests for room that the run keeps open

    def workers(self, room: int) -> int:
        """Return how many workers to have where there is room for so many; 0 where that is too few."""
        return max((size for size in self.sizes if size <= room), default=0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of workers that the run may have, rising."""
        return sizes(self.least, self.most, self.keeps_batch)


@dataclass(frozen=True)
class ClusterCpus:
    """The CPUs of the whole cluster, and what a run's workers take of them."""

    total: float
    workers: int
    each: float  # of one worker


@dataclass(frozen=True)
class ChannelAddress:
    """Where workers send live events: a TCP listener on the driver's node, with a random key for its HMAC handshake."""

    host: str
    port: int
    key: bytes


@dataclass(frozen=True)
class WorkerFailure:
    """An exception of a user's or raylit's code on one worker, in a form any process can unpickle."""

    rank: int
    node_name: str
    type_name: str  # qualified, for the message when the type itself cannot be unpickled
    message: str
    pickled: bytes | None  # cloudpickle of the exception without traceback; None where it cannot be pickled
    frames: tuple[tuple[str, int, str, str], ...]  # the user's own frames: (file, line, function, source line)
    where: dict[str, Any] = field(default_factory=dict)  # stage, epoch, batch_idx, global_step where known
