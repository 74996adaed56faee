"""Runs on an S3 storage, over the real protocol: pyarrow's client against moto's server, both in this process."""

from __future__ import annotations

import io
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.fs
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylit
from raylit.callbacks import ModelCheckpoint
from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.cli.checkpoints import show, store_of_run
from raylit.errors import CheckpointError, ConfigError, RunExistsError

pytest.importorskip("moto", reason="needs moto, which the extra 'test' installs")
pytest.importorskip("flask_cors", reason="needs flask-cors, which the extra 'test' installs")

KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfi"
BATCHES = 8  # an epoch


class Server:
    """moto's S3 on a port of its own; ``refuse`` so many requests with 503, or take it away for a while."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.left_to_refuse, self.refused, self.gone = 0, 0, 0
        self.port = 0
        self.start()

    def start(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def away_for(self, seconds: float) -> None:
        """Close the port, and open it again later."""
        self.stop()
        self.gone += 1
        threading.Timer(seconds, self.start).start()

    def __call__(self, environ: Any, start_response: Callable[..., Any]) -> Any:
        if self.left_to_refuse > 0:
            self.left_to_refuse -= 1
            self.refused += 1
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start_response)

    def uri(self, path: str, *, key: str = KEY, secret: str = SECRET) -> str:
        login = f"{key}:{quote(secret, safe='')}@"
        return f"s3://{login}{path}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{self.port}"

    @property
    def filesystem(self) -> pyarrow.fs.S3FileSystem:
        return pyarrow.fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, scheme="http", endpoint_override=f"127.0.0.1:{self.port}",
            region="us-east-1", allow_bucket_creation=True,
        )  # fmt: skip

    def everything(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        files = self.filesystem.get_file_info(pyarrow.fs.FileSelector(bucket, recursive=True))
        return {each.path: self.filesystem.open_input_stream(each.path).read() for each in files if each.is_file}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    level = logging.getLogger("werkzeug").level
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    yield server
    server.stop()
    logging.getLogger("werkzeug").setLevel(level)


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    name = f"bucket-{abs(hash(request.node.name))}"
    server.filesystem.create_dir(name)
    return name


class Net(raylit.Module):
    """``at`` (a step, and what happens then) is of a callback below: the Module is only the training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.dropout(self.layer(batch[0]), 0.3).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("size", sum(each.square().sum() for each in self.parameters()))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class At(raylit.Callback):
    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def data() -> DataLoader[Any]:
    x = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)


def quiet_trainer(storage: str, **given: Any) -> raylit.Trainer:
    return raylit.Trainer(
        num_workers=0, use_gpu=False, seed=3, storage_path=storage, log_every_n_steps=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **given,
    )  # fmt: skip


def fit(
    storage: str, *callbacks: Any, epochs: int = 2, name: str = "run", **given: Any
) -> tuple[Net, raylit.Trainer, Any]:
    torch.manual_seed(1)
    module = Net()
    trainer = quiet_trainer(storage, name=name, max_epochs=epochs, callbacks=list(callbacks), **given)
    return module, trainer, trainer.fit(module, data())


def fit_on(uri: str) -> raylit.Trainer:
    """A fit of its own, from the checkpoint at ``uri``."""
    trainer = quiet_trainer("fsspec+memory://elsewhere", max_epochs=3, enable_checkpointing=False)
    trainer.fit(Net(), data(), ckpt_path=uri)
    return trainer


def store_in(server: Server, folder: str) -> Store:
    return Store(Folder(f"{folder}/checkpoints", server.filesystem))


