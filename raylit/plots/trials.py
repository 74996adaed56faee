"""What the pictures are drawn from: a search's trials as plain values. Floor 2; neither Ray nor matplotlib here.

Results are read by what Ray documents of them: ``config``, ``metrics``, ``metrics_dataframe``, ``error``, ``path``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylit.errors import ConfigError, nearest
from raylit.goal import BESIDE_METRICS, GOAL_FILE, goal_from_json
from raylit.hparams import flat
from raylit.plots.scale import UNSET, is_number, number, text_of

log = logging.getLogger(__name__)

# Words of a metric's name that tell which of its numbers are better.
_LOWER = frozenset("loss error err mse rmse mae mape nll kl perplexity ppl bpb bpc wer cer fid brier".split())
_HIGHER = frozenset("""
    acc accuracy auc auroc f1 precision recall specificity iou miou dice map r2 bleu rouge psnr ssim ndcg reward return
""".split())  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trial. ``value``: its last reported number of the metric, None where there is none that is finite."""

    name: str
    config: Mapping[str, Any]  # one key a value: "model/hidden"
    status: str  # "done", "stopped" (before its training's end), "failed"
    value: float | None
    curve: tuple[tuple[float, float], ...] = ()  # (place in training, metric), by place; finite numbers only
    epochs: int | None = None  # finished ones
    reason: str = ""  # of a failure, one line

    def described(self, metric: str) -> str:
        """The trial in one line."""
        parts = [f"{key}={text_of(value)}" for key, value in self.config.items()]
        value = "no value" if self.value is None else number(self.value)
        return f"{self.name}, {self.status}: {metric} {value}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class _Point:
    """One report that has the metric."""

    epoch: float | None
    step: float | None
    value: float

    def at(self, place: str, index: int) -> float | None:
        return {"epoch": self.epoch, "step": self.step, "report": index + 1.0}[place]


@dataclass(frozen=True)
class Hparam:
    """One axis: a hyperparameter's value in each trial whose configuration is known, by the trial's name."""

    name: str
    values: Mapping[str, Any]  # scale.UNSET where a trial does not have it


@dataclass(frozen=True)
class Search:
    """A search: trials in the order of the results."""

    trials: tuple[Trial, ...]
    best: Trial
    metric: str
    mode: str  # "min" or "max"
    keys: tuple[str, ...]  # hyperparameters that differ between trials
    place: str  # what curves are drawn over: "epoch", "step" or "report"

    @property
    def hparams(self) -> list[Hparam]:
        """What differs; where nothing is known of any trial, their order stands for it."""
        if not self.keys:
            return [Hparam("trial", {trial.name: index for index, trial in enumerate(self.trials, 1)})]
        known = [trial for trial in self.trials if trial.config]
        return [Hparam(key, {trial.name: trial.config.get(key, UNSET) for trial in known}) for key in self.keys]

    @property
    def compared(self) -> list[Trial]:
        """Those with a value, the worst first and the best last: the order to draw them in."""
        found = [trial for trial in self.trials if trial.value is not None and trial.status != "failed"]
        found.sort(key=lambda trial: trial.value or 0.0, reverse=self.mode == "min")
        return [*(trial for trial in found if trial is not self.best), self.best]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "failed"]

    @property
    def without_value(self) -> list[Trial]:
        """Those that did not fail, and cannot be compared: NaN at the end, or nothing reported."""
        return [trial for trial in self.trials if trial.value is None and trial.status != "failed"]

    @property
    def goal(self) -> str:
        """The metric with its direction."""
        return f"{self.metric} ({'lower' if self.mode == 'min' else 'higher'} is better)"


