"""Batch normalisation over the batches of all workers. Floor 2, worker side.

torch's ``SyncBatchNorm`` refuses CPU tensors. ``SyncBatchNormCPU`` computes the same over gloo: mean and variance of
the whole job's batch, weighted by each rank's number of values, with gradients that cross ranks. Two small messages a
layer: the mean first, so that the variance does not cancel.

A layer is converted by giving it another class, for the length of a run: it stays the object that it was, with its
parameters, hooks and attributes, and goes home as the class that the person wrote.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_HALVES = (torch.float16, torch.bfloat16)

Converted = list[tuple[nn.Module, type[nn.Module]]]  # each layer with the class that it had


class _SumOverWorkers(torch.autograd.Function):
    """Sum over the workers. The backward pass sums too: each rank's value is in every rank's loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed: Tensor = _SumOverWorkers.apply(grads[0].contiguous())  # type: ignore[no-untyped-call]
        return summed


def _sum(tensor: Tensor) -> Tensor:
    summed: Tensor = _SumOverWorkers.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """Like ``torch.nn.SyncBatchNorm``, for inputs of shape (N, C, ...) on the CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm expects at least 2 dimensions; got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the job's statistics in training, by the running ones in evaluation."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        # As torch does: 16 bits hold neither a large count nor a sum of many values.
        values = input.float() if input.dtype in _HALVES else input
        dims = [d for d in range(input.dim()) if d != 1]
        channels = input.shape[1]
        total = _sum(torch.cat([values.sum(dims), values.new_tensor([values.numel() / channels])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        shape = [1, channels] + [1] * (input.dim() - 2)
        centred = values - mean.view(shape)
        variance = _sum((centred * centred).sum(dims)) / count
        self._update_running(mean.detach(), variance.detach(), count)
        out = centred * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
        self.running_var.mul_(1 - factor).add_(unbiased, alpha=factor)


def convert_batchnorm(module: nn.Module, device: torch.device) -> Converted:
    """Let every BatchNorm layer of ``module`` normalise over all workers; return what ``restore_batchnorm`` takes."""
    converted: Converted = []
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            converted.append((layer, type(layer)))
            if device.type == "cpu":
                layer.__class__ = SyncBatchNormCPU
            elif not isinstance(layer, nn.SyncBatchNorm):
                layer.__class__ = nn.SyncBatchNorm
                layer.process_group = None  # type: ignore[assignment]  # all workers
    return converted


def restore_batchnorm(converted: Converted) -> None:
    """Give the layers the classes that they had."""
    for layer, own_class in converted:
        if type(layer) is nn.SyncBatchNorm and own_class is not nn.SyncBatchNorm:
            del layer.process_group
        layer.__class__ = own_class
