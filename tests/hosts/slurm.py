"""Debian's own Slurm on a lab's hosts: a login node with the controller on it, compute nodes, and one home for all."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hosts.machines import HOME, SHARED, Host, Lab, lab, missing, wait_for
from tests.hosts.onprem import environment

# Of each node: what the hardware says is the machine's, and so Slurm is to believe this file. No control groups: they
# are the machine's too. Without them Slurm finds a job's processes by their parents alone, and one whose parent is gone
# escapes it; what is left on a node after a job was left by the job's own doing.
CONF = """
ClusterName=lab
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout={node_timeout_s}
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE_TIMEOUT_S = 30  # Slurm's default is 300: so long may a node say nothing
_DAEMONS = ("munged", "slurmctld", "slurmd")
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def lacking() -> str | None:
    """Why there can be no Slurm on this machine, or None."""
    tools = (*_DAEMONS, "sbatch", "srun", "scontrol", "scancel", "squeue")
    without = [tool for tool in tools if shutil.which(tool, path="/usr/sbin:/usr/bin") is None]
    if without:
        return f"a Slurm of its own needs {', '.join(without)} (apt-get install slurmctld slurmd slurm-client munge)"
    return missing()


class Slurm:
    """What a person does on the login node, whose home, and the clone of raylit in it, every node sees."""

    def __init__(self, machines: Lab) -> None:
        self.lab = machines
        _, self.login, *self.nodes = machines.hosts.values()
        self.home = machines.shared / "home"
        self.clone = self.home / "raylit"

    def furnish(self) -> None:
        """Make the shared home with its environment, start Slurm, and wait until all nodes are idle."""
        self.home.mkdir()
        (self.home / ".bashrc").touch()
        shutil.copytree(self.lab.clone, self.clone, symlinks=True)
        settings = self.lab.shared / "slurm"
        settings.mkdir()
        nodes = "\n".join(f"NodeName={n.name} NodeAddr={n.address} CPUs={n.cpus} RealMemory=8000 State=UNKNOWN"
                          for n in self.nodes)  # fmt: skip
        (settings / "slurm.conf").write_text(CONF.format(nodes=nodes, node_timeout_s=NODE_TIMEOUT_S))
        (settings / "munge.key").write_bytes(b"of this lab alone" * 8)
        (settings / "munge.key").chmod(0o400)
        for host in (self.login, *self.nodes):
            self.begin(host)
        environment(self.login, f"{HOME}/raylit")
        wait_for(lambda: self.states() == ["idle"] * len(self.nodes), "all nodes are idle", 60)

    def begin(self, host: Host) -> None:
        """What a host does as it boots: the home and the settings are mounted, and the daemons start."""
        daemon = "slurmctld" if host is self.login else "slurmd"
        host.run(f"""
            set -e
            mount --bind {SHARED}/home {HOME} && mount --bind {SHARED}/slurm /etc/slurm
            mkdir -p /run/munge /run/slurm/state /run/slurm/spool && chmod 755 /run/munge
            cp -p {SHARED}/slurm/munge.key /run/munge/key
            munged --key-file=/run/munge/key --seed-file=/run/munge/seed --log-file=/run/munge/log --force
            cd / && {daemon}
        """)

    def states(self) -> list[str]:
        """Of the compute nodes, as ``sinfo`` says; ``*`` behind one: it does not answer."""
        return self.login.run("sinfo --noheader --Node --format=%t", check=False).stdout.split()

    def run(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on the login node, in the clone."""
        return self.login.run(f"cd raylit && {command}", check=check)

    def batch(self, script: str, nodes: int = 2, options: str = "") -> Job:
        """``sbatch clusters/slurm.sbatch``, with one CPU a node."""
        said = self.run(f"sbatch --nodes={nodes} --cpus-per-task=1 {options} clusters/slurm.sbatch {script}").stdout
        found = re.fullmatch(r"Submitted batch job (\d+)\n", said)
        assert found, said
        return Job(self, int(found[1]))

    def processes(self) -> dict[str, list[str]]:
        """What runs on each compute node that is on, but for Slurm's daemons; nodes with nothing are left out."""
        found = {}
        for node in self.nodes:
            if node.running:
                found[node.name] = [line for line in node.processes() if Path(line.split()[0]).name not in _DAEMONS]
        return {name: lines for name, lines in found.items() if lines}

    def logs(self) -> str:
        """The last of what the daemons wrote, to be read where a test failed."""
        parts = []
        for host in (self.login, *self.nodes):
            if host.running:
                parts.append(f"--- {host.name}\n" + host.run("tail -n 30 /run/slurm/*.log", check=False).stdout)
        return "\n".join(parts)


class Job:
    """A job that was submitted."""

    def __init__(self, slurm: Slurm, number: int) -> None:
        self.number, self._slurm = number, slurm
        self.file = slurm.clone / f"raylit-{number}.log"

    @property
    def log(self) -> str:
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def show(self) -> dict[str, str]:
        """``scontrol show job``: each field by its name."""
        said = self._slurm.run(f"scontrol --oneliner show job {self.number}").stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def until(self, condition: Any, what: str, timeout_s: float = 300.0) -> Any:
        """Wait for something; where it does not come, say all that is known."""
        try:
            return wait_for(condition, what, timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.show()}\n{self.log}\n{self._slurm.logs()}") from None

    def over(self, timeout_s: float = 300.0) -> dict[str, str]:
        """Wait until it has come to an end, whichever; what ``scontrol`` shows then."""

        def ended() -> dict[str, str] | None:
            shown = self.show()
            return shown if shown["JobState"] in _OVER else None

        found: dict[str, str] = self.until(ended, f"job {self.number} ends", timeout_s)
        return found


@contextlib.contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """A Slurm of so many compute nodes with one CPU each, ready for ``sbatch``."""
    with lab([("login", 1), *((f"node-{number}", 1) for number in range(1, nodes + 1))]) as machines:
        made = Slurm(machines)
        made.furnish()
        yield made
