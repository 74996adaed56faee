"""One trial on one process: a fit that stops at each report and waits to be told to go on. Floor 6; no Ray here.

The engine runs in a thread, and hands over at its safe points: after a validation within an epoch, after an epoch, and
at the end. While it waits its state can be taken, so that a checkpoint belongs to the very numbers that were reported.
"""

from __future__ import annotations

import copy
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylit.assemble import RunSpec, run
from raylit.checkpoint import FILE_NAME, read, write
from raylit.checkpoint.ranks import file_name, read_ranks
from raylit.config.trainer import TrainerConfig
from raylit.driver.runs import joined_callbacks
from raylit.module import Module
from raylit.ports import RunSnapshot, RunStopped
from raylit.search.space import built_datamodule, built_module, fit_config, split
from raylit.seed import get_random_state, set_random_state
from raylit.stage import SafePoint, Stage
from raylit.view import RunState, WorkerTrainer
from raylit.wire import World
from raylit.worker.storage import files_of, local_folder


@dataclass
class TrialSpec:
    """What all trials of a search have in common, as it travels to them by cloudpickle."""

    module_class: type[Module]
    config: TrainerConfig
    datamodule: Any = None  # an object, or its class
    random_state: dict[str, Any] | None = None  # of the searching process: a trial begins as a fit there would
    order_seed: int = 0
    use_gpu: bool | str = "auto"
    workers: int = 1
    bundle: dict[str, float] = field(default_factory=dict)  # resources of one worker
    filesystem: Any = None  # pyarrow's, where trials' folders are paths on it
    metric: str | None = None  # what the search compares by


@dataclass(frozen=True)
class Report:
    """What a trial tells at one point: numbers by name, all measured on the weights as they are."""

    metrics: dict[str, float]
    epoch: int  # epochs finished
    step: int
    done: bool = False  # the fit is over, all of its hooks have run; its end's checkpoint can still be taken


@dataclass
class Saved:
    """A checkpoint that a trial goes on from, read already."""

    common: dict[str, Any]
    own: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str) -> Saved:
        """Read a checkpoint's folder."""
        common = read(folder)
        return cls(common, read_ranks(folder, common))


