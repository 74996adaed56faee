"""The hook table: every hook of the contract, and how an override of it is called. Floor 1."""

from raylit.hooks.binding import adapt, check_signature
from raylit.hooks.spec import CALLBACK_HOOKS, DATAMODULE_HOOKS, MODULE_HOOKS, HookSpec
from raylit.hooks.table import HookTable, overridden

__all__ = ["CALLBACK_HOOKS", "DATAMODULE_HOOKS", "MODULE_HOOKS", "HookSpec", "HookTable", "adapt", "check_signature",
           "overridden"]  # fmt: skip
