"""Contract 3 and 9: ``load_from_checkpoint``, from every kind of path and of every kind of class; strangers' files."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.checkpoint import FILE_NAME, read
from raylit.errors import CheckpointError, UnknownArgumentError
from tests.unit.engine.small import Numbers, numbers, quiet


class Net(raylit.Module):
    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def trained(folder: Path, module: raylit.Module) -> Any:
    return quiet(folder, enable_checkpointing=True).fit(module, [torch.ones(2, 3)]).checkpoint


def assert_same_weights(mine: nn.Module, other: nn.Module) -> None:
    assert mine.state_dict().keys() == other.state_dict().keys()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def save(folder: Path, module: nn.Module, **content: Any) -> Path:
    """Write a file by hand, as another library might have."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.save({"state_dict": module.state_dict(), **content}, folder / FILE_NAME)
    return folder / FILE_NAME


# -- where it lies ---------------------------------------------------------------------------------------------------
def test_file_folder_uri_and_ray_checkpoint_are_the_same(tmp_path: Path) -> None:
    module = Net(4)
    checkpoint = trained(tmp_path, module)
    from ray.train import Checkpoint

    folder = Path(checkpoint.path)
    memory = pyarrow.fs.SubTreeFileSystem(str(folder.parent), pyarrow.fs.LocalFileSystem())
    for path in (
        folder, str(folder), folder / FILE_NAME, str(folder / FILE_NAME), checkpoint, Checkpoint(str(folder)),
        Checkpoint(folder.name, filesystem=memory), folder.as_uri(), (folder / FILE_NAME).as_uri(),
    ):  # fmt: skip
        loaded = Net.load_from_checkpoint(path)
        assert_same_weights(loaded, module)
        assert loaded.hparams == {"width": 4, "lr": 0.1}


def test_on_a_filesystem_that_is_no_disk(tmp_path: Path) -> None:
    module = Net(4)
    folder = Path(trained(tmp_path, module).path)
    mock, local = pyarrow.fs._MockFileSystem(), pyarrow.fs.LocalFileSystem()
    mock.create_dir("mock-bucket/run/checkpoint")
    pyarrow.fs.copy_files(
        str(folder), "mock-bucket/run/checkpoint", source_filesystem=local, destination_filesystem=mock
    )
    from ray.train import Checkpoint

    assert_same_weights(Net.load_from_checkpoint(Checkpoint("mock-bucket/run/checkpoint", filesystem=mock)), module)


def test_a_folder_of_lightnings_or_rays_with_one_file_of_another_name(tmp_path: Path) -> None:
    module = Net(4)
    save(tmp_path, module, hyper_parameters={"width": 4}).rename(tmp_path / "epoch=3-step=12.ckpt")
    for path in (tmp_path, tmp_path.as_uri()):
        assert_same_weights(Net.load_from_checkpoint(path), module)
    (tmp_path / "other.ckpt").write_bytes(b"")
    for path in (tmp_path, tmp_path.as_uri()):
        with pytest.raises(CheckpointError, match="it holds epoch=3-step=12.ckpt, other.ckpt"):
            Net.load_from_checkpoint(path)


def test_where_there_is_none_it_is_said_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "no.ckpt", "there is no checkpoint at .*no.ckpt"),
        (tmp_path / "empty", f"there is no checkpoint at .*empty' .looked for .*{FILE_NAME}"),
        ((tmp_path / "empty").as_uri(), "there is no checkpoint at 'file://"),
        ((tmp_path / "none").as_uri(), "there is no checkpoint at 'file://"),
        ("nosuch://bucket/x", "'nosuch://bucket/x' cannot be read"),
        (3, "a file, a folder, a URI, or a Ray Checkpoint; got a int"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Net.load_from_checkpoint(path)


# -- how the Module is built -----------------------------------------------------------------------------------------
def test_overrides_and_hparams_file_go_before_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, Net(4), hyper_parameters={"width": 4, "lr": 0.2})
    (tmp_path / "hparams.yaml").write_text("lr: 0.3\n")
    assert Net.load_from_checkpoint(path).hparams.lr == 0.2
    assert Net.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.yaml").hparams.lr == 0.3
    assert Net.load_from_checkpoint(path, hparams_file=str(tmp_path / "hparams.yaml"), lr=0.4).hparams.lr == 0.4
    with pytest.raises(UnknownArgumentError, match=r"widht=.*__init__ has no such argument.*Did you mean 'width'"):
        Net.load_from_checkpoint(path, widht=3)


