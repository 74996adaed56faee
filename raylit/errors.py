"""The exceptions that raylit raises, and the one helper that words them. Floor 0: standard library only.

::

    RaylitError
    ├── ConfigError (ValueError)            an argument is wrong, contradictory or impossible; raised at construction
    │   └── UnknownArgumentError (TypeError)   a name that does not exist; carries the nearest one
    ├── HookError (TypeError)               an override's signature, or what it returned, is not in the contract
    ├── OptimizerError (ValueError)         configure_optimizers returned something that cannot be used
    ├── DataError (ValueError)              a loader is missing, empty, or cannot be sharded
    ├── LogError (ValueError)               a call of ``log`` that cannot give a right number
    ├── CheckpointError (ValueError)        a checkpoint is missing, damaged or of another model
    ├── ResourceError (RuntimeError)        the cluster cannot give what was asked
    ├── SerializationError (TypeError)      something that must travel to the workers cannot be pickled
    ├── RunExistsError (FileExistsError)    a run of this name exists; nothing is overwritten
    ├── NotAttachedError (RuntimeError)     ``module.trainer`` where there is none
    ├── NonFiniteError (FloatingPointError) ``detect_anomaly`` found a loss or a gradient that is not finite
    ├── WorkerLostError (RuntimeError)      a worker process died without an exception of its own
    │   └── ProgressTimeoutError (TimeoutError)   it made no progress for ``progress_timeout`` and was ended
    └── MissingDependencyError (ImportError)   an optional package is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RaylitError(Exception):
    """Base of everything raylit raises on purpose."""


class ConfigError(RaylitError, ValueError):
    """An argument is wrong, contradictory or impossible."""


class UnknownArgumentError(ConfigError, TypeError):
    """An argument of this name does not exist."""


class HookError(RaylitError, TypeError):
    """A hook's signature, or its return value, is not in the contract."""


class OptimizerError(RaylitError, ValueError):
    """``configure_optimizers`` returned something that cannot be used."""


class DataError(RaylitError, ValueError):
    """A loader is missing, empty, or cannot be sharded."""


class LogError(RaylitError, ValueError):
    """A call of ``log`` that cannot give a right number."""


class CheckpointError(RaylitError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class ResourceError(RaylitError, RuntimeError):
    """The cluster cannot give what was asked."""


class SerializationError(RaylitError, TypeError):
    """Something that must travel to the workers cannot be pickled."""


class RunExistsError(RaylitError, FileExistsError):
    """A run of this name exists; raylit overwrites nothing."""


class NotAttachedError(RaylitError, RuntimeError):
    """``module.trainer`` was read outside a run."""


class NonFiniteError(RaylitError, FloatingPointError):
    """A loss or a gradient is infinite or not a number."""


class WorkerLostError(RaylitError, RuntimeError):
    """A worker process died without raising an exception of its own."""


class ProgressTimeoutError(WorkerLostError, TimeoutError):
    """A worker made no progress for ``progress_timeout`` seconds and was ended."""


class MissingDependencyError(RaylitError, ImportError):
    """An optional package is not installed."""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the accepted name closest to ``name``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def missing(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """Word the error for an optional package: what needs it and how to install it."""
    return MissingDependencyError(f"{purpose} needs the package {package!r}: pip install 'raylit[{extra}]'")
