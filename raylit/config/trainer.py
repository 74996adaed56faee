"""All of the Trainer's arguments in one frozen value, checked before anything starts. Floor 0: standard library only.

The checks of single arguments are in ``fit`` and ``placement``; what concerns both halves is here, at the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from raylit.config.amounts import check_precision
from raylit.config.fit import DEFAULT_MAX_EPOCHS, FitConfig, as_fast_dev_run
from raylit.config.names import refuse_unknown
from raylit.config.placement import PlacementConfig
from raylit.errors import ConfigError
from raylit.wire import sizes


@dataclass(frozen=True)
class TrainerConfig:
    """What happens in training, and where it runs."""

    fit: FitConfig = field(default_factory=FitConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)

    def __post_init__(self) -> None:
        # Of an object too, which is known here by its name alone: its class stands floors above.
        strategy = getattr(self.fit.strategy, "name", self.fit.strategy)
        if strategy == "dp" and self.placement.worker_range[1] > 1:
            raise ConfigError(
                f"Trainer(strategy='dp', num_workers={self.placement.num_workers}): 'dp' splits a batch over the "
                "devices of one worker, and keeps no second worker in step. Use 'ddp2' (the same in each worker, DDP "
                "between them), or num_workers=1."
            )
        if strategy in ("dp", "ddp2") and self.fit.sync_batchnorm:
            raise ConfigError(
                f"Trainer(strategy={strategy!r}, sync_batchnorm=True): the parts of a batch run one after another, so "
                "their BatchNorm layers cannot wait for each other. Use strategy='ddp' with a worker for each device."
            )
        if self.placement.elastic:
            self._check_elastic()
        if self.placement.use_gpu is False:
            # Where use_gpu is True or "auto" the same check runs again on the hardware that was found.
            check_precision(self.fit.precision, use_gpu=False)

    def _check_elastic(self) -> None:
        workers = self.placement.num_workers
        if not self.fit.enable_checkpointing and not self.fit.fast_dev_run:
            raise ConfigError(
                f"Trainer(num_workers={workers}, enable_checkpointing=False): an elastic run goes on from a checkpoint "
                "at another number of workers. Leave enable_checkpointing out, or give one number of workers."
            )
        if not self.fit.use_distributed_sampler:
            raise ConfigError(
                f"Trainer(num_workers={workers}, use_distributed_sampler=False): in an elastic run raylit shares the "
                "samples out anew when workers come and go, so that each is seen once. Leave use_distributed_sampler "
                "out, or give one number of workers."
            )
        least, most = self.placement.worker_range
        if self.placement.elastic_batch == "keep" and len(sizes(least, most, True)) == 1:
            smaller = max(size for size in sizes(1, most, True) if size < least)
            raise ConfigError(
                f"Trainer(num_workers={workers}): a step has {most} shares, and only {most} workers have as many of "
                f"them each. Use num_workers=({smaller}, {most}), num_workers={most}, or elastic_batch='scale'."
            )
        scaling = self.placement.scaling_config
        for name in ("label_selector", "accelerator_type", "topology"):
            if getattr(scaling, name, None) is not None:
                raise ConfigError(
                    f"Trainer(num_workers={workers}, scaling_config=ScalingConfig({name}=...)): an elastic run counts "
                    "room by resources alone. Name a resource in resources_per_worker, or give one number of workers."
                )
        strict = self.placement.placement_strategy
        if strict in ("STRICT_PACK", "STRICT_SPREAD"):
            raise ConfigError(
                f"Trainer(num_workers={workers}, placement_strategy={strict!r}): an elastic run takes workers where "
                f"there is room for them; use {strict.removeprefix('STRICT_')!r}, or give one number of workers."
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to be printed once, at the start of a fit: choices that raylit made and arguments without effect."""
        lines: list[str] = []
        if self.fit.max_epochs_defaulted:
            lines.append(f"Neither max_epochs nor max_steps is given: training ends after {DEFAULT_MAX_EPOCHS} epochs.")
        unused = self.placement.unused_in_process
        if unused:
            lines.append(
                f"num_workers=0 runs in this process, without Ray: {', '.join(unused)} {_have(unused)} no effect."
            )
        if self.placement.elastic_batch != "keep" and not self.placement.elastic:
            lines.append("elastic_batch has no effect: it is for num_workers=(min, max).")
        if self.fit.fast_dev_run:
            n = self.fit.fast_dev_run
            lines.append(f"fast_dev_run: {n} batch{'es' * (n > 1)} of each loader, no loggers, no checkpoints.")
        return tuple(lines)


FIT_ARGUMENTS = tuple(each.name for each in fields(FitConfig))
PLACEMENT_ARGUMENTS = tuple(each.name for each in fields(PlacementConfig))
TRAINER_ARGUMENTS = FIT_ARGUMENTS + PLACEMENT_ARGUMENTS


def parse_trainer_args(**given: Any) -> TrainerConfig:
    """Check the Trainer's arguments and return them as one value, with the effect of ``fast_dev_run`` worked in.

    Those that are left out have their defaults. Raises ``UnknownArgumentError`` for a name that does not exist, with
    the new or nearest one, and ``ConfigError`` for a value that is wrong, impossible, or contradicts another.
    """
    refuse_unknown("Trainer", given, TRAINER_ARGUMENTS)
    fit = FitConfig(**{name: value for name, value in given.items() if name in FIT_ARGUMENTS})
    placement = PlacementConfig(**{name: value for name, value in given.items() if name in PLACEMENT_ARGUMENTS})
    return TrainerConfig(as_fast_dev_run(fit), placement)


def _have(names: tuple[str, ...]) -> str:
    return "has" if len(names) == 1 else "have"
