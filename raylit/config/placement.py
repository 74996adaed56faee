"""Where a run takes place: workers, their resources, the run's name and storage. Floor 0: Ray's objects are only read.

Ray is imported only where an object of Ray's was given, to tell whether it is the right one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from raylit.config.amounts import duration
from raylit.config.checks import number, one_of, refuse, show, whole, whole_or_none
from raylit.errors import ConfigError
from raylit.uri import redacted

PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_WORKERS_FORMS = "expected 0 (this process, without Ray), a number of workers, or (min, max) with 1 <= min <= max"
# RunConfig makes up a name where none was given; it is no wish of the user's.
_RAYS_OWN_NAME = "ray_train_run-"


@dataclass(frozen=True)
class PlacementConfig:
    """Fields are named and valued as the Trainer's arguments (section 8 of the contract), each in its plain form.

    What ``scaling_config``, ``run_config`` and ``failure_config`` say is copied into the shorthands, so that these
    alone need to be read; the objects are kept for what has no shorthand. A shorthand at its default is not given.
    Raises ``ConfigError`` for a wrong value, or where object and shorthand differ, with both values.
    """

    num_workers: int | tuple[int, int] = 1  # 0: in this process, without Ray; (min, max): elastic
    # Elastic runs. "keep": an optimizer step has the samples that it has on max workers; "scale": batch_size for each
    # worker that is there.
    elastic_batch: str = "keep"
    use_gpu: bool | str = "auto"
    resources_per_worker: Mapping[str, float] | None = None
    placement_strategy: str | None = None  # None: Ray's default, "PACK"
    scaling_config: Any = None
    run_config: Any = None
    failure_config: Any = None
    name: str | None = None  # None: made up when the run starts
    # A pyarrow.fs URI or path; None: Ray's default. A URI may hold credentials: it is in no repr.
    storage_path: str | None = field(default=None, repr=False)
    resume: str | None = None  # "auto": go on with the run of this name, where there is one
    max_failures: int | None = None  # -1: any number; None: 3 after a lost worker, where checkpoints are kept
    runtime_env: Mapping[str, Any] | None = None
    start_timeout: timedelta | None = None  # how long to wait for the workers' resources; None: no limit

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "num_workers": _workers(self.num_workers),
            "elastic_batch": one_of("elastic_batch", self.elastic_batch, ("keep", "scale")),
            "use_gpu": self.use_gpu if isinstance(self.use_gpu, bool) else _auto(self.use_gpu),
            "resources_per_worker": _resources(self.resources_per_worker),
            "placement_strategy": _placement(self.placement_strategy),
            "name": _run_name(self.name),
            "storage_path": _storage(self.storage_path),
            "resume": None if self.resume is None else one_of("resume", self.resume, ("auto",)),
            "max_failures": whole_or_none("max_failures", self.max_failures, -1, "-1: any number"),
            "runtime_env": _runtime_env(self.runtime_env),
            "start_timeout": duration("start_timeout", self.start_timeout),
        }
        for argument, class_name in (
            ("scaling_config", "ScalingConfig"),
            ("run_config", "RunConfig"),
            ("failure_config", "FailureConfig"),
        ):
            _check_ray_object(argument, getattr(self, argument), class_name)
        checked["failure_config"] = self.failure_config
        _merge_scaling(checked, self.scaling_config)
        _merge_run(checked, self.run_config)
        if checked["failure_config"] is not None:
            _merge(checked, "max_failures", None, "failure_config.max_failures", checked["failure_config"].max_failures)
        _check_gpu(checked)
        if checked["resume"] is not None and checked["name"] is None:
            raise ConfigError(
                "Trainer(resume='auto') goes on with the run of the same name, and there is none: give name='...', the "
                "same each time"
            )
        for name, value in checked.items():
            # The plain form replaces what was given; the dataclass is frozen for everyone else.
            object.__setattr__(self, name, value)

    @property
    def in_process(self) -> bool:
        """Whether the run takes place in this process, without Ray."""
        return self.num_workers == 0

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers; equal unless the run is elastic; (0, 0) in process."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return isinstance(self.num_workers, tuple)

    @property
    def resize_every_s(self) -> float:
        """Seconds between two looks for room for more workers: Ray's own setting in ``scaling_config``."""
        return float(getattr(self.scaling_config, "elastic_resize_monitor_interval_s", 60.0))

    @property
    def start_timeout_s(self) -> float | None:
        """``start_timeout`` in seconds."""
        return None if self.start_timeout is None else self.start_timeout.total_seconds()

    @property
    def unused_in_process(self) -> tuple[str, ...]:
        """Arguments that were given and have no meaning without Ray; () on workers. For a note, not an error:
        a script must run unchanged with ``num_workers=0``."""
        if not self.in_process:
            return ()
        only_ray = {
            "resources_per_worker": None,
            "placement_strategy": None,
            "failure_config": None,
            "max_failures": None,
            "runtime_env": None,
            "start_timeout": None,
        }
        return tuple(argument for argument, default in only_ray.items() if getattr(self, argument) != default)


def _workers(value: object) -> int | tuple[int, int]:
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            refuse("num_workers", value, _WORKERS_FORMS)
        least, most = (whole("num_workers", item, 1, "in (min, max)") for item in value)
        if least > most:
            refuse("num_workers", value, f"min is above max; write ({most}, {least})")
        return least if least == most else (least, most)
    if isinstance(value, (bool, float, str)) or value is None:
        refuse("num_workers", value, _WORKERS_FORMS)
    return whole("num_workers", value, 0, "0: this process, without Ray; or (min, max)")


