"""``search``: from the results of a hyperparameter search to files. Floor 2, driver; the call loads matplotlib."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raylit.errors import ConfigError, missing
from raylit.plots.page import page
from raylit.plots.trials import read_search


def search(
    results: Iterable[Any], path: str | os.PathLike[str] | None = None, metric: str | None = None,
    mode: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Draw a search: ``parallel.png``, ``metric_by_hparam.png``, ``learning_curves.png``, and ``search.html`` with all.

    Args:
        results: what ``Tuner.fit`` returned (Ray's ``ResultGrid``).
        path: a folder of this machine, made where it is missing; files of these names in it are replaced. Default:
            ``plots`` in the search's folder where that is on this machine, else ``search-plots`` in the current folder.
        metric: what trials are compared by, at its last reported value. Default: the search's own, as its folder keeps
            it; of a search that is not raylit's the one ``val_...`` metric that all trials have, or ``loss``.
        mode: ``"min"`` or ``"max"``. Default: the search's own, or by the metric's name, where that tells.

    Returns the names of the files with their paths.

    Raises MissingDependencyError without matplotlib; ConfigError where no trial can be compared (none there,
    all failed, no number of the metric), for a metric that nothing has reported, and where metric or mode must be told.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib", "plots", "plots.search")
    told = read_search(results, metric, mode)
    folder = _folder(path, getattr(results, "experiment_path", None))
    from raylit.plots.by_hparam import draw_by_hparam
    from raylit.plots.curves import draw_curves
    from raylit.plots.figure import house_style, png, svg
    from raylit.plots.parallel import draw_parallel

    written, pictures = {}, {}
    with house_style():
        drawers = {"parallel": draw_parallel, "metric_by_hparam": draw_by_hparam, "learning_curves": draw_curves}
        for name, draw in drawers.items():
            figure = draw(told)
            file = folder / f"{name}.png"
            file.write_bytes(png(figure))
            written[file.name] = str(file)
            pictures[name] = svg(figure, name, {trial.name: trial.described(told.metric) for trial in told.trials})
    file = folder / "search.html"
    file.write_text(page(told, pictures), encoding="utf-8")
    written[file.name] = str(file)
    return written


def _folder(path: str | os.PathLike[str] | None, experiment_path: Any) -> Path:
    """The folder for the files, made."""
    if path is None:
        # Of a bucket Ray tells a path without a scheme, "bucket/name": it is local only if it is there.
        local = isinstance(experiment_path, str) and os.path.isabs(experiment_path) and os.path.isdir(experiment_path)
        folder = Path(experiment_path) / "plots" if local else Path("search-plots")
    elif not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ConfigError(
            f"plots.search(path={path!r}): pictures are written to a folder of this machine; give its path"
        )
    else:
        folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"plots.search(path={str(folder)!r}): this is a file; give the folder for the pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
