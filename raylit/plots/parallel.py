"""Parallel coordinates: an axis for each hyperparameter and for the metric, a line for each trial. Floor 2, driver."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylit.plots.figure import AXIS, BEST, GREY, INK, Colours, legend, line_of, new_figure, title, weight
from raylit.plots.scale import Scale, is_number, number, scale_of, shortened
from raylit.plots.trials import Hparam, Search, Trial

_AXIS_INCHES = 1.75  # between two axes
_WIDEST_INCHES = 48.0
_MOST_LETTERS = 17  # of a category, or of a line of a hyperparameter's name
_HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}


def draw_parallel(search: Search) -> Figure:
    """Every line of the axes is a trial, its gid the trial's name; those that failed end before the metric."""
    hparams = search.hparams
    width = min(_WIDEST_INCHES, max(6.0, 2.2 + _AXIS_INCHES * len(hparams)))
    figure = new_figure(width, 5.2)
    axes = figure.subplots()
    scales = [scale_of(list(hparam.values.values())) for hparam in hparams]
    colours, last = Colours(search), len(scales)
    values = [trial.value or 0.0 for trial in search.compared]
    goal = Scale("log" if colours.log else "linear", min(values), max(values))
    _draw_axes(axes, [hparam.name for hparam in hparams] + [search.metric], [*scales, goal], colours)
    thin, opacity = weight(len(search.trials))
    for trial in [*search.failed, *search.without_value]:
        look = line_of("failed" if trial.status == "failed" else "no value")
        axes.plot(*_through(hparams, scales, trial), color=GREY, linestyle=look.get_linestyle(),
                  linewidth=max(thin, 1.0), zorder=2, gid=trial.name)  # fmt: skip
    for rank, trial in enumerate(search.compared):
        xs, ys = _through(hparams, scales, trial)
        best = trial is search.best
        axes.plot(
            [*xs, last], [*ys, goal.position(trial.value)], gid=trial.name, solid_joinstyle="round",
            color=BEST if best else colours.of(trial.value or 0.0), linewidth=3.2 if best else thin,
            alpha=1.0 if best else opacity, zorder=5 if best else 3 + rank / len(search.trials),
        )  # fmt: skip
    _label_best(axes, search.best, hparams, scales)
    axes.set(xlim=(-0.55, last + 0.5), ylim=(-0.04, 1.04))
    axes.axis("off")
    title(figure, search, "Hyperparameters and metric")
    legend(figure, search, {f"the others, coloured by {shortened(search.metric, 30)}": line_of(
        "", color=colours.map(100), linewidth=1.6)} if len(search.compared) > 1 else {})  # fmt: skip
    return figure


def _through(hparams: list[Hparam], scales: list[Scale], trial: Trial) -> tuple[list[float], list[float]]:
    """A trial's points on the axes of the hyperparameters; none where they are not known."""
    if trial.name not in hparams[0].values:
        return [], []
    points = [scale.position(hparam.values[trial.name]) for hparam, scale in zip(hparams, scales)]
    return [*map(float, range(len(points)))], points


def _draw_axes(axes: Axes, names: list[str], scales: list[Scale], colours: Colours) -> None:
    last = len(scales) - 1
    for index, (name, scale) in enumerate(zip(names, scales)):
        axes.vlines(index, scale.floor, 1, color=AXIS, linewidth=1.0, zorder=1)
        side = 1 if index == last else -1
        for position, label in scale.ticks():
            axes.hlines(position, index, index + 0.02 * side, color=AXIS, linewidth=1.0, zorder=1)
            axes.text(
                index + (0.1 if index == last else -0.035), position, shortened(label, _MOST_LETTERS), va="center",
                ha="left" if index == last else "right", fontsize=8.5, color=INK, zorder=7, bbox=_HALO,
            )  # fmt: skip
        axes.hlines(scale.minor_ticks(), index, index + 0.01 * side, color=AXIS, linewidth=0.7, zorder=1)
        axes.text(index, 1.06, wrapped(name), ha="center", va="bottom", fontsize=9.5, weight="bold", color=INK)
    metric = scales[-1]
    if metric.low < metric.high:
        values = (np.geomspace if colours.log else np.linspace)(metric.low, metric.high, 256)
        gradient = np.array([colours.of(value) for value in values])[:, None, :]
        axes.imshow(gradient, extent=(last + 0.03, last + 0.08, 0, 1), origin="lower", aspect="auto", zorder=1)


def _label_best(axes: Axes, best: Trial, hparams: list[Hparam], scales: list[Scale]) -> None:
    """The best trial's numbers beside its line; its categories, and one of few numbers, can be read from the axes."""
    _, points = _through(hparams, scales, best)
    for index, position in enumerate(points):
        value, scale = hparams[index].values[best.name], scales[index]
        if scale.kind != "category" and is_number(value) and not scale.values:
            goes_up = index + 1 < len(points) and points[index + 1] > position
            axes.text(index + 0.035, position + (-0.03 if goes_up else 0.03), number(value), va="center", ha="left",
                      fontsize=8.5, color=BEST, weight="bold", zorder=8, bbox=_HALO)  # fmt: skip


def wrapped(name: str) -> str:
    """A name in at most two lines, broken where it has a joint."""
    if len(name) <= _MOST_LETTERS:
        return name
    joints = [match.end() for match in re.finditer(r"[/._ -]", name) if match.end() <= _MOST_LETTERS]
    at = joints[-1] if joints else _MOST_LETTERS
    return f"{name[:at]}\n{shortened(name[at:], _MOST_LETTERS)}"
