"""Whether the head of a running cluster answers, and lets this process in: asked before Ray is. Driver side.

Ray itself waits for minutes where nobody listens, and writes pages where the token is wrong.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from pathlib import Path

from raylit.errors import ConfigError

_ANSWER_S = 5.0  # for a connection to the head of a cluster
# What Ray's own connecting asks first. It takes no arguments, so the request is empty.
_FIRST_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"


def must_answer(address: str) -> None:
    """Raise ConfigError where nobody listens at ``address``, ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address} is no address: give HOST:PORT of the cluster's head, usually port 6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        late = isinstance(error, TimeoutError)
        reason = f"no answer within {_ANSWER_S:g} s" if late else error.strerror or str(error)
        raise ConfigError(
            f"nobody answers at {address} ({reason}); is Ray running on the head, and its port open to this machine?"
        ) from None


def must_let_in(address: str, *, found: bool = False) -> None:
    """Raise ConfigError where the head at ``address``, ``HOST:PORT``, refuses this process for its token.

    Any other answer is left to Ray. ``found``: the address was found on this machine and not given; then Ray shows a
    token that it finds also without ``RAY_AUTH_MODE``.
    """
    other_mode = os.environ.get("RAY_AUTH_MODE", "").lower() not in ("", "token", "disabled")
    if other_mode or os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH"):
        return  # Ray takes its token from elsewhere
    token = _token_to_show(found)
    if _refuses(address, token):
        raise ConfigError(refusal(f"{address} (auto)" if found else address, has_token=token is not None))


def refusal(address: str, *, has_token: bool) -> str:
    """Word that a cluster does not let this process in."""
    has = "the token here is another one" if has_token else "there is no token here"
    return (
        f"{address} refuses this machine: it asks for a token, and {has}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
        "or RAY_AUTH_TOKEN_PATH, or put the cluster's token into ~/.ray/auth_token"
    )


def has_token() -> bool:
    """Whether Ray would show a token to a head whose address it is given."""
    return _token_to_show(False) is not None


def running_here() -> str | None:
    """``HOST:PORT`` of the head that Ray finds by itself on one of a cluster's machines; None where there is none.

    Ray has no public question for it: as it does, this reads the note that ``ray start`` leaves, then processes.
    """
    on_linux = sys.platform.startswith("linux")
    temp = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if on_linux else None)
    note = Path(temp or ("/tmp" if os.name == "posix" else tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return note.read_text().strip() or None
    if os.environ.get("RAY_ADDRESS") != "auto":
        return None  # then Ray goes by the note alone
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for argument in each.read_bytes().decode().split("\0"):
                if argument.startswith("--gcs-address="):
                    return argument.partition("=")[2]
    return None


def _token_to_show(found: bool) -> str | None:
    mode = os.environ.get("RAY_AUTH_MODE")
    if not (mode.lower() == "token" if mode is not None else found):
        return None
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    with contextlib.suppress(OSError, UnicodeDecodeError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        return path.read_text().strip() or None
    return None


def _refuses(address: str, token: str | None) -> bool:
    import grpc  # type: ignore[import-untyped]  # comes with ray[default]

    shown = None if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(_FIRST_QUESTION)(b"", timeout=_ANSWER_S, metadata=shown)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
        except ValueError:  # a token that is no text for a header: Ray says what it thinks of it
            return False
    return False
