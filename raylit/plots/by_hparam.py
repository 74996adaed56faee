"""The metric against each hyperparameter, a point for each trial. Floor 2, driver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylit.plots.figure import (
    BEST_POINT,
    LOST_POINT,
    POINT,
    legend,
    line_of,
    metric_is_log,
    new_figure,
    plain_numbers,
    title,
)
from raylit.plots.scale import UNSET, Scale, scale_of, shortened
from raylit.plots.trials import Hparam, Search

_MOST_LETTERS = 18
_MOST_LABELS = 12
_ROOM = 38  # letters that fit beside each other below one picture


def draw_by_hparam(search: Search) -> Figure:
    """One picture for each hyperparameter that differs.

    Hollow points: stopped early, so that their last value is of an earlier epoch. Crosses at the bottom: no value.
    """
    hparams = search.hparams
    columns = len(hparams) if len(hparams) <= 3 else 2 if len(hparams) == 4 else 3 if len(hparams) <= 9 else 4
    rows = math.ceil(len(hparams) / columns)
    figure = new_figure(max(6.0, 0.7 + 3.3 * columns), 1.0 + 2.9 * rows)
    cells = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    values = [trial.value for trial in search.compared if trial.value is not None]
    log = metric_is_log(values, search.mode)
    for index, axes in enumerate(cells):
        if index >= len(hparams):
            axes.remove()
            continue
        if log:
            axes.set_yscale("log")
        _draw(axes, search, hparams[index])
        if index % columns == 0:
            axes.set_ylabel(shortened(search.metric, 30))
    cells[0].margins(y=0.1)
    plain_numbers(cells[0].yaxis, log)
    title(figure, search, "Metric by hyperparameter")
    statuses = [trial.status for trial in search.compared if trial is not search.best]
    words = {"done": "trained to the end", "stopped": "stopped early"}
    entries = {f"{said} ({statuses.count(status)})": line_of("", **_look(status))
               for status, said in words.items() if status in statuses}  # fmt: skip
    legend(figure, search, entries, points=True)
    return figure


def spread(scale: Scale, values: Sequence[Any]) -> list[float]:
    """Positions of the values; those on a name's place side by side, so that they do not cover each other."""
    width = 0.5 / max(len(scale.names) - 1, 2) if scale.kind == "category" else 0.08
    met: dict[float, int] = {}
    found = []
    for value in values:
        position = scale.position(value)
        if scale.kind == "category" or value is None or value is UNSET:
            count = met[position] = met.get(position, -1) + 1
            position += width * ((0.5 + 0.618034 * count) % 1.0 - 0.5)  # the golden section: even at every count
        found.append(position)
    return found


def _look(status: str) -> dict[str, Any]:
    """A point's look by its trial's status."""
    filled = POINT if status == "done" else "white"
    return {"marker": "o", "markersize": 5.5, "color": POINT, "markerfacecolor": filled, "markeredgewidth": 1.2,
            "linestyle": "none"}  # fmt: skip


def _draw(axes: Axes, search: Search, hparam: Hparam) -> None:
    """Draw one picture; the gids of its points begin with the hyperparameter's name."""
    key, values = hparam.name, hparam.values
    scale = scale_of(list(values.values()))
    places = dict(zip(values, spread(scale, list(values.values()))))
    compared = [trial for trial in search.compared if trial.name in places]
    for status in ("done", "stopped"):
        chosen = [trial for trial in compared if trial.status == status and trial is not search.best]
        if chosen:
            axes.plot([places[trial.name] for trial in chosen], [trial.value or 0.0 for trial in chosen],
                      alpha=0.85 if len(compared) <= 80 else 0.6, gid=f"{key}:{status}", **_look(status))  # fmt: skip
    if search.best in compared:
        axes.plot([places[search.best.name]], [search.best.value or 0.0], gid=f"{key}:best", zorder=5, **BEST_POINT)
    lost = [trial for trial in [*search.failed, *search.without_value] if trial.name in places]
    if lost:
        axes.plot([places[trial.name] for trial in lost], [0.03] * len(lost), gid=f"{key}:lost",
                  transform=axes.get_xaxis_transform(), **LOST_POINT)  # fmt: skip
    axes.set_xlabel(shortened(key, 40))
    beyond = max(0.06, 0.5 / max(len(scale.names) - 1, 1) if scale.kind == "category" else 0.0)
    axes.set_xlim(-beyond, 1 + beyond)
    _ticks(axes, scale)


def _ticks(axes: Axes, scale: Scale) -> None:
    """Labels that stand beside each other, or aslant where they are long."""
    ticks = [(position, shortened(label, _MOST_LETTERS)) for position, label in scale.ticks()]
    if scale.kind == "category":
        ticks = ticks[:: math.ceil(len(ticks) / _MOST_LABELS)]
    else:
        ticks = _apart(ticks)
    axes.set_xticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.set_xticks(scale.minor_ticks(), minor=True)
    if sum(len(label) + 2 for _, label in ticks) > _ROOM:
        for text in axes.get_xticklabels():
            text.set(rotation=30, ha="right", rotation_mode="anchor")


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Numbers that do not touch: a letter takes about a fiftieth of the axis."""
    kept: list[tuple[float, str]] = []
    for position, label in ticks:
        if not kept or position - kept[-1][0] >= (len(label) + len(kept[-1][1])) / 100 + 0.02:
            kept.append((position, label))
    return kept
