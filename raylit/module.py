"""Module: the one class a person writes. Floor 1; the same object runs in process and on every Ray worker.

This page is the reference of its hooks and helpers. It keeps no state of a run but one handle, ``_run``, which the
engine sets while a run goes on; it is never pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.errors import ConfigError, NotAttachedError
from raylit.hparams import HyperparametersMixin

if TYPE_CHECKING:
    from raylit.view import TrainerView


class ModuleRun(Protocol):
    """What the engine does for a Module while a run goes on."""

    trainer: TrainerView
    log: Callable[..., None]

    def manual_backward(self, loss: Tensor, optimizer: Optimizer | None, args: tuple[Any, ...],
                        kwargs: dict[str, Any]) -> None: ...  # fmt: skip
    def manual_step(self, optimizer: Optimizer, force: bool, closure: Callable[[], Any] | None) -> Any: ...
    def managed_optimizers(self) -> list[Optimizer]: ...
    def schedulers(self) -> list[Any]: ...
    def toggle(self, optimizer: Optimizer) -> None: ...
    def untoggle(self, optimizer: Optimizer) -> None: ...
    def clip_gradients(self, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None: ...
    def all_gather(self, data: Any, sync_grads: bool) -> Any: ...
    def print(self, text: str) -> None: ...
    def progress_bar(self) -> dict[str, Any]: ...
    def tbptt_split(self, batch: Any, split_size: int) -> list[Any]: ...
    def transfer(self, batch: Any, device: torch.device) -> Any: ...
    def restore_modes(self) -> None: ...


class gives_way(property):
    """A property until a Module sets an attribute or a layer of this name: in Lightning 2.x the name is free.

    ``self.precision = torchmetrics.Precision(...)`` is what it is about.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        if self._name in module.__dict__:
            return module.__dict__[self._name]
        layers = module.__dict__.get("_modules", {})
        return layers[self._name] if self._name in layers else super().__get__(module, owner)

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[self._name] = value


