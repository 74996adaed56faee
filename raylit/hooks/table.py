"""Who overrides what in this run, bound once before training. Floor 1; lives in a worker or in the local process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from raylit.hooks.binding import adapt, check_signature
from raylit.hooks.spec import CALLBACK_HOOKS, MODULE_HOOKS, SHARED_HOOKS

Hook = Callable[..., Any]


def overridden(obj: object, name: str, base: type) -> bool:
    """Tell whether ``obj`` has its own ``name``: in its class, a parent below ``base``, or set on the instance."""
    if name in getattr(obj, "__dict__", {}):
        return True
    return getattr(type(obj), name, None) is not getattr(base, name, None)


class HookTable:
    """The bound hooks of one run. A hook that nobody overrides is None, so that leaving it out is one comparison."""

    def __init__(self, module: object, module_base: type, callbacks: Sequence[object], callback_base: type,
                 trainer: object) -> None:  # fmt: skip
        self._own: dict[str, Hook | None] = {}
        self._shared: dict[str, Hook | None] = {}
        self._wants_outputs = False
        self._exact: dict[str, Hook] = {}
        self._counts: dict[str, int] = {}
        self._named: dict[str, set[str]] = {}  # arguments that the Module's overrides ask for by name
        name_of = type(module).__name__
        for name, spec in MODULE_HOOKS.items():
            function = getattr(module, name, None) if overridden(module, name, module_base) else None
            self._own[name] = None if function is None else adapt(spec, function, name_of)
            picks, keywords, named = ([], {}, ()) if function is None else check_signature(spec, function, name_of)
            self._named[name] = set(named)
            if function is not None and not keywords and picks == list(range(len(picks))):
                self._exact[name], self._counts[name] = function, len(picks)
        self._wants_outputs |= "outputs" in self._named["on_train_epoch_end"]
        for name, spec in CALLBACK_HOOKS.items():
            chain: list[Hook] = []
            for callback in callbacks:
                if overridden(callback, name, callback_base):
                    owner = type(callback).__name__
                    function = getattr(callback, name)
                    chain.append(partial(adapt(spec, function, owner), trainer, module))
                    if name == "on_train_epoch_end":
                        self._wants_outputs |= "outputs" in check_signature(spec, function, owner)[2]
            if name in SHARED_HOOKS and name not in ("setup", "teardown"):
                own = self._own[name]
                if own is not None:
                    chain.append(own)
            self._shared[name] = _chained(chain)

    def own(self, name: str) -> Hook | None:
        """The Module's override of ``name``, or None."""
        return self._own[name]

    def event(self, name: str) -> Hook | None:
        """Callbacks' and then the Module's hook of this name as one callable, or None where nobody has it.

        It returns -1 if any of them returned -1, which ends the epoch in ``on_train_batch_start``.
        """
        return self._shared[name]

    def exact(self, hook: str, count: int) -> Hook | None:
        """The Module's override itself, where it takes just the first ``count`` arguments; else None."""
        return self._exact.get(hook) if self._counts.get(hook) == count else None

    def names(self, hook: str, argument: str) -> bool:
        """True where the Module's override of ``hook`` asks for ``argument`` by name."""
        return argument in self._named[hook]

    @property
    def wants_epoch_outputs(self) -> bool:
        """True where some hook is given the outputs of the training epoch."""
        return self._wants_outputs or self._own["training_epoch_end"] is not None


def _chained(chain: list[Hook]) -> Hook | None:
    if not chain:
        return None
    if len(chain) == 1:
        return chain[0]

    def call_all(*args: Any) -> int | None:
        # A list first: every hook runs, also behind one that asks to stop.
        results = [hook(*args) for hook in chain]
        return -1 if any(result is not None and type(result) is int and result == -1 for result in results) else None

    return call_all
