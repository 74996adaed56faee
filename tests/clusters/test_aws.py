"""The AWS files against moto's EC2: real `ray up` and `ray down`, only that nothing answers ssh but a stand-in.

`ssh` and `rsync` of the launcher are scripts here that note what they were asked; so the head's commands do not run,
and the workers, which the autoscaler on the head would launch, are launched here with its node provider and the very
configuration that the head was sent.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.pins import CLUSTERS, ROOT

boto3 = pytest.importorskip("boto3", reason="needs boto3, which the extra 'test' installs")
pytest.importorskip("moto", reason="needs moto, which the extra 'test' installs")
pytest.importorskip("flask_cors", reason="needs flask-cors, which the extra 'test' installs")

REGION, BUCKET, ADDRESS = "us-west-2", "my-runs", "203.0.113.7"
RAY = Path(sys.executable).with_name("ray")
NOTE = """#!/usr/bin/env bash
# One line for each call; and what is sent as the head's configuration is kept.
printf '%s %s\\n' "$(basename "$0")" "$(printf '%s ' "$@" | tr '\\n' ' ')" >>"$NOTES/calls"
for word in "$@"; do case $word in *ray-bootstrap-*) cp "$word" "$NOTES/bootstrap.json" ;; esac; done
exit 0
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    import logging
    import threading

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    level = logging.getLogger("werkzeug").level
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
    logging.getLogger("werkzeug").setLevel(level)


@dataclass
class Laptop:
    """A home with tokens, whose AWS is moto's, emptied; and the clusters' files, filled in as their header says."""

    folder: Path
    environment: dict[str, str]

    @property
    def ec2(self) -> Any:
        return boto3.client("ec2", region_name=REGION, endpoint_url=self.environment["AWS_ENDPOINT_URL"])

    @property
    def iam(self) -> Any:
        return boto3.client("iam", region_name=REGION, endpoint_url=self.environment["AWS_ENDPOINT_URL"])

    def once(self, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CLUSTERS / "aws_once.py"), "--region", REGION, *more]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def ray(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(RAY), *command], env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, timeout=280,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def filled_in(self, name: str, group: str) -> Path:
        text = (CLUSTERS / name).read_text()
        assert text.count("sg-CHANGE-ME") == 2 and text.count("CHANGE-ME") == 3
        path = self.folder / name
        path.write_text(text.replace("sg-CHANGE-ME", group).replace("s3://CHANGE-ME", f"s3://{BUCKET}"))
        return path

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def instances(self) -> list[dict[str, Any]]:
        found = self.ec2.describe_instances()["Reservations"]
        return [each for reservation in found for each in reservation["Instances"]]

    def open_to(self) -> set[str]:
        """Every address range that any rule of any group lets in."""
        ranges = set()
        for group in self.ec2.describe_security_groups()["SecurityGroups"]:
            for rule in group["IpPermissions"]:
                ranges |= {each["CidrIp"] for each in rule.get("IpRanges", [])}
                ranges |= {each["CidrIpv6"] for each in rule.get("Ipv6Ranges", [])}
        return ranges


@pytest.fixture
def laptop(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laptop:
    import urllib.request

    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")  # moto reads it when its accounts are made anew
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ssh", "rsync"):
        (tools / name).write_text(NOTE)
        (tools / name).chmod(stat.S_IRWXU)
    (tmp_path / "tmp").mkdir()
    (tmp_path / ".ssh").mkdir(mode=0o700)
    for name in ("raylit-aws-cpu", "raylit-aws-gpu"):
        token = tmp_path / ".ray" / "tokens" / name
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("the-secret-of-this-cluster")
    keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": endpoint}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return Laptop(
        tmp_path,
        {
            **kept, **keys, "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), "NOTES": str(tmp_path),
            "PATH": f"{tools}:{os.environ['PATH']}", "RAY_UP_enable_autoscaler_v2": "1",
        },
    )  # fmt: skip


