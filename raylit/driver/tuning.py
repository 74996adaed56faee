"""``trainer.lr_find`` and ``trainer.scale_batch_size``: trainings of which nothing is kept. Floor 5, driver side.

Each is a fit with few steps and one callback, in process or on workers, that trains a copy of the Module: no weights,
no attribute and no file of it stay.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from raylit.callback import Callback
from raylit.callbacks.batch_trial import BatchSizeTrial
from raylit.callbacks.configuring import configured
from raylit.callbacks.rate_range import LearningRateRange, check_automatic
from raylit.config.trainer import TrainerConfig
from raylit.datamodule import DataModule
from raylit.display.terminal import TerminalDisplay
from raylit.driver import runs
from raylit.driver.copies import copied_datamodule, copied_loaders, copied_module, parked, random_states_kept
from raylit.driver.lr_finder import LRFinder
from raylit.errors import ConfigError, DataError, OptimizerError, ResourceError, nearest
from raylit.module import Module
from raylit.stage import Stage
from raylit.worker.probe import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from raylit.trainer import Trainer

C = TypeVar("C", bound=Callback)


# == the learning rate =============================================================================================
def lr_find(
    trainer: Trainer, model: Module, train_dataloaders: Any, datamodule: DataModule | None, *, min_lr: float,
    max_lr: float, num_training: int, mode: str, early_stop_threshold: float | None, update_attr: bool, attr_name: str,
) -> LRFinder:  # fmt: skip
    """Train with a rising learning rate; see ``Trainer.lr_find``."""
    rates = ladder(min_lr, max_lr, num_training, mode)
    threshold = early_stop_threshold
    if threshold is not None and (not _is_number(threshold) or threshold <= 1):
        raise _refusal("lr_find", "early_stop_threshold", threshold, "a number above 1, or None: no early stop")
    _refuse_fast_dev_run(trainer, "lr_find")
    setting = _rate_setting(model, attr_name) if update_attr else None
    fit = trainer._config.fit
    check_automatic(model.automatic_optimization if fit.automatic_optimization is None else fit.automatic_optimization)
    if fit.train_batch_limit == 0:
        raise ConfigError("lr_find: Trainer(limit_train_batches=0) leaves nothing to train on")
    _refuse_used_up(train_dataloaders)
    seen = Trials(trainer, model, train_dataloaders, datamodule, num_training).run(LearningRateRange(rates, threshold))
    if not seen.lrs:
        raise OptimizerError("lr_find: no optimizer stepped, so there is no loss to look at")
    finder = LRFinder(mode, min_lr, max_lr, num_training, seen.lrs, seen.losses)
    found = finder.suggestion() if setting is not None else None
    with _telling(trainer) as tell:
        if len(seen.lrs) < num_training:
            tell(f"lr_find stopped after {len(seen.lrs)} of {num_training} steps: the loss diverged")
        if setting is not None and found is not None:
            setting.put(found)
            tell(f"lr_find set {setting.name} to {found:.6g}")
    if setting is not None and found is None:
        warnings.warn(
            f"lr_find has no suggestion, and {setting.name} stays as it is: of {len(seen.lrs)} steps too few are left "
            "without the first ten and the last, or the loss falls nowhere; look at plot()",
            UserWarning,
            stacklevel=3,
        )
    return finder


def ladder(min_lr: float, max_lr: float, num_training: int, mode: str) -> list[float]:
    """The learning rates of so many steps, from the least to the most; each the same factor or sum above the last."""
    if mode not in ("exponential", "linear"):
        raise _refusal("lr_find", "mode", mode, "'exponential' or 'linear'")
    if not _is_whole(num_training, 2):
        raise _refusal("lr_find", "num_training", num_training, "a whole number of at least 2")
    least = 0 if mode == "linear" else math.nextafter(0, 1)
    if not _is_number(min_lr) or min_lr < least:
        bound = "of at least 0" if mode == "linear" else "above 0"
        raise _refusal("lr_find", "min_lr", min_lr, f"a number {bound}")
    if not _is_number(max_lr) or max_lr <= min_lr:
        raise _refusal("lr_find", "max_lr", max_lr, f"a number above min_lr={min_lr!r}")
    places = [step / (num_training - 1) for step in range(num_training)]
    if mode == "linear":
        return [min_lr + (max_lr - min_lr) * place for place in places]
    return [min_lr * (max_lr / min_lr) ** place for place in places]


def _rate_setting(model: Module, attr_name: str) -> Setting:
    names = (attr_name,) if attr_name else ("lr", "learning_rate")
    for name in names:
        setting = Setting.of(name, model)
        if setting is not None:
            return setting
    asked = f"lr_find(attr_name={attr_name!r})" if attr_name else "lr_find"
    lacks = f"no {attr_name!r}" if attr_name else "neither 'lr' nor 'learning_rate'"
    raise ConfigError(
        f"{asked} sets the learning rate that configure_optimizers reads: {type(model).__name__} has {lacks}, as an "
        f"attribute or among its hyperparameters.{_there(attr_name or 'lr', model)} Give its name as attr_name, or "
        "update_attr=False and read suggestion()"
    )


def _refuse_used_up(source: Any) -> None:
    for each in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(each, Iterator):
            raise DataError(
                f"lr_find: train_dataloaders is a {type(each).__name__}, which gives its batches once: none would be "
                "left for fit. Pass a DataLoader, or write train_dataloader()"
            )


# == the batch size ================================================================================================
def scale_batch_size(
    trainer: Trainer, model: Module, train_dataloaders: Any, datamodule: DataModule | None, *, mode: str,
    steps_per_trial: int, init_val: int, max_trials: int, batch_arg_name: str,
) -> int:  # fmt: skip
    """Train with growing batches until one does not fit; see ``Trainer.scale_batch_size``."""
    if mode not in ("power", "binsearch"):
        raise _refusal("scale_batch_size", "mode", mode, "'power' or 'binsearch'")
    counts = {"steps_per_trial": steps_per_trial, "init_val": init_val, "max_trials": max_trials}
    for name, value in counts.items():
        if not _is_whole(value, 1):
            raise _refusal("scale_batch_size", name, value, "a whole number of at least 1")
    _refuse_fast_dev_run(trainer, "scale_batch_size")
    if train_dataloaders is not None:
        raise ConfigError(
            f"scale_batch_size makes loaders of other batch sizes, and a {type(train_dataloaders).__name__} that is "
            f"passed has its own: make it in train_dataloader() of the Module or the DataModule, with "
            f"batch_size=self.{batch_arg_name}"
        )
    owners = [model] if datamodule is None else [model, datamodule]
    setting = Setting.of(batch_arg_name, *owners)
    if setting is None:
        raise ConfigError(
            f"scale_batch_size(batch_arg_name={batch_arg_name!r}): "
            f"{' and '.join(type(each).__name__ for each in owners)} {'have' if len(owners) > 1 else 'has'} no "
            f"attribute or hyperparameter of this name.{_there(batch_arg_name, *owners)}"
        )
    trials = Trials(trainer, model, None, datamodule, steps_per_trial, whole_data=True)
    before = setting.values()
    with _telling(trainer) as tell:
        fits = _Fits(trials, setting, tell)
        try:
            found = largest(fits, mode, init_val, max_trials)
            if found is None:
                raise fits.failure(max_trials)
        except BaseException:
            setting.put_back(before)
            raise
        setting.put(found)
        tell(f"scale_batch_size set {batch_arg_name} to {found}")
    return found


def largest(fits: Callable[[int], bool], mode: str, first: int, most_trials: int) -> int | None:
    """Look for the largest size that fits, doubling from ``first``; None where none of those tried does.

    Mode ``"binsearch"`` then looks between the largest that fits and the smallest that does not; ``"power"`` is done.
    Where not even ``first`` fits, sizes are halved until one does. Asks ``most_trials`` times at most.
    """
    best: int | None = None
    size, top = first, None
    for _ in range(most_trials):
        if fits(size):
            best = size
        else:
            top = size
        if top is None:
            size *= 2
        elif best is None:
            size //= 2
            if size == 0:
                break
        elif mode == "power" or top - best <= 1:
            break
        else:
            size = (best + top) // 2
    return best


class _Fits:
    """Whether training with a batch size fits into memory, and there are data for it."""

    def __init__(self, trials: Trials, setting: Setting, tell: Callable[[str], None]) -> None:
        self._trials, self._setting, self._tell = trials, setting, tell
        self._made: tuple[int, list[int]] | None = None  # the size last tried, and what loaders made of it
        self._size, self._why = 0, ""
        self._error: DataError | None = None

    def __call__(self, size: int) -> bool:
        self._setting.put(size)
        why = self._problem(size)
        self._tell(f"batch size {size}: {why or 'fits'}")
        if why:
            self._size, self._why = size, why
        return not why

    def _problem(self, size: int) -> str:
        self._error = None
        try:
            seen = self._trials.run(BatchSizeTrial(size))
        except DataError as error:
            # A loader without a batch: of this size, or of any, which the smaller ones will tell.
            self._error = error.with_traceback(None)
            return _line(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = f"out of memory ({_line(error)})"  # and let go of the frames that hold what took it
        else:
            self._check_made(size, seen.made)
            return seen.short or ""
        finally:
            free_memory()
        return why

    def _check_made(self, size: int, made: list[int]) -> None:
        before, self._made = self._made, (size, made)
        if before is not None and made and before == (before[0], made) and before[0] != size:
            name = self._setting.name
            raise ConfigError(
                f"scale_batch_size: train_dataloader() makes batches of {made[0]}, whatever {name} is ({before[0]}, "
                f"then {size}). Make the loader with batch_size=self.{name}"
            )

    def failure(self, max_trials: int) -> Exception:
        """The error where no size fits."""
        if self._error is not None:
            return self._error
        if self._size == 1:
            return ResourceError(f"scale_batch_size: not even a batch of one sample can be trained: {self._why}")
        return ResourceError(
            f"scale_batch_size: no batch size was found in max_trials={max_trials}; the last tried was {self._size}: "
            f"{self._why}. Give a smaller init_val, or more trials"
        )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# == both ==========================================================================================================
class Trials:
    """Fits of ``steps`` optimizer steps, each on fresh copies of the caller's objects; random states are put back.

    As the Trainer says, but without validation, loggers, checkpoints and callbacks. ``whole_data``: without limits on
    the training batches.
    """

    def __init__(self, trainer: Trainer, model: Module, loaders: Any, datamodule: DataModule | None, steps: int,
                 whole_data: bool = False) -> None:  # fmt: skip
        self._trainer, self._model, self._loaders, self._datamodule = trainer, model, loaders, datamodule
        self._checked = False
        given = trainer._config
        limits: dict[str, Any] = {"limit_train_batches": 1.0, "overfit_batches": 0.0} if whole_data else {}
        # Callbacks that only say how to train, such as GradientAccumulationScheduler, are worked in.
        fit = configured(given.fit, runs.merge_callbacks(trainer, model)).fit
        fit = dataclasses.replace(
            fit, max_epochs=steps, min_epochs=None, max_steps=steps, min_steps=None, max_time=None,
            limit_val_batches=0, num_sanity_val_steps=0, val_check_interval=1.0, check_val_every_n_epoch=1,
            callbacks=(), profiler=None, detect_anomaly=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=given.placement.elastic,  # without a run folder nothing is written all the same
            **limits,
        )  # fmt: skip
        self._config = TrainerConfig(fit, given.placement)

    def run(self, watcher: C) -> C:
        """Train with this callback, and return it as it is then on global rank 0."""
        trainer = copy.copy(self._trainer)  # without the state of its runs
        trainer._config = self._config
        with parked(self._model), random_states_kept(devices=self._config.placement.in_process):
            model, datamodule = copied_module(self._model), copied_datamodule(self._datamodule)
            loaders = {"train": copied_loaders(self._loaders)}
            if not self._checked:
                runs.check_before_fit(trainer, model, [watcher], loaders, datamodule)
                self._checked = True
            spec = runs.describe(trainer, Stage.FIT, model, loaders, datamodule, [watcher], None)
            seen = runs.probe(trainer, spec)
        assert isinstance(seen, type(watcher))
        return seen


@dataclass(frozen=True)
class Setting:
    """A value that the Module, its hyperparameters, or the DataModule hold under one name; all of them together."""

    name: str
    attributes: tuple[Any, ...]  # objects that have it as an attribute
    params: tuple[dict[str, Any], ...]  # hyperparameters that have it

    @classmethod
    def of(cls, name: str, *owners: Module | DataModule) -> Setting | None:
        """Find where ``owners`` have it; None: nowhere."""
        params = tuple(each.hparams for each in owners if name in each.hparams)
        attributes = tuple(each for each in owners if hasattr(each, name) and _can_be_set(each, name))
        return cls(name, attributes, params) if params or attributes else None

    def put(self, value: Any) -> None:
        """Set it everywhere."""
        self.put_back([value] * (len(self.attributes) + len(self.params)))

    def values(self) -> list[Any]:
        """What it is everywhere, for ``put_back``."""
        return [getattr(each, self.name) for each in self.attributes] + [each[self.name] for each in self.params]

    def put_back(self, values: Sequence[Any]) -> None:
        """Set each as it was."""
        for owner, value in zip(self.attributes, values):
            setattr(owner, self.name, value)
        for params, value in zip(self.params, values[len(self.attributes) :], strict=True):
            params[self.name] = value


def _can_be_set(owner: object, name: str) -> bool:
    """False for a property that only reads, as of a hyperparameter."""
    found = getattr(type(owner), name, None)
    return not isinstance(found, property) or found.fset is not None


def _there(name: str, *owners: Module | DataModule) -> str:
    """Name the numbers that could have been meant."""
    names: dict[str, None] = {}
    for owner in owners:
        for each, value in [*vars(owner).items(), *owner.hparams.items()]:
            if not each.startswith("_") and _is_number(value):
                names[each] = None
    return f"{nearest(name, names)} It has: {', '.join(names)}." if names else ""


def _refuse_fast_dev_run(trainer: Trainer, call: str) -> None:
    if trainer._config.fit.fast_dev_run:
        raise ConfigError(
            f"{call} trains more steps than Trainer(fast_dev_run={trainer._config.fit.fast_dev_run}) allows; leave "
            "fast_dev_run out for it"
        )


def _refusal(call: str, name: str, value: object, accepted: str) -> ConfigError:
    return ConfigError(f"{call}({name}={value!r}): expected {accepted}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


@contextmanager
def _telling(trainer: Trainer) -> Iterator[Callable[[str], None]]:
    """How a line of information is shown, where the Trainer shows how a run goes."""
    display = TerminalDisplay()

    def tell(text: str) -> None:
        if trainer._config.fit.enable_progress_bar:
            display.event({"kind": "note", "text": text})

    try:
        yield tell
    finally:
        display.close()
