"""The command line. Floor 7."""

from raylit.cli.main import main

__all__ = ["main"]
