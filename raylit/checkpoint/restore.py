"""``Module.load_from_checkpoint``: build a Module from a checkpoint's hyperparameters and weights. Floor 2."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from raylit.checkpoint.content import load_weights, read
from raylit.errors import CheckpointError


def build_from_checkpoint(
    cls: type[Any], path: Any, map_location: Any, strict: bool, hparams_file: str | Path | None,
    overrides: dict[str, Any],
) -> Any:  # fmt: skip
    """Return ``cls(**hyperparameters)`` with the checkpoint's weights, in evaluation-neutral mode (as constructed)."""
    checkpoint = read(path, map_location or "cpu")
    params = dict(checkpoint.get("hyper_parameters") or {})
    if hparams_file is not None:
        import yaml

        params.update(yaml.safe_load(Path(hparams_file).read_text()) or {})
    params.update(overrides)
    accepted = inspect.signature(cls.__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        params = {name: value for name, value in params.items() if name in accepted}
    missing = [
        name
        for name, p in list(accepted.items())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in params
    ]
    if missing:
        raise CheckpointError(
            f"{cls.__name__} needs {', '.join(missing)}, which the checkpoint does not have: pass "
            f"{', '.join(f'{name}=...' for name in missing)} to load_from_checkpoint, or call save_hyperparameters() "
            "in __init__ before training"
        )
    module = cls(**params)
    hook = getattr(module, "on_load_checkpoint", None)
    if hook is not None:
        hook(checkpoint)
    load_weights(checkpoint, module, strict)
    return module
