"""Hyperparameters: a dict with attribute access, and how they are read off an ``__init__``. Floor 1, any process.

They are read from the frames of the ``__init__`` calls that are under way, so that defaults, ``**kwargs`` and the
arguments of subclasses are all there. What no file can keep is said at once, in the process of the person.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import nn

from raylit.errors import ConfigError, nearest
from raylit.plain import fields_of, plain_entries


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
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}.{nearest(name, self)}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> HParams:
        return HParams({key: copied(value, memo) for key, value in self.items()})


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy; the object itself where that has none (a lock, a generator), or is a ``nn.Module``."""
    if isinstance(value, nn.Module):
        return value  # layers may be large, and train on
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever an object's own copying raises
        return value


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested hyperparameters, or a report of them, with one key a value: ``model/hidden``."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def as_dict(obj: Any) -> dict[str, Any]:
    """Return the contents of a mapping, Namespace or dataclass object; ConfigError for anything else."""
    contents = obj if isinstance(obj, Mapping) else fields_of(obj)
    if contents is None:
        raise ConfigError(
            "save_hyperparameters() takes names of __init__'s arguments, or one dict, Namespace or dataclass object; "
            f"got a {type(obj).__name__}"
        )
    return {str(key): value for key, value in contents.items()}


def init_arguments(obj: object, frame: FrameType | None) -> dict[str, Any] | None:
    """Collect the arguments of every ``__init__`` of ``obj`` that is under way, seen from ``frame``; None for none.

    A subclass's arguments win over its parents', since they are what the person gave. ``*args`` have no names and are
    not collected. Where ``frame`` is another function's, its own arguments are.
    """
    collected: dict[str, Any] = {}
    found, first = False, frame
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            arguments = _arguments(frame, obj)
            if arguments is not None:
                collected.update(arguments)
                found = True
        frame = frame.f_back
    if found or first is None or first.f_code.co_name == "<module>":
        return collected if found else None
    return _arguments(first, obj, always=True)


def _arguments(frame: FrameType, obj: object, always: bool = False) -> dict[str, Any] | None:
    """A call's arguments by name, without self; None where it is not a method's of ``obj`` (unless ``always``)."""
    names, rest, keywords, values = inspect.getargvalues(frame)
    names = list(names)
    if names and values.get(names[0]) is obj:
        del names[0]
    elif not always and not (rest and values.get(rest) and not names and values[rest][0] is obj):  # __init__(*args)
        return None
    arguments = {name: values[name] for name in names if name in values}
    return {**arguments, **(values.get(keywords) or {})} if keywords else arguments


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

        Without arguments: all of them, defaults and ``**kwargs`` included, through subclasses. With names: those. With
        one dict, Namespace or dataclass object: its contents. Several calls add up.

        ``ignore``: names to leave out. ``frame``: read the arguments from this frame's call instead of the caller's.
        ``logger=False`` keeps them from the loggers; checkpoints and ``hparams.yaml`` have them all the same.
        A UserWarning names values that no file can keep. Raises ConfigError for an unknown name, for an object of
        another kind, and outside ``__init__``.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        known = init_arguments(self, frame)
        if args and not all(isinstance(arg, str) for arg in args):
            if len(args) > 1:
                raise ConfigError(
                    "save_hyperparameters() takes names or one object: call it once for each object, and once for the "
                    "names"
                )
            values = select(as_dict(args[0]), (), ignore)
            name = next((name for name, value in (known or {}).items() if value is args[0]), None)
            self.__dict__["_hparams_name"] = name
        else:
            if known is None:
                raise ConfigError(
                    "save_hyperparameters() reads the arguments of __init__ and must be called in it; elsewhere give "
                    "it a dict"
                )
            values = select(known, args, ignore)
        self._keep_hyperparameters(values, logger)

    def _keep_hyperparameters(self, values: dict[str, Any], logger: bool) -> None:
        own = self.__dict__
        own["_hparams"] = HParams({**own.get("_hparams", {}), **values})
        first = {name: copied(value) for name, value in values.items()}
        own["_hparams_initial"] = HParams({**first, **own.get("_hparams_initial", {})})
        unlogged = own.get("_hparams_unlogged", frozenset())
        own["_hparams_unlogged"] = unlogged - set(values) if logger else unlogged | set(values)
        warn_of_lost(self, stacklevel=4)

    @property
    def hparams(self) -> HParams:
        """The saved hyperparameters: a dict with attribute access."""
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = HParams()
        found: HParams = self.__dict__["_hparams"]
        return found

    @hparams.setter
    def hparams(self, value: Any) -> None:
        current = inspect.currentframe()
        self.save_hyperparameters(value, frame=current.f_back if current is not None else None)

    @property
    def hparams_initial(self) -> HParams:
        """A copy of the hyperparameters as first saved: later saves add names to it and change none."""
        first: HParams = self.__dict__.get("_hparams_initial", HParams())
        return copy.deepcopy(first)


def warn_of_lost(owner: HyperparametersMixin, stacklevel: int) -> None:
    """Name, once each, the hyperparameters that no file can keep."""
    lost = plain_entries(owner.hparams)[1]
    told = owner.__dict__.get("_hparams_told", frozenset())
    new = {name: kind for name, kind in lost.items() if name not in told}
    if not new:
        return
    owner.__dict__["_hparams_told"] = told | set(new)
    layers = " Layers are saved with the weights already." if any(
        isinstance(owner.hparams[name], nn.Module) for name in new
    ) else ""  # fmt: skip
    warnings.warn(
        "hyperparameters that cannot be written to checkpoints and hparams.yaml: "
        f"{', '.join(f'{name} ({kind})' for name, kind in new.items())}.{layers} Leave them out with "
        f"save_hyperparameters(ignore={sorted(new)}), and pass them to load_from_checkpoint.",
        UserWarning,
        stacklevel=stacklevel,
    )


def kept_hyperparameters(owner: HyperparametersMixin) -> dict[str, Any]:
    """The hyperparameters as a checkpoint keeps them: in their plain form, without those that have none."""
    return plain_entries(owner.hparams)[0]


def object_argument(owner: HyperparametersMixin) -> str:
    """The name of the ``__init__`` argument whose contents were saved; ``"kwargs"`` (as Lightning has it) for none."""
    return owner.__dict__.get("_hparams_name") or "kwargs"


def logged_hyperparameters(owner: HyperparametersMixin) -> dict[str, Any]:
    """The hyperparameters for the loggers: without those saved with ``logger=False``."""
    hidden = owner.__dict__.get("_hparams_unlogged", frozenset())
    return {name: value for name, value in owner.hparams.items() if name not in hidden}
