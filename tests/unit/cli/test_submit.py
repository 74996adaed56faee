"""``raylit submit``: what travels, what the cluster is asked to run, and what becomes of the script's end.

The head is a server of the test that speaks Ray's REST API; Ray's own client speaks to it. A real cluster:
tests/cluster/test_submit.py.
"""

from __future__ import annotations

import io
import itertools
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from raylit.cli import jobs, main
from raylit.cli.submit import Entry, bytes_of, command_of, entry_of, environment
from raylit.cli.tunnel import Tunnel, dashboard_port
from raylit.driver.project import Project
from raylit.errors import ConfigError
from tests.unit.cli.jobs_server import JobsServer

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "5" * 64


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the project ``own`` in it, in whose folder the command is given; no Ray settings."""
    own = tmp_path / "home" / "own"
    for name in ("main.py", "train/main.py", "train/neighbour.py", "pkg/__main__.py", "pkg/job.py", "pyproject.toml"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("print(1)\n")
    (own / ".gitignore").write_text("*.bin\n")
    (own / "big.bin").write_text("stays here")
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(own)
    return own


@pytest.fixture
def head(place: Path) -> Iterator[JobsServer]:
    with JobsServer(ray.__version__) as server:
        yield server


def submit(head: JobsServer, *arguments: str) -> int:
    return main(["submit", "--address", head.url, *arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; progress lines may stand before it."""
    out = capsys.readouterr()
    assert out.out == ""
    return out.err.splitlines()[-1]


# --- arguments arrive as they were given ------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
ODD = st.sampled_from(
    ["", " ", "'", '"', "\n", "$HOME", "`id`", "\\", "*", "a b", "--", "-x", "!", "#", "ü", ";", "&&"]
)


def entry(arguments: list[str], at: str = "", folders: tuple[str, ...] = ()) -> Entry:
    return Entry(Project(Path("/p"), ()), at, ("main.py", *arguments), folders, "main")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(arguments=st.lists(TEXT | ODD, max_size=5), inside=st.booleans())
def test_a_shell_hands_the_arguments_on_as_they_are(tmp_path: Path, arguments: list[str], inside: bool) -> None:
    odd = "a 'folder'"
    (tmp_path / odd).mkdir(exist_ok=True)
    line = command_of(entry(arguments, *((odd, (odd, "src $x")) if inside else ())), python="printf '%s\\0'")
    if inside:
        line = line.replace("exec env", "exec /usr/bin/env")  # printf of the shell, and of the system
    done = subprocess.run(line, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "/p"}, capture_output=True)
    assert done.stdout.decode().split("\0")[:-1] == ["main.py", *arguments], done.stderr


def test_arguments_through_the_whole_command(head: JobsServer) -> None:
    arguments = ["--name", "a b", "it's", 'say "x"', "$HOME", "two\nlines", "", "--", "-m", "x.yaml"]
    assert submit(head, "main.py", "--", *arguments) == 0
    assert shlex.split(head.job["entrypoint"]) == ["python", "main.py", *arguments]


def test_the_import_path_inside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    line = command_of(entry([], "train", ("train", "src")), python="sh -c 'pwd; echo $PYTHONPATH' #")
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "/p"}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [str(tmp_path / "train"), "../src:/p"]


# --- what travels -----------------------------------------------------------------------------------------------------


