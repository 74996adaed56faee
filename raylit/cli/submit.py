"""``raylit submit``: a script and its project, run on a cluster as if it ran here. Floor 7.

From its arguments to Ray's Jobs API: what travels (driver/project.py), the command that the cluster runs, the log and
the exit code (cli/jobs.py), the way there (cli/target.py). Its own words go to stderr, the script's to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raylit.cli import jobs
from raylit.cli.target import Ended, Target, ended_by_signals, target_of
from raylit.driver.project import MAX_BYTES, Project, import_folders, look_at, only, packed, root_of, size_text
from raylit.errors import ConfigError

_USAGE = "raylit submit (--address URL | CLUSTER.yaml) [options] (SCRIPT.py | -m MODULE) [-- ARGUMENT ...]"
_PYTHON = (".py", ".pyw", ".pyz")  # or no ending: a script may have a first line instead
_INTERRUPTED, _UNREAD = 130, 141  # as a shell says it of Ctrl-C, and of a program whose output is closed


@dataclasses.dataclass(frozen=True)
class Entry:
    """What runs: ``command`` from the folder ``at`` of the project ``project``."""

    project: Project
    at: str  # "" for the project's own folder
    command: tuple[str, ...]  # without the interpreter
    folders: tuple[str, ...]  # of the project, for the import path
    name: str


def add(parser: argparse.ArgumentParser) -> None:
    """Say this command's arguments, and what runs."""
    parser.usage = _USAGE
    parser.description = "Run a script on a cluster: its project is sent, its log is shown, its exit code is ours."
    _options(parser)
    # Options may stand before and behind the script, which argparse cannot do: what begins here is read once more.
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="[CLUSTER.yaml] SCRIPT.py [-- ARGUMENT ...]"
    )
    parser.set_defaults(run=lambda given: submit(given))


def _options(parser: argparse.ArgumentParser, again: bool = False) -> None:
    def default(value: Any) -> Any:
        return argparse.SUPPRESS if again else value

    def option(*names: str, default_: Any = None, **more: Any) -> None:
        parser.add_argument(*names, default=default(default_), **more)

    option("--address", metavar="URL", help="the cluster's dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS")
    option("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    option("--working-dir", metavar="DIR", help="the folder that is sent; else the nearest one upwards of the script "
           "with a pyproject.toml or .git, else the script's own")  # fmt: skip
    option("--exclude", action="append", metavar="PATTERN", help="do not send these; as a line of a .gitignore")
    option("--max-size", metavar="SIZE", default_="200MB", help="refuse a project that is larger (200MB)")
    option(
        "--env", action="append", metavar="K=V", help="set a variable for the script and its workers; K: as it is here"
    )
    option(
        "--name", "--submission-id", dest="name", metavar="ID", help="the job's id; else made up from the script's name"
    )
    option("--no-wait", action="store_true", default_=False, help="do not wait for its end")
    option("--token-file", metavar="FILE", help="the cluster's token; else that of CLUSTER.yaml, else as Ray finds it")
    option("--python", metavar="COMMAND", default_="python", help="the cluster's interpreter (python)")
    option("--force", action="store_true", default_=False, help="also where Ray has another version there")


def submit(given: argparse.Namespace) -> int:
    """Run what the arguments say; the script's exit code. 2 and one line where it cannot be done."""
    try:
        return _submit(given)
    except KeyboardInterrupt:
        _say("interrupted, before the job was submitted")
        return _INTERRUPTED


def _submit(given: argparse.Namespace) -> int:
    file, script, arguments = _read_again(given)
    entry = entry_of(script, given.module, arguments, given.working_dir, given.exclude or [])
    entry.project.check(bytes_of(given.max_size), "or in --exclude PATTERN; --max-size says otherwise.")
    runtime: dict[str, Any] = {"env_vars": environment(given.env or [], entry)}
    command = command_of(entry, given.python)
    job = given.name or f"{entry.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if _plain(job) != job:
        raise ConfigError(f"--name {job}: letters, digits, '-', '_' and '.'")
    with ended_by_signals(), target_of(given.address, given.token_file, file, _say, _USAGE) as target:
        client = _client(target, given.force)
        sent = entry.project
        files = f"{len(sent.files)} file{'s' * (len(sent.files) != 1)}"
        _say(f"sending {files}, {size_text(sent.size_bytes)}, of {sent.folder}")
        with packed(sent) as package:
            runtime["working_dir"] = package
            try:
                jobs.submit(client, entrypoint=command, submission_id=job, runtime_env=runtime)
            except (KeyboardInterrupt, Ended) as end:
                return _left(f"interrupted; the cluster may have taken job {job} already", target, job, end)
        if given.no_wait:
            _say(f"job {job} is submitted", *_ways(target, job))
            return 0
        _say(f"job {job}: {command}")
        return _followed(client, job, command, target)


