"""Packing what travels between the caller and the workers: the run's description out, what it left home. Floor 4.

Both directions use cloudpickle, so classes of the caller's script travel too, and come back as the same classes.

On the way home tensors travel once, by name, and attributes one by one. An attribute that refers to a layer, a
parameter, a callback, the trainer or the DataModule names it, and means the caller's own after it came home: a plain
list of the Module's layers holds these layers, and not copies that no optimizer knows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raylit.config.placement import PlacementConfig
from raylit.errors import SerializationError
from raylit.seed import get_random_state
from raylit.stage import Status

if TYPE_CHECKING:
    from raylit.assemble import RunOutcome, RunSpec

# A lazy layer's tensors before its first batch: they have no shape yet.
_Uninitialized = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
# What nn.Module itself keeps in __dict__: tensors travel apart, hooks and handles belong to one process.
_OWN = frozenset(nn.Module().__dict__) - {"training"} | {"_run", "_last_trainer", "trainer"}
_GPU, _CPU = b"G", b"C"
_LAYERS = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


@dataclass
class Changes:
    """What a run changed in the ``__dict__`` of one object."""

    set: dict[str, bytes] = field(default_factory=dict)  # attribute -> pickled
    removed: list[str] = field(default_factory=list)


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
    random_state: dict[str, Any] | None = None  # of rank 0's process, at the end
    tensors: dict[str, Tensor] = field(default_factory=dict)  # parameters and buffers by name
    frozen: list[str] = field(default_factory=list)  # parameters that require no gradients
    layers: bytes | None = None  # the Module's layers themselves, where these changed on the worker
    attributes: dict[str, Changes] = field(default_factory=dict)  # by name of the submodule
    callbacks: dict[int, Changes] = field(default_factory=dict)  # by place in the list
    lost: list[str] = field(default_factory=list)


# == out ===========================================================================================================
def pack_spec(spec: RunSpec, refs: list[Any] | None = None) -> bytes:
    """Pickle a run's description; SerializationError names the part that cannot travel.

    ``refs`` gets the references to objects in Ray's store that are in it, as in a ``MaterializedDataset``, which must
    travel through Ray and be given to ``unpack_spec``: among other bytes they would lose who owns the object.
    """
    # Placement is the driver's own, and Ray's objects in it may hold anything.
    slim = dataclasses.replace(
        spec, config=dataclasses.replace(spec.config, placement=_placement_of(spec)),
    )  # fmt: skip
    if any(p.device.type != "cpu" for p in spec.module.parameters()):
        spec.module.cpu()  # a worker may have no such device
    try:
        return _dumps_apart(slim, [] if refs is None else refs)
    except Exception as error:
        raise SerializationError(_culprit(spec, error)) from None


def _placement_of(spec: RunSpec) -> PlacementConfig:
    """What of the placement a worker needs: between which numbers of workers an elastic run may be."""
    given = spec.config.placement
    return PlacementConfig(num_workers=given.num_workers, elastic_batch=given.elastic_batch)


def _dumps_apart(value: Any, refs: list[Any]) -> bytes:
    """Pickle ``value`` with the numbers of its Ray references in their place."""
    import cloudpickle

    if "ray" not in sys.modules:  # then nobody has made one
        data: bytes = cloudpickle.dumps(value)
        return data
    from ray import ObjectRef

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, ObjectRef):
                return None
            refs.append(obj)
            return len(refs) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def with_gpu(data: bytes, use_gpu: bool) -> bytes:
    """What the workers get: the packed description, and what only the cluster could tell."""
    return (_GPU if use_gpu else _CPU) + data


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


def unpack_spec(data: bytes, refs: Sequence[Any] = ()) -> tuple[RunSpec, bool]:
    """On the worker: the run's description, and whether to use the GPU. ``refs``: those of ``pack_spec``."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return refs[pid]

    return Unpickler(io.BytesIO(memoryview(data)[1:])).load(), data[:1] == _GPU


