"""The files for `ray up`: Ray's own checks, which need no cloud, and ours. And what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.clusters.pins import CLUSTERS, ROOT

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
FILES = sorted(path for path in CLUSTERS.glob("*.yaml") if "\nprovider:\n" in path.read_text())
CLOUDS = [path for path in FILES if path.name != "onprem.yaml"]
EVERYTHING = sorted(path for path in CLUSTERS.iterdir() if path.is_file())

by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
clouds = pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def check(config: dict[str, Any]) -> None:
    """What `ray up` does with a file before it asks a cloud anything: schema, defaults, rules."""
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(config)))


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def test_they_are_all_here() -> None:
    expected = {"aws-cpu.yaml", "aws-gpu-spot.yaml", "gcp-gpu.yaml", "azure-gpu.yaml"}
    assert expected <= {path.name for path in FILES} <= expected | {"onprem.yaml"}


@by_name
def test_ray_takes_it(path: Path) -> None:
    check(read(path))


def at(config: Any, *path: str) -> Any:
    for step in path:
        config = config[step]
    return config


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a typo in a key": ("aws-cpu.yaml", lambda it: it.update(max_worker=it.pop("max_workers")), "max_worker"),
    "a typo in a node type": (
        "gcp-gpu.yaml", lambda it: at(it, "available_node_types", "worker").update(min_worker=1), "min_worker"
    ),
    "no head type": ("aws-gpu-spot.yaml", lambda it: it.update(head_node_type="main"), "head_node_type"),
    "no provider": ("azure-gpu.yaml", lambda it: it.pop("provider"), "provider"),
    "no node_config": (
        "azure-gpu.yaml", lambda it: at(it, "available_node_types", "head").pop("node_config"), "node_config"
    ),
    "a command that is no text": ("gcp-gpu.yaml", lambda it: it["setup_commands"].append({"bash": "x"}), "bash"),
    "more workers than allowed": (
        "aws-cpu.yaml", lambda it: at(it, "available_node_types", "worker").update(min_workers=9), "max_workers"
    ),
    "a proxy by node without its command": (
        "aws-cpu.yaml", lambda it: it["auth"].update(ssh_proxy_use_node_id=True), "ssh_proxy_command"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one_is_refused(what: str) -> None:
    name, damage, named = WRONG[what]
    config = read(CLUSTERS / name)
    damage(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)) as refused:
        check(config)
    assert named in str(refused.value)


def test_a_local_cluster_without_addresses_is_refused() -> None:
    from click import ClickException
    from ray.autoscaler._private.local.config import prepare_local

    config = read(CLUSTERS / "aws-cpu.yaml")
    for key in ("available_node_types", "head_node_type", "max_workers"):
        config.pop(key)
    config["provider"] = {"type": "local", "head_ip": "192.0.2.1"}
    with pytest.raises(ClickException, match="worker_ips"):
        prepare_local(config)


@by_name
def test_the_token_is_sent_and_asked_for_everywhere(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == f"~/.ray/tokens/{config['cluster_name']}"
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    for start in starts:
        assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b[^;]*;\s*ray start", start), start


@by_name
def test_nothing_listens_for_the_world(path: Path) -> None:
    config = read(path)
    (head,) = (command for command in commands(config) if "ray start --head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in yaml.safe_dump(config) and "::/0" not in yaml.safe_dump(config)


def test_no_file_lets_the_cloud_open_its_ports() -> None:
    for name in ("aws-cpu.yaml", "aws-gpu-spot.yaml"):
        for kind in read(CLUSTERS / name)["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"]  # else Ray makes a group: test_aws.py shows what it lets in
    for kind in read(CLUSTERS / "gcp-gpu.yaml")["available_node_types"].values():
        (interface,) = kind["node_config"]["networkInterfaces"]  # else Ray takes the default network, open on port 22
        assert interface["subnetwork"].endswith("/subnetworks/raylit")
    provider = read(CLUSTERS / "azure-gpu.yaml")["provider"]
    assert provider["use_internal_ips"] and "use_external_head_ip" not in provider


@by_name
def test_the_head_gives_up_a_silent_host_soon(path: Path) -> None:
    (head,) = (command for command in commands(read(path)) if "ray start --head" in command)
    for setting in ("failure_threshold=3", "timeout_ms=1000", "period_ms=1000"):
        assert f"RAY_health_check_{setting}" in head
    assert all("--object-store-memory=" in command for command in commands(read(path)) if "ray start" in command)


@by_name
def test_every_host_installs_what_constraints_pins_and_nothing_else(path: Path) -> None:
    config = read(path)
    for needed in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "raylit", "clusters"):
        assert config["file_mounts"][f"~/raylit/{needed}"] == needed
        assert (ROOT / needed).exists()
    installs = [command for command in config["setup_commands"] if "install" in command]
    assert len(installs) == 1 and "bash ~/raylit/clusters/install.sh" in installs[0]
    # Ray's own defaults for a cloud would install other versions: none of them is left.
    prepared = prepare_config(copy.deepcopy(config))
    asked = "\n".join(commands(prepared))
    assert not re.search(r"pip install|conda|ray-wheels|==", asked)
    storage = re.search(r"RAYLIT_STORAGE=(\S+)", installs[0])
    assert storage is not None and re.match(r"(s3|gs|abfss)://|/", storage[1])


@clouds
def test_the_autoscaler_finds_its_configuration_and_its_cloud(path: Path) -> None:
    config = read(path)
    (head,) = (command for command in commands(config) if "ray start --head" in command)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    extra = config["provider"]["type"]
    assert f",{extra}" in "".join(config["setup_commands"])
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["idle_timeout_minutes"] == 10


def without_a_key(home: Path, text: str) -> str:
    (home / ".ssh" / "id_ed25519").unlink()
    return text


def without_a_token(home: Path, text: str) -> str:
    (home / ".ray" / "tokens" / "raylit-onprem").unlink()
    return text


def misspelt(home: Path, text: str) -> str:
    return text.replace("\nsetup_commands:", "\nsetup_comands:")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Ray leaves the files it reads open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("command", "mistake", "where"),
    [
        ("up -y", without_a_key, ROOT), ("up -y", without_a_token, ROOT), ("up -y", None, CLUSTERS),
        ("up -y", misspelt, ROOT), ("monitor", None, ROOT), ("submit", None, ROOT),
    ],
)  # fmt: skip
def test_the_troubleshooting_has_rays_own_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    mistake: Callable[[Path, str], str] | None,
    where: Path,
) -> None:
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))  # where Ray notes such a cluster
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # and what a cloud said of it
    monkeypatch.chdir(where)
    for needed in (".ssh/id_ed25519", ".ray/tokens/raylit-onprem"):
        (tmp_path / needed).parent.mkdir(parents=True)
        (tmp_path / needed).touch()
    text = (CLUSTERS / "onprem.yaml").read_text().replace("192.168.1.1", "192.0.2.1")  # nobody's addresses
    path = tmp_path / "onprem.yaml"
    path.write_text(mistake(tmp_path, text) if mistake else text)
    script = [str(ROOT / "examples" / "01_digits" / "main.py")] if command == "submit" else []
    error = CliRunner().invoke(cli, [*command.split(), str(path), *script]).exception
    assert error is not None
    said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for its, pages in (("[Errno 2] No such file or directory: ", "... "), (str(tmp_path), "/home/me"),
                       ("raylit-onprem", "NAME"), ("'setup_comands'", "'...'")):  # fmt: skip
        said = said.replace(its, pages)
    assert f'"{said}"' in (ROOT / "docs" / "clusters.md").read_text()


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:first])


@pytest.mark.parametrize(
    "path", [*FILES, *CLUSTERS.glob("kubernetes-*.yaml"), CLUSTERS / "slurm.sbatch"], ids=lambda path: path.name
)
def test_the_header_says_what_to_change_what_it_costs_and_the_commands(path: Path) -> None:
    text = header(path)
    for word in ("Change:", "Wrong:", "Token:", "Run:"):
        assert f"\n{word}" in text, word
    change = text[text.index("\nChange:") : text.index("\nWrong:")]
    places = set(re.findall(r"\((\d)\)|\b(\d)\. ", change))
    assert 1 <= len(places) <= 3
    if path.name != "onprem.yaml":
        marked = set(re.findall(r"# \((\d)\)", path.read_text()))  # the header has other words before them
        assert marked == {number or other for number, other in places}
    name = read(path).get("cluster_name") if path in FILES else None
    if name:
        assert f"raylit token {name}" in text and f"ray up -y clusters/{path.name}" in text
        assert f"ray down -y clusters/{path.name}" in text


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.name)
def test_no_secret_is_in_any_file(path: Path) -> None:
    text = path.read_text()
    for pattern in (
        r"AKIA[0-9A-Z]{16}",
        r"BEGIN [A-Z ]*PRIVATE KEY",
        r"\b[0-9a-f]{40,}\b",
        r"(?i)(password|secret_?key|auth_token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,}",
        r"://[^/\s]+:[^/\s]+@",
    ):
        assert not re.search(pattern, text), pattern


def cut_short(text: str) -> list[str]:
    """Plain one-line commands of which YAML takes the rest for a comment, though it stands within quotes."""
    found = []
    for line in text.splitlines():
        plain = re.match(r"\s*- (?![>|'\"])(.*)", line)
        if plain is None or " #" not in plain[1]:
            continue
        kept = plain[1][: plain[1].index(" #")]
        if kept.count('"') % 2 or kept.count("'") % 2:
            found.append(line)
    return found


@by_name
def test_no_command_is_cut_short_by_a_comment_sign(path: Path) -> None:
    text = path.read_text()
    assert cut_short(text) == []
    # In a folded command a comment sign would end the shell's line.
    assert not any(" #" in command for command in commands(read(path)))


def test_a_command_that_is_cut_short_is_found() -> None:
    assert cut_short("setup_commands:\n    - echo 'a # b'\n    - ls  # fine\n") == ["    - echo 'a # b'"]
