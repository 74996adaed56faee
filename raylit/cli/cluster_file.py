"""What the commands read of a cluster's YAML file, the one that ``ray up`` takes. Floor 7.

Only what is needed: Ray checks the whole of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylit.errors import ConfigError


def cluster_name(file: Path) -> str:
    """The file's ``cluster_name``. ConfigError where it has none, or is no such file."""
    content = load(file)
    name = content.get("cluster_name")
    if "apiVersion" in content and "kind" in content:
        raise ConfigError(
            f"{file} is for kubectl and has no cluster_name, as files of ray up have: raylit token raylit-k8s makes a "
            "token for it, and the file's first lines say what then; jobs go to its dashboard, with --address"
        )
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{file} has no cluster_name: a cluster's file begins with 'cluster_name: NAME'")
    return name


def token_source(file: Path) -> Path | None:
    """The file here that becomes ``~/.ray/auth_token`` on the cluster's hosts; None where no line says it."""
    mounts = load(file).get("file_mounts") or {}
    if isinstance(mounts, dict):
        for there, here in mounts.items():
            if str(there).endswith("/.ray/auth_token") and isinstance(here, str):
                return Path(here).expanduser()
    return None


def load(file: Path) -> dict[str, Any]:
    """The file's content; ConfigError in one line where it cannot be read as a mapping."""
    import yaml

    try:
        # A file for kubectl may hold several documents: the first says enough.
        content = next(yaml.safe_load_all(file.read_text(encoding="utf-8")), None)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{file}{line} is no YAML: {getattr(error, 'problem', None) or 'it cannot be read'}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is no cluster's file: it holds no 'cluster_name:', 'provider:' and so on")
    return content
