"""A cluster of ``clusters/onprem.yaml`` on a lab's hosts: the file as it is, but for the places its header names."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.hosts.machines import HOME, ROOT, SHARED, Host, Lab, lab, wait_for

FILE, NAME = "onprem.yaml", "raylit-onprem"
STORAGE = f"{SHARED}/runs"
_REDIS_PORT = 6390


def adapted(head: Host, workers: Sequence[Host], redis_at: str | None = None) -> str:
    """``clusters/onprem.yaml`` for these hosts; with Redis as its comment says, where an address is given."""
    config = yaml.safe_load((ROOT / "clusters/onprem.yaml").read_text())
    config["provider"].update(head_ip=head.address, worker_ips=[each.address for each in workers])  # place 1
    config["auth"]["ssh_user"] = "root"  # place 2; the key lies where the file says
    (setup,) = config["setup_commands"]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert setup.startswith(f"RAYLIT_STORAGE={STORAGE} bash "), setup  # place 3: the hosts share that very folder
    config["setup_commands"] = [f"RAYLIT_PYTHON={python} {setup}"]
    if redis_at is not None:
        stop, start = config["head_start_ray_commands"]
        start = start.replace("export ", f"export RAY_REDIS_ADDRESS={redis_at} ", 1)
        start = start.replace("ray start --head ", 'ray start --head --redis-password="$(cat ~/.ray/auth_token)" ', 1)
        config["head_start_ray_commands"] = [stop, start]
    return yaml.safe_dump(config, width=1000)


def environment(host: Host, clone: str) -> None:
    """Give a host an environment of the very versions, as of an image: ``install.sh`` finds nothing to do."""
    made = Path(sys.prefix)
    host.run(f"""
        mkdir raylit-env && for part in bin lib pyvenv.cfg; do ln -s {made}/$part raylit-env/; done
        mkdir -p .local/bin && ln -s {Path(sys.base_prefix)}/bin/python3.* .local/bin/
        echo 'export PATH=~/.local/bin:"$PATH"' >.bashrc
        # A host says how many CPUs it has; the control group that Ray looks at is the machine's.
        echo 'export RAY_USE_MULTIPROCESSING_CPU_COUNT=1' >>.bashrc
    """)
    host.run(f"RAYLIT_PYTHON={_python()} bash {clone}/clusters/install.sh --as-it-is examples")


class OnPrem:
    """What a person does on the laptop. The clone of raylit is the working directory of all commands."""

    def __init__(self, machines: Lab, redis_behind: bool = False) -> None:
        self.lab, self._redis_behind = machines, redis_behind
        self.laptop, self.head, *self.workers = machines.hosts.values()
        self.file = f"{HOME}/{FILE}"

    def furnish(self) -> None:
        """Give the hosts what they have before anybody thinks of Ray, and the laptop its file, key and token."""
        for host in self.lab.hosts.values():
            environment(host, str(ROOT))
        redis_at = f"{self.laptop.address}:{_REDIS_PORT}" if self._redis_behind else None
        self.laptop.write(FILE, adapted(self.head, self.workers, redis_at))
        self.laptop.run(f"ssh -o StrictHostKeyChecking=accept-new {self.head.address} true && raylit token {NAME}")

    def ray(self, command: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """A command on the laptop, in the clone; ``FILE`` is the cluster's file."""
        return self.laptop.run(f"cd {ROOT} && {command.replace('FILE', self.file)}", check=check, timeout=timeout)

    def up(self) -> None:
        """``ray up``; returns once the head and all workers have joined, as ``ray status`` says."""
        self.ray("ray up -y FILE")
        wait_for(lambda: f"{1 + len(self.workers)} local.cluster.node" in self.status(), "all hosts join", 300)

    def status(self) -> str:
        """What ``ray status`` says on the head."""
        return self.head.run("RAY_AUTH_MODE=token ray status", check=False).stdout

    @contextlib.contextmanager
    def tunnel(self) -> Iterator[None]:
        """``ray dashboard`` on the laptop: the dashboard and the job server of the head at its port 8265."""
        with self.start("ray dashboard FILE") as process:
            try:
                wait_for(lambda: 8265 in self.laptop.listening() or process.poll() is not None, "the tunnel")
                assert process.poll() is None, process.communicate()[0]
                yield
            finally:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.terminate()
                process.wait(30)

    def start(self, command: str, **more: Any) -> subprocess.Popen[str]:
        return self.laptop.start(f"cd {ROOT} && {command.replace('FILE', self.file)}", **more)


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def redis(host: Host) -> Iterator[None]:
    """Redis on a host, for the cluster's state; who has the cluster's token may use it."""
    password = (host.home / f".ray/tokens/{NAME}").read_text()
    host.write("redis.conf", f"port {_REDIS_PORT}\nbind 0.0.0.0\nrequirepass {password}\nsave ''\n", 0o600)
    with host.start("exec redis-server redis.conf >redis.log") as process:
        try:
            wait_for(lambda: _REDIS_PORT in host.listening(), "Redis", 30)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def onprem(workers: Sequence[int], redis_behind: bool = False) -> Iterator[OnPrem]:
    """Hosts that are ready for ``ray up``: a head, and workers of so many CPUs."""
    with lab([("head", 1), *((f"worker-{number}", cpus) for number, cpus in enumerate(workers, 1))]) as machines:
        cluster = OnPrem(machines, redis_behind)
        cluster.furnish()
        yield cluster
