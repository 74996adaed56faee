"""Where ``raylit submit`` and ``raylit doctor`` run a job: a dashboard's address, the way there, the token. Floor 7."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylit.cli import jobs
from raylit.cli.cluster_file import cluster_name, load, token_source
from raylit.cli.token import path_of, read
from raylit.cli.tunnel import Tunnel, dashboard_port
from raylit.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Target:
    """Where it runs. ``token_from``: the file or variable of its token; ``look``: commands that make it reachable."""

    address: str
    headers: dict[str, str]
    token_from: str | None
    look: tuple[str, ...]
    tunnel: Tunnel | None = None


class Ended(SystemExit):
    """SIGTERM or SIGHUP came; the exit code is 128 and its number."""

    code: int


def token_of(given: str | None, file: Path | None) -> tuple[str | None, str | None]:
    """The token to show, and where it came from; ``(None, None)`` where there is none.

    That which was given, else the cluster's file's own, else, as Ray does it, the environment's.
    """
    if given is not None:
        return read(Path(given).expanduser()), given
    if file is not None:
        path = token_source(file)
        own = path or path_of(cluster_name(file))
        if path is not None or own.exists():
            return read(own), str(own)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        value = os.environ.get(name)
        if value:
            return (value.strip() if name == "RAY_AUTH_TOKEN" else _of_file(value)), name
    usual = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and usual.exists():
        return _of_file(str(usual)), str(usual)
    return None, None


@contextlib.contextmanager
def target_of(
    address: str | None, token_file: str | None, file: Path | None, say: Callable[[str], None], usage: str
) -> Iterator[Target]:
    """Make the cluster reachable while the body runs: at ``address``, at Ray's variables', or by its ``file``.

    ConfigError where that cannot be; ``usage`` ends the one of no cluster at all.
    """
    if file is not None and address is not None:
        raise ConfigError("either --address or a cluster's file, not both")
    if file is not None:
        load(file)  # what is wrong with it is said before anything starts
    token, source = token_of(token_file, file)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    exports = () if source is None or source.startswith("RAY_") else (
        f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(Path(source).expanduser()))}",
    )  # fmt: skip
    if file is None:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address and os.environ.get("RAY_ADDRESS", "").startswith("http"):
            address = os.environ["RAY_ADDRESS"]
        if not address:
            raise ConfigError(f"which cluster? --address http://HOST:8265, or the YAML file of ray up: {usage}")
        yield Target(jobs.address_of(address), headers, source, exports)
        return
    cluster_name(file)
    say(f"opening a tunnel to the cluster of {file}")
    look = (f"  ray dashboard {shlex.quote(str(file))}  # in another terminal", *exports)
    with Tunnel(file, dashboard_port(file)) as tunnel:
        yield Target(tunnel.address, headers, source, look, tunnel)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave as :class:`Ended`, through ``finally`` clauses: no tunnel may stay behind."""

    def leave(number: int, frame: Any) -> None:
        raise Ended(128 + number)

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _of_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"the token's file {path} cannot be read: {error.strerror or error}") from error
