"""A person's script, as it is run from a shell: where its files are found, what it prints, how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    import raylit
    import helper


    class Numbers(Dataset):
        def __init__(self):
            self.values = [float(v) for v in Path("data/numbers.txt").read_text().split()]

        def __len__(self):
            return len(self.values)

        def __getitem__(self, index):
            return torch.tensor([self.values[index]])


    class Best:
        def __init__(self, loss):
            self.loss = loss


    class Net(raylit.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer, self.best = nn.Linear(1, 1), None

        def training_step(self, batch, batch_idx):
            assert Path("data/numbers.txt").exists()
            if self.current_epoch == 0 and batch_idx == 0:
                print(f"rank {self.global_rank} of {self.world_size}")
                print(f"to stderr {self.global_rank}", file=sys.stderr)
                self.print("once")
            return helper.loss(self.layer(batch), batch)

        def training_epoch_end(self, outputs):
            self.best = Best(float(outputs[-1]["loss"]))

        def predict_step(self, batch, batch_idx):
            return self.layer(batch)[:, 0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)


    class Watch(raylit.Callback):
        def __init__(self):
            self.seen = []

        def on_train_end(self, trainer, module):
            self.seen.append(Best(trainer.global_step))


    if __name__ == "__main__":
        workers = int(sys.argv[1])
        model, watch = Net(), Watch()
        trainer = raylit.Trainer(
            max_epochs=2, num_workers=workers, use_gpu=False, callbacks=[watch], name=f"w{workers}",
            storage_path="runs", enable_progress_bar=False, enable_model_summary=False, logger=False,
        )
        batch_size = 8 // max(workers, 1)
        result = trainer.fit(model, DataLoader(Numbers(), batch_size=batch_size))
        assert type(model.best) is Best, type(model.best)
        assert type(watch.seen[0]) is Best and watch.seen[0].loss == 4
        predicted = torch.cat(trainer.predict(model, DataLoader(Numbers(), batch_size=3)))
        print("weights", *(f"{p.item():.5f}" for p in model.parameters()))
        print("predicted", *(f"{p:.4f}" for p in predicted.tolist()))
        print("folder", Path(result.path).relative_to(Path.cwd()), Path(result.checkpoint.path).exists())
        assert trainer.global_step == 4 and result.metrics == {}
"""

HELPER = """
    def loss(out, target):
        return (out - 2 * target).pow(2).mean()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A person's folder: a script, a module beside it, and data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers.txt").write_text(" ".join(str(i / 4) for i in range(16)))
    (tmp_path / "helper.py").write_text(textwrap.dedent(HELPER))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip


def test_the_same_script_with_and_without_workers(folder: Path) -> None:
    two, zero = run(folder, "script.py", "2"), run(folder, "script.py", "0")
    assert (two.returncode, zero.returncode) == (0, 0), two.stderr + zero.stderr
    lines, alone = two.stdout.splitlines(), zero.stdout.splitlines()
    assert alone[:2] == ["rank 0 of 1", "once"] and zero.stderr == "to stderr 0\n"
    # Rank 0's prints as they are, the others' with their rank; each once.
    assert sorted(line for line in lines if "rank" in line and " of 2" in line) == sorted(
        ["rank 0 of 2", next(line for line in lines if line.endswith("rank 1 of 2"))]
    )
    tagged = next(line for line in lines if line.endswith("rank 1 of 2"))
    assert tagged != "rank 1 of 2" and "1" in tagged.removesuffix("rank 1 of 2")
    assert lines.count("once") == 1
    errors = two.stderr.splitlines()
    assert len(errors) == 2 and "to stderr 0" in errors
    assert errors[1 - errors.index("to stderr 0")].endswith("to stderr 1")
    # Past the prints of the workers everything is the same, but for one line that says what the waiting is for.
    results = [line for line in lines if line != "once" and "rank" not in line]
    assert [line for line in results if not line.startswith("starting 2 Ray workers")] == [
        line.replace("runs/w0", "runs/w2") for line in alone[2:]
    ]
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["w0", "w2"]


FAILS = """
    import torch
    from torch.utils.data import DataLoader
    import raylit


    class Net(raylit.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.check(self.layer(batch).mean(), batch_idx)

        def check(self, loss, batch_idx):
            if self.global_rank == self.world_size - 1 and self.current_epoch == 1 and batch_idx == 2:
                raise ValueError("a batch of the wrong kind")
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)


    import sys
    workers = int(sys.argv[1])
    trainer = raylit.Trainer(max_epochs=3, num_workers=workers, use_gpu=False, enable_progress_bar=False,
                             enable_model_summary=False, logger=False, storage_path="runs")
    loader = DataLoader(torch.ones(16, 1), batch_size=2)
    try:
        trainer.fit(Net(), loader)
    except ValueError as error:
        where = error.raylit_failure.where if workers else error.raylit_where
        print("caught", type(error) is ValueError, where["epoch"], where["batch_idx"], trainer.state.value)
        print("chain", error.__cause__, error.__context__)
        raise
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are part of the message before 3.11")
@pytest.mark.parametrize("workers", ["2", "0"])
def test_an_error_in_training_step(folder: Path, workers: str) -> None:
    """Caught it is a ValueError; uncaught, at most 15 lines: the person's frames, where it was, and none of Ray's."""
    (folder / "fails.py").write_text(textwrap.dedent(FAILS))
    done = run(folder, "fails.py", workers)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) <= 15, done.stderr
    assert lines[0] == "Traceback (most recent call last):" and "ValueError: a batch of the wrong kind" in lines
    text = done.stderr
    assert "in training_step" in text and "in check" in text and 'raise ValueError("a batch of the wrong kind")' in text
    assert "epoch 1, batch 2" in text
    assert "site-packages" not in text and "/ray/" not in text and "ray::" not in text
    if workers == "2":
        assert "raised on worker 1" in text and "node " in text
    assert done.stdout.splitlines()[-2:] == ["caught True 1 2 failed", "chain None None"]
