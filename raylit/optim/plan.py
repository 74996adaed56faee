"""Turns whatever ``configure_optimizers`` returned into one plain value, or says what is wrong with it. Floor 2.

Every form of section 5.1 of the contract is read here and nowhere else. Nothing here steps an optimizer or a scheduler;
the pure functions at the end only say which of them are due.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raylit.errors import OptimizerError, nearest

Interval = Literal["epoch", "step"]

_ENTRY_KEYS = ("optimizer", "lr_scheduler", "monitor", "frequency")
_SCHEDULER_KEYS = ("scheduler", "interval", "frequency", "reduce_on_plateau", "monitor", "strict", "name")
_INTERVALS = ("epoch", "step")

ACCEPTED_FORMS = """Accepted forms of configure_optimizers:
  optimizer                                      one torch.optim.Optimizer
  [optimizer, ...]  or  (optimizer, ...)         several
  [optimizer, ...], [scheduler, ...]             optimizers and schedulers
  {"optimizer": ..., "lr_scheduler": ..., "monitor": ...}            each one, or a list; the last two may be missing
  [{"optimizer": ..., "lr_scheduler": ..., "frequency": n}, ...]     "frequency" on all of them or on none
  None                                           no optimizer: the loop runs forward only
A scheduler is a scheduler object, or a dict with "scheduler" and any of "interval" ("epoch" or "step"), "frequency",
"reduce_on_plateau", "monitor", "strict", "name"."""


@dataclass(frozen=True)
class SchedulerPlan:
    """One learning rate scheduler and when it steps."""

    scheduler: Any  # torch's LRScheduler, or any object with step() and .optimizer (timm's)
    optimizer_idx: int  # counts from 0, in the order in which the optimizers were returned
    interval: Interval = "epoch"
    frequency: int = 1  # in intervals: epochs, or optimizer steps
    reduce_on_plateau: bool = False  # step() takes the value of `monitor`
    monitor: str | None = None
    strict: bool = True  # a missing `monitor` is an error rather than a skipped step
    name: str | None = None


@dataclass(frozen=True)
class OptimPlan:
    """What ``configure_optimizers`` returned. No optimizers: the loop runs forward only."""

    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[SchedulerPlan, ...] = ()
    frequencies: tuple[int, ...] = ()  # batches in each optimizer's block; empty: all of them on every batch


def parse_optimizers(returned: object, *, automatic: bool = True) -> OptimPlan:
    """Read the return value of ``configure_optimizers``.

    ``automatic``: False under manual optimisation, where the Module steps its schedulers itself, so that a
    ``ReduceLROnPlateau`` needs no ``monitor``.

    Raises ``OptimizerError``, with what was given and the accepted forms, for anything that section 5.1 does not
    name: another type, an empty list, an unknown key, an optimizer or scheduler given twice, a scheduler over an
    optimizer that is not returned, a frequency on some optimizers only, a ``ReduceLROnPlateau`` without monitor.
    """
    if returned is None:
        return OptimPlan()
    if isinstance(returned, Optimizer):
        return OptimPlan(optimizers=(returned,))
    if isinstance(returned, Mapping):
        return _from_entries([returned], automatic)
    if not isinstance(returned, (list, tuple)):
        _refuse(f"configure_optimizers returned {_show(returned)}")
    if not returned:
        _refuse(f"configure_optimizers returned an empty {type(returned).__name__}: return None for no optimizer")
    if len(returned) == 2 and isinstance(returned[0], (list, tuple)):
        optimizers = _optimizers(returned[0], "the first list that configure_optimizers returned")
        return _assemble(optimizers, [(item, None) for item in _listed(returned[1])], (), automatic)
    if all(isinstance(item, Mapping) for item in returned):
        return _from_entries(returned, automatic)
    if any(isinstance(item, Mapping) for item in returned) and any(isinstance(item, Optimizer) for item in returned):
        _refuse("configure_optimizers returned a list that mixes optimizers and dicts: give all as dicts")
    return _assemble(_optimizers(returned, "the list that configure_optimizers returned"), [], (), automatic)


def active_optimizers(plan: OptimPlan, group_index: int) -> tuple[int, ...]:
    """Return the indices of the optimizers that run in one accumulation group, in order.

    ``group_index`` counts from 0 and never restarts: groups started since training began, so that a cycle of
    frequencies runs on over the ends of epochs.
    """
    if not plan.frequencies:
        return tuple(range(len(plan.optimizers)))
    position = group_index % sum(plan.frequencies)
    for index, block in enumerate(plan.frequencies):
        if position < block:
            return (index,)
        position -= block
    raise AssertionError("unreachable: position is below the sum of the blocks")


def scheduler_due(plan: SchedulerPlan, interval: Interval, count: int) -> bool:
    """Tell whether a scheduler steps now. ``count``: epochs or steps that are complete, so 1 after the first."""
    return plan.interval == interval and count % plan.frequency == 0


def _from_entries(entries: Sequence[Mapping[Any, Any]], automatic: bool) -> OptimPlan:
    """Read dicts with "optimizer". Their schedulers inherit the dict's "monitor"."""
    optimizers: list[Optimizer] = []
    schedulers: list[tuple[object, str | None]] = []
    frequencies: list[int | None] = []
    for position, entry in enumerate(entries):
        where = "the dict that configure_optimizers returned" if len(entries) == 1 else f"dict {position}"
        _check_entry_keys(entry, where)
        own = _optimizers(_listed(entry["optimizer"]), f'"optimizer" of {where}')
        frequency = entry.get("frequency")
        if frequency is not None:
            if len(own) > 1:
                _refuse(f'"frequency" of {where} beside a list of optimizers: give each optimizer a dict of its own')
            frequency = _positive(frequency, f'"frequency" of {where}', "batches")
        optimizers += own
        frequencies += [frequency] * len(own)
        monitor = _text_or_none(entry.get("monitor"), f'"monitor" of {where}')
        given = entry.get("lr_scheduler")
        schedulers += [(item, monitor) for item in ([] if given is None else _listed(given))]
    blocks = tuple(n for n in frequencies if n is not None)
    if blocks and len(blocks) != len(optimizers):
        without = [index for index, n in enumerate(frequencies) if n is None]
        _refuse(f'"frequency" is given for some optimizers only; it is missing for optimizer(s) {without}')
    # A cycle of one optimizer is no cycle.
    return _assemble(optimizers, schedulers, blocks if len(blocks) > 1 else (), automatic)