def test_the_run_folders_own_yaml_serves_as_hparams_file(tmp_path: Path) -> None:
    trainer = quiet(tmp_path, enable_checkpointing=True, name="run")
    trainer.fit(Net(5), [torch.ones(2, 3)])
    path = save(tmp_path / "bare", Net(5))
    assert Net.load_from_checkpoint(path, hparams_file=tmp_path / "run" / "hparams.yaml").hparams.width == 5


def test_faults_of_an_hparams_file(tmp_path: Path) -> None:
    path = save(tmp_path, Net(4), hyper_parameters={"width": 4})
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"width: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, message in (("evil.yaml", "plain YAML"), ("list.yaml", "holds a list"), ("none.yaml", "No such file")):
        with pytest.raises(CheckpointError, match=message):
            Net.load_from_checkpoint(path, hparams_file=tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_required_arguments_that_were_not_saved_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, Net(4))
    with pytest.raises(CheckpointError, match=r"Net needs width, which the checkpoint does not have: pass width="):
        Net.load_from_checkpoint(path)
    assert_same_weights(Net.load_from_checkpoint(path, width=4), torch_net(path))


def torch_net(path: Path) -> nn.Module:
    module = Net(4)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


def test_strict(tmp_path: Path) -> None:
    content = Net(4).state_dict()
    content["old.weight"] = content.pop("layer.bias")
    save(tmp_path, nn.Module(), hyper_parameters={"width": 4})
    torch.save({"state_dict": content, "hyper_parameters": {"width": 4}}, tmp_path / FILE_NAME)
    with pytest.raises(CheckpointError, match="(?s)another model.*layer.bias.*old.weight"):
        Net.load_from_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="not in the checkpoint, so kept as constructed: layer.bias; not in the model: "
                                         "old.weight"):  # fmt: skip
        loaded = Net.load_from_checkpoint(tmp_path, strict=False)
    assert torch.equal(loaded.layer.weight, content["layer.weight"])
    with pytest.raises(CheckpointError, match="size mismatch"):
        Net.load_from_checkpoint(tmp_path, strict=False, width=5)


def test_map_location(tmp_path: Path) -> None:
    path = save(tmp_path, Net(4), hyper_parameters={"width": 4})
    seen: list[str] = []

    def locate(storage: Any, location: str) -> Any:
        seen.append(location)
        return storage

    for where in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, locate):
        assert Net.load_from_checkpoint(path, map_location=where).device == torch.device("cpu")
    assert "cpu" in seen


@pytest.mark.gpu
def test_map_location_brings_the_module_to_the_gpu_and_back(tmp_path: Path) -> None:
    path = save(tmp_path, Net(4).cuda(), hyper_parameters={"width": 4})
    assert Net.load_from_checkpoint(path).device.type == "cpu"
    assert Net.load_from_checkpoint(path, map_location="cuda").device.type == "cuda"


class Wide(Net):
    def __init__(self, extra: str = "x", **kwargs: Any) -> None:
        super().__init__(width=6, **kwargs)
        self.extra = extra


class Open(Net):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Strange(Net):
    def __init__(self, width: int, /, *sizes: int, lr: float = 0.3) -> None:
        super().__init__(width, lr)


