"""What happens in training: the half of the Trainer's arguments that does not depend on where it runs. Floor 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from raylit.config import amounts
from raylit.config.checks import flag, instance, number, one_of, refuse, whole, whole_or_none
from raylit.errors import ConfigError, nearest

STRATEGIES = ("auto", "ddp", "fsdp", "dp", "ddp2")
PROFILERS = ("simple", "advanced", "pytorch")
DEFAULT_MAX_EPOCHS = 1000

# Names of Lightning's strategies that raylit has under another name, or not at all.
_OTHER_STRATEGIES = {
    "ddp_spawn": "use 'ddp': Ray starts the workers",
    "ddp_notebook": "use 'ddp': Ray starts the workers, from a notebook too",
    "ddp_fork": "use 'ddp': Ray starts the workers",
    "ddp_cpu": "use 'ddp' with num_workers=N and use_gpu=False",
    "ddp_find_unused_parameters_true": "use the DDP object of raylit.strategies with find_unused_parameters=True",
    "ddp_find_unused_parameters_false": "use 'ddp'",
    "fsdp_native": "use 'fsdp'",
    "ddp_sharded": "use 'fsdp'",
    "deepspeed": "use 'fsdp'",
    "horovod": "use 'ddp'",
    "single_device": "use 'auto' with num_workers=1, or num_workers=0 for this process",
}


@dataclass(frozen=True)
class FitConfig:
    """Fields are named and valued as the Trainer's arguments (section 8 of the contract), each in its plain form.

    Epochs and batches in limits are counted per rank, and from 1; ``seed`` None: random states are left as they are.
    Raises ``ConfigError`` naming argument, value and what is accepted. ``dataclasses.replace`` checks again.
    """

    max_epochs: int | None = None  # -1: no limit; None: 1000, unless max_steps or max_time end the run
    min_epochs: int | None = None
    max_steps: int = -1  # rounds of optimizer steps; -1: no limit
    min_steps: int | None = None
    max_time: timedelta | None = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    overfit_batches: int | float = 0.0  # 0: off
    fast_dev_run: int = 0  # batches; 0: off
    val_check_interval: int | float = 1.0  # a fraction of the training epoch, or training batches
    check_val_every_n_epoch: int | None = 1  # None: val_check_interval counts batches over the ends of epochs
    num_sanity_val_steps: int = 2  # batches; -1: all
    accumulate_grad_batches: int | Mapping[int, int] = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    precision: str = "32-true"
    truncated_bptt_steps: int | None = None
    automatic_optimization: bool | None = None  # None: as the Module says
    callbacks: tuple[Any, ...] = ()
    logger: Any = True  # True: the default; a tuple of loggers; () for none
    log_every_n_steps: int = 50  # 0: never
    enable_progress_bar: bool = True
    enable_model_summary: bool = True
    enable_checkpointing: bool = True
    deterministic: bool | str = False  # or "warn"
    benchmark: bool | None = None  # None: torch's own setting is left as it is
    detect_anomaly: bool = False
    profiler: Any = None
    sync_batchnorm: bool = False
    use_distributed_sampler: bool = True
    reload_dataloaders_every_n_epochs: int = 0  # 0: never
    prepare_data_per_node: bool | None = None  # None: as the DataModule or Module says
    inference_mode: bool = True
    seed: int | None = None
    strategy: Any = "auto"
    progress_timeout: timedelta | None = timedelta(minutes=30)  # None: wait for ever

    def __post_init__(self) -> None:
        for name, value in (_lengths(self) | _optimisation(self) | _parts(self)).items():
            # The plain form replaces what was given; the dataclass is frozen for everyone else.
            object.__setattr__(self, name, value)
        _check_together(self)

    @property
    def max_epochs_defaulted(self) -> bool:
        """Whether the 1000 epochs are raylit's choice, so that a note is due."""
        return self.max_epochs is None and self.max_steps == -1 and self.max_time is None

    @property
    def epoch_limit(self) -> int | None:
        """Epochs after which training ends; None: no limit."""
        if self.max_epochs_defaulted:
            return DEFAULT_MAX_EPOCHS
        return None if self.max_epochs in (None, -1) else self.max_epochs

    @property
    def step_limit(self) -> int | None:
        """Rounds of optimizer steps after which training ends; None: no limit."""
        return None if self.max_steps == -1 else self.max_steps

    @property
    def max_time_s(self) -> float | None:
        """Seconds after which training ends; None: no limit."""
        return None if self.max_time is None else self.max_time.total_seconds()

    @property
    def progress_timeout_s(self) -> float | None:
        """Seconds without progress after which a worker is ended; None: never."""
        return None if self.progress_timeout is None else self.progress_timeout.total_seconds()

    @property
    def train_batch_limit(self) -> int | float:
        """``limit_train_batches``, or ``overfit_batches`` where that is on. For ``amounts.batches``."""
        return self.overfit_batches or self.limit_train_batches

    @property
    def val_batch_limit(self) -> int | float:
        """``limit_val_batches``; under ``overfit_batches`` the same amount as training, unless it was given itself."""
        return (
            self.overfit_batches if self.overfit_batches and self.limit_val_batches == 1.0 else self.limit_val_batches
        )

    def accumulation_at(self, epoch: int) -> int:
        """Return the batches in an accumulation group in ``epoch`` (from 0)."""
        return amounts.accumulation_at(self.accumulate_grad_batches, epoch)


