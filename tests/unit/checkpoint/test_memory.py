"""Copies of states, one after the other, in memory that is used again; none changes one that somebody still has."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raylit.checkpoint.archive import save
from raylit.checkpoint.memory import CopyMemory, to_cpu

LARGE = 5000  # elements: those of a few are copied in their own memory
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.float64]
ODD = {
    "few": lambda: torch.randn(3),
    "none": lambda: torch.empty(0, 4),
    "transposed": lambda: torch.randn(LARGE, 7).T,
    "channels last": lambda: torch.randn(2, 64, 20, 20).to(memory_format=torch.channels_last),
    "conjugate": lambda: torch.randn(LARGE, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(LARGE, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(200).to_sparse(),
    "expanded": lambda: torch.randn(1).expand(LARGE),
    "a parameter": lambda: nn.Parameter(torch.randn(LARGE)),
    "one number": lambda: torch.tensor(2.5),
}
TENSORS = st.one_of(
    st.builds(
        lambda size, dtype: (9 * torch.randn(size)).to(dtype), st.integers(1, 3 * LARGE), st.sampled_from(DTYPES)
    ),
    st.sampled_from(sorted(ODD)).map(lambda name: ODD[name]()),
)  # fmt: skip
STATES = st.lists(TENSORS, max_size=5)


def same(one: Tensor, other: Tensor) -> bool:
    dense = [each.to_dense() if each.is_sparse else each for each in (one, other)]
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(*(each.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                                   if each.numel() else each for each in dense))  # fmt: skip


@given(st.lists(st.tuples(STATES, st.booleans()), max_size=6))
def test_each_copy_is_the_state_and_stays_it(states: list[tuple[list[Tensor], bool]]) -> None:
    memory = CopyMemory()
    held: list[tuple[list[Tensor], list[Tensor]]] = []
    for state, holds in states:
        memory.begin()
        copies = to_cpu(state, memory.copy)
        expected = [each.detach().clone() for each in state]
        for copy, original in zip(copies, state, strict=True):
            assert same(copy, original) and not copy.requires_grad
            if original.layout is torch.strided:
                assert copy.stride() == original.detach().clone().stride()
                if original.is_contiguous() and not original.is_neg():
                    original.detach().zero_()
        if holds:
            held.append((copies, expected))
        del copies
        assert all(same(*pair) for kept in held for pair in zip(*kept, strict=True))


def test_the_memory_is_used_again_and_every_copy_is_a_storage_of_its_own() -> None:
    memory, state = CopyMemory(), [torch.randn(LARGE) for _ in range(3)]
    places = []
    for _ in range(4):
        memory.begin()
        copies = to_cpu(state, memory.copy)
        assert all(each.untyped_storage().nbytes() == each.nbytes for each in copies)
        assert all(each.data_ptr() % 64 == 0 for each in copies)
        places.append([each.data_ptr() for each in copies])
        del copies
    assert sorted(places[0]) == sorted(places[1]) == sorted(places[2]) == sorted(places[3])


VIEWS = [lambda each: each[1:3], lambda each: each.numpy(), lambda each: each.untyped_storage()]


@pytest.mark.parametrize("view", VIEWS)
def test_whatever_is_left_of_a_copy_keeps_its_memory(view: Any) -> None:
    memory = CopyMemory()
    for _ in range(2):
        memory.begin()
        kept = view(to_cpu([torch.full((LARGE,), 3.0)], memory.copy)[0])
    memory.begin()
    to_cpu([torch.zeros(LARGE)], memory.copy)
    assert bytes(kept)[:4] == bytes(torch.tensor([3.0]).numpy()) if not isinstance(kept, Tensor) else (kept == 3).all()


def test_tied_weights_are_copied_and_written_once() -> None:
    module = nn.Module()
    module.one = nn.Linear(100, 100, bias=False)
    module.other = nn.Linear(100, 100, bias=False)
    module.other.weight = module.one.weight
    for copied in ({}, {"copied": CopyMemory().copy}):
        state = to_cpu(module.state_dict(), **copied)
        assert state["one.weight"].data_ptr() == state["other.weight"].data_ptr() != module.one.weight.data_ptr()
        out = io.BytesIO()
        save(state, out)
        assert 40_000 < out.tell() < 50_000
        again = nn.Module()
        again.one, again.other = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
        again.load_state_dict(torch.load(io.BytesIO(out.getvalue()), weights_only=True))
        with torch.no_grad():
            again.one.weight.zero_()
        assert torch.equal(again.other.weight, module.one.weight)  # the loaded weights are as separate as before


class Fleeting(Mapping[str, Tensor]):
    """Makes each tensor when it is asked for, at the place of the one before."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.full((LARGE,), float(key))

    def __iter__(self) -> Iterator[str]:
        return iter("123456789")

    def __len__(self) -> int:
        return 9


def test_a_tensor_at_the_place_of_one_that_is_gone_is_another() -> None:
    memory = CopyMemory()
    for _ in range(2):
        memory.begin()
        copies = to_cpu(Fleeting(), memory.copy)
        assert [float(each[0]) for each in copies.values()] == list(range(1, 10))


def test_views_of_one_place_that_are_not_the_same_numbers() -> None:
    whole = torch.randn(LARGE, dtype=torch.complex64)
    state = {"whole": whole, "conjugate": whole.conj(), "half": whole[: LARGE // 2], "real": torch.view_as_real(whole),
             "square": whole[:4900].view(70, 70), "transposed": whole[:4900].view(70, 70).T}  # fmt: skip
    copies = to_cpu(state)
    assert all(same(copies[name], state[name]) for name in state)
