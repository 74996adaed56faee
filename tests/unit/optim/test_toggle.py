"""Toggling leaves one optimizer's parameters on, and gives the user's own requires_grad back exactly."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from raylit.optim.toggle import Toggle


def made(n: int) -> list[Parameter]:
    return [Parameter(torch.ones(1)) for _ in range(n)]


def flags(parameters: list[Parameter]) -> list[bool]:
    return [parameter.requires_grad for parameter in parameters]


def sgd(*parameters: Parameter) -> torch.optim.SGD:
    return torch.optim.SGD(list(parameters), lr=0.1)


def test_only_this_optimizers_parameters_require_gradients() -> None:
    a, b, shared, loose = parameters = made(4)
    toggle = Toggle([sgd(a, shared), sgd(b, shared)], parameters=[loose])
    toggle.toggle(0)
    assert flags(parameters) == [True, False, True, False]
    toggle.untoggle(0)
    toggle.toggle(1)
    assert flags(parameters) == [False, True, True, False]
    toggle.untoggle(1)
    assert flags(parameters) == [True] * 4


def test_parameters_in_no_optimizer_are_left_alone_unless_given() -> None:
    a, b, loose = made(3)
    toggle = Toggle([sgd(a), sgd(b)])
    toggle.toggle(0)
    assert loose.requires_grad


def test_what_the_user_froze_stays_frozen() -> None:
    a, b, frozen_a, frozen_b = parameters = made(4)
    toggle = Toggle([sgd(a, frozen_a), sgd(b, frozen_b)])
    frozen_a.requires_grad_(False)
    frozen_b.requires_grad_(False)
    toggle.toggle(0)
    assert flags(parameters) == [True, False, False, False]
    toggle.untoggle(0)
    assert flags(parameters) == [True, True, False, False]


def test_a_parameter_thawed_or_frozen_between_steps_is_seen() -> None:
    a, b = made(2)
    toggle = Toggle([sgd(a), sgd(b)])
    b.requires_grad_(False)
    toggle.toggle(0)
    toggle.untoggle(0)
    assert not b.requires_grad
    b.requires_grad_(True)
    toggle.toggle(0)
    toggle.untoggle(0)
    assert b.requires_grad


def test_toggled_twice_is_still_toggled_after_one_untoggle() -> None:
    a, b = made(2)
    toggle = Toggle([sgd(a), sgd(b)])
    toggle.toggle(0)
    toggle.toggle(0)
    toggle.untoggle(0)
    assert flags([a, b]) == [True, False]
    toggle.untoggle(0)
    assert flags([a, b]) == [True, True]


def test_nested_toggles_come_back_to_the_outer_one() -> None:
    a, b = made(2)
    toggle = Toggle([sgd(a), sgd(b)])
    toggle.toggle(0)
    toggle.toggle(1)
    assert flags([a, b]) == [False, True]
    toggle.untoggle(1)
    assert flags([a, b]) == [True, False]


def test_untoggle_without_toggle_and_restore_twice_do_nothing() -> None:
    a, b = made(2)
    toggle = Toggle([sgd(a), sgd(b)])
    toggle.untoggle(1)
    toggle.toggle(0)
    toggle.untoggle(1)
    assert flags([a, b]) == [True, False]
    toggle.restore()
    toggle.restore()
    assert flags([a, b]) == [True, True]


def test_refresh_sees_an_added_group() -> None:
    a, b, late = made(3)
    first = sgd(a)
    toggle = Toggle([first, sgd(b)], parameters=[late])
    first.add_param_group({"params": [late]})
    toggle.refresh()
    toggle.toggle(0)
    assert late.requires_grad


@given(
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12),
)
def test_restore_gives_back_the_users_setting_after_any_calls(own: list[bool], calls: list[tuple[bool, int]]) -> None:
    parameters = made(4)
    for parameter, flag in zip(parameters, own):
        parameter.requires_grad_(flag)
    toggle = Toggle([sgd(parameters[0], parameters[3]), sgd(parameters[1]), sgd(parameters[2])])
    for on, index in calls:
        if on:
            toggle.toggle(index)
        else:
            toggle.untoggle(index)
        assert all(before or not now for before, now in zip(own, flags(parameters)))
    toggle.restore()
    assert flags(parameters) == own
