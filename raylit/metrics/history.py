"""``trainer.history``: one row for each logged step or epoch, as a ``pyarrow.Table`` and a Parquet file. Rank 0.

Columns are kept sparse (row numbers and values), so that a metric of epochs costs nothing on the rows of steps. pyarrow
is imported when a table is first asked for.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raylit.errors import CheckpointError
from raylit.metrics.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

_OWN = ("epoch", "step")


class History:
    """Rows of ``epoch``, ``step`` (``global_step``) and one float64 column a metric, null where it was not logged.

    A metric that is itself named ``epoch`` or ``step`` has the column ``epoch_logged`` or ``step_logged``.
    """

    def __init__(self) -> None:
        self._epochs = array("q")
        self._steps = array("q")
        self._columns: dict[str, tuple[array[int], array[float]]] = {}  # row numbers, values
        self._pending: deque[tuple[int, Snapshot]] = deque()  # rows whose values may still be on the device
        self._written = 0  # rows in the Parquet file

    def __len__(self) -> int:
        return len(self._epochs)

    def append(self, epoch: int, step: int, values: Snapshot | Mapping[str, Tensor | float]) -> None:
        """Add a row. Values given as a Snapshot are read when they are there, in order; nothing waits here."""
        snapshot = values if isinstance(values, Snapshot) else Snapshot(values)
        self._epochs.append(epoch)
        self._steps.append(step)
        self._pending.append((len(self._epochs) - 1, snapshot))
        while self._pending and self._pending[0][1].ready():
            self._take(*self._pending.popleft())

    def _take(self, row: int, snapshot: Snapshot) -> None:
        for name, value in snapshot.read().items():
            column = f"{name}_logged" if name in _OWN else name
            rows, values = self._columns.setdefault(column, (array("q"), array("d")))
            rows.append(row)
            values.append(value)

    def _drain(self) -> None:
        while self._pending:
            self._take(*self._pending.popleft())

    def table(self) -> pa.Table:
        """Return all rows; columns in the order in which the metrics first came. Waits for pending values."""
        self._drain()
        return self._table()

    def _table(self) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        count = len(self)
        # From buffers and arrays: pyarrow's shorter ways (pa.array, pa.table) import pandas, which takes half a second.
        columns = [
            pa.Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(own.tobytes())])
            for own in (self._epochs, self._steps)
        ]
        for rows, values in self._columns.values():
            dense, there = np.zeros(count), np.zeros(count, bool)
            at = np.frombuffer(rows.tobytes(), np.int64)
            dense[at], there[at] = np.frombuffer(values.tobytes()), True
            # Bits of validity: a NaN that was logged stays one, and is no null.
            bits = pa.py_buffer(np.packbits(there, bitorder="little").tobytes())
            columns.append(pa.Array.from_buffers(pa.float64(), count, [bits, pa.py_buffer(dense.tobytes())]))
        return pa.Table.from_arrays(columns, names=[*_OWN, *self._columns])

    def readable(self) -> History:
        """Return the rows whose values are here, as an object that another thread may write. Waits for nothing."""
        copy = History()
        count = self._pending[0][0] if self._pending else len(self)
        copy._epochs, copy._steps = self._epochs[:count], self._steps[:count]
        copy._columns = {name: (rows[:], values[:]) for name, (rows, values) in self._columns.items()}
        return copy

    def write_parquet(self, path: str | os.PathLike[str]) -> None:
        """Replace the file with all rows so far, whole or not at all: a reader, or a crash, never meets half of it.

        The cost grows with the number of rows (about 0.1 s for 100,000 rows of 10 metrics).
        """
        import pyarrow.parquet as pq

        path = os.fspath(path)
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        table = self.table()
        temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.tmp")
        try:
            pq.write_table(table, temporary)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        self._written = table.num_rows

    def was_written(self, rows: int) -> None:
        """The file holds this many rows: a copy of :meth:`readable` was written."""
        self._written = max(self._written, rows)

    def state_dict(self, whole: bool = False) -> dict[str, Any]:
        """Return the position (``rows``), and the rows since the last :meth:`write_parquet` in full, as tensors.

        ``whole``: every row, for a checkpoint that may be read where the file is not: 16 bytes a value.
        """
        self._drain()
        start = 0 if whole else self._written
        tail = {}
        for name, (rows, values) in self._columns.items():
            first = bisect_left(rows, start)  # rows are in order
            tail[name] = {"rows": _tensor(rows[first:], torch.int64), "values": _tensor(values[first:], torch.float64)}
        return {"version": 1, "rows": len(self), "start": start, "epochs": _tensor(self._epochs[start:], torch.int64),
                "steps": _tensor(self._steps[start:], torch.int64), "columns": tail}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> None:
        """Go back to a position: earlier rows from the Parquet file, the rest from the state.

        Rows that the file has beyond the position (the run went on after the checkpoint) are left out. Without
        ``path``, or where no file is, the history begins with the rows of the state. Raises CheckpointError where the
        file has fewer rows than the checkpoint counts on.
        """
        self.__init__()  # type: ignore[misc]
        start = state["start"]
        offset = start
        if path is not None and os.path.exists(path):
            self._read(os.fspath(path), start)
            offset = 0
        self._epochs.extend(state["epochs"].tolist())
        self._steps.extend(state["steps"].tolist())
        for name, column in state["columns"].items():
            rows, values = self._columns.setdefault(name, (array("q"), array("d")))
            rows.extend((column["rows"] - offset).tolist())
            values.extend(column["values"].tolist())

    def _read(self, path: str, count: int) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(path).slice(0, count)
        if table.num_rows < count:
            raise CheckpointError(f"{path} has {table.num_rows} rows; the checkpoint was made when it had {count}.")
        self._epochs.extend(table["epoch"].to_pylist())
        self._steps.extend(table["step"].to_pylist())
        for name in table.column_names[2:]:
            kept = [(row, value) for row, value in enumerate(table[name].to_pylist()) if value is not None]
            if kept:
                self._columns[name] = (array("q", (r for r, _ in kept)), array("d", (v for _, v in kept)))
        self._written = count


def _tensor(values: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values.tolist(), dtype=dtype)
