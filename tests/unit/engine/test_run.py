"""A run around its steps: validation, limits, stopping, evaluation, logging, properties, exceptions, pickling."""

from __future__ import annotations

import copy
import pickle
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.errors import ConfigError, DataError, LogError, NotAttachedError
from tests.unit.engine.small import Net, Numbers, assert_same, batches, numbers, quiet, samples


class Traced(Numbers):
    """Notes what ran: T<epoch>.<batch> and V<dataloader>.<batch>."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[str] = []

    def training_step(self, batch, batch_idx):
        self.trace.append(f"T{self.current_epoch}.{batch_idx}")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.trace.append(f"{'S' if self.trainer.sanity_checking else 'V'}{dataloader_idx}.{batch_idx}")

    def test_step(self, batch, batch_idx):
        self.trace.append(f"E{batch_idx}")

    def predict_step(self, batch, batch_idx):
        self.trace.append(f"P{batch_idx}")


def trace(tmp_path, train=3, val: Any = 1, **arguments) -> str:
    module = Traced()
    validation = None if val is None else numbers(*range(val)) if isinstance(val, int) else val
    quiet(tmp_path, **arguments).fit(module, numbers(*range(1, train + 1)), validation)
    return " ".join(module.trace)


# -- when validation runs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "T0.0 T0.1 T0.2 T0.3 V0.0"),
        ({"val_check_interval": 2}, "T0.0 T0.1 V0.0 T0.2 T0.3 V0.0"),
        ({"val_check_interval": 3}, "T0.0 T0.1 T0.2 V0.0 T0.3"),
        ({"val_check_interval": 0.25}, "T0.0 V0.0 T0.1 V0.0 T0.2 V0.0 T0.3 V0.0"),
        ({"val_check_interval": 0.5}, "T0.0 T0.1 V0.0 T0.2 T0.3 V0.0"),
        ({"val_check_interval": 0.1}, "T0.0 V0.0 T0.1 V0.0 T0.2 V0.0 T0.3 V0.0"),
        ({"limit_val_batches": 0}, "T0.0 T0.1 T0.2 T0.3"),
        ({"check_val_every_n_epoch": 2, "max_epochs": 2}, "T0.0 T0.1 T0.2 T0.3 T1.0 T1.1 T1.2 T1.3 V0.0"),
        ({"check_val_every_n_epoch": 2, "max_epochs": 2, "val_check_interval": 3, "limit_train_batches": 3},
         "T0.0 T0.1 T0.2 T1.0 T1.1 T1.2 V0.0"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 2},
         "T0.0 T0.1 T0.2 V0.0 T0.3 T1.0 T1.1 V0.0 T1.2 T1.3"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 6, "max_epochs": 2},
         "T0.0 T0.1 T0.2 T0.3 T1.0 T1.1 V0.0 T1.2 T1.3"),
        ({"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_train_batches": 2}, "T0.0 V0.0 T0.1 V0.0"),
        ({"max_steps": 2}, "T0.0 T0.1"),
    ],
)  # fmt: skip
def test_when_validation_runs(tmp_path, arguments, expected):
    assert trace(tmp_path, train=4, **arguments) == expected


def test_an_interval_longer_than_the_epoch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="val_check_interval=5 is more than the 4 .*check_val_every_n_epoch=None"):
        trace(tmp_path, train=4, val_check_interval=5)


def test_a_fraction_of_a_stream_is_refused(tmp_path):
    class Stream:
        def __iter__(self):
            return iter(numbers(1, 2))

    with pytest.raises(ConfigError, match=r"val_check_interval=0.5 is a fraction.*give a number of batches"):
        quiet(tmp_path, val_check_interval=0.5).fit(Traced(), Stream(), numbers(1))


@pytest.mark.parametrize(
    ("steps", "limit", "expected"),
    [
        (2, 1.0, "S0.0 S0.1 T0.0 V0.0 V0.1 V0.2"),
        (-1, 1.0, "S0.0 S0.1 S0.2 T0.0 V0.0 V0.1 V0.2"),
        (0, 1.0, "T0.0 V0.0 V0.1 V0.2"),
        (5, 2, "S0.0 S0.1 T0.0 V0.0 V0.1"),
        (2, 0.34, "S0.0 T0.0 V0.0"),  # never more than a validation
        (2, 0, "T0.0"),
    ],
)
def test_sanity_check_batches(tmp_path, steps, limit, expected):
    assert trace(tmp_path, train=1, val=3, num_sanity_val_steps=steps, limit_val_batches=limit) == expected


def test_the_sanity_checks_metrics_are_forgotten(tmp_path):
    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            self.log("val", batch.sum(), prog_bar=True)

        def on_train_start(self):
            trainer = self.trainer
            found = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
            self.after_sanity = [dict(metrics) for metrics in found]

    module = Module()
    trainer = quiet(tmp_path, num_sanity_val_steps=2)
    trainer.fit(module, numbers(1), numbers(2, 4))
    assert module.after_sanity == [{}, {}, {}]
    assert float(trainer.callback_metrics["val"]) == 3.0 and "val" in trainer.progress_bar_metrics
    assert trainer.history.num_rows == 1


# -- how much runs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "batches_run"), [(2, 2), (0.5, 2), (1.0, 5), (0.99, 4), (1, 1), (0, 0), (0.0, 0), (9, 5)]
)
def test_limits(tmp_path, limit, batches_run):
    names = [f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")]
    trainer, module = quiet(tmp_path, **dict.fromkeys(names, limit)), Traced()
    trainer.fit(module, numbers(1, 2, 3, 4, 5), numbers(1, 2, 3, 4, 5))
    trainer.test(module, numbers(1, 2, 3, 4, 5))
    trainer.predict(module, numbers(1, 2, 3, 4, 5))
    expected = [f"T0.{i}" for i in range(batches_run)] + [f"V0.{i}" for i in range(batches_run)]
    expected += [f"E{i}" for i in range(batches_run)] + [f"P{i}" for i in range(batches_run)]
    assert module.trace == expected
    assert trainer.num_training_batches == batches_run


def test_a_fraction_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"limit_train_batches=0.1\) leaves no batch of the 5"):
        trace(tmp_path, train=5, limit_train_batches=0.1)


def test_fast_dev_run(tmp_path):
    module = Traced()
    trainer = quiet(tmp_path, fast_dev_run=2, num_sanity_val_steps=2)
    trainer.fit(module, numbers(1, 2, 3), numbers(1, 2, 3))
    assert " ".join(module.trace) == "T0.0 T0.1 V0.0 V0.1"
    assert trainer.max_epochs == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("amount", [2, 0.5])
def test_overfit_batches_trains_and_validates_on_the_same_unshuffled_batches(tmp_path, amount):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[0].tolist()]
            return self.weight * batch[0].sum()

        def validation_step(self, batch, batch_idx):
            self.seen_in_validation = [*getattr(self, "seen_in_validation", []), batch[0].tolist()]

    module = Module()
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, shuffle=True)
    other = DataLoader(TensorDataset(-torch.arange(8.0)), batch_size=2)
    quiet(tmp_path, overfit_batches=amount, max_epochs=2).fit(module, loader, other)
    assert module.seen == [[0, 1], [2, 3]] * 2
    assert module.seen_in_validation == module.seen


def test_reload_dataloaders(tmp_path):
    class Module(Traced):
        made: list[str] = []

        def train_dataloader(self):
            self.made.append(f"train{self.current_epoch}")
            return numbers(*range(self.current_epoch + 1))

        def val_dataloader(self):
            self.made.append(f"val{self.current_epoch}")
            return numbers(1)

    module = Module()
    quiet(tmp_path, max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(module)
    assert module.made == ["train0", "val0", "train2", "val2", "train4", "val4"]
    assert [t for t in module.trace if t[0] == "T"] == (
        ["T0.0", "T1.0"] + [f"T{e}.{i}" for e in (2, 3) for i in range(3)] + [f"T4.{i}" for i in range(5)]
    )


def test_a_loader_that_gives_fewer_batches_than_it_says(tmp_path):
    class Liar:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(numbers(1, 2))

    with pytest.raises(DataError, match="said that it has 3 batches and gave 2"):
        quiet(tmp_path).fit(Numbers(), Liar())


# -- stopping --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "epochs", "steps"),
    [
        ({}, 1, 2),  # right after the batch that asked
        ({"min_epochs": 3}, 3, 9),
        ({"min_epochs": 1}, 1, 3),  # the first epoch to its end
        ({"min_steps": 5}, 2, 5),
        ({"min_epochs": 2, "min_steps": 7}, 3, 7),
        ({"min_steps": 1}, 1, 2),
    ],
)
def test_should_stop(tmp_path, arguments, epochs, steps):
    class Module(Numbers):
        def on_train_batch_end(self):
            if self.global_step == 2:
                self.trainer.should_stop = True

    trainer = quiet(tmp_path, max_epochs=10, **arguments)
    trainer.fit(Module(), numbers(1, 1, 1))
    assert (trainer.current_epoch, trainer.global_step) == (epochs, steps)


def test_a_request_to_stop_does_not_reach_the_next_fit(tmp_path):
    class Module(Numbers):
        def on_train_start(self):
            self.trainer.should_stop = True

    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(Module(), numbers(1))
    assert trainer.global_step == 0
    trainer.fit(Numbers(), numbers(1))
    assert trainer.global_step == 2


def test_max_time(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                time.sleep(0.3)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path, max_time=timedelta(seconds=0.3))
    trainer.fit(Module(), numbers(*[1] * 50000))
    assert trainer.global_step >= 4 and trainer.global_step < 50000 and trainer.current_epoch == 1


# -- evaluation ------------------------------------------------------------------------------------------------------
class Modes(Net):
    """A net of whose parts one is kept in evaluation mode by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Dropout()
        self.kept.eval()

    def validation_step(self, batch, batch_idx):
        self.seen = (self.net.training, self.kept.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    test_step = predict_step = validation_step


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_evaluation_mode_gradients_off_and_each_submodules_mode_restored(tmp_path, entry, inference_mode):
    module = Modes()
    trainer = quiet(tmp_path, inference_mode=inference_mode)
    if entry == "fit":
        trainer.fit(module, batches(2), batches(1))
    else:
        getattr(trainer, entry)(module, batches(1))
    assert module.seen == (False, False, False, inference_mode)
    assert module.net.training and module.training and not module.kept.training
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_a_failure(tmp_path):
    class Failing(Modes):
        def validation_step(self, batch, batch_idx):
            raise ValueError("here")

    module = Failing()
    with pytest.raises(ValueError, match="here"):
        quiet(tmp_path).validate(module, batches(1))
    assert module.net.training and not module.kept.training and torch.is_grad_enabled()


def test_own_model_eval_and_train_may_call_super(tmp_path):
    class Own(Modes):
        def on_validation_model_eval(self):
            super().on_validation_model_eval()
            self.net[0].train()

        def on_validation_model_train(self):
            super().on_validation_model_train()
            self.restored = (self.training, self.net.training, self.kept.training)

        def validation_step(self, batch, batch_idx):
            self.seen = (self.net[0].training, self.net[1].training)

    module = Own()
    quiet(tmp_path).validate(module, batches(1))
    assert module.seen == (True, False) and module.restored == (True, True, False)


def test_a_module_in_evaluation_mode_is_put_into_training_mode(tmp_path):
    module = Modes()
    module.eval()
    quiet(tmp_path).fit(module, batches(1))
    assert module.training and module.net.training


class Losses(Numbers):
    def validation_step(self, batch, batch_idx):
        self.log("value", batch.mean())
        return batch.sum()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self.validation_step(batch, batch_idx)

    def validation_epoch_end(self, outputs):
        self.outputs = outputs

    def predict_step(self, batch, batch_idx, dataloader_idx):
        return (dataloader_idx, batch * 10)


def test_several_loaders(tmp_path):
    first, second = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], [torch.tensor([5.0])]
    module, trainer = Losses(), quiet(tmp_path)
    metrics = trainer.validate(module, [first, second])
    assert metrics == [{"value/dataloader_idx_0": 3.0}, {"value/dataloader_idx_1": 5.0}]  # (1+2+6)/3: by sample
    assert [[float(o) for o in own] for own in module.outputs] == [[3.0, 6.0], [5.0]]
    trainer.fit(module, numbers(1), [first, second])
    assert float(trainer.callback_metrics["value/dataloader_idx_0"]) == 3.0
    assert trainer.test(module, first) == [{"value": 3.0}]


