"""A rank whose training_step returns None: nobody waits for ever, and nothing but its samples is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raylit
from tests.two_process.harness import Processes, RankFailed, run_here
from tests.two_process.modules import Net, Numbers, assert_equal, fit_case, loader, numbers, samples


class Skips(Numbers):
    """Skips the batches that say NaN."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch.isnan().any() else super().training_step(batch, batch_idx)


NAN = float("nan")


def weight_of(ranks: list[tuple[dict[str, Tensor], int]]) -> tuple[float, int]:
    for weights, steps in ranks[1:]:
        assert_equal(weights, ranks[0][0])
        assert steps == ranks[0][1]
    return ranks[0][0]["weight"].item(), ranks[0][1]


@pytest.mark.parametrize(
    ("values", "arguments", "weight", "steps"),
    [
        # Per step a pair: (rank 0, rank 1). The gradient is the mean over the ranks, a skipped batch counting as zero.
        ((1, 3, NAN, 4, 5, NAN), {}, -(2 + 2 + 2.5), 3),
        ((NAN, 4), {}, -2, 1),
        ((2, 2, NAN, NAN, 4, 4), {}, -6, 2),
        ((NAN, NAN), {}, 0, 0),
        # Groups of two: the loss is divided by the group's size, on the workers and over the batches alike.
        ((NAN, 4, 2, 2), {"accumulate_grad_batches": 2}, -(1 + 1), 1),
        ((2, 2, NAN, 4), {"accumulate_grad_batches": 2}, -(1 + 1), 1),
        ((NAN, 4, NAN, 8), {"accumulate_grad_batches": 2}, -(1 + 2), 1),
        ((2, 6, NAN, NAN), {"accumulate_grad_batches": 2}, -2, 1),
        ((NAN, NAN, NAN, NAN, 2, 2, 2, 2), {"accumulate_grad_batches": 2}, -2, 1),
        ((NAN, 4, 2, NAN, 6, NAN), {"accumulate_grad_batches": 2}, -(1 + 0.5 + 1.5), 2),
    ],
)
def test_by_hand(two: Processes, values: Any, arguments: dict[str, Any], weight: float, steps: int) -> None:
    assert weight_of(two(fit_case, Skips, lambda: numbers(*values), arguments)) == (pytest.approx(weight), steps)


def test_momentum_rests_where_all_skip(two: Processes) -> None:
    make = lambda: Skips(momentum=0.5)  # noqa: E731
    # v = 2, w = -2; nobody: no step; v = 0.5 * 2 + 4, w = -7
    ranks = two(fit_case, make, lambda: numbers(2, 2, NAN, NAN, 4, 4), {})
    assert weight_of(ranks) == (pytest.approx(-7), 2)


class SkipsFirst(Net):
    """Skips before any layer was used, or has a dict without loss."""

    def __init__(self, skip: Callable[[int, int], bool], empty: Any = None) -> None:
        super().__init__("adamw")
        self.skip, self.empty = skip, empty

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.skip(self.global_rank, batch_idx):
            return self.empty
        return super().training_step(batch, batch_idx)


def test_adam_and_clipping(two: Processes) -> None:
    """Rank 1 skips each second batch: as if one process had twice the samples there, at half the weight."""

    class Half(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss / 2 if batch_idx % 2 else loss

    x, y = samples(24).tensors
    whole = [(x[i : i + 8 - 4 * k], y[i : i + 8 - 4 * k]) for i, k in ((0, 0), (8, 1), (16, 0))]
    arguments = {"gradient_clip_val": 0.1, "max_epochs": 3}
    ranks = two(fit_case, lambda: SkipsFirst(lambda r, b: r == 1 and b % 2 == 1), lambda: loader(24, 4), arguments)
    reference = run_here(Half("adamw"), whole, **arguments)
    assert_equal(ranks[0][0], ranks[1][0])
    for name, tensor in reference.weights.items():
        torch.testing.assert_close(ranks[0][0][name], tensor, rtol=1e-6, atol=1e-6)


class GanSkips(raylit.Module):
    """Two weights and two optimizers; NaN skips the first one's pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Any:
        if optimizer_idx == 0:
            return None if batch.isnan().any() else self.a * batch.mean()
        return self.b * batch.nan_to_num(1.0).mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.a], lr=1.0), torch.optim.SGD([self.b], lr=1.0)]


@pytest.mark.parametrize(
    ("values", "accumulate", "a", "b"),
    [
        ((NAN, 4, NAN, NAN, 2, 2), 1, -(2 + 2), -(2.5 + 1 + 2)),
        # Nobody has a loss for a in the whole group: what b has gathered in its first batch must stay.
        ((NAN, NAN, NAN, NAN), 2, 0, -1),
        ((NAN, 8, NAN, NAN), 2, -2, -(4.5 / 2 + 1 / 2)),
    ],
)
def test_one_of_two_optimizers(two: Processes, values: Any, accumulate: int, a: float, b: float) -> None:
    ranks = two(fit_case, GanSkips, lambda: numbers(*values), {"accumulate_grad_batches": accumulate})
    assert_equal(ranks[0][0], ranks[1][0])
    assert ranks[0][0]["a"].item() == pytest.approx(a)
    assert ranks[0][0]["b"].item() == pytest.approx(b)


class OwnStep(Skips):
    """Its optimizer_step is overridden, so that the step is given a closure."""

    def optimizer_step(self, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


CLOSURE_CASES = [((NAN, 4), -2, 1), ((4, NAN, 2, 2), -4, 2), ((NAN, NAN, 2, 2), -2, 1)]


@pytest.mark.parametrize(("values", "weight", "steps"), CLOSURE_CASES)
def test_with_an_overridden_optimizer_step(two: Processes, values: Any, weight: float, steps: int) -> None:
    assert weight_of(two(fit_case, OwnStep, lambda: numbers(*values), {}, collective_s=3)) == (
        pytest.approx(weight),
        steps,
    )


class Anew(Skips):
    """Its optimizer_step has the pass computed anew (as warm-ups and SAM-like optimizers do)."""

    def optimizer_step(self, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.zero_grad()
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize(("values", "weight", "steps"), CLOSURE_CASES)
def test_with_a_pass_that_is_computed_anew(two: Processes, values: Any, weight: float, steps: int) -> None:
    assert weight_of(two(fit_case, Anew, lambda: numbers(*values), {}, collective_s=3)) == (
        pytest.approx(weight),
        steps,
    )


class Normed(SkipsFirst):
    def __init__(self) -> None:
        super().__init__(lambda rank, batch_idx: rank == 1 and batch_idx == 1)
        self.net.insert(1, nn.BatchNorm1d(6))


def test_synchronised_batchnorm_cannot_skip(two: Processes) -> None:
    """The other rank waits in the middle of its forward pass for statistics that never come: an error, not a hang."""
    with pytest.raises(RankFailed, match="sync_batchnorm") as caught:
        two(fit_case, Normed, lambda: loader(16, 4), {"sync_batchnorm": True}, collective_s=4)
    assert "returned None" in str(caught.value)
