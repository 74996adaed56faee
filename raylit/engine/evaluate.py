"""Validation, test and prediction: the same loop with other names. Floor 3.

::

    on_X_model_eval (calls eval()), gradients off
    on_X_start, on_X_epoch_start
    per dataloader, per batch:
        on_X_batch_start -> X_step -> X_step_end -> on_X_batch_end
    X_epoch_end(outputs) -> on_X_epoch_end
    [metrics reduced over all workers: one collective]
    on_X_end -> on_X_model_train (restores each submodule's own mode)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raylit.config.amounts import batches
from raylit.engine.devices import over_devices
from raylit.engine.notices import NoticeWatch
from raylit.engine.outputs import detached
from raylit.engine.parts import Parts
from raylit.metrics.place import BATCH_EVAL, EPOCH_EVAL, NO_EPOCH
from raylit.ports import LoaderLike
from raylit.stage import Loop

_ARGUMENT = {
    Loop.SANITY: "num_sanity_val_steps",
    Loop.VALIDATION: "limit_val_batches",
    Loop.TEST: "limit_test_batches",
    Loop.PREDICT: "limit_predict_batches",
}


class Evaluation:
    """One kind of evaluation of one run: ``Loop.SANITY``, ``VALIDATION``, ``TEST`` or ``PREDICT``."""

    def __init__(self, parts: Parts, loop: Loop) -> None:
        self._parts, self._loop = parts, loop
        self.name = name = "validation" if loop is Loop.SANITY else loop.value
        own, event = parts.hooks.own, parts.hooks.event
        step = own(f"{name}_step")
        if step is None and loop is Loop.PREDICT:
            predict = parts.module.predict_step  # the default: forward

            def step(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
                return predict(batch)

        self._step_end = own(f"{name}_step_end") if loop is not Loop.PREDICT else None
        self._step = None if step is None else over_devices(parts, step, join=self._step_end is None)
        self._epoch_end = own(f"{name}_epoch_end") if loop is not Loop.PREDICT else None
        self._model_eval, self._model_train = own(f"on_{name}_model_eval"), own(f"on_{name}_model_train")
        self._start, self._end = event(f"on_{name}_start"), event(f"on_{name}_end")
        self._epoch_start, self._epoch_ended = event(f"on_{name}_epoch_start"), event(f"on_{name}_epoch_end")
        self._batch_start, self._batch_end = event(f"on_{name}_batch_start"), event(f"on_{name}_batch_end")

    @property
    def possible(self) -> bool:
        """True where the Module has the step of this loop."""
        return self._step is not None

    def run(
        self, loaders: list[LoaderLike], limit: int | float, at_most: int | float = 1.0,
        notices: NoticeWatch | None = None,
    ) -> tuple[list[dict[str, Tensor]], list[list[Any]]]:  # fmt: skip
        """Run all loaders; return the metrics of each, and each one's kept outputs (for prediction, on the CPU).

        ``limit`` and ``at_most``: batches of each loader, or fractions of it; the smaller of the two holds.
        ``notices``: looked at between batches, and after each loader.
        """
        state, metrics = self._parts.state, self._parts.metrics
        outer, state.loop = state.loop, self._loop
        self._parts.modes[:] = [(module, module.training) for module in self._parts.module.modules()]
        _call(self._model_eval, self._parts.module.eval)
        # inference_mode is the faster, but its tensors may never meet autograd; the person chooses.
        grads_off = torch.inference_mode() if self._parts.settings.inference_mode else torch.no_grad()
        metrics.begin(self._loop.value, len(loaders))
        try:
            with grads_off:
                metrics.place = EPOCH_EVAL
                _call(self._start)
                _call(self._epoch_start)
                kept = [self._one_loader(loader, index, limit, at_most, notices)
                        for index, loader in enumerate(loaders)]  # fmt: skip
                if self._epoch_end is not None or self._epoch_ended is not None:
                    state.callback_metrics.update(metrics.settle().callback)  # for these hooks to read
                if self._epoch_end is not None:
                    self._epoch_end(kept[0] if len(kept) == 1 else kept)
                _call(self._epoch_ended)
                logged = metrics.end()
                state.callback_metrics.update(logged.callback)
                if self._loop is not Loop.SANITY:
                    state.measured.update({name: (state.global_step, each) for name, each in logged.callback.items()})
                    state.progress_bar_metrics.update(logged.progress_bar)
                    state.logged_metrics.update(logged.logger)
                    self._parts.output.epoch_metrics(state, logged.logger, logged.progress_bar)
                # The epoch is over: nothing can be logged into it any more, nor into the training around it.
                place, metrics.place = metrics.place, NO_EPOCH
                _call(self._end)
                metrics.place = place
        finally:
            _call(self._model_train, self._parts.restore_modes)
        state.loop = outer  # not after an exception: where the run stood is read off later
        self._parts.output.loop_end(state, self._loop, logged.callback)
        return _per_loader(logged.callback, len(loaders)), kept

    def _most(self, limit: int | float, at_most: int | float, mine: int | None) -> int | None:
        """The batches of the rank that has most: a fraction is of these, or a short rank's share would be none."""
        fraction = any(isinstance(each, float) and 0.0 < each < 1.0 for each in (limit, at_most))
        if self._parts.state.world.world_size == 1 or mine is None or not fraction:
            return mine
        return int(self._parts.strategy.collective.all_reduce(torch.tensor(float(mine)), "max").item())

    def _one_loader(self, loader: LoaderLike, index: int, limit: int | float, at_most: int | float,
                    notices: NoticeWatch | None) -> list[Any]:  # fmt: skip
        """Run one loader on this rank; return the outputs that an epoch-end hook or the caller will ask for."""
        parts, step = self._parts, self._step
        assert step is not None
        metrics, transfer, state = parts.metrics, parts.transfer, parts.state
        forward_context, step_end = parts.precision.forward_context, self._step_end
        predicting = self._loop is Loop.PREDICT
        keep = predicting or self._epoch_end is not None
        mine = loader.num_batches
        # In an elastic run a limit counts the batches that a rank has where there are the most of them.
        turns, most = state.world.turns, self._most(limit, at_most, mine)
        most = None if most is None else -(-most // turns)
        total = batches(limit, batches(at_most, most, "limit_val_batches"), _ARGUMENT[self._loop])
        total = None if total is None else total * turns
        if total is not None and mine is not None:
            total = min(total, mine)
        loader.set_epoch(0)
        kept: list[Any] = []
        refresh = Refresh(parts.output.refresh_s)
        told = self._loop in (Loop.VALIDATION, Loop.TEST) and parts.output.wants_steps
        log_every = parts.settings.log_every_n_steps if told else 0
        together = notices.begin(None if mine is None else total) if notices is not None else 0
        for batch_idx, batch in enumerate(_first(loader, total)):
            if transfer is not None:
                batch = transfer(batch, index)
            metrics.set_batch(batch, index)
            metrics.place = BATCH_EVAL
            if self._batch_start is not None:
                self._batch_start(batch, batch_idx, index)
            context = forward_context()
            if context is None:
                output = step(batch, batch_idx, index)
            else:
                with context:
                    output = step(batch, batch_idx, index)
            if step_end is not None:
                output = step_end(output)
            if self._batch_end is not None:
                self._batch_end(output, batch, batch_idx, index)
            if keep:
                kept.append(_to_cpu(output) if predicting else detached(output))
            state.eval_batches += 1
            if log_every and (batch_idx + 1) % log_every == 0:
                self._log_step()
            if refresh.due():
                parts.output.progress(state, batch_idx + 1, total, None)
            if notices is not None and batch_idx < together:
                notices.batch_done()
        metrics.place = EPOCH_EVAL
        if notices is not None:
            notices.look()
        return kept

    def _log_step(self) -> None:
        """Give the loggers the step values that were asked for with ``on_step=True``; this rank's own."""
        taken = self._parts.metrics.take_step_metrics()
        if taken:
            self._parts.state.logged_metrics.update(taken)
            self._parts.output.step_metrics(self._parts.state, taken)


class Refresh:
    """Says when the display is due again; asks the clock alone."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = time.perf_counter() + every_s

    def due(self) -> bool:
        now = time.perf_counter()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True


def _first(loader: LoaderLike, count: int | None) -> Any:
    """Yield the first ``count`` batches, and do not load one more only to drop it."""
    if count is None:
        yield from loader
        return
    if count <= 0:
        return
    for done, batch in enumerate(loader, start=1):
        yield batch
        if done >= count:
            return


def _per_loader(metrics: dict[str, Tensor], loaders: int) -> list[dict[str, Tensor]]:
    """Sort metrics by loader: those with a loader's suffix are its own, the others belong to all."""
    if loaders <= 1:
        return [metrics]
    marks = [f"/dataloader_idx_{index}" for index in range(loaders)]
    return [
        {k: v for k, v in metrics.items() if k.endswith(mark) or not any(k.endswith(other) for other in marks)}
        for mark in marks
    ]


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_cpu(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value


def _call(hook: Callable[..., Any] | None, default: Callable[..., Any] | None = None) -> None:
    if hook is not None:
        hook()
    elif default is not None:
        default()


def in_dataset_order(per_rank: list[list[list[Any]]], contiguous: Sequence[bool] = ()) -> list[list[Any]]:
    """Merge every rank's predictions, ``[rank][loader][batch]``, into the order of the data set: ``[loader][batch]``.

    Step k of rank r stands before step k of rank r+1 (contract 8, Data), and the tail keeps that order. Of a loader
    that is ``contiguous`` all of rank r stands before all of rank r+1.
    """
    merged: list[list[Any]] = []
    for loader in range(len(per_rank[0])):
        columns = [rank[loader] for rank in per_rank]
        if any(contiguous[loader : loader + 1]):
            merged.append([each for column in columns for each in column])
            continue
        steps = max((len(column) for column in columns), default=0)
        merged.append([column[k] for k in range(steps) for column in columns if k < len(column)])
    return merged