def test_the_project_travels(head: JobsServer, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head.log = "one\ntwo\n"
    assert submit(head, "main.py") == 0
    assert head.job["entrypoint"] == "python main.py"
    assert head.job["submission_id"].startswith("main-")
    (name,) = head.packages
    assert head.job["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(head.packages[name])) as package:
        assert package.namelist() == [
            ".gitignore", "main.py", "pkg/__main__.py", "pkg/job.py", "pyproject.toml", "train/main.py",
            "train/neighbour.py",
        ]  # fmt: skip
    out = capsys.readouterr()
    assert out.out == "one\ntwo\n"  # the script's own words, and nothing else
    assert f"sending 7 files, 60 B, of {place}" in out.err
    sent = len(head.requests)
    assert submit(head, "main.py") == 0
    assert not any(each.startswith("PUT") for each in head.requests[sent:])  # the cluster has this package


@pytest.mark.parametrize(
    ("cwd", "arguments", "entrypoint", "path"),
    [
        (".", ["train/main.py"], "python train/main.py", "train"),
        ("train", ["main.py"], "cd train && exec python main.py", "train"),
        ("train", ["../main.py"], "cd train && exec env PYTHONPATH= python ../main.py", None),
        ("/", ["OWN/train/main.py"], "python train/main.py", "train"),
        (".", ["-m", "pkg"], "python -m pkg", None),
        (".", ["-m", "pkg.job", "--", "-x"], "python -m pkg.job -x", None),
        ("train", ["-m", "neighbour"], "cd train && exec python -m neighbour", "train"),
        (".", ["-m", "json.tool"], "python -m json.tool", None),  # installed there as here
        (".", ["--python", "/opt/py -O", "main.py"], "/opt/py -O main.py", None),
        (".", ["--working-dir", "train", "train/main.py"], "python main.py", None),
    ],
)
def test_what_is_run_and_where(
    head: JobsServer, place: Path, monkeypatch: pytest.MonkeyPatch, cwd: str, arguments: list[str], entrypoint: str,
    path: str | None,
) -> None:  # fmt: skip
    """The script sees the folder that it would see here, and workers import from the folder that it imports from."""
    monkeypatch.chdir(place / cwd)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert submit(head, *(each.replace("OWN", str(place)) for each in arguments)) == 0
    assert head.job["entrypoint"] == entrypoint.replace("env PYTHONPATH= ", "")
    assert head.job["runtime_env"].get("env_vars", {}).get("PYTHONPATH") == path


def test_a_script_in_the_home_folder_goes_alone(
    head: JobsServer, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.parent / "main.py").write_text("")
    (place.parent / "diary").write_text("")
    assert submit(head, str(place.parent / "main.py")) == 0
    (package,) = head.packages.values()
    assert zipfile.ZipFile(io.BytesIO(package)).namelist() == ["main.py"]
    assert "is sent alone" in capsys.readouterr().err


def test_variables(head: JobsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "a=b c")
    assert (
        submit(head, "--env", "A=1=2", "--env", "HERE", "--env", "EMPTY=", "--env", "PYTHONPATH=/x", "train/main.py")
        == 0
    )
    found = head.job["runtime_env"]["env_vars"]
    assert found == {"A": "1=2", "HERE": "a=b c", "EMPTY": "", "PYTHONPATH": "/x:train"}


def test_options_before_and_behind_the_script(
    head: JobsServer, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["submit", "main.py", "--name", "mine", "--address", head.url, "--exclude", "train", "--exclude=pkg"]) == 0
    )
    assert head.job["submission_id"] == "mine"
    (package,) = head.packages.values()
    assert zipfile.ZipFile(io.BytesIO(package)).namelist() == [".gitignore", "main.py", "pyproject.toml"]


# --- what is refused before anything is sent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which script?"),
        (["--", "main.py"], "which script?"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["pkg"], "pkg is no script"),
        (["config.json"], "config.json is no Python script: a script ends in .py, -m MODULE runs a module"),
        (["lab.json", "main.py"], "a cluster's file, which stands before either, ends in .yaml or .yml"),
        (["main.py", "--flag"], "'--flag' is no option of raylit submit; the script's own stand behind a --"),
        (["main.py", "more"], "'more': the script's arguments stand behind a --"),
        (["-m", "pkg.nowhere"], "there is no pkg/nowhere.py and no pkg/nowhere/__main__.py"),
        (["-m", "no_such_package"], "there is no no_such_package.py"),
        (["-m", "a-b"], "no module's name"),
        (["--working-dir", "nowhere", "main.py"], "--working-dir nowhere: there is no such folder"),
        (["--working-dir", "pkg", "main.py"], "does not lie in the folder that is sent"),
        (["--exclude", "main.py", "main.py"], "main.py would not be sent"),
        (["--max-size", "much", "main.py"], "--max-size much"),
        (
            ["--max-size", "20B", "main.py"],
            "Largest: pkg/ (18 B), train/ (18 B), main.py (9 B), pyproject.toml (9 B), .gitignore (6 B).",
        ),
        (["--env", "=1", "main.py"], "--env =1"),
        (["--name", "a/b", "main.py"], "--name a/b"),
        (["--env", "NOT_SET_HERE", "main.py"], "there is no such variable here"),
        (["x.yaml", "main.py"], "either --address or a cluster's file"),
        (["main.py", "--", "\udcff"], "is no text"),
    ],
)
def test_refused(head: JobsServer, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(head, *arguments) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    assert out.err.startswith("raylit submit: ") and says in out.err
    assert head.requests == []


def test_a_large_project_names_what_helps(head: JobsServer, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(place / "weights.pt", "wb") as stream:
        stream.truncate(201 * 10**6)
    assert submit(head, "main.py") == 2
    text = error_of(capsys)
    assert "weights.pt (201.0 MB)" in text and ".gitignore" in text and "--exclude" in text and "--max-size" in text
    assert submit(head, "--exclude", "*.pt", "main.py") == 0


def test_no_address(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "main.py"]) == 2
    assert "which cluster?" in error_of(capsys)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "head:port"])
