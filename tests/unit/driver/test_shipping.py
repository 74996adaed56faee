"""What a connection carries to other nodes, by what ``ray.init`` was given; and the one error where a module lacks."""

from __future__ import annotations

import json
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from raylit.driver import cluster, shipping
from raylit.driver import project as projects
from raylit.errors import ConfigError
from raylit.search.display import worded
from raylit.wire import WorkerFailure
from raylit.worker.failure import rebuild


class FakeRay(types.ModuleType):
    """Ray as far as a connection goes; ``nodes_there``: of the cluster that is joined."""

    def __init__(self, nodes_there: int) -> None:
        super().__init__("ray")
        self.nodes_there, self.joined, self.jobs = nodes_there, False, 0
        self.given: list[dict[str, Any] | None] = []  # runtime environments, one a connection
        self.sent: list[list[str]] = []  # files of each package

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, runtime_env: dict[str, Any] | None, **more: Any) -> None:
        assert not self.joined
        self.joined, self.jobs = True, self.jobs + 1
        self.given.append(runtime_env)
        folder = (runtime_env or {}).get("working_dir", "")
        if folder.endswith(".zip"):
            with zipfile.ZipFile(folder) as package:
                self.sent.append(package.namelist())

    def shutdown(self) -> None:
        self.joined = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Labels": {}} for _ in range(self.nodes_there)]

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_job_id=lambda: f"{self.jobs:08d}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a project in it, whose script in ``train/`` runs; nothing of this machine's Ray is seen."""
    home = tmp_path / "home"
    own = home / "own"
    for name in ("train/main.py", "train/neighbour.py", "src/pkg/__init__.py", "pyproject.toml", "data/x"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("")
    (own / ".gitignore").write_text("data/\n")
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "KUBERAY_GEN_RAY_START_CMD", "RAY_CLUSTER_NAME", "PWD"):
        monkeypatch.delenv(name, raising=False)
    script_is(own / "train" / "main.py", monkeypatch)
    monkeypatch.syspath_prepend(str(own / "src"))
    monkeypatch.syspath_prepend(str(own / "train"))
    cluster._shipped.clear()
    return own