def _client(target: Target, force: bool) -> Any:
    """Ray's client for the target, once it is known that a Ray like ours answers there and lets us in."""
    import ray

    there = jobs.version_at(target.address, target.headers, target.token_from)
    jobs.check_versions(ray.__version__, there, force, _say)
    if target.tunnel is None and jobs.sends_in_the_clear(target.address):
        _say(f"what is sent to {target.address} is not encrypted, a token neither: others on the way can read it")
    return jobs.client_at(target.address, target.headers)


def _followed(client: Any, job: str, command: str, target: Target) -> int:
    """Show the job's log until its end; what Ctrl-C and signals do on the way."""
    revive = target.tunnel.revive if target.tunnel else lambda: None
    follower = jobs.Follower(client, job, jobs.to_stdout, _say, revive, command=command)
    try:
        return jobs.exit_code_of(follower.until_end(), _say)
    except KeyboardInterrupt:
        pass
    except Ended as end:
        return _left(f"job {job} goes on", target, job, end)
    except jobs.Unreachable as error:
        _say(f"{error}", *_ways(target, job))
        return 2
    except jobs.NobodyReads:
        _say(f"nobody reads the log any longer; job {job} goes on", *_ways(target, job))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return _UNREAD
    try:
        if not _wants_to_stop():
            _say(f"job {job} goes on", *_ways(target, job))
            return _INTERRUPTED
        _say("stopping ...")
        client.stop_job(job)
        jobs.exit_code_of(follower.until_end(), _say)
    except (KeyboardInterrupt, Ended) as end:
        return _left(f"job {job} may go on", target, job, end)
    except (OSError, RuntimeError, jobs.NobodyReads) as error:
        _say(f"job {job} may go on, it could not be asked to stop: {error}", *_ways(target, job))
    return _INTERRUPTED


def _left(text: str, target: Target, job: str, end: BaseException) -> int:
    """Say how to go on with a job that is left; the exit code of what ended us."""
    with contextlib.suppress(OSError):  # with SIGHUP the terminal is gone
        _say(text, *_ways(target, job))
    return end.code if isinstance(end, Ended) else _INTERRUPTED


def _wants_to_stop() -> bool:
    """Ask once; False where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        print("\nstop the job? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False


def _ways(target: Target, job: str) -> Iterator[str]:
    address = target.address if target.tunnel is None else "http://127.0.0.1:8265"
    yield from target.look
    for what in ("logs --follow", "stop"):
        yield f"  ray job {what} --address {address} {shlex.quote(job)}"


def _say(text: str, *more: str) -> None:
    for line in (f"raylit submit: {text}", *more):
        print(line, file=sys.stderr, flush=True)


def _read_again(given: argparse.Namespace) -> tuple[Path | None, str | None, list[str]]:
    """The cluster's file, the script and its arguments, out of what stands from the first of them on."""
    rest = list(given.rest)
    at = rest.index("--") if "--" in rest else len(rest)
    ours, arguments = rest[:at], rest[at + 1 :]
    parser = argparse.ArgumentParser(prog="raylit submit", usage=_USAGE, add_help=False)
    _options(parser, again=True)
    parser.add_argument("words", nargs="*")
    parsed, odd = parser.parse_known_intermixed_args(ours, given)
    words = parsed.words
    if odd:
        raise ConfigError(f"{odd[0]!r} is no option of raylit submit; the script's own stand behind a --: {_USAGE}")
    file = Path(words.pop(0)) if words and words[0].endswith((".yaml", ".yml")) else None
    wanted = 0 if given.module else 1
    if wanted and words and Path(words[0]).suffix not in ("", *_PYTHON):
        raise ConfigError(
            f"{words[0]} is no Python script: a script ends in .py, -m MODULE runs a module, and a cluster's file, "
            "which stands before either, ends in .yaml or .yml"
        )
    if len(words) < wanted:
        raise ConfigError(f"which script? {_USAGE}")
    if len(words) > wanted:
        raise ConfigError(f"{words[wanted]!r}: the script's arguments stand behind a --: {_USAGE}")
    return file, words[0] if words else None, arguments