def test_through_subclasses_that_take_and_pass_on_anything(tmp_path: Path) -> None:
    module = Wide("y", lr=0.5)
    loaded = Wide.load_from_checkpoint(trained(tmp_path, module))
    assert loaded.extra == "y" and loaded.hparams == {"extra": "y", "width": 6, "lr": 0.5}
    assert_same_weights(loaded, module)
    loaded = Wide.load_from_checkpoint(trained(tmp_path, module), lr=0.7, extra="z")
    assert loaded.hparams == {"extra": "z", "width": 6, "lr": 0.7}
    with pytest.raises(TypeError, match="multiple values for keyword argument 'width'"):
        Wide.load_from_checkpoint(trained(tmp_path, module), width=3)  # asked for, so not dropped
    assert Open.load_from_checkpoint(trained(tmp_path, Open(width=3, lr=0.2))).hparams == {"width": 3, "lr": 0.2}
    assert Strange.load_from_checkpoint(trained(tmp_path, Strange(3, 4, 5))).hparams == {"width": 3, "lr": 0.3}


class Kind(enum.Enum):
    FAST = "fast"
    SLOW = 2


@dataclasses.dataclass
class Optim:
    lr: float = 0.1
    kind: Kind = Kind.FAST


@dataclasses.dataclass
class Config:
    optim: Optim
    folder: Path | None = None
    sizes: tuple[int, ...] = (1, 2)


