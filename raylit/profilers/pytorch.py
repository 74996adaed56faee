"""torch's own profiler: operators, kernels and memory, as a table and as a trace file. Worker side."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from raylit.profilers.base import Profiler


class PyTorchProfiler(Profiler):
    """Records the operators and kernels of a few training batches with ``torch.profiler``.

    A trace grows by about a megabyte a batch, so by default one batch is left out, one warms the profiler up and three
    are recorded. ``schedule=None`` records everything; any ``torch.profiler.schedule`` may be given, counted in
    training batches. The trace goes to ``{filename or "profile"}-{stage}-rank{rank}.json`` in ``dirpath`` (the run
    folder by default); open it in chrome://tracing or Perfetto. Other arguments go to ``torch.profiler.profile``.
    Actions measured with ``profile()`` show as ranges of that name.
    """

    _DEFAULT = "default"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        group_by_input_shapes: bool = False,
        schedule: Any = _DEFAULT,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        self._export = export_to_chrome
        self._row_limit = row_limit
        self._sort_by_key = sort_by_key
        self._group_by_input_shapes = group_by_input_shapes
        self._schedule = schedule
        self._options = profiler_kwargs
        self._profile: Any = None
        self._ranges: dict[str, record_function] = {}
        self._table = ""

    def setup(self, stage: str, rank: int = 0, log_dir: str | os.PathLike[str] | None = None) -> None:
        """Begin to record; under a schedule only fit counts batches, so the other stages are recorded whole."""
        super().setup(stage, rank, log_dir)
        self._table = ""
        options = dict(self._options)
        if "activities" not in options:
            options["activities"] = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        if self._group_by_input_shapes:
            options["record_shapes"] = True
        if stage == "fit" and self._schedule is not None:
            default = self._schedule == self._DEFAULT
            options["schedule"] = schedule(wait=1, warmup=1, active=3, repeat=1) if default else self._schedule
        options.setdefault("on_trace_ready", self._keep)
        self._profile = torch.profiler.profile(**options)
        self._profile.start()

    def start(self, action_name: str) -> None:
        """Open a range of this name in the trace."""
        if self._profile is not None:
            if action_name in self._ranges:
                raise ValueError(f"start({action_name!r}): this action has begun and not ended; call stop() first")
            self._ranges[action_name] = record_function(action_name).__enter__()  # type: ignore[no-untyped-call]

    def stop(self, action_name: str) -> None:
        """Close the range."""
        if self._profile is not None:
            opened = self._ranges.pop(action_name, None)
            if opened is None:
                raise ValueError(f"stop({action_name!r}): this action has not begun; call start() first")
            opened.__exit__(None, None, None)

    def step(self) -> None:
        """One training batch is done: the schedule goes on by one."""
        if self._profile is not None:
            self._profile.step()

    def summary(self) -> str:
        """Return torch's table of operators; empty while nothing is recorded."""
        return self._table

    def teardown(self, stage: str) -> None:
        """End the recording and report."""
        recording, self._profile = self._profile, None
        self._ranges.clear()
        if recording is not None:
            recording.stop()
        super().teardown(stage)

    def __getstate__(self) -> dict[str, Any]:
        # A recording cannot travel; the worker begins its own.
        return {**self.__dict__, "_profile": None, "_ranges": {}}

    def _keep(self, recording: Any) -> None:
        """Keep a finished recording as a table and a file; called by torch when the schedule says so, or at the end."""
        key = self._sort_by_key or ("device_time_total" if torch.cuda.is_available() else "cpu_time_total")
        averages = recording.key_averages(group_by_input_shape=self._group_by_input_shapes)
        if not averages:
            return
        self._table = f"Profile of {self.stage}, rank {self.rank}\n" + averages.table(
            sort_by=key, row_limit=self._row_limit
        )
        if self._export:
            recording.export_chrome_trace(self.path(".json"))
