"""Gradient clipping over one optimizer's parameters. Floor 2. Never waits for the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

ClipAlgorithm = Literal["norm", "value"]


def clip_gradients(optimizer: Optimizer, clip_val: float, algorithm: ClipAlgorithm = "norm") -> Tensor | None:
    """Clip the gradients of ``optimizer``'s parameters in place.

    ``"norm"``: scale them together so that their joint 2-norm is at most ``clip_val``; returns that norm before
    clipping, a scalar on the gradients' device. ``"value"``: clamp each element to [-clip_val, clip_val]; returns None.

    ``foreach`` is left to torch, which uses the fused kernels on GPUs and is bitwise what a hand-written loop gets.
    A non-finite norm is not looked at here (that would wait for the device): ``detect_anomaly`` is for that.
    """
    # Read anew on each call: add_param_group may have added some (fine-tuning that thaws layers).
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if algorithm == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, clip_val, error_if_nonfinite=False)
    torch.nn.utils.clip_grad_value_(parameters, clip_val)
    return None