def _auto(value: object) -> str:
    if value != "auto":
        refuse("use_gpu", value, "expected True, False or 'auto'; how many GPUs a worker has is resources_per_worker's")
    return "auto"


def _resources(value: object) -> dict[str, float] | None:
    """Check {resource: amount}, all amounts above zero."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        refuse("resources_per_worker", value, "expected a dict such as {'CPU': 2, 'GPU': 1}")
    checked: dict[str, float] = {}
    for resource, amount in value.items():
        where = f"resources_per_worker[{resource!r}]"
        if not isinstance(resource, str) or not resource:
            refuse("resources_per_worker", value, "the keys are names of resources, such as 'CPU' and 'GPU'")
        if resource in ("cpu", "gpu"):
            refuse("resources_per_worker", value, f"Ray writes {resource!r} as {resource.upper()!r}")
        if number(where, amount, "expected a number above 0") <= 0:
            refuse(where, amount, "expected a number above 0; leave the resource out for none")
        checked[resource] = amount
    return checked


def _placement(value: object) -> str | None:
    return None if value is None else one_of("placement_strategy", value, PLACEMENT_STRATEGIES)


def _run_name(value: object) -> str | None:
    """Check a run's name, which becomes a folder's."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        refuse("name", value, "expected a name of at least one letter")
    if "/" in value or "\\" in value or value in (".", ".."):
        refuse(
            "name", value, "a name is one folder's, without path separators; folders above it belong into storage_path"
        )
    return value


def _storage(value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path.strip():
        refuse("storage_path", value, "expected a path or a URI such as 's3://bucket/folder'")
    return path


def _runtime_env(value: object) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        refuse("runtime_env", value, "expected a dict such as {'pip': [...], 'env_vars': {...}}")
    return value


def _check_ray_object(argument: str, value: object, class_name: str) -> None:
    """Refuse what is not Ray Train's own object, such as a dict, or the class of the same name of Ray Tune."""
    if value is None:
        return
    expected = f"expected a ray.train.{class_name}"
    if not type(value).__module__.startswith("ray.") or isinstance(value, type):
        refuse(argument, value, expected)
    # Ray is loaded, since its object is here; it is looked up, not imported: this floor knows no Ray.
    if not isinstance(value, getattr(sys.modules["ray.train"], class_name)):
        origin = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ConfigError(f"Trainer({argument}=...) is a {origin}, {expected}.")


def _merge(checked: dict[str, Any], shorthand: str, default: object, where: str, said: object) -> None:
    """Copy what one of Ray's objects says into the shorthand, or refuse where both say something else."""
    given = checked[shorthand]
    if given != default and given != said:
        raise ConfigError(
            f"Trainer({shorthand}={redacted(show(given))}) contradicts {where}={redacted(show(said))}. "
            "Give it in one place, or the same in both."
        )
    checked[shorthand] = said


def _merge_scaling(checked: dict[str, Any], scaling: Any) -> None:
    if scaling is None:
        return
    if checked["num_workers"] == 0:
        raise ConfigError(
            f"Trainer(num_workers=0) runs in this process, without Ray, and contradicts "
            f"scaling_config.num_workers={show(scaling.num_workers)}. Leave one out."
        )
    _merge(checked, "num_workers", 1, "scaling_config.num_workers", _workers(scaling.num_workers))
    _merge(checked, "use_gpu", "auto", "scaling_config.use_gpu", scaling.use_gpu)
    if scaling.resources_per_worker is not None:
        said = _resources(scaling.resources_per_worker)
        _merge(checked, "resources_per_worker", None, "scaling_config.resources_per_worker", said)
    _merge(checked, "placement_strategy", None, "scaling_config.placement_strategy", scaling.placement_strategy)


def _merge_run(checked: dict[str, Any], run: Any) -> None:
    """Read a RunConfig. It fills in defaults of its own when it is made; nobody asked for those."""
    if run is None:
        return
    blank = type(run)()
    if run.name is not None and not run.name.startswith(_RAYS_OWN_NAME):
        _merge(checked, "name", None, "run_config.name", _run_name(run.name))
    if run.storage_path is not None and run.storage_path != blank.storage_path:
        _merge(checked, "storage_path", None, "run_config.storage_path", _storage(run.storage_path))
    if run.failure_config is not None and run.failure_config != blank.failure_config:
        _merge(checked, "failure_config", None, "run_config.failure_config", run.failure_config)
    keeps = run.checkpoint_config
    if keeps is not None and (keeps.num_to_keep is not None or keeps.checkpoint_score_attribute is not None):
        raise ConfigError(
            "Trainer(run_config=...): its checkpoint_config would have Ray delete checkpoints that raylit counts on. "
            "Say what is kept with callbacks=[raylit.callbacks.ModelCheckpoint(monitor=..., save_top_k=...)]"
        )
    if run.worker_runtime_env:
        _merge(checked, "runtime_env", None, "run_config.worker_runtime_env", run.worker_runtime_env)


def _check_gpu(checked: dict[str, Any]) -> None:
    gpus = (checked["resources_per_worker"] or {}).get("GPU")
    if gpus is None:
        return
    if checked["use_gpu"] is False:
        raise ConfigError(
            f"Trainer(use_gpu=False) contradicts resources_per_worker={{'GPU': {gpus}}}. "
            "Set use_gpu=True, or leave 'GPU' out."
        )
    checked["use_gpu"] = True  # "auto": asking for a GPU is asking to use it
