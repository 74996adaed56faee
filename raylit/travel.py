"""Packing what travels between the caller and the workers: the run's description out, what it left home. Floor 4.

Both directions use cloudpickle, so classes of the caller's script travel too, and come back as the same classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raylit.config.placement import PlacementConfig
from raylit.errors import SerializationError
from raylit.stage import Status

if TYPE_CHECKING:
    from raylit.assemble import RunOutcome, RunSpec

# A lazy layer's tensors before its first batch: they have no shape yet.
_Uninitialized = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
# What nn.Module itself keeps in __dict__: tensors travel apart, hooks and handles belong to one process.
_OWN = frozenset(nn.Module().__dict__) - {"training"} | {"_run", "trainer"}


@dataclass
class Homecoming:
    """What rank 0 sends home. Tensors lie on the CPU."""

    epoch: int
    global_step: int
    status: str
    log_dir: str | None
    num_training_batches: int | float
    world_size: int
    metrics: dict[str, dict[str, Tensor]]  # callback, logged, progress_bar
    stage_metrics: list[dict[str, Tensor]]
    predictions: Any
    history: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)  # parameters and buffers by name
    frozen: list[str] = field(default_factory=list)  # parameters that require no gradients
    attributes: dict[str, dict[str, bytes]] = field(default_factory=dict)  # submodule -> attribute -> pickled
    callbacks: dict[int, bytes] = field(default_factory=dict)
    whole: bytes | None = None  # the Module itself, where its layers changed on the worker
    lost: list[str] = field(default_factory=list)


# == out ===========================================================================================================
def pack_spec(spec: RunSpec, use_gpu: bool) -> bytes:
    """Pickle a run's description; SerializationError names the part that cannot travel."""
    import cloudpickle

    # Placement is the driver's own, and Ray's objects in it may hold anything.
    slim = dataclasses.replace(
        spec, config=dataclasses.replace(spec.config, placement=PlacementConfig()),
    )  # fmt: skip
    if any(p.device.type != "cpu" for p in spec.module.parameters()):
        spec.module.cpu()  # a worker may have no such device
    try:
        data: bytes = cloudpickle.dumps((slim, use_gpu))
        return data
    except Exception as error:
        raise SerializationError(_culprit(spec, error)) from None


def _culprit(spec: RunSpec, error: Exception) -> str:
    """Say which attribute cannot be pickled, walking down from the description's parts."""
    parts: list[tuple[str, Any]] = [("model", spec.module)]
    if spec.datamodule is not None:
        parts.append(("datamodule", spec.datamodule))
    parts += [(f"{name} loader", loader) for name, loader in spec.loaders.items()]
    parts += [(f"callback {type(c).__name__}", c) for c in spec.callbacks]
    parts += [(f"logger {type(c).__name__}", c) for c in spec.loggers]
    for name, part in parts:
        if not _picklable(part):
            path, value = _deepest(name, part)
            return (
                f"{path} (a {type(value).__name__}) cannot be pickled, so it cannot travel to the workers: {error}. "
                "Create it in setup(), which runs on each worker, or leave it out of the object's __getstate__."
            )
    return f"the run cannot be pickled: {error}"


def _picklable(value: Any) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def _deepest(path: str, value: Any, depth: int = 0) -> tuple[str, Any]:
    if depth < 8:
        for name, child in _children(value):
            if not _picklable(child):
                return _deepest(f"{path}{name}", child, depth + 1)
    return path, value


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield from ((f".{name}", child) for name, child in value.named_children())
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    else:
        for name, child in getattr(value, "__dict__", {}).items():
            if name not in ("_modules", "_run", "trainer"):
                yield f".{name}", child


def unpack_spec(data: bytes) -> tuple[RunSpec, bool]:
    """On the worker: the run's description, and whether to use the GPU."""
    spec, use_gpu = pickle.loads(data)
    return spec, use_gpu


# == home ==========================================================================================================
@dataclass
class Departure:
    """What rank 0 remembers of the objects as they came, to tell what changed."""

    shapes: dict[str, torch.Size]
    attributes: dict[str, dict[str, bytes]]  # digests
    callbacks: list[bytes]

    @staticmethod
    def of(spec: RunSpec) -> Departure:
        """Take note of a description as it arrived."""
        return Departure(
            {name: t.shape for name, t in _tensors(spec.module)},
            {name: _digests(sub) for name, sub in spec.module.named_modules()},
            [_digest(c) for c in spec.callbacks],
        )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, tensor)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not isinstance(tensor, _Uninitialized)
    ]


