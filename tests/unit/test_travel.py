"""What travels to the workers and what comes home, without workers: packed and unpacked in this process."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

import raylit
from raylit.assemble import RunOutcome, RunSpec
from raylit.config.trainer import parse_trainer_args
from raylit.engine.stages import StageResult
from raylit.errors import SerializationError
from raylit.stage import Stage, Status
from raylit.travel import Departure, Homecoming, pack, pack_spec, receive, unpack, unpack_spec, with_gpu
from raylit.view import RunState, WorkerTrainer


class Net(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.history: list[float] = []

    def describe(self) -> str:
        return "of " + type(self).__name__


class Watcher(raylit.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []


def spec_of(module: raylit.Module, *callbacks: raylit.Callback, datamodule: Any = None, loaders: Any = None) -> RunSpec:
    return RunSpec(
        Stage.FIT, parse_trainer_args(num_workers=2), module, datamodule, loaders or {}, callbacks=list(callbacks)
    )


def there_and_back(
    module: raylit.Module,
    change: Callable[..., None],
    *callbacks: raylit.Callback,
    trainer: Any = None,
    data: Any = None,
) -> Homecoming:
    """Send a module out, let ``change(module, callbacks, view)`` run there, bring it home."""
    spec, _ = unpack_spec(with_gpu(pack_spec(spec_of(module, *callbacks, datamodule=data)), False))
    assert spec.module is not module
    view = WorkerTrainer(RunState(datamodule=spec.datamodule))
    departure = Departure.of(spec)
    change(spec.module, spec.callbacks, view)
    state = view._state
    state.status, state.epoch, state.global_step = Status.FINISHED, 2, 7
    home = unpack(pack(RunOutcome(state, StageResult(), spec.module, spec.callbacks), departure, view))
    receive(home, module, list(callbacks), trainer, data)
    return home


def test_weights_buffers_and_flags_come_home_into_the_same_tensors() -> None:
    module = Net()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def change(there: Net, *rest: Any) -> None:
        with torch.no_grad():
            for parameter in there.parameters():
                parameter.fill_(3.0)
        there.count += 5
        there.first.weight.requires_grad_(False)
        there.second.eval()

    home = there_and_back(module, change)
    assert (home.epoch, home.global_step, home.status) == (2, 7, Status.FINISHED)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert tensor is tensors[name]
    assert all((p == 3.0).all() for p in module.parameters()) and module.count == 5
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert module.training and not module.second.training


def test_only_what_changed_comes_home() -> None:
    module = Net()
    module.table = kept = {"a": [1, 2]}
    module.first.note = "as it was"

    def change(there: Net, *rest: Any) -> None:
        there.history.append(0.5)
        there.first.extra = {"made": "there"}
        del there.second.gone

    module.second.gone = 1
    home = there_and_back(module, change)
    assert module.history == [0.5]
    assert module.table is kept
    assert module.first.extra == {"made": "there"} and module.first.note == "as it was"
    assert not hasattr(module.second, "gone")
    assert [*home.attributes[""].set, *home.attributes["first"].set] == ["history", "extra"]


def test_attributes_that_mean_the_modules_own_layers_still_do() -> None:
    """A plain list of layers must not come home as copies: forward would use them, and no optimizer would know them."""
    module = Net()
    module.order = [module.first, module.second]
    module.method = module.describe

    def change(there: Net, *rest: Any) -> None:
        with torch.no_grad():
            there.first.weight.fill_(1.0)
        there.order.append(there)
        there.optimizer = torch.optim.SGD(there.parameters(), lr=0.5)
        there.copies = {"ema": there.first.weight.detach().clone(), "tied": there.first.weight}

    there_and_back(module, change)
    assert module.order[0] is module.first and module.order[1] is module.second and module.order[2] is module
    assert module.method.__self__ is module
    assert module.optimizer.param_groups[0]["params"][0] is module.first.weight
    assert module.optimizer.param_groups[0]["lr"] == 0.5
    assert module.copies["tied"] is module.first.weight and module.copies["ema"] is not module.first.weight


def test_training_alone_changes_no_attribute_that_refers_to_a_layer() -> None:
    module = Net()
    module.order = before = [module.first]

    def change(there: Net, *rest: Any) -> None:
        with torch.no_grad():
            there.first.weight.fill_(1.0)

    there_and_back(module, change)
    assert module.order is before


def test_layers_made_in_setup_come_home() -> None:
    """``self.net = None`` in __init__ is a plain attribute, which would hide the layer of that name."""
    module = Net()
    module.net = None
    module.lazy = nn.LazyLinear(2)

    def change(there: Net, *rest: Any) -> None:
        there.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        there.net[0].note = "mine"
        there.net[0].weight = there.second.weight  # tied
        there.layers = [there.net[0], there.first]
        there.history.append(1.0)
        there.lazy(torch.ones(1, 5))
        there.net[0].bias.requires_grad_(False)

    there_and_back(module, change)
    assert isinstance(module.net, nn.Sequential) and module.net[0].note == "mine"
    assert module.layers[0] is module.net[0] and module.layers[1] is module.first
    assert module.net[0].weight is module.second.weight
    assert not module.net[0].bias.requires_grad
    assert module.history == [1.0] and module.lazy.weight.shape == (2, 5)
    assert "net.1.running_mean" in dict(module.named_buffers())
    assert sum(name.startswith("net.") for name, _ in module.named_parameters()) == 3
    assert module._run is None


def test_layers_that_are_gone_and_buffers_that_appeared() -> None:
    module = Net()

    def change(there: Net, *rest: Any) -> None:
        del there.second
        there.register_buffer("later", torch.ones(2))

    there_and_back(module, change)
    assert not hasattr(module, "second") and torch.equal(module.later, torch.ones(2))


def test_what_cannot_be_pickled_is_named_and_the_rest_comes_home() -> None:
    module, watcher = Net(), Watcher()

    def change(there: Net, callbacks: list[Any], view: Any) -> None:
        there.lock = threading.Lock()
        there.first.stream = (i for i in range(3))
        there.history.append(1.0)
        callbacks[0].lock, callbacks[0].seen = threading.Lock(), ["there"]

    with pytest.warns(UserWarning, match="cannot be pickled") as caught:
        there_and_back(module, change, watcher)
    (warning,) = caught
    assert str(warning.message).endswith(": model.lock, model.first.stream, callback Watcher.lock")
    assert warning.filename == __file__
    assert module.history == [1.0] and watcher.seen == ["there"]
    assert not hasattr(module, "lock")


def test_what_cannot_be_pickled_in_a_layer_made_in_setup() -> None:
    module = Net()

    def change(there: Net, *rest: Any) -> None:
        there.net = nn.Sequential(nn.Linear(1, 1))
        there.net[0].lock = threading.Lock()
        there.lock = threading.Lock()

    with pytest.warns(UserWarning, match="cannot be pickled") as caught:
        there_and_back(module, change)
    assert "model.net.0.lock" in str(caught[0].message) and "model.lock" in str(caught[0].message)
    assert isinstance(module.net[0], nn.Linear)


class Locked(Net):
    """Sees to its lock by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_what_getstate_leaves_out_is_neither_sent_nor_named() -> None:
    module = Locked()
    lock = module.lock
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there_and_back(module, lambda there, *rest: there.history.append(1.0))
    assert module.lock is lock and module.history == [1.0]


