"""The end of a loop: every key of every worker, reduced in one collective. Worker side.

Each rank sends one float64 vector: ``[keys known, batches, samples]``, three numbers a key, ``[weight, count, total]``,
and its batches of each loader where there are several. Its length comes from the layout agreed before, on every rank
alike, so that ranks that logged different keys can never send vectors of different sizes: they say "keys known: 0", all
ranks see it, and all exchange their keys and values as objects. The same exchange stands in for the vector the first
time a loop ends. So the steady state is one collective, the first end one object exchange. Keys with a callable or a
torchmetrics Metric need one more exchange, since what they carry has no fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from raylit.errors import LogError
from raylit.metrics.reduce import accumulation_dtype
from raylit.metrics.slot import Settings, Slot
from raylit.metrics.torchmetric import compute_over_ranks, metric_states

if TYPE_CHECKING:
    from raylit.ports import Collective

HEADER = 3  # keys known (1 or 0), batches, samples (-1: not known)
WIDTH = 3  # weight (-1: as many samples as the rank has seen), count, total


class Entry(NamedTuple):
    """One key, as the ranks tell each other of it."""

    key: str
    suffix: str
    settings: Settings
    kind: str
    site: str
    metric_path: str
    loader: int | None = None  # of several, the one in whose batches it is logged


class Reduced(NamedTuple):
    """A key and its value for the whole job; ``value`` is None where it has none (a step value only)."""

    entry: Entry
    value: Tensor | None


FindMetric = Callable[[str], Any]


def entry_of(slot: Slot) -> Entry:
    """Return what other ranks need to know of a slot."""
    return Entry(slot.key, slot.suffix, slot.settings, slot.kind, slot.site, slot.metric_path, slot.loader)


def scalar_result(value: Any, key: str, by: str, site: str) -> float:
    """Return a reduction's or a metric's result as a float; LogError where it is not one number."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return float(value)
    elif isinstance(value, (int, float)):
        return float(value)
    shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    hint = ""
    if isinstance(value, Mapping):
        hint = " Use log_dict for a MetricCollection."
    elif by == "compute()":
        hint = " Do not log this metric: call its compute() and reset() in the loop's epoch-end hook."
    raise LogError(f"log({key!r}) at {site}: {by} gave {shape} at the end of the loop; one number is needed.{hint}")


def _computed(metric: Any, gathered: list[Any] | None, key: str, site: str) -> float:
    """The number that a logged metric computes over the ranks' states; LogError with key and place where it cannot."""
    try:
        result = compute_over_ranks(metric, gathered)
    except Exception as error:
        raise LogError(
            f"log({key!r}) at {site}: compute() of {type(metric).__name__} failed at the end of the loop: "
            f"{type(error).__name__}: {error} Was it updated in this loop?"
        ) from error
    return scalar_result(result, key, "compute()", site)


def _custom(slot: Slot, values: Tensor) -> float:
    if slot.fx is None:
        raise LogError(
            f"log({slot.key!r}): its reduce_fx ({slot.settings.op}) is not known after resuming in mid-epoch, since it "
            "was not logged again before the epoch ended. Log it in every batch, or use a reduction by name."
        )
    return scalar_result(slot.fx(values), slot.key, "reduce_fx", slot.site)


def reduce_alone(slots: Mapping[str, Slot], device: torch.device) -> list[Reduced]:
    """Return the values of a job of one worker. Only callables and torchmetrics may wait for the device."""
    reduced = []
    for slot in slots.values():
        running, value = slot.running, None
        if slot.settings.metric:
            if slot.on_epoch:
                value = _tensor(_computed(slot.metric, None, slot.key, slot.site), device)
        elif slot.on_epoch and running.count:
            if running.op == "custom":
                value = _tensor(_custom(slot, running.all_values()), device)
            elif running.op == "mean":
                value = running.total(device) / running.weight if running.weight else _tensor(math.nan, device)
            else:
                value = running.total(device)
        reduced.append(Reduced(entry_of(slot), value))
    return reduced