def test_predict_keeps_the_order_and_a_list_per_loader(tmp_path):
    module, trainer = Losses(), quiet(tmp_path)
    one = trainer.predict(module, numbers(3, 1, 2))
    assert [(i, float(v)) for i, v in one] == [(0, 30), (0, 10), (0, 20)]
    two = trainer.predict(module, [numbers(3, 1), numbers(2)])
    assert [[(i, float(v)) for i, v in own] for own in two] == [[(0, 30), (0, 10)], [(1, 20)]]
    assert not any(v.requires_grad for own in two for _, v in own)


def test_predict_without_predict_step_is_forward(tmp_path):
    module = Net()
    x = torch.ones(2, 5)
    (given,) = quiet(tmp_path).predict(module, [x])
    assert torch.equal(given, module(x).detach())


@pytest.mark.parametrize("overrides", [True, False])
def test_evaluation_keeps_outputs_only_where_an_epoch_end_hook_asks(tmp_path, overrides):
    import weakref

    alive: list[Any] = []
    most = 0

    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            box = type("Box", (), {})()
            alive.append(weakref.ref(box))
            return {"box": box}

    if overrides:
        Module.validation_epoch_end = lambda self, outputs: None
    quiet(tmp_path).validate(Module(), numbers(1, 2, 3, 4))
    assert most == 3 if overrides else most <= 1


