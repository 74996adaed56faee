"""Put a run together from its description, run it, and pack what it leaves. Floor 4.

The only file that picks concrete parts. ``worker_main`` is its end on a Ray worker; the local path calls ``run`` in the
caller's own process, on the caller's own objects.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.callback import Callback
from raylit.callbacks.configuring import configured
from raylit.checkpoint import load_weights
from raylit.checkpoint.ranks import for_rank
from raylit.config.amounts import check_precision
from raylit.config.fit import FitConfig
from raylit.config.trainer import TrainerConfig
from raylit.data.batch import batch_size_of, split_time, to_device
from raylit.data.rng import FOR_SHARE, mix_seed, seed_process
from raylit.datamodule import DataModule
from raylit.engine.handle import ModuleHandle
from raylit.engine.notices import WorkersChange
from raylit.engine.parts import Parts, Saved
from raylit.engine.resume import epochs_done
from raylit.engine.stages import StageResult, run_stage
from raylit.errors import ConfigError
from raylit.hooks import HookTable, adapt, overridden
from raylit.hooks.spec import MODULE_HOOKS
from raylit.hparams import logged_hyperparameters, warn_of_lost
from raylit.metrics.history import History
from raylit.metrics.store import MetricStore
from raylit.module import Module
from raylit.plain import plain_entries
from raylit.ports import Checkpointer, Notices, Precision, RunSnapshot, Strategy
from raylit.precision import make_precision
from raylit.profilers import make_profiler
from raylit.seed import seed_everything, set_random_state
from raylit.stage import Stage
from raylit.strategies import DDP, DDP2, DataParallel, SingleDevice
from raylit.strategies.collective import LocalCollective
from raylit.view import RunState, TrainerView, WorkerTrainer
from raylit.wire import RESIZED, ClusterCpus, Job, World
from raylit.worker.going_on import load_newest, stores_of
from raylit.worker.keeper import CheckpointKeeper
from raylit.worker.loaders import Loaders
from raylit.worker.output import RunOutput
from raylit.worker.profiled import ProfiledRun
from raylit.worker.ray_data import WorkersSharing, validates_within
from raylit.worker.save import save_checkpoint
from raylit.worker.storage import files_of, local_folder

if TYPE_CHECKING:
    from raylit.worker.channel import WorkerChannel

Send = Callable[[dict[str, Any]], None]


@dataclass
class RunSpec:
    """One call of an entry point, as it travels to the workers by cloudpickle."""

    stage: Stage
    config: TrainerConfig
    module: Module
    datamodule: DataModule | None = None
    loaders: dict[str, Any] = field(default_factory=dict)  # what was passed: "train", "validate", "test", "predict"
    callbacks: list[Callback] = field(default_factory=list)
    loggers: list[Any] = field(default_factory=list)
    run_folder: str | None = None  # path or URI; None: nothing is kept. run() gets a path of its own machine
    run_filesystem: Any = None  # pyarrow's, where the run folder is a path on it
    random_state: dict[str, Any] | None = None  # of the caller's process
    order_seed: int = 0  # of the epochs' orders
    epoch: int = 0  # where a fit begins; where the fit before an evaluation ended
    global_step: int = 0
    checkpoint: dict[str, Any] | None = None  # a loaded checkpoint to go on from
    own_states: dict[int, dict[str, Any]] = field(default_factory=dict)  # its ranks' own parts
    checkpointer: Checkpointer | None = None  # asked at every safe point of a fit; None: the keeper, where it keeps
    storage: str | None = None  # the run folder as it was given, path or URI: checkpoints are written there at once
    notices: Notices | None = None  # of nodes that will be taken away; asked in a fit that keeps checkpoints
    began_at_s: float | None = None  # on the driver's clock: when training began, in the first attempt
    used_s: float = 0.0  # since training began, in earlier attempts of this run
    rebased: bool = False  # goes on with this Module's hyperparameters for optimizers, not the checkpoint's
    looks_back: bool = False  # goes on from the newest state in the run folder, where there is one
    cpus: ClusterCpus | None = None  # for the tasks of ray.data beside the workers; set on the worker


@dataclass
class RunOutcome:
    """What a run leaves on rank 0, in its own process."""

    state: RunState
    result: StageResult
    module: Module
    callbacks: list[Callback]
    checkpoint: RunSnapshot | None = None
    newest: str | None = None  # the newest checkpoint in the run folder, by its name


def pick_device(world: World, use_gpu: bool | str) -> torch.device:
    """The device of this worker. Ray shows each worker only its own GPUs."""
    wanted = torch.cuda.is_available() if use_gpu == "auto" else bool(use_gpu)
    if not wanted:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("use_gpu=True, but this process sees no CUDA device; use_gpu=False trains on the CPU")
    if "ray.train" in sys.modules and world.storage_path is not None:
        import ray.train.torch

        device: torch.device = ray.train.torch.get_device()
        return device
    return torch.device("cuda", torch.cuda.current_device())


def run(spec: RunSpec, world: World, view: TrainerView, send: Send | None, use_gpu: bool | str) -> RunOutcome:
    """Run one stage in this process as the given place in the world, with ``view`` as everyone's ``trainer``."""
    settings = configured(spec.config.fit, spec.callbacks)
    fit, placement = settings.fit, spec.config.placement
    resized = spec.stage is Stage.FIT and placement.elastic
    if resized and placement.elastic_batch == "keep":
        check_can_keep_batch(spec.module, fit)
        world = replace(world, shares=placement.worker_range[1])
    device = pick_device(world, use_gpu)
    check_precision(fit.precision, use_gpu=device.type == "cuda")
    _randomness(spec, world)
    state = view._state
    _fill(state, spec, world, device)
    state.settings = fit
    strategy = pick_strategy(fit.strategy, world, device, fit.sync_batchnorm)
    state.strategy_name = strategy.name
    precision = make_precision(fit.precision, device.type)
    notes: list[str] = []
    if spec.stage is Stage.FIT and spec.looks_back and spec.storage is not None:
        stores = stores_of(spec.callbacks, spec.storage, spec.run_filesystem)
        newest = load_newest(stores, spec.storage, strategy.collective, notes.append)
        if newest is not None:
            spec.checkpoint, spec.own_states = newest
    order_seed = spec.order_seed
    if spec.checkpoint is not None and spec.stage is Stage.FIT:
        # The samples' order is the saved run's, whatever this script has drawn from its generators.
        order_seed = int((spec.checkpoint.get("raylit") or {}).get("order_seed", order_seed))
    if fit.automatic_optimization is not None:
        spec.module.automatic_optimization = fit.automatic_optimization
    if fit.prepare_data_per_node is not None:
        for owner in (spec.module, spec.datamodule):
            if owner is not None:
                owner.prepare_data_per_node = fit.prepare_data_per_node
    profiler = make_profiler(fit.profiler)
    watchers: list[Callback] = [] if profiler is None else [ProfiledRun(profiler)]
    hooks = HookTable(spec.module, Module, watchers + spec.callbacks, Callback, view)
    history = History() if spec.stage is Stage.FIT else None
    for logger in spec.loggers:
        logger.attach(state.log_dir, world.global_rank)
    output = RunOutput(
        state, send=send, loggers=spec.loggers, history=history,
        show_progress=fit.enable_progress_bar, bar_every=settings.bar_every,
        bar_items=partial(settings.bar_items, view, spec.module) if settings.bar_items is not None
        else spec.module.get_progress_bar_dict,
    )  # fmt: skip
    if history is not None:
        state.history = history
    sharing = WorkersSharing(strategy.collective)
    parts = Parts(
        state=state, trainer=view, module=spec.module, datamodule=spec.datamodule, settings=fit,
        strategy=strategy, precision=precision, hooks=hooks, output=output,
        metrics=MetricStore(strategy.collective, device, batch_size_of, spec.module.named_modules),
        loaders=Loaders(spec.loaders, spec.module, spec.datamodule, world, order_seed,
                        fit.use_distributed_sampler, bool(fit.overfit_batches),
                        sharing, spec.cpus, validates_within(fit), resized),
        transfer=bind_transfer(spec.module, spec.datamodule, device, precision),
        move=to_device, split_time=split_time, order_seed=order_seed,
        reseed=None if world.shares is None else partial(seed_share, order_seed, device),
    )  # fmt: skip
    parts.on_save = checkpoint_hook(parts, "on_save_checkpoint")
    keeper = None
    if spec.stage is Stage.FIT and fit.enable_checkpointing and spec.storage is not None:
        keeper = CheckpointKeeper(parts, spec.storage, spec.run_filesystem)
    parts.checkpointer = spec.checkpointer or keeper
    parts.notices = spec.notices
    parts.rebased, parts.used_s = spec.rebased, spec.used_s
    parts.keeps_last = spec.stage is Stage.FIT and fit.enable_checkpointing and keeper is None
    for note in notes:
        output.note(note)
    state.save = lambda path, weights_only: save_checkpoint(parts, path, weights_only)
    if spec.checkpoint is not None:
        _go_on(parts, spec)
    if fit.enable_model_summary and world.global_rank == 0 and spec.stage is Stage.FIT and send is not None:
        from raylit.summary import summarize

        send({"kind": "summary", "text": summarize(spec.module, settings.summary_depth)})
    log_hyperparams(spec, state)
    with torch_settings(fit.deterministic, fit.benchmark):
        try:
            if keeper is not None:
                keeper.start()
            result = run_stage(parts, spec.stage)
        finally:
            if keeper is not None:
                keeper.close()
            state.save = None
            output.finalize(state.status.value)
            sharing.close()
            strategy.teardown()
    return RunOutcome(state, result, spec.module, spec.callbacks, result.last, keeper.newest if keeper else None)


