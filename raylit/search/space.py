"""The space of a search: which key reaches what, checked before anything starts. Floor 6, driver and trials; no Ray.

::

    "lr", "hidden"           the Module's hyperparameters: arguments of its __init__
    "data.batch_size"        the DataModule's
    "trainer.precision"      the Trainer's, of those that say what happens in training
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raylit.config.fit import FitConfig
from raylit.config.trainer import FIT_ARGUMENTS, PLACEMENT_ARGUMENTS, TrainerConfig
from raylit.datamodule import DataModule
from raylit.errors import ConfigError, nearest
from raylit.module import Module

_DATA, _TRAINER = "data.", "trainer."
# Of the Trainer's arguments those that are no value of a trial's: objects that live on, and what a search sets itself.
_NOT_OF_A_TRIAL = ("callbacks", "logger", "fast_dev_run", "enable_progress_bar", "enable_model_summary")


@dataclasses.dataclass(frozen=True)
class Parts:
    """One trial's configuration by whom it reaches; names without their prefixes."""

    module: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]


def split(config: Mapping[str, Any]) -> Parts:
    """Sort a configuration's keys."""
    parts = Parts({}, {}, {})
    for key, value in config.items():
        if key.startswith(_DATA):
            parts.data[key.removeprefix(_DATA)] = value
        elif key.startswith(_TRAINER):
            parts.trainer[key.removeprefix(_TRAINER)] = value
        else:
            parts.module[key] = value
    return parts


def check_names(space: Mapping[str, Any], module_class: type[Module], datamodule: Any) -> None:
    """Refuse a key that nothing takes, and an argument of the Module that nothing gives. ConfigError."""
    for key in space:
        if not isinstance(key, str):
            raise ConfigError(f"param_space has the key {key!r}; keys are names of hyperparameters, such as 'lr'")
    parts = split(space)
    _check_arguments(module_class, parts.module, "", required=True)
    if parts.data:
        if datamodule is None:
            raise ConfigError(
                f"param_space has {_DATA}{next(iter(parts.data))!s}, and there is no DataModule: pass datamodule="
            )
        owner = datamodule if inspect.isclass(datamodule) else type(datamodule)
        _check_arguments(owner, parts.data, _DATA, required=inspect.isclass(datamodule))
    accepted = [name for name in FIT_ARGUMENTS if name not in _NOT_OF_A_TRIAL]
    for name in parts.trainer:
        if name in accepted:
            continue
        where = f"param_space key {_TRAINER + name!r}"
        if name in PLACEMENT_ARGUMENTS:
            raise ConfigError(f"{where}: where trials run is the same for all; give it to trainer=Trainer(...)")
        if name in _NOT_OF_A_TRIAL:
            raise ConfigError(f"{where}: give it to trainer=Trainer(...), which all trials copy")
        raise ConfigError(f"{where}: the Trainer has no such argument.{nearest(name, accepted)}")


def _check_arguments(owner: type, given: Iterable[str], prefix: str, required: bool) -> None:
    parameters = dict(inspect.signature(owner.__init__).parameters)  # type: ignore[misc]
    parameters.pop(next(iter(parameters)), None)  # self
    kinds = inspect.Parameter
    named = {name: p for name, p in parameters.items() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)}
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in named and not takes_any:
            raise ConfigError(
                f"param_space key {prefix + name!r}: {owner.__name__}.__init__ has no argument {name!r}."
                f"{nearest(name, named)} It takes {', '.join(named) or 'none'}."
                + ("" if prefix else f" Prefixes: {_DATA!r} for the DataModule, {_TRAINER!r} for the Trainer.")
            )
    missing = [name for name, p in named.items() if p.default is kinds.empty and name not in given]
    if required and missing:
        raise ConfigError(
            f"{owner.__name__}.__init__ needs {', '.join(missing)}, and param_space has no such key: add it, as a "
            "value or as something to search over"
        )


def fit_config(trainer: TrainerConfig, given: Mapping[str, Any]) -> FitConfig:
    """The Trainer's training arguments with a trial's own in their place. ConfigError names the key of the space."""
    if not given:
        return trainer.fit
    try:
        return dataclasses.replace(trainer.fit, **given)
    except ConfigError as error:
        raise ConfigError(f"param_space, trainer.*: {error}") from None


def built_module(module_class: type[Module], given: Mapping[str, Any]) -> Module:
    """Build a trial's Module. ConfigError where it does not save what the search gave it: nothing could rebuild it."""
    module = module_class(**given)
    saved = module.hparams
    lost = [name for name in given if name not in saved]
    if lost:
        raise ConfigError(
            f"{module_class.__name__} does not save the hyperparameter {lost[0]!r} that the search gives it, so no "
            "checkpoint of it could be loaded: call self.save_hyperparameters() in __init__"
        )
    changed = [name for name in given if not _same(saved[name], given[name])]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{module_class.__name__} saved {name}={saved[name]!r}, and the search gave {given[name]!r}: save "
            "hyperparameters as they come, and keep what is made of them under another name"
        )
    return module


def _same(saved: Any, given: Any) -> bool:
    try:
        return bool(saved == given) or (saved != saved and given != given)
    except Exception:  # arrays compare by element, and other objects as they please
        return True


def built_datamodule(datamodule: Any, given: Mapping[str, Any]) -> DataModule | None:
    """Build a trial's DataModule: of its class, or anew from an object's saved hyperparameters; the object itself where
    the search gives it nothing."""
    if datamodule is None or (not given and not inspect.isclass(datamodule)):
        built: DataModule | None = datamodule
        return built
    make: Any = datamodule if inspect.isclass(datamodule) else type(datamodule)
    before: Mapping[str, Any] = {} if inspect.isclass(datamodule) else datamodule.hparams
    if not inspect.isclass(datamodule) and not before and _needs_more(make, given):
        raise ConfigError(
            f"a trial builds the {make.__name__} anew with its own {', '.join(given)}, and the other arguments are not "
            "saved: call self.save_hyperparameters() in its __init__, or pass the class"
        )
    anew: DataModule = make(**{**before, **given})
    return anew


def _needs_more(make: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.default is inspect.Parameter.empty and p.name not in given
               and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)  # fmt: skip
