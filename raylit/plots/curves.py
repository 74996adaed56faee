"""Learning curves: the metric over training, a line for each trial. Floor 2, driver."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raylit.plots.figure import (
    BEST,
    GREY,
    Colours,
    legend,
    line_of,
    metric_is_log,
    new_figure,
    plain_numbers,
    title,
    weight,
)
from raylit.plots.scale import shortened
from raylit.plots.trials import Search

_PLACES = {"epoch": "epochs", "step": "steps of the optimizer", "report": "reports"}


def draw_curves(search: Search) -> Figure:
    """Every line is a trial, its gid the trial's name. A ring at its end: stopped there; a cross: it failed."""
    figure = new_figure(9.0, 5.2)
    axes = figure.subplots()
    colours = Colours(search)
    thin, opacity = weight(len(search.trials))
    for trial in [*search.failed, *search.without_value]:
        look = line_of("failed" if trial.status == "failed" else "no value")
        axes.plot(
            [x for x, _ in trial.curve], [y for _, y in trial.curve], gid=trial.name, color=GREY, zorder=2,
            linestyle=look.get_linestyle(), linewidth=max(thin, 1.0), marker="x", markersize=5, markevery=[-1],
        )  # fmt: skip
    for rank, trial in enumerate(search.compared):
        best = trial is search.best
        stopped = trial.status == "stopped"
        axes.plot(
            [x for x, _ in trial.curve], [y for _, y in trial.curve], gid=trial.name, solid_joinstyle="round",
            color=BEST if best else colours.of(trial.value or 0.0), alpha=1.0 if best else opacity,
            linewidth=3.2 if best else thin, zorder=5 if best else 3 + rank / len(search.trials),
            marker="o" if stopped or len(trial.curve) == 1 else "", markevery=[-1], markersize=7 if best else 4,
            markerfacecolor="white" if stopped else None,
        )  # fmt: skip
    reached = [y for trial in search.trials for _, y in trial.curve]
    log = metric_is_log(reached or [1.0], search.mode)
    if log:
        axes.set_yscale("log")
    plain_numbers(axes.yaxis, log)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set(xlabel=_PLACES[search.place], ylabel=shortened(search.metric, 40))
    title(figure, search, "Learning curves")
    if len(search.compared) > 1:
        bar = figure.colorbar(colours.mappable(), ax=axes, pad=0.01, aspect=32, fraction=0.05, extend=colours.extend)
        bar.set_label(f"last {shortened(search.metric, 40)}")
        bar.outline.set_visible(False)
        plain_numbers(bar.ax.yaxis, colours.log)
    entries = {}
    stopped_count = sum(trial.status == "stopped" for trial in search.compared)
    if stopped_count:
        entries[f"stopped early ({stopped_count})"] = line_of("", color=colours.map(100), marker="o", markersize=4,
                                                              markerfacecolor="white")  # fmt: skip
    legend(figure, search, entries)
    return figure
