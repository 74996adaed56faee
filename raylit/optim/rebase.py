"""Going on with other hyperparameters: what was given to optimizers and schedulers anew takes the place of the old.

A search that clones a trial (PBT) goes on from the donor's weights and optimizer state with a configuration of its own.
Loading the state puts every option back as the donor had it, learning rates among them. What ``configure_optimizers``
made differently this time is therefore told from what it had made for the donor, and put in its place: an option by its
value, a learning rate by the ratio, so that what a schedule has done to it stays. Floor 2, worker side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Options = dict[str, Any]
_RATES = ("lr", "initial_lr")
_KEPT_BY_SCHEDULE = ("base_lrs", "_last_lr", "last_epoch", "_step_count")


def options_of(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return what optimizers and schedulers were made with: plain values, group by group."""
    return {
        "optimizers": [[_plain(group, ("params",)) for group in each.param_groups] for each in optimizers],
        "schedulers": [_plain(each.state_dict(), ()) for each in schedulers],
    }


def rebase(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], made: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Put what is ``made`` differently than ``before`` (both as ``options_of`` returns them) in its place."""
    ratios: dict[int, list[float]] = {}
    for optimizer, fresh, old in zip(optimizers, made["optimizers"], before["optimizers"]):
        pairs = zip(optimizer.param_groups, fresh, old)
        ratios[id(optimizer)] = [_rebase_group(group, new, was) for group, new, was in pairs]
    for scheduler, fresh, old in zip(schedulers, made["schedulers"], before["schedulers"]):
        changed = {key: value for key, value in fresh.items() if key not in _KEPT_BY_SCHEDULE and old.get(key) != value}
        state = scheduler.state_dict()
        of = ratios.get(id(scheduler.optimizer), [])
        for name in ("base_lrs", "_last_lr"):
            if len(state.get(name) or ()) == len(of):
                changed[name] = [rate * ratio for rate, ratio in zip(state[name], of)]
        if changed:
            scheduler.load_state_dict({**state, **changed})


def _rebase_group(group: dict[str, Any], made: Options, before: Options) -> float:
    """Change one group's options; return the ratio of its learning rates."""
    for key, value in made.items():
        if key not in _RATES and before.get(key) != value:
            group[key] = value
    new, old = (options.get("initial_lr", options.get("lr")) for options in (made, before))
    if new is None or old is None or new == old:
        return 1.0
    ratio = new / old if old else 1.0
    for key in _RATES:
        if key in group:
            group[key] = group[key] * ratio if old else made[key]
    return float(ratio)


def _plain(options: Mapping[str, Any], without: tuple[str, ...]) -> Options:
    """The options that are numbers, text, or lists of these: those that a hyperparameter may have set."""
    return {key: _copied(value) for key, value in options.items() if key not in without and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Tensor))


def _copied(value: Any) -> Any:
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