def _go_on(parts: Parts, spec: RunSpec) -> None:
    """Let the run go on from its checkpoint: a fit with everything, another stage with the weights."""
    loaded, state, world = spec.checkpoint, parts.state, parts.state.world
    assert loaded is not None

    def load() -> None:
        checkpoint_hook(parts, "on_load_checkpoint")(loaded)
        load_weights(loaded, spec.module)

    parts.load = load
    if spec.stage is not Stage.FIT:
        return
    state.epoch, state.global_step = epochs_done(loaded), int(loaded["global_step"])
    extra = loaded.get("raylit") or {}
    ranks = int(extra.get("world_size", world.world_size))
    elastic = spec.config.placement.elastic
    shares = int(extra.get("shares", ranks))
    own = for_rank(spec.own_states, world.global_rank, ranks, world.world_size, shares=shares, loaders=elastic)
    parts.saved = Saved(loaded, own, ranks == world.world_size)
    if ranks != world.world_size and not elastic:
        parts.output.note(
            f"the checkpoint is of {ranks} worker{'s' * (ranks != 1)}, and this run has {world.world_size}: the order "
            "of samples and the metrics of a half-done epoch go on, random numbers begin anew"
        )


def seed_share(seed: int, device: torch.device, epoch: int, step: int, share: int) -> None:
    """Seed this process for one share of a step's data: what is drawn for it is the same on whichever worker."""
    mixed = mix_seed(seed, epoch, FOR_SHARE, step, share)
    seed_process(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def check_can_keep_batch(module: Module, fit: FitConfig) -> None:
    """Refuse what an elastic run cannot do while it keeps a step's samples together over fewer workers."""
    automatic = module.automatic_optimization if fit.automatic_optimization is None else fit.automatic_optimization
    in_pieces = fit.truncated_bptt_steps or module.truncated_bptt_steps
    problem = (
        "manual optimisation: training_step steps itself, after each worker's batch" if not automatic
        else "truncated BPTT: each piece of a batch is a step" if in_pieces
        else "sync_batchnorm=True: statistics are of the batches of the workers that are there" if fit.sync_batchnorm
        else ""
    )  # fmt: skip
    if problem:
        raise ConfigError(
            "an elastic run keeps the samples of an optimizer step together by gradient accumulation, and that cannot "
            f"be with {problem}. Give one number of workers, or elastic_batch='scale', which lets a step have as many "
            "samples as there are workers for"
        )


def _fill(state: RunState, spec: RunSpec, world: World, device: torch.device) -> None:
    fit = spec.config.fit
    state.world, state.device, state.module, state.datamodule = world, device, spec.module, spec.datamodule
    state.callbacks, state.loggers = spec.callbacks, spec.loggers
    state.precision, state.log_dir = fit.precision, spec.run_folder
    state.max_epochs = -1 if fit.epoch_limit is None else fit.epoch_limit
    state.max_steps = -1 if fit.step_limit is None else fit.step_limit
    state.epoch, state.global_step, state.batch_idx = spec.epoch, spec.global_step, -1
    state.schedulers_on_hold = state.validates = False
    # Another run's numbers are not this one's.
    state.callback_metrics, state.logged_metrics, state.progress_bar_metrics, state.measured = {}, {}, {}, {}


def checkpoint_hook(parts: Parts, name: str) -> Callable[[dict[str, Any]], None]:
    """``on_save_checkpoint`` or ``on_load_checkpoint`` of callbacks, Module and DataModule as one call."""
    shared, module, datamodule = parts.hooks.event(name), parts.module, parts.datamodule

    def call(checkpoint: dict[str, Any]) -> None:
        # Loading is within the stage, saving after it; ``trainer`` works in every hook.
        within = "_run" in module.__dict__
        if not within:
            module.__dict__["_run"] = ModuleHandle(parts)
        try:
            if shared is not None:
                shared(checkpoint)
            if datamodule is not None:
                datamodule.trainer = parts.trainer
                getattr(datamodule, name)(checkpoint)
        finally:
            if not within:
                module.__dict__.pop("_run", None)
                if datamodule is not None:
                    datamodule.__dict__.pop("trainer", None)

    return call


def check_strategy(asked: Any) -> None:
    """Raise ConfigError for a strategy that this release does not have."""
    if isinstance(asked, str) and asked not in _STRATEGIES:
        accepted = ", ".join(map(repr, _STRATEGIES))
        raise ConfigError(f"strategy={asked!r} is not there yet; accepted: {accepted}, or a raylit.strategies object")
    if not isinstance(asked, (str, DDP, DataParallel)):
        raise ConfigError(
            "strategy must be a name, or a raylit.strategies.DDP, DataParallel or DDP2; "
            f"got {'the class ' * isinstance(asked, type)}{getattr(asked, '__name__', type(asked).__name__)}"
        )


_STRATEGIES: dict[str, Callable[[], DDP | DataParallel]] = {
    "auto": DDP, "ddp": DDP, "dp": DataParallel, "ddp2": DDP2,
}  # fmt: skip


def strategy_name(asked: Any, world_size: int) -> str:
    """What a run over so many workers runs with: ``"single"``, ``"ddp"``, ``"dp"`` or ``"ddp2"``."""
    name = asked if isinstance(asked, str) else asked.name
    return name if name in ("dp", "ddp2") else "ddp" if world_size > 1 else "single"


def pick_strategy(asked: Any, world: World, device: torch.device, sync_batchnorm: bool) -> Strategy:
    """The strategy's object for this worker."""
    check_strategy(asked)
    chosen = _STRATEGIES[asked]() if isinstance(asked, str) else asked
    if world.world_size == 1:
        collective = LocalCollective(device)
        if isinstance(chosen, DataParallel):
            return chosen.attach(worker_devices(world, device), collective)
        if isinstance(chosen, DDP2):
            return chosen.alone(worker_devices(world, device), collective)
        return SingleDevice(device, collective)
    if isinstance(chosen, DataParallel):
        raise ConfigError(f"strategy='dp' runs in one worker, and there are {world.world_size}: use 'ddp2'")
    chosen.sync_batchnorm = sync_batchnorm
    return chosen.attach_devices(worker_devices(world, device)) if isinstance(chosen, DDP2) else chosen.attach(device)


def worker_devices(world: World, device: torch.device) -> list[torch.device]:
    """All devices of this worker, that of the Module first."""
    if device.type != "cuda":
        return [device]
    if "ray.train" in sys.modules and world.storage_path is not None:
        import ray.train.torch

        # A worker may see the GPUs of others on its node; these are its own.
        return list(ray.train.torch.get_devices())
    every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device, *(each for each in every if each != device)]


