"""``Module.export``: ``forward`` as a ``torch.export`` program. Floor 2, any process."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from raylit.export.sample import as_it_was, ready_path, sample_of


def to_program(module: nn.Module, file_path: str | os.PathLike[str] | None, example_inputs: Any, **kwargs: Any) -> Any:
    """Return ``torch.export.export``'s ``ExportedProgram``; with ``file_path`` (``.pt2``), write it too.

    ``kwargs`` go to ``torch.export.export``: ``dynamic_shapes``, ``strict``.
    """
    args, by_name = sample_of(module, example_inputs, "example_inputs", "export")
    target = None if file_path is None else ready_path(file_path, "export")
    import torch.export

    with as_it_was(module):
        program = torch.export.export(module, args, by_name or None, **kwargs)
    if target is not None:
        torch.export.save(program, target)
    return program