def same(module: Net, other: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """All that a person sees: what was printed, logged and warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")

        def everything() -> str:
            out, err = capfd.readouterr()
            return "\n".join([out, err, caplog.text, *(str(each.message) for each in told)])

        yield everything


def test_a_fit_keeps_whole_checkpoints_and_goes_on_from_them(
    server: Server, bucket: str, tmp_path: Path, shown: Callable[[], str]
) -> None:
    uri = server.uri(f"{bucket}/runs")
    module, _, result = fit(uri, ModelCheckpoint(monitor="loss_epoch", every_n_epochs=1, save_last=True))
    store = store_in(server, f"{bucket}/runs/run")
    kept = store.manifests()
    assert [each.step for each in kept][-1] == 2 * BATCHES
    assert not any(store.faults(each) for each in kept)
    assert same(Net.load_from_checkpoint(result.checkpoint), module)

    on, _, _ = fit(
        uri, ModelCheckpoint(monitor="loss_epoch", every_n_epochs=1, save_last=True), epochs=4, resume="auto"
    )
    never_stopped, _, _ = fit(str(tmp_path), epochs=4)
    assert same(on, never_stopped)
    assert store.newest().step == 4 * BATCHES  # type: ignore[union-attr]

    stored = server.filesystem.open_input_file(f"{bucket}/runs/run/history.parquet")
    expected = pyarrow.parquet.read_table(tmp_path / "run" / "history.parquet")
    assert pyarrow.parquet.read_table(stored).equals(expected) and expected.num_rows >= 4 * BATCHES
    # Neither on the screen nor in any file of the storage.
    assert SECRET not in shown() and KEY not in shown()
    for name, content in server.everything(bucket).items():
        assert SECRET.encode() not in content and quote(SECRET, safe="").encode() not in content, name


def test_last_and_best_are_found_by_the_runs_name(server: Server, bucket: str) -> None:
    uri = server.uri(f"{bucket}/runs")
    _, trainer, _ = fit(uri, ModelCheckpoint(monitor="loss_epoch", save_top_k=1))
    best = trainer.checkpoint_callback.best_model_path
    assert best.startswith(f"{bucket}/runs/run/checkpoints/")
    again = quiet_trainer(uri, name="run", max_epochs=3)
    again.fit(Net(), data(), ckpt_path="last")
    assert again.global_step == 3 * BATCHES

    kept = min(store_in(server, f"{bucket}/runs/run").manifests(), key=lambda each: each.metrics["loss_epoch"])
    weights = server.filesystem.open_input_file(f"{bucket}/runs/run/checkpoints/{kept.name}/model.ckpt").read()
    state = torch.load(io.BytesIO(weights), weights_only=True)["state_dict"]
    tested = quiet_trainer(uri, name="run").test(Net(), data(), ckpt_path="best")
    assert tested[0]["size"] == pytest.approx(float(sum(each.square().sum() for each in state.values())))


@pytest.mark.parametrize("how", ["503", "gone"])
def test_a_server_that_is_away_for_a_while_costs_nothing(server: Server, bucket: str, how: str, tmp_path: Path) -> None:
    # 503 more often than the client tries again of itself (30 times), so that an operation fails; or nobody listens.
    def away() -> None:
        if how == "503":
            server.left_to_refuse = 40
        else:
            server.away_for(1.0)

    server.refused = server.gone = 0
    saver = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, save_last=False)
    module, _, _ = fit(server.uri(f"{bucket}/runs"), saver, At(6, away))
    assert server.refused == 40 or server.gone == 1
    store = store_in(server, f"{bucket}/runs/run")
    assert [each.step for each in store.manifests()] == [4, 8, 12, 16]
    assert not any(found.faults or store.faults(found.manifest) for found in store.survey())  # type: ignore[arg-type]
    untouched, _, _ = fit(str(tmp_path))
    assert same(module, untouched)


def test_a_uri_may_hold_options_wherever_a_checkpoint_is_named(server: Server, bucket: str) -> None:
    fit(server.uri(f"{bucket}/runs"), ModelCheckpoint(every_n_train_steps=4, save_top_k=-1))
    store = store_in(server, f"{bucket}/runs/run")
    name = store.manifests()[1].name
    uri = server.uri(f"{bucket}/runs/run/checkpoints/{name}")
    assert fit_on(uri).global_step == 3 * BATCHES
    listed, _ = store_of_run(server.uri(f"{bucket}/runs/run"))
    assert [each.name for each in listed.manifests()] == [each.name for each in store.manifests()]
    assert SECRET not in listed.folder.path

    # A damaged one is told from a whole one there too.
    manifest = f"{bucket}/runs/run/checkpoints/{name}/manifest.json"
    content = json.loads(server.filesystem.open_input_stream(manifest).read())
    content["files"]["model.ckpt"]["size_bytes"] += 1
    with server.filesystem.open_output_stream(manifest) as stream:
        stream.write(json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="model.ckpt is truncated") as caught:
        fit_on(uri)
    assert SECRET not in str(caught.value) and quote(SECRET, safe="") not in str(caught.value)


def secret_in(text: str) -> bool:
    return SECRET in text or quote(SECRET, safe="") in text


def test_no_error_shows_the_credentials(server: Server, bucket: str, shown: Callable[[], str]) -> None:
    fit(server.uri(f"{bucket}/runs"))
    nowhere = server.uri("no-such-bucket/runs")
    attempts: list[tuple[type[Exception], Callable[[], Any]]] = [
        (RunExistsError, lambda: fit(server.uri(f"{bucket}/runs"))),
        (ConfigError, lambda: fit(nowhere)),
        (ConfigError, lambda: fit(server.uri(f"{bucket}/runs").replace("scheme=http", "scheme=what"))),
        (ConfigError, lambda: fit(server.uri(f"{bucket}/runs").replace("s3://", "s4://"))),
        (ConfigError, lambda: fit("out", ModelCheckpoint(dirpath=nowhere))),
        (CheckpointError, lambda: fit_on(server.uri(f"{bucket}/runs/none"))),
        (CheckpointError, lambda: fit_on(server.uri(f"{bucket}/runs/run/history.parquet"))),
        (CheckpointError, lambda: Net.load_from_checkpoint(server.uri(f"{bucket}/nothing"))),
        (CheckpointError, lambda: Net.load_from_checkpoint(nowhere)),
        (CheckpointError, lambda: show(nowhere)),
    ]
    for kind, attempt in attempts:
        with pytest.raises(kind) as caught:
            attempt()
        text = "".join(str(each) for each in (caught.value, caught.value.__cause__))
        assert not secret_in(text), text
    _, trainer, _ = fit(server.uri(f"{bucket}/runs"), name="other")
    with pytest.raises(CheckpointError) as written:
        trainer.save_checkpoint(server.uri("no-such-bucket/file.ckpt"))
    assert not secret_in(str(written.value))
    assert not secret_in(repr(trainer._config)) and not secret_in(shown())
