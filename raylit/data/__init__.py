"""Loaders as one rank sees them: who takes which samples, in which order, from which position on. Floor 2.

Rank and world size are arguments everywhere: nothing here talks to other processes. Imports no sibling.
"""

from raylit.data.batch import batch_size_of, split_time, to_device
from raylit.data.loader import CombinedLoader, PreparedLoader, prepare, prepare_all, prepare_train
from raylit.data.ray_data import RayDataLoader
from raylit.data.sampler import ShardedBatchSampler, num_blocks, rank_blocks

__all__ = [
    "CombinedLoader",
    "PreparedLoader",
    "RayDataLoader",
    "ShardedBatchSampler",
    "batch_size_of",
    "num_blocks",
    "prepare",
    "prepare_all",
    "prepare_train",
    "rank_blocks",
    "split_time",
    "to_device",
]
