"""``Module.to_torchscript``: ``forward`` compiled or traced by ``torch.jit``. Floor 2, any process.

``torch.jit.script`` looks at every attribute and compiles every property of a class, and a Module's belong to a run. So
while it works the Module is of a subclass in which the properties are plain attributes without a value.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from raylit.errors import ConfigError
from raylit.export.sample import as_it_was, ready_path, sample_of

# Kept out of the file; they stay readable on the object that is returned.
_NOT_IN_THE_FILE = ["example_input_array", "_hparams", "_hparams_initial", "_hparams_name", "_hparams_told",
                    "_hparams_unlogged"]  # fmt: skip


def to_torchscript(
    module: nn.Module, file_path: str | os.PathLike[str] | None, method: str, example_inputs: Any, **kwargs: Any
) -> Any:
    """Return the ``ScriptModule``, also written to ``file_path`` where one is given; ``kwargs`` go to ``torch.jit``."""
    if method not in ("script", "trace"):
        raise ConfigError(f"to_torchscript(method={method!r}): accepted are 'script' and 'trace'")
    given: dict[str, Any] = {}
    if method == "trace":
        args, by_name = sample_of(module, example_inputs, "example_inputs", "to_torchscript(method='trace')")
        given = {"example_kwarg_inputs": by_name} if by_name else {"example_inputs": args}
    target = None if file_path is None else ready_path(file_path, "to_torchscript")
    if method == "trace":
        with as_it_was(module), _as_subclass(module, {"trainer"}):
            made = torch.jit.trace(module, **given, **kwargs)  # type: ignore[no-untyped-call]
    else:
        with as_it_was(module), warnings.catch_warnings():
            # It reads all of __init__; what forward uses and cannot be compiled is an error of its own.
            warnings.filterwarnings("ignore", "The TorchScript type system doesn't support instance-level annotations")
            made = _scripted(module, kwargs)
    if target is not None:
        torch.jit.save(made, str(target))
    return made


def _scripted(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Compile ``forward``, with the person's own properties where these can be compiled, else without."""
    every = {name for cls in type(module).__mro__ for name, member in vars(cls).items() if isinstance(member, property)}
    own = {name for cls in type(module).__mro__ if _of_a_person(cls) for name, member in vars(cls).items()
           if isinstance(member, property)}  # fmt: skip
    try:
        with _as_subclass(module, every - own):
            return torch.jit.script(module, **kwargs)
    except Exception:
        if not own:
            raise
    with _as_subclass(module, every):
        return torch.jit.script(module, **kwargs)


def _of_a_person(cls: type) -> bool:
    return cls.__module__.split(".")[0] not in ("raylit", "torch", "builtins")


@contextlib.contextmanager
def _as_subclass(module: nn.Module, hidden: set[str]) -> Iterator[None]:
    """Make ``module`` an object of a subclass in which the names in ``hidden`` are attributes that are None."""
    cls = type(module)
    marked = {id(each) for each in module.modules() if "__overloads__" in each.__dict__}
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__jit_ignored_attributes__":
               [*getattr(cls, "__jit_ignored_attributes__", ()), *_NOT_IN_THE_FILE]}  # fmt: skip
    module.__class__ = type(cls.__name__, (cls,), {**dict.fromkeys(hidden), **members})
    try:
        yield
    finally:
        module.__class__ = cls
        for each in module.modules():  # torch.jit leaves its note on each of them
            if id(each) not in marked:
                each.__dict__.pop("__overloads__", None)
