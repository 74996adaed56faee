"""The summary: counts, sizes, and that asking for it changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylit.summary import short_count, summarize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)
        self.encoder[0].requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)) + torch.rand(1)


def test_one_level_without_an_example() -> None:
    assert summarize(Net()) == "\n".join([
        "  | Name             | Type       | Params | Mode",
        "-" * 50,
        "0 | encoder          | Sequential | 56     | train",
        "1 | head             | Linear     | 9      | train",
        "  | other parameters |            | 3      |",
        "-" * 50,
        "28        Trainable params",
        "40        Non-trainable params",
        "68        Total params",
        "0.000     Total estimated model params size (MB)",
    ])  # fmt: skip


def test_depths() -> None:
    rows = summarize(Net(), max_depth=-1).splitlines()
    assert [row.split("|")[1].strip() for row in rows if "|" in row][1:-1] == [
        "encoder", "encoder.0", "encoder.1", "encoder.2", "head",
    ]  # fmt: skip
    assert summarize(Net(), max_depth=2) == summarize(Net(), max_depth=-1)
    assert summarize(Net(), max_depth=0).splitlines()[0] == "28        Trainable params"
    with pytest.raises(ValueError, match="max_depth=-2"):
        summarize(Net(), max_depth=-2)


def test_sizes_with_an_example() -> None:
    net = Net()
    net.example_input_array = torch.zeros(5, 4)
    lines = summarize(net, max_depth=2).splitlines()
    assert lines[0].endswith("| In sizes | Out sizes")
    assert lines[2].endswith("| train | [5, 4]   | [5, 8]")
    assert lines[6].startswith("4 | head") and lines[6].endswith("| [5, 8]   | [5, 1]")


def test_the_forward_pass_leaves_no_trace() -> None:
    net = Net()
    net.example_input_array = torch.randn(5, 4)
    net.encoder[1].eval()
    state, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    torch.manual_seed(3)
    summarize(net)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


class Several(nn.Module):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)
        self.example_input_array = example

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rnn(x)[0].sum() + y.sum()


@pytest.mark.parametrize(
    "example",
    [(torch.zeros(1, 7, 3), torch.zeros(2)), {"x": torch.zeros(1, 7, 3), "y": torch.zeros(2)}],
    ids=["tuple", "dict"],
)
def test_several_inputs_and_nested_outputs(example: Any) -> None:
    assert summarize(Several(example)).splitlines()[2].endswith(
        "| [1, 7, 3] | [[1, 7, 2], [[1, 1, 2], [1, 1, 2]]]"
    )


def test_a_failing_example_is_told_and_modes_come_back() -> None:
    net = Net()
    net.example_input_array = torch.zeros(5, 3)
    text = summarize(net)
    assert "In sizes" not in text
    assert text.splitlines()[-1].startswith("No sizes: forward(example_input_array) raised RuntimeError: mat1 and mat2")
    assert net.training and not any(m._forward_hooks for m in net.modules())


def test_lazy_layers_are_counted_as_unknown_and_stay_lazy() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    net.example_input_array = torch.zeros(1, 3)
    lines = summarize(net).splitlines()
    assert lines[2] == "0 | 0    | LazyLinear | ?      | train"
    assert lines[-3:] == [
        "10        Total params",
        "0.000     Total estimated model params size (MB)",
        "2         Parameter tensors not initialised yet, not counted above",
    ]
    assert isinstance(net[0].weight, nn.UninitializedParameter)


def test_shared_weights_count_once() -> None:
    one = nn.Linear(10, 10, bias=False)
    net = nn.Sequential(one, one, nn.Linear(10, 10, bias=False))
    net[2].weight = one.weight
    assert "100       Total params" in summarize(net)


def test_size_follows_the_number_format() -> None:
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    assert "4.000     Total est" in summarize(net)
    assert "2.000     Total est" in summarize(net.to(torch.bfloat16))


def test_a_module_without_layers() -> None:
    assert summarize(nn.Linear(2, 2)).splitlines()[0] == "6         Trainable params"
    assert summarize(nn.ReLU()).splitlines()[2] == "0         Total params"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (7850, "7.8 K"), (123_456, "123 K"), (999_999, "1.0 M"),
     (1_234_567, "1.2 M"), (70_000_000_000, "70.0 B")],
)  # fmt: skip
def test_counts_read_short(number: int, text: str) -> None:
    assert short_count(number) == text


def test_it_does_not_load_rich() -> None:
    code = "import sys, torch; from raylit.summary import summarize; summarize(torch.nn.Linear(1, 1))\n"
    code += "assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
