"""Rows and the report of a doctor's visit: plain values. Floor 6; standard library only."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any


class Verdict(enum.Enum):
    """Green: fine. Yellow: a run works, or may; look at it. Red: a run fails, or others get in."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


CLUSTER = "cluster"  # the node of a row that is about all of them


@dataclasses.dataclass(frozen=True)
class Row:
    """One check of one node. ``remedy``: what to do, "" where it is green."""

    check: str
    node: str
    value: str
    verdict: Verdict
    remedy: str = ""


def green(check: str, node: str, value: str) -> Row:
    """A row that is fine."""
    return Row(check, node, value, Verdict.GREEN)


def yellow(check: str, node: str, value: str, remedy: str) -> Row:
    """A row to look at."""
    return Row(check, node, value, Verdict.YELLOW, remedy)


def red(check: str, node: str, value: str, remedy: str) -> Row:
    """A row that has to be put right."""
    return Row(check, node, value, Verdict.RED, remedy)


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows, and of how many nodes they are. ``figures``: measured numbers by name, with units in the names."""

    rows: tuple[Row, ...]
    nodes: tuple[str, ...]
    seconds: float
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def count(self, verdict: Verdict) -> int:
        """How many rows have this verdict."""
        return sum(row.verdict is verdict for row in self.rows)

    @property
    def worst(self) -> Verdict:
        """The worst verdict of any row."""
        return next((each for each in reversed(Verdict) if self.count(each)), Verdict.GREEN)

    @property
    def exit_code(self) -> int:
        """1 where any row is red, else 0."""
        return 1 if self.worst is Verdict.RED else 0

    @property
    def summary(self) -> str:
        """One line: how many nodes, checks and faults, and how long it took."""
        nodes = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        counts = ", ".join(f"{self.count(each)} {each.value}" for each in Verdict)
        says = {
            Verdict.GREEN: "can train",
            Verdict.YELLOW: "can train; look at the yellow rows",
            Verdict.RED: "put the red rows right first",
        }[self.worst]
        return f"{nodes}, {len(self.rows)} checks: {counts}; {says} ({self.seconds:.0f} s)"

    def as_json(self) -> dict[str, Any]:
        """The whole report as JSON takes it; the keys are part of what users may rely on."""
        return {
            "ok": self.exit_code == 0,
            "summary": self.summary,
            "nodes": list(self.nodes),
            "seconds": round(self.seconds, 1),
            "counts": {each.value: self.count(each) for each in Verdict},
            "figures": self.figures,
            "checks": [{**dataclasses.asdict(row), "verdict": row.verdict.value} for row in self.rows],
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Report:
        """Return the report that ``as_json`` gave; KeyError or ValueError for anything else."""
        rows = tuple(Row(**{**row, "verdict": Verdict(row["verdict"])}) for row in told["checks"])
        return cls(rows, tuple(told["nodes"]), float(told["seconds"]), dict(told["figures"]))

    def folded(self) -> list[Row]:
        """The rows for reading: those of one check that are green on several nodes are one row."""
        shown: list[Row] = []
        for check in dict.fromkeys(row.check for row in self.rows):
            rows = [row for row in self.rows if row.check == check]
            fine = [row for row in rows if row.verdict is Verdict.GREEN and row.node != CLUSTER]
            shown += [row for row in rows if row not in fine]
            if len(fine) < 2:
                shown += fine
            else:
                node = f"all {len(fine)} nodes" if len(fine) == len(rows) else f"{len(fine)} other nodes"
                shown.append(Row(check, node, _joined(row.value for row in fine), Verdict.GREEN))
        return shown


def _joined(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    return " | ".join(distinct[:3]) + (f" | {len(distinct) - 3} more" if len(distinct) > 3 else "")