def entry_of(
    script: str | None, module: str | None, arguments: Sequence[str], working_dir: str | None, exclude: Sequence[str]
) -> Entry:
    """What runs, and the files that go with it. ConfigError where there is no such script or module."""
    for each in arguments:
        if "\0" in each or not _is_text(each):
            raise ConfigError(f"the argument {each!r} is no text, and cannot be sent")
    here = Path.cwd()
    path = None if script is None else _script(script)
    root = root_of(here if path is None else path.parent) if working_dir is None else _folder(working_dir)
    if root is None:
        if path is None:
            raise ConfigError(
                f"{here} is no project's folder, but a home or a place above one; --working-dir says otherwise"
            )
        _say(f"{path.parent} is no project's folder: {path.name} is sent alone; --working-dir says otherwise")
        return Entry(only(path), "", (path.name, *arguments), (), _plain(path.stem))
    inside = here if here.is_relative_to(root) else root
    if path is None:
        assert module is not None
        _check_module(module, inside)
        command: tuple[str, ...] = ("-m", module)
    else:
        if not path.is_relative_to(root):
            raise ConfigError(f"{script} does not lie in the folder that is sent, {root}")
        command = (os.path.relpath(path, inside),)
    project = look_at(root, exclude)
    if path is not None and path.relative_to(root).as_posix() not in {name for name, _ in project.files}:
        raise ConfigError(f"{script} would not be sent: a .gitignore, .rayignore or --exclude names it")
    at = inside.relative_to(root).as_posix()
    at = "" if at == "." else at
    if at and not any(name.startswith(f"{at}/") for name, _ in project.files):
        at, command = "", command if path is None else (path.relative_to(root).as_posix(),)
    own = at if path is None else path.parent.relative_to(root).as_posix()
    folders = [own, *import_folders(root, sys.path)]
    kept = tuple(dict.fromkeys(each for each in folders if each not in ("", ".")))
    return Entry(project, at, (*command, *arguments), kept, _plain(module or Path(str(script)).stem))


def command_of(entry: Entry, python: str = "python") -> str:
    """The line that the cluster's shell runs: every argument arrives as it was given."""
    line = f"{python} {shlex.join(entry.command)}"
    if not entry.at:
        return line
    # Ray's import path begins with the project's folder; the rest of it is said from there (see ``environment``).
    folders = [os.path.relpath(each, entry.at) for each in entry.folders if each != entry.at]
    path = f'env PYTHONPATH={shlex.quote(":".join(folders))}:"$PYTHONPATH" ' if folders else ""
    return f"cd {shlex.quote(entry.at)} && exec {path}{line}"


def environment(given: Sequence[str], entry: Entry) -> dict[str, str]:
    """The variables of ``--env``, and the project's folders on the import path of every worker.

    Workers start in the project's folder on their host, wherever it is: its folders are named from there.
    """
    found: dict[str, str] = {}
    for each in given:
        name, has_value, value = each.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {each}: NAME=VALUE, or NAME alone for a variable that is set here")
        if not has_value and name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here; --env {name}=VALUE gives it one")
        found[name] = value if has_value else os.environ[name]
    path = [*filter(None, [found.get("PYTHONPATH")]), *entry.folders]
    if path:
        found["PYTHONPATH"] = ":".join(path)
    return found


def bytes_of(text: str) -> int:
    """``200MB``, ``1.5 GB``, ``300`` (bytes); powers of 1000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text, re.IGNORECASE)
    if not found:
        raise ConfigError(
            f"--max-size {text}: a size is a number with B, KB, MB or GB, {size_text(MAX_BYTES)} for example"
        )
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " "))


def _script(given: str) -> Path:
    path = Path(given).expanduser()
    if not path.exists():
        raise ConfigError(f"there is no script {given}")
    if not path.is_file():
        raise ConfigError(f"{given} is no script: a Python file is wanted, or -m MODULE")
    return path.resolve()


def _folder(given: str) -> Path:
    path = Path(given).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"--working-dir {given}: there is no such folder")
    return path


def _check_module(module: str, folder: Path) -> None:
    """Whether there is such a module in ``folder`` or among the installed packages; nothing of it is run."""
    if not all(map(str.isidentifier, module.split("."))):
        raise ConfigError(f"-m {module}: that is no module's name")
    place = folder.joinpath(*module.split("."))
    if place.with_name(f"{place.name}.py").is_file() or (place / "__main__.py").is_file():
        return
    first = module.split(".")[0]
    if not (folder / first).exists() and importlib.util.find_spec(first) is not None:
        return
    name = place.relative_to(folder)
    raise ConfigError(f"-m {module}: there is no {name}.py and no {name}/__main__.py in {folder}")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "job"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
