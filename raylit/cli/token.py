"""``raylit token CLUSTER``: the secret that a cluster asks everyone for, one file a cluster. Floor 7.

Ray reads it where ``RAY_AUTH_MODE=token`` is set. Who has it may run code on the cluster: the file belongs to its owner
alone from the moment it exists, and what it holds is never printed.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import stat
from pathlib import Path

from raylit.cli.cluster_file import cluster_name
from raylit.errors import ConfigError

_HEX_DIGITS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def add(parser: argparse.ArgumentParser) -> None:
    """Say this command's arguments, and what runs."""
    parser.description = (
        "Make the token of a cluster, ~/.ray/tokens/NAME, unless there is one. What it holds is never printed."
    )
    parser.add_argument("cluster", metavar="CLUSTER", help="a name, or a cluster's YAML file, which has a cluster_name")
    parser.add_argument("--rotate", action="store_true", help="make a new one in place of the one that is there")
    parser.set_defaults(run=lambda given: show(given.cluster, rotate=given.rotate))


def show(cluster: str, *, rotate: bool = False) -> int:
    """Make the token where there is none, or a new one, and say where it is and how to use it."""
    named_by_file = cluster.endswith((".yaml", ".yml"))
    name = cluster_name(Path(cluster)) if named_by_file else cluster
    path, made = ensure(name, rotate=rotate)
    print(f"made: {path}" if made else f"there already, kept as it is: {path}")
    print("to use it in this shell:")
    print(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(path))}")
    if rotate:
        again = f"ray up {shlex.quote(cluster)}" if named_by_file else "ray up FILE, or your own way"
        print(f"a cluster that runs has the old one until every host has this file and Ray starts again: {again}")
    return 0


def ensure(name: str, *, rotate: bool = False) -> tuple[Path, bool]:
    """The path of the cluster's token, and whether it was made just now. ConfigError where it cannot be kept safe."""
    path = path_of(name)
    path.parent.parent.mkdir(exist_ok=True)
    try:
        path.parent.mkdir(mode=0o700)
    except FileExistsError:
        _check_folder(path.parent)
    if not rotate:
        try:
            _write(path)
        except FileExistsError:
            read(path)
            return path, False
        return path, True
    if os.path.lexists(path):
        _check_file(path)
    new = path.with_name(f".{name}.{secrets.token_hex(8)}")
    try:
        _write(new)
        os.replace(new, path)  # whoever reads it finds the old one or the new one, whole
    finally:
        new.unlink(missing_ok=True)
    return path, True


def path_of(name: str) -> Path:
    """Where the token of a cluster is kept. ConfigError for a name that is none for a file."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a token's file: letters, digits, '.', '-' and '_', the first a letter or a digit"
        )
    return Path.home() / ".ray" / "tokens" / name


def read(path: Path) -> str:
    """The token in a file that its owner alone may read; ConfigError for any other, with what to do."""
    _check_file(path)
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not token or not token.isascii() or any(char.isspace() for char in token):
        raise ConfigError(f"{path} holds no token: raylit token {path.name} --rotate makes one")
    return token


def _write(path: Path) -> None:
    """Write a new token into a file that is not there yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(_HEX_DIGITS // 2))
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink()
        raise


def _check_folder(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is no folder of its own; tokens are kept in one that belongs to you alone")
    _check_owner(folder, found, "700")


def _check_file(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise ConfigError(f"there is no token {path}: raylit token NAME makes one") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no plain file"
        raise ConfigError(f"{path} is {kind}: a token is read from a plain file only; remove it")
    _check_owner(path, found, "600")


def _check_owner(path: Path, found: os.stat_result, mode: str) -> None:
    if found.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user; a token must belong to you alone")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"others may read or write {path}: chmod {mode} {shlex.quote(str(path))}, and raylit token NAME --rotate "
            "where someone may have read the token"
        )