def script_is(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    if path is not None:
        main.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", main)


def ray_is(nodes: int, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(nodes)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


PROJECT = [".gitignore", "pyproject.toml", "src/pkg/__init__.py", "train/main.py", "train/neighbour.py"]


def test_alone_nothing_is_shipped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ray_is(1, monkeypatch)
    assert cluster.connect()
    assert ray.given == [None]
    assert cluster.shipped() == shipping.Shipped("00000001", "alone")
    assert not cluster.connect() and len(ray.given) == 1


def test_to_other_nodes_the_scripts_project(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ray_is(3, monkeypatch)
    assert cluster.connect({"env_vars": {"A": "1"}, "pip": ["x"]})
    assert ray.sent == [PROJECT]
    first, second = ray.given
    assert first == {"env_vars": {"A": "1"}, "pip": ["x"]}
    assert second is not None
    assert not Path(second.pop("working_dir")).exists()  # the package was for the connection alone
    # The folders of the script's import path, as they lie in the project.
    assert second == {"pip": ["x"], "env_vars": {"A": "1", "PYTHONPATH": "train:src", "RAYLIT_PROJECT": str(place)}}
    assert cluster.shipped() == shipping.Shipped("00000002", "project", place)


def test_nothing_is_shipped_twice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ray_is(3, monkeypatch)
    assert cluster.connect({"working_dir": "elsewhere"})
    assert ray.given == [{"working_dir": "elsewhere"}]
    assert cluster.shipped() == shipping.Shipped("00000001", "argument")
    ray.shutdown()
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert cluster.connect()
    assert ray.given[1:] == [None] and ray.sent == []
    assert cluster.shipped() == shipping.Shipped("00000002", "job")


def test_a_job_without_files_gets_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ray job submit -- python FILE`` on a head: that some variable speaks of a working_dir does not count."""
    ray = ray_is(3, monkeypatch)
    job = {"runtime_env": {"env_vars": {"NOTE": "working_dir", "PYTHONPATH": "/x"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert cluster.connect()
    assert ray.sent == [PROJECT]
    assert "PYTHONPATH" not in (ray.given[1] or {})["env_vars"]  # Ray refuses a variable that the job sets


def test_the_users_own_connection(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ray_is(3, monkeypatch)
    assert cluster.connect()
    ray.shutdown()
    ray.init(runtime_env=None)
    assert not cluster.connect()
    assert cluster.shipped() is None  # that which raylit made is gone
    assert len(ray.sent) == 1


def test_no_home_is_shipped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ray submit`` copies the script into the home folder and runs it there."""
    script_is(place.parent / "main.py", monkeypatch)
    ray = ray_is(3, monkeypatch)
    assert cluster.connect()
    assert ray.given == [None]
    assert cluster.shipped() == shipping.Shipped("00000001", "home")


def test_a_notebook_ships_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_is(None, monkeypatch)
    ray = ray_is(3, monkeypatch)
    assert cluster.connect()
    assert ray.given == [None]
    assert cluster.shipped() == shipping.Shipped("00000001", "interactive")


def test_a_large_project_is_refused_before_it_is_sent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(place / "weights.bin", "wb") as stream:
        stream.truncate(projects.MAX_BYTES + 1)
    ray = ray_is(3, monkeypatch)
    with pytest.raises(ConfigError, match=r"weights\.bin \(200\.0 MB\).*\.rayignore.*working_dir") as raised:
        cluster.connect()
    assert "\n" not in str(raised.value)
    assert ray.sent == [] and not ray.joined
    (place / ".rayignore").write_text("*.bin\n")
    assert cluster.connect()
    assert ray.sent == [[".gitignore", ".rayignore", *PROJECT[1:]]]
    ray.shutdown()
    (place / ".rayignore").unlink()
    assert cluster.connect({"excludes": ["weights.bin"]})
    assert ray.sent[1:] == [PROJECT] and "excludes" not in (ray.given[-1] or {})


def lacking(module: str, shipped: shipping.Shipped | None) -> str:
    failure = WorkerFailure(rank=1, node_name="host (10.0.0.2)", type_name="ModuleNotFoundError",
                            message="", pickled=None, frames=(), where={})  # fmt: skip
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    error.__dict__["raylit_failure"] = failure
    told = shipping.explained(error, shipped)
    assert told is error and type(told) is ModuleNotFoundError and error.name == module
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("shipped", "says"),
    [
        (None, 'ray.init(runtime_env={"working_dir": "."})'),
        (
            shipping.Shipped("1", "home"),
            "raylit submit CLUSTER.yaml main.py, or ray job submit --working-dir . -- python main.py",
        ),
        (shipping.Shipped("1", "interactive"), 'ray.init(runtime_env={"working_dir": "."})'),
        (shipping.Shipped("1", "alone"), "came after the run was begun"),
        (shipping.Shipped("1", "job"), "the working_dir of the job does not hold"),
        (shipping.Shipped("1", "argument"), "the working_dir of the runtime_env does not hold"),
        (shipping.Shipped("1", "project", Path("/other")), "outside the project that was sent, /other"),
    ],
)
def test_what_is_said_of_a_module_that_a_worker_lacks(place: Path, shipped: Any, says: str) -> None:
    text = lacking("neighbour", shipped)
    assert text.startswith("No module named 'neighbour' on node host (10.0.0.2); here it is ")
    assert str(place / "train" / "neighbour.py") in text and says in text


def test_a_trial_says_the_same(place: Path) -> None:
    error = ModuleNotFoundError("No module named 'neighbour'", name="neighbour")
    text = worded(error)
    assert text.startswith("ModuleNotFoundError: No module named 'neighbour' on another node; here it is ")
    assert "ray.init(runtime_env=" in text
    assert " on node 10.0.0.2; " in worded(error, "10.0.0.2")
    assert (
        worded(ModuleNotFoundError("No module named 'x_y'", name="x_y")) == "ModuleNotFoundError: No module named 'x_y'"
    )


def test_an_ignored_module(place: Path) -> None:
    assert "a line !neighbour.py in the .rayignore" in lacking("neighbour", shipping.Shipped("1", "project", place))


def test_an_installed_package(place: Path) -> None:
    assert "install the same packages on every node" in lacking("hypothesis", None)


def test_a_module_that_nobody_has(place: Path) -> None:
    assert lacking("no_such_module", None) == "No module named 'no_such_module'"


def test_other_errors_stay_as_they_are() -> None:
    failure = WorkerFailure(
        rank=0, node_name="n", type_name="ValueError", message="x", pickled=None, frames=(), where={}
    )
    error = rebuild(failure)
    assert shipping.explained(error, None) is error and "could not be pickled" in str(error)
