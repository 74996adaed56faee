"""``clusters/onprem.yaml`` on three hosts: what its header says a person does, from the laptop, and who is kept out."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.hosts.machines import HOME, ROOT, SHARED, Host, missing, wait_for
from tests.hosts.onprem import NAME, STORAGE, OnPrem, onprem

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # Ray starts and stops on three hosts, on few cores
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

TOKEN = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={HOME}/.ray/tokens/{NAME};"
JOBS = "http://127.0.0.1:8265"
SCRIPTS = f"{ROOT}/tests/hosts"


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnPrem]:
    """A head, a worker of two CPUs and one of one CPU; ``ray up`` is done, and both workers have joined."""
    with onprem([2, 1]) as made:
        made.up()
        yield made


@pytest.fixture
def tunnel(cluster: OnPrem) -> Iterator[str]:
    """``ray dashboard`` runs on the laptop: the job server's address there."""
    with cluster.tunnel():
        yield JOBS


def run_folder(output: str) -> str:
    found = re.search(r"run folder: (\S+)", output)
    assert found, output
    return found[1]


def test_ranks_are_those_of_the_hosts(cluster: OnPrem) -> None:
    notes = cluster.lab.shared / "ranks"
    notes.mkdir()
    cluster.ray(f"ray submit FILE tests/hosts/ranks.py -- {SHARED}/ranks 3")
    said = [json.loads((notes / f"{rank}.json").read_text()) for rank in range(3)]
    assert len(list(notes.iterdir())) == 3 and {each["of"] for each in said} == {3}
    # worker-1 has two CPUs, worker-2 one. Which of them is the first node is Ray's to say; ranks go node by node.
    first, second = ("worker-1", "worker-2") if said[0]["host"] == "worker-1" else ("worker-2", "worker-1")
    size = {"worker-1": 2, "worker-2": 1}
    wanted = [{"host": host, "local": local, "node": node, "of": 3}
              for node, host in enumerate((first, second)) for local in range(size[host])]  # fmt: skip
    assert said == wanted


def test_the_example_is_trained_and_its_run_comes_down_whole(cluster: OnPrem) -> None:
    ran = cluster.ray("ray submit FILE examples/01_digits/main.py -- --num-workers 3 --max-epochs 3")
    folder = run_folder(ran.stdout)
    assert folder.startswith(f"{STORAGE}/Net-") and "fit on 3 workers" in ran.stdout, ran.stdout
    accuracy = re.search(r"test accuracy: (0\.\d+)", ran.stdout)
    assert accuracy and float(accuracy[1]) > 0.9, ran.stdout
    cluster.ray(f"ray rsync-down FILE {folder}/ {HOME}/run/")
    there, here = cluster.lab.shared / "runs" / folder.rsplit("/", 1)[1], cluster.laptop.home / "run"
    files = sorted(str(file.relative_to(there)) for file in there.rglob("*") if file.is_file())
    assert any(file.endswith("model.ckpt") for file in files), files
    assert {file: (here / file).read_bytes() for file in files} == {file: (there / file).read_bytes() for file in files}
    assert "42" in cluster.laptop.run("raylit checkpoints --verify run").stdout  # 1297 samples, 3 x 32 a step, 3 epochs


def test_a_project_of_several_files_is_a_job(cluster: OnPrem, tunnel: str) -> None:
    write = cluster.laptop.write
    write("project/parts/__init__.py", "")
    write("project/parts/net.py", (ROOT / "tests/hosts/ranks.py").read_text())
    write("project/main.py", """
import sys, torch, raylit
from parts.net import Net
if __name__ == "__main__":
    words = sys.argv[1:]
    loader = torch.utils.data.DataLoader(torch.randn(24, 2), batch_size=2)
    raylit.Trainer(num_workers=2, max_epochs=1, placement_strategy="SPREAD").fit(Net(words[0]), loader)
    print("words:", words[1:])
    sys.exit(int(words[1]))
""")  # fmt: skip
    (cluster.lab.shared / "job").mkdir()
    submit = f"ray job submit --address {tunnel} --working-dir project -- python main.py {SHARED}/job"
    refused = cluster.laptop.run(f"{submit} 0", check=False)
    assert refused.returncode != 0 and "authentication" in refused.stdout.lower(), refused.stdout
    ran = cluster.laptop.run(f"{TOKEN} {submit} 0 'two words'")
    assert "words: ['0', 'two words']" in ran.stdout, ran.stdout
    hosts = {json.loads(note.read_text())["host"] for note in (cluster.lab.shared / "job").iterdir()}
    assert hosts == {"worker-1", "worker-2"}


def test_raylit_submit_takes_the_clusters_file(cluster: OnPrem) -> None:
    cluster.laptop.write("other/parts.py", "VALUE = 3\n")
    cluster.laptop.write("other/main.py", "import sys\nfrom parts import VALUE\nprint(sys.argv[1:])\nsys.exit(VALUE)\n")
    ran = cluster.laptop.run(f"cd other && raylit submit {cluster.file} main.py -- --a 'two words'", check=False)
    assert ran.returncode == 3 and "['--a', 'two words']" in ran.stdout, ran.stdout