def read_search(results: Iterable[Any], metric: str | None = None, mode: str | None = None) -> Search:
    """Read the results of a search. Raises ConfigError as ``plots.search`` does."""
    if mode not in (None, "min", "max"):
        raise ConfigError(f"plots.search(mode={mode!r}): the mode is 'min' or 'max'")
    found = list(results)
    if not found:
        raise ConfigError("plots.search: the results have no trial")
    if all(result.error for result in found):
        raise ConfigError(
            f"plots.search: all {len(found)} trials failed and there is nothing to compare. The first one's reason: "
            f"{_reason(found[0].error)}"
        )
    kept = _kept_goal(results)
    if kept is not None and metric in (None, kept[0]):  # what the search compared by, unless another is asked for
        metric, mode = kept[0], mode or kept[1]
    metric = _metric(found, metric)
    mode = mode or _mode(metric)
    histories = [_history(result, metric) for result in found]
    place = _place(histories)
    trials = tuple(_trial(name, result, metric, history, place)
                   for name, result, history in zip(_names(found), found, histories))  # fmt: skip
    ranked = [trial for trial in trials if trial.value is not None and trial.status != "failed"]
    if not ranked:
        raise ConfigError(f"plots.search: no trial that did not fail has a finite last value of {metric!r}")
    best = min(ranked, key=lambda trial: (trial.value or 0.0) * (1 if mode == "min" else -1))
    return Search(trials, best, metric, mode, tuple(varied([trial.config for trial in trials])), place)


def varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that differ between trials, in the order of the space; all of them where none does."""
    known = [config for config in configs if config]
    keys = list(dict.fromkeys(key for config in known for key in config))
    seen = {key: {_exact(config[key]) if key in config else None for config in known} for key in keys}
    return [key for key in keys if len(seen[key]) > 1] or keys


def _exact(value: Any) -> tuple[bool, Any]:
    return (True, float(value)) if is_number(value) else (False, text_of(value))


# -- metric and mode -----------------------------------------------------------------------------------------------
def _kept_goal(results: Any) -> tuple[str, str] | None:
    """Metric and mode as the search's folder keeps them; None for a search that raylit did not make."""
    filesystem, folder = getattr(results, "filesystem", None), getattr(results, "experiment_path", None)
    if filesystem is None or folder is None:
        return None
    try:
        with filesystem.open_input_stream(f"{folder}/{GOAL_FILE}") as file:
            return goal_from_json(file.read())
    except OSError:  # it is not there, or the storage is away: metric= and mode= can be given
        return None


def _metric(results: Sequence[Any], asked: str | None) -> str:
    reported = [_numbers(result) for result in results if not result.error]
    reported = [each for each in reported if each]
    known = list(dict.fromkeys(name for each in reported for name in each))
    listed = f"Reported are: {', '.join(map(repr, sorted(known))) or 'no numbers at all'}."
    if asked is not None:
        if not isinstance(asked, str) or asked not in known:
            hint = nearest(asked, known) if isinstance(asked, str) else ""
            raise ConfigError(f"plots.search(metric={asked!r}): no trial has reported it.{hint} {listed}")
        return asked
    shared = [name for name in known if all(name in each for each in reported)]
    for fitting in ([name for name in shared if re.match(r"val[_/]", name)], [n for n in shared if n == "loss"]):
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    raise ConfigError(f"plots.search: say what trials are compared by, with metric= and mode=. {listed}")


def _mode(metric: str) -> str:
    """By the words of the name, where they say one thing only."""
    found = re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+\d*", metric)
    words = {form for word in map(str.lower, found) for form in (word, word.rstrip("0123456789"))}
    lower, higher = bool(words & _LOWER), bool(words & _HIGHER)
    if lower == higher:
        raise ConfigError(f"plots.search: say which {metric!r} is better, with mode='min' or mode='max'")
    return "min" if lower else "max"


# -- one result ----------------------------------------------------------------------------------------------------
def _trial(name: str, result: Any, metric: str, history: Sequence[_Point], place: str) -> Trial:
    metrics = result.metrics or {}
    reported = flat({key: value for key, value in metrics.items() if key != "config"})
    if metric in reported:
        value = _number(reported[metric])
    else:  # the last report was about something else
        value = history[-1].value if history else None
    if value is not None and not math.isfinite(value):
        value = None
    places = [(point.at(place, index), point.value) for index, point in enumerate(history)]
    curve = [(x, y) for x, y in places if x is not None]
    status = "failed" if result.error else "stopped" if metrics.get("finished") is False else "done"
    epochs = _finite(metrics.get("epoch"))
    return Trial(
        name, _config(result), status, value, tuple(curve),
        epochs=None if epochs is None else int(epochs), reason=_reason(result.error) if result.error else "",
    )  # fmt: skip