class TrialRun:
    """A trial of one worker. ``next`` until ``done``; ``save`` in between; ``stop`` at any time.

    Args:
        spec: what all trials share.
        config: this trial's configuration, as the search made it.
        world: this worker's place in the trial.
        folder: where the trial's files go, a path or URI; None: nowhere.
        saved: what it goes on from, with ``config``'s hyperparameters in place of the saved ones.
    """

    def __init__(self, spec: TrialSpec, config: Mapping[str, Any], world: World | None = None,
                 folder: str | None = None, saved: Saved | None = None) -> None:  # fmt: skip
        self._spec, self._config, self._world = spec, dict(config), world or World()
        self._folder, self._saved = folder, saved
        self._events: queue.Queue[Report | BaseException] = queue.Queue()
        self._go: queue.Queue[bool] = queue.Queue()  # True: go on; False: stop
        self._thread: threading.Thread | None = None
        self._take: Callable[[], RunSnapshot] | None = None
        self._step = 0  # at the last report
        self._end: Report | None = None

    def next(self) -> Report:
        """Go on to the next report. Raises what the Module raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raylit-trial", daemon=True)
            self._thread.start()
        else:
            self._go.put(True)
        event = self._events.get()
        if isinstance(event, BaseException) or event.done:
            self._thread.join()
        if isinstance(event, BaseException):
            raise event
        self._step = event.step
        return event

    def save(self, folder: str) -> None:
        """Write the state at the last report, or the one that it goes on from where there was none yet."""
        if self._take is not None:
            snapshot = self._take()
            # The step tells files of one checkpoint from those of another: see trainable.py.
            common, own = snapshot.common, {**snapshot.own, "step": self._step}
        elif self._saved is not None:
            common, own = self._saved.common, self._saved.own.get(self._world.global_rank, {})
        else:
            return  # nothing was trained: there is nothing to lose
        if self._world.global_rank == 0:
            write(common, folder, FILE_NAME)
        if own:
            write(own, folder, file_name(self._world.global_rank))

    def stop(self) -> None:
        """End the fit where it waits, and wait for its end: loggers are closed and ``teardown`` has run then."""
        if self._thread is not None and self._thread.is_alive():
            self._go.put(False)
            self._thread.join()
            if not self._events.empty():  # the search has this trial's numbers, and nobody waits for more
                error = self._events.get()
                warnings.warn(f"a trial that was stopped raised at its end: {error!r}", stacklevel=2)
        self._thread = self._take = None

    # -- in the thread -------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._fit()
        except RunStopped:
            return
        except BaseException as error:
            self._events.put(error)
        else:
            assert self._end is not None  # the engine has come by the end's safe point
            self._events.put(self._end)

    def _fit(self) -> None:
        spec, parts = self._spec, split(self._config)
        if spec.random_state is not None:
            set_random_state(spec.random_state)  # what __init__ draws is drawn as in the searching process
        view = WorkerTrainer(RunState())
        module = built_module(spec.module_class, parts.module)
        given = copy.deepcopy(spec.config.fit.callbacks)  # a process has several trials, one after the other
        config = TrainerConfig(fit_config(spec.config, parts.trainer))
        loggers = _loggers(config, self._folder, spec.metric)
        run_spec = RunSpec(
            Stage.FIT, config, module,
            datamodule=built_datamodule(copy.deepcopy(spec.datamodule), parts.data),
            callbacks=joined_callbacks(given, module), loggers=loggers,
            order_seed=spec.order_seed, checkpointer=_Hands(self, view),
            checkpoint=None if self._saved is None else self._saved.common,
            own_states={} if self._saved is None else self._saved.own,
            rebased=self._saved is not None,
            random_state=get_random_state(),  # rank 0 goes on with it, the others with streams of their own
        )  # fmt: skip
        begun = files_of(loggers) if self._world.global_rank == 0 else []
        with local_folder(self._folder, spec.filesystem, begun) as run_spec.run_folder:
            run(run_spec, self._world, view, None, spec.use_gpu)

    def hand_over(self, report: Report, take: Callable[[], RunSnapshot]) -> None:
        """Give a report to who waits in ``next``; return when it is to go on."""
        self._take = take
        self._events.put(report)
        if not self._go.get():
            raise RunStopped
        self._take = None

    def end_with(self, report: Report, take: Callable[[], RunSnapshot]) -> None:
        """Give the last report once the fit has come to its end, with ``teardown`` and ``on_fit_end``."""
        snapshot = take()
        self._end, self._take = report, lambda: snapshot


class _Hands:
    """Implements ``ports.Checkpointer`` for a trial: whoever asks for reports keeps the checkpoints."""

    def __init__(self, trial: TrialRun, view: WorkerTrainer) -> None:
        self._trial, self._state = trial, view._state
        self._told: tuple[int, int] | None = None  # (epochs, steps) of the last report

    def safe_point(self, point: SafePoint, take: Callable[[], RunSnapshot]) -> bool:
        state = self._state
        if point is SafePoint.VALIDATION:
            # At the epoch's end the epoch's own numbers come in a moment, on the same weights.
            if state.batch_idx + 1 == state.num_training_batches:
                return True
        elif point is SafePoint.EPOCH:
            if self._is_the_last():
                return True
        elif point is not SafePoint.END:
            return True
        done = point is SafePoint.END
        self._told = (state.epoch, state.global_step)
        measured = {name: float(value) for name, value in state.callback_metrics.items()}
        report = Report(measured, state.epoch, state.global_step, done)
        (self._trial.end_with if done else self._trial.hand_over)(report, take)
        return True

    def _is_the_last(self) -> bool:
        state, fit = self._state, self._state.settings
        over = state.max_epochs != -1 and state.epoch >= state.max_epochs
        over = over or (state.max_steps != -1 and state.global_step >= state.max_steps)
        may = state.epoch >= (fit.min_epochs or 0) and state.global_step >= (fit.min_steps or 0)
        return over or (state.stop_requested and may)


def _loggers(config: TrainerConfig, folder: str | None, metric: str | None) -> list[Any]:
    """A trial's own loggers: copies of those that were given; the default where its files have a place."""
    from raylit.loggers import DummyLogger, TensorBoardLogger, make_loggers

    loggers = make_loggers(config.fit.logger)
    if loggers and folder is None:
        return [DummyLogger()]
    copies = copy.deepcopy(loggers)
    for each in copies:
        if isinstance(each, TensorBoardLogger) and each.default_hp_metric is True and metric is not None:
            each.default_hp_metric = metric
    return copies
