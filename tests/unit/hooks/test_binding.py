"""The calling convention of hooks (contract, section 2)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit import Callback, Module
from raylit.errors import HookError
from raylit.hooks import CALLBACK_HOOKS, MODULE_HOOKS, HookSpec, HookTable, adapt

STEP = MODULE_HOOKS["training_step"]  # batch, batch_idx, optimizer_idx (named), hiddens (named)
GIVEN = ("B", 7, 1, "H")


def got(source: str, spec: HookSpec = STEP, args: tuple[Any, ...] = GIVEN) -> dict[str, Any]:
    """Call ``def f(<source>)`` through adapt and return what each of its parameters received."""
    scope: dict[str, Any] = {}
    exec(f"def f({source}): return dict(locals())", scope)
    return adapt(spec, scope["f"], "Net")(*args)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", {}),
        ("batch", {"batch": "B"}),
        ("b, i", {"b": "B", "i": 7}),  # plain ones by position, whatever their names
        ("batch_idx, batch", {"batch_idx": "B", "batch": 7}),
        ("batch, batch_idx=0", {"batch": "B", "batch_idx": 7}),
        ("batch, batch_idx, optimizer_idx", {"batch": "B", "batch_idx": 7, "optimizer_idx": 1}),
        ("batch, batch_idx, hiddens", {"batch": "B", "batch_idx": 7, "hiddens": "H"}),
        ("batch, batch_idx, hiddens, optimizer_idx",
         {"batch": "B", "batch_idx": 7, "optimizer_idx": 1, "hiddens": "H"}),
        ("batch, batch_idx, optimizer_idx=None", {"batch": "B", "batch_idx": 7, "optimizer_idx": 1}),
        ("batch, optimizer_idx, batch_idx", {"batch": "B", "optimizer_idx": 1, "batch_idx": 7}),
        ("optimizer_idx, *args", {"optimizer_idx": 1, "args": ("B", 7)}),
        ("batch, hiddens", {"batch": "B", "hiddens": "H"}),
        ("batch, batch_idx, optimizer_idx, /", {"batch": "B", "batch_idx": 7, "optimizer_idx": 1}),
        ("*args", {"args": ("B", 7)}),  # the named ones only to those that name them
        ("batch, *args", {"batch": "B", "args": (7,)}),
        ("batch, batch_idx, *args", {"batch": "B", "batch_idx": 7, "args": ()}),
        ("batch, **kwargs", {"batch": "B", "kwargs": {"optimizer_idx": 1, "hiddens": "H"}}),
        ("batch, batch_idx, optimizer_idx, **kwargs",
         {"batch": "B", "batch_idx": 7, "optimizer_idx": 1, "kwargs": {"hiddens": "H"}}),
        ("*args, **kwargs", {"args": ("B", 7), "kwargs": {"optimizer_idx": 1, "hiddens": "H"}}),
        ("*args, hiddens", {"args": ("B", 7), "hiddens": "H"}),
        ("batch, *, batch_idx", {"batch": "B", "batch_idx": 7}),
        ("*, hiddens, batch", {"hiddens": "H", "batch": "B"}),
        ("batch, batch_idx, verbose=True", {"batch": "B", "batch_idx": 7, "verbose": True}),
        ("batch, batch_idx, verbose=True, optimizer_idx=None",
         {"batch": "B", "batch_idx": 7, "verbose": True, "optimizer_idx": 1}),
        ("batch, batch_idx, *, verbose=True, hiddens=None",
         {"batch": "B", "batch_idx": 7, "verbose": True, "hiddens": "H"}),
    ],
)  # fmt: skip
def test_every_shape_of_signature(source, expected):
    assert got(source) == expected


def test_an_exact_override_is_called_itself():
    def validation_step(batch, batch_idx, dataloader_idx):
        raise AssertionError

    assert adapt(MODULE_HOOKS["validation_step"], validation_step, "Net") is validation_step


# What optimizer_step is given, in the order of the contract.
STEP_ARGS = (2, 5, "opt", 1, "closure", False, True, False)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Lightning 1.0
        ("epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu, using_native_amp, using_lbfgs",
         {"epoch": 2, "batch_idx": 5, "optimizer": "opt", "optimizer_idx": 1, "optimizer_closure": "closure",
          "on_tpu": False, "using_native_amp": True, "using_lbfgs": False}),
        # Lightning 2
        ("epoch, batch_idx, optimizer, optimizer_closure=None",
         {"epoch": 2, "batch_idx": 5, "optimizer": "opt", "optimizer_closure": "closure"}),
        # any subset, in any order
        ("optimizer_closure, optimizer", {"optimizer_closure": "closure", "optimizer": "opt"}),
        ("epoch, *args", {"epoch": 2, "args": ()}),
        ("*args, **kwargs", {"args": (), "kwargs": dict(zip(MODULE_HOOKS["optimizer_step"].plain, STEP_ARGS))}),
        ("*, using_native_amp", {"using_native_amp": True}),
        ("optimizer, /, epoch", {"optimizer": "opt", "epoch": 2}),
    ],
)  # fmt: skip
def test_optimizer_step_is_given_by_name(source, expected):
    assert got(source, MODULE_HOOKS["optimizer_step"], STEP_ARGS) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm",
         {"optimizer": "opt", "optimizer_idx": 1, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}),
        ("optimizer, gradient_clip_val, gradient_clip_algorithm",
         {"optimizer": "opt", "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}),
        ("gradient_clip_val", {"gradient_clip_val": 0.5}),
    ],
)  # fmt: skip
def test_gradient_clipping_is_given_by_name(source, expected):
    assert got(source, MODULE_HOOKS["configure_gradient_clipping"], ("opt", 1, 0.5, "norm")) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("scheduler, optimizer_idx, metric", {"scheduler": "S", "optimizer_idx": 1, "metric": 0.3}),  # Lightning 1.x
        ("scheduler, metric", {"scheduler": "S", "metric": 0.3}),  # Lightning 2
        ("scheduler", {"scheduler": "S"}),
    ],
)
def test_lr_scheduler_step_of_both_eras(source, expected):
    assert got(source, MODULE_HOOKS["lr_scheduler_step"], ("S", 0.3, 1)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("loss", {"loss": "L"}),  # Lightning 2
        ("loss, optimizer, optimizer_idx", {"loss": "L", "optimizer": "opt", "optimizer_idx": 0}),  # Lightning 1.0
        # The override's *args and **kwargs are those of the caller, as both eras pass them on to Tensor.backward.
        ("loss, *args, **kwargs", {"loss": "L", "args": (), "kwargs": {}}),
        ("loss, optimizer, optimizer_idx, *args, **kwargs",
         {"loss": "L", "optimizer": "opt", "optimizer_idx": 0, "args": (), "kwargs": {}}),
        ("*args, **kwargs", {"args": ("L", "opt", 0), "kwargs": {}}),  # hands everything to super()
    ],
)  # fmt: skip
def test_backward_of_both_eras(source, expected):
    assert got(source, MODULE_HOOKS["backward"], ("L", "opt", 0)) == expected


def _keeps_graph(seen):
    def backward(loss, *, retain_graph=False):
        seen.append(retain_graph)

    return backward


def test_backward_passes_the_callers_own_arguments_on():
    seen = []
    hook = adapt(MODULE_HOOKS["backward"], lambda loss, *args, **kwargs: seen.append((args, kwargs)), "Net")
    hook("L", "opt", 0, "gradient", retain_graph=True)
    named = adapt(MODULE_HOOKS["backward"], _keeps_graph(seen), "Net")
    named("L", "opt", 0, retain_graph=True)
    named("L", "opt", 0, create_graph=True)  # it does not have this one
    assert seen == [(("gradient",), {"retain_graph": True}), True, False]


@pytest.mark.parametrize(
    ("hook", "source", "asked", "accepted"),
    [
        (
            "training_step",
            "batch, batch_idx, dataloader_idx",
            "dataloader_idx",
            "batch, batch_idx, optimizer_idx, hiddens",
        ),
        (
            "training_step",
            "batch, batch_idx, *, optimiser_idx",
            "optimiser_idx",
            "batch, batch_idx, optimizer_idx, hiddens",
        ),
        ("on_train_epoch_end", "results", "results", "outputs"),
        ("on_fit_start", "trainer", "trainer", "no arguments"),
        ("setup", "stage, more", "more", "stage"),
        ("optimizer_step", "epoch, batch_idx, opt", "opt", ", ".join(MODULE_HOOKS["optimizer_step"].plain)),
        ("backward", "loss, optimizer, optimizer_idx, scale", "scale", "loss, optimizer, optimizer_idx"),
    ],
)
def test_refusal_names_hook_argument_and_what_is_accepted(hook, source, asked, accepted):
    with pytest.raises(HookError) as caught:
        got(source, MODULE_HOOKS[hook])
    text = str(caught.value)
    assert text.startswith(f"Net.{hook} asks for {asked!r}") and text.endswith(f"It may take: {accepted}.")
    assert ("Did you mean 'optimizer_idx'?" in text) == (asked == "optimiser_idx")


def test_callbacks_get_trainer_and_module_first():
    spec = CALLBACK_HOOKS["on_train_batch_end"]
    args = ("T", "M", "O", "B", 3, 0)
    assert got("trainer, pl_module", spec, args) == {"trainer": "T", "pl_module": "M"}
    assert got("t, m, outputs, batch, batch_idx, dataloader_idx", spec, args) == {
        "t": "T",
        "m": "M",
        "outputs": "O",
        "batch": "B",
        "batch_idx": 3,
        "dataloader_idx": 0,
    }
    assert got("*args", spec, args) == {"args": ("T", "M", "O", "B", 3)}
    with pytest.raises(
        HookError, match=r"Net.on_train_batch_end asks for 'unused'.*It may take: trainer, module, outputs"
    ):
        got("t, m, outputs, batch, batch_idx, unused", spec, args)


# -- property: adapt gives each parameter what its name or place stands for ------------------------------------------
@st.composite
def signatures(draw: Any) -> tuple[HookSpec, str]:
    spec = draw(st.sampled_from(sorted({**MODULE_HOOKS}.values(), key=lambda s: s.name)))
    plain = list(spec.plain[: draw(st.integers(0, len(spec.plain)))])
    named = draw(st.lists(st.sampled_from(spec.named), unique=True)) if spec.named else []
    if spec.by_name:
        plain = draw(st.permutations(plain))
    order = list(plain)
    for name in named:  # anywhere among the plain ones
        order.insert(draw(st.integers(0, len(order))), name)
    split = draw(st.integers(0, len(order)))  # from here on keyword-only
    star = draw(st.booleans())
    parts = order[:split]
    if star:
        parts.append("*args")
    elif split < len(order):
        parts.append("*")
    parts += order[split:]
    if draw(st.booleans()):
        parts.append("**kwargs")
    return spec, ", ".join(parts)


@given(signatures())
def test_adapt_gives_what_was_asked_for(drawn: tuple[HookSpec, str]):
    spec, source = drawn
    values = {name: f"<{name}>" for name in spec.arguments}
    received = got(source, spec, tuple(values.values()))
    args, kwargs = received.pop("args", ()), received.pop("kwargs", {})
    assert received == {name: values[name] for name in received}
    assert kwargs == {name: values[name] for name in kwargs}
    assert not set(kwargs) & set(received)
    if "**kwargs" in source and not spec.extra:
        wanted = spec.arguments if spec.by_name else spec.named
        assert set(wanted) <= set(kwargs) | set(received)
    if "*args" in source:
        before = [name for name in source.split("*args")[0].replace(" ", "").split(",") if name]
        positional = [name for name in before if name in spec.plain]
        rest = () if spec.by_name or (spec.extra and positional) else spec.plain[len(positional) :]
        assert args == tuple(values[name] for name in rest)


# -- super() ---------------------------------------------------------------------------------------------------------
def _own(cls: type, name: str) -> bool:
    return name in vars(cls) and name not in ("training_step", "validation_step", "test_step", "predict_step")


@pytest.mark.parametrize("name", [name for name in MODULE_HOOKS if _own(Module, name)])
def test_an_override_may_hand_everything_to_super(name):
    """``super().hook(*args, **kwargs)`` with all documented arguments, by position and as the engine gives them."""
    spec = MODULE_HOOKS[name]
    signature = inspect.signature(getattr(Module, name))
    signature.bind("self", *spec.arguments)
    if spec.by_name:
        signature.bind("self", **dict.fromkeys(spec.arguments))
    else:
        signature.bind("self", *spec.plain, **dict.fromkeys(spec.named))
        signature.bind("self", *spec.plain)


@pytest.mark.parametrize("name", sorted(CALLBACK_HOOKS))
def test_a_callback_may_hand_everything_to_super(name):
    spec = CALLBACK_HOOKS[name]
    signature = inspect.signature(getattr(Callback, name))
    signature.bind("self", *spec.arguments)
    signature.bind("self", *spec.plain, **dict.fromkeys(spec.named))
    signature.bind("self", *spec.plain)


# -- the table -------------------------------------------------------------------------------------------------------
def table(module: Module, *callbacks: Callback) -> HookTable:
    return HookTable(module, Module, callbacks, Callback, "T")


def test_a_hook_that_nobody_overrides_is_none():
    bound = table(Module(), Callback())
    assert all(bound.own(name) is None for name in MODULE_HOOKS)
    assert all(bound.event(name) is None for name in CALLBACK_HOOKS)
    assert not bound.wants_epoch_outputs


def test_callbacks_come_before_the_module_in_their_order():
    calls = []

    class First(Callback):
        def on_train_start(self, trainer, module):
            calls.append(("first", trainer, module))

    class Second(Callback):
        def on_train_start(self, trainer):
            calls.append(("second", trainer))

    class Net(Module):
        def on_train_start(self):
            calls.append(("module",))

    net = Net()
    table(net, First(), Callback(), Second()).event("on_train_start")()
    assert calls == [("first", "T", net), ("second", "T"), ("module",)]


@pytest.mark.parametrize("who", ["first", "second", "module"])
@pytest.mark.parametrize("answer", [-1, 0, None, False, True])
def test_any_minus_one_ends_the_epoch_and_every_hook_still_runs(who, answer):
    calls = []

    def hook(name):
        def on_train_batch_start(*args):
            calls.append(name)
            return answer if name == who else None

        return on_train_batch_start

    class Net(Module):
        on_train_batch_start = hook("module")

    first, second = Callback(), Callback()
    first.on_train_batch_start, second.on_train_batch_start = hook("first"), hook("second")
    result = table(Net(), first, second).event("on_train_batch_start")("B", 0, 0)
    assert calls == ["first", "second", "module"]
    assert (result == -1) == (answer == -1)


def test_an_override_may_stand_in_a_parent_a_mixin_or_on_the_instance():
    class Mixin:
        def on_train_end(self):
            return "mixin"

    class Base(Module):
        def training_step(self, batch):
            return "base"

    class Net(Mixin, Base):
        pass

    net = Net()
    net.on_epoch_end = lambda: "instance"
    bound = table(net)
    assert bound.own("training_step")(*GIVEN) == "base"
    assert bound.own("on_train_end")() == "mixin"
    assert bound.own("on_epoch_end")() == "instance"


def test_static_and_class_methods_are_overrides_too():
    class Net(Module):
        @staticmethod
        def training_step(batch, batch_idx, hiddens):
            return batch, batch_idx, hiddens

        @classmethod
        def setup(cls, stage):
            return cls, stage

    bound = table(Net())
    assert bound.own("training_step")(*GIVEN) == ("B", 7, "H")
    assert bound.own("setup")("fit") == (Net, "fit")


@pytest.mark.parametrize("signature", ["outputs", "**kwargs", "unused=None"])
def test_epoch_outputs_are_wanted_only_by_those_who_name_them(signature):
    scope: dict[str, Any] = {}
    exec(f"def on_train_epoch_end(self, {signature}): ...", scope)
    exec(f"def for_callback(self, trainer, module, {signature}): ...", scope)
    net = type("Net", (Module,), {"on_train_epoch_end": scope["on_train_epoch_end"]})()
    callback = type("Watch", (Callback,), {"on_train_epoch_end": scope["for_callback"]})()
    wanted = signature != "unused=None"
    assert table(net).wants_epoch_outputs is wanted
    assert table(Module(), callback).wants_epoch_outputs is wanted


def test_the_table_refuses_a_callbacks_hook_too():
    class Watch(Callback):
        def on_train_start(self, trainer, module, stage): ...

    with pytest.raises(HookError, match="Watch.on_train_start asks for 'stage'"):
        table(Module(), Watch())


def test_every_hook_of_the_contract_is_in_the_tables():
    """Written from section 3 of the contract."""
    module = """training_step training_step_end training_epoch_end validation_step test_step predict_step
        validation_step_end test_step_end validation_epoch_end test_epoch_end configure_optimizers configure_callbacks
        configure_model prepare_data setup teardown train_dataloader val_dataloader test_dataloader predict_dataloader
        transfer_batch_to_device on_before_batch_transfer on_after_batch_transfer tbptt_split_batch backward
        optimizer_step optimizer_zero_grad lr_scheduler_step configure_gradient_clipping
        get_progress_bar_dict""".split()
    shared = """on_fit_start on_fit_end on_pretrain_routine_start on_pretrain_routine_end on_train_start on_train_end
        on_epoch_start on_epoch_end on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end
        on_before_backward on_after_backward on_before_optimizer_step on_before_zero_grad on_save_checkpoint
        on_load_checkpoint""".split()
    for loop in ("validation", "test", "predict"):
        shared += [f"on_{loop}_{when}" for when in "start end epoch_start epoch_end batch_start batch_end".split()]
        module += [f"on_{loop}_model_eval", f"on_{loop}_model_train"]
    only = ["on_sanity_check_start", "on_sanity_check_end", "on_exception", "setup", "teardown"]
    only += ["on_train_epoch_settled"]  # raylit's own
    assert set(MODULE_HOOKS) == {*module, *shared}
    assert set(CALLBACK_HOOKS) == {*shared, *only}
    # named(dagger) arguments
    assert {n: s.named for n, s in MODULE_HOOKS.items() if s.named} == {
        "training_step": ("optimizer_idx", "hiddens"),
        **{f"{x}_step": ("dataloader_idx",) for x in ("validation", "test", "predict")},
        **{f"on_{x}_batch_{w}": ("dataloader_idx",) for x in ("train", "validation", "test", "predict")
           for w in ("start", "end")},
        "transfer_batch_to_device": ("dataloader_idx",), "on_before_batch_transfer": ("dataloader_idx",),
        "on_after_batch_transfer": ("dataloader_idx",),
        "on_train_epoch_end": ("outputs",), "on_before_optimizer_step": ("optimizer_idx",),
        "optimizer_zero_grad": ("optimizer_idx",), "lr_scheduler_step": ("metric", "optimizer_idx"),
    }  # fmt: skip
