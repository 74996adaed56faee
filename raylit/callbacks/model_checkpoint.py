"""ModelCheckpoint: which states of a fit are kept as files. Floor 2; the same on every rank.

It says when and what; ``raylit/worker/keeper.py`` asks it at the fit's safe points, writes, deletes, and tells it what
became of that. The decisions themselves are in ``keeping.py``. No hook of it runs in a step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import Tensor, tensor

from raylit.callback import Callback
from raylit.callbacks.keeping import Kept, Rules, When
from raylit.config.amounts import duration
from raylit.config.names import refuse_unknown
from raylit.errors import ConfigError
from raylit.uri import has_more_than_a_path, redacted

_ARGUMENTS = (
    "dirpath", "filename", "monitor", "verbose", "save_last", "save_top_k", "save_weights_only", "mode",
    "auto_insert_metric_name", "every_n_train_steps", "train_time_interval", "every_n_epochs",
    "save_on_train_epoch_end", "enable_version_counter", "every_n_seconds",
)  # fmt: skip
FILE_NAME = "model.ckpt"  # within a checkpoint's folder, as raylit/checkpoint/content.py writes it
_STATE: tuple[str, ...] = ("monitor", "best_model_score", "best_model_path", "current_score", "dirpath",
                           "best_k_models", "kth_best_model_path", "kth_value", "last_model_path")  # fmt: skip
_FIELD = re.compile(r"\{([^{}:!]*)([^{}]*)\}")
DEFAULT_EVERY_S = 300.0  # of the checkpoints that a run without a ModelCheckpoint keeps at epoch ends


class ModelCheckpoint(Callback):
    """Keep states of a fit: the best by a metric, the newest, or all of them.

    ``dirpath``: folder or URI for the checkpoints; None: ``checkpoints`` in the run folder. ``filename``: a name with
    ``{epoch:02d}-{val_loss:.2f}``; ``auto_insert_metric_name`` writes ``epoch=02-val_loss=0.12``. ``monitor``: the
    metric to rank by, ``mode`` ``"min"`` or ``"max"``; None: the newest is the best. ``save_top_k``: so many are kept;
    -1 all, 0 none. ``save_last``: True (or ``"link"``): the newest state, always; None: the state at the end of the
    fit; False: neither. ``save_weights_only``: no fit can go on from such a file. ``verbose``: print what is saved.

    One of: ``every_n_train_steps``; ``every_n_epochs`` (the default: 1); ``train_time_interval``, a timedelta or as
    Trainer's ``max_time``; ``every_n_seconds``. ``save_on_train_epoch_end``: with epochs, True: at their end; False:
    after each validation; None: at their end and, with a monitor, after validations within them. A checkpoint has only
    metrics that were measured on its own weights: where ``monitor`` was not, ranking waits for the next state where it
    is. The state at the end is ranked too, where it is kept.
    ``enable_version_counter=False``: of two of one name the earlier goes, once the later one is there.

    A checkpoint is a folder with ``model.ckpt``, whose path the attributes hold, on the driver too:
    ``best_model_path``, ``best_model_score``, ``last_model_path``, ``best_k_models`` (path -> score),
    ``kth_best_model_path``, ``kth_value``, ``current_score``. ConfigError for arguments that contradict one another.
    """

    best_k_models: dict[str, Tensor]
    best_model_score: Tensor | None
    kth_value: Tensor | None
    current_score: Tensor | None
    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None, monitor: str | None = None,
        verbose: bool = False, save_last: bool | str | None = None, save_top_k: int = 1,
        save_weights_only: bool = False, mode: str = "min", auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | str | Mapping[str, int] | None = None, every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None, enable_version_counter: bool = True,
        every_n_seconds: float | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        refuse_unknown("ModelCheckpoint", unknown, _ARGUMENTS)
        self.monitor, self.mode, self.verbose = _monitor(monitor), _one_of("mode", mode, ("min", "max")), bool(verbose)
        self.save_top_k = _whole("save_top_k", save_top_k, -1, "-1: all")
        self.save_last = _save_last(save_last)
        if monitor is None and self.save_top_k > 1:
            raise ConfigError(
                f"ModelCheckpoint(save_top_k={save_top_k}) without a monitor has nothing to rank by: give "
                "monitor='val_loss', or save_top_k=1 (the newest), -1 (all) or 0 (none)"
            )
        self.save_weights_only = bool(save_weights_only)
        self.auto_insert_metric_name = bool(auto_insert_metric_name)
        self.enable_version_counter = bool(enable_version_counter)
        self.filename = _filename(filename)
        self.own_folder = self.dirpath = None if dirpath is None else _folder(dirpath)
        self.train_time_interval = _interval(train_time_interval)
        self.every_n_seconds = _seconds(every_n_seconds)
        self.every_n_train_steps = _or_none("every_n_train_steps", every_n_train_steps)
        self.every_n_epochs = _or_none("every_n_epochs", every_n_epochs)
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.when = self._when()
        self.rules = Rules(self.save_top_k, monitor is not None, self.mode, self.save_last)
        self._told = _STATE
        self._forget()
        self.format_checkpoint_name({})  # a format that cannot be used is refused here

    @classmethod
    def default(cls) -> ModelCheckpoint:
        """What a run without a ModelCheckpoint has: the newest state, at the end and now and then at an epoch's."""
        callback = cls()
        callback.when = When(every_n_epochs=1, at_epoch_end=True, least_s=DEFAULT_EVERY_S)
        callback._told = ()  # nobody asked for it: checkpoints say nothing of it
        return callback

    def _when(self) -> When:
        given = {name: value for name, value in (
            ("every_n_train_steps", self.every_n_train_steps), ("every_n_epochs", self.every_n_epochs),
            ("train_time_interval", self.train_time_interval), ("every_n_seconds", self.every_n_seconds),
        ) if value}  # fmt: skip
        if len(given) > 1:
            raise ConfigError(f"ModelCheckpoint: {' and '.join(given)} exclude one another; give one of them")
        every_s = self.every_n_seconds or 0.0
        if self.train_time_interval is not None:
            every_s = self.train_time_interval.total_seconds()
        epochs = self.every_n_epochs
        if epochs is None:
            epochs = 0 if given or self.every_n_train_steps is not None else 1
        return When(self.every_n_train_steps or 0, epochs, every_s, self.save_on_train_epoch_end)

    # -- what the keeper says ------------------------------------------------------------------------------------
    def began(self, folder: str, kept: Kept) -> None:
        """A fit begins that keeps its checkpoints in ``folder``; ``kept``: what a killed attempt of it left there."""
        self._forget()
        self.dirpath = folder
        self.has(kept)

    def has(self, kept: Kept) -> None:
        """The checkpoints that are there, or are once the save in flight is done."""
        scored = [(self._path(name), tensor(float("nan") if score is None else score)) for name, score in kept.best]
        self.last_model_path = self._path(kept.last) if kept.last else ""
        self.best_k_models, self.kth_best_model_path, self.kth_value = {}, "", None
        self.best_model_path, self.best_model_score = self._before
        if self.monitor is None:
            if kept.names:  # the newest
                self.best_model_path, self.best_model_score = scored[-1][0] if scored else self.last_model_path, None
        elif scored:
            self.best_k_models = dict(scored)
            self.best_model_path, self.best_model_score = scored[0]
            self.kth_best_model_path, self.kth_value = scored[-1]

    def saw(self, score: float | None) -> None:
        """The monitored metric of the state that was last looked at."""
        self.current_score = None if score is None else tensor(score)

    def _path(self, name: str) -> str:
        return f"{self.dirpath}/{name}/{FILE_NAME}"

    def _forget(self) -> None:
        self.best_k_models = {}
        self.best_model_path = self.last_model_path = self.kth_best_model_path = ""
        self.best_model_score = None
        self._before: tuple[str, Tensor | None] = ("", None)  # the best of the run that this one goes on from
        self.kth_value = None
        self.current_score = None
        self.asked_step = -1  # at which it last asked for a checkpoint
        self.owed = False  # its metric was not of that state's weights: the next one where it is, is ranked

    # -- names ---------------------------------------------------------------------------------------------------
    def format_checkpoint_name(self, metrics: Mapping[str, Any], filename: str | None = None,
                               ver: int | None = None) -> str:  # fmt: skip
        """Return the name of a checkpoint's folder: ``"epoch=02-val_loss=0.12"``, with ``-v1`` for ``ver=1``.

        ``metrics``: by name, with ``epoch`` and ``step``; one that is not there reads ``nan``.
        """
        template = self.filename if filename is None else _filename(filename)
        if template is None:
            template = f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"

        def one(found: re.Match[str]) -> str:
            name, form = found[1].strip(), found[2]
            whole = name in ("epoch", "step")
            value: Any = metrics.get(name, 0 if whole else float("nan"))
            value = int(value) if whole else float(value)
            try:
                text = f"{{0{form}}}".format(value)
            except (ValueError, IndexError, KeyError) as error:
                raise ConfigError(
                    f"ModelCheckpoint(filename={template!r}): {found[0]} cannot be formatted ({error}); metrics are "
                    "floats, epoch and step whole numbers: '{epoch:02d}-{val_loss:.2f}'"
                ) from None
            return f"{name}{self.CHECKPOINT_EQUALS_CHAR}{text}" if self.auto_insert_metric_name else text

        name = _FIELD.sub(one, template).replace("/", "_").replace("\\", "_")
        return name if ver is None else f"{name}{self.CHECKPOINT_JOIN_CHAR}v{ver}"

    def is_version(self, name: str, plain: str) -> bool:
        """Tell whether a folder has the name ``plain``, with or without a version behind it."""
        return re.fullmatch(rf"{re.escape(plain)}({re.escape(self.CHECKPOINT_JOIN_CHAR)}v\d+)?", name) is not None

    # -- in checkpoints ------------------------------------------------------------------------------------------
    @property
    def state_key(self) -> str:
        """One for each metric and rhythm, so that several of these keep apart."""
        told = {"monitor": self.monitor, "mode": self.mode, "every_n_train_steps": self.when.every_n_steps,
                "every_n_epochs": self.when.every_n_epochs, "every_s": self.when.every_s}  # fmt: skip
        return f"{type(self).__qualname__}{told}"

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept; the checkpoint that this goes into counts as written."""
        state = {name: getattr(self, name) for name in self._told}
        if self._told and (self.when.every_n_steps or self.when.every_s):  # else it never asks between measurements
            state["asked"] = [self.asked_step, self.owed]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the rhythm where it was, and remember another run's best until there is one of this run.

        That one's files are not touched. In a run that goes on in its own folder, what lies there counts.
        """
        self.asked_step, self.owed = state.get("asked", (-1, False))
        if not self.best_model_path and state.get("best_model_path"):
            self._before = (state["best_model_path"], state.get("best_model_score"))
            self.best_model_path, self.best_model_score = self._before