# == home ==========================================================================================================
@dataclass
class Ties:
    """Objects that both ends have, by the names they go by."""

    objects: dict[tuple[str, Any], Any]

    @staticmethod
    def of(
        module: nn.Module, callbacks: Sequence[Any] = (), trainer: Any = None, datamodule: Any = None, *,
        layers: bool = True,
    ) -> Ties:  # fmt: skip
        """Without ``layers`` the Module is known as a whole only."""
        objects: dict[tuple[str, Any], Any] = {("module", ""): module}
        if layers:
            objects |= {("module", name): each for name, each in module.named_modules()}
            objects |= {("tensor", name): tensor for name, tensor in _tensors(module)}
        objects |= {("callback", index): callback for index, callback in enumerate(callbacks)}
        objects |= {("trainer", ""): trainer, ("datamodule", ""): datamodule}
        return Ties({key: each for key, each in objects.items() if each is not None})

    def dumps(self, value: Any) -> bytes:
        """Pickle ``value``, with the names of tied objects in their place and every tensor on the CPU."""
        import cloudpickle

        names = {id(each): key for key, each in self.objects.items()}

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            def persistent_id(self, obj: Any) -> Any:
                return names.get(id(obj))

            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, Tensor) and obj.device.type != "cpu":
                    moved = obj.detach().cpu()
                    moved = nn.Parameter(moved, obj.requires_grad) if isinstance(obj, nn.Parameter) else moved
                    return moved.__reduce_ex__(2)  # type: ignore[no-untyped-call]
                return super().reducer_override(obj)

        file = io.BytesIO()
        Pickler(file).dump(value)
        return file.getvalue()

    def loads(self, data: bytes) -> Any:
        """Unpickle, with this end's objects where they are named."""
        objects = self.objects

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return objects[pid]

        return Unpickler(io.BytesIO(data)).load()

    def digest(self, value: Any) -> bytes:
        """A fingerprint of ``value``; empty where it cannot travel."""
        try:
            return hashlib.blake2b(self.dumps(value), digest_size=16).digest()
        except Exception:
            return b""

    def digests(self, owner: Any) -> dict[str, bytes]:
        """Fingerprints of an object's attributes."""
        return {name: self.digest(value) for name, value in _attributes(owner).items()}