class OneConfig(Net):
    def __init__(self, config: Config) -> None:
        raylit.Module.__init__(self)
        self.save_hyperparameters(config)
        self.config = config
        self.layer = nn.Linear(3, config.sizes[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.config.optim.lr)


class OldStyle(Net):
    """Lightning 1.0: one Namespace or dict for everything."""

    def __init__(self, hparams: Any, verbose: bool = False) -> None:
        raylit.Module.__init__(self)
        self.hparams = hparams
        self.given = hparams
        self.layer = nn.Linear(3, self.hparams.width)


class Typed(OldStyle):
    def __init__(self, hparams: argparse.Namespace) -> None:
        super().__init__(hparams)


class Annotated(Net):
    def __init__(self, kind: Kind, folder: Path | str, optim: Optim | None = None, space: Any = None) -> None:
        super().__init__(3)
        self.got = (kind, folder, optim)


def test_one_object_is_given_back_as_one_object(tmp_path: Path) -> None:
    config = Config(Optim(0.5, Kind.SLOW), Path("a/b"), (4, 3))
    checkpoint = trained(tmp_path, OneConfig(config))
    assert read(checkpoint)["hparams_name"] == "config"
    assert OneConfig.load_from_checkpoint(checkpoint).config == config
    for given in (argparse.Namespace(width=4, lr=0.1), {"width": 4, "lr": 0.1}):
        checkpoint = trained(tmp_path, OldStyle(given))
        loaded = OldStyle.load_from_checkpoint(checkpoint)
        assert loaded.hparams == {"width": 4, "lr": 0.1} and loaded.given.lr == loaded.given["lr"] == 0.1
        assert OldStyle.load_from_checkpoint(checkpoint, lr=0.7).hparams == {"width": 4, "lr": 0.7}
        assert OldStyle.load_from_checkpoint(checkpoint, hparams=argparse.Namespace(width=4)).hparams == {"width": 4}
    loaded = Typed.load_from_checkpoint(trained(tmp_path, Typed(argparse.Namespace(width=4, lr=0.1))))
    assert loaded.given == argparse.Namespace(width=4, lr=0.1)


def test_one_object_that_was_saved_in_another_form(tmp_path: Path) -> None:
    class Vars(OldStyle):
        def __init__(self, hparams: argparse.Namespace, verbose: bool = False) -> None:
            raylit.Module.__init__(self)
            self.save_hyperparameters(vars(hparams))
            self.layer = nn.Linear(3, hparams.width)

    checkpoint = trained(tmp_path, Vars(argparse.Namespace(width=4, lr=0.1)))
    assert read(checkpoint)["hparams_name"] == "kwargs"
    assert Vars.load_from_checkpoint(checkpoint, verbose=True).hparams == {"width": 4, "lr": 0.1}
    path = save(tmp_path / "other", Net(4), hparams_name=None, hyper_parameters={"width": 4, "lr": 0.2})
    assert OldStyle.load_from_checkpoint(path).hparams.lr == 0.2


def test_annotated_arguments_get_their_types_back(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, Annotated(Kind.SLOW, Path("x/y"), Optim(0.5)))
    assert Annotated.load_from_checkpoint(checkpoint).got == (Kind.SLOW, Path("x/y"), Optim(0.5))
    assert Annotated.load_from_checkpoint(checkpoint, kind=Kind.FAST, optim=None).got[::2] == (Kind.FAST, None)
    # YAML has an enum's name.
    file = tmp_path / "hparams.yaml"
    file.write_text("kind: FAST\nfolder: z\noptim: {lr: 0.25, kind: SLOW}\n")
    loaded = Annotated.load_from_checkpoint(checkpoint, hparams_file=file)
    assert loaded.got == (Kind.FAST, Path("z"), Optim(0.25, Kind.SLOW))


def test_hooks_and_late_layers(tmp_path: Path) -> None:
    class Late(Numbers):
        def __init__(self) -> None:
            super().__init__()
            self.head: Any = None

        def configure_model(self) -> None:
            self.head = nn.Linear(2, 1)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = (checkpoint["epoch"], self.head is not None)
            checkpoint["state_dict"]["weight"] = torch.tensor(5.0)

    module = Late()
    result = quiet(tmp_path, enable_checkpointing=True).fit(module, numbers(1, 2))
    loaded = Late.load_from_checkpoint(result.checkpoint)
    assert loaded.seen[1] and loaded.weight.item() == 5.0
    assert torch.equal(loaded.head.weight, module.head.weight)
    assert loaded.training and all(p.requires_grad for p in loaded.parameters())


def test_a_datamodule(tmp_path: Path) -> None:
    class Data(raylit.DataModule):
        def __init__(self, folder: Path, size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.folder, self.count = folder, 0

        def train_dataloader(self) -> Any:
            self.count += 1
            return [torch.ones(self.hparams.size, 3)]

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    result = quiet(tmp_path, enable_checkpointing=True).fit(Net(4), datamodule=Data(Path("x"), 2))
    loaded = Data.load_from_checkpoint(result.checkpoint)
    assert (loaded.folder, loaded.hparams.size, loaded.count) == (Path("x"), 2, 1)
    assert Data.load_from_checkpoint(result.checkpoint, size=9).hparams.size == 9
    assert Net.load_from_checkpoint(result.checkpoint).hparams == {"width": 4, "lr": 0.1}
    with pytest.raises(CheckpointError, match="Data needs folder"):
        Data.load_from_checkpoint(save(tmp_path / "bare", Net(4)))


# -- files of Lightning's --------------------------------------------------------------------------------------------
def lightning_file(module: nn.Module, **more: Any) -> dict[str, Any]:
    """The keys and kinds of values that Lightning 2.x writes."""
    optimizer = torch.optim.Adam(module.parameters())
    return {
        "epoch": 2, "global_step": 30, "pytorch-lightning_version": "2.5.0", "state_dict": module.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2, "completed": 2}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val', 'mode': 'min'}": {
            "best_model_score": torch.tensor(0.5), "dirpath": "/x", "best_k_models": {}, "last_model_path": ""}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"width": 4, "lr": 0.2, "unknown": "y"}, **more,
    }  # fmt: skip