class Module(HyperparametersMixin, nn.Module):
    """A ``torch.nn.Module`` with hooks. Only ``training_step`` and ``configure_optimizers`` must be there to train."""

    # False: ``training_step`` calls backward and steps itself (manual optimisation).
    automatic_optimization: bool = True
    # Steps of a truncated back-propagation through time; 0: off.
    truncated_bptt_steps: int = 0
    # A batch that ``forward`` takes; used by the summary and the exports.
    example_input_array: Any = None
    prepare_data_per_node: bool = False
    _run: ModuleRun | None = None
    # What stands a floor above, put here by the package's root: reading checkpoints, exports, the summary.
    _build_from_checkpoint: ClassVar[Callable[..., Any]]
    _to_onnx: ClassVar[Callable[..., Any]]
    _to_torchscript: ClassVar[Callable[..., Any]]
    _to_program: ClassVar[Callable[..., Any]]
    _summarize: ClassVar[Callable[..., Any]]

    # == the steps ===============================================================================================
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx, optimizer_idx†, hiddens†): return the loss, a dict with ``"loss"``, or None to skip."""
        raise NotImplementedError

    def training_step_end(self, step_output: Any) -> Any:
        """Get ``training_step``'s output (under dp: the list of the parts'); what it returns replaces it."""

    def training_epoch_end(self, outputs: list[Any]) -> None:
        """Get the outputs of the epoch, in order, detached."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx, dataloader_idx†): return anything."""

    def validation_step_end(self, step_output: Any) -> Any:
        """Get ``validation_step``'s output; what it returns replaces it."""

    def validation_epoch_end(self, outputs: list[Any]) -> None:
        """Get the outputs of the validation; a list for each dataloader where there are several."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx, dataloader_idx†): return anything."""

    def test_step_end(self, step_output: Any) -> Any:
        """Get ``test_step``'s output; what it returns replaces it."""

    def test_epoch_end(self, outputs: list[Any]) -> None:
        """Get the outputs of the test; a list for each dataloader where there are several."""

    def predict_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx, dataloader_idx†): return the prediction; by default ``self(batch)``."""
        return self(batch)

    # == what to train with ======================================================================================
    def configure_optimizers(self) -> Any:
        """Return the optimizers and schedulers; the accepted forms are listed in ``raylit/optim/plan.py``."""
        raise NotImplementedError

    def configure_callbacks(self) -> Any:
        """Return callbacks of this Module; one of the same type in the Trainer is replaced."""
        return []

    def configure_model(self) -> None:
        """Create layers late, on the worker."""

    def prepare_data(self) -> None:
        """Download or unpack data: once in the whole run, on global rank 0, while all others wait."""

    def setup(self, stage: str) -> None:
        """Build what depends on the stage, on every worker: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""

    def teardown(self, stage: str) -> None:
        """Undo ``setup``, on every worker."""

    def train_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def val_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def test_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def predict_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    # == how a batch travels =====================================================================================
    def on_before_batch_transfer(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, dataloader_idx†): change the batch before it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        """(batch, device, dataloader_idx†): move the batch to the device."""
        return self._attached("transfer_batch_to_device").transfer(batch, device)

    def on_after_batch_transfer(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, dataloader_idx†): change the batch on the device."""
        return batch

    def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Any]:
        """Split a batch for truncated back-propagation: tensors and sequences along dim 1."""
        return self._attached("tbptt_split_batch").tbptt_split(batch, split_size)

    # == optimisation ============================================================================================
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """(loss, optimizer, optimizer_idx): compute the gradients. ``super().backward(loss, ...)`` works too."""
        # Lightning 1.0's super call passes the optimizer and its index on; they are not arguments of Tensor.backward.
        rest = args[2:] if args and (args[0] is None or isinstance(args[0], Optimizer)) else args
        kwargs.pop("optimizer", None)
        kwargs.pop("optimizer_idx", None)
        loss.backward(*rest, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_idx: Any = None,
                       optimizer_closure: Callable[[], Any] | None = None, on_tpu: bool = False,
                       using_native_amp: bool = False, using_lbfgs: bool = False) -> None:  # fmt: skip
        """Step the optimizer; the gradients are there already. An override is given any subset of these, by name."""
        if callable(optimizer_idx):  # Lightning 2.x's order: (epoch, batch_idx, optimizer, optimizer_closure)
            optimizer_idx, optimizer_closure = None, optimizer_idx
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """(epoch, batch_idx, optimizer, optimizer_idx†): clear the gradients after a step."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """(scheduler, metric†, optimizer_idx†): step a scheduler that is due; ``metric`` is None or its monitor's."""
        # Lightning 1.x's super call has the index before the metric, 2.x's has no index: an int is the index.
        given = [value for value in args if value is not None and type(value) is not int]
        metric = kwargs.get("metric", given[0] if given else None)
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """(optimizer, optimizer_idx†, gradient_clip_val, gradient_clip_algorithm), by name: clip before the step."""
        # A super call by position: (optimizer, value, algorithm), or Lightning 1.x's with the index before the value.
        value, algorithm = (*args[len(args) // 3 :], None, None)[:2]
        value = kwargs.get("gradient_clip_val", value)
        self.clip_gradients(optimizer, value, kwargs.get("gradient_clip_algorithm", algorithm))

    def clip_gradients(self, optimizer: Optimizer, gradient_clip_val: float | None = None,
                       gradient_clip_algorithm: str | None = None) -> None:  # fmt: skip
        """Clip the optimizer's gradients by ``"norm"`` (default) or ``"value"``."""
        self._attached("clip_gradients").clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def toggle_optimizer(self, optimizer: Optimizer, optimizer_idx: int | None = None) -> None:
        """Let only this optimizer's parameters require gradients, until ``untoggle_optimizer``."""
        self._attached("toggle_optimizer").toggle(optimizer)

    def untoggle_optimizer(self, optimizer: Optimizer, optimizer_idx: int | None = None) -> None:
        """Restore what required gradients before ``toggle_optimizer``."""
        self._attached("untoggle_optimizer").untoggle(optimizer)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Iterator[None]:
        """Toggle and untoggle around a block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or the list of them; ``.step()`` clips, unscales and counts as the Trainer says."""
        found = self._attached("optimizers").managed_optimizers()
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """Return None, the scheduler, or the list of them."""
        found = self._attached("lr_schedulers").schedulers()
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, optimizer: Optimizer | None = None, *args: Any, **kwargs: Any) -> None:
        """In manual optimisation: compute the gradients, scaled as the precision needs."""
        self._attached("manual_backward").manual_backward(loss, optimizer, args, kwargs)

    def manual_optimizer_step(self, optimizer: Optimizer, force_optimizer_step: bool = False,
                              optimizer_closure: Callable[[], Any] | None = None) -> Any:  # fmt: skip
        """In manual optimisation: step and zero the gradients, each ``accumulate_grad_batches`` batches or by force."""
        run = self._attached("manual_optimizer_step")
        return run.manual_step(optimizer, force_optimizer_step, optimizer_closure)

    # == logging =================================================================================================
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a scalar under ``name``.

        log(name, value, prog_bar=False, logger=True, on_step=None, on_epoch=None, reduce_fx=torch.mean,
        tbptt_reduce_fx=torch.mean, tbptt_pad_token=0, enable_graph=False, sync_dist=False, sync_dist_op="mean",
        sync_dist_group=None, add_dataloader_idx=True, batch_size=None, metric_attribute=None, rank_zero_only=False)

        In training batches the step's value by default, elsewhere the epoch's: weighted by batch size and reduced over
        all workers. Outside a run it warns once and does nothing. Raises LogError where a right number cannot come of
        it.
        """
        run = self._run
        if run is None:
            _warn_outside("log")
            return
        run.log(name, value, *args, **kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log every entry of ``dictionary`` with the same settings; arguments as in ``log``."""
        run = self._run
        if run is None:
            _warn_outside("log_dict")
            return
        for name, value in dictionary.items():
            run.log(name, value, *args, **kwargs)

    def print(self, *args: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Print on global rank 0 only, above the progress bar; straight to ``file`` where one is given."""
        if self._run is None or (kwargs.get("file") is not None and self.global_rank == 0):
            print(*args, sep=sep, end=end, **kwargs)
        elif self.global_rank == 0:
            self._run.print(sep.join(str(arg) for arg in args) + end)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather a tensor, or each of a nested collection, from all workers: a new leading dimension of world size."""
        if self._run is None:
            raise NotAttachedError("all_gather works while a run goes on: call it in a hook")
        if group is not None and group is not torch.distributed.group.WORLD:
            raise ConfigError("all_gather(group=...) is not supported: raylit gathers over all workers of the run")
        return self._run.all_gather(data, sync_grads)

    def get_progress_bar_dict(self) -> dict[str, Any]:
        """Return what the progress bar shows; an override may add or remove keys."""
        return {} if self._run is None else self._run.progress_bar()

    # == weights =================================================================================================
    def freeze(self) -> None:
        """Let no parameter require gradients, and call ``eval()``."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """Let all parameters require gradients, and call ``train()``."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, strict: bool = True,
                             hparams_file: str | Path | None = None, **kwargs: Any) -> Any:  # fmt: skip
        """Build the Module from a checkpoint: its hyperparameters, overridden by ``kwargs``, then its weights.

        ``checkpoint_path``: the file, its folder, a URI of either, a Ray ``Checkpoint``, or a Lightning file.
        ``map_location``: as in ``torch.load``; the CPU by default. ``strict=False``: what only the file or only the
        Module has is left alone, and named in a warning. ``hparams_file``: YAML whose values go before the file's.
        Raises CheckpointError where there is no checkpoint of this class, or one that holds more than data.
        """
        return cls._build_from_checkpoint(cls, checkpoint_path, map_location, strict, hparams_file, kwargs)

    # == to other runtimes =======================================================================================
    def to_onnx(self, file_path: str | Path, input_sample: Any = None, **kwargs: Any) -> Any:
        """Write ``forward`` as an ONNX file.

        ``input_sample``: what ``forward`` takes (a tuple by position, a dict by name); ``example_input_array`` where
        not given. ``kwargs`` go to ``torch.onnx.export``. This and the other exports take evaluation mode, and leave
        the Module as it was. Raises ConfigError without a sample, MissingDependencyError without ``raylit[onnx]``.
        """
        return self._to_onnx(file_path, input_sample, **kwargs)

    def to_torchscript(self, file_path: str | Path | None = None, method: str = "script", example_inputs: Any = None,
                       **kwargs: Any) -> Any:  # fmt: skip
        """Compile ``forward`` (``"script"``), or record one call of it (``"trace"``); with a path, save it too.

        ``example_inputs`` (for ``"trace"``) as ``input_sample`` of ``to_onnx``. torch deprecates TorchScript: prefer
        ``export``. ``kwargs`` go to ``torch.jit.script`` or ``torch.jit.trace``. Raises ConfigError without a sample.
        """
        return self._to_torchscript(file_path, method, example_inputs, **kwargs)

    def export(self, file_path: str | Path | None = None, example_inputs: Any = None, **kwargs: Any) -> Any:
        """Return ``forward`` as a ``torch.export`` program; with a path (``.pt2``), save it too.

        ``example_inputs`` as ``input_sample`` of ``to_onnx``. ``kwargs`` go to ``torch.export.export``, such as
        ``dynamic_shapes`` for a batch size that may vary. Raises ConfigError without a sample.
        """
        return self._to_program(file_path, example_inputs, **kwargs)

    def summarize(self, max_depth: int | str = 1) -> str:
        """Return the layers and their sizes as text, also in and out of them with an ``example_input_array``.

        ``max_depth``: levels of layers that get a row; -1 or Lightning's ``"full"`` for all, 0 for the totals alone.
        """
        return str(self._summarize({"top": 1, "full": -1}.get(str(max_depth), max_depth)))

    # == where it runs ===========================================================================================
    @property
    def trainer(self) -> Any:
        """The trainer of the run; NotAttachedError outside one."""
        return self._attached("trainer").trainer

    @property
    def current_epoch(self) -> int:
        """Number of the epoch that runs, from 0."""
        return 0 if self._view is None else self._view.current_epoch

    @property
    def global_step(self) -> int:
        """Rounds of optimizer steps done."""
        return 0 if self._view is None else self._view.global_step

    @property
    def global_rank(self) -> int:
        """Rank of this worker in the run, from 0."""
        return 0 if self._view is None else self._view.global_rank

    @property
    def local_rank(self) -> int:
        """Rank of this worker on its node, from 0."""
        return 0 if self._view is None else self._view.local_rank

    @property
    def node_rank(self) -> int:
        """Rank of this worker's node, from 0."""
        return 0 if self._view is None else self._view.node_rank

    @property
    def world_size(self) -> int:
        """Number of workers in the run."""
        return 1 if self._view is None else self._view.world_size

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return None if self._view is None else self._view.logger

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the run."""
        return [] if self._view is None else self._view.loggers

    @gives_way
    def datamodule(self) -> Any:
        """The DataModule of the run, or None."""
        return None if self._view is None else self._view.datamodule

    @property
    def device(self) -> torch.device:
        """Where the parameters lie; for a Module without any, where the run takes place."""
        first: Tensor | None = next(self.parameters(), None)
        if first is None:
            first = next(self.buffers(), None)
        if first is None:
            return torch.device("cpu") if self._view is None else self._view._state.device
        return first.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the parameters."""
        first = next((p for p in self.parameters() if p.is_floating_point()), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @gives_way
    def precision(self) -> str:
        """Number format of the run."""
        return "32-true" if self._view is None else self._view.precision

    @gives_way
    def use_amp(self) -> bool:
        """True under mixed precision."""
        return self._view is not None and self._view.precision.endswith("mixed")

    @property
    def on_gpu(self) -> bool:
        """True where the parameters lie on a CUDA device."""
        return self.device.type == "cuda"

    @gives_way
    def use_tpu(self) -> bool:
        """Always False: raylit runs on CPUs and CUDA GPUs."""
        return False

    @gives_way
    def use_ddp(self) -> bool:
        """True where several workers run torch DDP."""
        return self._strategy == "ddp"

    @gives_way
    def use_ddp2(self) -> bool:
        """True under the ``ddp2`` strategy."""
        return self._strategy == "ddp2"

    @gives_way
    def use_dp(self) -> bool:
        """True under the ``dp`` strategy."""
        return self._strategy == "dp"

    @property
    def _strategy(self) -> str:
        return "single" if self._view is None else self._view._state.strategy_name

    @property
    def _view(self) -> TrainerView | None:
        """The run's trainer; between runs the one that ran this Module last; None before the first."""
        if self._run is not None:
            return self._run.trainer
        last: TrainerView | None = self.__dict__.get("_last_trainer")
        return last

    def _attached(self, what: str) -> ModuleRun:
        if self._run is None:
            raise NotAttachedError(
                f"{type(self).__name__}.{what} needs a run: it works in hooks, while a Trainer runs this Module"
            )
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        # The handle belongs to one process and one run.
        return {key: value for key, value in self.__dict__.items() if key not in ("_run", "_last_trainer")}

    # == hooks around all that; drawn in order in raylit/engine/fit.py ============================================
    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_pretrain_routine_start(self) -> None: ...
    def on_pretrain_routine_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_epoch_start(self) -> None: ...
    def on_epoch_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    # An override that names ``outputs`` gets the outputs of the epoch, which are kept for it.
    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None: ...
    # Batch hooks may also name ``dataloader_idx``. Returning -1 here ends the epoch.
    def on_train_batch_start(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> int | None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    # May also name ``optimizer_idx``.
    def on_before_optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...

    def on_validation_model_eval(self) -> None:
        """Enter evaluation mode: ``eval()``."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Leave it: restore each submodule's own mode."""
        self._attached("on_validation_model_train").restore_modes()

    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...

    def on_test_model_eval(self) -> None:
        """Enter evaluation mode: ``eval()``."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Leave it: restore each submodule's own mode."""
        self._attached("on_test_model_train").restore_modes()

    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...

    def on_predict_model_eval(self) -> None:
        """Enter evaluation mode: ``eval()``."""
        self.eval()

    def on_predict_model_train(self) -> None:
        """Leave it: restore each submodule's own mode."""
        self._attached("on_predict_model_train").restore_modes()

    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None: ...

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


_warned: set[str] = set()


def _warn_outside(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"self.{name}() outside a run does nothing", UserWarning, stacklevel=3)