def _check_entry_keys(entry: Mapping[Any, Any], where: str) -> None:
    for key in entry:
        if key in _ENTRY_KEYS:
            continue
        if key in _SCHEDULER_KEYS and key != "scheduler":
            _refuse(f'{where} has the key {key!r}, which belongs into the dict under "lr_scheduler"')
        _refuse(f"{where} has the unknown key {key!r}.{_nearest_key(key, _ENTRY_KEYS)}")
    if "optimizer" not in entry:
        _refuse(f'{where} has no "optimizer", only {sorted(map(str, entry))}')


def _optimizers(items: Sequence[object], where: str) -> list[Optimizer]:
    if not items:
        _refuse(f"{where} is empty: return None for no optimizer")
    found: list[Optimizer] = []
    for position, item in enumerate(items):
        if not isinstance(item, Optimizer):
            _refuse(f"{where} holds {_show(item)} at position {position}, where an optimizer should be")
        found.append(item)
    return found


def _assemble(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[tuple[object, str | None]],
    frequencies: tuple[int, ...],
    automatic: bool,
) -> OptimPlan:
    for index, optimizer in enumerate(optimizers):
        first = _position(optimizer, optimizers)
        if first != index:
            _refuse(f"optimizers {first} and {index} are the same {type(optimizer).__name__} object")
    plans = tuple(_scheduler(item, monitor, optimizers, automatic) for item, monitor in schedulers)
    for index, plan in enumerate(plans):
        first = _position(plan.scheduler, [each.scheduler for each in plans])
        if first != index:
            _refuse(
                f"schedulers {first} and {index} are the same {type(plan.scheduler).__name__} object, "
                "which would step twice as often"
            )
    return OptimPlan(tuple(optimizers), plans, frequencies)


