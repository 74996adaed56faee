"""What a trial of a search costs: raylit's Tuner against a bare Tune class trainable with reused actors.

    python benchmarks/search.py                    16 trials of 10 tiny steps, two at a time
    python benchmarks/search.py --peers function   and a bare Tune function, which starts a process for each trial

How it is measured. One Ray of two CPUs; each contestant runs the same search of 16 grid trials, turn by turn. Every
trial builds a small MLP and takes 10 steps of 10 batches in one epoch, reports a loss and keeps one checkpoint at its
end. The clock is around ``fit``; a search of two trials by each contestant comes first and does not count. Seconds a
trial are the search's time over the number of trials: what the two processes cost to start is in it, for all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from torch import Tensor, nn

import raylit

STEPS, BATCH = 10, 32


class Net(raylit.Module):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

    def train_dataloader(self) -> list[Tensor]:
        return [torch.randn(BATCH, 32) for _ in range(STEPS)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def by_hand(lr: float) -> tuple[float, dict[str, Any]]:
    """The same trial without raylit: its loss and what a checkpoint holds."""
    model = Net(lr)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for batch in model.train_dataloader():
        loss = model.net(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean()), {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def space(trials: int) -> dict[str, Any]:
    from ray import tune

    return {"lr": tune.grid_search([0.1 / (1 + number) for number in range(trials)])}


def with_raylit(trials: int, folder: str) -> None:
    trainer = raylit.Trainer(num_workers=1, max_epochs=1, use_gpu=False, logger=False, enable_progress_bar=False,
                             storage_path=folder)  # fmt: skip
    results = raylit.Tuner(Net, param_space=space(trials), trainer=trainer, dry_run=False).fit()
    assert len(results) == trials and not results.errors


def with_a_class(trials: int, folder: str) -> None:
    from ray import tune

    class Trial(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            self.state: dict[str, Any] = {}

        def step(self) -> dict[str, Any]:
            loss, self.state = by_hand(self.config["lr"])
            return {"loss": loss, "done": True}

        def save_checkpoint(self, folder: str) -> None:
            torch.save(self.state, os.path.join(folder, "model.pt"))

        def load_checkpoint(self, folder: str) -> None:
            pass

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.config = config
            return True

    keeps = tune.CheckpointConfig(checkpoint_at_end=True)
    run = tune.RunConfig(storage_path=folder, verbose=0, checkpoint_config=keeps)
    config = tune.TuneConfig(reuse_actors=True)
    trial = tune.with_resources(Trial, {"CPU": 1})
    results = tune.Tuner(trial, param_space=space(trials), run_config=run, tune_config=config).fit()
    assert len(results) == trials and not results.errors


def with_a_function(trials: int, folder: str) -> None:
    from ray import tune

    def train(config: dict[str, Any]) -> None:
        loss, state = by_hand(config["lr"])
        with tempfile.TemporaryDirectory() as here:
            torch.save(state, os.path.join(here, "model.pt"))
            tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(here))

    run = tune.RunConfig(storage_path=folder, verbose=0)
    trial = tune.with_resources(train, {"CPU": 1})
    results = tune.Tuner(trial, param_space=space(trials), run_config=run).fit()
    assert len(results) == trials and not results.errors


WAYS: dict[str, tuple[str, Callable[[int, str], None]]] = {
    "class": ("bare class trainable, reused actors", with_a_class),
    "raylit": ("raylit", with_raylit),
    "function": ("bare function", with_a_function),
}


@contextlib.contextmanager
def quiet() -> Iterator[str]:
    """Send what a library prints nowhere, and give it a folder that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=["function"], default=[])
    args = parser.parse_args()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ways = ["class", "raylit", *args.peers]
    print(f"Python {platform.python_version()}, Ray {ray.__version__}, {os.cpu_count()} cores")
    for way in ways:
        with quiet() as folder:
            WAYS[way][1](2, folder)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for each in range(args.rounds):
        for way in ways[each % len(ways) :] + ways[: each % len(ways)]:
            with quiet() as folder:
                began = time.perf_counter()
                WAYS[way][1](args.trials, folder)
                seconds[way].append((time.perf_counter() - began) / args.trials)
    bare = statistics.median(seconds["class"])
    print(f"| {args.trials} trials, {args.rounds} rounds              | seconds a trial (least-most) | x bare class |")
    print("| ----------------------------------- | ---------------------------: | -----------: |")
    for way in ways:
        middle = statistics.median(seconds[way])
        cell = f"{middle:.2f} ({min(seconds[way]):.2f}-{max(seconds[way]):.2f})"
        print(f"| {WAYS[way][0]:35} | {cell:>28} | {middle / bare:12.2f} |")


if __name__ == "__main__":
    main()
