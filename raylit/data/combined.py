"""Several training loaders walked together: a batch is a list, tuple or dict of their batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from raylit.errors import DataError

if TYPE_CHECKING:
    from raylit.data.loader import PreparedLoader

# The order of a loader's second and later passes in one epoch is that of epoch e + pass * this: another one than any
# epoch's first pass, and the same whatever the world size.
_PASS_STRIDE = 1_000_000


class CombinedLoader:
    """An epoch is as long as the longest loader; shorter ones start over, with another epoch's order.

    Positions count in shares: of a step's ``samples_per_step``, each loader has its own part. A resume is exact at
    the same world size; at another one it is exact for what every loader has in its first pass.
    """

    def __init__(self, source: Any, loaders: Mapping[Any, PreparedLoader], turns: int = 1) -> None:
        """``loaders`` by key, or by place for a list or tuple ``source``. ``turns``: batches of this rank in a step."""
        self.source, self._turns = source, turns
        self.loaders = dict(loaders)
        self.batch_size: int | None = None
        self.num_samples: int | None = None
        parts = list(self.loaders.values())
        self.samples_per_step: int = sum(part.samples_per_step for part in parts)
        lengths = [part.num_batches for part in parts]
        known = [length for length in lengths if length is not None]
        self.num_batches: int | None = max(known) if len(known) == len(lengths) else None
        self.equal_steps: bool = all(part.equal_steps for part in parts)
        self.contiguous = False
        self.anywhere: bool = all(part.anywhere for part in parts)
        self._epoch = 0
        self._start = 0

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the next walk: the epoch (from 0) and the position in it."""
        self._epoch = epoch
        self._start = start_sample

    def batches_from(self, start_sample: int) -> int | None:
        """Batches from ``start_sample`` to the epoch's end, on this rank; None if unknown."""
        if self.num_batches is None:
            return None
        parts = self.loaders.values()
        left = [self._part(part, start_sample).left_of_first for part in parts]
        return max(left)

    def state_dict(self) -> dict[str, Any]:
        """Return each loader's, by key."""
        return {"loaders": [part.state_dict() for part in self.loaders.values()]}

    def load_state_dict(self, state: Mapping[str, Any], within: bool) -> None:
        """Take back what ``state_dict`` returned."""
        for part, saved in zip(self.loaders.values(), state["loaders"]):
            part.load_state_dict(saved, within)

    def _part(self, part: PreparedLoader, start_sample: int) -> _Part:
        consumed = start_sample * part.samples_per_step // self.samples_per_step
        return _Part(part, self._epoch, consumed, self._turns)

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        parts = {key: self._part(part, start) for key, part in self.loaders.items()}
        left = None if self.num_batches is None else max(part.left_of_first for part in parts.values())
        for part in parts.values():
            part.open()  # now, not at the first batch: see PreparedLoader.__iter__
        return self._walk(parts, left)

    def _walk(self, parts: dict[Any, _Part], left: int | None) -> Iterator[Any]:
        while left is None or left > 0:
            batch = {}
            for key, part in parts.items():
                # Where a length is unknown the end shows only by asking: a shorter loader may have started over, and
                # read a batch for nothing, when the last of them turns out to be through.
                batch[key] = part.next()
                if left is None and all(other.passes for other in parts.values()):
                    return
            yield self._shaped(batch)
            if left is not None:
                left -= 1

    def _shaped(self, batch: dict[Any, Any]) -> Any:
        if isinstance(self.source, Mapping):
            return batch
        values = list(batch.values())
        if not isinstance(self.source, tuple):
            return values
        named = hasattr(self.source, "_fields")
        return type(self.source)(*values) if named else tuple(values)


class _Part:
    """One loader's place in a combined epoch."""

    def __init__(self, loader: PreparedLoader, epoch: int, consumed: int, turns: int) -> None:
        """``consumed``: what all ranks together took from this loader in this combined epoch, passes included."""
        self.passes = 0
        self._loader = loader
        self._epoch = epoch
        self._start = consumed
        self.left_of_first: int = 0
        if loader.num_batches is not None:
            self.left_of_first = loader.batches_from(consumed) or 0
            if not self.left_of_first and consumed:
                # A short last step counts as a full one, since every loader takes the same number of steps.
                steps = loader.num_batches // turns
                self.passes, self._start = divmod(consumed, steps * loader.samples_per_step)
        # Between two passes: the next one is opened when it is asked for, as without a resume, since opening it draws.
        self._between = self.passes > 0 and self._start == 0
        self.passes -= self._between
        self._iterator: Iterator[Any] = iter(())

    def open(self) -> None:
        if self._between:
            self._between = False
            return
        self._loader.set_epoch(self._epoch + self.passes * _PASS_STRIDE, self._start)
        self._iterator = iter(self._loader)

    def next(self) -> Any:
        for batch in self._iterator:
            return batch
        self.passes += 1
        self._start = 0
        self.open()
        for batch in self._iterator:
            return batch
        raise DataError(
            f"A {type(self._loader.source).__name__} among the training loaders gave no batch when it started over. "
            "Pass one that is not empty and can be walked again"
        )
