"""``Module.to_onnx``. Floor 2, any process."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from raylit.errors import missing
from raylit.export.sample import as_it_was, ready_path, sample_of

_LARGE_BYTES = 1_500_000_000


def to_onnx(module: nn.Module, file_path: str | os.PathLike[str], input_sample: Any, **kwargs: Any) -> Any:
    """Write ``forward`` as an ONNX file; return what ``torch.onnx.export`` does (an ``ONNXProgram``, or None).

    ``kwargs`` go to ``torch.onnx.export``. Raises MissingDependencyError without ``raylit[onnx]``.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise missing(package, "onnx", "to_onnx")
    args, by_name = sample_of(module, input_sample, "input_sample", "to_onnx")
    target = ready_path(file_path, "to_onnx")
    import torch.onnx

    options: dict[str, Any] = {"kwargs": by_name or None, "verbose": False, **kwargs}
    if "external_data" in inspect.signature(torch.onnx.export).parameters:
        # Weights beside the file only where one file cannot hold them: an ONNX file ends at 2 GB.
        size_bytes = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
        options.setdefault("external_data", size_bytes > _LARGE_BYTES)
    with as_it_was(module), _quiet():
        return torch.onnx.export(module, args, str(target), **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's talk of itself: of packages that it looked for, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
