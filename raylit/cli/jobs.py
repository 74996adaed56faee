"""One cluster's Jobs API, as ``raylit submit`` uses it: who answers, a job's log until its end, its exit code. Floor 7.

On top of Ray's ``JobSubmissionClient``, which waits for ever where nothing answers, and lets ``RAY_ADDRESS`` win over
the address that it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from raylit.errors import ConfigError

T = TypeVar("T")
Say = Callable[[str], None]

_CONNECT_S, _ANSWER_S = 10.0, 30.0
# Between two looks at a job's status, beside its log: a job that fails at once is seen at once.
_FIRST_POLL_S, _POLL_S, _POLL_GROWS = 0.2, 1.0, 1.3
# Ray closes the stream of a log up to 2 s after the job's end; up to this length the rest of it is asked for instead.
_SHORT_LOG = 1_000_000  # characters
_FLUSH_S = 10.0  # what an ended job still has to say has come by then
_PATIENCE_S = 120.0  # without any answer


class Unreachable(ConnectionError):
    """The cluster gave no answer for too long."""


def address_of(given: str) -> str:
    """An address as the Jobs API wants it: ``http://HOST:PORT``, without a slash at its end."""
    address = given.strip() if "://" in given else f"http://{given.strip()}"
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{given!r} is no address of a cluster's dashboard, where jobs are taken: http://HOST:8265, or https://..."
        )
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"{given!r} names no port: a dashboard has 8265 unless it was told otherwise") from None
    address = address.rstrip("/")
    return f"{address}:8265" if "://" not in given and port is None else address


def sends_in_the_clear(address: str) -> bool:
    """Whether what is sent there crosses a network that others may listen to."""
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    return parts.scheme == "http" and host != "localhost" and not host.startswith("127.") and host != "::1"


def version_at(address: str, headers: Mapping[str, str], token_from: str | None) -> str:
    """The version of Ray that answers. ConnectionError where none does, ConfigError where it refuses us.

    ``token_from``: where the token that ``headers`` hold came from, None: they hold none.
    """
    import requests  # comes with ray[default]

    _reach(address)
    try:
        answer = requests.get(f"{address}/api/version", headers=dict(headers), timeout=(_CONNECT_S, _ANSWER_S))
    except requests.exceptions.RequestException as error:
        raise ConnectionError(f"{address} gives no answer: {_short(error)}") from error
    if answer.status_code in (401, 403):
        raise ConfigError(refusal(address, answer.status_code, token_from))
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"what answers at {address} is no Ray dashboard (HTTP {answer.status_code}); that is port 8265 of the "
            "head, through a tunnel or a proxy"
        ) from None
    return str(version)


def refusal(address: str, status: int, token_from: str | None) -> str:
    """Word that the cluster does not let us in."""
    if status == 401 and token_from is None:
        return (
            f"{address} asks for a token: give --token-file FILE, or export RAY_AUTH_MODE=token "
            "RAY_AUTH_TOKEN_PATH=FILE (raylit token NAME says where a cluster's token is)"
        )
    source = f"the token of {token_from}" if token_from else "this connection"
    return f"{address} refuses {source} (HTTP {status}): is it the token of this cluster, and of its last start?"


def check_versions(here: str, there: str, force: bool, say: Say) -> None:
    """Refuse another major or minor version of Ray than ours, unless ``force``; say it where the rest differs."""
    if here == there:
        return
    alike = here.split(".")[:2] == there.split(".")[:2]
    text = f"Ray is {here} here and {there} on the cluster"
    if not alike and not force:
        raise ConfigError(f"{text}: install ray[default]=={there} here, or --force to try it")
    say(text)


def client_at(address: str, headers: Mapping[str, str]) -> Any:
    """Ray's JobSubmissionClient for exactly this address."""
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they tell of each upload and each closed connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # each would win over the address that was asked for
        return JobSubmissionClient(address, headers=dict(headers))