def _tensor(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=accumulation_dtype(device), device=device)


class Agreement:
    """The keys that all ranks know of, for each loop. Changes only in an exchange that every rank takes part in."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._entries: dict[str, list[Entry]] = {}

    def entries(self, loop: str) -> list[Entry] | None:
        """Return the agreed keys, in one order on every rank; None before the first exchange."""
        return self._entries.get(loop)

    def exchange(self, loop: str, slots: Mapping[str, Slot], extra: Any = None) -> list[Any]:
        """Make one list of all ranks' keys; return what each rank gave as ``extra``. One object exchange.

        Raises LogError on every rank where ranks gave one key different settings.
        """
        gathered = self._collective.all_gather_object(([entry_of(slot) for slot in slots.values()], extra))
        merged: dict[str, tuple[int, Entry]] = {}
        for rank, (entries, _) in enumerate(gathered):
            for entry in entries:
                first_rank, first = merged.setdefault(entry.key, (rank, entry))
                if first.settings.shared() != entry.settings.shared():
                    raise LogError(
                        f"log({entry.key!r}): rank {first_rank} ({first.site}) and rank {rank} ({entry.site}) log it "
                        f"with different settings: {first.settings.differences(entry.settings)}."
                    )
        for known in self._entries.get(loop, ()):
            merged.setdefault(known.key, (-1, known))
        self._entries[loop] = [entry for _, entry in merged.values()]
        return [extra for _, extra in gathered]

    def reduce(self, loop: str, slots: Mapping[str, Slot], batches: int, samples: int, device: torch.device,
               find_metric: FindMetric, batches_of: Sequence[int] = ()) -> list[Reduced]:
        """Return every key's value for the whole job, bit for bit the same on all ranks. Waits for the device.

        ``batches_of``: this rank's batches of each loader, where there are several.
        Raises LogError on every rank where a key was logged by some of them only.
        """
        rows = self._gather_rows(loop, slots, batches, samples, batches_of)
        entries = self._entries[loop]
        _check_everywhere(entries, rows, len(batches_of))
        values = [_reduce_key(entry, rows, HEADER + WIDTH * i) for i, entry in enumerate(entries)]
        special = [
            (i, e) for i, e in enumerate(entries)
            if e.kind != "number" and e.settings.on_epoch and _ranks_with(e, rows, HEADER + WIDTH * i)
        ]  # fmt: skip
        if special:
            for (i, _), value in zip(special, self._reduce_special([e for _, e in special], slots, find_metric)):
                values[i] = value
        on_device = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
        tensors = on_device.to(device=device, dtype=accumulation_dtype(device)).unbind()
        logged = [_ranks_with(entry, rows, HEADER + WIDTH * i) for i, entry in enumerate(entries)]
        return [
            # Copied off the vector: nobody expects that changing one metric in place changes a tensor behind it.
            Reduced(entry_of(slots[e.key]) if e.key in slots else e, None if v is None else t.clone())
            for e, v, t, ranks in zip(entries, values, tensors, logged) if ranks
        ]  # fmt: skip

    def _gather_rows(
        self, loop: str, slots: Mapping[str, Slot], batches: int, samples: int, batches_of: Sequence[int]
    ) -> list[list[float]]:
        """Return each rank's vector as Python numbers, in rank order."""
        entries = self._entries.get(loop)
        if entries is not None:
            known = {entry.key: entry.settings.shared() for entry in entries}
            same = all(known.get(slot.key) == slot.settings.shared() for slot in slots.values())
            vector = _pack(entries, slots, [float(same), batches, samples], batches_of, self._collective.device)
            rows = [row.tolist() for row in torch.stack(self._collective.all_gather(vector)).cpu()]
            if all(row[0] for row in rows):
                return rows
        own = {key: _numbers(slot, torch.device("cpu")) for key, slot in slots.items()}
        values = {key: [*numbers, float(total)] for key, (numbers, total) in own.items()}
        extras = self.exchange(loop, slots, ([1.0, batches, samples], values, list(batches_of)))
        agreed = self._entries[loop]
        return [
            [*header, *(n for e in agreed for n in values.get(e.key, [0.0] * WIDTH)), *each]
            for header, values, each in extras
        ]

    def _reduce_special(self, entries: list[Entry], slots: Mapping[str, Slot], find: FindMetric) -> list[float]:
        """Reduce callables' and torchmetrics' keys: one exchange of what they hold, and one of results where a rank
        could not compute one (it had no batch, and so never saw the callable or the object)."""
        metrics: dict[str, Any] = {}
        held: dict[str, Any] = {}
        for entry in entries:
            slot = slots.get(entry.key)
            if entry.kind == "metric":
                metric = slot.metric if slot is not None else find(entry.metric_path)
                if metric is not None:
                    metrics[entry.key] = metric
                    held[entry.key] = metric_states(metric)
            elif slot is not None and slot.running.count:
                held[entry.key] = slot.running.all_values()
        gathered = self._collective.all_gather_object(held)
        own: dict[str, float] = {}
        for entry in entries:
            ranks = [0] if entry.settings.rank_zero_only else range(len(gathered))
            parts = [gathered[rank][entry.key] for rank in ranks if entry.key in gathered[rank]]
            if entry.kind == "metric" and entry.key in metrics:
                own[entry.key] = _computed(metrics[entry.key], parts, entry.key, entry.site)
                metrics[entry.key].reset()  # counts the updates of every rank now
            elif entry.kind == "custom" and entry.key in slots:
                own[entry.key] = _custom(slots[entry.key], torch.cat(parts))
        if all(entry.key in rank_held for rank_held in gathered for entry in entries):
            return [own[entry.key] for entry in entries]  # the same states and the same code on every rank
        results = self._collective.all_gather_object(own)
        return [next((r[e.key] for r in results if e.key in r), math.nan) for e in entries]

    def sync_steps(self, loop: str, slots: Mapping[str, Slot]) -> None:
        """Reduce the latest step values of keys with ``sync_dist`` over all ranks, in place; every rank must call.

        One collective, and none where no rank has such a key; nothing waits for the device. A key that some rank has
        not logged since the last time keeps its local values: nobody can hang on it. The first call in a run exchanges
        keys.
        """
        if self._entries.get(loop) is None:
            self.exchange(loop, slots)
        entries = [e for e in self._entries[loop] if e.settings.sync_op and e.settings.on_step]
        if not entries:
            return
        device = self._collective.device
        dtype = accumulation_dtype(device)
        own = []
        for entry in entries:
            slot = slots.get(entry.key)
            value = slot.last if slot is not None else None
            present = value is not None and entry.settings.sync_op == (slot.settings.sync_op if slot else "")
            own.append(torch.as_tensor(value if present else 0.0).detach().to(device=device, dtype=dtype))
            own.append(torch.full((), float(present), device=device, dtype=dtype))
        gathered = torch.stack(self._collective.all_gather(torch.stack(own)))  # [ranks, keys * 2]
        values, everywhere = gathered[:, 0::2], gathered[:, 1::2].amin(0) > 0
        for i, entry in enumerate(entries):
            slot = slots.get(entry.key)
            if slot is None or slot.last is None:
                continue
            column, op = values[:, i], entry.settings.sync_op
            total = column.amin() if op == "min" else column.amax() if op == "max" else column.sum()
            if op == "mean":
                total = total / len(column)
            local = torch.as_tensor(slot.last).detach()
            target = local if local.is_floating_point() else total
            slot.last = torch.where(everywhere[i].to(local.device), total.to(target), local.to(target))


