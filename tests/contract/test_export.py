"""Contract 3: ``to_onnx``, ``to_torchscript`` and ``export`` of trained Modules, against the Modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.errors import ConfigError, MissingDependencyError
from raylit.travel import Departure, pack, receive, unpack
from tests.unit.engine.small import quiet

KINDS = ["onnx", "script", "trace", "export"]


class Net(raylit.Module):
    """Dropout and batch norm, so that the mode matters; members that TorchScript cannot compile."""

    def __init__(self, width: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.norm = nn.Linear(3, width), nn.BatchNorm1d(width)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(width, 2)
        self.history: list[Any] = []
        self.callback = lambda: self.trainer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).relu()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        self.history.append({"rank": self.global_rank})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    @property
    def own(self) -> Any:
        """A person's property that cannot be compiled."""
        return {key: value for key, value in self.__dict__.items() if key not in ("a", 3)}


def batch(size: int = 5) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(1))


def expected(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` in evaluation mode, with the modes put back by hand."""
    modes = [each.training for each in module.modules()]
    module.eval()
    with torch.no_grad():
        out: Tensor = module(*args, **kwargs)
    for each, training in zip(module.modules(), modes):
        each.training = training
    return out


def exported(module: raylit.Module, kind: str, folder: Path, sample: Any = None) -> Callable[..., Any]:
    """Export to a file and return it, loaded from there, as a function of tensors."""
    if kind == "onnx":
        import onnxruntime

        module.to_onnx(folder / "made" / "m.onnx", sample)
        session = onnxruntime.InferenceSession(str(folder / "made" / "m.onnx"))
        names = [each.name for each in session.get_inputs()]
        return lambda *given: torch.from_numpy(session.run(None, dict(zip(names, map(np.asarray, given))))[0])
    if kind == "export":
        module.export(folder / "made" / "m.pt2", sample)
        return torch.export.load(folder / "made" / "m.pt2").module()
    module.to_torchscript(folder / "made" / "m.pt", kind, sample)
    return torch.jit.load(str(folder / "made" / "m.pt"))


def fitted(tmp_path: Path) -> Net:
    module = Net()
    quiet(tmp_path, max_epochs=2).fit(module, [batch(), batch(4)])
    return module


def came_home(tmp_path: Path) -> Net:
    """A Module as it is after a fit on workers: what rank 0 packed was put into it."""
    from raylit.assemble import RunSpec, run
    from raylit.config.trainer import parse_trainer_args
    from raylit.stage import Stage
    from raylit.view import RunState, WorkerTrainer
    from raylit.wire import World

    config = parse_trainer_args(num_workers=1, use_gpu=False, max_epochs=2, logger=False, enable_checkpointing=False)
    there, here = Net(), Net()
    spec = RunSpec(Stage.FIT, config, there, loaders={"train": [batch(), batch(4)]})
    departure = Departure.of(spec)
    view = WorkerTrainer(RunState())
    outcome = run(spec, World(), view, None, False)
    receive(unpack(pack(outcome, departure, view)), here, [], raylit.Trainer(num_workers=0))
    assert len(here.history) == 4 and torch.equal(here.last.weight, there.last.weight)
    return here


@pytest.mark.parametrize(
    ("made", "kind"), [*((fitted, kind) for kind in KINDS), *((came_home, kind) for kind in ("onnx", "script"))]
)
def test_the_file_computes_what_the_module_does(made: Callable[[Path], Net], kind: str, tmp_path: Path) -> None:
    module = made(tmp_path)
    loaded = exported(module, kind, tmp_path, batch())
    torch.testing.assert_close(loaded(batch()), expected(module, batch()), rtol=1e-5, atol=1e-5)
    assert sorted(entry.suffix for entry in (tmp_path / "made").iterdir()) == [
        {"onnx": ".onnx", "export": ".pt2"}.get(kind, ".pt")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_comes_out_as_it_went_in(kind: str, tmp_path: Path) -> None:
    module = fitted(tmp_path)
    module.train()
    module.norm.eval()
    module.first.requires_grad_(False)
    attributes = dict(module.__dict__)
    modes = [each.training for each in module.modules()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    grads = [parameter.requires_grad for parameter in module.parameters()]
    exported(module, kind, tmp_path, batch())
    assert type(module) is Net and module.__dict__ == attributes
    assert [each.training for each in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert module.current_epoch == 2 and torch.is_grad_enabled()
    if kind != "script":
        with pytest.raises(Exception, match="99|export"):
            exported(module, kind, tmp_path, torch.ones(5, 99))
        assert type(module) is Net and [each.training for each in module.modules()] == modes


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_run_is_in_the_file(kind: str, tmp_path: Path) -> None:
    module = fitted(tmp_path)
    module.example_input_array = torch.zeros(50_000, 3)
    exported(module, kind, tmp_path, batch())
    (file,) = (tmp_path / "made").iterdir()
    data = file.read_bytes()
    for word in (b"Trainer", b"_last_trainer", b"ModuleHandle", b"hparams", b"example_input_array"):
        assert word not in data, word
    assert len(data) < 100_000


@pytest.mark.parametrize("kind", ["script", "trace", "export"])
def test_in_a_hook_while_the_run_goes_on(kind: str, tmp_path: Path) -> None:
    class Exports(Net):
        def on_train_end(self) -> None:
            self.loaded = [exported(self, kind, tmp_path, batch())]  # in a list, so that it is no layer of this one
            self.after = (self.trainer.global_step, self.training)

    module = Exports()
    quiet(tmp_path).fit(module, [batch()])
    assert module.after == (1, True)
    torch.testing.assert_close(module.loaded[0](batch()), expected(module, batch()), rtol=1e-5, atol=1e-5)


class Two(raylit.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) - 2 * y


@pytest.mark.parametrize(
    ("kind", "form"),
    [("onnx", "dict"), *((kind, form) for kind in ("trace", "export") for form in ("tuple", "dict", "attribute"))],
)
def test_forms_of_the_sample(form: str, kind: str, tmp_path: Path) -> None:
    module = Two()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    sample: Any = {"tuple": (x, y), "dict": {"x": x, "y": y}, "attribute": None}[form]
    if form == "attribute":
        module.example_input_array = (x, y)
    loaded = exported(module, kind, tmp_path, sample)
    wanted = expected(module, x, y)
    got = loaded(x=x, y=y) if form == "dict" and kind != "onnx" else loaded(x, y)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["onnx", "trace", "export"])
def test_without_a_sample_it_is_said_where_one_may_come_from(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs an input: pass \w+=, or set self.example_input_array"):
        exported(Net(), kind, tmp_path)
    assert not (tmp_path / "made").exists()


def test_script_needs_no_sample_and_keeps_own_properties_where_it_can(tmp_path: Path) -> None:
    class Doubles(raylit.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.factor = 2.0

        @property
        def doubled(self) -> float:
            return self.factor * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.doubled

    module = Doubles()
    torch.testing.assert_close(module.to_torchscript()(batch()), expected(module, batch()))


def test_without_a_path_the_program_is_returned_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Net()
    for made in (module.to_torchscript(), module.to_torchscript(method="trace", example_inputs=batch())):
        torch.testing.assert_close(made(batch()), expected(module, batch()))
    program = module.export(example_inputs=batch(), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    torch.testing.assert_close(program.module()(batch(9)), expected(module, batch(9)))
    assert not list(tmp_path.iterdir())


def test_onnx_options_and_a_batch_size_that_varies(tmp_path: Path) -> None:
    import onnxruntime

    module = Net()
    module.to_onnx(str(tmp_path / "m.onnx"), batch(), input_names=["features"],
                   dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(None, {"features": batch(9).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected(module, batch(9)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingDependencyError, match=f"'{package}': pip install 'raylit.onnx.'"):
        Net().to_onnx(tmp_path / "m.onnx", batch())


def test_faults_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method='tracing'\): accepted are 'script' and 'trace'"):
        Net().to_torchscript(method="tracing")
    with pytest.raises(ConfigError, match="is a folder: give a file's name in it"):
        Net().export(tmp_path, batch())
    with pytest.raises(ConfigError, match="writes to a file of this machine; got 's3://b/m.onnx'"):
        Net().to_onnx("s3://b/m.onnx", batch())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_on_the_gpu_stays_there(kind: str, tmp_path: Path) -> None:
    module = Net().cuda()
    exported(module, kind, tmp_path, batch())
    assert module.device.type == "cuda" and all(p.device.type == "cuda" for p in module.parameters())
