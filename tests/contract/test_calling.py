"""Sections 2 and 3: what each hook is given in a real run, for overrides of every style.

One fit with truncated BPTT, two optimizers and two validation loaders, then test, prediction and a fit from the
checkpoint. Each hook's first and last call is compared with a line that is written by hand from the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raylit
from raylit.errors import HookError
from raylit.hooks import CALLBACK_HOOKS, MODULE_HOOKS, HookSpec
from tests.unit.engine.small import Numbers, numbers, quiet

TRAIN = [torch.arange(12.0).reshape(3, 4, 1), torch.arange(12.0, 24.0).reshape(3, 4, 1)]
OTHER = [torch.full((2, 4, 1), 50.0), torch.full((2, 4, 1), 60.0)]  # one batch of each evaluation loader

# First and last call of each hook. trainN, otherN: batches; a and b: the splits of a batch; oN: optimizers.
EPOCH = "[[[{loss}, {loss}], [{loss}, {loss}]], [[{loss}, {loss}], [{loss}, {loss}]]]"  # optimizers, batches, splits
BATCH = "[[{loss}, {loss}], [{loss}, {loss}]]"
FIT = {
    "training_step": ["train0a, 0, optimizer_idx=0, hiddens=None", "train1b, 1, optimizer_idx=1, hiddens='h'"],
    "training_step_end": ["{loss, hiddens}"],
    "training_epoch_end": [EPOCH],
    "validation_step": ["other0, 0, dataloader_idx=0", "other1, 0, dataloader_idx=1"],
    "validation_step_end": ["'v0'", "'v1'"],
    "validation_epoch_end": ["[['v0'], ['v1']]"],
    **{name: [""] for name in ("configure_optimizers", "configure_callbacks", "configure_model", "prepare_data",
                               "train_dataloader", "val_dataloader")},
    "setup": ["'fit'"], "teardown": ["'fit'"],
    "on_before_batch_transfer": ["train0, dataloader_idx=0", "other1, dataloader_idx=1"],
    "transfer_batch_to_device": ["train0, cpu, dataloader_idx=0", "other1, cpu, dataloader_idx=1"],
    "on_after_batch_transfer": ["train0, dataloader_idx=0", "other1, dataloader_idx=1"],
    "tbptt_split_batch": ["train0, 2", "train1, 2"],
    "backward": ["loss, o0, 0", "loss, o1, 1"],
    "optimizer_step": [
        f"epoch=0, batch_idx={i}, optimizer=o{i}, optimizer_idx={i}, optimizer_closure=closure, on_tpu=False, "
        "using_native_amp=False, using_lbfgs=False" for i in (0, 1)
    ],
    "optimizer_zero_grad": ["0, 0, o0, optimizer_idx=0", "0, 1, o1, optimizer_idx=1"],
    "lr_scheduler_step": ["schedule, metric=None, optimizer_idx=1"],
    "configure_gradient_clipping": [
        f"optimizer=o{i}, optimizer_idx={i}, gradient_clip_val=0.5, gradient_clip_algorithm='norm'" for i in (0, 1)
    ],
    **{f"on_validation_model_{mode}": [""] for mode in ("eval", "train")},
}  # fmt: skip
SHARED_FIT = {
    **{name: [""] for name in (
        "on_fit_start", "on_fit_end", "on_pretrain_routine_start", "on_pretrain_routine_end", "on_train_start",
        "on_train_end", "on_epoch_start", "on_epoch_end", "on_train_epoch_start", "on_after_backward",
        "on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end")},
    "on_train_epoch_end": [f"outputs={EPOCH}"],
    "on_train_batch_start": ["train0, 0, dataloader_idx=0", "train1, 1, dataloader_idx=0"],
    "on_train_batch_end": [f"{BATCH}, train0, 0, dataloader_idx=0", f"{BATCH}, train1, 1, dataloader_idx=0"],
    "on_before_backward": ["loss"],
    "on_before_optimizer_step": ["o0, optimizer_idx=0", "o1, optimizer_idx=1"],
    "on_before_zero_grad": ["o0", "o1"],
    "on_validation_batch_start": ["other0, 0, dataloader_idx=0", "other1, 0, dataloader_idx=1"],
    "on_validation_batch_end": ["'v0', other0, 0, dataloader_idx=0", "'v1', other1, 0, dataloader_idx=1"],
    "on_save_checkpoint": ["checkpoint"],
}  # fmt: skip
CALLBACK_FIT = {"on_sanity_check_start": [""], "on_sanity_check_end": [""], "on_train_epoch_settled": [""]}


def evaluation(stage: str, letter: str) -> dict[str, list[str]]:
    """The hooks of a Module and a Callback in ``test`` or ``predict``."""
    return {
        **{f"on_{stage}_{name}": [""] for name in ("start", "end", "epoch_start", "epoch_end")},
        f"on_{stage}_batch_start": ["other0, 0, dataloader_idx=0", "other1, 0, dataloader_idx=1"],
        f"on_{stage}_batch_end": [f"'{letter}0', other0, 0, dataloader_idx=0",
                                  f"'{letter}1', other1, 0, dataloader_idx=1"],
        "setup": [f"'{stage}'"], "teardown": [f"'{stage}'"],
    }  # fmt: skip


TEST = {
    "test_step": ["other0, 0, dataloader_idx=0", "other1, 0, dataloader_idx=1"],
    "test_step_end": ["'t0'", "'t1'"], "test_epoch_end": ["[['t0'], ['t1']]"], "test_dataloader": [""],
    "on_test_model_eval": [""], "on_test_model_train": [""],
}  # fmt: skip
PREDICT = {
    "predict_step": ["other0, 0, dataloader_idx=0", "other1, 0, dataloader_idx=1"], "predict_dataloader": [""],
    "on_predict_model_eval": [""], "on_predict_model_train": [""],
}  # fmt: skip
AGAIN = {"on_load_checkpoint": ["checkpoint"]}
SETUP = {"setup": ["'fit'"], "teardown": ["'fit'"]}
MODULE = {
    "fit": {**FIT, **SHARED_FIT}, "test": {**TEST, **evaluation("test", "t")},
    "predict": {**PREDICT, **evaluation("predict", "p")}, "again": AGAIN,
}  # fmt: skip
CALLBACK = {
    "fit": {**SHARED_FIT, **CALLBACK_FIT, **SETUP}, "test": evaluation("test", "t"),
    "predict": evaluation("predict", "p"), "again": AGAIN,
}  # fmt: skip


class Full(raylit.Module):
    """Does what the hooks' defaults do not."""

    truncated_bptt_steps = 2

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, hiddens: Any) -> Any:
        return {"loss": self.parts[optimizer_idx](batch).mean(), "hiddens": "h"}

    def training_step_end(self, step_output: Any) -> Any:
        return step_output

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return f"v{dataloader_idx}"

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return f"t{dataloader_idx}"

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return f"p{dataloader_idx}"

    validation_step_end = test_step_end = training_step_end

    def configure_optimizers(self) -> Any:
        self.made = [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts]
        self.schedule = torch.optim.lr_scheduler.StepLR(self.made[1], 10)
        return self.made, [{"scheduler": self.schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return [batch.clone() for batch in TRAIN]

    def val_dataloader(self) -> Any:
        return [iter_of(batch) for batch in OTHER]

    test_dataloader = predict_dataloader = val_dataloader


class iter_of:
    """An iterable of one batch."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        yield self.batch.clone()


def shown(value: Any, module: Any) -> str:
    """A value as the lines above write it."""
    names = {f"train{i}": batch for i, batch in enumerate(TRAIN)} | {f"other{i}": b for i, b in enumerate(OTHER)}
    for i, batch in enumerate(TRAIN):
        names[f"train{i}a"], names[f"train{i}b"] = batch[:, :2], batch[:, 2:]
    if isinstance(value, Tensor):
        return next((name for name, batch in names.items() if torch.equal(batch, value)), "loss")
    if isinstance(value, dict):
        return "checkpoint" if "state_dict" in value else "{" + ", ".join(value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(shown(item, module) for item in value) + "]"
    for i, optimizer in enumerate(getattr(module, "made", ())):
        if value is optimizer:
            return f"o{i}"
    if value is getattr(module, "schedule", None):
        return "None" if value is None else "schedule"
    if isinstance(value, torch.device):
        return value.type
    return "closure" if callable(value) else repr(value)


Note = Callable[[str, tuple[Any, ...], dict[str, Any]], None]


def override(base: type, spec: HookSpec, style: str, note: Note, skip: int) -> Any:
    """An override of ``spec`` in a style, that notes what it got and does what ``base`` does.

    ``names``: plain arguments under names of its own, the others under theirs. ``star``: ``*args, **kwargs``.
    ``skip``: arguments at the front that are not noted.
    """
    name = spec.name
    if style == "star":

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(name, args[skip:], kwargs)
            return getattr(base, name)(self, *args, **kwargs)

        return hook
    plain = list(spec.plain) if spec.by_name else [f"own{i}" for i in range(len(spec.plain))]
    by_name = spec.plain if spec.by_name else ()
    scope: dict[str, Any] = {"note": note, "base": base}
    given = [] if spec.by_name else plain
    named = [*by_name, *spec.named]
    exec(
        f"def hook({', '.join(['self', *plain, *spec.named])}):\n"
        f"    note({name!r}, ({''.join(f'{each}, ' for each in given[skip:])}), "
        f"{{{', '.join(f'{each!r}: {each}' for each in named)}}})\n"
        f"    return base.{name}({', '.join(['self', *given, *(f'{each}={each}' for each in named)])})",
        scope,
    )
    return scope["hook"]


@cache
def record(style: str, who: str) -> dict[str, dict[str, list[str]]]:
    """Run everything once; return the lines of the calls of each hook, by stage."""
    import tempfile

    calls: dict[str, list[str]] = {}
    module: Any = None

    def note(name: str, plain: tuple[Any, ...], named: dict[str, Any]) -> None:
        words = [shown(value, module) for value in plain]
        words += [f"{key}={shown(named[key], module)}" for key in named]
        calls.setdefault(name, []).append(", ".join(words))

    def own(base: type, hooks: dict[str, HookSpec], skip: int) -> Any:
        return type("Own", (base,), {n: override(base, spec, style, note, skip) for n, spec in hooks.items()})

    made = (own(Full, MODULE_HOOKS, 0), raylit.Callback) if who == "module" else \
        (Full, own(raylit.Callback, CALLBACK_HOOKS, 2))  # fmt: skip
    module, callback = made[0](), made[1]()
    found: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"callbacks": callback, "gradient_clip_val": 0.5, "num_sanity_val_steps": int(who == "callback")}
        trainer = quiet(Path(folder), enable_checkpointing=True, **options)
        result = trainer.fit(module)
        found["fit"], calls = calls, {}
        trainer.test(module)
        found["test"], calls = calls, {}
        trainer.predict(module)
        found["predict"], calls = calls, {}
        quiet(Path(folder), **options).fit(module, ckpt_path=result.checkpoint.path)
        found["again"] = calls
    return found


def cases(expected: dict[str, dict[str, list[str]]]) -> list[tuple[str, str]]:
    return [(stage, hook) for stage, hooks in expected.items() for hook in hooks]


def compare(lines: list[str], expected: list[str]) -> None:
    assert lines[0] == expected[0] and lines[-1] == expected[-1]


@pytest.mark.parametrize("style", ["names", "star"])
@pytest.mark.parametrize(("stage", "hook"), cases(MODULE))
def test_a_modules_hook(stage: str, hook: str, style: str) -> None:
    compare(record(style, "module")[stage][hook], MODULE[stage][hook])


@pytest.mark.parametrize("style", ["names", "star"])
@pytest.mark.parametrize(("stage", "hook"), cases(CALLBACK))
def test_a_callbacks_hook(stage: str, hook: str, style: str) -> None:
    compare(record(style, "callback")[stage][hook], CALLBACK[stage][hook])


def test_no_hook_is_forgotten_here() -> None:
    # The progress bar is off here (tests/unit/engine); on_exception follows below.
    assert {hook for hooks in MODULE.values() for hook in hooks} == set(MODULE_HOOKS) - {"get_progress_bar_dict"}
    assert {hook for hooks in CALLBACK.values() for hook in hooks} == set(CALLBACK_HOOKS) - {"on_exception"}


def test_trainer_and_module_come_first_in_a_callback(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def noting(name: str) -> Any:
        return lambda self, *args: seen.append((name, *args))

    hooks = {name: noting(name) for name in CALLBACK_HOOKS}

    class Net(Numbers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                raise ValueError("here")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        test_step = predict_step = validation_step

    net, watch = Net(), type("Watch", (raylit.Callback,), hooks)()
    trainer = quiet(tmp_path, callbacks=watch, max_epochs=2, num_sanity_val_steps=1)
    with pytest.raises(ValueError, match="here") as caught:
        trainer.fit(net, numbers(1), numbers(1))
    assert seen[-1] == ("on_exception", trainer, net, caught.value)
    trainer.test(net, numbers(1))
    trainer.predict(net, numbers(1))
    assert all(call[1] is trainer and call[2] is net for call in seen)
    left = {"on_train_end", "on_fit_end", "on_save_checkpoint", "on_load_checkpoint"}  # not reached
    assert {call[0] for call in seen} == set(CALLBACK_HOOKS) - left


def test_overrides_that_want_nothing_get_nothing(tmp_path: Path) -> None:
    """Every hook that only watches, declared without arguments, in a Module and in a Callback."""
    called: set[str] = set()

    def watching(name: str) -> Any:
        return lambda self: called.add(name)

    names = [name for name in MODULE_HOOKS if name.startswith("on_") and "transfer" not in name and "model" not in name]
    body = {name: watching(f"module {name}") for name in [*names, "setup", "teardown", "training_epoch_end"]}
    short = type("Short", (Full,), body)
    watch = type("Watch", (raylit.Callback,), {name: watching(f"callback {name}") for name in CALLBACK_HOOKS})
    options = {"callbacks": watch(), "num_sanity_val_steps": 1}
    module = short()
    result = quiet(tmp_path, enable_checkpointing=True, **options).fit(module)
    trainer = quiet(tmp_path, **options)
    trainer.fit(module, ckpt_path=result.checkpoint.path)
    trainer.test(module)
    trainer.predict(module)
    expected = {f"module {name}" for name in body} | {f"callback {name}" for name in CALLBACK_HOOKS}
    assert called == expected - {"callback on_exception"}


@pytest.mark.parametrize("hook", sorted(MODULE_HOOKS))
def test_an_unknown_name_is_refused_before_anything_runs(tmp_path: Path, hook: str) -> None:
    spec = MODULE_HOOKS[hook]
    arguments = ", ".join(["self", *spec.plain, "unheard_of"])
    scope: dict[str, Any] = {}
    exec(f"def own({arguments}): raise AssertionError('it ran')", scope)
    net = type("Net", (Full,), {hook: scope["own"]})()
    accepted = ", ".join(spec.arguments) or "no arguments"
    if hook == "configure_callbacks":  # the first that is called
        with pytest.raises(TypeError, match="unheard_of"):
            quiet(tmp_path).fit(net)
        return
    with pytest.raises(HookError) as caught:
        quiet(tmp_path).fit(net)
    assert str(caught.value) == (
        f"Net.{hook} asks for 'unheard_of', which this hook is never given. It may take: {accepted}."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hook", sorted(CALLBACK_HOOKS))
def test_an_unknown_name_in_a_callback(tmp_path: Path, hook: str) -> None:
    spec = CALLBACK_HOOKS[hook]
    scope: dict[str, Any] = {}
    exec(f"def own({', '.join(['self', *spec.plain, 'unheard_of'])}): raise AssertionError('it ran')", scope)
    watch = type("Watch", (raylit.Callback,), {hook: scope["own"]})()
    with pytest.raises(HookError, match=f"Watch.{hook} asks for 'unheard_of'.*It may take: trainer, module"):
        quiet(tmp_path, callbacks=watch).fit(Numbers(), numbers(1))
