"""A worker of raylit's own pool: a plain Ray actor that evaluations reuse. Runs on the worker.

It has no Ray Train context: no ``ray.train.report``, and of the GPUs it sees only its own, as ``cuda:0``.
"""

from __future__ import annotations

import os
import socket

from raylit.wire import Job, World
from raylit.worker.entry import node_name, run_job
from raylit.worker.interface import name_interface


class PooledWorker:
    """Lives in one process over several jobs; its process group is made at the first and kept."""

    def place(self) -> tuple[str, str, str]:
        """(node id, node name for messages, address)."""
        import ray
        import ray.util

        return ray.get_runtime_context().get_node_id(), node_name(), str(ray.util.get_node_ip_address())

    def free_port(self) -> int:
        """A port that is free on this node now; asked of rank 0 for the rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def join(self, world: World, master: tuple[str, int], backend: str) -> None:
        """Enter the process group of all workers. A collective: every worker of the pool must be called."""
        import torch
        import torch.distributed as dist

        os.environ.update(
            MASTER_ADDR=master[0],
            MASTER_PORT=str(master[1]),
            RANK=str(world.global_rank),
            WORLD_SIZE=str(world.world_size),
            LOCAL_RANK=str(world.local_rank),
            LOCAL_WORLD_SIZE=str(world.local_world_size),
            NODE_RANK=str(world.node_rank),
        )
        name_interface(apart=world.local_world_size < world.world_size)
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        dist.init_process_group(backend, rank=world.global_rank, world_size=world.world_size)

    def run(self, job: Job, world: World, worker_main: str) -> bytes | None:
        """Run one job; rank 0's bytes. Raises ``WorkerFailed``."""
        outcome = run_job(job, world, worker_main)
        return outcome if world.global_rank == 0 else None
