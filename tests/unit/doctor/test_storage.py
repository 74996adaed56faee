"""The check of the storage: what each node does, and what is made of it. Nodes are objects here, with own folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raylit.doctor.examine import storage_rows
from raylit.doctor.report import Verdict
from raylit.driver import storage_check
from raylit.driver.each_node import HEAD_RESOURCE, NoAnswer, Node
from raylit.driver.storage_check import NodeStorage, StorageReport, check_storage
from raylit.worker import storage_probe

GREEN, RED = Verdict.GREEN, Verdict.RED
SHARED = "/shared/runs"


def node(name: str) -> Node:
    return Node(
        id=name, address=f"10.0.0.{ord(name) - 96}", host=name, resources={HEAD_RESOURCE: 1.0} if name == "a" else {}
    )


class Nodes:
    """Stands in for ``NodeActors``: every node sees the storage at a folder of its own choice, or does not answer."""

    def __init__(self, folders: dict[str, str | None]) -> None:
        self.nodes = [node(name) for name in folders]
        self._folders, self._kept = folders, {name: dict[str, Any]() for name in folders}
        self.asked: list[tuple[str, list[str]]] = []

    def ask(self, function: Any, *args: Any, within_s: float, each: Sequence[Any], modules: Any = ()) -> list[Any]:
        self.asked.append((function.__name__, [n.id for n, more in zip(self.nodes, each) if more is not None]))
        answers = []
        for there, more in zip(self.nodes, each):
            folder = self._folders[there.id]
            if more is None:
                answers.append(None)
            elif folder is None:
                answers.append(NoAnswer(f"no answer within {within_s:g} s"))
            else:
                place = (folder, *args[1:]) if args else ()
                answers.append(function(self._kept[there.id], *place, *more))
        return answers


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_probe, "_VISIBLE_WITHIN_S", 0.0)
    monkeypatch.setattr(storage_probe, "_PATIENCE_S", 0.0)


def checked(folders: dict[str, str | None]) -> tuple[StorageReport, Nodes]:
    nodes = Nodes(folders)
    return check_storage(SHARED, actors=nodes, within_s=1.0), nodes  # type: ignore[arg-type]


def test_one_folder_for_all_is_fine_and_left_as_it_was(tmp_path: Path) -> None:
    at = str(tmp_path / "new" / "runs")  # neither is there before, nor afterwards
    report, _ = checked({"a": at, "b": at, "c": at})
    assert report.problem is None and report.left is None and len(report.sharing) == 3
    assert [row.verdict for row in storage_rows(report) if row.check == "storage"] == [GREEN] * 3
    assert all(each.free_bytes and each.free_bytes > 0 for each in report.nodes)
    assert list(tmp_path.iterdir()) == []


def test_what_was_in_the_storage_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.ckpt").write_text("kept")
    report, _ = checked({"a": str(tmp_path), "b": str(tmp_path)})
    assert report.problem is None
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["run", "run/model.ckpt"]


def test_a_path_that_only_the_head_sees(tmp_path: Path) -> None:
    report, _ = checked({name: str(tmp_path / name) for name in "abc"})
    assert [each.node.id for each in report.apart] == ["b", "c"]
    rows = {row.node: row for row in storage_rows(report) if row.check == "storage"}
    assert [rows[n.node.name].verdict for n in report.nodes] == [GREEN, RED, RED]
    assert "a path that only the head can see; does not see what a (10.0.0.1) wrote" in rows["b (10.0.0.2)"].value
    assert report.problem == (
        "storage_path='/shared/runs' cannot be used from every node:\n"
        "  b (10.0.0.2) does not see what was written on a (10.0.0.1)\n"
        "  c (10.0.0.3) does not see what was written on a (10.0.0.1)\n"
        "A path that only a (10.0.0.1) can see is no storage for a run on 3 nodes.\n"
        "Give a folder that all nodes mount at this path (NFS), or the URI of an object store (s3://, gs://)."
    )
    assert list(tmp_path.iterdir()) == []  # each took its own away


def test_one_node_without_the_mount(tmp_path: Path) -> None:
    report, _ = checked({"a": str(tmp_path / "nfs"), "b": str(tmp_path / "own"), "c": str(tmp_path / "nfs")})
    assert [each.node.id for each in report.sharing] == ["a", "c"]
    rows = {row.node: row for row in storage_rows(report) if row.check == "storage"}
    assert rows["b (10.0.0.2)"].value == f"{SHARED}: does not see what a (10.0.0.1), c (10.0.0.3) wrote"
    assert rows["c (10.0.0.3)"].value == f"{SHARED}: written, read by 2 nodes"
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    report, _ = checked({"a": str(tmp_path), "b": str(tmp_path / "file")})
    assert report.nodes[1].fault == "Not a directory" and report.problem is not None
    assert "  b (10.0.0.2): Not a directory" in report.problem
    assert [row.verdict for row in storage_rows(report) if row.check == "storage"] == [GREEN, RED]


def test_a_node_that_hangs_is_not_asked_again(tmp_path: Path) -> None:
    report, nodes = checked({"a": str(tmp_path), "b": None, "c": str(tmp_path)})
    assert report.nodes[1].fault == "no answer within 1 s"
    assert [each.node.id for each in report.sharing] == ["a", "c"]
    assert nodes.asked[0] == ("write", ["a", "b", "c"]) and all("b" not in asked for _, asked in nodes.asked[1:])
    assert list(tmp_path.iterdir()) == []


def test_nobody_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    report, _ = checked({"a": str(tmp_path / "file"), "b": str(tmp_path / "file")})
    assert report.sharing == () and report.problem is not None
    assert [row.verdict for row in storage_rows(report)] == [RED, RED]


def test_other_content_than_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage_probe.write

    def torn(kept: Any, storage: str, filesystem: Any, check: str, name: str, content: bytes) -> Any:
        return write(kept, storage, filesystem, check, name, content[:-1] if name == "b" else content)

    monkeypatch.setattr(storage_probe, "write", torn)
    report, _ = checked({"a": str(tmp_path), "b": str(tmp_path), "c": str(tmp_path)})
    assert report.nodes[0].unseen == {"b": "has another content"}
    assert report.problem is not None
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> str:
        return "Permission denied"

    refused.__name__ = "remove"
    monkeypatch.setattr(storage_probe, "remove", refused)
    report, _ = checked({"a": str(tmp_path), "b": str(tmp_path)})
    assert report.left == "a (10.0.0.1): Permission denied"
    (row,) = [row for row in storage_rows(report) if row.check == "storage removal"]
    assert row.verdict is RED and "Permission denied" in row.value


def test_a_relative_path_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = check_storage("runs", actors=Nodes({"a": str(tmp_path)}))  # type: ignore[arg-type]
    assert report.storage == str(tmp_path / "runs")


def test_many_nodes_do_not_read_each_others_files_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads all and all read the head's; 26 nodes would else read 676 files."""
    read, seen = storage_probe.read, dict[str, list[str]]()

    def counted(kept: Any, storage: str, filesystem: Any, check: str, expected: Any) -> Any:
        seen[kept.setdefault("name", f"{len(seen)}")] = list(expected)
        return read(kept, storage, filesystem, check, expected)

    monkeypatch.setattr(storage_probe, "read", counted)
    names = [chr(ord("a") + i) for i in range(26)]
    report, _ = checked({name: str(tmp_path) for name in names})
    assert report.problem is None and len(report.sharing) == 26
    assert seen["0"] == names and all(len(each) <= 17 and "a" in each for each in seen.values() if each != names)


def test_credentials_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kept: Any, storage: str, *more: Any) -> Any:
        return {"fault": "cannot open s3://key:secret@bucket/x", "free_bytes": None}

    monkeypatch.setattr(storage_probe, "write", fail)
    report = check_storage("s3://key:secret@bucket/x", actors=Nodes({"a": "-", "b": "-"}))  # type: ignore[arg-type]
    assert report.problem is not None and "secret" not in report.problem and "secret" not in report.storage


def test_a_storage_behind_a_uri(tmp_path: Path) -> None:
    uri = (tmp_path / "runs").as_uri()
    report, _ = checked({"a": uri, "b": uri})
    assert report.problem is None and [each.free_bytes for each in report.nodes] == [None, None]
    assert [row.check for row in storage_rows(report)] == ["storage", "storage"]
    assert not any(name.startswith(storage_check.FOLDER_PREFIX) for name in os.listdir(tmp_path / "runs"))


def test_sharing_needs_both_ways() -> None:
    """b reads a's file from a stale copy, and a never sees b's."""
    report = StorageReport(SHARED, (NodeStorage(node("a"), unseen={"b": "is not there"}), NodeStorage(node("b"))))
    assert [each.node.id for each in report.apart] == ["b"]