def _digests(module: nn.Module) -> dict[str, bytes]:
    return {name: _digest(value) for name, value in module.__dict__.items() if name not in _OWN}


def _digest(value: Any) -> bytes:
    import cloudpickle

    try:
        return hashlib.blake2b(cloudpickle.dumps(value), digest_size=16).digest()
    except Exception:
        return b""  # cannot travel; if it is still so at the end it is named


def pack(outcome: RunOutcome, departure: Departure) -> bytes:
    """On rank 0: everything that goes home, as bytes."""
    import cloudpickle

    state, module = outcome.state, outcome.module
    home = Homecoming(
        epoch=state.epoch, global_step=state.global_step, status=state.status.value, log_dir=state.log_dir,
        num_training_batches=state.num_training_batches, world_size=state.world.world_size,
        metrics={"callback": _cpu(state.callback_metrics), "logged": _cpu(state.logged_metrics),
                 "progress_bar": _cpu(state.progress_bar_metrics)},
        stage_metrics=[_cpu(metrics) for metrics in outcome.result.metrics],
        predictions=outcome.result.predictions,
        history=state.history.table() if state.history is not None else None,
    )  # fmt: skip
    tensors = dict(_tensors(module))
    if {name: t.shape for name, t in tensors.items()} != departure.shapes:
        home.whole = cloudpickle.dumps(module.cpu())
    else:
        home.tensors = _cpu(tensors)
        home.frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        for name, sub in module.named_modules():
            home.attributes[name] = _changed(name, sub, departure.attributes.get(name, {}), home.lost)
    for index, (callback, before) in enumerate(zip(outcome.callbacks, departure.callbacks, strict=False)):
        if _digest(callback) != before:
            _keep(home.callbacks, index, callback.__dict__, f"callback {type(callback).__name__}", home.lost)
    data: bytes = cloudpickle.dumps(home)
    return data


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _changed(name: str, module: nn.Module, before: dict[str, bytes], lost: list[str]) -> dict[str, bytes]:
    kept: dict[str, bytes] = {}
    for attribute, value in module.__dict__.items():
        if attribute in _OWN:
            continue
        digest = _digest(value)
        if digest != before.get(attribute) or not digest:
            _keep(kept, attribute, value, ".".join(filter(None, ("model", name, attribute))), lost)
    return kept


def _keep(into: dict[Any, bytes], key: Any, value: Any, path: str, lost: list[str]) -> None:
    import cloudpickle

    try:
        into[key] = cloudpickle.dumps(value)
    except Exception:
        lost.append(path)


def unpack(data: bytes) -> Homecoming:
    """On the driver: what came home."""
    home: Homecoming = pickle.loads(data)
    home.status = Status(home.status)
    return home


def receive(home: Homecoming, module: nn.Module, callbacks: list[Any]) -> None:
    """Bring the caller's own objects up to date: weights in place, other attributes as they changed."""
    if home.whole is not None:
        trained = pickle.loads(home.whole)
        for name, value in trained.__dict__.items():
            if name not in _OWN or name in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = value
    else:
        own = dict(_tensors(module))
        with torch.no_grad():
            for name, tensor in home.tensors.items():
                own[name].copy_(tensor)
        frozen = set(home.frozen)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        subs = dict(module.named_modules())
        for sub, attributes in home.attributes.items():
            for attribute, pickled in attributes.items():
                _set(subs[sub], attribute, pickled, home.lost, ".".join(filter(None, ("model", sub, attribute))))
    for index, pickled in home.callbacks.items():
        callbacks[index].__dict__.update(pickle.loads(pickled))
    if home.lost:
        warnings.warn(
            f"changed on the workers but cannot be pickled, so the caller's objects keep what they had: "
            f"{', '.join(home.lost)}",
            UserWarning,
            stacklevel=4,
        )


def _set(module: nn.Module, attribute: str, pickled: bytes, lost: list[str], path: str) -> None:
    try:
        module.__dict__[attribute] = pickle.loads(pickled)
    except Exception:
        lost.append(path)