def _scheduler(item: object, monitor: str | None, optimizers: Sequence[Optimizer], automatic: bool) -> SchedulerPlan:
    """Read one scheduler: an object, or a dict. ``monitor`` is the one of the dict around it."""
    options: Mapping[Any, Any] = {}
    if isinstance(item, Mapping):
        for key in item:
            if key not in _SCHEDULER_KEYS:
                hint = " (the optimizer is read off the scheduler)" if key == "opt_idx" else ""
                _refuse(f"a scheduler's dict has the unknown key {key!r}{hint}.{_nearest_key(key, _SCHEDULER_KEYS)}")
        if "scheduler" not in item:
            _refuse(f'a scheduler\'s dict has no "scheduler", only {sorted(map(str, item))}')
        options, item = item, item["scheduler"]
    optimizer_idx = _optimizer_of(item, optimizers)
    title = type(item).__name__
    interval = options.get("interval", "epoch")
    if interval not in _INTERVALS:
        _refuse(f'{title}: "interval" is {_show(interval)}, not "epoch" or "step".{_nearest_key(interval, _INTERVALS)}')
    monitor = _text_or_none(options.get("monitor"), f'{title}: "monitor"') or monitor
    plateau = options.get("reduce_on_plateau")
    if plateau is None:
        plateau = isinstance(item, ReduceLROnPlateau)
    plateau = _flag(plateau, f'{title}: "reduce_on_plateau"')
    if isinstance(item, ReduceLROnPlateau) and not plateau:
        _refuse('"reduce_on_plateau" is False for a ReduceLROnPlateau, whose step() needs a value: leave the key out')
    if plateau and monitor is None and automatic:
        _refuse(
            f"{title} needs the name of the logged metric that it watches: "
            '{"scheduler": scheduler, "monitor": "val_loss"}, or "monitor" beside "optimizer"'
        )
    return SchedulerPlan(
        scheduler=item,
        optimizer_idx=optimizer_idx,
        interval=cast(Interval, interval),
        frequency=_positive(options.get("frequency", 1), f'{title}: "frequency"', f"{interval}s"),
        reduce_on_plateau=plateau,
        monitor=monitor,
        strict=_flag(options.get("strict", True), f'{title}: "strict"'),
        name=_text_or_none(options.get("name"), f'{title}: "name"'),
    )


def _optimizer_of(item: object, optimizers: Sequence[Optimizer]) -> int:
    """Return the index of the optimizer that the scheduler was built over."""
    step: Callable[..., object] | None = getattr(item, "step", None)
    # Schedulers of other libraries (timm's) derive from nothing of torch's: what they all have is these two.
    over = getattr(item, "optimizer", None)
    known = isinstance(item, LRScheduler) or (callable(step) and isinstance(over, Optimizer))
    if isinstance(item, (type, Optimizer)) or not known:
        _refuse(f"{_show(item)} is not a scheduler")
    index = _position(over, optimizers)
    if index is None:
        _refuse(
            f"{type(item).__name__} was built over {_article(over)} that configure_optimizers does not return: "
            "return that optimizer too, or build the scheduler over a returned one"
        )
    return index


def _position(item: object, among: Sequence[object]) -> int | None:
    """Return the first index of this very object, or None."""
    return next((index for index, other in enumerate(among) if other is item), None)


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else [value]


def _positive(value: object, where: str, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(f"{where} is {_show(value)}, not a number of {unit} of at least 1")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        _refuse(f"{where} is {_show(value)}, not True or False")
    return value


def _text_or_none(value: object, where: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        _refuse(f"{where} is {_show(value)}, not a name")
    return value


def _nearest_key(key: object, accepted: Sequence[str]) -> str:
    return nearest(key, accepted) if isinstance(key, str) else ""


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].upper() in 'AEIOU' else 'a'} {name}"


def _show(value: object) -> str:
    """Show what was given, in brief: a whole optimizer's text is a page."""
    if isinstance(value, type):
        return f"the class {value.__name__} (call it to make an object)"
    if isinstance(value, (str, int, float, list, tuple, dict, type(None))):
        return reprlib.repr(value)
    return f"{_article(value)} object"


def _refuse(problem: str) -> NoReturn:
    raise OptimizerError(f"{problem}\n{ACCEPTED_FORMS}")