# -- random numbers and settings of torch ----------------------------------------------------------------------------
def test_seed_makes_a_fit_repeatable(tmp_path):
    def weights(seed):
        module = Net(dropout=0.5)
        quiet(tmp_path, seed=seed).fit(module, batches())
        return module.state_dict()

    first = weights(3)
    torch.rand(7)
    assert_same(dict(weights(3)), dict(first))
    assert not torch.equal(weights(4)["net.0.weight"], first["net.0.weight"])


@pytest.mark.parametrize(
    ("value", "expected"), [(True, (True, False)), ("warn", (True, True)), (False, (False, False))]
)
def test_deterministic_holds_for_the_run_alone(tmp_path, value, expected):
    def now():
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    class Module(Numbers):
        def on_train_start(self):
            self.during = now()

    module = Module()
    quiet(tmp_path, deterministic=value).fit(module, numbers(1))
    assert module.during == expected and now() == (False, False)


# -- callbacks -------------------------------------------------------------------------------------------------------
class Watch(raylit.Callback):
    def __init__(self, name: str) -> None:
        self.name, self.calls, self.errors = name, [], []

    def on_train_start(self, trainer, module):
        self.calls.append((trainer.callbacks, module))

    def on_exception(self, trainer, module, exception):
        self.errors.append((exception, trainer.state.value, module.global_step))


