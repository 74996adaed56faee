"""Get into the cluster that is to be examined, or say in one line why not. Runs on the driver.

Ray itself waits for minutes where nobody listens, and writes pages where the token is wrong. So the address is tried
before Ray is asked, and what Ray writes while it connects is kept from the terminal.
"""

from __future__ import annotations

import contextlib
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from raylit.driver import cluster, entrance
from raylit.errors import ConfigError

_STATUS_S = 30.0
_REFUSED = ("InvalidAuthToken", "AuthenticationError", "Unauthenticated")


def join(address: str | None) -> bool:
    """Connect to the cluster at ``address`` (``RAY_ADDRESS`` if None), else start Ray on this machine.

    Return whether it was there already. Raises ConfigError, with one line, where that cannot be.
    """
    named = address or os.environ.get("RAY_ADDRESS") or ""
    if named and named not in ("auto", "local"):
        _must_answer(named)
        entrance.must_let_in(named)
        refused, said = _outcome(_status(named, dict(os.environ)))
        if refused:
            raise ConfigError(entrance.refusal(named, has_token=entrance.has_token()))
        if refused is None and "version mismatch" in said:
            raise ConfigError(
                f"{named}: {said}; install the cluster's version here, or run this on one of its machines"
            )
        if refused is None:  # Ray's own connecting would wait for ever
            raise ConfigError(
                f"what answers at {named} is no head of Ray {_ray_version()}; give HOST:PORT of its GCS, usually "
                "port 6379"
            )
    if address:
        os.environ["RAY_ADDRESS"] = address
    with _hushed() as told:
        try:
            cluster.connect()
        except ConfigError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            said = _read(told)
            if any(word in said or word in str(error) for word in _REFUSED):
                where = named or "the running Ray"
                raise ConfigError(entrance.refusal(where, has_token=entrance.has_token())) from None
            raise ConfigError(f"{named or 'Ray on this machine'}: {_sentence(error)}") from None
    return bool(named) and named != "local"


class Stranger:
    """Someone without a token who asks the cluster for its status, beside everything else; see :meth:`is_refused`."""

    def __init__(self, address: str) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="raylit-doctor-")  # Ray looks for a token in ~/.ray
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        environment.update(HOME=self._home.name, PYTHONUSERBASE=site.getuserbase())
        self._asking = _status(address, environment)

    def is_refused(self) -> bool | None:
        """Wait for the answer; None where it is neither a yes nor a no."""
        try:
            return _outcome(self._asking)[0]
        finally:
            self._home.cleanup()


def _status(address: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def _outcome(asking: subprocess.Popen[str]) -> tuple[bool | None, str]:
    """Whether it was refused, None where it failed in another way; and the last line of what it said."""
    try:
        said, _ = asking.communicate(timeout=_STATUS_S)
    except subprocess.TimeoutExpired:
        asking.kill()
        said, _ = asking.communicate()
    last = (said.strip().splitlines() or [""])[-1].removeprefix("RuntimeError: ")
    if any(word in said for word in _REFUSED):
        return True, last
    return (False if asking.returncode == 0 else None), last


def _must_answer(address: str) -> None:
    scheme, separator, _ = address.partition("://")
    if separator:
        raise ConfigError(
            f"--address {address}: {scheme}:// does not reach the nodes themselves; give HOST:PORT of the head, "
            "usually port 6379, on a machine of the cluster; or http://HOST:8265 of its dashboard, from anywhere"
        )
    _, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--address {address}: give HOST:PORT of the cluster's head, usually port 6379, or auto")
    entrance.must_answer(address)


def _ray_version() -> str:
    import ray

    return str(ray.__version__)


def _sentence(error: BaseException) -> str:
    """Ray's reason as one line: a mismatch of versions is told in several."""
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip()) or type(error).__name__


@contextlib.contextmanager
def _hushed() -> Iterator[IO[bytes]]:
    """Send what this process and Ray's libraries write into a file for the length of the body; the file is given."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as told:
        try:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            yield told
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, handle in zip((1, 2), kept, strict=True):
                os.dup2(handle, number)
                os.close(handle)


def _read(told: IO[bytes]) -> str:
    told.seek(0)
    return told.read().decode(errors="replace")
