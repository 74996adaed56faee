"""Toggling: while one of several optimizers runs, only its own parameters require gradients. Floor 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.nn import Parameter
from torch.optim import Optimizer


class Toggle:
    """Switches ``requires_grad`` of all parameters but one optimizer's, and gives the user's own settings back.

    ``optimizers``: all of them. ``parameters``: any more that must be off meanwhile, such as the Module's parameters
    that are in no optimizer. Which parameters belong to whom is worked out here, once; ``refresh()`` does so again
    after an ``add_param_group``.

    A parameter that the user froze stays frozen throughout: only what was on is switched off, and only that is
    switched on again. Toggles may nest: untoggling the inner one brings the outer one back.
    """

    def __init__(self, optimizers: Sequence[Optimizer], parameters: Iterable[Parameter] = ()) -> None:
        self._optimizers = tuple(optimizers)
        self._extra = tuple(parameters)
        self._others: list[list[Parameter]] = []
        self._off: list[Parameter] = []  # what is off now because of us, and was on before
        self._nested: list[int] = []  # indices of the toggled optimizers, the innermost last
        self.refresh()

    def refresh(self) -> None:
        """Read the optimizers' parameters again."""
        owned = [{id(p): p for group in opt.param_groups for p in group["params"]} for opt in self._optimizers]
        everything = {id(p): p for p in self._extra}
        for own in owned:
            everything.update(own)
        # A parameter shared by two optimizers stays on for both.
        self._others = [[p for key, p in everything.items() if key not in own] for own in owned]

    def toggle(self, index: int) -> None:
        """Let only the parameters of optimizer ``index`` (from 0) require gradients."""
        again = bool(self._nested) and self._nested[-1] == index
        self._nested.append(index)
        if not again:
            self._apply()

    def untoggle(self, index: int) -> None:
        """Undo the last ``toggle(index)``. Without one it does nothing."""
        if index not in self._nested:
            return
        position = len(self._nested) - 1 - self._nested[::-1].index(index)
        del self._nested[position]
        self._apply()

    def restore(self) -> None:
        """Undo every toggle: at the end of a batch, and when a step failed half way."""
        self._nested.clear()
        if self._off:
            self._apply()

    def _apply(self) -> None:
        for parameter in self._off:
            parameter.requires_grad_(True)
        self._off = []
        if not self._nested:
            return
        self._off = [parameter for parameter in self._others[self._nested[-1]] if parameter.requires_grad]
        for parameter in self._off:
            parameter.requires_grad_(False)