def test_an_odd_address(place: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", address, "main.py"]) == 2
    assert "8265" in error_of(capsys)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head", "http://head:8265"),
        ("10.0.0.1:80/", "http://10.0.0.1:80"),
        ("https://x/ray/", "https://x/ray"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(given: str, address: str) -> None:
    assert jobs.address_of(given) == address


def test_who_could_listen() -> None:
    clear = ["http://head:8265", "http://10.0.0.1:8265", "http://localhost.evil.org"]
    assert list(map(jobs.sends_in_the_clear, clear)) == [True] * 3
    assert not any(
        map(jobs.sends_in_the_clear, ["https://head", "http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"])
    )


@pytest.mark.parametrize(
    ("text", "size"), [("200MB", 200 * 10**6), ("1.5 gb", 15 * 10**8), ("300", 300), ("2k", 2000), ("7B", 7)]
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


# --- who answers ------------------------------------------------------------------------------------------------------


def test_nobody_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, not listening
        assert main(["submit", "--address", address, "main.py"]) == 2
    assert f"nothing answers at {address}" in error_of(capsys)


def test_a_name_that_is_no_hosts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://no-such-host.invalid:8265", "main.py"]) == 2
    assert "nothing answers at http://no-such-host.invalid:8265" in error_of(capsys)


def test_ray_address_does_not_win(head: JobsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client lets these win over the address that it is given."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert submit(head, "main.py") == 0
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_the_address_of_the_environment(head: JobsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    assert main(["submit", "main.py"]) == 0


def test_tokens(
    head: JobsServer, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head.token = TOKEN
    assert submit(head, "main.py") == 2
    assert "asks for a token" in error_of(capsys)
    file = place.parent / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    assert submit(head, "--token-file", str(file), "main.py") == 0
    capsys.readouterr()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert submit(head, "main.py") == 0
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[:-1])  # before the path, as Ray has it
    capsys.readouterr()
    assert submit(head, "main.py") == 2
    text = error_of(capsys)
    assert "refuses the token of RAY_AUTH_TOKEN (HTTP 403)" in text and TOKEN[:-1] not in text
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    usual = place.parent / ".ray" / "auth_token"
    usual.parent.mkdir()
    usual.write_text(TOKEN)
    assert submit(head, "main.py") == 2  # without the mode Ray shows no token either: it may be another cluster's
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert submit(head, "main.py") == 0
    file.chmod(0o644)
    capsys.readouterr()
    assert submit(head, "--token-file", str(file), "main.py") == 2
    assert "chmod 600" in error_of(capsys)


def test_versions_of_ray(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    major, minor, *_ = ray.__version__.split(".")
    head.version = f"{major}.{int(minor) + 1}.0"
    assert submit(head, "main.py") == 2
    text = error_of(capsys)
    assert f"Ray is {ray.__version__} here and {head.version} on the cluster" in text and "--force" in text
    assert head.job == {} and head.packages == {}
    assert submit(head, "--force", "main.py") == 0
    capsys.readouterr()
    head.version = f"{major}.{minor}.99"
    assert submit(head, "main.py") == 0
    assert f"{head.version} on the cluster" in capsys.readouterr().err


def test_something_else_answers(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", f"{head.url}/other", "main.py"]) == 2
    assert "is no Ray dashboard (HTTP 404)" in error_of(capsys)


def test_a_name_that_is_taken(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    head.refuses = "Traceback ...\nValueError: Job with submission_id mine already exists. Please use a different one."
    assert submit(head, "--name", "mine", "main.py") == 2
    assert "has a job 'mine' already" in error_of(capsys)
    head.refuses = "Traceback ...\nRuntimeError: disk full"
    assert submit(head, "main.py") == 2
    assert "does not take the job: RuntimeError: disk full" in error_of(capsys)


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "message", "ours", "says"),
    [
        ("SUCCEEDED", 0, None, 0, None),
        ("FAILED", 3, None, 3, "ended with exit code 3"),
        ("FAILED", -9, None, 137, "exit code 137 (SIGKILL)"),
        ("FAILED", 139, None, 139, "exit code 139 (SIGSEGV)"),
        ("FAILED", 255, None, 255, "exit code 255"),
        ("FAILED", None, "runtime_env setup failed:\nmore", 1, "the job failed: runtime_env setup failed:"),
        ("STOPPED", None, None, 1, "the job was stopped"),
    ],
)
def test_exit_codes(
    head: JobsServer, capsys: pytest.CaptureFixture[str], status: str, code: int | None, message: str | None, ours: int,
    says: str | None,
) -> None:  # fmt: skip
    head.status, head.exit_code, head.message = status, code, message
    assert submit(head, "main.py") == ours
    text = capsys.readouterr().err
    assert says is None or says in text.splitlines()[-1]


def test_the_log_is_shown_while_it_grows(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    head.running.set()
    seen: list[str] = []

    def grow() -> None:
        for text in ("second\n", "third without an end"):
            until = time.monotonic() + 60
            while head.log.splitlines()[-1] not in "".join(seen) and time.monotonic() < until:
                seen.append(capsys.readouterr().out)
                time.sleep(0.01)
            head.log += text
        head.running.clear()

    grower = threading.Thread(target=grow)
    head.on_tail = grower.start
    assert submit(head, "main.py") == 0
    grower.join()
    assert "".join(seen) + capsys.readouterr().out == "hello\nsecond\nthird without an end"
    assert "second" in "".join(seen)  # it came before the end


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rays_own_lines_at_the_beginning_are_dropped(size: int) -> None:
    ray_says = "2026-11-28 00:10:11,123\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    entrypoint = "Running entrypoint for job mine: python main.py 'two\nlines'\n"
    own = ["hello\n", ray_says, entrypoint]  # a script may say the same
    for log, left in [
        (ray_says + entrypoint + "".join(own), "".join(own)),
        (entrypoint + "hello", "hello"),
        (ray_says + "hello\n" + entrypoint, "hello\n" + entrypoint),
        (ray_says.replace("INFO", "WARNING") + entrypoint, ray_says.replace("INFO", "WARNING") + entrypoint),
        ("Running entrypoint for job other: x\n", "Running entrypoint for job other: x\n"),
        (ray_says + entrypoint[:20], entrypoint[:20]),  # it ended before more came
        ("20", "20"),
        ("", ""),
    ]:
        client = Client(Details("SUCCEEDED"), log=log, piece=size)
        shown: list[str] = []
        command = "python main.py 'two\nlines'"
        jobs.Follower(client, "mine", shown.append, print, command=command, poll_s=0.01).until_end()
        assert "".join(shown) == left


def test_what_cannot_be_rays_is_shown_at_once() -> None:
    client = Client(Details("RUNNING"), Details("SUCCEEDED"), log="2026 epochs")
    shown: list[str] = []

    def look(text: str) -> None:
        shown.append(text)

    client.piece, client.between = 7, lambda: shown.append("|")  # "2026 ep" is no date: it goes on with a letter
    jobs.Follower(client, "mine", look, print, command="python main.py", poll_s=0.01).until_end()
    assert shown[:2] == ["2026 ep", "|"]


def test_rays_lines_through_the_whole_command(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    head.log = (
        "2026-11-28 00:10:11,123\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job mine: python main.py -x\nhello\n"
    )
    assert submit(head, "--name", "mine", "main.py", "--", "-x") == 0
    assert capsys.readouterr().out == "hello\n"


def test_looks_at_the_status_are_far_between_only_later() -> None:
    waits = list(itertools.islice(jobs.polls(), 12))
    assert waits[0] == 0.2 and waits[-2:] == [1.0, 1.0] and waits == sorted(waits)
    assert list(itertools.islice(jobs.polls(0.01), 2)) == [0.01, 0.01]


def test_the_end_of_a_job_is_not_waited_for_in_its_log(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray closes the log's stream late; the rest of a short log is asked for."""
    head.lingers = True
    head.log = "one\ntwo\n"
    assert submit(head, "main.py") == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert head.requests[-1].endswith("/logs")


def test_no_wait(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    head.running.set()
    assert submit(head, "--no-wait", "--name", "mine", "main.py") == 0
    out = capsys.readouterr()
    assert out.out == ""
    assert f"ray job logs --follow --address {head.url} mine" in out.err and "ray job stop" in out.err


def test_a_connection_that_breaks_shows_every_line_once(head: JobsServer, capsys: pytest.CaptureFixture[str]) -> None:
    head.log = "".join(f"line {k}\n" for k in range(20))
    head.breaks = [10, 35, 35, 100]
    assert submit(head, "main.py") == 0
    assert capsys.readouterr().out == head.log


class Client:
    """Answers of a cluster, in the order in which they are asked for; the last one stays."""

    def __init__(self, *answers: Any, log: str = "", piece: int = 0) -> None:
        self.answers, self.log, self.asked = list(answers), log, 0
        self.piece = piece  # characters of the log that come at once; 0: its connection is cut at once
        self.between: Callable[[], None] = lambda: None

    def get_job_info(self, job: str) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_logs(self, job: str) -> str:
        return self.log

    async def tail_job_logs(self, job: str) -> Any:
        if not self.piece:
            raise OSError("cut")
        for at in range(0, len(self.log), self.piece):
            yield self.log[at : at + self.piece]
            self.between()


class Details:
    def __init__(self, status: str) -> None:
        self.status, self.driver_exit_code, self.message = JobStatus(status), 0, None


def follow(client: Client, patience_s: float) -> tuple[Any, list[str], list[str]]:
    shown: list[str] = []
    said: list[str] = []
    revived: list[int] = []
    follower = jobs.Follower(
        client, "mine", shown.append, said.append, lambda: revived.append(1), poll_s=0.01, patience_s=patience_s
    )
    try:
        ended = follower.until_end()
    except jobs.Unreachable as error:
        ended = error
    assert bool(revived) == bool(said)
    return ended, shown, said


def test_a_connection_that_comes_back() -> None:
    lost = [ConnectionError("away"), RuntimeError("Request failed with status code 503: starting.")]
    ended, shown, said = follow(
        Client(Details("RUNNING"), *lost, Details("RUNNING"), Details("SUCCEEDED"), log="all\n"), 60
    )
    assert ended.status == "SUCCEEDED"
    assert shown == ["all\n"]  # what the broken connection did not bring
    assert said == ["the connection is lost (away); trying again for 60 s", "connected again"]


def test_a_connection_that_does_not_come_back() -> None:
    ended, _, said = follow(Client(Details("RUNNING"), ConnectionError("away")), 0.2)
    assert isinstance(ended, jobs.Unreachable) and "the job may well go on" in str(ended)
    assert len(said) == 1


def test_a_cluster_that_has_forgotten_the_job() -> None:
    client = Client(Details("RUNNING"), RuntimeError("Request failed with status code 404: Job mine does not exist."))
    with pytest.raises(ConfigError, match="does not exist"):
        follow(client, 60)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "import sys; from raylit.cli import main; sys.exit(main())", "submit"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str)
def test_a_signal_without_a_terminal_leaves_the_job(head: JobsServer, sent: signal.Signals, code: int) -> None:
    """Ctrl-C, a CI step that is cancelled, a terminal that is closed."""
    head.running.set()
    seen = threading.Event()
    head.on_tail = seen.set
    process = subprocess.Popen([*COMMAND, "--address", head.url, "--name", "mine", "main.py"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n" and seen.wait(60)
    process.send_signal(sent)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code
    assert "job mine goes on" in told and "Traceback" not in told
    for what in ("logs --follow", "stop"):
        assert f"  ray job {what} --address {head.url} mine" in told
    assert head.stopped == []


def test_a_log_that_nobody_reads_any_longer(head: JobsServer) -> None:
    head.running.set()
    process = subprocess.Popen(
        [*COMMAND, "--address", head.url, "--name", "mine", "main.py"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "hello\n"
    process.stdout.close()
    head.log += "more\n" * 3
    _, told = process.communicate(timeout=120)
    assert process.returncode == 141
    assert "job mine goes on" in told and "Traceback" not in told and "BrokenPipe" not in told
    assert head.stopped == []


def test_ctrl_c_before_anything_was_submitted(place: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [*COMMAND, "--address", address, "main.py"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        silent.accept()[0].close()  # it looks whether someone listens, and then asks
        with silent.accept()[0] as asked:
            assert asked.recv(3) == b"GET"
            process.send_signal(signal.SIGINT)
            out, told = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert told.splitlines() == ["raylit submit: interrupted, before the job was submitted"]


@pytest.mark.parametrize("answer", ["y", "n", "", "ctrl-c"])
def test_ctrl_c_on_a_terminal_asks_once(head: JobsServer, answer: str) -> None:
    head.running.set()
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--address", head.url, "--name", "mine", "main.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    told = until(ours, "hello")
    process.send_signal(signal.SIGINT)
    told += until(ours, "stop the job? [y/N] ")
    if answer == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        os.write(ours, f"{answer}\n".encode())
    told += until(ours, None)
    os.close(ours)
    assert process.wait(120) == 130
    assert told.count("stop the job?") == 1 and "Traceback" not in told
    assert head.stopped == (["mine"] if answer == "y" else [])
    assert ("the job was stopped" if answer == "y" else "job mine goes on") in told


def until(terminal: int, text: str | None) -> str:
    """Read until ``text`` was shown, or with None until nobody writes any longer."""
    read = b""
    while text is None or text not in read.decode(errors="replace"):
        try:
            more = os.read(terminal, 4096)
        except OSError:  # the other end was closed
            more = b""
        if not more:
            assert text is None, read.decode(errors="replace")
            break
        read += more
    return read.decode(errors="replace")


# --- through a cluster's file -----------------------------------------------------------------------------------------

# In place of Ray's command line: "ray dashboard FILE --port HERE --remote-port THERE", a tunnel to this machine.
RAY = """\
    #!{python}
    import asyncio, os, sys
    here, there = int(sys.argv[sys.argv.index("--port") + 1]), int(sys.argv[sys.argv.index("--remote-port") + 1])
    with open({pids!r}, "a") as file:
        print(os.getpid(), file=file)
    if there == 2:
        sys.exit('  File "commands.py", line 1609\\nRuntimeError: Head node of cluster (lab) not found!')
    if there == 1:
        sys.exit("\\x1b[31mssh: connect to host 10.0.0.1 port 22: No route to host, failed\\x1b[0m\\nbye")

    async def carry(source, sink):
        while data := await source.read(65536):
            sink.write(data)
        sink.close()

    async def connected(reader, writer):
        inner = await asyncio.open_connection("127.0.0.1", there)
        await asyncio.gather(carry(reader, inner[1]), carry(inner[0], writer), return_exceptions=True)

    async def main():
        await (await asyncio.start_server(connected, "127.0.0.1", here)).serve_forever()

    asyncio.run(main())
"""


@pytest.fixture
def tunnels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Ray command line of the test's own; the file names the processes that it was."""
    folder = tmp_path / "bin"
    folder.mkdir()
    pids = tmp_path / "pids"
    (folder / "ray").write_text(textwrap.dedent(RAY).format(python=sys.executable, pids=str(pids)))
    (folder / "ray").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return pids


def cluster_file(place: Path, port: int, mounts: str = "") -> Path:
    file = place / "lab.yaml"
    file.write_text(textwrap.dedent(f"""\
        cluster_name: lab
        provider: {{type: local, head_ip: 10.0.0.1, worker_ips: []}}
        head_start_ray_commands:
          - ray stop
          - ray start --head --dashboard-host=127.0.0.1 --dashboard-port={port}
        {mounts}
    """))  # fmt: skip
    return file


def all_gone(pids: Path) -> bool:
    return not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())


def test_through_a_clusters_file(
    head: JobsServer, place: Path, tunnels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", "lab"]) == 0
    own = place.parent / ".ray" / "tokens" / "lab"
    head.token, head.exit_code, head.status = own.read_text(), 3, "FAILED"
    capsys.readouterr()
    file = cluster_file(place, head.port)
    assert dashboard_port(file) == head.port
    assert main(["submit", str(file), "main.py", "--", "--flag"]) == 3
    assert head.job["entrypoint"] == "python main.py --flag"
    out = capsys.readouterr()
    assert out.out == "hello\n" and head.token not in out.err
    assert all_gone(tunnels)
    # How to go on names what outlives the tunnel.
    assert main(["submit", "lab.yaml", "main.py", "--no-wait"]) == 0
    told = capsys.readouterr().err
    assert "ray dashboard lab.yaml" in told and f"RAY_AUTH_TOKEN_PATH={own}" in told
    assert "--address http://127.0.0.1:8265" in told


def test_the_token_of_the_files_mounts(
    head: JobsServer, place: Path, tunnels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head.token = TOKEN
    file = cluster_file(place, head.port, "file_mounts: {/home/ubuntu/.ray/auth_token: ~/secret}")
    assert main(["submit", str(file), "main.py"]) == 2
    assert "there is no token" in error_of(capsys)
    assert not tunnels.exists()  # nothing was opened for it
    (place.parent / "secret").write_text(TOKEN)
    (place.parent / "secret").chmod(0o600)
    assert main(["submit", str(file), "main.py"]) == 0
    assert all_gone(tunnels)


def test_a_tunnel_that_does_not_open(place: Path, tunnels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster_file(place, 1)
    assert main(["submit", str(file), "main.py"]) == 2
    text = error_of(capsys)
    assert "no tunnel to the cluster" in text and "No route to host, failed" in text and "ray up" in text
    assert "\x1b" not in text


def test_a_cluster_that_rays_launcher_does_not_know(
    place: Path, tunnels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may run all the same, started from elsewhere: ``ray up`` would end what runs there."""
    file = cluster_file(place, 2, "auth: {ssh_user: ubuntu, ssh_private_key: ~/.ssh/key}")
    assert main(["submit", str(file), "main.py"]) == 2
    text = error_of(capsys)
    assert f"this machine has not started the cluster of {file}, or has forgotten it" in text
    assert (
        "if it runs: ssh -N -L 8265:localhost:2 -i ~/.ssh/key ubuntu@10.0.0.1, and --address http://localhost:8265"
        in text
    )
    assert f"--token-file ~/.ray/tokens/lab in place of the file; else: ray up {file}" in text


def test_a_tunnel_that_breaks_is_opened_again(head: JobsServer, place: Path, tunnels: Path) -> None:
    with Tunnel(cluster_file(place, head.port), head.port) as tunnel:
        first = int(tunnels.read_text())
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 60
        while len(tunnels.read_text().split()) < 2 and time.monotonic() < until:
            tunnel.revive()
            time.sleep(0.01)
        while time.monotonic() < until:
            try:
                assert jobs.version_at(tunnel.address, {}, None) == ray.__version__
                break
            except ConnectionError:
                time.sleep(0.05)
        else:
            raise AssertionError("it did not answer again")
    assert all_gone(tunnels)


@pytest.mark.parametrize("text", ["provider: {}", "cluster_name: [x]", "- 1", "a: [", None])
def test_a_bad_clusters_file(place: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (place / "x.yaml").write_text(text)
    assert main(["submit", "x.yaml", "main.py"]) == 2
    assert "x.yaml" in error_of(capsys)


def test_environment_of_an_entry(place: Path) -> None:
    found = entry_of("train/main.py", None, [], None, [])
    assert (found.at, found.name) == ("", "main") and found.folders[:1] == ("train",)
    assert environment([], found)["PYTHONPATH"].split(":")[0] == "train"