def _numbers(slot: Slot | None, device: torch.device) -> tuple[list[float], Tensor]:
    """Return ``[weight, count]`` of a slot, and its total on ``device``; zeros for a key that was not logged."""
    if slot is None:
        return [0.0, 0.0], torch.zeros((), dtype=accumulation_dtype(device), device=device)
    running = slot.running
    weight = -1.0 if slot.implicit else running.weight
    # A step-only key counts as logged: its slot exists only because it was.
    return [weight, float(max(running.count, 1))], running.total(device)


def _pack(
    entries: Sequence[Entry], slots: Mapping[str, Slot], header: list[float], batches_of: Sequence[int],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return this rank's vector on the collective's device; Python numbers travel in one copy."""
    rows = [_numbers(slots.get(entry.key), device) for entry in entries]
    dtype = accumulation_dtype(device)
    keys = [number for numbers, _ in rows for number in (*numbers, 0.0)]
    host = torch.tensor([*header, *keys, *batches_of], dtype=dtype).to(device)
    if rows:
        host[HEADER + 2 : HEADER + len(keys) : WIDTH] = torch.stack([total for _, total in rows])
    return host


def _ranks_with(entry: Entry, rows: list[list[float]], at: int) -> list[int]:
    ranks = [rank for rank, row in enumerate(rows) if row[at + 1]]
    return [rank for rank in ranks if rank == 0] if entry.settings.rank_zero_only else ranks


def _check_everywhere(entries: list[Entry], rows: list[list[float]], loaders: int) -> None:
    """Raise LogError, the same on every rank, for keys logged on some ranks only. A rank without a batch in this loop,
    or of the key's loader (fewer samples than ranks), is exempt, since the hooks that log never ran there."""
    anyone = any(row[1] for row in rows)
    faults = []
    for i, entry in enumerate(entries):
        if entry.settings.rank_zero_only:
            continue
        have = _ranks_with(entry, rows, HEADER + WIDTH * i)
        ran = [rank for rank, row in enumerate(rows) if _batches(row, entry, loaders) or not anyone]
        lack = [rank for rank in ran if rank not in have]
        if have and lack:
            faults.append(f"{entry.key!r} was logged on {_named(have)} ({entry.site}) but not on {_named(lack)}")
    if faults:
        raise LogError(
            f"Metrics logged on some ranks only have no value for the whole job: {'; '.join(faults)}. "
            "Log them on every rank, or pass rank_zero_only=True where only rank 0's value counts."
        )


def _batches(row: list[float], entry: Entry, loaders: int) -> float:
    """The batches in which a rank may have logged the key."""
    if entry.loader is None or entry.loader >= loaders:
        return row[1]
    return row[len(row) - loaders + entry.loader]


def _named(ranks: list[int]) -> str:
    listed = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _reduce_key(entry: Entry, rows: list[list[float]], at: int) -> float | None:
    """Reduce one key in rank order. Python floats: the same arithmetic, so the same bits, on every kind of machine."""
    ranks = _ranks_with(entry, rows, at)
    if not ranks or not entry.settings.on_epoch or entry.kind != "number":
        return None
    totals = [rows[rank][at + 2] for rank in ranks]
    if entry.settings.op == "min":
        return math.nan if any(t != t for t in totals) else min(totals)
    if entry.settings.op == "max":
        return math.nan if any(t != t for t in totals) else max(totals)
    if entry.settings.op == "sum":
        return sum(totals)
    # An epoch hook's own value stands for the samples (else the batches) that its rank has seen.
    seen = 2 if all(rows[rank][2] >= 0 for rank in ranks) else 1
    if not any(rows[rank][seen] for rank in ranks):
        seen = at + 1  # no rank had a batch: each call weighs the same
    numerator = denominator = 0.0
    for rank, total in zip(ranks, totals):
        weight = rows[rank][at]
        if weight < 0:
            total, weight = total / rows[rank][at + 1] * rows[rank][seen], rows[rank][seen]
        if weight:  # a rank without samples may well have logged NaN
            numerator, denominator = numerator + total, denominator + weight
    return numerator / denominator if denominator else math.nan
