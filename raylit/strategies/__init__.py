"""How a Module runs on a worker's device and together with the other workers. Floor 2, worker side."""

from raylit.strategies.ddp import DDP
from raylit.strategies.single import SingleDevice

__all__ = ["DDP", "SingleDevice"]