def test_what_is_made_once_is_closed_and_may_little(laptop: Laptop) -> None:
    done = laptop.once("--bucket", BUCKET, "--ssh-from", ADDRESS)
    assert done.returncode == 0, done.stderr
    (group,) = laptop.ec2.describe_security_groups(GroupNames=["raylit"])["SecurityGroups"]
    assert done.stdout.splitlines()[1:] == [
        f"(2) SecurityGroupIds: [{group['GroupId']}]", f"(3) RAYLIT_STORAGE=s3://{BUCKET}/runs"
    ]  # fmt: skip
    inside, ssh = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]] and not inside["IpRanges"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpRanges"]) == (22, 22, [{"CidrIp": f"{ADDRESS}/32"}])

    allowed = {}
    for name in ("raylit-head", "raylit-worker"):
        policy = laptop.iam.get_role_policy(RoleName=name, PolicyName="raylit")["PolicyDocument"]
        allowed[name] = {action for statement in policy["Statement"] for action in statement["Action"]}
        (role,) = laptop.iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
    assert all(action.startswith("s3:") for action in allowed["raylit-worker"])
    assert "ec2:TerminateInstances" in allowed["raylit-head"] and not any(
        "*" in each for each in allowed["raylit-head"] - {"ec2:Describe*"}
    )
    s3 = boto3.client("s3", region_name=REGION)
    closed = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert set(closed.values()) == {True}

    # Again, from another place: the old address is out, nothing is made twice.
    again = laptop.once("--bucket", BUCKET, "--ssh-from", "198.51.100.0/24")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout and laptop.open_to() == {"198.51.100.0/24"}
    none = laptop.once("--bucket", BUCKET, "--ssh-from", "none")
    assert none.returncode == 0 and laptop.open_to() == set()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("0.0.0.0/0", "lets in the whole world; give your own"), ("::/0", "lets in the whole world; give your own"),
        ("10.0.0.0/8", "lets in 16777216 addresses; give your own"), ("my-host", "'my-host' is no address; give yours"),
    ],
)  # fmt: skip
def test_half_the_world_is_not_let_in(laptop: Laptop, wrong: str, told: str) -> None:
    refused = laptop.once("--bucket", BUCKET, "--ssh-from", wrong)
    assert refused.returncode == 2 and wrong in refused.stderr and told in refused.stderr
    assert laptop.open_to() == set()


@pytest.mark.parametrize("more", [{}, {"AWS_PROFILE": "not-there"}])
def test_without_a_login_the_next_step_is_said(laptop: Laptop, more: dict[str, str]) -> None:
    kept = {name: value for name, value in laptop.environment.items() if not name.startswith("AWS_")}
    nobody = replace(laptop, environment={**kept, "AWS_EC2_METADATA_DISABLED": "true", **more})
    refused = nobody.once("--bucket", BUCKET, "--ssh-from", ADDRESS)
    assert refused.returncode == 1 and refused.stderr.startswith("aws_once.py: ")
    assert refused.stderr.endswith("; run `aws configure`, or export AWS_PROFILE=NAME\n")
    assert len(refused.stderr.splitlines()) == 1


def test_what_aws_refuses_is_one_clear_line(laptop: Laptop) -> None:
    refused = laptop.once("--bucket", "x", "--ssh-from", ADDRESS)  # too short a name
    assert refused.returncode == 1 and refused.stderr.startswith("aws_once.py: AWS refused: ")
    assert len(refused.stderr.splitlines()) == 1


