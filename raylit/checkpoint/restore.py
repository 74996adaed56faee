"""``load_from_checkpoint`` of Module and DataModule: build one from a checkpoint. Floor 2.

The arguments of ``__init__`` are put together from the file, an ``hparams_file`` over it, and the caller's over both.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raylit.checkpoint.content import datamodule_key, load_weights
from raylit.checkpoint.read import read
from raylit.checkpoint.typed import annotations_of, as_annotated
from raylit.errors import CheckpointError, UnknownArgumentError, nearest
from raylit.hparams import HParams

# Where Lightning's files before 1.0 have them.
_OLD_KEYS = ("hparams", "module_arguments")
_CONFLICT = re.compile(r"(?:multiple values for(?: keyword)?|unexpected keyword) argument '(\w+)'")
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def build_from_checkpoint(
    cls: type[Any], path: Any, map_location: Any, strict: bool, hparams_file: str | Path | None,
    overrides: dict[str, Any],
) -> Any:  # fmt: skip
    """Return ``cls(**hyperparameters)`` with the checkpoint's weights, in evaluation-neutral mode (as constructed).

    Raises CheckpointError for a file that is no checkpoint of this class, UnknownArgumentError for an override that
    ``__init__`` does not take.
    """
    saved_file = _read_hparams_file(hparams_file)
    checkpoint = read(path, "cpu" if map_location is None else map_location)
    params: dict[str, Any] = {}
    for key in (*_OLD_KEYS, "hyper_parameters"):
        params.update(_as_dict(checkpoint.get(key)))
    params.update(saved_file)
    module = _construct(cls, params, checkpoint.get("hparams_name"), overrides)
    # Layers that are made late must be there before their weights come.
    if getattr(module, "configure_model", None) is not None:
        module.configure_model()
    if getattr(module, "on_load_checkpoint", None) is not None:
        module.on_load_checkpoint(checkpoint)
    load_weights(checkpoint, module, strict)
    if isinstance(map_location, str | torch.device):
        module.to(map_location)
    return module


def build_datamodule(
    cls: type[Any], path: Any, map_location: Any, hparams_file: str | Path | None, overrides: dict[str, Any]
) -> Any:
    """Return the DataModule of a checkpoint: its hyperparameters as above, then its state. Errors as above."""
    params = _read_hparams_file(hparams_file)
    checkpoint = read(path, "cpu" if map_location is None else map_location)
    params = _as_dict(checkpoint.get("datamodule_hyper_parameters")) | params
    datamodule = _construct(cls, params, checkpoint.get("datamodule_hparams_name"), overrides)
    if datamodule_key(cls) in checkpoint:
        datamodule.load_state_dict(checkpoint[datamodule_key(cls)])
    return datamodule


def _read_hparams_file(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"hparams_file={str(path)!r} cannot be read as plain YAML: {reason}") from None
    if loaded is not None and not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise CheckpointError(f"hparams_file={str(path)!r} holds a {kind}; it must map names to values")
    return loaded or {}


def _as_dict(saved: Any) -> dict[str, Any]:
    return dict(saved if isinstance(saved, Mapping) else vars(saved)) if saved is not None else {}


def _construct(cls: type[Any], params: dict[str, Any], name: Any, overrides: dict[str, Any]) -> Any:
    """Call ``cls`` with the saved parameters. ``name``: of the argument that held all of them, where one did."""
    signature = inspect.signature(cls)  # of __init__, without self
    named = {n: p for n, p in signature.parameters.items() if p.kind in _NAMED}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hints = annotations_of(cls.__init__)
    needed = [n for n, p in named.items() if p.default is p.empty and n not in overrides]
    if params and not open_ended and len(needed) == 1 and not any(n in params for n in named):
        name = needed[0]  # no argument is known by name: the object was saved in another form, as vars(hparams)
    if name in named and name not in params and name not in overrides:
        arguments = _one_argument(name, params, overrides, named, hints)
    else:
        _refuse_unknown(cls, overrides, named, open_ended)
        kept = params if open_ended else {n: value for n, value in params.items() if n in named}
        arguments = {n: as_annotated(value, hints.get(n)) for n, value in kept.items()} | overrides
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise CheckpointError(
            f"{cls.__name__} needs {', '.join(missing)}, which the checkpoint does not have: pass "
            f"{', '.join(f'{n}=...' for n in missing)} to load_from_checkpoint, or call save_hyperparameters() "
            "in __init__ before training"
        )
    return _call(cls, arguments, named, overrides)


def _one_argument(
    name: str, params: dict[str, Any], overrides: dict[str, Any], named: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Arguments for an ``__init__`` that takes its hyperparameters as one object: ``def __init__(self, hparams)``."""
    contents = {**params, **{n: value for n, value in overrides.items() if n not in named}}
    arguments = {n: value for n, value in overrides.items() if n in named}
    for other, parameter in named.items():  # saved beside the object
        if other in params and other not in arguments and parameter.default is parameter.empty:
            arguments[other] = as_annotated(params[other], hints.get(other))
    arguments[name] = as_annotated(HParams(contents), hints.get(name))
    return arguments


def _refuse_unknown(cls: type[Any], overrides: dict[str, Any], named: Mapping[str, Any], open_ended: bool) -> None:
    unknown = [name for name in overrides if name not in named and not open_ended]
    if unknown:
        raise UnknownArgumentError(
            f"load_from_checkpoint({unknown[0]}=...): {cls.__name__}'s __init__ has no such argument; it takes "
            f"{', '.join(named) or 'none'}.{nearest(unknown[0], named)}"
        )


def _call(
    cls: type[Any], arguments: dict[str, Any], named: Mapping[str, inspect.Parameter], overrides: dict[str, Any]
) -> Any:
    """Construct, without what a subclass gives its parents itself.

    ``class Wide(Net)`` with ``super().__init__(width=64, **kwargs)`` saves ``width`` too, and may not be given it.
    """
    rest = dict(arguments)
    while True:
        by_place = [rest[n] for n, p in named.items() if p.kind is p.POSITIONAL_ONLY and n in rest]
        by_name = {n: v for n, v in rest.items() if n not in named or named[n].kind is not named[n].POSITIONAL_ONLY}
        try:
            return cls(*by_place, **by_name)
        except TypeError as error:
            found = _CONFLICT.search(str(error))
            if found is None or found[1] not in rest or found[1] in named or found[1] in overrides:
                raise
            del rest[found[1]]
