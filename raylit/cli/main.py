"""``raylit``: from the arguments to a subcommand and its exit code. Floor 7.

0: done; 1: it found something wrong; 2: it cannot be done as asked, with one line that says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv``: without the program's name, None: that of the process."""
    parser = argparse.ArgumentParser(prog="raylit", description="Train PyTorch Modules here or on Ray workers.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _checkpoints(commands.add_parser("checkpoints", help="list or verify the checkpoints of a run"))
    given = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = given.run
    try:
        return run(given)
    except (ValueError, OSError) as error:  # raylit's own errors are ValueErrors; anything else is a fault to be seen
        print(f"raylit {given.command}: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2


def _checkpoints(parser: argparse.ArgumentParser) -> None:
    def run(given: argparse.Namespace) -> int:
        from raylit.cli.checkpoints import show

        return show(given.run_folder, verify=given.verify)

    parser.description = "List what checkpoints a run has, the newest last."
    parser.add_argument("run_folder", metavar="RUN", help="run folder or URI, or a run's name in ~/ray_results")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum; 1: damaged")
    parser.set_defaults(run=run)
