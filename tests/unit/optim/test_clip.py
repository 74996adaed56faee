"""Clipping is torch's own, over one optimizer's parameters alone."""

from __future__ import annotations

import torch

from raylit.optim.clip import clip_gradients


def parameters(*scales: float) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = []
    for scale in scales:
        parameter = torch.nn.Parameter(torch.randn(3, 4))
        parameter.grad = torch.randn(3, 4) * scale
        made.append(parameter)
    return made


def grads(items: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [item.grad.clone() for item in items if item.grad is not None]


def test_norm_is_torchs_over_all_groups() -> None:
    ours, theirs = parameters(1.0, 30.0), parameters(1.0, 30.0)
    optimizer = torch.optim.SGD([{"params": [ours[0]]}, {"params": [ours[1]], "lr": 0.5}], lr=0.1)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
    norm = clip_gradients(optimizer, 1.5)
    assert norm is not None
    assert torch.equal(norm, expected)
    for a, b in zip(grads(ours), grads(theirs)):
        assert torch.equal(a, b)


def test_value_is_torchs() -> None:
    ours, theirs = parameters(1.0, 30.0), parameters(1.0, 30.0)
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    assert clip_gradients(torch.optim.SGD(ours, lr=0.1), 0.3, "value") is None
    for a, b in zip(grads(ours), grads(theirs)):
        assert torch.equal(a, b)


def test_other_parameters_and_missing_gradients_are_left_alone() -> None:
    mine, other = parameters(30.0, 30.0)
    before = grads([other])[0]
    empty = torch.nn.Parameter(torch.ones(2))
    clip_gradients(torch.optim.SGD([mine, empty], lr=0.1), 0.1)
    assert torch.equal(grads([other])[0], before)
    assert empty.grad is None


def test_a_group_added_later_is_clipped() -> None:
    first, later = parameters(0.0, 30.0)
    optimizer = torch.optim.SGD([first], lr=0.1)
    optimizer.add_param_group({"params": [later]})
    clip_gradients(optimizer, 0.1, "value")
    assert later.grad is not None
    assert float(later.grad.abs().max()) < 0.11


def test_a_non_finite_norm_does_not_raise() -> None:
    (parameter,) = parameters(float("nan"))
    norm = clip_gradients(torch.optim.SGD([parameter], lr=0.1), 1.0)
    assert norm is not None
    assert norm.isnan()