def as_fast_dev_run(config: FitConfig) -> FitConfig:
    """Return what ``fast_dev_run=n`` means: n batches of everything, one epoch, and nothing written.

    Checkpoints are off, no sanity check, no minimum, no time limit. ``fast_dev_run`` keeps its value, so that callbacks
    that write can see it, and the driver, which puts loggers that keep nothing in their place. Without fast_dev_run the
    same config comes back.
    """
    n = config.fast_dev_run
    if n == 0:
        return config
    return replace(
        config,
        max_epochs=1,
        min_epochs=None,
        max_steps=n,
        min_steps=None,
        max_time=None,
        limit_train_batches=n,
        limit_val_batches=n,
        limit_test_batches=n,
        limit_predict_batches=n,
        overfit_batches=0.0,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )


def _lengths(given: FitConfig) -> dict[str, Any]:
    """Check how long and how often: epochs, steps, batches."""
    interval = amounts.batch_amount("val_check_interval", given.val_check_interval)
    if not interval:
        refuse("val_check_interval", interval, "expected more than 0; limit_val_batches=0 turns validation off")
    # Lightning 1.0's default is None, and reads as "no limit".
    max_steps = -1 if given.max_steps is None else whole("max_steps", given.max_steps, -1, "-1: no limit")
    dev = given.fast_dev_run
    checked: dict[str, Any] = {
        "max_epochs": whole_or_none("max_epochs", given.max_epochs, -1, "-1: no limit"),
        "min_epochs": whole_or_none("min_epochs", given.min_epochs, 0),
        "max_steps": max_steps,
        "min_steps": whole_or_none("min_steps", given.min_steps, 0),
        "max_time": amounts.duration("max_time", given.max_time),
        "fast_dev_run": int(dev) if isinstance(dev, bool) else whole("fast_dev_run", dev, 0, "batches; or True for 1"),
        "val_check_interval": interval,
        "check_val_every_n_epoch": whole_or_none("check_val_every_n_epoch", given.check_val_every_n_epoch, 1),
        "num_sanity_val_steps": whole("num_sanity_val_steps", given.num_sanity_val_steps, -1, "-1: all batches"),
        "log_every_n_steps": whole("log_every_n_steps", given.log_every_n_steps, 0, "0: never"),
        "reload_dataloaders_every_n_epochs": whole(
            "reload_dataloaders_every_n_epochs", given.reload_dataloaders_every_n_epochs, 0, "0: never"
        ),
    }
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        value = getattr(given, name)
        checked[name] = 1.0 if value is None else amounts.batch_amount(name, value)
    checked["progress_timeout"] = amounts.duration("progress_timeout", given.progress_timeout)
    checked["overfit_batches"] = amounts.batch_amount("overfit_batches", given.overfit_batches)
    return checked


def _optimisation(given: FitConfig) -> dict[str, Any]:
    """Check what a step does. Lightning 1.0's "off" values (0, None) are taken as such."""
    clip = given.gradient_clip_val
    if clip is not None:
        clip = number("gradient_clip_val", clip, "expected a number of at least 0 (0 or None: no clipping)")
        if clip < 0:
            refuse("gradient_clip_val", clip, "expected a number of at least 0 (0 or None: no clipping)")
    algorithm = "norm" if given.gradient_clip_algorithm is None else given.gradient_clip_algorithm
    groups = 1 if given.accumulate_grad_batches is None else given.accumulate_grad_batches
    seed = whole_or_none("seed", given.seed, 0)
    if seed is not None and seed > 2**32 - 1:
        refuse("seed", seed, "expected at most 4294967295, numpy's largest seed")
    return {
        "accumulate_grad_batches": amounts.accumulation("accumulate_grad_batches", groups),
        "gradient_clip_val": clip or None,
        "gradient_clip_algorithm": one_of("gradient_clip_algorithm", algorithm, ("norm", "value")),
        "precision": amounts.precision("precision", given.precision),
        "truncated_bptt_steps": whole_or_none("truncated_bptt_steps", given.truncated_bptt_steps, 0, "0: off") or None,
        "seed": seed,
    }


