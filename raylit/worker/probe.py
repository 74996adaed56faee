"""A training of which nothing is kept but what its callback saw. Floor 4; a worker, or the caller's own process."""

from __future__ import annotations

import gc
import pickle

import torch

from raylit.assemble import run, watched
from raylit.errors import WorkerLostError
from raylit.travel import unpack_spec
from raylit.view import RunState, WorkerTrainer
from raylit.wire import Job, World
from raylit.worker.channel import WorkerChannel

# How torch words it where there is no type for it: all words of an entry stand in the message.
_WORDS = (
    ("CUDA", "out of memory"),
    ("CUDNN_STATUS_NOT_SUPPORTED",),  # what cudnn says where it finds no room: pytorch/pytorch#4107
    ("CUDNN_STATUS_ALLOC_FAILED",),
    ("CUBLAS_STATUS_ALLOC_FAILED",),
    ("DefaultCPUAllocator", "can't allocate memory"),
    ("DefaultCPUAllocator", "not enough memory"),
)


def worker_main(job: Job, world: World, channel: WorkerChannel | None) -> bytes:
    """Run a fit on a Ray worker; return its first callback as it is on rank 0, pickled."""
    free_memory()  # of an earlier job in this process
    spec, use_gpu = unpack_spec(job.payload, job.refs)
    spec.cpus = job.cpus
    view = WorkerTrainer(RunState())
    with watched(view._state, world, spec.config.fit.progress_timeout_s, channel):
        run(spec, world, view, channel.send if channel is not None else None, use_gpu)
    return pickle.dumps(spec.callbacks[0]) if world.global_rank == 0 else b""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory is exhausted: a GPU's, this process's, or a node's."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error)
    if isinstance(error, WorkerLostError):
        return "low on memory" in text  # Ray ended the worker, before the system would have
    return isinstance(error, RuntimeError) and any(all(word in text for word in words) for words in _WORDS)


def free_memory() -> None:
    """Give back what a training that is over has left, in cycles and in torch's cache."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
