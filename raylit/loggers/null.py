"""What ``.experiment`` is on ranks other than 0: it accepts every call and does nothing. Any process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class NullExperiment:
    """Stands in for a logger's experiment, so that a hook runs the same code on every rank.

    Any attribute, call, item, assignment, ``with`` or loop works; answers are this object again, and loops end at
    once. It counts as true: ``if experiment:`` takes the same way on every rank, or a collective behind it would hang.
    """

    def __getattr__(self, name: str) -> Any:
        # copy, pickle, numpy and others ask for dunder names to see what an object can do: it can do none of that.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __delattr__(self, name: str) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> NullExperiment:
        return self

    def __getitem__(self, key: Any) -> NullExperiment:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __delitem__(self, key: Any) -> None:
        pass

    def __contains__(self, key: Any) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> NullExperiment:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def __repr__(self) -> str:
        return "NullExperiment()"
