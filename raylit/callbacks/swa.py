"""StochasticWeightAveraging: the mean of the weights of the last epochs. Floor 2, on every worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raylit.callback import Callback
from raylit.callbacks.average import Average, AverageFunction, weights_of
from raylit.errors import ConfigError
from raylit.seed import get_random_state, set_random_state
from raylit.stage import Stage

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView

_CPU = torch.device("cpu")


class StochasticWeightAveraging(Callback):
    """Average the weights at the end of each of the last epochs, with a learning rate of its own meanwhile.

    ``swa_lrs``: the rate to go to: a number, or one for each parameter group. ``swa_epoch_start``: the first epoch,
    counted from 1, as an int; or this fraction of ``max_epochs``. ``annealing_epochs``, ``annealing_strategy``
    (``"cos"`` or ``"linear"``): how ``torch.optim.swa_utils.SWALR`` goes there; the Module's own schedulers are on
    hold from then on. ``avg_fn(average, weights, num_averaged)``: None: the equal mean. ``device``: where the average
    lies; None: beside the weights.

    When training ends the Module gets the average, and BatchNorm layers in training mode get their statistics from one
    pass over the training data, as with ``torch.optim.swa_utils.update_bn``. Metrics logged before then are those of
    the weights that were trained. One optimizer and at most one scheduler; ConfigError otherwise.
    """

    # Of the fit that runs, or ran last, in this process.
    _average: Average | None = None
    _scheduler: Any = None
    _current: dict[str, Any] | None = None  # the weights that training ended with
    _loaded: dict[str, Any] | None = None

    def __init__(self, swa_lrs: float | Sequence[float], swa_epoch_start: int | float = 0.8, annealing_epochs: int = 10,
                 annealing_strategy: str = "cos", avg_fn: AverageFunction | None = None,
                 device: torch.device | str | int | None = _CPU) -> None:  # fmt: skip
        rates = list(swa_lrs) if isinstance(swa_lrs, (list, tuple)) else [swa_lrs]
        if not rates or any(
            isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0 for rate in rates
        ):
            _refuse("swa_lrs", swa_lrs, "a positive number, or a list of one for each parameter group")
        whole = isinstance(swa_epoch_start, int) and not isinstance(swa_epoch_start, bool) and swa_epoch_start >= 1
        if not whole and not (isinstance(swa_epoch_start, float) and 0.0 <= swa_epoch_start <= 1.0):
            _refuse("swa_epoch_start", swa_epoch_start, "an epoch of at least 1, or a fraction of max_epochs")
        if isinstance(annealing_epochs, bool) or not isinstance(annealing_epochs, int) or annealing_epochs < 0:
            _refuse("annealing_epochs", annealing_epochs, "a whole number of at least 0")
        if annealing_strategy not in ("cos", "linear"):
            _refuse("annealing_strategy", annealing_strategy, "'cos' or 'linear'")
        if avg_fn is not None and not callable(avg_fn):
            _refuse("avg_fn", avg_fn, "a function (average, weights, num_averaged) -> average")
        self._rates, self._start, self._function, self._device = rates, swa_epoch_start, avg_fn, device
        self._annealing_epochs, self._annealing_strategy = annealing_epochs, annealing_strategy

    @property
    def num_averaged(self) -> int:
        """How many epochs' weights are in the average."""
        return 0 if self._average is None else self._average.count

    def swa_start(self, max_epochs: int) -> int:
        """Return the first epoch (from 0) whose weights are averaged."""
        start = int(self._start * max_epochs) if isinstance(self._start, float) else self._start
        return max(start - 1, 0)

    # -- hooks ---------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        self._average = self._scheduler = self._current = self._loaded = None
        if trainer.max_epochs == -1 and isinstance(self._start, float):
            raise ConfigError(
                f"StochasticWeightAveraging(swa_epoch_start={self._start}) is a fraction of max_epochs, which the "
                "Trainer has not: give Trainer(max_epochs=...), or swa_epoch_start as an epoch"
            )
        if trainer.max_epochs not in (-1, 0) and self.swa_start(trainer.max_epochs) >= trainer.max_epochs:
            raise ConfigError(
                f"StochasticWeightAveraging(swa_epoch_start={self._start}): training ends after "
                f"{trainer.max_epochs} epochs, so nothing would be averaged"
            )
        if not module.automatic_optimization:
            raise ConfigError(
                "StochasticWeightAveraging needs automatic optimisation; under manual use EMAWeightAveraging"
            )

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        if len(trainer.optimizers) != 1 or len(trainer.lr_schedulers) > 1:
            raise ConfigError(
                "StochasticWeightAveraging works with one optimizer and at most one scheduler; configure_optimizers "
                f"returned {len(trainer.optimizers)} and {len(trainer.lr_schedulers)}"
            )
        groups = len(trainer.optimizers[0].param_groups)
        if len(self._rates) not in (1, groups):
            raise ConfigError(
                f"StochasticWeightAveraging(swa_lrs=...) has {len(self._rates)} rates, the optimizer {groups} "
                "parameter groups: give one number, or as many as there are groups"
            )
        if self._loaded:
            self._go_on(trainer, module)

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        if self._scheduler is None and trainer.current_epoch >= self.swa_start(trainer.max_epochs):
            self._begin(trainer)

    def on_train_epoch_settled(self, trainer: TrainerView, module: Module) -> None:
        if self._scheduler is None:
            return
        if self._average is None:
            self._average = Average(module, self._device, buffers=False)
        self._average.update(function=self._function)
        self._scheduler.step()

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        trainer.schedulers_on_hold = False
        if self._average is None:
            return
        self._current = weights_of(module)
        self._average.put()
        # A run that goes on from here must draw the numbers that it would have drawn without the pass.
        random_state = get_random_state()
        on_gpu = torch.cuda.get_rng_state(module.device) if module.device.type == "cuda" else None
        renew_batchnorm(trainer, module)
        set_random_state(random_state, devices=False)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, module.device)

    # -- the learning rate ---------------------------------------------------------------------------------------
    def _begin(self, trainer: TrainerView) -> None:
        from torch.optim.swa_utils import SWALR

        optimizer = trainer.optimizers[0]
        rates = self._rates if len(self._rates) > 1 else self._rates * len(optimizer.param_groups)
        self._scheduler = SWALR(optimizer, rates, self._annealing_epochs, self._annealing_strategy)  # type: ignore[arg-type]
        trainer.schedulers_on_hold = True

    def _go_on(self, trainer: TrainerView, module: Module) -> None:
        """Begin where a checkpoint was made: the optimizer has its rates from there already."""
        loaded, self._loaded = self._loaded or {}, None
        if loaded.get("scheduler") is not None:
            groups = trainer.optimizers[0].param_groups
            rates = [group["lr"] for group in groups]
            self._begin(trainer)
            self._scheduler.load_state_dict(loaded["scheduler"])
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate  # making a scheduler takes a step of its own
        if loaded.get("average") is not None:
            self._average = Average(module, self._device, buffers=False)
            self._average.load_state_dict(loaded["average"])

    def _kept_scheduler(self) -> dict[str, Any] | None:
        if self._scheduler is None:
            return None
        # Plain counters and rates; functions in it come from the arguments.
        state = self._scheduler.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, (bool, int, float, str, list))}

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the average, how many weights are in it, and where the learning rate stands."""
        if self._scheduler is None:
            return {}
        average = None if self._average is None else self._average.state_dict()
        return {"average": average, "scheduler": self._kept_scheduler()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the optimizer is there."""
        self._loaded = state

    def on_save_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        # Training is over, the Module has the average. Weights alone are for those who do not train on.
        if self._current is not None and "optimizer_states" in checkpoint:
            checkpoint["current_model_state"] = self._current

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        if trainer.stage is Stage.FIT and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not travel with the callback: the Module's own come home.
        left = ("_average", "_scheduler", "_current", "_loaded")
        return {name: value for name, value in self.__dict__.items() if name not in left}


def renew_batchnorm(trainer: TrainerView, module: Module) -> None:
    """Compute the running statistics of BatchNorm layers anew: the mean over one epoch of training batches.

    Layers in evaluation mode (frozen ones) keep theirs. With several workers the mean over all their batches; all ranks
    must call it.
    """
    kinds = nn.modules.batchnorm._BatchNorm
    layers = [
        each for each in module.modules() if isinstance(each, kinds) and each.training and each.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean of all batches
    try:
        count = trainer.pass_over_training_data()
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if module.world_size == 1:
        return
    statistics: list[Tensor] = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    flat = torch.cat([each.double().reshape(-1) for each in statistics] + [statistics[0].new_ones(1).double()]) * count
    total = module.all_gather(flat).sum(dim=0)
    means = (total[:-1] / total[-1]).split([each.numel() for each in statistics])
    for each, mean in zip(statistics, means, strict=True):
        each.copy_(mean)


def _refuse(name: str, value: object, expected: str) -> None:
    raise ConfigError(f"StochasticWeightAveraging({name}={value!r}): expected {expected}")
