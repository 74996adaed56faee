"""How a Module runs on a worker's device and together with the other workers. Floor 2, worker side."""

from raylit.strategies.ddp import DDP
from raylit.strategies.dp import DDP2, DataParallel
from raylit.strategies.single import SingleDevice

__all__ = ["DDP", "DDP2", "DataParallel", "SingleDevice"]
