"""What is in each picture: the trials' lines and points, the best one, the axes and the legend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raylit.plots.by_hparam import draw_by_hparam, spread
from raylit.plots.curves import draw_curves
from raylit.plots.figure import BEST, GREY, Colours, house_style
from raylit.plots.parallel import draw_parallel, wrapped
from raylit.plots.scale import scale_of
from raylit.plots.trials import Search, read_search
from tests.unit.plots.fakes import FakeResult, realistic, result


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with house_style():
        yield


@pytest.fixture(scope="module")
def search() -> Search:
    return read_search(realistic())


def lines(figure: Figure, axes: int = 0) -> dict[str, Line2D]:
    return {str(line.get_gid()): line for line in figure.axes[axes].lines}


def colour(line: Line2D) -> str:
    return to_hex(line.get_color())


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def drawn_texts(figure: Figure) -> list[Any]:
    """Every text that is seen: matplotlib also has labels for ticks beyond an axis's end."""
    found = [*figure.legends[0].get_texts(), *figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    for axis in [axis for axes in figure.axes if axes.axison for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        seen = [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high]  # fmt: skip
        found += [*seen, axis.label]
    return [text for text in found if text.get_text() and text.get_visible()]


def assert_readable(figure: Figure) -> None:
    """Once it is laid out, every text lies within the figure, and none on another one."""
    figure.draw_without_rendering()
    renderer, width, height = figure.canvas.get_renderer(), *figure.bbox.size  # type: ignore[attr-defined]
    boxes = [(text, text.get_window_extent(renderer)) for text in drawn_texts(figure)]
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text
    level = [(text, box) for text, box in boxes if text.get_rotation() in (0, 90)]  # of others the box is too large
    for (one, here), (other, there) in itertools.combinations(level, 2):
        apart = here.x1 <= there.x0 + 1 or there.x1 <= here.x0 + 1 or here.y1 <= there.y0 + 2 or there.y1 <= here.y0 + 2
        assert apart, (one, other)


# -- parallel coordinates ------------------------------------------------------------------------------------------
def test_parallel_has_a_line_for_each_trial_through_all_axes(search: Search) -> None:
    figure = draw_parallel(search)
    drawn = lines(figure)
    assert list(drawn) and set(drawn) == {trial.name for trial in search.trials}
    for trial in search.compared:
        xs, ys = drawn[trial.name].get_data()
        assert list(xs) == [0, 1, 2, 3, 4] and all(-1e-9 <= y <= 1 + 1e-9 for y in ys)
    assert drawn[search.best.name].get_ydata()[-1] == 0.0
    worst = search.compared[0]
    assert drawn[worst.name].get_ydata()[-1] == pytest.approx(1.0)
    assert "20 trials: val_loss (lower is better)" in figure.get_suptitle()
    assert_readable(figure)


def test_parallel_draws_the_best_thick_and_on_top(search: Search) -> None:
    drawn = lines(draw_parallel(search))
    best = drawn.pop(search.best.name)
    assert colour(best) == BEST
    assert best.get_linewidth() > 1.5 * max(line.get_linewidth() for line in drawn.values())
    assert best.get_zorder() > max(line.get_zorder() for line in drawn.values())
    zorders = [drawn[trial.name].get_zorder() for trial in search.compared[:-1]]
    assert zorders == sorted(zorders), "the better, the further up"


def test_parallel_ends_failed_trials_before_the_metric(search: Search) -> None:
    figure = draw_parallel(search)
    drawn = lines(figure)
    for trial in search.failed:
        line = drawn[trial.name]
        assert list(line.get_xdata()) == [0, 1, 2, 3] and colour(line) == GREY and line.is_dashed()
    assert colour(drawn[search.without_value[0].name]) == GREY
    assert legend(figure) == [f"best: {search.best.value:.4g} (trial {search.best.name})",
                              "the others, coloured by val_loss", "failed (2)", "no last value (1)"]  # fmt: skip


def test_parallel_writes_names_ticks_and_the_best_trials_numbers(search: Search) -> None:
    written = texts(draw_parallel(search))
    assert {"lr", "model/hidden", "model/dropout", "optimizer", "val_loss"} <= set(written)
    assert {"0.0001", "0.001", "0.01", "0.1"} <= set(written), "decades of lr"
    assert {"adam", "adamw", "sgd", "32", "64", "128", "256", "512"} <= set(written)
    assert f"{search.best.config['lr']:.4g}" in written


def test_wrapped() -> None:
    assert wrapped("optimizer") == "optimizer"
    assert wrapped("model/encoder/dropout_rate") == "model/encoder/\ndropout_rate"
    assert [len(part) for part in wrapped("x" * 60).split("\n")] == [17, 17]


# -- metric by hyperparameter --------------------------------------------------------------------------------------
def test_by_hparam_has_a_picture_for_each_that_differs(search: Search) -> None:
    figure = draw_by_hparam(search)
    assert [axes.get_xlabel() for axes in figure.axes] == list(search.keys)
    assert [axes.get_ylabel() for axes in figure.axes] == ["val_loss", "", "val_loss", ""]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes in figure.axes:
        values = [value for line in axes.lines for value in line.get_ydata() if "lost" not in str(line.get_gid())]
        assert sorted(values) == sorted(trial.value or 0 for trial in search.compared)
        low, high = axes.get_ylim()
        assert all(low < value < high for value in values)
    assert_readable(figure)


def test_by_hparam_shows_the_best_the_stopped_and_those_without_a_value(search: Search) -> None:
    drawn = lines(draw_by_hparam(search))
    best = drawn["lr:best"]
    assert colour(best) == BEST and best.get_marker() == "*" and list(best.get_ydata()) == [search.best.value]
    statuses = [trial.status for trial in search.compared[:-1]]
    for status, face in (("done", drawn["lr:done"].get_color()), ("stopped", "white")):
        assert len(drawn[f"lr:{status}"].get_xdata()) == statuses.count(status) > 0
        assert drawn[f"lr:{status}"].get_markerfacecolor() == face
    assert len(drawn["lr:lost"].get_xdata()) == 3 and drawn["lr:lost"].get_marker() == "x"


def test_by_hparam_has_logarithmic_and_named_places(search: Search) -> None:
    figure = draw_by_hparam(search)
    labels = [[text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes]
    assert labels[0] == ["0.0001", "0.001", "0.01", "0.1"] and labels[3] == ["adam", "adamw", "sgd"]
    decades = figure.axes[0].get_xticks()
    steps = [after - before for before, after in itertools.pairwise(decades)]
    assert max(steps) - min(steps) < 1e-9
    assert len(figure.axes[0].get_xticks(minor=True)) > 20


def test_points_of_a_category_stand_side_by_side() -> None:
    values = ["a"] * 10 + ["b"] * 5
    places = spread(scale_of(values), values)
    assert len(set(places)) == 15
    assert all(abs(place) <= 0.25 for place in places[:10]) and all(abs(place - 1) <= 0.25 for place in places[10:])
    assert spread(scale_of([None, 1.0, 2.0]), [None, 1.0, 2.0])[0] == 0.0


# -- learning curves -----------------------------------------------------------------------------------------------
def test_curves_end_where_their_trials_were_stopped(search: Search) -> None:
    figure = draw_curves(search)
    drawn = lines(figure)
    assert set(drawn) == {trial.name for trial in search.trials}
    for trial in search.trials:
        assert list(drawn[trial.name].get_xdata()) == [x for x, _ in trial.curve]
    stopped = [trial for trial in search.compared if trial.status == "stopped"]
    assert all(drawn[trial.name].get_marker() == "o" for trial in stopped)
    assert all(drawn[trial.name].get_xdata()[-1] == trial.epochs for trial in stopped)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs", "val_loss")
    assert axes.get_xlim()[1] >= 20 and axes.get_yscale() == "linear"
    assert f"stopped early ({len(stopped)})" in legend(figure)
    assert_readable(figure)


def test_curves_highlight_the_best(search: Search) -> None:
    drawn = lines(draw_curves(search))
    best = drawn.pop(search.best.name)
    assert colour(best) == BEST and best.get_linewidth() > 3
    assert best.get_zorder() > max(line.get_zorder() for line in drawn.values())
    assert all(colour(drawn[trial.name]) == GREY and drawn[trial.name].is_dashed() for trial in search.failed)


def test_curves_over_orders_of_magnitude() -> None:
    figure = draw_curves(read_search([result("a", {"lr": 1}, [500.0, 0.3]), result("b", {"lr": 2}, [900.0, 0.5])]))
    assert figure.axes[0].get_yscale() == "log"
    high = [result("a", {"lr": 1}, [0.001, 0.9], "val_acc"), result("b", {"lr": 2}, [0.001, 0.8], "val_acc")]
    assert draw_curves(read_search(high)).axes[0].get_yscale() == "linear"


# -- colours -------------------------------------------------------------------------------------------------------
def luminance(rgba: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_better_the_darker_and_nothing_is_lost_on_white(mode: str) -> None:
    search = read_search([result(str(i), {"lr": i}, [i / 10]) for i in range(1, 11)], mode=mode)
    colours = Colours(search)
    shades = [luminance(colours.of(trial.value or 0.0)) for trial in search.compared]
    assert shades == sorted(shades, reverse=True)
    assert 1.05 / (shades[0] + 0.05) > 1.8, "contrast with white"


def test_one_diverged_trial_does_not_take_the_colours_from_the_others() -> None:
    values = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 9.0]
    colours = Colours(read_search([result(str(i), {"lr": i}, [value]) for i, value in enumerate(values)]))
    assert (colours.norm.vmin, colours.norm.vmax, colours.extend) == (0.2, 0.45, "max")
    assert colours.of(9.0) == colours.of(0.45) != colours.of(0.4)


# -- all kinds of searches -----------------------------------------------------------------------------------------
LONG = "a_very_long_name_of_a_backbone.that_was_pretrained_on_everything"
SEARCHES: dict[str, list[FakeResult]] = {
    "one trial": [result("a", {"lr": 0.1, "opt": "sgd"}, [1.0, 0.5])],
    "one epoch": [result("a", {"lr": 0.1}, [1.0]), result("b", {"lr": 0.2}, [0.9])],
    "one hyperparameter": [result(str(i), {"lr": 10.0**-i}, [1.0 / (i + 1)]) for i in range(5)],
    "powers of two": [result(str(i), {"hidden": 16 * 2 ** (i % 6), "steps": 1000 * 2 ** (i % 5)}, [1.0 + i])
                      for i in range(24)],
    "none": [result(str(i), {}, [1.0, 0.5 + i]) for i in range(4)],
    "unknown": [result(str(i), None, [1.0, 0.5 + i]) for i in range(4)],
    "equal values": [result(str(i), {"lr": i}, [0.5]) for i in range(4)],
    "nothing differs": [result(str(i), {"lr": 0.1, "opt": "sgd"}, [1.0 / (i + 1)]) for i in range(3)],
    "all kinds of values": [
        result(str(i), {"layers": layers, "on": on, "decay": decay, "name": name, "cost$": f"${i}$", **extra},
               [1.0, 0.5 + i / 10], finished=i % 2 == 0)
        for i, (layers, on, decay, name, extra) in enumerate([
            ((64, 64), True, None, LONG, {}), ([64], False, 1e-4, LONG + "2", {"warmup": 3}),
            (None, True, 1e-2, "x", {}), ((64, 64), None, 0.3, "余弦", {"warmup": 9}),
        ])
    ],
    "many": list(realistic(200, seed=4)),
    "twelve hyperparameters": [result(str(i), {f"part{k // 3}/key_{k}": (i * k) % 7 for k in range(12)}, [i + 1.0])
                               for i in range(10)],
    "one has no configuration": [result("a", {"lr": 1.0}, [1.0]), result("b", {"lr": 2.0}, [2.0]),
                                 result("c", None, [0.5])],
    "long metric": [result(str(i), {"lr": i}, [i + 1.0], "val_loss_of_the_second_task_on_the_held_out_split_of_the_set")
                    for i in range(3)],
    "far apart and negative": [result(str(i), {"lr": i}, [-(10.0**i)]) for i in range(4)],
    "infinite": [result("a", {"lr": 1.0}, [1.0, math.inf]), result("b", {"lr": 2.0}, [math.inf, 1.0])],
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("draw", [draw_parallel, draw_by_hparam, draw_curves])
def test_every_search_can_be_drawn(name: str, draw: Any) -> None:
    search = read_search(SEARCHES[name])
    figure = draw(search)
    assert_readable(figure)
    if draw is not draw_by_hparam:
        assert len(figure.axes[0].lines) == len(search.trials)
