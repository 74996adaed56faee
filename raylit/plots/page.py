"""One page with all pictures of a search and its trials in a table: no script, no other file. Floor 2."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from raylit.plots.scale import number, text_of
from raylit.plots.trials import Search, Trial

_CAPTIONS = {
    "parallel": "A line for each trial through its hyperparameters to the metric. Rest the pointer on one to read it.",
    "metric_by_hparam": "The last value of the metric against each hyperparameter.",
    "learning_curves": "The metric while the trials were trained. A curve ends where its trial was stopped or failed.",
}
_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
  margin: 2rem auto; max-width: 1400px; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; }
figure { margin: 2rem 0; overflow-x: auto; } figcaption { color: #555; }
svg g:has(> title):hover > path { stroke-width: 4px !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .25rem .8rem .25rem 0; text-align: left;
  border-bottom: 1px solid #e5e5e5; vertical-align: top; } td.number, th.number { text-align: right; }
td { overflow-wrap: anywhere; max-width: 28em; } tr.best td { font-weight: bold; color: #b34e00; }
tr.failed td { color: #6b6b6b; } summary { cursor: pointer; font-weight: bold; margin: 1rem 0; }
"""


def page(search: Search, pictures: Mapping[str, str]) -> str:
    """The whole page. ``pictures``: SVG elements by name."""
    best, count = search.best, len(search.trials)
    shown = "".join(
        f"<figure>{picture}<figcaption>{_CAPTIONS[name]}</figcaption></figure>\n" for name, picture in pictures.items()
    )
    values = "".join(f"<tr><th>{_safe(key)}</th><td>{_safe(text_of(value))}</td></tr>"
                     for key, value in best.config.items())  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(search.metric)}: {count} trial{"s" * (count != 1)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{count} trial{"s" * (count != 1)}, compared by {_safe(search.goal)}</h1>
<p>{_safe(_counted(search))}</p>
<h2>Best trial: {_safe(best.name)}, {_safe(search.metric)} {number(best.value)}</h2>
<table>{values}</table>
{shown}<details{" open" if count <= 30 else ""}>
<summary>All trials, the best first</summary>
<div class="scroll">{_table(search)}</div>
</details>
</body>
</html>
"""


def _counted(search: Search) -> str:
    counts = {
        "trained to the end": sum(trial.status == "done" for trial in search.compared),
        "stopped early": sum(trial.status == "stopped" for trial in search.compared),
        "without a finite last value": len(search.without_value),
        "failed": len(search.failed),
    }
    return ", ".join(f"{count} {said}" for said, count in counts.items() if count) + "."


def _table(search: Search) -> str:
    metric = _safe(search.metric)
    head = "".join(f"<th>{_safe(key)}</th>" for key in search.keys)
    head = f'<tr><th>trial</th><th>status</th>{head}<th class="number">epochs</th><th class="number">{metric}</th></tr>'
    ordered = [*reversed(search.compared), *search.without_value, *search.failed]
    return f"<table><thead>{head}</thead><tbody>{''.join(_row(search, trial) for trial in ordered)}</tbody></table>"


def _row(search: Search, trial: Trial) -> str:
    values = "".join(f"<td>{_safe(text_of(trial.config[key])) if key in trial.config else ''}</td>"
                     for key in search.keys)  # fmt: skip
    kind = "best" if trial is search.best else trial.status
    more = trial.reason or ("no finite last value" if trial.value is None else "")
    status = f"{trial.status}: {more}" if more else trial.status
    value = "" if trial.value is None or math.isnan(trial.value) else number(trial.value)
    epochs = "" if trial.epochs is None else trial.epochs
    return (f'<tr class="{kind}"><td>{_safe(trial.name)}</td><td>{_safe(status)}</td>{values}'
            f'<td class="number">{epochs}</td><td class="number">{value}</td></tr>\n')  # fmt: skip


def _safe(text: str) -> str:
    return html.escape(text)
