"""Truncated BPTT: by the Trainer's argument or the Module's property, hiddens of any nesting, outputs, own splits."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import raylit
from raylit.errors import DataError
from tests.unit.engine.small import Numbers, adamw, assert_same, quiet, sgd

State = namedtuple("State", "first second")


class Recurrent(raylit.Module):
    """An LSTM; ``pack`` says in what shape its state travels."""

    def __init__(self, make: Any = sgd, pack: Any = None, unpack: Any = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)
        self.make, self.pack, self.unpack = make, pack, unpack
        self.seen: list[Any] = []

    def loss(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        states, state = self.lstm(x, state)
        return mse_loss(self.head(states), y), state

    def training_step(self, batch, batch_idx, hiddens):
        self.seen.append(hiddens)
        loss, state = self.loss(*batch, hiddens if hiddens is None or self.unpack is None else self.unpack(hiddens))
        return {"loss": loss, "hiddens": state if self.pack is None else self.pack(state)}

    def configure_optimizers(self):
        return self.make(self.parameters())


def sequences(count: int = 4, length: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(2, length, 3, generator=generator), torch.randn(2, length, 1, generator=generator))
        for _ in range(count)
    ]


def by_hand(make: Any, *, accumulate: int = 1, clip: float | None = None) -> Recurrent:
    """Splits of three steps, two epochs: a backward for each split, and a step in the last batch of a group."""
    model = Recurrent(make)
    optimizer = make(model.parameters())
    for _ in range(2):
        data = sequences()
        for index, (x, y) in enumerate(data):
            state = None
            for start in (0, 3, 6):
                loss, state = model.loss(x[:, start : start + 3], y[:, start : start + 3], state)
                (loss / accumulate).backward()
                if (index + 1) % accumulate == 0 or index + 1 == len(data):
                    if clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
                state = tuple(each.detach() for each in state)
    return model


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("by_trainer", [True, False])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.1), (3, None)])
def test_equals_a_truncated_loop_written_by_hand(tmp_path, make, by_trainer, accumulate, clip):
    module = Recurrent(make)
    if not by_trainer:
        module.truncated_bptt_steps = 3
    arguments = {"truncated_bptt_steps": 3} if by_trainer else {}
    trainer = quiet(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **arguments)
    trainer.fit(module, sequences())
    assert_same(dict(module.state_dict()), dict(by_hand(make, accumulate=accumulate, clip=clip).state_dict()))
    assert trainer.global_step == 2 * -(-4 // accumulate)  # a round a batch, however many splits


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda s: {"state": s}, lambda h: h["state"]),
        (lambda s: [s[0], {"deep": (s[1],)}], lambda h: (h[0], h[1]["deep"][0])),
        (lambda s: State(*s), lambda h: (h.first, h.second)),
        (lambda s: torch.stack(s), lambda h: (h[0], h[1])),
        (lambda s: (s, "a name", 3, None), lambda h: h[0]),
    ],
    ids=["dict", "nested", "named tuple", "tensor", "with other things"],
)
def test_hiddens_of_any_nesting_are_carried_and_detached(tmp_path, pack, unpack):
    module = Recurrent(sgd, pack, unpack)
    quiet(tmp_path, max_epochs=2, truncated_bptt_steps=3).fit(module, sequences())
    assert_same(dict(module.state_dict()), dict(by_hand(sgd).state_dict()))
    assert [hiddens is None for hiddens in module.seen] == [True, False, False] * 8
    given = module.seen[1]
    state = pack((torch.zeros(()), torch.zeros(())))
    assert type(given) is type(state)
    assert not any(tensor.requires_grad for tensor in unpack(given))


def test_several_optimizers_share_a_splits_hiddens(tmp_path):
    class Module(Recurrent):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx, optimizer_idx, hiddens):
            self.seen.append((optimizer_idx, hiddens))
            loss = (self.head.bias.sum(), self.other)[optimizer_idx] * batch.sum()
            return {"loss": loss, "hiddens": (optimizer_idx, batch.tolist()), "who": (optimizer_idx, batch.tolist())}

        def configure_optimizers(self):
            return [sgd([self.head.bias]), sgd([self.other])]

        def training_epoch_end(self, outputs):
            self.given = outputs

        def on_train_batch_end(self, outputs):
            self.batch = outputs

    module = Module()
    trainer = quiet(tmp_path, truncated_bptt_steps=2)
    trainer.fit(module, [torch.tensor([[1.0, 2, 3]])])
    first, second = [[1.0, 2.0]], [[3.0]]
    # Both get the state with which the split begins: the one that the last optimizer left.
    assert module.seen == [(0, None), (1, None), (0, (1, first)), (1, (1, first))]
    # A list per optimizer, in it a list of the splits' outputs for each batch.
    assert [[[o["who"] for o in batch] for batch in own] for own in module.given] == [
        [[(0, first), (0, second)]], [[(1, first), (1, second)]]
    ]  # fmt: skip
    assert_same(module.batch, [own[0] for own in module.given])
    assert all("hiddens" not in o for own in module.given for batch in own for o in batch)
    assert trainer.global_step == 1


class Splits(Numbers):
    """Keeps the splits that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch, batch_idx, hiddens):
        self.seen.append(batch)
        return self.weight


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.tensor([[1, 2, 3]]), [torch.tensor([[1, 2]]), torch.tensor([[3]])]),
        (
            {"x": torch.arange(6).view(1, 3, 2), "label": torch.tensor([7])},
            [
                {"x": torch.tensor([[[0, 1], [2, 3]]]), "label": torch.tensor([7])},
                {"x": torch.tensor([[[4, 5]]]), "label": torch.tensor([7])},
            ],
        ),
        (
            (torch.tensor([[1, 2, 3]]), [["a", "b", "c"]]),
            [(torch.tensor([[1, 2]]), [["a", "b"]]), (torch.tensor([[3]]), [["c"]])],
        ),
    ],
    ids=["tensor", "dict with a label a sample", "a sequence of sequences"],
)
def test_the_default_splits_along_dimension_1(tmp_path, batch, expected):
    module = Splits()
    quiet(tmp_path, truncated_bptt_steps=2).fit(module, [batch])
    assert_same(module.seen, expected)


