"""Precision on a CPU: each name against the hand-written loop, and the scaler's rules with torch's CPU scaler."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylit.errors import ConfigError
from raylit.ports import Precision
from raylit.precision import Float16Mixed, TruePrecision, canonical_name, check_optimizers, make_precision

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    ids: Tensor
    name: str = "a"


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(precision: Precision, steps: int = 5, clip: float | None = None) -> tuple[nn.Module, list[Tensor]]:
    """The calls of the engine, in its order."""
    model = small_model()
    precision.convert_module(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for batch in torch.randn(steps, 6, 4, generator=torch.Generator().manual_seed(1)):
        batch = precision.convert_batch(batch)
        context = precision.forward_context()
        if context is None:
            loss = model(batch).square().mean()
        else:
            with context:
                loss = model(batch).square().mean()
        precision.scale(loss).backward()
        precision.unscale(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        precision.step(optimizer, optimizer.step)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters()))


@pytest.mark.parametrize(
    ("given", "full"),
    [("32", "32-true"), (32, "32-true"), ("32-true", "32-true"), (64, "64-true"), ("64", "64-true"), (16, "16-mixed"),
     ("16-mixed", "16-mixed"), ("bf16", "bf16-mixed"), ("bf16-true", "bf16-true"), ("16-true", "16-true")],
)  # fmt: skip
def test_each_accepted_name_has_one_full_name(given: str | int, full: str) -> None:
    assert canonical_name(given) == full
    if full != "16-mixed":
        assert make_precision(given, "cpu").name == full


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'bf16_mixed' is not known. Did you mean 'bf16-mixed'\? Accepted: "):
        make_precision("bf16_mixed", "cpu")
    with pytest.raises(ConfigError):
        make_precision(True, "cpu")


def test_16_mixed_without_a_gpu_names_bf16() -> None:
    with pytest.raises(ConfigError, match="'bf16-mixed'"):
        make_precision("16-mixed", "cpu")


def test_full_precision_adds_nothing() -> None:
    precision = make_precision("32", "cpu")
    batch = {"x": torch.zeros(2)}
    loss = torch.zeros(())
    assert precision.convert_batch(batch) is batch
    assert precision.scale(loss) is loss
    assert precision.forward_context() is None
    assert precision.scaled is False
    assert precision.state_dict() == {}


def test_bf16_mixed_equals_the_hand_written_autocast_loop() -> None:
    mine, losses = train(make_precision("bf16-mixed", "cpu"))
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hand = []
    for batch in torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hand.append(loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(losses, hand))
    assert same_weights(mine, model)
    assert next(mine.parameters()).dtype is torch.float32
    full, _ = train(make_precision("32", "cpu"))
    assert not same_weights(mine, full)


@pytest.mark.parametrize(("name", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precision_equals_the_hand_written_loop(name: str, dtype: torch.dtype) -> None:
    mine, _ = train(make_precision(name, "cpu"))
    model = small_model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1)):
        model(batch.to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_weights(mine, model)
    assert next(mine.parameters()).dtype is dtype


def test_16_true_converts_the_module_and_new_tensors() -> None:
    precision = make_precision("16-true", "cpu")
    model = nn.BatchNorm1d(2)
    precision.convert_module(model)
    assert model.weight.dtype is model.running_mean.dtype is torch.float16
    assert model.num_batches_tracked.dtype is torch.int64
    context = precision.forward_context()
    assert context is not None
    with context:
        assert torch.zeros(1).dtype is torch.float16
    assert torch.zeros(1).dtype is torch.float32


def test_the_default_dtype_comes_back_after_an_error() -> None:
    context = make_precision("64", "cpu").forward_context()
    assert context is not None
    with pytest.raises(RuntimeError), context:
        raise RuntimeError
    assert torch.get_default_dtype() is torch.float32


def test_batches_of_every_shape_are_converted() -> None:
    x, ids = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    precision = TruePrecision("64-true", torch.float64)
    out: Any = precision.convert_batch({"a": [x, (ids, "text")], "b": Pair(x, ids), "c": Sample(x, ids), "d": None})
    assert out["a"][0].dtype is torch.float64
    assert out["a"][1] == (ids, "text") or out["a"][1][0] is ids
    assert isinstance(out["b"], Pair) and out["b"].x.dtype is torch.float64 and out["b"].y is ids
    assert isinstance(out["c"], Sample) and out["c"].x.dtype is torch.float64 and out["c"].name == "a"
    assert out["d"] is None
    assert isinstance(precision.convert_batch(OrderedDict(a=x)), OrderedDict)
    several = precision.convert_batch(defaultdict(list, a=x))
    assert several["a"].dtype is torch.float64 and several["b"] == [] and x.dtype is torch.float32


# -- the scaler: torch's GradScaler has a CPU form, so its rules are tested where there is no GPU ---------------------


def scaled_setup(init_scale: float = 4.0, **options: Any) -> tuple[Float16Mixed, nn.Parameter, torch.optim.SGD]:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    return (
        Float16Mixed("cpu", init_scale=init_scale, **options),
        parameter,
        torch.optim.SGD([parameter], lr=1.0),
    )


def test_16_mixed_equals_the_hand_written_scaler_loop() -> None:
    mine, losses = train(Float16Mixed("cpu"), clip=0.1)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    hand = []
    for batch in torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1)):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        hand.append(loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(losses, hand))
    assert same_weights(mine, model)


def test_gradients_are_unscaled_exactly_once_a_step() -> None:
    precision, parameter, optimizer = scaled_setup()
    for _ in range(2):
        optimizer.zero_grad()
        precision.scale(parameter.sum()).backward()
        assert parameter.grad is not None and parameter.grad.tolist() == [4.0, 4.0]
        for _ in range(3):
            precision.unscale(optimizer)
            assert parameter.grad.tolist() == [1.0, 1.0]
        precision.step(optimizer, optimizer.step)
    assert parameter.tolist() == [-1.0, 0.0]


def test_step_unscales_where_nobody_did_and_returns_the_result() -> None:
    precision, parameter, optimizer = scaled_setup()
    precision.scale(parameter.sum()).backward()

    def step() -> str:
        optimizer.step()
        return "done"

    assert precision.step(optimizer, step) == "done"
    assert parameter.tolist() == [0.0, 1.0]
    assert precision.skipped is False


def test_a_step_with_gradients_that_are_not_finite_is_left_out_and_the_scale_halved() -> None:
    precision, parameter, optimizer = scaled_setup()
    called = []
    precision.scale((parameter * float("inf")).sum()).backward()
    assert precision.step(optimizer, lambda: called.append(1)) is None
    assert not called and precision.skipped
    assert precision.state_dict()["scale"] == 2.0
    optimizer.zero_grad()
    precision.scale(parameter.sum()).backward()
    precision.step(optimizer, optimizer.step)
    assert parameter.tolist() == [0.0, 1.0] and not precision.skipped


def test_a_failing_step_leaves_no_half_done_round() -> None:
    precision, parameter, optimizer = scaled_setup()
    precision.scale(parameter.sum()).backward()

    def fail() -> None:
        raise KeyError("user")

    with pytest.raises(KeyError):
        precision.step(optimizer, fail)
    optimizer.zero_grad()
    precision.scale(parameter.sum()).backward()
    precision.step(optimizer, optimizer.step)
    assert parameter.tolist() == [0.0, 1.0]


def sam_like(factor: float) -> tuple[Float16Mixed, nn.Parameter]:
    """A step whose closure computes the gradients anew, as the engine does it: zero, backward, unscale."""
    precision, parameter, optimizer = scaled_setup()
    precision.scale(parameter.sum()).backward()
    precision.unscale(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        precision.scale((parameter * factor).sum()).backward()
        precision.unscale(optimizer)
        optimizer.step()

    precision.step(optimizer, step)
    return precision, parameter


def test_gradients_computed_anew_inside_the_step_are_unscaled_too() -> None:
    assert sam_like(2.0)[1].tolist() == [-1.0, 0.0]


def test_new_gradients_that_are_not_finite_do_no_harm() -> None:
    precision, parameter = sam_like(float("inf"))
    assert parameter.tolist() == [1.0, 2.0]
    assert precision.state_dict()["scale"] == 2.0


def test_several_optimizers_may_share_one_update() -> None:
    precision, first, one = scaled_setup(update_each_step=False)
    second = nn.Parameter(torch.ones(1))
    two = torch.optim.SGD([second], lr=1.0)
    precision.scale((first * float("inf")).sum()).backward()
    precision.scale(second.sum()).backward()
    precision.step(one, one.step)
    assert precision.state_dict()["scale"] == 4.0
    precision.step(two, two.step)
    assert second.tolist() == [0.0]
    precision.update()
    assert precision.state_dict()["scale"] == 2.0


def test_the_scaler_state_goes_through_a_safe_checkpoint(tmp_path: Any) -> None:
    precision, parameter, optimizer = scaled_setup()
    precision.scale((parameter * float("inf")).sum()).backward()
    precision.step(optimizer, optimizer.step)
    torch.save(precision.state_dict(), tmp_path / "state")
    other = Float16Mixed("cpu")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.state_dict() == precision.state_dict()
    other.load_state_dict({})
    assert other.state_dict() == precision.state_dict()


def test_lbfgs_is_refused_under_a_scaler_only() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.LBFGS([parameter])
    check_optimizers(make_precision("bf16-mixed", "cpu"), [optimizer])
    with pytest.raises(ConfigError, match="LBFGS.*'bf16-mixed'"):
        check_optimizers(Float16Mixed("cpu"), [optimizer])
    with pytest.raises(ConfigError, match="LBFGS"):
        Float16Mixed("cpu").unscale(optimizer)


@pytest.mark.parametrize("make", [lambda: torch.optim.AdamW([nn.Parameter(torch.ones(3))], fused=True)])
def test_a_fused_optimizer_is_left_out_like_any_other(make: Callable[[], torch.optim.Optimizer]) -> None:
    optimizer = make()
    parameter = optimizer.param_groups[0]["params"][0]
    precision = Float16Mixed("cpu", init_scale=8.0)
    precision.scale((parameter * float("nan")).sum()).backward()
    precision.step(optimizer, optimizer.step)
    assert parameter.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
def test_16_mixed_on_a_gpu_trains() -> None:
    precision = make_precision("16-mixed", "cuda")
    model = small_model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = precision.forward_context()
    assert context is not None
    with context:
        loss = model(torch.ones(2, 4, device="cuda")).square().mean()
    before = next(model.parameters()).clone()
    precision.scale(loss).backward()
    precision.step(optimizer, optimizer.step)
    assert precision.skipped or not torch.equal(before, next(model.parameters()))
