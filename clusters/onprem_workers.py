"""Stop or start Ray on the workers of an on-premise cluster. Runs on its head:

    ray exec clusters/onprem.yaml 'python ~/raylit/clusters/onprem_workers.py stop'
    ray exec clusters/onprem.yaml 'python ~/raylit/clusters/onprem_workers.py start'

``stop``, before ``ray down``: that stops Ray on the head alone. On the workers the raylet then ends by itself after a
minute, and Ray's other processes never do. Here the head is stopped too, since its autoscaler would start them again.

``start``, for a worker that stays away: Ray's autoscaler starts Ray again on a host that comes back, but where that
failed once it never tries again. Workers on which Ray runs are left alone.

Ends with 1, and a line for each, where a host could not be reached.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

FILE = Path("~/ray_bootstrap_config.yaml").expanduser()  # `ray up` leaves it on the head


def problem_of(command: list[str]) -> str | None:
    """Run a command; why it failed, or None."""
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "no answer within 180 s"
    if ran.returncode == 0:
        return None
    return ((ran.stderr.strip() or ran.stdout.strip()).splitlines() or [f"exit code {ran.returncode}"])[-1]


def on_workers(config: dict[str, Any], command: str) -> dict[str, str | None]:
    """Run a shell command on all workers at once, as the launcher does; by address, why it failed, or None."""
    auth, workers = config["auth"], config["provider"]["worker_ips"]
    key = ["-i", str(Path(auth["ssh_private_key"]).expanduser())] if "ssh_private_key" in auth else []
    # As the launcher connects from the head to the workers: without a look at their host keys.
    options = ["BatchMode=yes", "ConnectTimeout=10", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
               "LogLevel=ERROR"]  # fmt: skip
    ssh = ["ssh", *key, *(word for option in options for word in ("-o", option))]
    with ThreadPoolExecutor(32) as pool:
        commands = [[*ssh, f"{auth['ssh_user']}@{worker}", f"source ~/.bashrc; {command}"] for worker in workers]
        return dict(zip(workers, pool.map(problem_of, commands)))


def main(what: str) -> int:
    if not FILE.exists():
        print(f"{FILE} is missing: this runs on the head of a cluster that `ray up` started", file=sys.stderr)
        return 2
    config = yaml.safe_load(FILE.read_text())
    if what == "stop":
        problems = {"the head": problem_of(["ray", "stop"])}
        problems |= on_workers(config, "ray stop")
    else:
        start = " && ".join(f"({command})" for command in config["worker_start_ray_commands"])
        head = config["provider"]["head_ip"]
        problems = on_workers(config, f"pgrep -x raylet >/dev/null || {{ export RAY_HEAD_IP={head}; {start}; }}")
    for host, problem in problems.items():
        if problem:
            print(f"not on {host}: {problem}", file=sys.stderr)
    failed = sum(map(bool, problems.values()))
    print(f"Ray {'is stopped' if what == 'stop' else 'runs'} on {len(problems) - failed} of {len(problems)} hosts")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["stop"], ["start"]):
        sys.exit(f"usage: python {sys.argv[0]} stop|start")
    sys.exit(main(sys.argv[1]))
