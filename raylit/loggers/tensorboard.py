"""TensorBoard files through tensorboardX. Rank 0 of a run; tensorboardX is imported when the first value is written."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from raylit.errors import missing
from raylit.loggers.base import FolderLogger
from raylit.loggers.hparams import flatten, plain_value

_files = itertools.count()  # of this process; part of the files' names


class TensorBoardLogger(FolderLogger):
    """Writes TensorBoard files to the run folder, or to ``save_dir/name/version/sub_dir`` where ``save_dir`` is given.

    ``experiment`` is a ``tensorboardX.SummaryWriter``. ``log_graph=True`` draws the model's graph, for which the
    package tensorboard is needed too. ``default_hp_metric``: what TensorBoard's table of hyperparameters, empty
    without a metric, has beside them. A metric's name: that metric as it is logged; True: ``hp_metric`` -1, and in a
    trial of a search what the search compares by; False: nothing. Other arguments go to the SummaryWriter.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool | str = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, sub_dir)
        self._log_graph = log_graph
        self.default_hp_metric = default_hp_metric
        self._options = {"flush_secs": 30, **kwargs}
        self._waiting: list[tuple[dict[str, Any], dict[str, float]]] = []  # hyperparameters not written yet

    def open(self) -> Any:
        """Open a new file; each has a name of its own, also where two are opened within one second."""
        from tensorboardX import SummaryWriter

        suffix = f".{os.getpid()}.{next(_files)}" + str(self._options.get("filename_suffix", ""))
        options = {"purge_step": self._purge_step, **self._options, "filename_suffix": suffix}
        writer = SummaryWriter(logdir=self._folder(), **options)
        self._purge_step = None  # a second file of this run must not hide the first
        return writer

    @property
    def experiment(self) -> Any:
        """The ``SummaryWriter`` on rank 0; a NullExperiment elsewhere."""
        if self._experiment is not None and self._experiment.file_writer is None:
            # A person closed it. By itself it would open a file of the same name, and empty the one before.
            self._experiment = None
        writer = super().experiment
        if self._waiting and self.rank == 0:
            waiting, self._waiting = self._waiting, []
            for params, metrics in waiting:
                _write_hparams(writer, params, metrics, self._column())
        return writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write these values as one event, which costs a fifth of five calls of ``add_scalar``."""
        if self.rank != 0 or not metrics:
            return
        writer = self.experiment
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value)) for name, value in self._named(metrics).items()
        ]
        writer.file_writer.add_summary(Summary(value=values), step)

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Keep the hyperparameters for TensorBoard's table, ``metrics`` beside them; written with the first value."""
        if self.rank != 0:
            return
        self.hparams.update(params)
        if metrics is None:
            metrics = {"hp_metric": -1.0} if self.default_hp_metric is True else {}
        self._waiting.append((flatten(params), {name: float(value) for name, value in metrics.items()}))
        if self._experiment is not None:
            _ = self.experiment  # writes what waits

    def _column(self) -> list[str]:
        """The metric that the table shows as it is logged, as it is called in the file."""
        name = self.default_hp_metric
        return [_tag(each) for each in self._named({name: 0.0})] if isinstance(name, str) else []

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Draw the model's graph from one forward pass, where ``log_graph=True`` and there is an example input."""
        if not self._log_graph or self.rank != 0:
            return
        example = input_array if input_array is not None else getattr(model, "example_input_array", None)
        if example is None:
            return
        if importlib.util.find_spec("tensorboard") is None:
            raise missing("tensorboard", "tensorboard", "TensorBoardLogger(log_graph=True)")
        import torch

        with torch.no_grad(), _evaluating(model):
            self.experiment.add_graph(model, example)

    def save(self) -> None:
        """Flush to the disk, and write ``hparams.yaml`` where the logger has a folder of its own."""
        if self.rank != 0:
            return
        if self._waiting or self._experiment is not None:
            self.experiment.flush()
        self._save_hparams()

    def finalize(self, status: str) -> None:
        """Write what waits and close the file."""
        if self.rank != 0:
            return
        self.save()
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _write_hparams(
    writer: Any, params: Mapping[str, Any], metrics: Mapping[str, float], logged: Iterable[str]
) -> None:
    """Write one row of TensorBoard's table. ``add_hparams`` would do so in a folder of its own, a second run there.

    ``logged``: tags whose values come with the run; the table shows the last.
    """
    from tensorboardX.summary import hparams

    shown = {name: _cell(value) for name, value in params.items()}
    for name, value in metrics.items():
        writer.add_scalar(name, value, 0)
    for summary in hparams(shown, {**metrics, **dict.fromkeys(logged, 0.0)}):  # it takes the names alone
        writer.file_writer.add_summary(summary)


def _tag(name: str) -> str:
    """Return the name in TensorBoard's characters, as ``add_scalar`` does it: all else becomes an underscore."""
    return re.sub(r"[^-/\w.]", "_", name).lstrip("/")


def _cell(value: Any) -> Any:
    plain = plain_value(value)
    return plain if plain is None or isinstance(plain, bool | int | float | str) else str(plain)
