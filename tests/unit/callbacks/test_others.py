"""LambdaCallback, TerminateOnNaN, DeviceStatsMonitor, the package's names, and a person's own callbacks' state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.callbacks import DeviceStatsMonitor, LambdaCallback, TerminateOnNaN
from raylit.errors import ConfigError, HookError, MissingDependencyError, NonFiniteError, UnknownArgumentError
from raylit.loggers import CSVLogger
from tests.unit.engine.small import Numbers, numbers, quiet


# -- LambdaCallback --------------------------------------------------------------------------------------------------
def test_functions_are_called_as_hooks(tmp_path: Path) -> None:
    seen: list[Any] = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: seen.append(stage),
        on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: seen.append((batch_idx, float(batch))),
        on_train_end=lambda trainer, module: seen.append(trainer.global_step),
        on_fit_end=None,
    )
    quiet(tmp_path, callbacks=[callback]).fit(Numbers(), numbers(4, 5))
    assert seen == ["fit", (0, 4.0), (1, 5.0), 2]


def test_a_name_that_is_no_hook_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(ConfigError, match="expected a function"):
        LambdaCallback(on_train_end="print")
    with pytest.raises(HookError, match="asks for 'extra'"):
        quiet(Path("."), callbacks=[LambdaCallback(on_train_end=lambda trainer, module, extra: None)]).fit(
            Numbers(), numbers(1)
        )


# -- TerminateOnNaN --------------------------------------------------------------------------------------------------
class Breaks(raylit.Module):
    """Two layers; at ``global_step`` ``at`` the loss is broken by the data or by a weight."""

    def __init__(self, at: int, by: str, value: float = float("nan")) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 1)
        self.at, self.by, self.value = at, by, value

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_step == self.at:
            if self.by in ("weight", "bias"):
                getattr(self.two, self.by).data.fill_(self.value)
            else:
                batch = batch * self.value
        return self.two(self.one(batch)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data() -> list[Tensor]:
    return [torch.ones(3, 2)] * 4


def test_the_step_and_the_parameter_are_named(tmp_path: Path) -> None:
    trainer = quiet(tmp_path, max_epochs=3, callbacks=[TerminateOnNaN()])
    with pytest.raises(NonFiniteError, match=r"the loss is nan in epoch 1, batch 2 \(global_step 6\); "
                                             r"not finite: the parameter two.weight\."):  # fmt: skip
        trainer.fit(Breaks(6, "weight"), data())
    assert trainer.global_step == 6


def test_gradients_are_named_where_the_data_is_to_blame(tmp_path: Path) -> None:
    words = r"batch 1 .*all parameters are finite still, but not the gradient of one.weight, two.weight\."
    with pytest.raises(NonFiniteError, match=words):
        quiet(tmp_path, callbacks=[TerminateOnNaN()]).fit(Breaks(1, "data"), data())


def test_an_infinite_loss(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"the loss is inf in epoch 0, batch 0 .*: the parameter two.bias\."):
        quiet(tmp_path, callbacks=[TerminateOnNaN()]).fit(Breaks(0, "bias", float("inf")), data())


@pytest.mark.parametrize(("every", "done", "named"), [
    (2, 3, "the parameter two.weight"),  # the look follows the bad pass: nothing has stepped with it
    (3, 4, r"the parameters one.weight, one.bias, two.weight\."), (100, 4, "the parameters"),  # the epoch's end
])  # fmt: skip
def test_a_late_look_names_the_first_bad_step(every: int, done: int, named: str, tmp_path: Path) -> None:
    trainer = quiet(tmp_path, max_epochs=2, callbacks=[TerminateOnNaN(check_every_n_steps=every)])
    words = r"the loss is nan or infinite in epoch 0, batch 3 \(global_step 3\); not finite: "
    with pytest.raises(NonFiniteError, match=words + named):
        trainer.fit(Breaks(3, "weight"), data())
    assert trainer.global_step == done


def test_manual_optimisation(tmp_path: Path) -> None:
    class Manual(Breaks):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.optimizers().zero_grad()

    with pytest.raises(NonFiniteError, match=r"epoch 0, batch 2 \(global_step 2\)"):
        quiet(tmp_path, callbacks=[TerminateOnNaN()]).fit(Manual(2, "weight"), data())


def test_finite_losses_pass(tmp_path: Path) -> None:
    for every in (None, 3):
        trainer = quiet(tmp_path, callbacks=[TerminateOnNaN(every)])
        trainer.fit(Breaks(99, "data"), data())
        assert trainer.global_step == 4


def test_refused_intervals() -> None:
    for value in (0, True, 2.0):
        with pytest.raises(ConfigError, match="check_every_n_steps"):
            TerminateOnNaN(value)


# -- DeviceStatsMonitor ----------------------------------------------------------------------------------------------
def test_cpu_statistics_go_to_the_loggers_alone(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    logger = CSVLogger(tmp_path / "logs")
    trainer = quiet(tmp_path, callbacks=[DeviceStatsMonitor()], logger=logger, log_every_n_steps=2)
    trainer.fit(Numbers(), numbers(1, 2, 3, 4))
    text = next((tmp_path / "logs").rglob("metrics.csv")).read_text().splitlines()
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        for name in ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent"):
            assert f"DeviceStatsMonitor.{hook}/{name}" in text[0]
    assert len(text) - 1 in (2, 4)  # steps 2 and 4
    assert not any("DeviceStats" in name for name in trainer.callback_metrics)
    assert trainer.history.column_names == ["epoch", "step"]


def test_without_a_logger_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logs to loggers"):
        quiet(tmp_path, callbacks=[DeviceStatsMonitor()]).fit(Numbers(), numbers(1))


def test_without_psutil_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingDependencyError, match=r"'psutil': pip install 'raylit\[stats\]'"):
        DeviceStatsMonitor(cpu_stats=True)


# -- names -----------------------------------------------------------------------------------------------------------
def test_every_name_is_there_and_is_a_callback() -> None:
    for name in raylit.callbacks.__all__:
        assert issubclass(getattr(raylit.callbacks, name), raylit.Callback)
    with pytest.raises(AttributeError, match="no attribute 'EarlyStoping'"):
        _ = raylit.callbacks.EarlyStoping


# -- a person's own --------------------------------------------------------------------------------------------------
class Counter(raylit.Callback):
    def __init__(self, label: str = "") -> None:
        self.label, self.batches, self.best = label, 0, torch.tensor(0.0)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.best = torch.maximum(self.best, batch.max())

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.best = state["batches"] * 10, state["best"]


class Keyed(Counter):
    @property
    def state_key(self) -> str:
        return f"Keyed[{self.label}]"


class Stateless(raylit.Callback):
    pass


def test_state_goes_through_a_checkpoint_and_instances_keep_apart(tmp_path: Path) -> None:
    first = [Counter(), Stateless(), Counter(), Keyed("a"), Keyed("b")]
    first[2].batches, first[4].batches = 100, 200
    trainer = quiet(tmp_path, enable_checkpointing=True, callbacks=first)
    result = trainer.fit(Numbers(), numbers(3, 7))
    saved = torch.load(Path(result.checkpoint.path) / "model.ckpt", weights_only=True)["callbacks"]
    assert {key: state["batches"] for key, state in saved.items()} == {
        "Counter": 2, "Counter:1": 102, "Keyed[a]": 2, "Keyed[b]": 202,
    }  # fmt: skip
    assert float(saved["Counter"]["best"]) == 7
    # In another order, and with another callback in front: each finds its own.
    again = [Stateless(), Keyed("b"), Counter(), Keyed("a"), Counter()]
    later = quiet(tmp_path, max_epochs=1, callbacks=again)  # no batch more: loaded, and nothing else
    later.fit(Numbers(), numbers(3, 7), ckpt_path=result.checkpoint)
    assert [callback.batches for callback in again if isinstance(callback, Counter)] == [2020, 20, 20, 1020]


def test_epoch_values_are_whole_in_on_train_epoch_settled(tmp_path: Path) -> None:
    class Logs(Numbers):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("batch", float(batch), on_epoch=True)
            return super().training_step(batch, batch_idx)

        def training_epoch_end(self, outputs: Any) -> None:
            self.log("end", 5.0)

        def on_train_epoch_end(self) -> None:
            self.log("hook", 6.0)

    seen: list[dict[str, float]] = []
    callback = LambdaCallback(
        on_train_epoch_settled=lambda trainer, module: seen.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        )
    )
    quiet(tmp_path, callbacks=[callback]).fit(Logs(), numbers(1, 3))
    assert seen == [{"batch_step": 3.0, "batch_epoch": 2.0, "batch": 2.0, "end": 5.0, "hook": 6.0}]
