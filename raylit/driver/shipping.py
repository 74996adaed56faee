"""Which code goes to the other nodes of a cluster, and what is said where some of it is missing there. Driver side.

Ray's ``working_dir`` carries it. It is given once, when the connection is made: raylit's own (``cluster.connect``), a
job's (``raylit submit``, ``ray job submit --working-dir``), or the user's (``ray.init(runtime_env=...)``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylit.driver.project import MAX_BYTES, import_folders, is_installed, look_at, packed, root_of, script_base
from raylit.worker.entry import PROJECT

_WAYS = (
    'or in runtime_env={"working_dir": FOLDER} of the Trainer name a smaller folder; large data belong on a storage '
    "that every node reads."
)


@dataclass(frozen=True)
class Shipped:
    """What a connection that raylit made carries to other nodes; ``folder`` where it is the script's project.

    ``how``: "project"; "job" or "argument" (their working_dir); nothing: "alone" (there is no other node),
    "interactive" (no script), "home" (the script lies in a place that is no project).
    """

    job_id: str  # of the connection
    how: Literal["project", "job", "argument", "alone", "interactive", "home"]
    folder: Path | None = None


def job_environment() -> dict[str, Any]:
    """The runtime environment of the job that this process runs in; empty where it was not sent as a job."""
    # Ray hands it to the entrypoint's process in this variable, and merges it with what ray.init is given.
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        found = config.get("runtime_env")
    except (ValueError, AttributeError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def project_folder() -> Path | None:
    """The running script's project; None where there is no script, or it lies in a home or above."""
    base = script_base()
    return None if base is None else root_of(base)


@contextlib.contextmanager
def environment_with(folder: Path, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The runtime environment ``given``, and the project in ``folder``, packed for the length of the body.

    Raises ConfigError where the project is too large, or a file of it cannot be read.
    """
    project = look_at(folder, list(given.get("excludes") or []))
    project.check(MAX_BYTES, _WAYS)
    variables = {PROJECT: os.pathsep.join(_spellings(folder)), **(given.get("env_vars") or {})}
    # Tasks that are not raylit's (ray.data's, the user's own) find the script's neighbours by this. Workers start in
    # the project's folder on their host, wherever it is: its folders are named from there.
    folders = ":".join(import_folders(folder, [str(script_base() or folder), *sys.path]))
    if folders and "PYTHONPATH" not in variables and "PYTHONPATH" not in (job_environment().get("env_vars") or {}):
        variables["PYTHONPATH"] = folders
    kept = {key: value for key, value in given.items() if key != "excludes"}
    with packed(project) as package:
        yield {**kept, "working_dir": package, "env_vars": variables}


def _spellings(folder: Path) -> list[str]:
    """The path of the project, and how else this process names it, where a link leads there."""
    found = [str(folder)]
    for each in (os.environ.get("PWD", ""), *sys.path):
        real = os.path.realpath(each) if os.path.isabs(each) else ""
        below = real[len(str(folder)) :]
        if real.startswith(str(folder)) and below[:1] in ("", os.sep) and each.endswith(below):
            found.append(each[: len(each) - len(below)])
    return list(dict.fromkeys(found))


def explained(error: BaseException, shipped: Shipped | None) -> BaseException:
    """The error itself; where a worker lacks a module that is here, it says which, where, and what to do.

    ``shipped``: what this connection carries, None where raylit did not make it.
    """
    failure = error.__dict__.get("raylit_failure")
    text = lacking(error, failure.node_name, shipped) if failure is not None else None
    if text is not None and isinstance(error, ModuleNotFoundError):
        error.msg = text
        error.args = (text, *error.args[1:])
    return error


def lacking(error: BaseException, node: str, shipped: Shipped | None) -> str | None:
    """What to say in one line of a module that ``node`` lacks; None for other errors, and where it is missing here too.

    ``node``: "" where nobody knows which one it was.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    file = _file_here(error.name)
    if file is None:
        return None  # a matter of the script, not of the cluster
    where = f"node {node}" if node else "another node"
    return f"No module named {error.name!r} on {where}; {_remedy(file, shipped)}"


def _remedy(file: Path, shipped: Shipped | None) -> str:
    if is_installed(file):
        return "it is installed here, and must be there: install the same packages on every node"
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "main.py"
    name = Path(script).name
    send = f"raylit submit CLUSTER.yaml {name}, or ray job submit --working-dir . -- python {name}"
    here = f"here it is {file}"
    if shipped is None:
        return (
            f'{here}, and ray.init was called without its folder: ray.init(runtime_env={{"working_dir": "."}}) sends '
            f"the folder that the script runs in; so does {send}"
        )
    if shipped.folder is not None:
        if file.is_relative_to(shipped.folder):
            return (
                f"{here}, which a .gitignore or .rayignore keeps back: a line !{file.name} in the .rayignore of its "
                "folder lets it travel"
            )
        return f"{here}, outside the project that was sent, {shipped.folder}: move it there, or install it everywhere"
    if shipped.how == "home":
        return (
            f"{here}, and the script lies in no project's folder, so that nothing was sent: give them a folder of "
            f"their own, and send it: {send}"
        )
    if shipped.how == "interactive":
        return (
            f"{here}, and there is no script whose project could be sent: before the first run, "
            'ray.init(runtime_env={"working_dir": "."}) sends the folder you are in'
        )
    if shipped.how == "alone":
        return f"{here}; the node came after the run was begun: send the script with its project: {send}"
    return f"{here}, which the working_dir of the {'job' if shipped.how == 'job' else 'runtime_env'} does not hold"


def _file_here(name: str) -> Path | None:
    """The file of a module of this process; None where there is none."""
    known = getattr(sys.modules.get(name), "__file__", None)
    if known is None:
        try:
            spec = importlib.util.find_spec(name.split(".")[0])  # runs nothing of it
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        known = spec.origin or next(iter(spec.submodule_search_locations or []), None)
    return None if known in (None, "built-in", "frozen") else Path(str(known)).resolve()
