"""``sync_batchnorm``: layers see the batch of all workers, and come home as what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import raylit
from raylit.strategies.syncbn import convert_batchnorm, restore_batchnorm
from tests.two_process.harness import Processes, run_here
from tests.two_process.modules import FEATURES, TARGETS, check_equals_one_process, loader

SHAPES = {"1d": (nn.BatchNorm1d, (3,)), "sequence": (nn.BatchNorm1d, (3, 5)), "2d": (nn.BatchNorm2d, (3, 4, 2)),
          "3d": (nn.BatchNorm3d, (3, 2, 2, 2))}  # fmt: skip


def joined(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64) * 3 + 100
    return x.to(dtype), torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


def two_steps(layer: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Two training steps; the loss mixes all values, so that each gradient depends on each input."""
    results: dict[str, Tensor] = {}
    for index, (x, weight) in enumerate(parts):
        x = x.clone().requires_grad_()
        out = layer(x)
        ((out.sin() * weight).sum() + out.pow(3).sum()).backward()
        results |= {f"out{index}": out.detach(), f"dx{index}": x.grad}
    results |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    results |= {name: b.clone() for name, b in layer.named_buffers()}
    if layer.track_running_stats:  # else each rank's own batch, as in torch
        results["evaluated"] = layer.eval()(parts[0][0]).detach()
    return results


def make_layer(kind: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(8)
    layer: nn.Module = SHAPES[kind][0](3, **options).to(dtype)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def layer_case(rank: int, world_size: int, kind: str, options: dict[str, Any], cut: int, dtype: torch.dtype) -> Any:
    layer = make_layer(kind, options, dtype)
    assert len(convert_batchnorm(layer, torch.device("cpu"))) == 1
    x, weight = joined(SHAPES[kind][1], 7, dtype)
    mine = slice(0, cut) if rank == 0 else slice(cut, 7)
    return two_steps(layer, [(x[mine], weight[mine]), (x[mine].flip(0) * 2, weight[mine])])


@pytest.mark.parametrize("cut", [4, 6], ids=["4+3", "6+1"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("kind", SHAPES)
def test_equals_batchnorm_over_the_joined_batch(two: Processes, kind: str, options: dict[str, Any], cut: int) -> None:
    """Uneven batches; in float64 nothing but the order of additions differs."""
    ranks = two(layer_case, kind, options, cut, torch.float64)
    x, weight = joined(SHAPES[kind][1], 7, torch.float64)
    flipped = torch.cat([x[:cut].flip(0), x[cut:].flip(0)]) * 2
    whole = two_steps(make_layer(kind, options, torch.float64), [(x, weight), (flipped, weight)])
    for name, value in whole.items():
        if name.startswith(("out", "dx", "evaluated")):
            got = torch.cat([r[name] for r in ranks])
        elif name.startswith("d"):
            got = ranks[0][name] + ranks[1][name]
        else:
            got = ranks[0][name]
            assert torch.equal(got, ranks[1][name])
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def half_case(rank: int, world_size: int) -> Any:
    layer = nn.BatchNorm1d(3)
    convert_batchnorm(layer, torch.device("cpu"))
    x = half_values()[rank * 1500 : (rank + 1) * 1500]
    return layer(x), layer.running_mean, layer.running_var


def half_values() -> Tensor:
    return (torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)) + 5).bfloat16()


def test_sixteen_bits(two: Processes) -> None:
    """3000 values a channel: neither their number nor their sum fits into bfloat16."""
    ranks = two(half_case)
    whole = nn.BatchNorm1d(3)
    out = whole(half_values())
    assert ranks[0][0].dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ranks[1][1], whole.running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranks[1][2], whole.running_var, rtol=1e-4, atol=1e-4)


def second_order_case(rank: int, world_size: int) -> Tensor:
    layer = nn.BatchNorm1d(3).double()
    convert_batchnorm(layer, torch.device("cpu"))
    x, weight = joined((3,), 6, torch.float64)
    return gradient_penalty(layer, x[rank * 3 : rank * 3 + 3], weight[rank * 3 : rank * 3 + 3])


def gradient_penalty(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((layer(x).sin() * weight).sum(), x, create_graph=True)
    (first * weight).sum().backward()
    assert x.grad is not None
    return x.grad


def test_gradients_of_gradients(two: Processes) -> None:
    x, weight = joined((3,), 6, torch.float64)
    expected = gradient_penalty(nn.BatchNorm1d(3).double(), x, weight)
    torch.testing.assert_close(torch.cat(two(second_order_case)), expected, rtol=1e-8, atol=1e-10)


class Normed(raylit.Module):
    def __init__(self, seen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6),
            nn.Linear(6, TARGETS),
        )  # fmt: skip
        self.calls = 0
        self.net[1].register_forward_hook(self._count)
        self.net[1].note = "mine"

    def _count(self, *args: Any) -> None:
        self.calls += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}])
def test_a_fit_equals_that_of_one_process(two: Processes, arguments: dict[str, Any]) -> None:
    check_equals_one_process(
        two, Normed, lambda: loader(32, 4), loader(32, 8), sync_batchnorm=True, max_epochs=3, **arguments
    )


def home_case(rank: int, world_size: int, sync: bool) -> Any:
    module = Normed()
    layers = list(module.net)
    ran = run_here(module, loader(16, 4), val=loader(10, 4), rank=rank, world_size=world_size, sync_batchnorm=sync)
    assert all(one is two for one, two in zip(layers, module.net))
    assert type(module.net[1]) is nn.BatchNorm1d
    assert module.net[1].note == "mine" and module.calls > 2
    return ran.metrics["val"], module.net[1].running_mean


def test_layers_stay_the_same_objects_and_come_home_as_themselves(two: Processes) -> None:
    one = run_here(Normed(), loader(16, 8), val=loader(10, 4))
    for metric, mean in two(home_case, True):
        assert metric == pytest.approx(one.metrics["val"], abs=1e-6)
        torch.testing.assert_close(mean, one.module.net[1].running_mean, rtol=1e-6, atol=1e-6)
    apart = two(home_case, False)
    assert abs(apart[0][0] - one.metrics["val"]) > 1e-5  # it does make a difference


def test_one_process_is_left_alone() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    converted = convert_batchnorm(module, torch.device("cpu"))
    restore_batchnorm(converted)
    assert type(module[0]) is nn.BatchNorm1d
