"""``raylit checkpoints``: what it prints, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylit.checkpoint.folder import Folder
from raylit.checkpoint.store import Store
from raylit.cli import main
from tests.unit.checkpoint.faulty import manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = Store(Folder(str(tmp_path / "run" / "checkpoints")))
    for step in (5, 10):
        name = f"epoch=0-step={step}"
        files = {"model.ckpt": store.write_part(name, "model.ckpt", {"w": torch.zeros(1000)})}
        store.publish(manifest(name, step, metrics={"val_loss": 1 / step}, monitor="val_loss", files=files))
    return tmp_path / "run"


def test_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument in (run, run / "checkpoints", f"{run}/"):
        assert main(["checkpoints", str(argument)]) == 0
        head, columns, *rows = capsys.readouterr().out.rstrip().splitlines()
        assert head.strip() == str(run / "checkpoints")
        assert columns.split() == ["checkpoint", "epoch", "step", "metrics", "ranked", "by", "size", "files"]
        assert [row.split() for row in rows] == [
            ["epoch=0-step=5", "0", "5", "val_loss", "0.2", "val_loss", "(min)", rows[0].split()[-3], "KB", "there"],
            ["epoch=0-step=10", "0", "10", "val_loss", "0.1", "val_loss", "(min)", rows[1].split()[-3], "KB", "there"],
        ]


def test_verify_finds_what_a_look_at_sizes_does_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "epoch=0-step=5" / "model.ckpt"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    (run / "checkpoints" / "half").mkdir()
    assert main(["checkpoints", str(run), "--verify"]) == 1
    told = capsys.readouterr().out
    assert "model.ckpt is altered: its checksum is another" in told
    assert "manifest.json is missing: the checkpoint was never finished" in told
    assert told.rstrip().splitlines()[-1].split()[-1] == "yes"
    (run / "checkpoints" / "half").rmdir()
    assert main(["checkpoints", str(run)]) == 0


def test_a_runs_name(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(run.parent / "home"))
    (run.parent / "home" / "ray_results").mkdir(parents=True)
    run.rename(run.parent / "home" / "ray_results" / "digits")
    assert main(["checkpoints", "digits"]) == 0
    assert "epoch=0-step=10" in capsys.readouterr().out


def test_one_clear_line_where_nothing_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in ((str(tmp_path / "no"), "there is no run"), (str(tmp_path), "there are no checkpoints in"),
                            ("nowhere://x/y", "nowhere")):  # fmt: skip
        assert main(["checkpoints", argument]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("raylit checkpoints: ") and words in error and error.count("\n") == 1


def test_the_folder_of_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run / "checkpoints" / "epoch=0-step=5"), "--verify"]) == 0
    head, _, row = capsys.readouterr().out.rstrip().splitlines()
    assert head.strip() == str(run / "checkpoints") and row.split()[0] == "epoch=0-step=5"


def test_what_is_no_run_is_not_called_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a storage with runs in it, nor any other folder, nor none at all."""
    (run.parent / "notes").mkdir()
    (run.parent / "notes" / "todo.txt").write_text("buy milk")
    (run.parent / "empty").mkdir()
    for argument, words in (
        (run.parent, f"{run.parent} is no run, it holds one: raylit checkpoints {run}"),
        (run.parent / "notes", f"there are no checkpoints in {run.parent / 'notes'}"),
        ("", "name a run: its folder, its URI, or its name in the storage"),
        (" ", "name a run: its folder, its URI, or its name in the storage"),
    ):
        assert main(["checkpoints", str(argument)]) == 2
        assert capsys.readouterr().err == f"raylit checkpoints: {words}\n"
    (run / "checkpoints" / "pictures").mkdir()
    (run / "checkpoints" / "pictures" / "a.png").write_text("")
    assert main(["checkpoints", str(run)]) == 0
    assert "pictures" not in capsys.readouterr().out


def test_help_is_quick_and_complete() -> None:
    code = "import sys; from raylit.cli import main\ntry: main(['--help'])\nfinally: print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "checkpoints" in done.stdout and done.stdout.endswith("False\n")