def _attributes(owner: Any) -> dict[str, Any]:
    """What of an object's ``__dict__`` travels: without what its own ``__getstate__`` leaves out."""
    getstate = getattr(owner, "__getstate__", None)
    state = getstate() if getstate is not None else owner.__dict__
    if not isinstance(state, dict):  # in a form of its own
        state = owner.__dict__
    own = _OWN if isinstance(owner, nn.Module) else ()
    return {name: owner.__dict__[name] for name in state if name in owner.__dict__ and name not in own}


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, tensor)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not isinstance(tensor, _Uninitialized)
    ]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What must be the same at both ends for tensors to go home by name."""
    return (
        [(name, type(each)) for name, each in module.named_modules()],
        {name: (tensor.shape, isinstance(tensor, nn.Parameter)) for name, tensor in _tensors(module)},
    )


@dataclass
class Departure:
    """What rank 0 remembers of the objects as they came, to tell what changed."""

    structure: tuple[Any, ...]
    attributes: dict[str, dict[str, bytes]]  # fingerprints, by name of the submodule
    callbacks: list[dict[str, bytes]]

    @staticmethod
    def of(spec: RunSpec) -> Departure:
        """Take note of a description as it arrived."""
        ties = Ties.of(spec.module, spec.callbacks, None, spec.datamodule)
        return Departure(
            _structure(spec.module),
            {name: ties.digests(each) for name, each in spec.module.named_modules()},
            [ties.digests(callback) for callback in spec.callbacks],
        )


def pack(outcome: RunOutcome, departure: Departure, trainer: Any = None) -> bytes:
    """On rank 0: everything that goes home, as bytes. ``trainer``: what hooks knew under that name."""
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
        random_state=get_random_state(),
    )  # fmt: skip
    around = (outcome.callbacks, trainer, state.datamodule)
    ties = Ties.of(module, *around)
    if _structure(module) != departure.structure:
        home.layers = _pack_layers(module, Ties.of(module, *around, layers=False), home.lost)
        parts = {"": module}  # the layers' own attributes are packed with them
    else:
        home.tensors = _cpu(dict(_tensors(module)))
        home.frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        parts = dict(module.named_modules())
    for name, part in parts.items():
        path = ".".join(filter(None, ("model", name)))
        home.attributes[name] = _changes(part, departure.attributes.get(name, {}), ties, path, home.lost)
    for index, (callback, before) in enumerate(zip(outcome.callbacks, departure.callbacks, strict=False)):
        path = f"callback {type(callback).__name__}"
        home.callbacks[index] = _changes(callback, before, ties, path, home.lost)
    data: bytes = cloudpickle.dumps(home)
    return data


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _changes(owner: Any, before: dict[str, bytes], ties: Ties, path: str, lost: list[str]) -> Changes:
    attributes = _attributes(owner)
    changes = Changes(removed=[name for name in before if name not in attributes])
    for name, value in attributes.items():
        digest = ties.digest(value)
        if digest == before.get(name):
            continue
        if digest:
            changes.set[name] = ties.dumps(value)
        else:
            lost.append(f"{path}.{name}")
    return changes


def _pack_layers(module: nn.Module, ties: Ties, lost: list[str]) -> bytes:
    """Pack the layers whole, leaving out what cannot travel."""
    while True:
        try:
            return ties.dumps({name: module.__dict__[name] for name in _LAYERS})
        except Exception:
            for name, layer in module.named_modules():
                bad = [a for a, value in _attributes(layer).items() if name and not ties.digest(value)]
                for attribute in bad:
                    del layer.__dict__[attribute]
                    lost.append(f"model.{name}.{attribute}")
                if bad:
                    break
            else:
                raise


def unpack(data: bytes) -> Homecoming:
    """On the driver: what came home."""
    home: Homecoming = pickle.loads(data)
    home.status = Status(home.status)
    return home


def receive(
    home: Homecoming, module: nn.Module, callbacks: Sequence[Any], trainer: Any = None, datamodule: Any = None
) -> None:
    """Bring the caller's own objects up to date: weights in place, other attributes as they changed."""
    around = (callbacks, trainer, datamodule)
    if home.layers is not None:
        module.__dict__.update(Ties.of(module, *around, layers=False).loads(home.layers))
    else:
        own = dict(_tensors(module))
        with torch.no_grad():
            for name, tensor in home.tensors.items():
                own[name].copy_(tensor)
        frozen = set(home.frozen)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
    ties, parts, lost = Ties.of(module, *around), dict(module.named_modules()), list(home.lost)
    for name, changes in home.attributes.items():
        _apply(changes, parts[name], ties, ".".join(filter(None, ("model", name))), lost)
    for index, changes in home.callbacks.items():
        _apply(changes, callbacks[index], ties, f"callback {type(callbacks[index]).__name__}", lost)
    if lost:
        warnings.warn(
            f"changed on the workers but cannot be pickled, so the caller's objects keep what they had: "
            f"{', '.join(lost)}",
            UserWarning,
            stacklevel=_callers_level(),
        )


def _apply(changes: Changes, owner: Any, ties: Ties, path: str, lost: list[str]) -> None:
    for name in changes.removed:
        owner.__dict__.pop(name, None)
    for name, pickled in changes.set.items():
        try:
            owner.__dict__[name] = ties.loads(pickled)  # past __setattr__, which would look for layers in it
        except Exception:  # of a class that only the workers can import, for instance
            lost.append(f"{path}.{name}")


def _callers_level() -> int:
    """The ``stacklevel`` with which a warning of :func:`receive` shows the first line that is not raylit's."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "raylit":
        level, frame = level + 1, frame.f_back
    return max(1, level - 1)
