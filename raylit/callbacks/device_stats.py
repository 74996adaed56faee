"""DeviceStatsMonitor: log what the worker's processor and memory do. Floor 2; rank 0's, to the loggers."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from raylit.callback import Callback
from raylit.errors import ConfigError, missing

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView


class DeviceStatsMonitor(Callback):
    """Log the device's statistics at the start and end of training batches, each ``log_every_n_steps``; of rank 0.

    On a CUDA device ``torch.cuda.memory_stats``, which does not wait for the device. ``cpu_stats``: True: also the use
    of CPU, memory and swap in percent; None: these only where training runs on the CPU. They need psutil:
    MissingDependencyError without it, when the callback is made or training begins. ConfigError without a logger.

    Names are ``DeviceStatsMonitor.on_train_batch_start/cpu_percent`` and so on. They go to the loggers only, not to
    ``callback_metrics``, the bar or ``trainer.history``.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        if cpu_stats not in (None, True, False):
            raise ConfigError(f"DeviceStatsMonitor(cpu_stats={cpu_stats!r}): expected True, False or None")
        self._cpu_stats = cpu_stats
        if cpu_stats:
            _need_psutil()

    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        if not trainer.loggers and not trainer.fast_dev_run:
            raise ConfigError("DeviceStatsMonitor logs to loggers, and Trainer(logger=False) has none")

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        if self._wants_cpu(module):
            _need_psutil()
            import psutil

            psutil.cpu_percent()  # the first call has nothing to compare with, and says 0

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            self._log(trainer, module, "on_train_batch_start", trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step and trainer.global_step % every == 0:
            self._log(trainer, module, "on_train_batch_end", trainer.global_step)

    def _wants_cpu(self, module: Module) -> bool:
        return module.device.type == "cpu" if self._cpu_stats is None else self._cpu_stats

    def _log(self, trainer: TrainerView, module: Module, hook: str, step: int) -> None:
        if not trainer.is_global_zero:
            return
        stats: dict[str, float] = {}
        if module.device.type == "cuda":
            stats.update({name: float(value) for name, value in torch.cuda.memory_stats(module.device).items()})
        if self._wants_cpu(module):
            stats.update(cpu_stats())
        named = {f"{type(self).__qualname__}.{hook}/{name}": value for name, value in stats.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step)


def cpu_stats() -> dict[str, float]:
    """Return how much of the machine's CPUs, memory and swap is in use, in percent."""
    import psutil

    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


def _need_psutil() -> None:
    if importlib.util.find_spec("psutil") is None:
        raise missing("psutil", "stats", "DeviceStatsMonitor's CPU statistics")
