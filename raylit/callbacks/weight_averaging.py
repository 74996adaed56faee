"""WeightAveraging and EMAWeightAveraging: average the weights while training goes on. Floor 2, on every worker.

All workers have the same weights, so each keeps the same average; nothing is sent but, before a validation with several
workers, rank 0's averaged buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raylit.callback import Callback
from raylit.callbacks.average import Average, AverageFunction, to_cpu, weights_of
from raylit.errors import ConfigError
from raylit.stage import Stage

if TYPE_CHECKING:
    from raylit.module import Module
    from raylit.view import TrainerView


class WeightAveraging(Callback):
    """Average the weights after the steps and epochs for which ``should_update`` returns True.

    ``avg_fn(average, weights, num_averaged)`` returns the new average of one tensor; None: the equal mean of all.
    ``use_buffers``: average floating buffers too; else they stay the Module's own. ``device``: where the average lies;
    None: beside the weights, which costs their memory once, and once more during validation.

    Validation runs on the average, and checkpoints hold it as their ``state_dict``, with the weights to train on under
    ``current_model_state``; after the fit the Module has the average. Before the first update everything is as without.
    """

    # Of the fit that runs, or ran last, in this process.
    _average: Average | None = None
    _current: dict[str, Any] | None = None  # the weights that training ended with
    _loaded: dict[str, Any] | None = None

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True,
                 avg_fn: AverageFunction | None = None) -> None:  # fmt: skip
        self._device, self._use_buffers, self._function = device, use_buffers, avg_fn
        self._weight: float | None = None  # of the new weights; None: an equal share
        self._seen_step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the weights go into the average now; by default after every step.

        ``step_idx``: index of the optimizer step just done, from 0. ``epoch_idx``: of the epoch just done. One of the
        two is None.
        """
        return step_idx is not None

    # -- averaging -----------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        self._average = self._current = self._loaded = None
        self._seen_step = 0

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        self._seen_step = trainer.global_step
        self._restore(module)

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step != self._seen_step:  # else the batch was within an accumulation group
            self._seen_step = step
            if self.should_update(step_idx=step - 1):
                self._update(module)

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._update(module)

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        if self._average is not None:
            self._current = weights_of(module)
            self._average.put()

    def _update(self, module: Module) -> None:
        if self._average is None:
            self._average = Average(module, self._device, self._use_buffers)
        self._average.update(self._weight, self._function)

    # -- validation on the average -------------------------------------------------------------------------------
    def on_validation_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        if trainer.stage is not Stage.FIT:
            return
        self._restore(module)
        if self._average is not None:
            self._average.swap_in()
            self._equalize_buffers(module)

    def on_validation_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        if self._average is not None:
            self._average.swap_out()

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        if self._average is not None:
            self._average.swap_out()

    def _equalize_buffers(self, module: Module) -> None:
        """One model is evaluated, not one a rank: BatchNorm's statistics have seen other batches on each."""
        if module.world_size == 1 or self._average is None:
            return
        buffers = [b for name, b in module.named_buffers() if name in self._average.buffer_names and b.numel()]
        if buffers:
            flat = torch.cat([buffer.detach().double().reshape(-1) for buffer in buffers])
            first = module.all_gather(flat)[0]
            for buffer, values in zip(buffers, first.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(values.reshape(buffer.shape))

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        average = self._average
        if average is None or not trainer.is_global_zero:  # rank 0's is the one that is kept
            return
        if self._current is not None:  # training is over, the Module has the average
            checkpoint["current_model_state"] = self._current
        else:
            with average.in_place(swapped=False):
                checkpoint["current_model_state"] = weights_of(module)
            with average.in_place(swapped=True):
                checkpoint["state_dict"] = weights_of(module)
        if "optimizer_states" not in checkpoint:  # weights alone are wanted: nobody will train on from them
            del checkpoint["current_model_state"]
            return
        # Of the average itself only what "state_dict" does not have as it is: no weight is kept twice.
        shown = checkpoint["state_dict"]
        kept = {
            name: to_cpu(tensor)
            for name, tensor in average.tensors.items()
            if name not in shown or shown[name].dtype != tensor.dtype
        }
        checkpoint["averaging_state"] = {"count": average.count, "tensors": kept}

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("averaging_state")
        if trainer.stage is Stage.FIT and saved is not None:
            tensors = {**checkpoint["state_dict"], **saved["tensors"]}
            self._loaded = {"count": saved["count"], "tensors": tensors}  # until the Module's own are in place
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def _restore(self, module: Module) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded:
            self._average = Average(module, self._device, self._use_buffers)
            self._average.load_state_dict(loaded)

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not travel with the callback: the Module's own come home.
        left = ("_average", "_current", "_loaded")
        return {name: value for name, value in self.__dict__.items() if name not in left}


class EMAWeightAveraging(WeightAveraging):
    """Exponential moving average: ``average = decay * average + (1 - decay) * weights``.

    ``update_every_n_steps``: update after the optimizer steps 0, n, 2n, ... (0: not by steps).
    ``update_starting_at_step``: not before this step (from 0). ``update_starting_at_epoch``: also update at the end of
    each epoch from this one on (from 0); None: not by epochs. The rest is ``WeightAveraging``.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, decay: float = 0.999,
                 update_every_n_steps: int = 1, update_starting_at_step: int | None = None,
                 update_starting_at_epoch: int | None = None) -> None:  # fmt: skip
        super().__init__(device, use_buffers)
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0.0 <= decay <= 1.0:
            raise ConfigError(f"EMAWeightAveraging(decay={decay!r}): expected a number from 0 to 1, such as 0.999")
        for name, value in (("update_every_n_steps", update_every_n_steps),
                            ("update_starting_at_step", update_starting_at_step),
                            ("update_starting_at_epoch", update_starting_at_epoch)):  # fmt: skip
            optional = value is None and name != "update_every_n_steps"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"EMAWeightAveraging({name}={value!r}): expected a whole number of at least 0")
        self.decay, self._weight = decay, 1 - decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the weights go into the average after this step or epoch (indices from 0)."""
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return begun and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0
        start = self.update_starting_at_epoch
        return epoch_idx is not None and start is not None and epoch_idx >= start