def submit(client: Any, **job: Any) -> None:
    """Hand a job over. ConfigError where the cluster does not take it, ConnectionError where it is gone."""
    import requests
    from ray.exceptions import RayError

    try:
        client.submit_job(**job)
    except requests.exceptions.RequestException as error:
        raise ConnectionError(f"the connection was lost while the job was sent: {_short(error)}") from error
    except (RuntimeError, RayError) as error:
        if "already exists" in str(error):
            raise ConfigError(
                f"the cluster has a job {job['submission_id']!r} already; choose another --name"
            ) from None
        raise ConfigError(f"the cluster does not take the job: {_last_line(str(error))}") from error


def polls(longest_s: float = _POLL_S) -> Iterator[float]:
    """Seconds to wait before each look at a job's status, from 0.2 to ``longest_s``."""
    seconds = _FIRST_POLL_S
    while True:
        yield min(seconds, longest_s)
        seconds = min(seconds * _POLL_GROWS, longest_s)


class NobodyReads(Exception):
    """What the log is shown to is closed: ``raylit submit ... | head`` has seen enough."""


class Follower:
    """The log of one job, shown as it comes, once; and the job's end.

    ``revive``: called before each new try after the connection was lost (a tunnel may have to be opened again).
    ``command``: what the job runs; with it, what Ray itself writes at the log's beginning is not shown.
    """

    def __init__(
        self, client: Any, job: str, show: Callable[[str], None], say: Say, revive: Callable[[], None] = lambda: None,
        *, command: str | None = None, poll_s: float = _POLL_S, patience_s: float = _PATIENCE_S,
    ) -> None:  # fmt: skip
        self._client, self._job, self._say, self._revive = client, job, say, revive
        self._waits, self._patience_s = polls(poll_s), patience_s
        self._log = _Log(show, None if command is None else f"Running entrypoint for job {job}: {command}\n")
        self._shown = 0  # characters of the log
        self._lost_at: float | None = None

    def until_end(self) -> Any:
        """Show the log until the job has ended; its JobDetails.

        :class:`Unreachable` after 120 s without an answer, :class:`NobodyReads` where what it is shown to was closed.
        """
        return asyncio.run(self._until_end())

    async def _until_end(self) -> Any:
        while True:
            tail = asyncio.ensure_future(self._tail())
            try:
                ended = await self._watch(tail)
            finally:
                tail.cancel()
                await asyncio.wait({tail})
            if ended is not None:
                if tail.cancelled() or tail.exception() is not None:  # it may not have come to the log's end
                    await self._show_rest()
                self._tell("", last=True)
                return ended
            await asyncio.sleep(next(self._waits))

    async def _tail(self) -> None:
        at = 0  # the log is sent from its beginning each time
        async for text in self._client.tail_job_logs(self._job):
            new = text[max(0, self._shown - at) :]
            at += len(text)
            if new:
                self._tell(new)
                self._shown = at

    async def _watch(self, tail: asyncio.Future[None]) -> Any:
        """Look at the job beside its log: its details once it has ended, None where the log broke off."""
        while True:
            await asyncio.wait({tail}, timeout=next(self._waits))
            details = await self._details()
            if details is not None and details.status.is_terminal():
                await asyncio.wait({tail}, timeout=0 if self._shown < _SHORT_LOG else _FLUSH_S)
                return details
            if tail.done():
                if isinstance(tail.exception(), NobodyReads):
                    raise NobodyReads
                return None

    async def _details(self) -> Any:
        """The job's details, or None where there is no answer at the moment."""
        try:
            details = await _within(_ANSWER_S, functools.partial(self._client.get_job_info, self._job))
        except Exception as error:
            if not _may_pass(error):
                raise ConfigError(f"the cluster says of {self._job}: {_last_line(str(error))}") from error
            now = time.monotonic()
            if self._lost_at is None:
                self._lost_at = now
                self._say(f"the connection is lost ({_short(error)}); trying again for {self._patience_s:g} s")
            if now - self._lost_at > self._patience_s:
                raise Unreachable(f"no answer for {self._patience_s:g} s; the job may well go on") from error
            self._revive()
            return None
        if self._lost_at is not None:
            self._lost_at = None
            self._say("connected again")
        return details

    async def _show_rest(self) -> None:
        try:
            text = await _within(_ANSWER_S, functools.partial(self._client.get_job_logs, self._job))
        except Exception as error:
            self._say(f"the end of the log could not be read: {_short(error)}")
            return
        if text[self._shown :]:
            self._tell(text[self._shown :])
            self._shown = len(text)

    def _tell(self, text: str, last: bool = False) -> None:
        try:
            self._log.add(text, last)
        except BrokenPipeError:
            raise NobodyReads from None