def test_parts_of_other_lengths_are_refused(tmp_path):
    with pytest.raises(DataError, match="differ in their number of time steps.*tbptt_split_batch"):
        quiet(tmp_path, truncated_bptt_steps=2).fit(Splits(), [(torch.zeros(1, 3), torch.zeros(1, 4))])


def test_an_own_split_may_call_the_default(tmp_path):
    class Module(Splits):
        def tbptt_split_batch(self, batch, split_size):
            return super().tbptt_split_batch(batch["x"], split_size)[:-1]  # the last one is too short

    module = Module()
    quiet(tmp_path, truncated_bptt_steps=2).fit(module, [{"x": torch.tensor([[1, 2, 3]])}])
    assert_same(module.seen, [torch.tensor([[1, 2]])])


def test_a_split_without_a_loss_is_skipped(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx, hiddens):
            self.seen = [*getattr(self, "seen", []), hiddens]
            return None if batch.sum() == 2 else {"loss": self.weight * batch.sum(), "hiddens": float(batch.sum())}

        def training_epoch_end(self, outputs):
            self.outputs = outputs

    module = Module()
    trainer = quiet(tmp_path, truncated_bptt_steps=1)
    trainer.fit(module, [torch.tensor([[1.0, 2, 4]])])
    assert module.seen == [None, 1.0, 1.0] and module.weight.item() == -5.0
    assert [[float(o["loss"]) for o in batch] for batch in module.outputs] == [[0.0, -4.0]]
    assert trainer.global_step == 1


def test_validation_is_not_split(tmp_path):
    class Module(Splits):
        def validation_step(self, batch, batch_idx):
            self.whole = batch

    module = Module()
    quiet(tmp_path, truncated_bptt_steps=2).fit(module, [torch.tensor([[1, 2, 3]])], [torch.tensor([[1, 2, 3]])])
    assert_same(module.whole, torch.tensor([[1, 2, 3]]))


def test_a_steps_value_is_the_mean_of_the_splits(tmp_path):
    class Module(Numbers):
        def training_step(self, batch, batch_idx, hiddens):
            self.log("mean", batch.sum(), on_epoch=True)
            self.log("most", batch.sum(), on_epoch=True, tbptt_reduce_fx=max)
            return self.weight

    trainer = quiet(tmp_path, truncated_bptt_steps=2)
    trainer.fit(Module(), [torch.tensor([[1.0, 2, 5]]), torch.tensor([[1.0], [1], [1]])])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # The first batch of one sample: splits of 3 and 5. The second of three samples: one split of 3.
    assert metrics["mean_epoch"] == (4 + 3 * 3) / 4 and metrics["most_epoch"] == (5 + 3 * 3) / 4
    assert metrics["mean_step"] == 3.0


def test_hiddens_that_are_asked_for_and_never_returned_are_told_once(tmp_path, capsys):
    class Forgets(Recurrent):
        def training_step(self, batch, batch_idx, hiddens):
            return {"loss": self.loss(*batch, hiddens)[0]}

    quiet(tmp_path, truncated_bptt_steps=3).fit(Forgets(), sequences())
    told = capsys.readouterr().out
    assert told.count("training_step asks for hiddens and returned none") == 1
    quiet(tmp_path, truncated_bptt_steps=3).fit(Recurrent(), sequences())
    quiet(tmp_path, truncated_bptt_steps=7).fit(Forgets(), sequences())  # one piece a batch: there is nothing to carry
    assert "hiddens" not in capsys.readouterr().out
