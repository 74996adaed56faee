"""Batch normalisation over the batches of all workers, on the CPU. Floor 2, worker side.

torch's ``SyncBatchNorm`` refuses CPU tensors. This layer computes the same thing over gloo: mean and variance of the
whole job's batch, weighted by each rank's number of values, with gradients that cross ranks (the all-reduce of
torch.distributed.nn, whose backward is an all-reduce). Two small messages a layer: the mean first, so that the variance
does not cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as _all_reduce


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the workers; the gradient is summed too."""
    summed: Tensor = _all_reduce(tensor)  # type: ignore[no-untyped-call]
    return summed


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """Like ``torch.nn.SyncBatchNorm``, for inputs of shape (N, C, ...) on the CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm expects at least 2 dimensions; got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the job's statistics in training, by the running ones in evaluation."""
        self._check_input_dim(input)
        use_batch = self.training or self.running_mean is None
        if not use_batch or not self.training:
            return super().forward(input)
        dims = [d for d in range(input.dim()) if d != 1]
        channels = input.shape[1]
        local = torch.cat([input.sum(dims), input.new_tensor([input.numel() / channels])])
        total = all_reduce(local)
        count = total[-1].detach()
        mean = total[:-1] / count
        shape = [1, channels] + [1] * (input.dim() - 2)
        centred = input - mean.view(shape)
        variance = all_reduce((centred * centred).sum(dims)) / count
        self._update_running(mean.detach(), variance.detach(), count)
        out = centred * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        normalised: Tensor = out
        return normalised

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


def replace_batchnorm(module: nn.Module) -> None:
    """Replace every BatchNorm layer below ``module`` in place; parameters and buffers stay the same objects."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNormCPU):
            layer = SyncBatchNormCPU(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            if child.affine:
                layer.weight, layer.bias = child.weight, child.bias
            layer.running_mean, layer.running_var = child.running_mean, child.running_var
            layer.num_batches_tracked = child.num_batches_tracked
            layer.training = child.training
            setattr(module, name, layer)
        else:
            replace_batchnorm(child)
