"""Nodes join, are drained and are lost under an elastic run: what comes of it is the run that was never resized."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos.faults import wait_for
from tests.cluster.hosts import ALERT, Cluster, environment_of
from tests.cluster.resized import EPOCHS, MOST, SAMPLES, Net, loader
from tests.two_process.harness import Processes, run_here

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several raylets start and stop, on few cores
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs several loopback addresses"),
]

SCRIPT = f"""
    from pathlib import Path

    import ray.train
    import torch

    import raylit
    from raylit.callbacks import ModelCheckpoint
    from tests.cluster.resized import Net, loader

    if __name__ == "__main__":
        folder = Path({{folder!r}})
        model = Net(folder)
        trainer = raylit.Trainer(
            num_workers=(1, {MOST}), max_epochs={EPOCHS}, seed=3, logger=False, log_every_n_steps=1,
            enable_progress_bar=False, storage_path=str(folder / "results"),
            scaling_config=ray.train.ScalingConfig(num_workers=(1, {MOST}), elastic_resize_monitor_interval_s=0.5),
            callbacks=[ModelCheckpoint(every_n_train_steps=20, save_last=True)],
        )
        result = trainer.fit(model, loader())
        history = trainer.history.to_pydict()
        torch.save({{{{"weights": dict(model.state_dict()), "history": history}}}}, folder / "end.pt")
"""


def never_resized(rank: int, world_size: int) -> Any:
    ran = run_here(Net(), loader(), rank=rank, world_size=world_size, num_workers=(1, MOST), max_epochs=EPOCHS, seed=3,
                   order_seed=3, log_every_n_steps=1, enable_checkpointing=True)  # fmt: skip
    assert ran.trainer.history is not None
    return ran.weights, ran.trainer.history.to_pydict()


def test_nodes_come_and_go(two: Processes, tmp_path: Path) -> None:
    """One worker, two once a node has joined, one when it is drained; two with another node, one when that is lost."""
    script = tmp_path / "script" / "train.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(SCRIPT).format(folder=str(tmp_path)))

    def attempts() -> list[list[dict[str, Any]]]:
        """What each rank of each attempt said at its start, of attempts that all ranks of have begun."""
        found = []
        for attempt in range(len(list(tmp_path.glob("start-*-0")))):
            said = [json.loads(file.read_text()) for file in sorted(tmp_path.glob(f"start-{attempt}-*"))]
            if len(said) == said[0]["workers"]:
                found.append(said)
        return found

    with environment_of(**ALERT) as environment, Cluster(environment) as cluster:
        with subprocess.Popen([sys.executable, str(script)], cwd=script.parent, text=True,
                              env={**environment, "RAY_ADDRESS": cluster.address},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
            try:
                def on(size: int) -> list[dict[str, Any]]:
                    """Wait until the newest attempt has so many workers."""
                    def there() -> bool:
                        return process.poll() is not None or [len(each) for each in attempts()[-1:]] == [size]

                    wait_for(there, f"{size} workers")
                    assert process.poll() is None, process.communicate()[0]
                    return attempts()[-1]

                on(1)
                first = cluster.join()
                drained = next(each for each in on(2) if each["address"] == first)
                cluster.drain(first, drained["node"], notice_s=20)
                on(1)
                second = cluster.join()
                on(2)
                cluster.lose(second)
                on(1)
                (tmp_path / "hurry").touch()
                output = process.communicate(timeout=240)[0]
            finally:
                process.kill()
    assert process.returncode == 0, output
    assert [len(each) for each in attempts()] == [1, 2, 1, 2, 1], output
    assert output.count("there is room for 1 more worker; keeping the state of now, and starting again") == 2, output
    assert output.count("will be taken away in") == 1 and output.count("(restart 1 of 3)") == 1, output
    # Nothing but what the hard loss cost was done twice.
    steps = [each[0]["step"] for each in attempts()]
    assert steps[0] == 0 and steps == sorted(steps), output
    weights, history = two(never_resized)[0]
    ended = torch.load(tmp_path / "end.pt", weights_only=True)
    for name, tensor in weights.items():
        torch.testing.assert_close(ended["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    assert ended["history"]["step"] == history["step"] and ended["history"].keys() == history.keys()
    for name, column in history.items():
        for mine, theirs in zip(ended["history"][name], column, strict=True):
            assert (mine is None) == (theirs is None) and (theirs is None or mine == pytest.approx(theirs, rel=1e-3))
    # Each sample of each epoch once: no fewer than all, and no more than there is room for.
    for epoch in range(EPOCHS):
        ids = [each for file in tmp_path.glob(f"epoch-{epoch}-*") for each in json.loads(file.read_text())]
        assert sorted(ids) == list(range(SAMPLES)), (epoch, len(ids))
