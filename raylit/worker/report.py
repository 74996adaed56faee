"""Telling Ray Train of a fit's checkpoint. Floor 4, worker side; every rank calls it, since Ray's report is a barrier.

The checkpoint lies in the run folder already, so nothing is uploaded. It is done once, when training is over: Ray's
queue of reports holds one, and a second one soon after would stall training.
"""

from __future__ import annotations

from raylit.checkpoint.store import Store

# The barrier is an asyncio actor, and Ray lets one work on so many calls at a time: of one more worker the last one's
# call would never be looked at, and no worker would return.
MOST_WORKERS_AT_A_BARRIER = 1000


def report_newest(store: Store, name: str | None, metrics: dict[str, float], workers: int) -> None:
    """Report ``metrics`` with the checkpoint ``name`` of the run folder's store; None: without one.

    More ``workers`` than Ray's barrier takes report nothing: what ``fit`` returns is read off the run folder anyway.
    """
    if workers > MOST_WORKERS_AT_A_BARRIER:
        return
    import ray.train

    checkpoint = None
    if name is not None and ray.train.get_context().get_world_rank() == 0:
        checkpoint = ray.train.Checkpoint(f"{store.folder.path_on_filesystem}/{name}", store.folder.filesystem)
    ray.train.report(metrics, checkpoint=checkpoint,
                     checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD)  # fmt: skip