def _parts(given: FitConfig) -> dict[str, Any]:
    """Check switches, and the objects as far as this floor can: what they are is for their owners to say."""
    checked: dict[str, Any] = {
        name: flag(name, getattr(given, name))
        for name in ("detect_anomaly", "sync_batchnorm", "use_distributed_sampler")
    }
    checked["inference_mode"] = flag("inference_mode", given.inference_mode)
    for name in ("enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
        value = getattr(given, name)
        checked[name] = True if value is None else flag(name, value)  # None is Lightning 2's way to say "the default"
    for name in ("benchmark", "automatic_optimization", "prepare_data_per_node"):
        value = getattr(given, name)
        checked[name] = None if value is None else flag(name, value)
    mode = False if given.deterministic is None else given.deterministic
    if not isinstance(mode, bool) and mode != "warn":
        refuse("deterministic", mode, "expected True, False or 'warn'")
    checked["deterministic"] = mode
    checked["callbacks"] = _objects("callbacks", given.callbacks, "a callback object, or a list of them")
    checked["logger"] = given.logger is None or given.logger
    if checked["logger"] is not True:
        loggers = () if given.logger is False else given.logger
        checked["logger"] = _objects("logger", loggers, "True, False, a logger object, or a list of them")
    checked["profiler"] = _profiler(given.profiler)
    checked["strategy"] = _strategy(given.strategy)
    return checked


def _objects(name: str, value: object, accepted: str) -> tuple[Any, ...]:
    """Read one object, a list of them, or None, as a tuple."""
    if value is None:
        return ()
    items = tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    for item in items:
        instance(name, item, accepted)
        if item is None or isinstance(item, (str, int, float, dict)):
            refuse(name, value, f"expected {accepted}")
    return items


def _profiler(value: object) -> object:
    if value is None or value is False:
        return None
    if value is True or isinstance(value, str):
        return "simple" if value is True else one_of("profiler", value, PROFILERS)
    instance("profiler", value, f"one of {PROFILERS}, or a profiler object")
    return value


def _strategy(value: object) -> object:
    if value is None:
        return "auto"
    instance("strategy", value, f"one of {STRATEGIES}, or a raylit.strategies object")
    if isinstance(value, (bool, int, float, list, tuple, dict)):
        refuse("strategy", value, f"expected one of {STRATEGIES}, or a raylit.strategies object")
    if isinstance(value, str) and value not in STRATEGIES:
        family = next(
            (old for old in (value, value.split("_stage")[0], value.split("_")[0]) if old in _OTHER_STRATEGIES), ""
        )
        advice = _OTHER_STRATEGIES.get(family) or f"expected one of {STRATEGIES}, or a raylit.strategies object"
        refuse("strategy", value, f"{advice}.{nearest(value, STRATEGIES) if not family else ''}")
    return value


def _check_together(config: FitConfig) -> None:
    """Refuse arguments that contradict one another."""
    for least, most, unlimited in (
        ("min_epochs", "max_epochs", config.max_epochs in (None, -1)),
        ("min_steps", "max_steps", config.max_steps == -1),
    ):
        low, high = getattr(config, least), getattr(config, most)
        if low is not None and not unlimited and low > high:
            raise ConfigError(f"Trainer({least}={low}, {most}={high}): the least is above the most.")
    if config.overfit_batches and config.limit_train_batches != 1.0:
        raise ConfigError(
            f"Trainer(overfit_batches={config.overfit_batches}, limit_train_batches={config.limit_train_batches}): "
            "both say how much of the training data is used. Leave one out."
        )
    if config.check_val_every_n_epoch is None and not isinstance(config.val_check_interval, int):
        raise ConfigError(
            f"Trainer(check_val_every_n_epoch=None, val_check_interval={config.val_check_interval}): "
            "validation that runs on over epochs is counted in batches: give val_check_interval as a whole number."
        )