def test_configure_callbacks_replaces_those_of_the_same_type(tmp_path):
    class Other(raylit.Callback):
        pass

    class Module(Numbers):
        def configure_callbacks(self):
            return self.own

    given, other, own = Watch("trainer"), Other(), Watch("module")
    module = Module()
    module.own = own
    trainer = quiet(tmp_path, callbacks=[given, other])
    trainer.fit(module, numbers(1))
    assert trainer.callbacks == [other, own]
    assert not given.calls and own.calls == [([other, own], module)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_exceptions_say_where_and_reach_on_exception(tmp_path, kind):
    class Module(Traced):
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (1, 2):
                raise kind("here")
            return super().training_step(batch, batch_idx)

    watch, module = Watch("w"), Module()
    trainer = quiet(tmp_path, max_epochs=3, callbacks=watch)
    with pytest.raises(kind) as caught:
        trainer.fit(module, numbers(1, 1, 1))
    ((error, state, step),) = watch.errors
    assert error.raylit_where == {"stage": "fit", "global_step": 5, "epoch": 1, "batch_idx": 2, "loop": "train"}
    assert step == 5 and state == ("interrupted" if kind is KeyboardInterrupt else "failed") == trainer.state.value
    if kind is ValueError:
        assert caught.value is error
    assert module._run is None
    # The same objects go on to train.
    trainer.fit(Numbers(), numbers(1))
    assert trainer.state.value == "finished"


def test_exceptions_in_validation_and_test_say_so(tmp_path):
    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("here")

        test_step = validation_step

    with pytest.raises(RuntimeError) as caught:
        quiet(tmp_path).fit(Module(), numbers(1, 1), numbers(1))
    assert caught.value.raylit_where == {
        "stage": "fit",
        "global_step": 2,
        "epoch": 0,
        "batch_idx": 1,
        "loop": "validation",
    }
    with pytest.raises(RuntimeError) as caught:
        quiet(tmp_path).test(Module(), numbers(1))
    assert caught.value.raylit_where == {"stage": "test", "global_step": 0, "loop": "test"}


# -- where log may be called -----------------------------------------------------------------------------------------
BATCH_HOOKS = ["training_step", "on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward",
               "on_before_zero_grad", "on_before_optimizer_step"]  # fmt: skip
EPOCH_HOOKS = ["on_epoch_start", "on_train_epoch_start", "training_epoch_end", "on_train_epoch_end", "on_epoch_end",
               "on_validation_start", "on_validation_epoch_start", "validation_epoch_end",
               "on_validation_epoch_end"]  # fmt: skip
NO_EPOCH_HOOKS = ["on_fit_start", "setup", "configure_optimizers", "on_pretrain_routine_end", "on_train_start",
                  "on_train_end", "on_validation_end", "teardown", "on_fit_end"]  # fmt: skip


def logging_in(hook: str, **settings: Any) -> raylit.Module:
    class Module(Numbers):
        def validation_step(self, batch, batch_idx):
            pass

    inner = getattr(Module, hook)

    def override(self, *args):
        self.log("x", 4.0, **settings)
        self.logged = True
        return inner(self, *args)

    setattr(Module, hook, override)
    return Module()


@pytest.mark.parametrize("hook", BATCH_HOOKS + EPOCH_HOOKS)
def test_log_in_hooks_that_have_an_epoch(tmp_path, hook):
    trainer = quiet(tmp_path, log_every_n_steps=1)
    trainer.fit(logging_in(hook), numbers(1, 2), numbers(1))
    assert float(trainer.callback_metrics["x"]) == 4.0
    rows = trainer.history.column("x").drop_null().to_pylist()
    # A step's value for each batch by default, else one for the epoch.
    assert rows == [4.0] * (2 if hook in BATCH_HOOKS else 1)


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_batch_start", "on_validation_batch_end"])
def test_log_in_validation_batches_is_of_the_epoch(tmp_path, hook):
    trainer = quiet(tmp_path)
    trainer.fit(logging_in(hook), numbers(1, 2), numbers(1, 2, 3))
    assert trainer.history.column("x").drop_null().to_pylist() == [4.0]


@pytest.mark.parametrize("hook", NO_EPOCH_HOOKS)
def test_log_outside_an_epoch_is_an_error(tmp_path, hook):
    module = logging_in(hook)
    with pytest.raises(LogError, match="no epoch"):
        quiet(tmp_path).fit(module, numbers(1), numbers(1))


@pytest.mark.parametrize("hook", EPOCH_HOOKS[:5])
def test_on_step_in_an_epoch_hook_is_an_error(tmp_path, hook):
    with pytest.raises(LogError, match="on_step in an epoch hook"):
        quiet(tmp_path).fit(logging_in(hook, on_step=True), numbers(1), numbers(1))


def test_log_in_callbacks_goes_through_the_module(tmp_path):
    class Logs(raylit.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("from_callback", batch_idx, on_step=False, on_epoch=True, batch_size=1)

    trainer = quiet(tmp_path, callbacks=Logs())
    trainer.fit(Numbers(), numbers(1, 2, 3))
    assert float(trainer.callback_metrics["from_callback"]) == 1.0


def test_step_values_are_there_for_callbacks_and_after_a_short_run(tmp_path):
    seen = []

    class Reads(raylit.Callback):
        def on_train_batch_end(self, trainer, module):
            seen.append((float(trainer.callback_metrics["loss"]), dict(trainer.logged_metrics)))
            seen.append(float(module.get_progress_bar_dict()["shown"]))

    class Module(Numbers):
        def training_step(self, batch, batch_idx):
            self.log("loss", batch.sum())
            self.log("shown", batch.sum(), prog_bar=True)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path, callbacks=Reads())
    trainer.fit(Module(), numbers(1, 2))
    assert seen == [(1.0, {}), 1.0, (2.0, {}), 2.0]
    assert float(trainer.callback_metrics["loss"]) == 2.0 and float(trainer.progress_bar_metrics["shown"]) == 2.0


def test_log_outside_a_run_warns_once_and_does_nothing():
    from raylit import module as module_file

    module_file._warned.clear()
    with pytest.warns(UserWarning, match="outside a run does nothing"):
        Numbers().log("x", 1.0)
    Numbers().log("x", 1.0)


# -- properties ------------------------------------------------------------------------------------------------------
def properties(module: raylit.Module) -> dict[str, Any]:
    names = """current_epoch global_step global_rank local_rank node_rank world_size device dtype hparams logger loggers
        datamodule precision use_amp use_ddp use_ddp2 use_dp use_tpu on_gpu automatic_optimization truncated_bptt_steps
        example_input_array""".split()
    return {name: getattr(module, name) for name in names}


def test_module_properties_before_during_and_after(tmp_path):
    class Module(Numbers):
        def on_train_epoch_end(self):
            self.during = properties(self)
            self.in_run = (self.trainer, self.optimizers(), self.lr_schedulers(), self.trainer.model)

    class Data(raylit.DataModule):
        def train_dataloader(self):
            assert self.trainer is not None
            return numbers(1, 2)

    module, data = Module(), Data()
    before = properties(module)
    assert before == {
        "current_epoch": 0, "global_step": 0, "global_rank": 0, "local_rank": 0, "node_rank": 0, "world_size": 1,
        "device": torch.device("cpu"), "dtype": torch.float32, "hparams": {}, "logger": None, "loggers": [],
        "datamodule": None, "precision": "32-true", "use_amp": False, "use_ddp": False, "use_ddp2": False,
        "use_dp": False, "use_tpu": False, "on_gpu": False, "automatic_optimization": True, "truncated_bptt_steps": 0,
        "example_input_array": None,
    }  # fmt: skip
    with pytest.raises(NotAttachedError, match=r"Module.trainer needs a run"):
        _ = module.trainer
    trainer = quiet(tmp_path, precision="bf16-mixed", max_epochs=2)
    trainer.fit(module, datamodule=data)
    changed = {"current_epoch": 1, "global_step": 4, "datamodule": data, "precision": "bf16-mixed", "use_amp": True}
    assert module.during == {**before, **changed}
    assert module.in_run == (trainer, trainer.optimizers[0], None, module)
    # Afterwards they tell of the run that was.
    assert properties(module) == {**before, **changed, "current_epoch": 2}
    assert data.trainer is None
    for call in (lambda: module.trainer, module.optimizers, module.lr_schedulers):
        with pytest.raises(NotAttachedError):
            call()
    assert trainer.current_epoch == 2 and trainer.global_step == 4 and trainer.state.value == "finished"


def test_trainer_properties(tmp_path):
    seen = {}

    class Module(Numbers):
        def note(self, where):
            t = self.trainer
            seen[where] = (
                t.state.value,
                str(t.stage),
                t.training,
                t.sanity_checking,
                t.current_epoch,
                t.num_training_batches,
            )

        def on_fit_start(self):
            self.note("fit start")

        def validation_step(self, batch, batch_idx):
            self.note("sanity" if self.trainer.sanity_checking else "validation")

        def on_train_batch_end(self):
            self.note("batch")

        def on_fit_end(self):
            self.note("fit end")

    trainer = quiet(tmp_path, num_sanity_val_steps=1)
    assert (trainer.state.value, trainer.stage, trainer.model, trainer.global_step) == ("initializing", None, None, 0)
    assert trainer.is_global_zero and trainer.world_size == 1 and trainer.history is None
    module = Module()
    trainer.fit(module, numbers(1, 2), numbers(1))
    assert seen == {
        "fit start": ("running", "fit", False, False, 0, 0),
        "sanity": ("running", "fit", False, True, 0, 2),
        "batch": ("running", "fit", True, False, 0, 2),
        "validation": ("running", "fit", False, False, 0, 2),
        "fit end": ("running", "fit", False, False, 1, 2),
    }
    assert trainer.model is module and trainer.state.value == "finished"


# -- the Module as an object -----------------------------------------------------------------------------------------
class Copies(Net):
    """At module level, so that it can be pickled."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            self.__dict__["twin"] = copy.deepcopy(self)
            self.__dict__["pickled"] = pickle.dumps(self.twin)
            assert self.trainer.model is self
        return loss


def test_deepcopy_and_pickle_in_a_hook_and_after_the_run(tmp_path):
    module = Copies()
    trainer = quiet(tmp_path)
    trainer.fit(module, batches(3))
    assert "_run" not in module.__dict__
    for other in (module.twin, pickle.loads(module.pickled)):
        assert "_run" not in other.__dict__ and other.current_epoch == 0
        assert not torch.equal(other.net[0].weight, module.net[0].weight)  # of batch 1, not of the end
        with pytest.raises(NotAttachedError):
            _ = other.trainer
    after = pickle.loads(pickle.dumps(module))
    assert_same(dict(after.state_dict()), dict(module.state_dict()))
    trainer.fit(after, batches(2))  # and it trains


def test_pickling_the_module_itself_within_a_run(tmp_path):
    class Saves(raylit.Callback):
        def on_train_batch_end(self, trainer, module):
            self.data = pickle.dumps(module)

    saves = Saves()
    module = Copies()
    quiet(tmp_path, callbacks=saves).fit(module, batches(1))
    assert_same(dict(pickle.loads(saves.data).state_dict()), dict(module.state_dict()))


def test_a_module_that_keeps_its_trainer_can_be_pickled(tmp_path):
    module = Copies()
    trainer = quiet(tmp_path)
    trainer.fit(module, batches(1))
    module.keeps = trainer
    assert pickle.loads(pickle.dumps(module)).keeps.global_step == 0


def test_batch_transfer_hooks_of_lightning_2_call_super(tmp_path):
    class Module(Numbers):
        notes: list[Any] = []

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return super().on_before_batch_transfer(batch, dataloader_idx) + 1

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.notes.append((device, dataloader_idx))
            return super().transfer_batch_to_device(batch, device, dataloader_idx) * 2

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return super().on_after_batch_transfer(batch, dataloader_idx) + 100

        def validation_step(self, batch, batch_idx):
            self.log("seen", batch.sum())

    module = Module()
    trainer = quiet(tmp_path)
    trainer.fit(module, numbers(3), numbers(4))
    assert module.weight.item() == -108.0 and float(trainer.callback_metrics["seen"]) == 110.0
    assert module.notes == [(torch.device("cpu"), 0)] * 2


def test_data_from_a_dataset_is_not_touched(tmp_path):
    data = samples(8)
    before = [t.clone() for t in data.tensors]
    quiet(tmp_path).fit(Net(), DataLoader(data, batch_size=4))
    assert_same(list(data.tensors), before)
