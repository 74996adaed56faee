"""clusters/gcp_once.sh and azure_once.sh with stand-ins for the clouds' commands, and install.sh's refusals."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.clusters.pins import CLUSTERS, ROOT

# It notes what it was asked; what was made before is there, the rest is not. Some questions have an answer.
CLOUD = """#!/usr/bin/env bash
echo "$*" >>"$HOME/asked"
case "$*" in
  *describe*projectNumber*) echo 4711 ;;
  *' describe '*|*' update '*)
    [ "${MADE_BEFORE:-}" = yes ] ;;
  *'identity show'*) echo the-principal ;;
  *'account show'*) echo /the/scope ;;
esac
"""


def run(home: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    tools = home / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("gcloud", "az"):
        (tools / name).write_text(CLOUD)
        (tools / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}", **more}
    command = ["bash", str(CLUSTERS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=home)


def asked(home: Path) -> list[str]:
    path = home / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_google_cloud_gets_a_network_that_one_address_reaches(tmp_path: Path) -> None:
    done = run(tmp_path, "gcp_once.sh", "my-project", "us-central1", "my-runs", "203.0.113.7")
    assert done.returncode == 0, done.stderr
    rules = [line for line in asked(tmp_path) if "firewall-rules create" in line]
    assert len(rules) == 2
    assert all("--network raylit" in line and "0.0.0.0" not in line for line in rules)
    assert any("--allow tcp:22 --source-ranges 203.0.113.7/32" in line for line in rules)
    assert any("--allow tcp,udp,icmp --source-ranges 10.11.0.0/20" in line for line in rules)
    (bucket,) = (line for line in asked(tmp_path) if "buckets create" in line)
    assert "--public-access-prevention" in bucket and "gs://my-runs" in bucket
    assert any("--member serviceAccount:4711-compute@" in line for line in asked(tmp_path))
    assert "(1) my-project" in done.stdout and "gs://my-runs/runs" in done.stdout


def test_again_nothing_is_made_and_the_address_is_the_new_one(tmp_path: Path) -> None:
    done = run(tmp_path, "gcp_once.sh", "p", "r", "b", "198.51.100.0/24", MADE_BEFORE="yes")
    assert done.returncode == 0, done.stderr
    assert not any(" create " in line for line in asked(tmp_path))
    assert any("firewall-rules update raylit-ssh --source-ranges 198.51.100.0/24" in line for line in asked(tmp_path))


@pytest.mark.parametrize("wrong", ["0.0.0.0/0", "10.0.0.0/7", "203.0.113.7/x"])
def test_half_the_world_is_not_let_in(tmp_path: Path, wrong: str) -> None:
    refused = run(tmp_path, "gcp_once.sh", "p", "r", "b", wrong)
    assert refused.returncode == 2 and wrong in refused.stderr and asked(tmp_path) == []


def test_azure_gets_a_storage_that_only_the_identity_uses(tmp_path: Path) -> None:
    done = run(tmp_path, "azure_once.sh", "westeurope", "myruns")
    assert done.returncode == 0, done.stderr
    (account,) = (line for line in asked(tmp_path) if line.startswith("storage account create"))
    assert "--allow-blob-public-access false" in account and "--enable-hierarchical-namespace true" in account
    (role,) = (line for line in asked(tmp_path) if line.startswith("role assignment create"))
    assert "--assignee-object-id the-principal" in role and "--scope /the/scope" in role
    assert "abfss://runs@myruns.dfs.core.windows.net/" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("gcp_once.sh", ("p",)), ("azure_once.sh", ()), ("azure_once.sh", ("here", "Not-A-Name"))],
)
def test_what_is_missing_or_wrong_is_said_before_anything_is_asked(
    tmp_path: Path, script: str, arguments: tuple[str, ...]
) -> None:
    refused = run(tmp_path, script, *arguments)
    assert refused.returncode == 2 and refused.stderr.startswith(f"{script}: ") and asked(tmp_path) == []


@pytest.mark.parametrize(
    ("extras", "more", "told"),
    [
        ("examples,awz", {}, "raylit has no extra 'awz'"),
        ("", {"RAYLIT_PYTHON": "python9.9"}, "python9.9 was not found"),
    ],
)
def test_install_refuses_what_it_cannot_do(tmp_path: Path, extras: str, more: dict[str, str], told: str) -> None:
    refused = run(tmp_path, "install.sh", extras, **{"RAYLIT_PYTHON": "python3", **more})
    assert refused.returncode == 1 and refused.stderr.startswith("install.sh: ") and told in refused.stderr
    assert not (tmp_path / "raylit-env").exists()


# A Python as Debian has it, without ensurepip; and one that ends where the environment would be made.
BARE_PYTHON = """#!/usr/bin/env bash
case "$*" in *ensurepip*) exit 1 ;; *'-m venv'*) exit 7 ;; esac
exec python3 "$@"
"""
NOTE = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$HOME/asked"\n'


def stand_in(home: Path, name: str, text: str) -> None:
    (home / "tools").mkdir(exist_ok=True)
    (home / "tools" / name).write_text(text)
    (home / "tools" / name).chmod(stat.S_IRWXU)


def test_install_says_where_a_python_does_not_run(tmp_path: Path) -> None:
    stand_in(tmp_path, "python3.99", "#!/bin/sh\necho 'pyenv: python3.99: command not found' >&2\nexit 127\n")
    refused = run(tmp_path, "install.sh", RAYLIT_PYTHON="python3.99")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1 and line.startswith(f"install.sh: python3.99 was not found on {os.uname().nodename}")


def test_install_asks_for_no_password_and_says_what_to_run_where_it_would_need_one(tmp_path: Path) -> None:
    stand_in(tmp_path, "python3.99", BARE_PYTHON)
    stand_in(tmp_path, "id", "#!/bin/sh\necho 1000\n")
    stand_in(tmp_path, "sudo", f"{NOTE}echo 'sudo: a password is required' >&2\nexit 1\n")
    refused = run(tmp_path, "install.sh", RAYLIT_PYTHON="python3.99")
    assert refused.returncode == 1
    assert asked(tmp_path) == ["sudo -n DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 update"]
    assert refused.stderr.splitlines()[-1] == (
        f"install.sh: python3.99-venv is missing on {os.uname().nodename}, and could not be installed; "
        "run there: sudo apt-get install -y python3.99-venv"
    )


@pytest.mark.parametrize("user", ["0", "1000"])
def test_install_gets_the_package_that_debian_keeps_venv_in(tmp_path: Path, user: str) -> None:
    stand_in(tmp_path, "python3.99", BARE_PYTHON)
    stand_in(tmp_path, "id", f"#!/bin/sh\necho {user}\n")
    stand_in(tmp_path, "apt-get", NOTE)
    stand_in(tmp_path, "sudo", '#!/bin/sh\n[ "$1" = -n ] && shift && exec env "$@"\n' if user != "0" else "exit 1\n")
    assert run(tmp_path, "install.sh", RAYLIT_PYTHON="python3.99").returncode == 7
    options = "apt-get -qq -o DPkg::Lock::Timeout=600"
    assert asked(tmp_path) == [f"{options} update", f"{options} install -y python3.99-venv"]


def test_install_wants_a_clone(tmp_path: Path) -> None:
    alone = tmp_path / "clusters" / "install.sh"
    alone.parent.mkdir()
    alone.write_text((CLUSTERS / "install.sh").read_text())
    environment = {**os.environ, "HOME": str(tmp_path), "RAYLIT_PYTHON": "python3"}
    refused = subprocess.run(["bash", str(alone)], env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "constraints.txt is missing" in refused.stderr


def test_every_script_is_one_for_bash() -> None:
    scripts = sorted(CLUSTERS.glob("*.sh"))
    assert len(scripts) >= 3
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_readme_names_every_file() -> None:
    text = (CLUSTERS / "README.md").read_text()
    missing = [path.name for path in CLUSTERS.iterdir() if path.is_file() and f"({path.name})" not in text]
    assert missing in ([], ["README.md"])
    assert (ROOT / "docs" / "clusters.md").exists()
