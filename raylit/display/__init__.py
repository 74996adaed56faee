"""What a person sees while a run goes on. Floor 2; drawn on the driver, or in the local process."""

from raylit.display.events import DisplayEvent
from raylit.display.terminal import TerminalDisplay

__all__ = ["DisplayEvent", "TerminalDisplay"]
