"""A user's DataLoader made anew around another sampler or shard, with every other setting of the user's kept."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

from raylit.errors import DataError

# Settings that have nothing to do with which samples come in which order.
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def rebuilt(loader: DataLoader[Any], name: str, **changed: Any) -> DataLoader[Any]:
    """Return a loader of the same type as ``loader`` with ``changed`` arguments and the rest of its settings.

    A subclass is built through its own ``__init__``; arguments of its own are read from attributes of the same name.
    Raises ``DataError`` where that cannot be done.
    """
    defaults = _parameters(DataLoader)
    # Older torch lacks some of these.
    arguments = {key: getattr(loader, key) for key in _KEPT if key in defaults} | changed
    # What equals torch's default need not be passed, so that a subclass is asked for no more than it must take.
    given = {key: value for key, value in arguments.items() if not _is_default(key, value, defaults[key].default)}
    cls = type(loader)
    if cls is DataLoader or cls.__init__ is DataLoader.__init__:
        fresh = cls(**given)
    else:
        fresh = _built_subclass(loader, given, defaults, name)
    for key, value in vars(loader).items():
        if key not in vars(fresh):
            setattr(fresh, key, value)  # what the user put on the loader after making it
    return fresh


def _is_default(key: str, value: Any, default: Any) -> bool:
    if key == "collate_fn":  # torch fills these in by the kind of loader, which stays the same
        return value is default_collate or value is default_convert
    if key == "prefetch_factor":
        return value is None or value == 2  # 2: torch's own with loader workers
    return bool(value is default)


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    parameters.pop("self", None)
    return parameters


def _built_subclass(
    loader: DataLoader[Any], given: dict[str, Any], defaults: dict[str, inspect.Parameter], name: str
) -> DataLoader[Any]:
    cls = type(loader)
    parameters = _parameters(cls)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    refused = sorted(key for key in given if key not in parameters and not takes_any)
    if refused:
        raise _cannot(name, cls, f"its __init__ does not take {', '.join(refused)}")
    arguments = dict(given)
    for key, parameter in parameters.items():
        if key in arguments or parameter.kind in variadic:
            continue
        if key in vars(loader) and key not in defaults:
            arguments[key] = vars(loader)[key]
        elif key in defaults:
            if parameter.default is not defaults[key].default:
                arguments[key] = defaults[key].default  # its own default, of a batch size say, would contradict ours
        else:
            raise _cannot(name, cls, f"its argument {key!r} is not kept as an attribute of that name")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise _cannot(name, cls, f"its __init__ raised TypeError: {error}") from error


def _cannot(name: str, cls: type, why: str) -> DataError:
    return DataError(
        f"{name}: the loader is a {cls.__name__}, a subclass of DataLoader that cannot be built again around raylit's "
        f"sampler: {why}. Let {cls.__name__}.__init__ take **kwargs, pass them on to DataLoader, and keep its own "
        "arguments as attributes; or pass Trainer(use_distributed_sampler=False) to use the loader as it is on each "
        "worker"
    )