# -- arguments -------------------------------------------------------------------------------------------------------
def _refuse(name: str, value: object, accepted: str) -> ConfigError:
    return ConfigError(f"ModelCheckpoint({name}={value!r}): expected {accepted}")


def _monitor(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _refuse("monitor", value, "the name of a logged metric, or None")
    return value


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise _refuse(name, value, " or ".join(map(repr, accepted)))
    return str(value)


def _whole(name: str, value: object, least: int, meaning: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refuse(name, value, f"a whole number of at least {least}{f' ({meaning})' if meaning else ''}")
    return value


def _or_none(name: str, value: object) -> int | None:
    return None if value is None else _whole(name, value, 0, "0: never")


def _save_last(value: object) -> bool | None:
    if value not in (True, False, None, "link") or (isinstance(value, int) and not isinstance(value, bool)):
        raise _refuse("save_last", value, "True, False, None or 'link'")
    return True if value == "link" else value  # type: ignore[return-value]


def _filename(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise _refuse("filename", value, "a name such as '{epoch:02d}-{val_loss:.2f}'")
    plain = _FIELD.sub("x", value)
    if "/" in plain or "\\" in plain or "{" in plain or "}" in plain or plain.startswith("."):
        raise _refuse("filename", value, "one folder's name, without path separators or open braces; a folder for the "
                      "checkpoints is dirpath")  # fmt: skip
    return value.removesuffix(".ckpt")


def _folder(value: object) -> str:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path.strip():
        raise _refuse("dirpath", value, "a folder or a URI such as 's3://bucket/folder'")
    if has_more_than_a_path(path):  # it would stand in every path that the attributes hold, and in checkpoints
        raise _refuse("dirpath", redacted(path), "a URI without credentials and options: Trainer(storage_path=...) "
                      "takes them, and without a dirpath the checkpoints lie in its run folders")  # fmt: skip
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _interval(value: Any) -> timedelta | None:
    try:
        return duration("train_time_interval", value)
    except ConfigError as error:  # worded for an argument of the Trainer
        raise ConfigError(str(error).replace("Trainer(", "ModelCheckpoint(", 1)) from None


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise _refuse("every_n_seconds", value, "a number of seconds above 0")
    return float(value)
