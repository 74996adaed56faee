"""Hyperparameters: a dict with attribute access, and how they are read off an ``__init__``. Floor 1, any process."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from raylit.errors import ConfigError, nearest


class HParams(dict[str, Any]):
    """Hyperparameters by name; ``hparams.lr`` is ``hparams["lr"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}.{nearest(name, self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> HParams:
        return HParams({key: copy.deepcopy(value, memo) for key, value in self.items()})


def as_dict(obj: Any) -> dict[str, Any]:
    """Return the contents of a mapping, Namespace or dataclass object; ConfigError for anything else."""
    if isinstance(obj, Mapping):
        return {str(key): value for key, value in obj.items()}
    if isinstance(obj, argparse.Namespace):
        return dict(vars(obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    raise ConfigError(
        f"save_hyperparameters() takes names of __init__'s arguments, or one dict, Namespace or dataclass object; "
        f"got {type(obj).__name__}"
    )


def init_arguments(obj: object, frame: FrameType | None) -> dict[str, Any]:
    """Collect the arguments of ``obj``'s ``__init__`` from the frame that called, through subclasses' ``__init__``.

    A subclass's arguments win over its parents', since they are what the person gave.
    """
    collected: dict[str, Any] = {}
    while frame is not None:
        names, _, keywords, values = inspect.getargvalues(frame)
        if not names or values.get(names[0]) is not obj or frame.f_code.co_name != "__init__":
            if collected or frame.f_code.co_name != "__init__":
                break
        else:
            collected.update({name: values[name] for name in names[1:] if name in values})
            if keywords and keywords in values:
                collected.update(values[keywords])
        frame = frame.f_back
    return collected


def select(values: Mapping[str, Any], names: Iterable[str], ignore: str | Iterable[str] | None) -> dict[str, Any]:
    """Keep ``names`` (all where empty) and leave out ``ignore``; ConfigError for a name that is not there."""
    wanted = list(names)
    for name in wanted:
        if name not in values:
            raise ConfigError(f"save_hyperparameters({name!r}): __init__ has no such argument.{nearest(name, values)}")
    left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
    return {name: value for name, value in values.items() if (not wanted or name in wanted) and name not in left_out}


class HyperparametersMixin:
    """``save_hyperparameters`` and ``hparams`` for Module and DataModule."""

    def save_hyperparameters(
        self, *args: Any, ignore: str | Iterable[str] | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Keep the arguments of ``__init__`` in ``self.hparams``; written to every checkpoint and to the run folder.

        Without arguments: all of them, defaults included, through subclasses. With names: those. With one dict,
        Namespace or dataclass object: its contents. ``logger=False`` keeps them out of the loggers.
        """
        if len(args) == 1 and not isinstance(args[0], str):
            values = select(as_dict(args[0]), (), ignore)
        else:
            if frame is None:
                current = inspect.currentframe()
                frame = current.f_back if current is not None else None
            values = select(init_arguments(self, frame), args, ignore)
        merged = HParams({**self.__dict__.get("_hparams", {}), **values})
        self.__dict__["_hparams"] = merged
        self.__dict__["_hparams_initial"] = copy.deepcopy(merged)
        self.__dict__["_log_hparams"] = logger

    @property
    def hparams(self) -> HParams:
        """The saved hyperparameters: a dict with attribute access."""
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = HParams()
        found: HParams = self.__dict__["_hparams"]
        return found

    @hparams.setter
    def hparams(self, value: Any) -> None:
        self.save_hyperparameters(value)

    @property
    def hparams_initial(self) -> HParams:
        """A copy of the hyperparameters as first saved."""
        return HParams(copy.deepcopy(self.__dict__.get("_hparams_initial", {})))
