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

from raylit.checkpoint.folder import Folder
from raylit.config.fit import as_fast_dev_run
from raylit.config.trainer import TrainerConfig
from raylit.driver import cluster, pool, waiting
from raylit.driver import folder as folders
from raylit.driver.faults import for_caller
from raylit.errors import ConfigError, ResourceError, RunExistsError, nearest
from raylit.goal import GOAL_FILE, goal_from_json, goal_to_json
from raylit.module import Module
from raylit.search import beginning, state_copy
from raylit.search.settings import goal_of, placed, run_config_of, watched
from raylit.search.space import check_names, fit_config, split
from raylit.search.table import Goal, summary
from raylit.search.trial import TrialRun, TrialSpec
from raylit.seed import get_random_state, set_random_state
from raylit.trainer import RunInterrupted
from raylit.uri import redacted
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
        self._restored: dict[str, Any] | None = None
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
        spec, goal = self._spec(), goal_of(self._tune_config)
        from ray import tune

        placement, callbacks = self._config.placement, self._config.fit.callbacks
        given, goes_on = self._tune_config or tune.TuneConfig(), self._goes_on()
        clones = isinstance(given.scheduler, tune.schedulers.PopulationBasedTraining)
        run_config = run_config_of(self._run_config, placement, callbacks, goal, clones)
        storage, spec.filesystem = self._claimed(run_config, goes_on)
        with folders.kept_if_used(storage):
            if self._dry_run and self._space and goes_on is None:
                self._try_first(spec, goal)
            return self._run(spec, goal, run_config, storage, goes_on)

    def _run(
        self, spec: TrialSpec, goal: Goal, run_config: Any, storage: str, goes_on: dict[str, Any] | None
    ) -> tune.ResultGrid:
        import cloudpickle
        from ray import tune

        from raylit.driver.storage_check import require_shared_folder
        from raylit.search.display import SearchDisplay
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
        if goes_on is None:
            require_shared_folder(storage, spec.filesystem)
        with waiting.room(waiting.Asked(spec.workers, spec.bundle), self._say, placement.start_timeout_s):
            pass  # for one trial; Tune waits without a word
        folder = Folder(storage, spec.filesystem)
        (beginning.keep if goes_on is None else beginning.take_up)(spec, folder)
        goal, copy_of_state = self._kept_goal(goal, folder), state_copy.StateCopy(folder)
        spec.metric = goal.metric
        place = Job("fit", b"", sys_path=tuple(filter(None, sys.path)), working_dir=os.getcwd(), argv=tuple(sys.argv))
        payload = cloudpickle.dumps(spec)
        trial = trainable(spec.bundle, spec.workers, payload=payload, place=place, storage=storage)
        given = self._tune_config or tune.TuneConfig()
        named = {"trial_dirname_creator": _id_of, "trial_name_creator": _id_of}
        tune_config = dataclasses.replace(given, reuse_actors=True, **named)
        shown = self._config.fit.enable_progress_bar
        display = SearchDisplay(goal, self._total(given), watched(given, self._config.fit.callbacks), shown)
        run_config.callbacks = [*(run_config.callbacks or []), display.as_callback(), copy_of_state.as_callback()]
        with cluster.quiet_settings(_ENVIRONMENT, "ray.tune", logging.CRITICAL), display, copy_of_state:
            if goes_on is not None:
                copy_of_state.mend()
                tuner = tune.Tuner.restore(**goes_on, trainable=trial, param_space=self._space)
            else:
                tuner = tune.Tuner(trial, param_space=self._space, tune_config=tune_config, run_config=run_config)
            results = tuner.fit()
        rows = list(display.rows.values())
        if any(row.status == "running" for row in rows):  # Tune has heard Ctrl-C, kept the search's state, and returned
            ended = sum(row.status in ("done", "stopped", "failed") for row in rows)
            print(f"interrupted after {ended} trial{'s' * (ended != 1)}; "
                  f"raylit.Tuner.restore({results.experiment_path!r}, ...) goes on", file=sys.stderr)  # fmt: skip
            raise RunInterrupted(130)
        if self._config.fit.enable_progress_bar:
            name = self._module_class.__name__
            print(summary(rows, goal, name, results.experiment_path))
        return results

    def _spec(self) -> TrialSpec:
        fit, placement = self._config.fit, self._config.placement
        seed = torch.initial_seed() if fit.seed is None else fit.seed
        return TrialSpec(
            self._module_class, TrainerConfig(fit), self._datamodule, get_random_state(), seed % 2**32,
            workers=max(1, placement.worker_range[0]),
        )  # fmt: skip

    def _try_first(self, spec: TrialSpec, goal: Goal) -> None:
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
        metric = goal.metric
        told = {**report.metrics, "epoch": 0, "step": 0, "training_iteration": 0, "time_total_s": 0}
        if metric is not None and metric not in told:
            raise ConfigError(
                f"TuneConfig(metric={metric!r}): no metric of this name is logged.{nearest(metric, report.metrics)} "
                f"Logged are: {', '.join(sorted(report.metrics)) or 'none'}. (Found by training the first "
                "configuration on one batch, which Tuner(dry_run=False) leaves out.)"
            )

    def _say(self, text: str) -> None:
        if self._config.fit.enable_progress_bar:
            print(text, flush=True)

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

    def _goes_on(self) -> dict[str, Any] | None:
        """What Ray's ``Tuner.restore`` is told: ``restore`` was called, or ``resume="auto"`` has found the search."""
        placement = self._config.placement
        if self._restored is not None or placement.resume != "auto":
            return self._restored
        from ray import tune

        place = placed(self._run_config or tune.RunConfig(), placement, self._module_class.__name__)
        folder, filesystem = folders.place_of(place), folders.filesystem_of(place)
        if not folders.exists(place, folder) or not tune.Tuner.can_restore(folder, filesystem):
            return None
        return {"path": folder, "storage_filesystem": filesystem, "resume_unfinished": True, "resume_errored": True}

    def _claimed(self, run_config: Any, goes_on: dict[str, Any] | None) -> tuple[str, Any]:
        """The search's folder, a path or URI, and the filesystem that it is a path on. A new one is claimed."""
        if goes_on is not None:
            return goes_on["path"], goes_on["storage_filesystem"]
        module = self._module_class.__name__
        place = placed(run_config, self._config.placement, module)
        # With resume="auto" a folder that has nothing to go on from is one that was begun, and no more.
        begun = place.resume == "auto" and folders.exists(place, folders.place_of(place))
        try:
            folder = folders.place_of(place) if begun else folders.claim(place, module)
        except RunExistsError:
            raise RunExistsError(
                f"a search, or a run, named {place.name!r} exists in {redacted(str(place.storage_path))}; raylit "
                "overwrites nothing. Choose another name=, or leave it out and each search gets its own; to go on with "
                "it: Trainer(resume='auto'), or raylit.Tuner.restore"
            ) from None
        run_config.storage_path, run_config.name = folders.split(folder)
        run_config.storage_filesystem = folders.filesystem_of(place)
        return folder, run_config.storage_filesystem

    def _kept_goal(self, goal: Goal, folder: Folder) -> Goal:
        """The goal, which the search's folder keeps; what it keeps where ``tune_config`` was not given again."""
        if goal.metric is None:
            kept = goal_from_json(folder.read(GOAL_FILE))
            return Goal(*kept) if kept is not None else goal
        folder.write_small(GOAL_FILE, goal_to_json(goal.metric, goal.mode))
        return goal

    def _total(self, given: Any) -> int | None:
        if given.num_samples == -1:
            return None
        total = int(given.num_samples)
        for values in _grids(self._space):
            total *= len(values)
        return total

    # -- going on ------------------------------------------------------------------------------------------------
    @classmethod
    def restore(
        cls, path: str, module_class: type[Module], *, param_space: Mapping[str, Any], trainer: Trainer,
        tune_config: tune.TuneConfig | None = None, datamodule: Any = None, resume_errored: bool = True,
        restart_errored: bool = False, storage_filesystem: Any = None,
    ) -> Tuner:  # fmt: skip
        """Take up a search whose driver, or whose cluster, was lost; ``fit()`` then goes on with it.

        ``path``: the search's folder (``results.experiment_path``). Finished trials are not run again, unfinished ones
        go on from their newest checkpoint, failed ones too unless ``resume_errored`` is False. The other arguments are
        those of the search, whose ``tune_config`` need not be given again. ``storage_filesystem``: pyarrow's, which
        ``path`` is a path on. Ray keeps a search by pickle: restore none from a folder that others can write to.

        Raises ConfigError where there is no search at ``path``.
        """
        from ray import tune

        path = path if "://" in path or storage_filesystem is not None else os.path.abspath(os.path.expanduser(path))
        if not tune.Tuner.can_restore(path, storage_filesystem):
            raise ConfigError(
                f"Tuner.restore({redacted(path)!r}): there is no search in this folder; give the search folder that "
                "its last line named (results.experiment_path)"
            )
        tuner = cls(module_class, param_space=param_space, trainer=trainer, tune_config=tune_config,
                    datamodule=datamodule, dry_run=False)  # fmt: skip
        tuner._restored = {
            "path": path, "storage_filesystem": storage_filesystem, "resume_unfinished": True,
            "resume_errored": resume_errored and not restart_errored, "restart_errored": restart_errored,
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