def _names(results: Sequence[Any]) -> list[str]:
    """A name for each: Tune's id, else its folder's name, else its number; none twice."""
    names: list[str] = []
    for index, result in enumerate(results, 1):
        told = (result.metrics or {}).get("trial_id") or os.path.basename(str(result.path or "").rstrip("/"))
        name = str(told or f"trial_{index}")
        names.append(f"{name}_{index}" if name in names else name)
    return names


def _config(result: Any) -> dict[str, Any]:
    """The configuration; of a trial that failed before its first report it is only in Tune's own file."""
    if result.config:
        return flat(result.config)
    file = os.path.join(str(result.path or ""), "params.json")
    if not os.path.isfile(file):
        return {}
    try:
        with open(file, encoding="utf-8") as opened:
            return flat(json.load(opened))
    except (OSError, ValueError, AttributeError) as error:
        log.info("the hyperparameters in %s cannot be read: %s", file, error)
        return {}


def _reason(error: BaseException) -> str:
    """A trial's exception in one line; Ray's own is taken off."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _numbers(result: Any) -> dict[str, float]:
    """All that a trial has reported as numbers, at the last report that has them."""
    found: dict[str, float] = {}
    if result.metrics_dataframe is not None:
        for name in result.metrics_dataframe.columns:
            values = [_finite(value) for value in result.metrics_dataframe[name].tolist()]
            found |= {str(name): value for value in values if value is not None}
    last = flat({key: value for key, value in (result.metrics or {}).items() if key != "config"})
    found |= {name: value for name, each in last.items() if (value := _number(each)) is not None}
    beside = {name for name in found if name in BESIDE_METRICS or name.startswith("config/")}
    return {name: value for name, value in found.items() if name not in beside}


# -- histories -----------------------------------------------------------------------------------------------------
def _history(result: Any, metric: str) -> list[_Point]:
    """A trial's finite values in the order of training, each place once.

    A trial that went on from an earlier checkpoint (after a failure, or as a clone of another) has reported a place
    again: the later report is the one that its end came from.
    """
    frame = result.metrics_dataframe
    if frame is not None and metric in frame.columns:
        columns = {name: frame[name].tolist() for name in (metric, "epoch", "step", "training_iteration")
                   if name in frame.columns}  # fmt: skip
    else:
        last = flat(result.metrics or {})
        columns = {name: [last[name]] for name in (metric, "epoch", "step", "training_iteration") if name in last}
    rows = range(len(columns.get(metric, [])))
    finite = {name: [_finite(values[row]) for row in rows] for name, values in columns.items()}
    nothing = [None for _ in rows]
    epochs, steps = finite.get("epoch", nothing), finite.get("step", nothing)
    keys = finite.get("step") or finite.get("training_iteration") or [float(row) for row in rows]
    kept: dict[float, _Point] = {}
    for row in rows:
        value, key = finite[metric][row], keys[row]
        if value is not None:
            kept[float(row) if key is None else key] = _Point(epochs[row], steps[row], value)
    return [kept[key] for key in sorted(kept)]


def _finite(value: Any) -> float | None:
    found = _number(value)
    return found if found is not None and math.isfinite(found) else None


def _place(histories: Sequence[Sequence[_Point]]) -> str:
    """What tells the points of every trial apart: epochs, else steps (validation within an epoch), else the reports."""
    for place in ("epoch", "step"):
        places = [[point.at(place, 0) for point in history] for history in histories]
        if all(None not in each and len(set(each)) == len(each) for each in places):
            return place
    return "report"
