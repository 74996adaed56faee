"""torch DistributedDataParallel around the training step. Floor 2, worker side.

DDP averages gradients of what runs through its ``forward``, so the forward here is the Module's ``training_step``
(and ``training_step_end``). Two things are added to DDP:

- A rank whose training_step returned None would leave the others waiting in their all-reduce. It takes part with zeros.
  To know whether *any* rank had a loss, each loss carries the gradient 1 to an extra scalar parameter, which DDP
  averages along with the others at no extra message; only a rank that skipped a whole group ever reads it.
- In manual optimisation backward runs inside training_step, where DDP's reducer cannot be armed in time. There the
  gradients are averaged when an optimizer steps: one message a step, and none for the backwards in between.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from raylit.errors import ConfigError, HookError
from raylit.ports import Collective
from raylit.strategies.collective import TorchCollective
from raylit.strategies.syncbn import Converted, convert_batchnorm, restore_batchnorm

_BUCKET_BYTES = 25 * 1024 * 1024  # as torch DDP's default bucket


class DDP:
    """Several workers, one device each. ``find_unused_parameters=None``: True where several optimizers need it.

    Any other keyword goes to ``torch.nn.parallel.DistributedDataParallel``.
    """

    name = "ddp"
    split: Callable[[Any, int], Sequence[Any]] | None = None

    def __init__(self, find_unused_parameters: bool | None = None, **ddp_options: Any) -> None:
        self._find_unused, self._options = find_unused_parameters, ddp_options
        self._ddp: DistributedDataParallel | None = None
        self._step: _Step | None = None
        self._converted: Converted = []
        self.sync_batchnorm = False

    def attach(self, device: torch.device, collective: Collective | None = None) -> DDP:
        """Give the strategy this worker's device; the process group must exist."""
        self.device = device
        self.collective: Collective = TorchCollective(device) if collective is None else collective
        return self

    def setup_module(self, module: nn.Module) -> None:
        """Move the module to the device, convert its BatchNorm layers if asked, and start all ranks from rank 0."""
        if self.device.type != "cpu":
            module.to(self.device)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if is_lazy(tensor):
                raise ConfigError(
                    f"{name} belongs to a lazy layer, whose shape only the first batch would tell, and several workers "
                    "must agree on it before: send a batch through the layer in setup()"
                )
            if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
                raise ConfigError(
                    f"{name} was expanded: several of its elements are one place in memory, and torch DDP cannot write "
                    "to such a tensor. Register it as .expand(...).clone()"
                )
            # setup() or configure_model() may have drawn weights from each rank's own random state.
            _broadcast(tensor)
        if self.sync_batchnorm:
            self._converted = convert_batchnorm(module, self.device)

    def equalize_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers: BatchNorm's statistics have seen other batches since DDP last did so."""
        for buffer in module.buffers():
            _broadcast(buffer)

    def each_device(
        self, module: nn.Module, step: Callable[..., Any]
    ) -> list[tuple[torch.device, Callable[..., Any]]] | None:
        """The batch stays whole."""
        return None

    def wrap_training_step(
        self, module: nn.Module, step: Callable[..., Any], *, optimizers: int, manual: bool
    ) -> Callable[..., Any]:
        """Return DDP around ``step``, or ``step`` itself where there is no gradient to average on its way."""
        self._module = module
        if manual or not optimizers:
            return step
        self._step, self._several = _Step(module, step, optimizers, self.device), optimizers > 1
        self._parameters = list(module.parameters())
        self._wrap([p.requires_grad for p in self._parameters])
        return self._run

    def _wrap(self, learning: list[bool]) -> None:
        """Make DDP over the parameters that learn. It takes note of them once, when it is made."""
        unused = self._several if self._find_unused is None else self._find_unused
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        if self._ddp is not None:
            self._ddp = None
            gc.collect()  # its hooks on the parameters go with it, and it is part of a cycle
        now = [p.requires_grad for p in self._parameters]
        _set_learning(self._parameters, learning)
        self._ddp = DistributedDataParallel(self._step, device_ids=ids, find_unused_parameters=unused, **self._options)
        if self.collective.world_size > 2 and not unused:
            self._settle_buckets()
        _set_learning(self._parameters, now)
        self._learning = learning

    def _settle_buckets(self) -> None:
        """Send zeros once, so that DDP lays out its messages now, and in the same way in every run.

        It lays them out anew after the first backward pass, by the order in which gradients were ready. Of three ranks
        and more, the place in a message decides in which order a sum is built, and so its last bit: a run that goes on
        from a checkpoint would not be the run that was never stopped.
        """
        assert self._ddp is not None and self._step is not None
        layers = self._module.modules()
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters)
        if hooked or any(getattr(layer, "sparse", False) for layer in layers):
            return  # the hooks are not to see these zeros, and sparse gradients are none
        kept = [(p, p.grad) for p in (*self._parameters, *self._step.took_part)]
        for parameter, _ in kept:
            parameter.grad = None
        self._step.settling = True
        with torch.enable_grad():
            _, zero = self._ddp(None, 0, None, None)
            zero.backward()
        self._step.settling = False
        for parameter, gradient in kept:
            parameter.grad = gradient

    def _follow(self, learning: list[bool]) -> None:
        """Wrap anew where layers were frozen or thawed: DDP would not average a thawed one."""
        if self._several:  # only the parameters of the optimizer at work require gradients now; DDP minds no unused one
            learning = [now or known for now, known in zip(learning, self._learning, strict=True)]
        if learning != self._learning:
            self._wrap(learning)

    def _run(self, batch: Any, batch_idx: int, optimizer_idx: int | None, hiddens: Any) -> Any:
        learning = [p.requires_grad for p in self._parameters]  # some 30 ns each
        if learning != self._learning:
            self._follow(learning)
        assert self._ddp is not None and self._step is not None
        output, zero = self._ddp(batch, batch_idx, optimizer_idx, hiddens)
        self._step.zero = zero
        return output

    def no_sync(self) -> AbstractContextManager[Any] | None:
        """Return DDP's context in which backward does not all-reduce; None where backward never does."""
        if self._ddp is None:
            return None
        context: AbstractContextManager[Any] = self._ddp.no_sync()
        return context

    def skip_pass(self) -> None:
        """Send zeros where the other ranks send gradients.

        Raises HookError where BatchNorm layers are synchronised: the other ranks wait in the middle of
        their pass for this one's statistics and gradients, which are not there.
        """
        if any(layer.training for layer, _ in self._converted):
            raise HookError(
                "training_step returned None, which it cannot do with sync_batchnorm=True on several workers: their "
                "BatchNorm layers need every worker's batch. Return a loss of zero that depends on the output, such as "
                "0 * output.sum()"
            )
        if self._step is not None and self._step.zero is not None:
            zero, self._step.zero = self._step.zero, None
            zero.backward()  # type: ignore[no-untyped-call]

    def anyone_took_part(self, optimizer_idx: int) -> bool:
        """Read the averaged mark of who had a loss; waits for the device."""
        assert self._step is not None
        mark = self._step.took_part[optimizer_idx].grad
        anyone = mark is not None and bool(mark.item() != 0.0)
        if not anyone:
            self.end_group(optimizer_idx)
            # Zeros were written where gradients were None; an optimizer would take them for gradients later. Those of
            # other optimizers, which require no gradient now, may be in the middle of a group.
            for parameter in self._module.parameters():
                if parameter.requires_grad:
                    parameter.grad = None
        return anyone

    def end_group(self, optimizer_idx: int) -> None:
        """Forget who took part."""
        if self._step is not None:
            self._step.took_part[optimizer_idx].grad = None

    def group_state(self) -> dict[str, Any]:
        """Return each optimizer's mark (this rank's losses since the last step), and whether DDP evens out buffers.

        It does so before a forward pass, unless the pass before was one without all-reduce.
        """
        if self._step is None or self._ddp is None:
            return {}
        marks = [mark.grad for mark in self._step.took_part]
        return {"marks": marks, "even_buffers": self._ddp.require_forward_param_sync}

    def load_group_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``group_state`` returned."""
        if self._step is None or self._ddp is None or not state:
            return
        for mark, saved in zip(self._step.took_part, state["marks"]):
            mark.grad = None if saved is None else saved.to(mark.device)
        self._ddp.require_forward_param_sync = state["even_buffers"]

    def reduce_gradients(self, optimizer: Optimizer) -> None:
        """Average the gradients of ``optimizer``'s parameters over the workers, in few large messages.

        A parameter without gradient on some ranks only counts as zero there. Averaging twice changes nothing, so
        gradients that several steps share stay right.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        for parameter, wanted in zip(parameters, self.collective.all_reduce(have, "max").tolist(), strict=True):
            if wanted and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= self.collective.world_size
            start = 0
            for gradient in bucket:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def teardown(self) -> None:
        """Let go of DDP, so that the Module can travel home."""
        self._ddp = self._step = None
        restore_batchnorm(self._converted)
        self._converted = []

    def __getstate__(self) -> dict[str, Any]:
        # Made by the person on the driver; what a worker adds stays there.
        return {"_find_unused": self._find_unused, "_options": self._options, "sync_batchnorm": self.sync_batchnorm,
                "_ddp": None, "_step": None, "_converted": []}  # fmt: skip