def test_a_file_as_lightning_2_writes_it(tmp_path: Path) -> None:
    module = Net(4)
    torch.save(lightning_file(module), tmp_path / "epoch=2.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert_same_weights(loaded, module)
    assert loaded.hparams == {"width": 4, "lr": 0.2}


def test_values_that_lightnings_files_hold_beside_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["lightning_fabric", "lightning_fabric.utilities", "lightning_fabric.utilities.data"]
    packages = [types.ModuleType(name) for name in names]
    cls = type("AttributeDict", (dict,), {"__module__": names[-1]})
    packages[-1].AttributeDict = cls  # type: ignore[attr-defined]
    for package in packages:
        monkeypatch.setitem(sys.modules, package.__name__, package)
    params = cls(width=4, lr=np.float64(0.25), path=Path("a/b"), space=argparse.Namespace(a=np.int64(1)))
    torch.save(lightning_file(Net(4), hyper_parameters=params), tmp_path / "old.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert Net.load_from_checkpoint(tmp_path / "old.ckpt").hparams == {"width": 4, "lr": 0.25}
    saved = read(tmp_path / "old.ckpt")["hyper_parameters"]
    assert saved["path"] == Path("a/b") and saved["space"].a == 1


def test_a_file_from_before_lightning_1(tmp_path: Path) -> None:
    module = Net(4)
    for key in ("hparams", "module_arguments"):
        content = {key: {"width": 4, "lr": 0.3}, "state_dict": module.state_dict()}
        torch.save(content, tmp_path / "old.ckpt")
        assert Net.load_from_checkpoint(tmp_path / "old.ckpt").hparams == {"width": 4, "lr": 0.3}


def test_ours_has_what_lightning_asks_for(tmp_path: Path) -> None:
    content = torch.load(Path(trained(tmp_path, Net(4)).path) / FILE_NAME, weights_only=True)
    assert {"state_dict", "epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks",
            "optimizer_states", "lr_schedulers", "hyper_parameters", "hparams_name"} <= content.keys()  # fmt: skip
    assert type(content["hyper_parameters"]) is dict and content["hparams_name"] == "kwargs"


# -- files of strangers ----------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


class State:
    def __setstate__(self, state: Any) -> None:
        os.mkdir(state)

    def __getstate__(self) -> Any:
        return self.path  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["alone", "hyper_parameters", "state_dict", "setstate", "bare_pickle", "builtin"])
def test_a_strangers_file_executes_nothing(place: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / FILE_NAME
    content: Any = {"state_dict": Net(4).state_dict(), "hyper_parameters": {"width": 4}}
    if place == "alone":
        content = Evil(marker)
    elif place == "hyper_parameters":
        content["hyper_parameters"]["lr"] = Evil(marker)
    elif place == "state_dict":
        content["state_dict"]["layer.weight"] = Evil(marker)
    elif place == "setstate":
        content["loops"] = State()
        content["loops"].path = str(marker)
    elif place == "builtin":
        content["x"] = collections.OrderedDict(a=argparse.Namespace(b=Evil(marker)))
    if place == "bare_pickle":
        path.write_bytes(pickle.dumps({**content, "x": Evil(marker)}))
    else:
        torch.save(content, path)
    trainer = quiet(tmp_path)
    for load in (
        lambda: Net.load_from_checkpoint(path), lambda: Net.load_from_checkpoint(tmp_path.as_uri()),
        lambda: trainer.fit(Net(4), [torch.ones(2, 3)], ckpt_path=path),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="holding more than tensors and plain values") as caught:
            load()
        assert "weights_only" not in str(caught.value) and "add_safe_globals" not in str(caught.value)
    assert not marker.exists()


def test_the_refusal_names_what_the_file_asks_for(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Evil(tmp_path / "ran")}, tmp_path / FILE_NAME)
    with pytest.raises(CheckpointError, match=r"it asks for posix\.mkdir, which is not let through"):
        Net.load_from_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no_weights", "a_list"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path, Net(4))
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    if damage == "no_weights":
        torch.save({"weights": 1}, path)
    elif damage == "a_list":
        torch.save([1], path)
    with pytest.raises(CheckpointError, match=f"{FILE_NAME} (cannot be loaded: damaged|is no checkpoint of a Module)"):
        Net.load_from_checkpoint(path)
