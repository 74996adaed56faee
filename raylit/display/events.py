"""The events that tell a display how a run goes. Floor 2, any process; plain JSON values only.

Rank 0's engine sends them (prints and warnings: any rank); the driver or the local process draws them. Epochs and
batch counts travel as the engine has them, epochs from 0; a display shows epochs from 1. A display must accept events
in any order, and leave out what it does not know: some are dropped where the channel is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, TypedDict

from typing_extensions import NotRequired

LoopName: TypeAlias = Literal["train", "validation", "test", "predict", "sanity"]
Values: TypeAlias = Mapping[str, "float | int | str"]


class StageStart(TypedDict):
    """A run begins. ``fit_start`` and ``stage_start`` mean the same; ``stage`` says which of the four."""

    kind: Literal["fit_start", "stage_start"]
    stage: str
    max_epochs: NotRequired[int | None]  # None or -1: no limit
    num_workers: NotRequired[int]


class Summary(TypedDict):
    """The module's summary, several lines."""

    kind: Literal["summary"]
    text: str


class EpochStart(TypedDict):
    """A training epoch begins."""

    kind: Literal["epoch_start"]
    epoch: int
    total_batches: int | None


class Progress(TypedDict):
    """Some batches are done; sent a few times a second at most."""

    kind: Literal["progress"]
    loop: LoopName
    epoch: int
    batch: int  # batches done in this loop
    total: int | None
    values: Values
    steps_per_second: NotRequired[float]  # the display measures it where it is not given


class EpochEnd(TypedDict):
    """A training epoch is done, its validation too."""

    kind: Literal["epoch_end"]
    epoch: int
    values: Values
    seconds: float
    batches: NotRequired[int]  # done in this epoch; else the display counts what it saw
    global_step: NotRequired[int]  # done since training began; for the driver, not drawn


class LoopEnd(TypedDict):
    """One pass of a loop other than training is done."""

    kind: Literal["loop_end"]
    loop: LoopName
    values: Values
    # Training batches done in the epoch: given where validation ran in the middle of one, and shows as a line then.
    batch: NotRequired[int]


class Print(TypedDict):
    """A person's own output: whole lines, the last newline left out."""

    kind: Literal["print"]
    rank: int
    text: str
    stream: NotRequired[Literal["stdout", "stderr"]]


class Note(TypedDict):
    """One line of information, such as a default that was used."""

    kind: Literal["note"]
    text: str


class Warn(TypedDict):
    """A warning; shown once however many ranks send it."""

    kind: Literal["warning"]
    text: str
    rank: NotRequired[int]


class CheckpointSaved(TypedDict):
    """A checkpoint was kept. A terminal does not show it; it is there for other displays."""

    kind: Literal["checkpoint"]
    path: str


class End(TypedDict):
    """The run is over; ``status`` is one of ``raylit.stage.Status``."""

    kind: Literal["end"]
    status: str


DisplayEvent: TypeAlias = (
    StageStart | Summary | EpochStart | Progress | EpochEnd | LoopEnd | Print | Note | Warn | CheckpointSaved | End
)

KINDS: frozenset[str] = frozenset({
    "fit_start", "stage_start", "summary", "epoch_start", "progress", "epoch_end", "loop_end", "print", "note",
    "warning", "checkpoint", "end",
})  # fmt: skip
