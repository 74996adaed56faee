"""What all trials of a search begin with, kept in its folder: one that is taken up gives its later trials the same.

Floor 6, on the driver.
"""

from __future__ import annotations

import io

import torch

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.ranks import as_plain, from_plain
from raylit.search.trial import TrialSpec

FILE = "search_start.ckpt"


def keep(spec: TrialSpec, folder: Folder) -> None:
    """Write down the random state and the seed of the epochs' orders. Raises OSError."""
    kept = io.BytesIO()
    torch.save({"random": as_plain(spec.random_state or {}), "order_seed": spec.order_seed}, kept)
    folder.write_small(FILE, kept.getvalue())


def take_up(spec: TrialSpec, folder: Folder) -> None:
    """Put what the search began with into ``spec``; an older search, which has kept nothing, begins as this process."""
    data = folder.read(FILE)
    if data is not None:
        kept = torch.load(io.BytesIO(data), weights_only=True)
        spec.random_state, spec.order_seed = from_plain(kept["random"]), int(kept["order_seed"])