def _randomness(spec: RunSpec, world: World) -> None:
    """Seed this process. One worker draws what the caller's own process would have drawn; the others differ from it."""
    seed = spec.config.fit.seed
    if seed is not None:
        seed_everything((seed + world.global_rank) % 2**32)
    elif spec.random_state is not None:
        if world.global_rank == 0:
            set_random_state(spec.random_state)
        else:
            # A stream of its own, drawn from the caller's state: reproducible when the caller seeded.
            python = random.Random()
            python.setstate(spec.random_state["python"])
            seed_everything((spec.order_seed + python.getrandbits(31) + world.global_rank) % 2**32)


def bind_transfer(
    module: Module, datamodule: DataModule | None, device: torch.device, precision: Precision
) -> Callable[[Any, int], Any] | None:
    """Return how a batch gets to the device, or None where nothing is to be done (CPU, no override, 32 bit).

    An override of the DataModule's goes before the Module's.
    """
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners: list[tuple[Any, type]] = [(module, Module)]
    if datamodule is not None:
        owners.append((datamodule, DataModule))
    bound = {
        name: adapt(MODULE_HOOKS[name], getattr(owner, name), type(owner).__name__)
        for owner, base in owners
        for name in names
        if overridden(owner, name, base)
    }
    converts = type(precision).convert_batch is not type(make_precision("32-true", device.type)).convert_batch
    if not bound and device.type == "cpu" and not converts:
        return None
    before, move, after = (bound.get(name) for name in names)

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        batch = to_device(batch, device) if move is None else move(batch, device, dataloader_idx)
        if converts:
            batch = precision.convert_batch(batch)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer


class torch_settings:
    """Deterministic algorithms and cudnn's benchmark as the Trainer says, for the length of a run."""

    def __init__(self, deterministic: bool | str, benchmark: bool | None) -> None:
        self._deterministic, self._benchmark = deterministic, benchmark

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        )
        if self._deterministic:
            torch.use_deterministic_algorithms(True, warn_only=self._deterministic == "warn")
        if self._benchmark is not None:
            torch.backends.cudnn.benchmark = self._benchmark

    def __exit__(self, *exc_info: object) -> None:
        enabled, warn_only, benchmark = self._before
        if self._deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def log_hyperparams(spec: RunSpec, state: RunState) -> None:
    """Write the saved hyperparameters to the run folder and to the loggers, on rank 0 of a fit."""
    if spec.stage is not Stage.FIT or state.world.global_rank != 0:
        return
    owners = [owner for owner in (spec.datamodule, spec.module) if owner is not None]
    for owner in owners:
        warn_of_lost(owner, stacklevel=2)  # set since save_hyperparameters, which tells of its own
    params = _joined([owner.hparams for owner in owners])
    if params and state.log_dir is not None:
        from raylit.loggers.hparams import write_yaml

        left_out = write_yaml(os.path.join(state.log_dir, "hparams.yaml"), params)
        told = plain_entries(params)[1]
        only_here = [name for name in left_out if name.split(".")[0] not in told and name not in told]
        if only_here:
            warnings.warn(f"not in hparams.yaml, but in the checkpoints: {', '.join(only_here)}", stacklevel=2)
    logged = _joined([logged_hyperparameters(owner) for owner in owners])
    if logged:
        for logger in spec.loggers:
            logger.log_hyperparams(logged)


