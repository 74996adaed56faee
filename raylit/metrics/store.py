"""Everything that ``Module.log`` does. Worker side; the engine owns the store and says which loop and place it is in.

A call of log for a known key builds one tuple, compares it with that of the key's last call, copies a scalar and
appends it to a list: about 2 us. It never reads a value back from the device. The scalar is copied, not referenced,
since the user may change it in place a line later (``loss *= 0.5``). Workers meet only in :meth:`MetricStore.end` and
:meth:`MetricStore.sync_steps`, which every rank calls at the same points.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.errors import LogError
from raylit.metrics.fused import Agreement, Entry, Reduced, reduce_alone
from raylit.metrics.parts import PartsLog
from raylit.metrics.place import NO_EPOCH, Place
from raylit.metrics.reduce import CHUNK, parse_reduction
from raylit.metrics.slot import Metrics, Settings, Slot, call_site, key_names
from raylit.metrics.torchmetric import (
    batch_value,
    is_metric,
    join_metric_states,
    load_metric_states,
    metric_states,
)

if TYPE_CHECKING:
    from raylit.ports import Collective

_SYNC_OPS = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}
_NO_BATCH = object()


class _Frame:
    """One loop that runs: its keys, how many batches it had, and how many samples where that is known."""

    def __init__(self, loop: str, num_dataloaders: int) -> None:
        self.loop = loop
        self.num_dataloaders = num_dataloaders
        self.slots: dict[str, Slot] = {}
        self.batches = 0
        self.batches_of = [0] * num_dataloaders if num_dataloaders > 1 else []
        self.sized = 0  # batches whose size was read
        self.samples = 0  # their samples
        self.settled: dict[str, Reduced] = {}  # what batches logged, reduced before the epoch hooks
        self.is_settled = False
        self.place = NO_EPOCH  # the store's own place, kept while a loop within this one runs
        self.loader = 0


class MetricStore:
    """The logged values of one worker, and their reduction over all workers.

    ``device`` is the module's; epoch values lie there. ``batch_size_of`` reads the number of samples off a batch, None
    where it cannot. ``named_modules`` (the Module's own method) lets a rank that had no batch find a logged
    torchmetrics object, and a resumed run find it again.
    """

    def __init__(self, collective: Collective | None, device: torch.device, batch_size_of: Callable[[Any], int | None],
                 named_modules: Callable[[], Iterable[tuple[str, Any]]] = tuple) -> None:
        self.place: Place = NO_EPOCH
        self._collective = collective if collective is not None and collective.world_size > 1 else None
        self._device = device
        self._batch_size_of = batch_size_of
        self._named_modules = named_modules
        self._agreement = Agreement(self._collective) if self._collective is not None else None
        self._frames: list[_Frame] = []
        self._fast: dict[str, Slot] = {}  # keys of the present loop and loader whose calls may take the fast path
        self._batch: Any = _NO_BATCH
        self._size: int | None = None
        self._loader = 0

    # -- called by the engine ------------------------------------------------------------------------------------------

    def begin(self, loop: str, num_dataloaders: int = 1) -> None:
        """Start a loop: one epoch of training, or one evaluation, which may lie within a training epoch.

        The outer loop's values wait until :meth:`end`. Set ``place`` afterwards.
        """
        if self._frames:
            self._frames[-1].place, self._frames[-1].loader = self.place, self._loader
        self._frames.append(_Frame(str(loop), num_dataloaders))
        self._enter(NO_EPOCH, 0)

    def set_batch(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Name the batch that log calls are about; its size is read at most once, in training only when needed."""
        frame = self._frames[-1]
        frame.batches += 1
        if frame.batches_of:
            frame.batches_of[dataloader_idx] += 1
        self._batch, self._size = batch, None
        if dataloader_idx != self._loader:
            self._loader = dataloader_idx
            self._fast = {}
        # Ranks see different numbers of samples in evaluation: what epoch hooks log is weighted by them.
        if frame.loop != "train":
            self._measure()

    def finish_splits(self) -> None:
        """Make one value of what each key logged in the splits of this batch (truncated BPTT), by tbptt_reduce_fx."""
        for slot in self._frames[-1].slots.values():
            slot.finish_splits(self._size_for)

    def begin_parts(self) -> PartsLog:
        """Return what takes the logged values of the present batch's parts (``dp``), until its ``finish``."""
        if self._size is None:
            self._measure()
        return PartsLog(self._frames[-1].slots, self._size, self._set_size)

    def begin_turns(self) -> PartsLog:
        """Return what takes the logged values of a step's turns (elastic runs), until its ``finish``."""
        return PartsLog(self._frames[-1].slots, None, lambda size: None, shares=True)

    def _set_size(self, size: int | None) -> None:
        self._size = size

    def sync_steps(self) -> None:
        """Reduce step values with sync_dist over the workers; on every rank, before step values are shown or kept."""
        if self._agreement is not None and self._frames and self._frames[-1].loop == "train":
            # Not in evaluation: there the ranks' numbers of batches may differ, and a collective would hang.
            self._agreement.sync_steps("train", self._frames[-1].slots)

    def step_metrics(self, graphs: bool = True) -> Metrics:
        """Return the latest step values of the present loop, by reference. Nothing waits for the device.

        Without ``graphs``, once the step is done, they no longer hold what ``enable_graph`` kept.
        """
        metrics = Metrics.empty()
        for slot in self._frames[-1].slots.values() if self._frames else ():
            value = slot.last if slot.last is not None else slot.shown
            if slot.on_step and value is not None:
                name, _ = key_names(slot.key, slot.suffix, slot.settings)
                tensor = _as_tensor(value)
                _place(metrics, slot.settings, [name], name, tensor if graphs else tensor.detach())
        return metrics

    def take_step_metrics(self) -> dict[str, Tensor]:
        """Return the loggers' step values that are new since the last call: a value is kept once, never repeated."""
        taken = {}
        for slot in self._frames[-1].slots.values() if self._frames else ():
            if slot.on_step and slot.last is not None:
                slot.shown, slot.last = slot.last, None
                if slot.settings.logger:
                    taken[key_names(slot.key, slot.suffix, slot.settings)[0]] = _as_tensor(slot.shown).detach()
        return taken

    def end(self) -> Metrics:
        """End the present loop: reduce its epoch values over all workers and return to the loop around it.

        One collective (see ``fused``), and none for one worker. Every rank must call it. torchmetrics objects that
        were logged are reset. Raises LogError on every rank where ranks logged different keys.
        """
        frame = self._frames[-1]
        left = {key: slot for key, slot in frame.slots.items() if not (frame.is_settled and slot.settings.in_batch)}
        reduced = [*frame.settled.values(), *self._reduce(frame, left, " hooks" if frame.is_settled else "")]
        # In the order of the first calls, whether or not a part was reduced before: the history's columns follow it.
        order = {key: index for index, key in enumerate(frame.slots)}
        reduced.sort(key=lambda each: order.get(each.entry.key, len(order)))
        for slot in frame.slots.values():
            if slot.metric is not None:
                slot.metric.reset()
        self._frames.pop()
        outer = self._frames[-1] if self._frames else _Frame("", 1)
        self._enter(outer.place, outer.loader)
        return _readable(reduced)

    def settle(self) -> Metrics:
        """Reduce what the loop's batches logged, before its epoch hooks run, so that these can read it.

        For where there are such hooks: it is a collective of its own, which every rank must call. What the hooks log
        themselves follows in :meth:`end`.
        """
        frame = self._frames[-1]
        if frame.is_settled:  # by a checkpoint after the last batch
            return _readable(list(frame.settled.values()))
        logged = {key: slot for key, slot in frame.slots.items() if slot.settings.in_batch}
        frame.settled = {each.entry.key: each for each in self._reduce(frame, logged, "")}
        frame.is_settled = True
        return _readable(list(frame.settled.values()))

    def _reduce(self, frame: _Frame, slots: dict[str, Slot], part: str) -> list[Reduced]:
        with torch.inference_mode(False), torch.no_grad():  # results must be usable outside inference mode
            for slot in slots.values():
                slot.finish_splits(self._size_for)
                slot.running.fold()
            if self._agreement is None:
                return reduce_alone(slots, self._device)
            samples = frame.samples if frame.sized == frame.batches else -1
            return self._agreement.reduce(
                frame.loop + part, slots, frame.batches, samples, self._device, self._find_metric, frame.batches_of
            )

    def clear(self) -> None:
        """Forget all loops, after an exception. Meets no other worker."""
        self._frames.clear()
        self._enter(NO_EPOCH, 0)

    @property
    def running(self) -> str | None:
        """The loop whose values are being collected; None between loops."""
        return self._frames[-1].loop if self._frames else None

    def state_dict(self, open_loops: int | None = None) -> dict[str, Any]:
        """Return the running values of open loops: plain values and references to tensors, for exact resuming.

        ``open_loops``: of so many only, the outermost first; None: of all.
        """
        frames = []
        for frame in self._frames[:open_loops]:
            slots = []
            for slot in frame.slots.values():
                if slot.metric is not None and not slot.metric_path:
                    warnings.warn(f"log({slot.key!r}): the metric object is not an attribute of the Module, so its "
                                  "state is not in the checkpoint.", stacklevel=2)  # fmt: skip
                states = metric_states(slot.metric, to_cpu=False) if slot.metric is not None else None
                slots.append(slot.state_dict(states))
            frames.append({"loop": frame.loop, "num_dataloaders": frame.num_dataloaders, "batches": frame.batches,
                           "sized": frame.sized, "samples": frame.samples, "slots": slots,
                           "settled": list(frame.settled.values()) if frame.is_settled else None})  # fmt: skip
        return {"version": 1, "frames": frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the open loops back; afterwards the engine sets ``place`` and goes on, without :meth:`begin`."""
        self.clear()
        for saved in state["frames"]:
            frame = _Frame(saved["loop"], saved["num_dataloaders"])
            frame.batches, frame.sized, frame.samples = saved["batches"], saved["sized"], saved["samples"]
            for slot_state in saved["slots"]:
                slot = Slot.from_state(slot_state, self._device)
                if slot.settings.metric:
                    slot.metric = self._find_metric(slot.metric_path)
                    if slot.metric is not None:
                        load_metric_states(slot.metric, slot_state["metric_states"])
                frame.slots[slot.key] = slot
            if saved.get("settled") is not None:
                frame.is_settled = True
                frame.settled = {key: Reduced(Entry(key, suffix, Settings(*settings), *rest), value)
                                 for (key, suffix, settings, *rest), value in saved["settled"]}  # fmt: skip
            self._frames.append(frame)

    def take_over(self, states: Sequence[Mapping[str, Any]], example: Mapping[str, Any]) -> None:
        """Put the open loops back where the ranks are others than those that saved them.

        ``states``: of the ranks whose place this one takes, as ``state_dict`` returned them; none for one that is new.
        ``example``: any rank's, for a new one to know the keys.
        """
        self.load_state_dict(states[0] if states else example)
        if not states:
            for frame in self._frames:
                frame.batches = frame.sized = frame.samples = 0
                for slot in frame.slots.values():
                    slot.forget()
                    if slot.metric is not None:
                        slot.metric.reset()
        for index, frame in enumerate(self._frames):
            others = [state["frames"][index] for state in states[1:]]
            for other in others:
                frame.batches += other["batches"]
                frame.sized += other["sized"]
                frame.samples += other["samples"]
                for saved in other["slots"]:
                    slot = Slot.from_state(saved, self._device)
                    frame.slots.setdefault(slot.key, slot)
                    if frame.slots[slot.key] is not slot:
                        frame.slots[slot.key].absorb(slot)
            for slot in frame.slots.values() if others else ():
                if slot.metric is not None:
                    self._join_metric(slot, [state["frames"][index] for state in states])

    def _join_metric(self, slot: Slot, frames: Sequence[Mapping[str, Any]]) -> None:
        found = [saved["metric_states"] for frame in frames for saved in frame["slots"] if saved["key"] == slot.key]
        joined = join_metric_states(slot.metric, found)
        if joined is not None:
            load_metric_states(slot.metric, joined)
        else:
            warnings.warn(f"log({slot.key!r}): {type(slot.metric).__name__} cannot join the states of several workers, "
                          "and there are fewer now: this epoch's value lacks what some of them had seen.",
                          stacklevel=2)  # fmt: skip

    # -- called by Module.log ------------------------------------------------------------------------------------------

    def log(self, name: str, value: Any, prog_bar: bool = False, logger: bool = True, on_step: bool | None = None,
            on_epoch: bool | None = None, reduce_fx: Any = torch.mean, tbptt_reduce_fx: Any = torch.mean,
            tbptt_pad_token: int = 0, enable_graph: bool = False, sync_dist: bool = False, sync_dist_op: str = "mean",
            sync_dist_group: Any = None, add_dataloader_idx: bool = True, batch_size: int | None = None,
            metric_attribute: str | None = None, rank_zero_only: bool = False) -> None:  # fmt: skip
        """Log one value; the arguments are those of section 6 of the contract.

        ``tbptt_pad_token`` and ``metric_attribute`` are accepted and not needed. LogError: a value that is not one
        number, a reduction that is not known, settings unlike those of the same name before, no epoch to log in.
        """
        call = (self.place, prog_bar, logger, on_step, on_epoch, reduce_fx, tbptt_reduce_fx, enable_graph, sync_dist,
                sync_dist_op, sync_dist_group, add_dataloader_idx, rank_zero_only)  # fmt: skip
        slot = self._fast.get(name)
        if slot is None or slot.call != call:
            slot = self._find_slot(name, value, call)
            if slot.call is None:
                self._log_rare(slot, value, batch_size)
                return
        kind = type(value)
        if kind is Tensor and value.dim() == 0:
            value = value.detach().clone()
        elif kind is not float:
            value = _scalar(name, value)
        if slot.on_step:
            slot.last = value
        if slot.on_epoch:
            weight: float = 1
            if slot.weighted:
                if batch_size is not None:
                    weight = _checked_size(name, batch_size)
                elif self._size is not None:
                    weight = self._size
                else:
                    weight = self._size_for(slot)
            slot.values.append(value)
            slot.weights.append(weight)
            if len(slot.values) >= CHUNK:
                slot.running.fold()

    # -- the slow path: once a key, and at every call in epoch hooks, in splits and for torchmetrics -------------------

    def _enter(self, place: Place, loader: int) -> None:
        self.place = place
        self._loader = loader
        self._fast = {}
        self._batch, self._size = _NO_BATCH, None  # the batch's memory is not kept over an inner loop

    def _measure(self) -> None:
        """Read the present batch's size, once."""
        size = self._batch_size_of(self._batch)
        if size is not None:
            self._size = size
            self._frames[-1].samples += size
            self._frames[-1].sized += 1

    def _size_for(self, slot: Slot) -> int:
        if self._size is None and self._batch is not _NO_BATCH:
            self._measure()
        if self._size is None:
            raise LogError(
                f"log({slot.key!r}) at {call_site()}: an epoch mean is weighted by batch size, and the size of this "
                "batch cannot be read off it. Pass batch_size=."
            )
        return self._size

    def _find_metric(self, path: str) -> Any:
        return next((m for name, m in self._named_modules() if name == path), None) if path else None

    def _find_slot(self, name: str, value: Any, call: tuple[Any, ...]) -> Slot:
        """Return the slot of a name, registering it at its first call, after all checks of the arguments."""
        place = self.place
        if isinstance(value, Tensor) and value.is_complex():
            _scalar(name, value)  # raises; the fast path does not look at the dtype
        settings, fx, tbptt_fx = self._settings(name, value, place, call)
        if not self._frames:
            raise LogError(f"log({name!r}) at {call_site()}: no loop runs, so there is no epoch to log in.")
        frame = self._frames[-1]
        by_loader = place.in_batch and frame.num_dataloaders > 1
        suffix = f"/dataloader_idx_{self._loader}" if by_loader and settings.add_dataloader_idx else ""
        loader = self._loader if by_loader else None
        slot = frame.slots.get(name + suffix)
        if slot is None:
            slot = frame.slots[name + suffix] = Slot(name + suffix, suffix, settings, call_site(), loader)
            slot.implicit = not place.in_batch
        elif slot.settings != settings:
            raise LogError(
                f"log({name!r}) was called with different settings in one loop: at {slot.site} and at {call_site()}: "
                f"{slot.settings.differences(settings)}. Use the same settings, or two names."
            )
        elif slot.loader != loader:
            raise LogError(
                f"log({name!r}, add_dataloader_idx=False) at {call_site()} is used for dataloader {slot.loader} "
                f"(at {slot.site}) and dataloader {loader}: their values would be mixed. Use two names."
            )
        slot.fx, slot.tbptt_fx = fx, tbptt_fx
        plain = place.in_batch and not place.split and not settings.metric and not settings.enable_graph
        slot.call = call if plain else None
        if plain:
            self._fast[name] = slot
        return slot

    def _settings(self, name: str, value: Any, place: Place, call: tuple[Any, ...]) -> tuple[Settings, Any, Any]:
        _, bar, logger, on_step, on_epoch, fx, tbptt, graph, sync, sync_op, group, add_idx, zero_only = call
        on_step = place.on_step if on_step is None else bool(on_step)
        on_epoch = place.on_epoch if on_epoch is None else bool(on_epoch)
        if on_epoch and not place.epoch_allowed:
            raise LogError(f"log({name!r}) at {call_site()}: on_epoch in {place.label}: no epoch runs, so no value "
                           "can be reduced. Log it in a batch or epoch hook.")  # fmt: skip
        if on_step and not place.step_allowed:
            raise LogError(f"log({name!r}) at {call_site()}: on_step in {place.label}: it belongs to no step. "
                           "Leave on_step out, or log it in a batch hook.")  # fmt: skip
        op, reduce_fn = parse_reduction(fx, "reduce_fx", name)
        tbptt_op, tbptt_fn = parse_reduction(tbptt, "tbptt_reduce_fx", name)
        sync_name = sync_op.lower() if isinstance(sync_op, str) else getattr(sync_op, "__name__", repr(sync_op))
        if sync and sync_name not in _SYNC_OPS:
            raise LogError(f"log({name!r}): sync_dist_op={sync_op!r} is unknown. Accepted: mean, sum, min, max.")
        world = self._collective.world_size if self._collective is not None else 1
        if group is not None and getattr(group, "size", lambda: world)() != world:
            raise LogError(f"log({name!r}): sync_dist_group is a part of the workers; values are reduced over all "
                           f"{world}. Leave it out, or reduce the value yourself.")  # fmt: skip
        metric = is_metric(value)
        if metric:
            op, reduce_fn = "compute", None
        sync_label = _SYNC_OPS[sync_name] if sync and on_step and not zero_only else ""
        return (
            Settings(on_step, on_epoch, bool(bar), bool(logger), op, tbptt_op, sync_label, bool(graph), bool(add_idx),
                     bool(zero_only), metric, place.in_batch),
            reduce_fn, tbptt_fn,
        )  # fmt: skip

    def _log_rare(self, slot: Slot, value: Any, batch_size: int | None) -> None:
        """Log what never takes the fast path."""
        if slot.settings.metric:
            self._log_metric(slot, value)
            return
        kept = _scalar(slot.key, value)
        size = None if batch_size is None else _checked_size(slot.key, batch_size)
        if slot.on_step:
            slot.last = value.reshape(()) if slot.settings.enable_graph and isinstance(value, Tensor) else kept
        if self.place.split:
            slot.pending.append(kept)
            slot.pending_size = size if size is not None else slot.pending_size
        elif slot.on_epoch:
            if slot.weighted:
                slot.add(kept, self._size_for(slot) if size is None else size)
            else:
                # In an epoch hook, batch_size says how many samples the value stands for; else all that were seen.
                slot.implicit = slot.implicit and size is None
                slot.add(kept, 1 if size is None else size)
            if len(slot.values) >= CHUNK:
                slot.running.fold()

    def _log_metric(self, slot: Slot, metric: Any) -> None:
        if slot.metric is not None and slot.metric is not metric:
            raise LogError(f"log({slot.key!r}) at {call_site()}: another metric object than at {slot.site} is logged "
                           "under this name. Use two names.")  # fmt: skip
        if slot.metric is None:
            slot.metric = metric
            slot.metric_path = next((name for name, module in self._named_modules() if module is metric), "")
        if slot.on_step:
            value = batch_value(metric)
            if value is None:
                raise LogError(
                    f"log({slot.key!r}) at {call_site()}: on_step needs the metric's value for this batch, and only "
                    "update() was called. Call the metric itself (metric(preds, target)), or pass on_step=False, "
                    "on_epoch=True."
                )
            slot.last = _scalar(slot.key, value)


def _scalar(name: str, value: Any) -> Any:
    """Return a float, or a detached copy of a tensor of one element as a 0-d tensor; LogError for anything else."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise LogError(f"log({name!r}) at {call_site()}: the value has shape {tuple(value.shape)} and dtype "
                           f"{value.dtype}; one real number is needed. Reduce it first: value.mean().")  # fmt: skip
        return value.detach().as_subclass(Tensor).reshape(()).clone()
    if isinstance(value, numbers.Real):  # int, bool, numpy scalars
        return float(value)
    hint = " Use log_dict for a dict." if isinstance(value, Mapping) else ""
    raise LogError(f"log({name!r}) at {call_site()}: a value of type {type(value).__name__} cannot be logged; "
                   f"a number, a tensor of one element or a torchmetrics Metric can.{hint}")  # fmt: skip


def _checked_size(name: str, batch_size: Any) -> int:
    if isinstance(batch_size, numbers.Integral) and int(batch_size) >= 0:
        return int(batch_size)
    raise LogError(f"log({name!r}) at {call_site()}: batch_size={batch_size!r} is not an int of 0 or more. A tensor "
                   "would have to be read back from the device at each step.")  # fmt: skip


def _as_tensor(value: Any) -> Tensor:
    """Return a step value as a 0-d tensor: the tensor itself, or a float64 one on the CPU."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    if value.is_inference():  # not usable outside evaluation's inference mode
        with torch.inference_mode(False):
            return value.clone()
    return value


def _readable(reduced: list[Reduced]) -> Metrics:
    """Sort reduced values by who reads them."""
    metrics = Metrics.empty()
    for entry, value in reduced:
        if value is not None:
            _, name = key_names(entry.key, entry.suffix, entry.settings)
            _place(metrics, entry.settings, list(dict.fromkeys([name, entry.key])), name, value)
    return metrics


def _place(metrics: Metrics, settings: Settings, callback_names: list[str], name: str, value: Tensor) -> None:
    """Put a value where its settings say: callbacks see every one, loggers and the bar the name of its own kind."""
    for callback_name in callback_names:
        metrics.callback[callback_name] = value
    if settings.logger:
        metrics.logger[name] = value
    if settings.prog_bar:
        metrics.progress_bar[name] = value
