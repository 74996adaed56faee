"""Whether an override zeroed the gradients, and whether an optimizer needs a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from raylit.optim.closure import grads_mark, needs_closure, were_zeroed


def with_grads() -> SGD:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full((3,), 5.0)
    return SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


def all_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def replace(optimizer: Optimizer, value: float) -> None:
    for parameter in all_of(optimizer):
        parameter.grad = torch.full((3,), value)


def by_hand(optimizer: Optimizer) -> None:
    for parameter in all_of(optimizer):
        parameter.grad = None


def one_by_hand(optimizer: Optimizer) -> None:
    all_of(optimizer)[0].grad = None


def mixed(optimizer: Optimizer) -> None:
    first, second = all_of(optimizer)
    first.grad = None
    assert second.grad is not None
    second.grad.zero_()


def set_nan(optimizer: Optimizer) -> None:
    for parameter in all_of(optimizer):
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))


def new_pass(optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    sum((parameter * 2).sum() for parameter in all_of(optimizer)).backward()  # type: ignore[union-attr]


CASES: list[tuple[str, Callable[[Any], object], bool]] = [
    ("nothing", lambda o: None, False),
    ("zero_grad to None", lambda o: o.zero_grad(set_to_none=True), True),
    ("zero_grad in place", lambda o: o.zero_grad(set_to_none=False), True),
    ("grad = None", by_hand, True),
    ("one to None, one in place", mixed, True),
    ("replaced by zeros", lambda o: replace(o, 0.0), True),
    ("replaced by others", lambda o: replace(o, 1.0), False),
    ("only one zeroed", one_by_hand, False),
    ("clipped by norm", lambda o: torch.nn.utils.clip_grad_norm_(all_of(o), 0.1), False),
    ("clipped by value", lambda o: torch.nn.utils.clip_grad_value_(all_of(o), 0.1), False),
    ("stepped", lambda o: o.step(), False),
    ("nan", set_nan, False),
    ("zeroed, then a pass", new_pass, False),
]


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_were_zeroed(change: Callable[[Any], object], expected: bool) -> None:
    optimizer = with_grads()
    mark = grads_mark(optimizer)
    change(optimizer)
    assert were_zeroed(mark) is expected


def test_without_gradients_nothing_was_zeroed() -> None:
    optimizer = with_grads()
    optimizer.zero_grad()
    mark = grads_mark(optimizer)
    assert mark.entries == ()
    optimizer.zero_grad()
    assert not were_zeroed(mark)


def test_sparse_gradients() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    mark = grads_mark(optimizer)
    assert not were_zeroed(mark)
    optimizer.zero_grad(set_to_none=False)
    assert were_zeroed(mark)


def test_no_wait_where_a_gradient_was_left_alone() -> None:
    # On the meta device reading a value raises: an unchanged gradient is decided without one.
    optimizer = SGD([torch.nn.Parameter(torch.ones(3, device="meta"))], lr=0.1)
    for parameter in all_of(optimizer):
        parameter.grad = torch.ones(3, device="meta")
    mark = grads_mark(optimizer)
    assert not were_zeroed(mark)
    optimizer.zero_grad()
    assert were_zeroed(mark)


class PlainSubclass(AdamW):
    pass


class OwnStep(Adam):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class NoClosure(SGD):
    def step(self) -> None:  # type: ignore[override]
        super().step()


class AnyArguments(SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().step(*args, **kwargs)


class OtherName(SGD):
    def step(self, again: Any) -> Any:  # type: ignore[override]
        return super().step(again)


@pytest.mark.parametrize(
    ("optimizer_class", "expected"),
    [
        (LBFGS, True),
        (SGD, False),
        (AdamW, False),
        (torch.optim.Adagrad, False),
        (PlainSubclass, False),
        (OwnStep, True),
        (NoClosure, False),
        (AnyArguments, True),
        (OtherName, True),
    ],
)
def test_needs_closure(optimizer_class: Any, expected: bool) -> None:
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert needs_closure(optimizer) is expected
    StepLR(optimizer, 1)  # wraps optimizer.step on the instance
    assert needs_closure(optimizer) is expected


TORCHS = sorted(n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type) and n != "Optimizer")


@pytest.mark.parametrize("name", TORCHS)
def test_every_optimizer_of_torch_but_lbfgs_goes_without(name: str) -> None:
    kind = getattr(torch.optim, name)
    optimizer = kind([torch.nn.Parameter(torch.ones(2, 2))])
    assert needs_closure(optimizer) is (name == "LBFGS")
