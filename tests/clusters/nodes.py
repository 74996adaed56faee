"""Nodes of a Slurm cluster on one machine, with `srun` and `scontrol` that know them: for clusters/slurm.sbatch.

A node has namespaces of its own (network, mounts, processes, host name): an address, a name and a /tmp that the other
one does not see; the home is shared, as it is on such clusters. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# `srun` runs its command once on each node that is named, or on all, and returns the worst code; other options of the
# real one that the script gives are taken and left aside.
SRUN = """#!/usr/bin/env bash
set -u
nodes=$FAKE_SLURM_NODES
while [ $# -gt 0 ]; do
  case $1 in
    --nodelist=*) nodes=${1#*=}; shift ;;
    --nodes=*|--ntasks=*|--cpus-per-task=*) shift ;;
    -*) echo "srun: $1 is not known here" >&2; exit 2 ;;
    *) break ;;
  esac
done
pids=()
for node in $nodes; do
  nsenter --target "$(cat "$FAKE_SLURM/$node.pid")" --net --mount --pid --uts --wd="$PWD" "$@" &
  pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; [ $code -le $worst ] || worst=$code; done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames $SLURM_JOB_NODELIST" ] || { echo "scontrol: $* is not known here" >&2; exit 2; }
printf '%s\\n' $FAKE_SLURM_NODES
"""
NAMES = ("node-1", "node-2")


def can_be_made() -> bool:
    """Whether this process may make namespaces with addresses of their own."""
    tools = all(shutil.which(each) for each in ("ip", "unshare", "nsenter", "hostname"))
    if not tools or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


class Nodes:
    """Two nodes, and a home that they share, which must not lie in /tmp."""

    def __init__(self, shared: Path, job: int) -> None:
        self.home, self.job, self._tools = shared / "home", job, shared / "slurm"
        self._environment = {
            "HOME": str(self.home), "PATH": f"{self._tools}:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8",
            "FAKE_SLURM": str(self._tools), "FAKE_SLURM_NODES": " ".join(NAMES), "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_ID": str(job), "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        (self.home / ".ray" / "tokens").mkdir(parents=True)
        self._tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(stat.S_IRWXU)
        # What clusters/install.sh makes on the login node.
        activate = self.home / "raylit-env" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        root = Path(__file__).resolve().parents[2]
        activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{root}"\n')

    def pid(self, node: str) -> int:
        """Of the first process of a node."""
        return int((self._tools / f"{node}.pid").read_text())

    def run(self, script: Path, *arguments: str, timeout_s: float, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a batch script, on neither of the nodes: it may do nothing but `srun`."""
        return subprocess.run(
            ["bash", str(script), *arguments], env=self._environment | more, cwd=self.home, timeout=timeout_s,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def processes(self, node: str) -> list[str]:
        """The command lines of what runs on a node, besides its first process."""
        found = []
        for each in psutil.Process(self.pid(node)).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # also one that has ended and waits to be taken in
                found.append(" ".join(each.cmdline()))
        return [each for each in found if each != "sleep 3600"]

    @contextlib.contextmanager
    def up(self) -> Iterator[Nodes]:
        """Have the nodes there; they and all that runs on them are ended on leaving."""
        spaces = [f"raylit-{os.getpid()}-{number}" for number in (1, 2)]
        ends = [f"r{os.getpid()}n{number}" for number in (1, 2)]  # an interface's name has 15 letters at most
        hosts = self._tools / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"10.99.7.{n} node-{n}\n" for n in (1, 2)))
        started: list[subprocess.Popen[bytes]] = []
        try:
            for space in spaces:
                _do("ip", "netns", "add", space)
            _do("ip", "link", "add", ends[0], "netns", spaces[0], "type", "veth", "peer", ends[1], "netns", spaces[1])
            for number, (space, end) in enumerate(zip(spaces, ends), 1):
                _do("ip", "-n", space, "addr", "add", f"10.99.7.{number}/24", "dev", end)
                _do("ip", "-n", space, "link", "set", end, "up")
                _do("ip", "-n", space, "link", "set", "lo", "up")
                up = self._tools / f"node-{number}.up"
                # A shell as the first process: it takes in those whose parents ended, as a real one does.
                inside = (
                    f"mount -t tmpfs none /tmp && mount --bind '{hosts}' /etc/hosts && hostname node-{number} && "
                    f"touch '{up}' && "
                    "while true; do sleep 3600 & wait $!; done"
                )
                command = ["ip", "netns", "exec", space, "unshare", "--mount", "--pid", "--uts", "--fork",
                           "--mount-proc", "--kill-child", "bash", "-c", inside]  # fmt: skip
                started.append(subprocess.Popen(command))
                (self._tools / f"node-{number}.pid").write_text(str(_first_process(started[-1].pid, up)))
            yield self
        finally:
            for process in started:
                process.kill()  # --kill-child: the node's first process goes with it, and the kernel ends the others
                process.wait()
            for space in spaces:
                subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _first_process(outer: int, up: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if up.exists():
            return psutil.Process(outer).children()[0].pid
        time.sleep(0.02)
    raise RuntimeError("a node did not come up within 30 s")
