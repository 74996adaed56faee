"""How long until training begins: raylit against bare TorchTrainer and a hand-written loop.

    python benchmarks/startup.py [--rounds 5] [--workers 1 2] [--json FILE]

On one live Ray, turn by turn (each round runs every variant once, in changing order): seconds from the call to the
first step, and to the return, of a job of one step. Medians; only ratios carry over to another machine.
Also: in process from ``fit()`` to the first step against a hand-written loop, and ``import raylit`` against
``import torch``, each in a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

Measured = tuple[float, float]  # seconds from the call: to the first step, to the return


def one_step() -> float:
    """One forward and backward of a tiny model; returns the time at which the step begins."""
    import torch

    model = torch.nn.Linear(8, 2)
    began = time.time()
    model(torch.zeros(4, 8)).sum().backward()
    return began


def bare_loop(config: dict[str, Any]) -> float:
    """What a person writes for Ray Train: loader, DDP, optimizer, one step."""
    import ray.train.torch
    import torch

    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = ray.train.torch.prepare_data_loader(torch.utils.data.DataLoader(torch.zeros(8, 8), batch_size=4))
    for batch in loader:
        began = time.time()
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return began
    raise RuntimeError("the loader gave no batch")


def raylit_main(job: Any, world: Any, channel: Any) -> bytes:
    return repr(one_step()).encode()


def bare_job(workers: int) -> Measured:
    import ray.train
    from ray.train.torch import TorchTrainer

    began = time.time()
    trainer = TorchTrainer(
        bare_loop,
        train_loop_config={},
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(storage_path=tempfile.mkdtemp()),
    )
    first = float(trainer.fit().return_value)
    return first - began, time.time() - began


def raylit_job(workers: int, **trainer_arguments: Any) -> Measured:
    """The same job through Trainer.fit, keeping nothing, as the bare one."""
    import torch

    import raylit

    class Tiny(raylit.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 2)
            self.first = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.first = self.first or time.time()
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    model = Tiny()
    began = time.time()
    trainer = raylit.Trainer(
        num_workers=workers, max_steps=1, storage_path=tempfile.mkdtemp(), enable_progress_bar=False,
        **(options | trainer_arguments),
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(8, 8), batch_size=4))
    return model.first - began, time.time() - began


def raylit_defaults(workers: int) -> Measured:
    """With what a Trainer keeps by default: TensorBoard files, a checkpoint, the summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        return raylit_job(workers, logger=True, enable_checkpointing=True, enable_model_summary=True)


def pooled_job(workers: int) -> Measured:
    """An evaluation on raylit's own actors, started for this call."""
    from raylit.driver.pool import release

    release()
    return pooled_again(workers)


def pooled_again(workers: int) -> Measured:
    """The next evaluation, on the actors that the one before left."""
    from raylit.driver.pool import launch_pooled

    began = time.time()
    launched = launch_pooled(
        _job(), num_workers=workers, worker_main="startup:raylit_main", on_event=lambda event: None
    )
    return float(launched.outcome) - began, time.time() - began


def _job() -> Any:
    from raylit.wire import Job

    return Job("fit", b"", sys_path=(str(HERE), str(HERE.parent)), working_dir=os.getcwd())


def on_ray(rounds: int, worker_counts: list[int], only: list[str] | None) -> dict[str, Any]:
    import ray

    from raylit.driver import cluster

    began = time.time()
    cluster.connect()
    print(f"ray.init: {time.time() - began:.1f} s, CPUs {cluster.available().get('CPU')}")
    variants: dict[str, Callable[[int], Measured]] = {
        "TorchTrainer": bare_job,
        "raylit": raylit_job,
        "raylit, defaults": raylit_defaults,
    }
    with contextlib.suppress(ImportError):
        import raylit.driver.pool

        variants.update({"pool, cold": pooled_job, "pool, warm": pooled_again})
    if only:
        variants = {name: variants[name] for name in only}
    seen: dict[str, list[Measured]] = {}
    for number in range(rounds + 1):
        # The pool's warm call must follow its cold one; the Ray Train variants change places.
        order = list(variants)
        trains = min(3, len(order))
        order[:trains] = order[number % trains : trains] + order[: number % trains]
        for workers in worker_counts:
            for name in order:
                measured = variants[name](workers)
                if number:  # round 0 fills the file cache
                    seen.setdefault(f"{name}, {workers} worker{'s' * (workers > 1)}", []).append(measured)
            if "pool, cold" in variants:
                raylit.driver.pool.release()
    ray.shutdown()
    return {
        name: {"first_step_s": statistics.median(m[0] for m in ms), "total_s": statistics.median(m[1] for m in ms)}
        for name, ms in seen.items()
    }


def imports(rounds: int) -> dict[str, float]:
    """Median seconds of each import, every one in a process of its own, turn by turn."""
    seen: dict[str, list[float]] = {"torch": [], "raylit": []}
    for _ in range(rounds):
        for module, times in seen.items():
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent
            )
            times.append(float(done.stdout))
    return {module: statistics.median(times) for module, times in seen.items()}


def in_process(rounds: int) -> dict[str, float] | None:
    """Median seconds to the first step of a hand loop and of ``Trainer(num_workers=0).fit``; None without a Trainer."""
    try:
        import torch

        import raylit

        trainer_class, module_class = raylit.Trainer, raylit.Module
    except (ImportError, AttributeError):
        return None

    class Tiny(module_class):  # type: ignore[misc, valid-type]
        first = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Tiny.first = Tiny.first or time.perf_counter()
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader() -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 8), batch_size=4)

    def by_hand() -> float:
        model, began = Tiny(), time.perf_counter()
        optimizer = model.configure_optimizers()
        for batch in loader():
            first = time.perf_counter()
            model.layer(batch).sum().backward()
            optimizer.step()
        return first - began

    def by_raylit() -> float:
        model, Tiny.first = Tiny(), 0.0
        trainer = trainer_class(num_workers=0, max_steps=1, enable_progress_bar=False, storage_path=tempfile.mkdtemp())
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(model, loader())
        return Tiny.first - began

    times = [(by_hand(), by_raylit()) for _ in range(rounds + 1)][1:]
    hand, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return {"hand loop": hand, "raylit": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="names of variants, e.g. TorchTrainer raylit; all where not given")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    figures: dict[str, Any] = {"imports_s": imports(asked.rounds), "in_process_s": in_process(asked.rounds)}
    figures["on_ray"] = on_ray(asked.rounds, asked.workers, asked.only)
    print(f"\n{'variant':<26}{'first step':>12}{'x bare':>9}{'total':>9}{'x bare':>9}")
    for name, figure in figures["on_ray"].items():
        bare = figures["on_ray"][f"TorchTrainer, {name.rsplit(', ', 1)[1]}"]
        first, total = figure["first_step_s"], figure["total_s"]
        print(
            f"{name:<26}{first:>10.2f} s{first / bare['first_step_s']:>9.2f}"
            f"{total:>7.2f} s{total / bare['total_s']:>9.2f}"
        )
    torch_s, raylit_s = figures["imports_s"]["torch"], figures["imports_s"]["raylit"]
    print(f"\nimport raylit {raylit_s:.2f} s, import torch {torch_s:.2f} s: {raylit_s / torch_s:.2f}")
    if figures["in_process_s"] is None:
        print("in process: no raylit.Trainer yet")
    else:
        hand, ours = figures["in_process_s"]["hand loop"], figures["in_process_s"]["raylit"]
        print(f"in process, to the first step: raylit {ours:.3f} s, hand loop {hand:.3f} s: {ours - hand:+.3f} s")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
