"""Going on from a checkpoint on a CUDA device, to the bit: its random state, and the scaler of 16-mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.contract.test_resume_trainer import same_end
from tests.gpu.test_gpu import Net, data, trainer

pytestmark = pytest.mark.gpu


class Drops(Net):
    """Dropout draws from the device's random state; the second batch's gradients are not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        dropped = (nn.functional.dropout(batch[0], 0.3), batch[1])
        return super().training_step(dropped, batch_idx) * (torch.inf if batch_idx == 1 and self.use_amp else 1.0)


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
@pytest.mark.parametrize("steps", [1, 7, 14])
def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path: Path, precision: str, steps: int) -> None:
    def fit(seed: int, **given: Any) -> Any:
        limit = {"max_steps": given.pop("max_steps")} if "max_steps" in given else {}
        module, loader = Drops(), DataLoader(data(), batch_size=8, shuffle=True)
        torch.manual_seed(seed)  # of every device; the weights have a seed of their own
        return trainer(tmp_path, precision=precision, **limit).fit(module, loader, **given)

    whole, half = fit(1), fit(1, max_steps=steps)
    same_end(whole, fit(77, ckpt_path=half.checkpoint))
