"""``Tuner``: a search over a Module's hyperparameters with Ray Tune. Floor 6, driver; imports Ray in functions only."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from raylit.config.fit import as_fast_dev_run
from raylit.config.trainer import TrainerConfig
from raylit.driver import cluster, pool
from raylit.driver.faults import for_caller
from raylit.driver.folder import default_storage, new_name
from raylit.errors import ConfigError, ResourceError, nearest
from raylit.module import Module
from raylit.search.space import check_names, fit_config, split
from raylit.search.table import Goal, summary
from raylit.search.trial import TrialRun, TrialSpec
from raylit.seed import get_random_state, set_random_state
from raylit.trainer import RunInterrupted
from raylit.wire import Job

if TYPE_CHECKING:
    from ray import tune

    from raylit.trainer import Trainer

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's own logger writes TensorBoard files; ours below the rest
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Tuner:
    """A search over hyperparameters: ``Tuner(LitModel, param_space={...}, trainer=Trainer(...)).fit()``.

    Args:
        module_class: the Module's class. Each trial builds one with its own values and trains it as ``trainer.fit``
            would.
        param_space: what to search over, in Ray Tune's terms (``tune.loguniform``, ``tune.choice``,
            ``tune.grid_search``, plain values). Keys are arguments of the Module's ``__init__``, with ``"data."``
            before them of the DataModule's, with ``"trainer."`` of the Trainer.
        trainer: how a trial trains, and on how many workers (0 and 1: in Tune's own process).
        tune_config: Ray's ``tune.TuneConfig``: metric, mode, number of samples, scheduler, search algorithm.
        run_config: Ray's ``tune.RunConfig``: name, storage, when trials stop, failures, which checkpoints stay.
        datamodule: a DataModule, or its class where the space has ``"data."`` keys.
        dry_run: train the first configuration on one batch before the search begins, to find what is wrong with it.

    Raises ConfigError for a key that nothing takes, an argument that nothing gives, a metric without a mode, an empty
    space, and what no trial can have.
    """

    def __init__(
        self, module_class: type[Module], *, param_space: Mapping[str, Any], trainer: Trainer,
        tune_config: tune.TuneConfig | None = None, run_config: tune.RunConfig | None = None, datamodule: Any = None,
        dry_run: bool = True,
    ) -> None:  # fmt: skip
        if not (isinstance(module_class, type) and issubclass(module_class, Module)):
            raise ConfigError(f"Tuner takes a Module class, which each trial builds anew; got {module_class!r}")
        self._module_class, self._space, self._datamodule = module_class, dict(param_space), datamodule
        self._config: TrainerConfig = trainer._config
        self._tune_config, self._run_config, self._dry_run = tune_config, run_config, dry_run
        self._restored: Any = None
        failed: ConfigError | None = None
        try:
            self._check()
        except ConfigError as error:
            failed = error
        if failed is not None:
            raise failed.with_traceback(None)  # the caller's line and the message say it all

    # -- checks --------------------------------------------------------------------------------------------------
    def _check(self) -> None:
        given = self._tune_config
        if not self._space and getattr(given, "search_alg", None) is None:
            raise ConfigError(
                "param_space is empty: name at least one hyperparameter, such as {'lr': tune.loguniform(1e-4, 1e-1)}"
            )
        check_names(self._space, self._module_class, self._datamodule)
        placement = self._config.placement
        if placement.elastic:
            raise ConfigError(f"Trainer(num_workers={placement.num_workers}): a trial has one number of workers")
        metric, mode = getattr(given, "metric", None), getattr(given, "mode", None)
        if metric is not None and mode is None:
            raise ConfigError(f"TuneConfig(metric={metric!r}) needs mode='min' or mode='max'")
        if mode is not None and metric is None:
            raise ConfigError(f"TuneConfig(mode={mode!r}) needs metric=, the name of what trials are compared by")
        for name in ("trial_dirname_creator", "trial_name_creator"):
            if getattr(given, name, None) is not None:
                raise ConfigError(f"TuneConfig({name}=...): trials and their folders are called by their ids")
        for key, values in self._finite(split(self._space).trainer).items():
            for value in values:
                fit_config(self._config, {key: value})

    def _finite(self, space: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The values of each key that are known before anything is drawn."""
        found = {}
        for key, value in space.items():
            if isinstance(value, Mapping) and set(value) == {"grid_search"}:
                found[key] = list(value["grid_search"])
            elif hasattr(value, "categories"):
                found[key] = list(value.categories)
            elif not hasattr(value, "sample"):
                found[key] = [value]
        return found

    @property
    def _goal(self) -> Goal:
        given = self._tune_config
        scheduler = getattr(given, "scheduler", None)
        metric = getattr(given, "metric", None) or getattr(scheduler, "metric", None)
        return Goal(metric, getattr(given, "mode", None) or getattr(scheduler, "mode", None) or "min")

    # -- running -------------------------------------------------------------------------------------------------
    def fit(self) -> tune.ResultGrid:
        """Run the search; Ray's ``ResultGrid``. A trial that raises is a row of it, and the others go on.

        Raises what the first configuration raises in the dry run, ResourceError where no trial could ever run.
        """
        failed: Exception
        try:
            return self._fit()
        except Exception as error:
            failed = for_caller(error)
        raise failed

    def _fit(self) -> tune.ResultGrid:
        spec = self._spec()
        if self._dry_run and self._space and self._restored is None:
            self._try_first(spec)
        import cloudpickle
        from ray import tune

        from raylit.search.display import SearchDisplay, as_callback
        from raylit.search.trainable import trainable

        placement = self._config.placement
        if self._config.fit.enable_progress_bar:
            over = ", ".join(self._space) or "what the search algorithm draws"
            print(f"searching over {over}: Ray starts", flush=True)
        cluster.connect(placement.runtime_env)
        pool.release()  # workers that an evaluation left hold resources that trials need
        spec.use_gpu = self._with_gpu()
        spec.bundle = cluster.per_worker(placement.resources_per_worker, bool(spec.use_gpu))
        self._check_fits(spec)
        run_config, storage = self._merged_run()
        place = Job("fit", b"", sys_path=tuple(filter(None, sys.path)), working_dir=os.getcwd(), argv=tuple(sys.argv))
        payload = cloudpickle.dumps(spec)
        trial = trainable(spec.bundle, spec.workers, payload=payload, place=place, storage=storage)
        given = self._tune_config or tune.TuneConfig()
        named = {"trial_dirname_creator": _id_of, "trial_name_creator": _id_of}
        tune_config = dataclasses.replace(given, reuse_actors=True, **named)
        shown = self._config.fit.enable_progress_bar
        display = SearchDisplay(self._goal, self._total(given), self._shown(), shown)
        run_config.callbacks = [*(run_config.callbacks or []), as_callback(display)]
        with cluster.quiet_settings(_ENVIRONMENT, "ray.tune", logging.CRITICAL), display:
            if self._restored is not None:
                tuner = tune.Tuner.restore(**self._restored, trainable=trial, param_space=self._space)
            else:
                tuner = tune.Tuner(trial, param_space=self._space, tune_config=tune_config, run_config=run_config)
            results = tuner.fit()
        rows = list(display.rows.values())
        if any(row.status == "running" for row in rows):  # Tune has heard Ctrl-C, kept the search's state, and returned
            ended = sum(row.status in ("done", "stopped", "failed") for row in rows)
            print(f"interrupted after {ended} trials; raylit.Tuner.restore({results.experiment_path!r}, ...) goes on",
                  file=sys.stderr)  # fmt: skip
            raise RunInterrupted(130)
        if self._config.fit.enable_progress_bar:
            name = self._module_class.__name__
            print(summary(rows, self._goal, name, results.experiment_path))
        return results

    def _spec(self) -> TrialSpec:
        fit, placement = self._config.fit, self._config.placement
        seed = torch.initial_seed() if fit.seed is None else fit.seed
        return TrialSpec(
            self._module_class, TrainerConfig(fit), self._datamodule, get_random_state(), seed % 2**32,
            workers=max(1, placement.worker_range[0]),
        )  # fmt: skip

    def _try_first(self, spec: TrialSpec) -> None:
        """Train one batch of the first configuration here, and see whether the metric comes of it."""
        config = first_of(self._space)
        parts = split(config)
        fit = as_fast_dev_run(dataclasses.replace(fit_config(self._config, parts.trainer), fast_dev_run=1))
        tried = dataclasses.replace(
            spec, config=TrainerConfig(dataclasses.replace(fit, logger=False)), workers=1, use_gpu="auto",
            datamodule=copy.deepcopy(self._datamodule),
        )  # fmt: skip
        before = get_random_state()
        trial = TrialRun(tried, {key: value for key, value in config.items() if not key.startswith("trainer.")})
        try:
            report = trial.next()
            while not report.done:
                report = trial.next()
        finally:
            trial.stop()
            set_random_state(before)
        metric = self._goal.metric
        told = {**report.metrics, "epoch": 0, "step": 0, "training_iteration": 0, "time_total_s": 0}
        if metric is not None and metric not in told:
            raise ConfigError(
                f"TuneConfig(metric={metric!r}): no metric of this name is logged.{nearest(metric, report.metrics)} "
                f"Logged are: {', '.join(sorted(report.metrics)) or 'none'}. (Found by training the first "
                "configuration on one batch, which Tuner(dry_run=False) leaves out.)"
            )

    def _with_gpu(self) -> bool:
        placement = self._config.placement
        if placement.use_gpu == "auto":
            return cluster.available().get("GPU", 0.0) >= max(1, placement.worker_range[0])
        return bool(placement.use_gpu)

    def _check_fits(self, spec: TrialSpec) -> None:
        """ResourceError, with the arithmetic, where not even one trial has room."""
        try:
            cluster.check_fits(spec.workers, spec.bundle, use_gpu=False)
        except ResourceError as error:
            raise ResourceError(f"no trial of this search could ever run: {error}") from None

    def _merged_run(self) -> tuple[Any, str]:
        """Ray's RunConfig, a copy, with raylit's defaults where nothing was given; and the search's folder."""
        from ray import tune
        from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

        placement, goal = self._config.placement, self._goal
        run = copy.copy(self._run_config) if self._run_config is not None else tune.RunConfig()
        blank = tune.RunConfig()
        if self._run_config is None or run.name is None:
            run.name = placement.name or new_name(f"{self._module_class.__name__}-search")
        if run.storage_path in (None, blank.storage_path):
            run.storage_path = placement.storage_path or default_storage()
        if "://" not in str(run.storage_path):
            run.storage_path = os.path.abspath(os.path.expanduser(str(run.storage_path)))
        if run.checkpoint_config in (None, blank.checkpoint_config):
            score = {"checkpoint_score_attribute": goal.metric, "checkpoint_score_order": goal.mode}
            score = score if goal.metric is not None else {}
            # The newest one, and the best; where trials clone one another also those that a clone may be reading.
            clones = isinstance(getattr(self._tune_config, "scheduler", None), tune.schedulers.PopulationBasedTraining)
            run.checkpoint_config = tune.CheckpointConfig(
                checkpoint_frequency=1, checkpoint_at_end=True, num_to_keep=4 if clones else 1, **score
            )  # fmt: skip
        run.verbose = 0
        run.callbacks = [*(run.callbacks or []), CSVLoggerCallback(), JsonLoggerCallback()]
        return run, f"{str(run.storage_path).rstrip('/')}/{run.name}"

    def _total(self, given: Any) -> int | None:
        if given.num_samples == -1:
            return None
        total = int(given.num_samples)
        for values in _grids(self._space):
            total *= len(values)
        return total

    def _shown(self) -> tuple[str, ...]:
        scheduler = getattr(self._tune_config, "scheduler", None)
        return tuple(name for name in (getattr(scheduler, "metric", None),) if name)

    # -- going on ------------------------------------------------------------------------------------------------
    @classmethod
    def restore(
        cls, path: str, module_class: type[Module], *, param_space: Mapping[str, Any], trainer: Trainer,
        tune_config: tune.TuneConfig | None = None, datamodule: Any = None, resume_errored: bool = True,
        restart_errored: bool = False,
    ) -> Tuner:  # fmt: skip
        """Take up a search whose driver, or whose cluster, was lost; ``fit()`` then goes on with it.

        ``path``: the search's folder (``results.experiment_path``). Finished trials are not run again, unfinished ones
        go on from their newest checkpoint, failed ones too unless ``resume_errored`` is False. The other arguments are
        those of the search; what ``tune_config`` said Ray has kept, here it tells what to show.
        """
        tuner = cls(module_class, param_space=param_space, trainer=trainer, tune_config=tune_config,
                    datamodule=datamodule, dry_run=False)  # fmt: skip
        tuner._restored = {
            "path": path, "resume_unfinished": True, "resume_errored": resume_errored and not restart_errored,
            "restart_errored": restart_errored,
        }  # fmt: skip
        return tuner


def _id_of(trial: Any) -> str:
    return str(trial.trial_id)


def first_of(space: Mapping[str, Any]) -> dict[str, Any]:
    """One configuration of a space: drawn, of a grid the first."""
    from ray.tune.search.variant_generator import generate_variants

    for _, config in generate_variants(copy.deepcopy(dict(space))):
        return dict(config)
    return dict(space)


def _grids(space: Any) -> Iterator[list[Any]]:
    if isinstance(space, Mapping):
        if set(space) == {"grid_search"}:
            yield list(space["grid_search"])
            return
        for value in space.values():
            yield from _grids(value)
