"""The learning rate schedulers of one fit: which of them step when, and with which value. Floor 3."""

from __future__ import annotations

from typing import Any

import torch

from raylit.engine.parts import Parts
from raylit.errors import OptimizerError
from raylit.optim.plan import OptimPlan, SchedulerPlan, scheduler_due


class Schedules:
    """Steps schedulers in automatic optimisation; in manual optimisation they are the person's.

    ``steps_of``: steps of each optimizer since training began; counted where ``by_step``.
    """

    def __init__(self, parts: Parts, plan: OptimPlan) -> None:
        self._parts = parts
        self._plans = plan.schedulers if parts.module.automatic_optimization else ()
        self._several = parts.state.world.world_size > 1
        self._override = parts.hooks.own("lr_scheduler_step")
        self.by_step = any(each.interval == "step" for each in plan.schedulers)
        self.steps_of = [parts.state.global_step] * len(plan.optimizers)

    def stepped(self, optimizers: list[int]) -> None:
        """Step what is due by step of these optimizers, which have stepped; each counts its own optimizer's steps."""
        for index in optimizers:
            self.steps_of[index] += 1
        for plan in self._plans:
            if plan.optimizer_idx in optimizers and scheduler_due(plan, "step", self.steps_of[plan.optimizer_idx]):
                self._step(plan)

    def epoch_done(self, epochs_done: int) -> None:
        """Step what is due by epoch."""
        for plan in self._plans:
            if scheduler_due(plan, "epoch", epochs_done):
                self._step(plan)

    def _step(self, plan: SchedulerPlan) -> None:
        if self._parts.state.schedulers_on_hold:
            return
        metric = None
        if plan.reduce_on_plateau:
            known = {**self._parts.state.callback_metrics, **self._parts.metrics.step_metrics().callback}
            metric = self._agreed(known.get(plan.monitor or ""))
            if metric is None:
                text = (
                    f"the scheduler {type(plan.scheduler).__name__} monitors {plan.monitor!r}, which is not logged; "
                    f"logged are: {', '.join(sorted(known)) or 'nothing'}"
                )
                if plan.strict:
                    raise OptimizerError(text)
                self._parts.output.note(text)
                return
        if self._override is not None:
            self._override(plan.scheduler, metric, plan.optimizer_idx)
        elif metric is None:
            plan.scheduler.step()
        else:
            plan.scheduler.step(metric)

    def _agreed(self, metric: Any) -> Any:
        """The monitored value as all ranks see it: a step's value is each rank's own, and they must decide alike."""
        if not self._several:
            return metric
        # Read off the device here: the scheduler's comparison would wait for it anyway.
        seen = self._parts.strategy.collective.all_gather_object(None if metric is None else float(metric))
        if None in seen:
            return None
        return metric if len(set(seen)) == 1 else torch.tensor(sum(seen) / len(seen), dtype=torch.float64)