def _joined(owned: list[dict[str, Any]]) -> dict[str, Any]:
    """The hyperparameters of DataModule and Module as one; of a name in both, the DataModule's is ``data.name``."""
    *data, module = owned
    return {(f"data.{n}" if n in module else n): value for each in data for n, value in each.items()} | dict(module)


def worker_main(job: Job, world: World, channel: WorkerChannel | None) -> bytes:
    """Run a job on a Ray worker and return what rank 0 has to send home, packed."""
    from raylit.travel import Departure, pack, unpack_spec

    spec, use_gpu = unpack_spec(job.payload, job.refs)
    spec.cpus = job.cpus
    view = WorkerTrainer(RunState())
    # Only rank 0's objects go home, so only they are compared.
    departure = Departure.of(spec) if world.global_rank == 0 else None
    begun = files_of(spec.loggers) if world.global_rank == 0 else []  # two copies would overwrite one another
    if spec.stage is Stage.FIT and world.storage_path is not None:
        from raylit.worker.preemption import notices_of_ray
        from raylit.worker.room import elastic_notices

        size = world.world_size
        spec.notices = notices_of_ray(size) if job.elastic is None else elastic_notices(job.elastic, world)
    with local_folder(spec.run_folder, spec.run_filesystem, begun) as spec.run_folder:
        with watched(view._state, world, spec.config.fit.progress_timeout_s, channel):
            try:
                outcome = run(spec, world, view, channel.send if channel is not None else None, use_gpu)
            except WorkersChange:
                return RESIZED
    if spec.stage is Stage.FIT and spec.storage is not None and world.storage_path is not None:
        from raylit.worker.report import report_newest

        store = stores_of((), spec.storage, spec.run_filesystem)[0]
        report_newest(store, outcome.newest, metrics_as_floats(outcome.state.callback_metrics), world.world_size)
    if departure is None:
        return b""
    return pack(outcome, departure, view)


@contextlib.contextmanager
def watched(
    state: RunState, world: World, timeout_s: float | None, channel: WorkerChannel | None
) -> Iterator[None]:
    """End this worker where it makes no progress; nothing without a time-out, or a driver that could be told."""
    if timeout_s is None or channel is None:
        yield
        return
    from raylit.worker.watch import ProgressWatch

    watch = ProgressWatch(state, world, timeout_s, partial(channel.send, must_arrive=True))
    watch.start()
    try:
        yield
    finally:
        watch.close()


def metrics_as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Read metrics off the device, for results that leave the run."""
    return {name: float(value) for name, value in metrics.items()}
