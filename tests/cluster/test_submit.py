"""``raylit submit`` and code on workers, on a real cluster: a head that takes jobs and asks for a token, and a member.

One cluster for all of them. The member has not the caller's folder: what it runs was shipped to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import RAY, Cluster, environment_of, may_hide_folders

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(not may_hide_folders(), reason="needs Linux and the right to make a mount namespace"),
]

COMMAND = [sys.executable, "-c", "import sys; from raylit.cli import main; sys.exit(main())", "submit"]
ARGUMENTS = ["--name", "a b", "it's", 'say "x"', "$HOME", "two\nlines", "", "--", "`id`", "\\"]

FILES = {
    "pyproject.toml": "",
    ".gitignore": "*.bin\n",
    "big.bin": "0" * 1_000_000,
    "lib/shared.py": "WORD = 'shared'\n",
    "train/neighbour.py": "def loss(output):\n    return (output**2).mean()\n",
    "train/main.py": """
        import json, os, sys
        from pathlib import Path

        import neighbour  # beside the script

        there = [str(each.relative_to("..")) for each in Path("..").rglob("*.*")]
        files = sorted(each for each in there if not each.endswith(".pyc"))
        print(json.dumps({"arguments": sys.argv[1:], "files": files, "word": os.environ["WORD"]}))
        sys.exit(3)
    """,
    "train/waits.py": """
        import time

        print("it waits", flush=True)
        while True:
            time.sleep(0.1)
    """,
    "train/net.py": """
        import torch
        import raylit
        import neighbour

        class Net(raylit.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", neighbour.loss(self.layer(batch)))

            def on_validation_start(self):
                import shared  # of another folder of the project, which is on the caller's import path

                print(f"rank {self.global_rank} node {self.node_rank} {shared.WORD}")
    """,
    "train/validate.py": """
        import sys

        import torch
        from torch.utils.data import DataLoader

        import raylit
        from net import Net

        if __name__ == "__main__":
            if "--own-init" in sys.argv:
                import ray

                ray.init(log_to_driver=False, logging_level="ERROR")
            sys.path.insert(0, "../lib")
            trainer = raylit.Trainer(num_workers=2, placement_strategy="STRICT_SPREAD", enable_progress_bar=False)
            (metrics,) = trainer.validate(Net(), DataLoader(torch.ones(8, 1), batch_size=2))
            print("val_loss", "val_loss" in metrics)
    """,
}


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caller's own folder, with a project in it that the second host has not."""
    folder = tmp_path_factory.mktemp("caller")
    for name, content in FILES.items():
        path = folder / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return folder


@pytest.fixture(scope="module")
def head(caller: Path) -> Iterator[tuple[Cluster, dict[str, str]]]:
    """The cluster, and the environment of a caller: how to find raylit, the token, and nothing of where Ray is."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # whose "python" jobs run
    with environment_of(PATH=path) as environment, Cluster(environment, dashboard=True) as cluster:
        cluster.join(hidden=caller)
        yield cluster, environment


def submit(head: tuple[Cluster, dict[str, str]], caller: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    cluster, environment = head
    done = subprocess.run(
        [*COMMAND, "--address", cluster.jobs, *arguments], cwd=caller / "project" / "train",
        env={**environment, **more}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def status(head: tuple[Cluster, dict[str, str]], job: str) -> str:
    import requests

    cluster, environment = head
    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    return str(requests.get(f"{cluster.jobs}/api/jobs/{job}", headers=headers, timeout=60).json()["status"])


def test_a_project_its_arguments_and_its_exit_code(head: tuple[Cluster, dict[str, str]], caller: Path) -> None:
    code, out, err = submit(head, caller, "main.py", "--env", "WORD=a 'b'", "--", *ARGUMENTS)
    assert code == 3, out + err
    told = json.loads(out)  # the script's own output, without what Ray writes before it
    assert told == {
        "arguments": ARGUMENTS,
        "files": sorted(name for name in FILES if name != "big.bin"),
        "word": "a 'b'",
    }
    assert err.splitlines()[-1] == "raylit submit: the job ended with exit code 3"


def test_a_wrong_token(head: tuple[Cluster, dict[str, str]], caller: Path) -> None:
    code, out, err = submit(head, caller, "main.py", RAY_AUTH_TOKEN="0" * 64)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "refuses the token of RAY_AUTH_TOKEN (HTTP 403)" in err
    code, out, err = submit(head, caller, "main.py", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert (code, out) == (2, "") and "asks for a token" in err


@pytest.mark.parametrize(("token", "has"), [("0" * 64, "the token here is another"), ("", "there is no token here")])
def test_a_script_that_the_head_refuses(
    head: tuple[Cluster, dict[str, str]], caller: Path, tmp_path: Path, token: str, has: str
) -> None:
    """In one line, and before Ray, whose connecting takes 20 s and writes as many lines."""
    cluster, _ = head
    environment = {**cluster.driver_environment, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": token}
    environment |= {} if token else {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "validate.py"], cwd=caller / "project" / "train", env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"raylit.errors.ConfigError: {cluster.address} refuses this machine: it asks for a token")
    assert has in last and "gcs_client" not in done.stdout + done.stderr


def test_ctrl_c_leaves_the_job_or_stops_it(head: tuple[Cluster, dict[str, str]], caller: Path) -> None:
    cluster, environment = head
    own = {"cwd": caller / "project" / "train", "env": environment}
    command = [*COMMAND, "--address", cluster.jobs, "waits.py", "--name"]
    left = subprocess.Popen([*command, "left"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **own)  # fmt: skip
    assert left.stdout is not None
    assert any("it waits" in line for line in left.stdout)  # while it runs
    left.send_signal(signal.SIGINT)
    _, told = left.communicate(timeout=120)
    assert left.returncode == 130 and "job left goes on" in told
    assert status(head, "left") == "RUNNING"

    ours, theirs = pty.openpty()
    stops = subprocess.Popen([*command, "stops"], stdin=theirs, stdout=theirs, stderr=theirs, **own)
    os.close(theirs)
    read_until(ours, "it waits")
    stops.send_signal(signal.SIGINT)
    read_until(ours, "stop the job? [y/N] ")
    os.write(ours, b"y\n")
    read_until(ours, "the job was stopped")
    assert stops.wait(120) == 130
    os.close(ours)
    assert status(head, "stops") == "STOPPED" and status(head, "left") == "RUNNING"

    subprocess.run([str(RAY), "job", "stop", "--address", cluster.jobs, "left"], env=environment, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    assert status(head, "left") == "STOPPED"


def read_until(terminal: int, text: str) -> None:
    read = ""
    while text not in read:
        with contextlib.suppress(OSError):  # the other end was closed
            more = os.read(terminal, 4096).decode(errors="replace")
            read += more
            if more:
                continue
        raise AssertionError(f"{text!r} was not shown: {read}")


def test_both_hosts_of_a_job_find_the_project(head: tuple[Cluster, dict[str, str]], caller: Path) -> None:
    code, out, err = submit(head, caller, "validate.py")
    assert code == 0, out + err
    seen = sorted(line[line.rindex("rank") :] for line in out.splitlines() if line.endswith(" shared"))
    assert seen == ["rank 0 node 0 shared", "rank 1 node 1 shared"]
    assert out.splitlines()[-1] == "val_loss True"


def test_a_module_that_the_second_host_lacks(head: tuple[Cluster, dict[str, str]], caller: Path) -> None:
    """The user's own ``ray.init`` carried nothing."""
    cluster, _ = head
    done = subprocess.run(
        [sys.executable, "validate.py", "--own-init"], cwd=caller / "project" / "train", env=cluster.driver_environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ModuleNotFoundError")]
    assert "No module named 'net' on node" in line and "127.0.0.2" in line
    assert str(caller / "project" / "train" / "net.py") in line
    assert 'ray.init(runtime_env={"working_dir": "."})' in line and "raylit submit" in line
