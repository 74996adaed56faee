"""A cluster of ``clusters/onprem.yaml`` on the hosts of a lab: the file as it is, but for the places its header names."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.hosts.machines import HOME, ROOT, SHARED, Host, Lab, lab

FILE, NAME = "onprem.yaml", "raylit-onprem"
STORAGE = f"{SHARED}/runs"


def adapted(head: Host, workers: Sequence[Host]) -> str:
    """``clusters/onprem.yaml`` for these hosts."""
    config = yaml.safe_load((ROOT / "clusters/onprem.yaml").read_text())
    config["provider"].update(head_ip=head.address, worker_ips=[each.address for each in workers])  # place 1
    config["auth"]["ssh_user"] = "root"  # place 2; the key lies where the file says
    (setup,) = config["setup_commands"]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert setup.startswith(f"RAYLIT_STORAGE={STORAGE} bash "), setup  # place 3: the hosts share that very folder
    config["setup_commands"] = [f"RAYLIT_PYTHON={python} {setup}"]
    return yaml.safe_dump(config, width=1000)


class OnPrem:
    """What a person does on the laptop. The clone of raylit is the working directory of all commands."""

    def __init__(self, machines: Lab) -> None:
        self.lab = machines
        self.laptop, self.head, *self.workers = machines.hosts.values()
        self.file = f"{HOME}/{FILE}"

    def furnish(self) -> None:
        """Give the hosts what they have before anybody thinks of Ray, and the laptop its file, key and token."""
        environment = Path(sys.prefix)
        for host in self.lab.hosts.values():
            # An environment of the very versions, such as an image may have: the set-up commands find nothing to do.
            host.run(f"""
                mkdir raylit-env && for part in bin lib pyvenv.cfg; do ln -s {environment}/$part raylit-env/; done
                mkdir -p .local/bin && ln -s {Path(sys.base_prefix)}/bin/python3.* .local/bin/
                echo 'export PATH=~/.local/bin:"$PATH"' >.bashrc
            """)
            host.run(f"RAYLIT_PYTHON={_python()} bash {ROOT}/clusters/install.sh --as-it-is examples")
        self.laptop.write(FILE, adapted(self.head, self.workers))
        self.laptop.run(f"""
            umask 077 && mkdir -p .ray/tokens
            python -c 'import secrets; print(secrets.token_hex(32), end="")' >.ray/tokens/{NAME}
            ssh -o StrictHostKeyChecking=accept-new {self.head.address} true
        """)

    def ray(self, command: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """A command on the laptop, in the clone; ``FILE`` is the cluster's file."""
        return self.laptop.run(f"cd {ROOT} && {command.replace('FILE', self.file)}", check=check, timeout=timeout)

    def start(self, command: str, **more: Any) -> subprocess.Popen[str]:
        return self.laptop.start(f"cd {ROOT} && {command.replace('FILE', self.file)}", **more)


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def onprem(workers: Sequence[int]) -> Iterator[OnPrem]:
    """Hosts that are ready for ``ray up``: a head, and workers of so many CPUs."""
    with lab([("head", 1), *((f"worker-{number}", cpus) for number, cpus in enumerate(workers, 1))]) as machines:
        cluster = OnPrem(machines)
        cluster.furnish()
        yield cluster
