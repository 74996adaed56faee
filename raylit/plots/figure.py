"""What all pictures share: style, colours, the legend, and their bytes. Imports matplotlib. Floor 2, driver.

Figures are made without pyplot, so that whoever has figures open there keeps them as they are.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from raylit.plots.scale import is_log, number, shortened
from raylit.plots.trials import Search

BEST = "#d55e00"  # vermilion: far from every colour of the map, also for who sees few colours
GREY = "#8c8c8c"  # what cannot be compared
INK = "#222222"
AXIS = "#9a9a9a"
POINT = "#31688e"  # of the same family as the lines
BEST_POINT: dict[str, Any] = {"marker": "*", "markersize": 15, "color": BEST, "markeredgecolor": "white",
                              "markeredgewidth": 0.8, "linestyle": "none"}  # fmt: skip
LOST_POINT: dict[str, Any] = {"marker": "x", "markersize": 5, "color": GREY, "linestyle": "none"}
_DPI = 150

_STYLE = {
    "font.family": ["DejaVu Sans"], "font.size": 9.0, "text.color": INK, "text.parse_math": False,
    "axes.edgecolor": AXIS, "axes.labelcolor": INK, "axes.titlesize": 11.0, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#ececec",
    "axes.axisbelow": True, "axes.formatter.useoffset": False, "axes.unicode_minus": False,
    "xtick.color": AXIS, "ytick.color": AXIS, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 9.0, "figure.facecolor": "white", "savefig.facecolor": "white",
    # Text stays text: it can be searched for, and a browser has the letters that DejaVu Sans lacks.
    "svg.fonttype": "none", "svg.hashsalt": "raylit",
}  # fmt: skip


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """The same look whatever a person has set for matplotlib; their settings come back."""
    with matplotlib.style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Glyph .* missing from", UserWarning)  # a box is drawn in its place
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that finds room for its texts itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class Colours:
    """From a metric's value to a colour: dark is good. Yellow, which is nothing on white, is left out.

    Values far worse than most share the last colour, so that they do not take the differences from the others.
    """

    def __init__(self, search: Search) -> None:
        values = [trial.value for trial in search.compared if trial.value is not None]
        dark_first = matplotlib.colormaps["viridis"](range(0, 200))
        self.map: Colormap = ListedColormap(dark_first if search.mode == "min" else dark_first[::-1])
        self.log = metric_is_log(values, search.mode)
        low, high = _without_the_worst(values, search.mode, self.log)
        self.extend = "max" if high < max(values) else "min" if low > min(values) else "neither"
        self.norm: Normalize = (LogNorm if self.log else Normalize)(low, high)

    def of(self, value: float) -> tuple[float, float, float, float]:
        """The colour of a value, red to alpha from 0 to 1."""
        red, green, blue, alpha = self.map(float(self.norm(value)))
        return red, green, blue, alpha

    def mappable(self) -> ScalarMappable:
        """What a colour bar is made from."""
        return ScalarMappable(self.norm, self.map)


def _without_the_worst(values: Sequence[float], mode: str, log: bool) -> tuple[float, float]:
    """Lowest and highest; on the bad side only as far as Tukey's fence: 1.5 distances of the quartiles."""
    measured = np.log10(values) if log else np.array(values)
    first, third = np.quantile(measured, [0.25, 0.75])
    fence = third + 1.5 * (third - first) if mode == "min" else first - 1.5 * (third - first)
    inside = measured[measured <= fence] if mode == "min" else measured[measured >= fence]
    ends = [float(inside.min()), float(inside.max())]
    low, high = (10.0 ** ends[0], 10.0 ** ends[1]) if log else ends
    return (max(low, min(values)), high) if mode == "min" else (low, min(high, max(values)))


def metric_is_log(values: Sequence[float], mode: str) -> bool:
    """A loss that spans two orders of magnitude. Not what grows: its good end would be pressed together."""
    return mode == "min" and is_log(values)


def plain_numbers(axis: Axis, log: bool) -> None:
    """Numbers at an axis of a metric as they are written everywhere else."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    if log:
        axis.set_minor_formatter(NullFormatter())


def weight(count: int) -> tuple[float, float]:
    """Width and opacity of one trial's line among so many."""
    return (1.6, 0.9) if count <= 30 else (1.1, 0.75) if count <= 80 else (0.8, 0.6)


def line_of(status: str, **more: Any) -> Line2D:
    """An entry of a legend: a trial's line by its status, or what ``more`` says."""
    looks: dict[str, dict[str, Any]] = {
        "best": {"color": BEST, "linewidth": 3.2},
        "failed": {"color": GREY, "linewidth": 1.2, "linestyle": (0, (4, 2.5))},
        "no value": {"color": GREY, "linewidth": 1.2, "linestyle": (0, (1, 1.6))},
    }
    return Line2D([], [], **{**looks.get(status, {}), **more})


def title(figure: Figure, search: Search, text: str) -> None:
    """The picture's title, at the left, with as much of the metric's name as there is room for."""
    count = len(search.trials)
    said = f"{text}, {count} trial{'s' * (count != 1)}: "
    better = f" ({'lower' if search.mode == 'min' else 'higher'} is better)"
    room = int(figure.get_figwidth() * 11.5) - len(said) - len(better)
    figure.suptitle(f"{said}{shortened(search.metric, max(room, 8))}{better}", x=0.01, ha="left", fontsize=11)


def legend(figure: Figure, search: Search, entries: Mapping[str, Line2D], *, points: bool = False) -> None:
    """Below the picture: the best trial, then ``entries``, then what cannot be compared. ``points``: not lines."""
    best = f"best: {number(search.best.value)} (trial {shortened(search.best.name, 24)})"
    shown = {best: Line2D([], [], **BEST_POINT) if points else line_of("best"), **entries}
    lost = Line2D([], [], **LOST_POINT)
    if points and (search.failed or search.without_value):
        shown[f"failed, or no last value ({len(search.failed) + len(search.without_value)})"] = lost
    elif not points:
        if search.failed:
            shown[f"failed ({len(search.failed)})"] = line_of("failed")
        if search.without_value:
            shown[f"no last value ({len(search.without_value)})"] = line_of("no value")
    inches = [0.7 + 0.066 * len(label) for label in shown]  # measured
    room = figure.get_figwidth() - 0.3
    columns = len(shown) if sum(inches) <= room else max(1, int(room / max(inches)))
    figure.legend(list(shown.values()), list(shown), loc="outside lower left", ncols=columns, handlelength=2.4)


# -- bytes --------------------------------------------------------------------------------------------------------
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def svg(figure: Figure, name: str, trials: Mapping[str, str]) -> str:
    """The figure as an element for a page. ``trials``: a line on each, shown where the pointer rests on it.

    ``name`` goes before every id in it, so that a page can hold several.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for trial, said in trials.items():
        begin = f'<g id="{html.escape(trial)}">'
        text = text.replace(begin, f"{begin}<title>{html.escape(said)}</title>")
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    size = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
    pixels = float(size[1]) * 4 / 3 if size else 800.0
    wide = f"max-width: {pixels:.0f}px; min-width: {pixels * 0.7:.0f}px"  # a very wide one is scrolled, not shrunk away
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', rf'\1 style="width: 100%; {wide}"', text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