def test_callbacks_come_home_with_references_to_the_callers_objects() -> None:
    module, watcher, other = Net(), Watcher(), Watcher()
    data = raylit.DataModule()
    trainer = object()

    def change(there: Net, callbacks: list[Any], view: Any) -> None:
        callbacks[0].seen = [there, there.first, callbacks[1], view, view.datamodule]

    there_and_back(module, change, watcher, other, trainer=trainer, data=data)
    assert [id(each) for each in watcher.seen] == [id(e) for e in (module, module.first, other, trainer, data)]
    assert other.seen == []


def test_a_class_that_only_the_worker_knows() -> None:
    module = Net()

    class Odd:
        def __reduce__(self) -> Any:
            return (pickle.loads, (b"not a pickle",))

    def change(there: Net, *rest: Any) -> None:
        there.odd = Odd()
        there.history.append(1.0)

    with pytest.warns(UserWarning, match=r"model\.odd$"):
        there_and_back(module, change)
    assert module.history == [1.0]


def test_tensors_that_require_gradients_and_graphs_stay_out_of_the_way() -> None:
    module = Net()

    def change(there: Net, *rest: Any) -> None:
        there.last_loss = (there.first.weight**2).sum()

    there_and_back(module, change)
    assert module.last_loss.item() == pytest.approx((module.first.weight**2).sum().item())


# Out --------------------------------------------------------------------------------------------------------------


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_the_culprit_is_named() -> None:
    lock = threading.Lock()
    nested, data, watcher = Net(), raylit.DataModule(), Watcher()
    nested.first.options = {"a": [1, lock]}
    data.source = Holds(lock)
    watcher.seen.append(Holds((lock,)))
    cases = [
        (spec_of(nested), "model.first.options['a'][1] (a lock)"),
        (spec_of(Net(), datamodule=data), "datamodule.source.value (a lock)"),
        (spec_of(Net(), watcher), "callback Watcher.seen[0].value[0] (a lock)"),
        (
            spec_of(Net(), loaders={"train": torch.utils.data.DataLoader([1], collate_fn=lambda b, x=lock: b)}),
            "train loader.collate_fn (a function)",
        ),
    ]
    for spec, named in cases:
        with pytest.raises(SerializationError) as caught:
            pack_spec(spec)
        assert named in str(caught.value)
        assert "setup()" in str(caught.value)


def test_a_lambda_and_a_local_class_travel() -> None:
    class Local(Net):
        pass

    module = Local()
    module.loss = lambda x: x + 1
    there, use_gpu = unpack_spec(with_gpu(pack_spec(spec_of(module)), True))
    assert use_gpu and there.module.loss(1) == 2 and type(there.module).__name__ == "Local"
    assert cloudpickle.loads(cloudpickle.dumps(module)).loss(2) == 3