def launch_workers(laptop: Laptop, count: int) -> None:
    """As the autoscaler on the head does, from what the head was sent."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    config = json.loads((laptop.folder / "bootstrap.json").read_text())
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "worker"}
    for _ in range(count):  # moto makes MinCount instances, AWS MaxCount: one at a time they agree
        provider.create_node(config["available_node_types"]["worker"]["node_config"], tags, 1)


@pytest.mark.parametrize("name", [pytest.param("aws-cpu.yaml", marks=pytest.mark.long), "aws-gpu-spot.yaml"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_and_down(laptop: Laptop, name: str) -> None:
    laptop.once("--bucket", BUCKET, "--ssh-from", ADDRESS)
    (group,) = laptop.ec2.describe_security_groups(GroupNames=["raylit"])["SecurityGroups"]
    groups = {each["GroupId"] for each in laptop.ec2.describe_security_groups()["SecurityGroups"]}
    file = laptop.filled_in(name, group["GroupId"])
    spot = name == "aws-gpu-spot.yaml"

    up = laptop.ray("up", "-y", str(file))
    assert up.returncode == 0, up.stdout
    launch_workers(laptop, 2)
    head, *workers = sorted(laptop.instances(), key=lambda each: each["InstanceType"] != "m7i.large")
    assert head["InstanceType"] == "m7i.large" and "InstanceLifecycle" not in head
    assert [each.get("InstanceLifecycle") for each in workers] == ["spot" if spot else None] * 2
    assert {each["InstanceType"] for each in workers} == {"g6.xlarge" if spot else "m7i.2xlarge"}
    for each in (head, *workers):
        assert [it["GroupId"] for it in each["SecurityGroups"]] == [group["GroupId"]]
        profile = "raylit-head" if each is head else "raylit-worker"
        assert each["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
    # Ray made no group of its own, and added no rule to ours.
    assert {each["GroupId"] for each in laptop.ec2.describe_security_groups()["SecurityGroups"]} == groups
    assert laptop.open_to() == {f"{ADDRESS}/32"}

    # What the head was asked to do: the token sent, everything installed from the pins, Ray started closed.
    sent = [call for call in laptop.calls if call.startswith("rsync")]
    assert any(".ray/tokens/raylit-aws-" in call and ".ray/auth_token" in call for call in sent)
    assert any(call.split()[-2].endswith("constraints.txt") for call in sent)
    assert any(
        f"RAYLIT_STORAGE=s3://{BUCKET}/runs bash ~/raylit/clusters/install.sh examples,aws" in c for c in laptop.calls
    )
    (start,) = (call for call in laptop.calls if "ray start --head" in call)
    assert "export RAY_AUTH_MODE=token" in start and "--dashboard-host=127.0.0.1" in start
    assert "the-secret-of-this-cluster" not in up.stdout + "\n".join(laptop.calls) + json.dumps(
        laptop.instances(), default=str
    )

    down = laptop.ray("down", "-y", str(file))
    assert down.returncode == 0, down.stdout
    assert {each["State"]["Name"] for each in laptop.instances()} == {"terminated"}
    assert boto3.client("s3", region_name=REGION).list_buckets()["Buckets"][0]["Name"] == BUCKET


@pytest.mark.parametrize("forgotten", ["the group", "the placeholder"])
def test_a_file_that_was_not_filled_in_launches_nothing(laptop: Laptop, forgotten: str) -> None:
    file = laptop.filled_in(
        "aws-cpu.yaml", "sg-CHANGE-ME" if forgotten == "the placeholder" else "sg-0123456789abcdef0"
    )
    up = laptop.ray("up", "-y", str(file))
    assert up.returncode != 0 and "security group" in up.stdout
    assert laptop.instances() == [] and laptop.open_to() == set()


@pytest.mark.slow
@pytest.mark.long
def test_why_the_group_is_named_ray_would_let_in_the_world(laptop: Laptop) -> None:
    """If this fails, Ray has mended it, and the files may leave the group to Ray."""
    content = yaml.safe_load((CLUSTERS / "aws-cpu.yaml").read_text())
    for kind in content["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"], kind["node_config"]["IamInstanceProfile"]
    file = laptop.folder / "open.yaml"
    file.write_text(yaml.safe_dump(content))
    # Ray waits 15 s twice for roles that it makes; aws_once.py's are not used here.
    laptop.ray("up", "-y", str(file))
    assert "0.0.0.0/0" in laptop.open_to()