def test_another_host_key_than_the_known_one_is_refused(cluster: OnPrem) -> None:
    known = cluster.laptop.home / ".ssh/known_hosts"
    before = known.read_text()
    key = (cluster.laptop.folder / "ssh/host_key.pub").read_text().split()[:2]
    known.write_text(f"{cluster.head.address} {' '.join(key)}\n")
    try:
        # A connection that is open still would be used again.
        ran = cluster.ray("rm -rf /tmp/ray_ssh_* && ray exec FILE 'touch inside'", check=False)
        assert ran.returncode != 0 and "Connection closed by UNKNOWN port 65535" in ran.stdout, ran.stdout
        assert not (cluster.head.home / "inside").exists()
        by_hand = cluster.laptop.run(f"ssh -o BatchMode=yes {cluster.head.address} true", check=False)
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in by_hand.stdout, by_hand.stdout
    finally:
        known.write_text(before)
    cluster.ray("ray exec FILE 'touch inside'")
    assert (cluster.head.home / "inside").exists()


HOLD = """
import pathlib, sys, time, ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def here(self): return ray.util.get_node_ip_address()
workers = [Worker.remote() for _ in range(3)]
print("there:", sorted(ray.get([each.here.remote() for each in workers])), flush=True)
while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.1)
"""


def test_nothing_is_accepted_without_the_token(cluster: OnPrem) -> None:
    """Every port of the head and of a worker, while processes of a run are there, asked from another host."""
    cluster.head.write("hold.py", HOLD)
    with cluster.head.start(f"python hold.py {HOME}/done") as holding:
        try:
            assert holding.stdout is not None
            line = next((line for line in holding.stdout if "there:" in line), "")
            assert all(worker.address in line for worker in cluster.workers), line
            head, worker = (knocked(cluster, host) for host in (cluster.head, cluster.workers[0]))
        finally:
            cluster.head.write("done", "")
            holding.wait(60)
    # The dashboard, with the job server, is there, on loopback alone; so from elsewhere it is not.
    assert 8265 in cluster.head.listening() and "8265" not in head
    assert {"6379", "10001", "22"} <= head.keys()
    asked: dict[str, set[str]] = {"head": set(), "worker": set()}
    for host, answers in (("head", head), ("worker", worker)):
        for port, answer in answers.items():
            assert answer["grpc"] == {}, (host, port)
            asked[host] |= set(answer["grpc_refused"])
            for request, (status, text) in answer["http"].items():
                # Ray has no token for these: its metrics, to be read alone, and the word that a node is well.
                metrics = text.startswith("# ") and (status == 200 or (status == 405 and request.startswith("POST")))
                healthy = request == "GET /api/local_raylet_healthz" and (status, text) == (200, "success")
                assert metrics or healthy, (host, port, request, status, text)
    # Not for want of asking: what runs code and ends nodes was among what was refused.
    assert "/ray.rpc.CoreWorkerService/PushTask" in asked["worker"] & asked["head"]
    assert {"/ray.rpc.JobInfoGcsService/AddJob", "/ray.rpc.RayletDriver/Init"} <= asked["head"]
    assert {"/ray.rpc.NodeManagerService/RequestWorkerLease", "/ray.rpc.ObjectManagerService/Push"} <= asked["worker"]


def knocked(cluster: OnPrem, host: Host) -> dict[str, Any]:
    """What each port of the host answers that the laptop, without the token, reaches."""
    ports = " ".join(map(str, host.listening()))
    ran = cluster.laptop.run(f"python {SCRIPTS}/knock.py {host.address} {ports}")
    answers: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answers


def test_a_stranger_neither_joins_nor_connects(cluster: OnPrem) -> None:
    head = f"{cluster.head.address}:6379"
    for command in (f"ray start --address={head} --num-cpus=1", f"ray status --address {head}"):
        refused = cluster.laptop.run(f"timeout 120 {command}", check=False)
        assert refused.returncode != 0 and "AuthenticationError" in refused.stdout, (command, refused.stdout)
    assert not any("raylet" in line for line in cluster.laptop.processes())
    assert "3 local.cluster.node" in cluster.laptop.run(f"{TOKEN} ray status --address {head}").stdout


def ended(host: Host) -> bool:
    return not host.processes()


def test_a_new_token_and_then_nothing_is_left(cluster: OnPrem) -> None:
    """The end: the token is rotated as the header says, the cluster works with it, and then it is taken down."""
    status = f"ray status --address {cluster.head.address}:6379"
    old = (cluster.laptop.home / f".ray/tokens/{NAME}").read_text()
    cluster.ray(f"raylit token {NAME} --rotate")
    cluster.up()
    assert "3 local.cluster.node" in cluster.laptop.run(f"{TOKEN} {status}").stdout
    assert cluster.laptop.run(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={old} timeout 60 {status}", check=False).returncode
    ran = cluster.ray("ray exec FILE 'python ~/raylit/clusters/onprem_workers.py stop' && ray down -y FILE")
    assert "Ray is stopped on 3 of 3 hosts" in ran.stdout, ran.stdout
    for host in (cluster.head, *cluster.workers):
        with contextlib.suppress(TimeoutError):  # they were asked to end, and may take a moment
            wait_for(partial(ended, host), "the end", 20)
        assert host.processes() == [], host.name
        assert host.run("ls /dev/shm").stdout == "", host.name
