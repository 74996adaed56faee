"""``raylit``: from the arguments to a subcommand and its exit code. Floor 7.

Each command is a module of this folder with ``add(parser)``, which says its arguments and sets ``run``. 0: done; 1: it
found something wrong; 2: it cannot be done as asked, with one line that says why. A command's own imports wait until it
runs: ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

# name: (module, what ``raylit --help`` says)
_COMMANDS = {
    "checkpoints": ("raylit.cli.checkpoints", "list or verify the checkpoints of a run"),
    "doctor": ("raylit.cli.doctor", "check a machine or a cluster before a long job"),
    "submit": ("raylit.cli.submit", "run a script on a cluster, with its project"),
    "token": ("raylit.cli.token", "make the token that a cluster asks for, or a new one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv``: without the program's name, None: that of the process."""
    parser = argparse.ArgumentParser(prog="raylit", description="Train PyTorch Modules here or on Ray workers.")
    version = importlib.import_module("raylit").__version__  # it is loaded: this file is in it
    parser.add_argument("--version", action="version", version=f"raylit {version}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (module, says) in _COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=says)
        importlib.import_module(module).add(parsers[name])
    given, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse would print the usage of raylit, where the command's own is wanted
        parsers[given.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    run: Callable[[argparse.Namespace], int] = given.run
    try:
        return run(given)
    except (ValueError, OSError) as error:  # raylit's own errors are ValueErrors; anything else is a fault to be seen
        print(f"raylit {given.command}: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