class _Step(nn.Module):
    """What DDP wraps: its parameters are the Module's and the marks, its forward is the training step."""

    def __init__(self, module: nn.Module, step: Callable[..., Any], optimizers: int, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.took_part = nn.ParameterList(nn.Parameter(torch.zeros((), device=device)) for _ in range(optimizers))
        self.step = step
        self.zero: Tensor | None = None
        self.settling = False

    def forward(self, batch: Any, batch_idx: int, optimizer_idx: int | None, hiddens: Any) -> tuple[Any, Any]:
        output = None if self.settling else self.step(batch, batch_idx, optimizer_idx, hiddens)
        mark = self.took_part[optimizer_idx or 0]
        if isinstance(output, Tensor):
            return _marked(output, mark), None
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": _marked(output["loss"], mark)}, None
        # Skipped: a zero that depends on every parameter, or (an error in the making) something that is no loss.
        zero = mark * 0
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                zero = zero + (parameter * 0).sum()
        return output, zero


def _broadcast(tensor: Tensor) -> None:
    """Overwrite ``tensor`` with rank 0's. Collectives take dense tensors of real numbers alone."""
    data = tensor.detach()
    if not data.numel():
        return
    if data.is_complex():
        data = torch.view_as_real(data)
    sent = data.contiguous()
    dist.broadcast(sent, src=0)
    if sent is not data:
        data.copy_(sent)


def _set_learning(parameters: list[nn.Parameter], learning: list[bool]) -> None:
    for parameter, flag in zip(parameters, learning, strict=True):
        parameter.requires_grad_(flag)


def _marked(loss: Tensor, mark: Tensor) -> Tensor:
    if not loss.requires_grad:
        return loss  # refused by the engine, which says why
    return loss + (mark - mark.detach()).to(loss.dtype)


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Group tensors of one dtype and device, in order, up to the size of a DDP bucket."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        same = buckets and (buckets[-1][0].dtype, buckets[-1][0].device) == (tensor.dtype, tensor.device)
        if not same or size + tensor.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets
