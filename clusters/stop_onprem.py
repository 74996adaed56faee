"""Stop Ray on every host of an on-premise cluster. Runs on its head:

    ray exec clusters/onprem.yaml 'python ~/raylit/clusters/stop_onprem.py'

``ray down`` stops Ray on the head alone. On the workers the raylet then ends by itself after a minute, and Ray's other
processes never do. Ends with 1, and a line for each, where a worker could not be reached.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

FILE = Path("~/ray_bootstrap_config.yaml").expanduser()  # `ray up` leaves it on the head


def stop(command: list[str]) -> str | None:
    """Run a command that stops Ray on one host; why it failed, or None."""
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no answer within 120 s"
    return None if ran.returncode == 0 else (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1]


def main() -> int:
    if not FILE.exists():
        print(f"{FILE} is missing: this runs on the head of a cluster that `ray up` started", file=sys.stderr)
        return 2
    config = yaml.safe_load(FILE.read_text())
    auth, workers = config["auth"], config["provider"]["worker_ips"]
    key = ["-i", str(Path(auth["ssh_private_key"]).expanduser())] if "ssh_private_key" in auth else []
    # As the launcher connects from the head to the workers: without a look at their host keys.
    options = ["BatchMode=yes", "ConnectTimeout=10", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
               "LogLevel=ERROR"]  # fmt: skip
    ssh = ["ssh", *key, *(word for option in options for word in ("-o", option))]
    # The head first: its autoscaler would start the workers again.
    problems = {"the head": stop(["ray", "stop"])}
    with ThreadPoolExecutor(32) as pool:
        commands = [[*ssh, f"{auth['ssh_user']}@{worker}", "source ~/.bashrc; ray stop"] for worker in workers]
        problems |= dict(zip(workers, pool.map(stop, commands)))
    for host, problem in problems.items():
        if problem:
            print(f"Ray may still run on {host}: {problem}", file=sys.stderr)
    failed = sum(map(bool, problems.values()))
    print(f"Ray is stopped on {len(problems) - failed} of {len(problems)} hosts")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
