"""The LSTM example: truncated back-propagation as a loop written by hand, and honest numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import raylit


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("03_char_lstm")


def small(example: ModuleType) -> tuple[raylit.DataModule, raylit.Module]:
    torch.manual_seed(0)
    data = example.HelpTexts(batch_size=4, window=64)
    model = example.CharLstm(data.alphabet, width=16, truncated=16)
    model.dropout.p = 0.0
    return data, model


def quiet_trainer(tmp_path: Path, **arguments: object) -> raylit.Trainer:
    return raylit.Trainer(num_workers=0, storage_path=str(tmp_path), enable_progress_bar=False,
                          enable_model_summary=False, **arguments)  # fmt: skip


def test_trains_as_a_hand_written_loop_over_pieces(example: ModuleType, tmp_path: Path) -> None:
    data, model = small(example)
    hand = example.CharLstm(data.alphabet, width=16, truncated=16)
    hand.load_state_dict(model.state_dict())
    hand.dropout.p = 0.0
    data.setup("fit")
    windows, following = data.train[:8]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(windows, following), batch_size=4)
    trainer = quiet_trainer(tmp_path, max_epochs=1, gradient_clip_val=0.5)
    trainer.fit(model, loader)

    optimizer = torch.optim.Adam(hand.parameters(), lr=4e-3)
    bits = []
    for codes, targets in loader:
        state = None
        for begin in range(0, 64, 16):
            letters, state = hand.lstm(hand.embedding(codes[:, begin : begin + 16]), state)
            state = (state[0].detach(), state[1].detach())
            loss = F.cross_entropy(hand.scores(letters).flatten(0, 1), targets[:, begin : begin + 16].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            bits.append(loss.item() / math.log(2))
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert float(trainer.callback_metrics["bits_per_char"]) == pytest.approx(sum(bits) / len(bits), rel=1e-6)


def test_bits_and_perplexity_are_those_of_all_letters(example: ModuleType, tmp_path: Path) -> None:
    data, model = small(example)
    data.setup("validate")
    data.val = torch.utils.data.TensorDataset(*data.val[:10])  # batches of 4, 4 and 2
    data.setup = lambda stage: None
    (metrics,) = quiet_trainer(tmp_path).validate(model, datamodule=data)
    model.eval()
    with torch.no_grad():
        scores, _ = model(data.val[:][0])
    nats = F.cross_entropy(scores.double().flatten(0, 1), data.val[:][1].flatten()).item()
    assert metrics["val_bits_per_char"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)


def test_nothing_validated_on_was_trained_on(example: ModuleType) -> None:
    text = example.HelpTexts().text
    cut = len(text) * 9 // 10
    trained = set(text[:cut].split("\n\n"))
    shared = sum(len(paragraph) for paragraph in text[cut:].split("\n\n") if paragraph in trained)
    assert shared <= 80  # of the paragraph that is cut in two


def test_targets_are_the_next_letters(example: ModuleType) -> None:
    data = example.HelpTexts(window=64)
    data.setup("fit")
    codes, following = data.train[3]
    read = "".join(data.alphabet[code] for code in codes), "".join(data.alphabet[code] for code in following)
    assert read == (data.text[3 * 64 : 4 * 64], data.text[3 * 64 + 1 : 4 * 64 + 1])


def test_writes_letters_of_the_alphabet(example: ModuleType) -> None:
    data, model = small(example)
    text = model.write("if ", 20)
    assert text.startswith("if ")
    assert len(text) == 23
    assert set(text) <= set(data.alphabet)


def test_runs_as_a_script(run_script: Callable[..., str]) -> None:
    out = run_script("03_char_lstm", "--num-workers", "0", "--max-epochs", "1", "--width", "16", "--batch-size", "128")
    bits = float(out.split("bits per character: ")[1].split()[0])
    assert 2.0 < bits < math.log2(103)  # knows more than nothing after five batches, and less than all
    assert "sample:\nThe for statement " in out
