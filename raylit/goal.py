"""What a search compares trials by, as its folder keeps it, and which numbers of a report are no metrics. Floor 0.

Ray keeps a search's metric where only a restored search finds it. The pictures and ``Tuner.restore`` read this file.
"""

from __future__ import annotations

import json

GOAL_FILE = "search.json"  # in the search's folder
# What a report has beside metrics: a trial's place in training, and what Tune fills in.
BESIDE_METRICS = frozenset("""
    epoch step done finished training_iteration time_this_iter_s time_total_s time_since_restore timestamp pid
    iterations_since_restore timesteps_total timesteps_since_restore timesteps_this_iter episodes_total
    episodes_this_iter warmup_time should_checkpoint
""".split())  # fmt: skip


def goal_to_json(metric: str | None, mode: str) -> bytes:
    """The file's content. ``metric`` None: nothing is compared."""
    return json.dumps({"metric": metric, "mode": mode}).encode()


def goal_from_json(content: bytes | None) -> tuple[str, str] | None:
    """Metric and mode; None where the file is not there, says none, or is not ours."""
    try:
        told = json.loads(content or b"{}")
    except ValueError:
        return None
    metric, mode = (told.get("metric"), told.get("mode")) if isinstance(told, dict) else (None, None)
    return (metric, mode) if isinstance(metric, str) and mode in ("min", "max") else None
