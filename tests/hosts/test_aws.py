"""aws-cpu.yaml whole, over hosts that stand for its instances: `ray up`, the autoscaler, training onto S3, `ray down`.

moto is AWS, on the laptop's port 5000. It gives out private addresses in a row, so that the head and the workers that
Ray launches have those of hosts of the lab, which are switched on already. Needs root.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.clusters.pins import CLUSTERS
from tests.hosts.machines import HOME, NETWORK, ROOT, Host, Lab, missing, wait_for

PORT, BUCKET, REGION = 5000, "my-runs", "us-west-2"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
FILE = f"{HOME}/aws-cpu.yaml"
# What no file of ours is for: a network whose next addresses are the hosts', and the laptop's key.
ACCOUNT = f"""
import boto3
ec2 = boto3.client("ec2", region_name="{REGION}")
vpc = ec2.create_vpc(CidrBlock="{NETWORK}.0/24")["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="{NETWORK}.0/24", AvailabilityZone="{REGION}a")["Subnet"]["SubnetId"]
ec2.create_key_pair(KeyName="laptop")  # a name only: the hosts know the laptop's key
for _ in range(7):  # AWS keeps the first four of a subnet; these take the ones up to the laptop's
    ec2.run_instances(ImageId="ami-12345678", MinCount=1, MaxCount=1, SubnetId=subnet)
print(vpc)
"""
INSTANCES = f"""
import boto3, json
found = boto3.client("ec2", region_name="{REGION}").describe_instances()["Reservations"]
each = [each for reservation in found for each in reservation["Instances"] if each.get("Tags")]
print(json.dumps([[it["PrivateIpAddress"], it["State"]["Name"], {{tag["Key"]: tag["Value"] for tag in it["Tags"]}}]
                  for it in each]))
"""

THERE = """
import ray
ray.init(log_to_driver=False)
print("THERE", sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))
"""


def adapted(group: str) -> str:
    """The file, its three places filled in; and what is other here than at AWS."""
    text = (CLUSTERS / "aws-cpu.yaml").read_text()
    config = yaml.safe_load(text.replace("sg-CHANGE-ME", group).replace("s3://CHANGE-ME", f"s3://{BUCKET}"))
    config["provider"]["use_internal_ips"] = True  # the laptop is in the hosts' network
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    for kind in config["available_node_types"].values():
        kind["node_config"]["KeyName"] = "laptop"
    config["available_node_types"]["worker"].update(max_workers=2, resources={"CPU": 1})  # as the hosts have
    config["setup_commands"] = [f"RAYLIT_PYTHON={PYTHON} {config['setup_commands'][0]}"]
    return yaml.safe_dump(config, width=1000)


def furnish(host: Host) -> None:
    """What an image and a role bring: an environment of the very versions, and the way to AWS."""
    environment, base = Path(sys.prefix), Path(sys.base_prefix)
    host.run(f"""
        mkdir raylit-env && for part in bin lib pyvenv.cfg; do ln -s {environment}/$part raylit-env/; done
        mkdir -p .local/bin && ln -s {base}/bin/python3.* .local/bin/
        cat >.bashrc <<'EOF'
export PATH=~/.local/bin:"$PATH" RAY_USE_MULTIPROCESSING_CPU_COUNT=1
export AWS_ENDPOINT_URL=http://{NETWORK}.10:{PORT} AWS_ACCESS_KEY_ID=AKIDEXAMPLE AWS_SECRET_ACCESS_KEY=secret
export AWS_DEFAULT_REGION={REGION} AWS_EC2_METADATA_DISABLED=true
EOF
    """)
    host.run(f"RAYLIT_PYTHON={PYTHON} bash {ROOT}/clusters/install.sh --as-it-is examples,aws")


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    """By their names; the first one is the laptop."""
    made = Lab()
    try:
        for name in ("laptop", "head", "worker-1", "worker-2"):
            made.add(name)
        made.furnish()
        for host in made.hosts.values():
            host.boot()
            furnish(host)
        laptop = made.hosts["laptop"]
        moto = f"MOTO_IAM_LOAD_MANAGED_POLICIES=true exec python -m moto.server -H {NETWORK}.10 -p {PORT} >moto 2>&1"
        with laptop.start(moto) as aws:
            wait_for(lambda: PORT in laptop.listening(), "moto")
            yield made.hosts
            aws.terminate()
    finally:
        made.close()


@pytest.mark.cluster
@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_from_nothing_to_a_trained_model_and_nothing_left(hosts: dict[str, Host]) -> None:
    laptop, head, *workers = hosts.values()
    laptop.write("account.py", ACCOUNT)
    laptop.write("instances.py", INSTANCES)
    vpc = laptop.run("python account.py").stdout.split()[-1]
    once = laptop.run(
        f"python {ROOT}/clusters/aws_once.py --region {REGION} --bucket {BUCKET} --ssh-from none --vpc {vpc}"
    )
    group = once.stdout.split("SecurityGroupIds: [")[1].split("]")[0]
    laptop.write("aws-cpu.yaml", adapted(group))
    laptop.run("raylit token raylit-aws-cpu")

    laptop.run(f"cd {ROOT} && ray up -y {FILE}", timeout=600)
    head.write("there.py", THERE)

    def joined() -> bool:
        told = head.run("RAY_AUTH_MODE=token python there.py", check=False).stdout
        return f"THERE {[each.address for each in (head, *workers)]}" in told

    wait_for(joined, "the autoscaler's workers join", 400)
    instances = {address: tags for address, state, tags in json.loads(laptop.run("python instances.py").stdout)}
    assert instances[head.address]["ray-node-type"] == "head"
    assert [instances[each.address]["ray-node-type"] for each in workers] == ["worker", "worker"]

    done = laptop.run(
        f"cd {ROOT} && raylit submit {FILE} examples/01_digits/main.py -- --num-workers 2 --max-epochs 1", timeout=600
    )
    assert "fit on 2 workers" in done.stdout
    run = re.search(rf"run folder: {BUCKET}/runs/(\S+)", done.stdout)  # a path on the storage's filesystem
    assert run is not None, done.stdout
    # Both ranks, each on an instance of its own, have written there: a checkpoint is whole only then.
    listed = laptop.run(f"raylit checkpoints s3://{BUCKET}/runs/{run[1]} --verify")
    assert " yes" in listed.stdout, listed.stdout

    laptop.run(f"cd {ROOT} && ray down -y {FILE}", timeout=300)
    after = json.loads(laptop.run("python instances.py").stdout)
    assert {state for address, state, _ in after if address in instances} == {"terminated"}