class _Log:
    """A job's log without the two lines that Ray writes before the job's own; ``entrypoint`` is the second of them.

    Text that may yet become one of them is held back until it cannot, or was the last. None as ``entrypoint``: all of
    the log is shown.
    """

    _SETTING_UP = "0-0-0 0:0:0,0\tINFO job_manager.py:0 -- Runtime env is setting up.\n"  # digits are told alike

    def __init__(self, show: Callable[[str], None], entrypoint: str | None) -> None:
        self._show, self._held = show, ""
        self._expected = [] if entrypoint is None else [self._SETTING_UP, entrypoint]

    def add(self, text: str, last: bool = False) -> None:
        self._held += text
        while self._expected and self._held:
            line, expected = self._held, self._expected[0]
            if expected is self._SETTING_UP:
                line = re.sub(r"\d+", "0", line[: line.find("\n") + 1] or line)
            if line.startswith(expected):
                # The first ends with its line; the second may hold newlines of the job's arguments.
                first = expected is self._SETTING_UP
                self._held = self._held[self._held.find("\n") + 1 if first else len(expected) :]
            elif expected.startswith(line) and not last:
                return
            del self._expected[0]
        if self._held:
            held, self._held = self._held, ""
            self._show(held)


def exit_code_of(details: Any, say: Say) -> int:
    """What a shell would have had from the script: its exit code, 128 + n after signal n; 1 where there is none.

    Says on the way how the job ended, unless it succeeded.
    """
    status, code = str(details.status), details.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        say("the job was stopped")
        return 1
    if code is None:
        say(f"the job failed: {(str(details.message or '').splitlines() or ['Ray gives no reason'])[0]}")
        return 1
    code = 128 - code if code < 0 else code
    name = ""
    if code > 128:
        with contextlib.suppress(ValueError):
            name = f" ({signal.Signals(code - 128).name})"
    say(f"the job ended with exit code {code}{name}")
    return int(code)


def _reach(address: str) -> None:
    """Raise ConnectionError within some seconds where nobody listens; a proxy is left to ``requests``."""
    parts = urllib.parse.urlsplit(address)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"nothing answers at {address} ({error.strerror or error}): is the cluster up, and its dashboard's port "
            "reachable from here (a tunnel: raylit submit CLUSTER.yaml ...)?"
        ) from error


async def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a blocking call in a thread that nobody waits for once ``seconds`` have passed: then TimeoutError."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def set_result(value: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)

    def run() -> None:
        value, failed = None, None
        try:
            value = call()
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any longer
            loop.call_soon_threadsafe(set_result, value, failed)

    threading.Thread(target=run, daemon=True).start()
    try:
        return await asyncio.wait_for(answer, seconds)
    except asyncio.TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: the network, or a head that is just starting again."""
    if isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError)):  # requests' errors are OSErrors
        return True
    return isinstance(error, RuntimeError) and any(f"status code {code}" in str(error) for code in range(500, 600))


def _short(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__context__ is not None and not isinstance(error, TimeoutError):
        error = error.__context__
    reason = getattr(error, "strerror", None)
    return str(reason or (str(error).splitlines() or [type(error).__name__])[0])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .\n")]
    return lines[-1] if lines else "no reason is given"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def to_stdout(text: str) -> None:
    """Show a piece of the log at once, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
