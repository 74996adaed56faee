"""Every argument of the Trainer: defaults, plain forms, refusals, and what contradicts what."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylit.config.fit import FitConfig, as_fast_dev_run
from raylit.config.placement import PlacementConfig
from raylit.config.trainer import TRAINER_ARGUMENTS, TrainerConfig, parse_trainer_args
from raylit.errors import ConfigError, UnknownArgumentError


def test_defaults_are_the_contracts() -> None:
    config = parse_trainer_args()
    assert config == TrainerConfig()
    fit, placement = config.fit, config.placement
    assert fit.max_epochs_defaulted
    assert (fit.epoch_limit, fit.step_limit, fit.max_time_s) == (1000, None, None)
    assert (fit.num_sanity_val_steps, fit.log_every_n_steps, fit.precision) == (2, 50, "32-true")
    assert (fit.strategy, fit.logger, fit.use_distributed_sampler, fit.inference_mode) == ("auto", True, True, True)
    assert (placement.num_workers, placement.use_gpu, placement.max_failures) == (1, "auto", None)
    assert config.notes == ("Neither max_epochs nor max_steps is given: training ends after 1000 epochs.",)


CONTRACT = """
max_epochs min_epochs max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches
limit_predict_batches overfit_batches fast_dev_run val_check_interval check_val_every_n_epoch num_sanity_val_steps
accumulate_grad_batches gradient_clip_val gradient_clip_algorithm precision truncated_bptt_steps callbacks logger
log_every_n_steps enable_progress_bar enable_model_summary enable_checkpointing deterministic benchmark detect_anomaly
profiler sync_batchnorm use_distributed_sampler reload_dataloaders_every_n_epochs inference_mode seed strategy
num_workers use_gpu resources_per_worker placement_strategy scaling_config run_config failure_config name storage_path
max_failures runtime_env automatic_optimization prepare_data_per_node
progress_timeout resume elastic_batch start_timeout""".split()  # the last two lines: raylit's own


def test_the_arguments_are_the_contracts() -> None:
    assert sorted(TRAINER_ARGUMENTS) == sorted(CONTRACT)


@pytest.mark.parametrize(
    ("given", "limit", "defaulted"),
    [
        ({"max_epochs": 3}, 3, False),
        ({"max_epochs": -1}, None, False),
        ({"max_epochs": 0}, 0, False),
        ({"max_steps": 10}, None, False),
        ({"max_steps": 10, "max_epochs": 3}, 3, False),
        ({"max_time": {"hours": 1}}, None, False),
        ({"max_steps": -1}, 1000, True),
        ({"max_steps": None}, 1000, True),
    ],
)
def test_epoch_limit(given: dict[str, Any], limit: int | None, defaulted: bool) -> None:
    fit = parse_trainer_args(**given).fit
    assert (fit.epoch_limit, fit.max_epochs_defaulted) == (limit, defaulted)


PLAIN: list[tuple[str, Any, Any]] = [
    ("max_epochs", np.int64(3), 3),
    ("max_time", "00:01:00:00", timedelta(hours=1)),
    ("limit_val_batches", None, 1.0),
    ("fast_dev_run", False, 0),
    ("val_check_interval", 5, 5),
    ("accumulate_grad_batches", None, 1),
    ("accumulate_grad_batches", {4: 2, 0: 1}, {0: 1, 4: 2}),
    ("gradient_clip_val", 0, None),
    ("gradient_clip_val", 1, 1.0),
    ("gradient_clip_algorithm", None, "norm"),
    ("gradient_clip_algorithm", "value", "value"),
    ("precision", 16, "16-mixed"),
    ("truncated_bptt_steps", 0, None),
    ("callbacks", None, ()),
    ("logger", False, ()),
    ("logger", None, True),
    ("enable_progress_bar", None, True),
    ("deterministic", None, False),
    ("deterministic", "warn", "warn"),
    ("profiler", True, "simple"),
    ("profiler", False, None),
    ("profiler", "advanced", "advanced"),
    ("strategy", None, "auto"),
    ("num_workers", [1, 4], (1, 4)),
    ("num_workers", (2, 2), 2),
    ("num_workers", np.int32(2), 2),
    ("resources_per_worker", {"CPU": 2, "TPU_host": 0.5}, {"CPU": 2, "TPU_host": 0.5}),
    ("storage_path", Path("/tmp/runs"), "/tmp/runs"),
    ("max_failures", -1, -1),
]


@pytest.mark.parametrize(("name", "given", "plain"), PLAIN, ids=[f"{name}={given}" for name, given, _ in PLAIN])
def test_plain_forms(name: str, given: Any, plain: Any) -> None:
    config = parse_trainer_args(**{name: given})
    owner: Any = config.fit if name in {f.name for f in dataclasses.fields(FitConfig)} else config.placement
    value = getattr(owner, name)
    assert value == plain
    assert type(value) is type(plain)
    # A plain form is its own plain form, so that dataclasses.replace may be used.
    assert dataclasses.replace(owner) == owner


def test_one_object_or_a_list_of_them() -> None:
    first, second = object(), object()
    assert parse_trainer_args(callbacks=first).fit.callbacks == (first,)
    assert parse_trainer_args(callbacks=[first, second]).fit.callbacks == (first, second)
    assert parse_trainer_args(logger=first).fit.logger == (first,)
    assert parse_trainer_args(strategy=first).fit.strategy is first


class SomeCallback: ...


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_epochs": -2}, "max_epochs=-2): expected a whole number of at least -1"),
    ({"max_epochs": "3"}, "max_epochs='3'"),
    ({"max_epochs": 1.0}, "max_epochs=1.0"),
    ({"max_epochs": True}, "max_epochs=True"),
    ({"max_steps": -2}, "max_steps=-2"),
    ({"min_epochs": -1}, "min_epochs=-1"),
    ({"min_epochs": 5, "max_epochs": 3}, "min_epochs=5, max_epochs=3): the least is above the most"),
    ({"min_steps": 5, "max_steps": 3}, "min_steps=5, max_steps=3): the least is above the most"),
    ({"max_time": 30}, "no unit"),
    ({"limit_train_batches": 1.5}, "limit_train_batches=1.5"),
    ({"overfit_batches": -1}, "overfit_batches=-1"),
    ({"overfit_batches": 2, "limit_train_batches": 3}, "both say how much of the training data"),
    ({"fast_dev_run": -1}, "fast_dev_run=-1"),
    ({"fast_dev_run": 0.5}, "fast_dev_run=0.5"),
    ({"val_check_interval": 0}, "limit_val_batches=0 turns validation off"),
    ({"val_check_interval": 0.0}, "limit_val_batches=0 turns validation off"),
    ({"val_check_interval": 1.5}, "val_check_interval=1.5"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
    ({"check_val_every_n_epoch": None}, "give val_check_interval as a whole number"),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
    ({"gradient_clip_val": -1.0}, "gradient_clip_val=-1.0"),
    ({"gradient_clip_val": "1e-3"}, "this is text; YAML reads 0.001 as a number"),
    ({"gradient_clip_val": float("nan")}, "gradient_clip_val=nan"),
    ({"gradient_clip_algorithm": "norms"}, "expected one of 'norm', 'value'. Did you mean 'norm'?"),
    ({"precision": "bf17-mixed"}, "Did you mean 'bf16-mixed'?"),
    ({"precision": 16, "use_gpu": False}, "Use precision='bf16-mixed'"),
    ({"truncated_bptt_steps": -1}, "truncated_bptt_steps=-1"),
    ({"callbacks": [SomeCallback]}, "SomeCallback is a class"),
    ({"callbacks": "EarlyStopping"}, "callbacks='EarlyStopping'"),
    ({"callbacks": [None]}, "callbacks=[None]"),
    ({"logger": "tensorboard"}, "logger='tensorboard'"),
    ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
    ({"enable_progress_bar": 1}, "enable_progress_bar=1): expected True or False"),
    ({"deterministic": "yes"}, "expected True, False or 'warn'"),
    ({"profiler": "simpel"}, "Did you mean 'simple'?"),
    ({"reload_dataloaders_every_n_epochs": True}, "reload_dataloaders_every_n_epochs=True"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**32}, "numpy's largest seed"),
    ({"strategy": "dpp"}, "Did you mean 'dp'?"),
    ({"strategy": "ddp_spawn"}, "use 'ddp': Ray starts the workers"),
    ({"strategy": "ddp_find_unused_parameters_true"}, "find_unused_parameters=True"),
    ({"strategy": "deepspeed_stage_3_offload"}, "use 'fsdp'"),
    ({"strategy": 3}, "strategy=3"),
    ({"strategy": SomeCallback}, "SomeCallback is a class"),
    ({"strategy": "dp", "num_workers": 2}, "Use 'ddp2'"),
    ({"strategy": "dp", "num_workers": (1, 2)}, "Use 'ddp2'"),
    ({"num_workers": -1}, "num_workers=-1"),
    ({"num_workers": 1.0}, "num_workers=1.0"),
    ({"num_workers": None}, "num_workers=None"),
    ({"num_workers": (0, 2)}, "num_workers=0"),
    ({"num_workers": (3, 1)}, "min is above max; write (1, 3)"),
    ({"num_workers": (1, 2, 3)}, "(min, max)"),
    ({"use_gpu": "yes"}, "expected True, False or 'auto'"),
    ({"use_gpu": 2}, "expected True, False or 'auto'"),
    ({"resources_per_worker": {"CPU": 0}}, "resources_per_worker['CPU']=0"),
    ({"resources_per_worker": {"gpu": 1}}, "Ray writes 'gpu' as 'GPU'"),
    ({"resources_per_worker": 2}, "expected a dict"),
    ({"resources_per_worker": {2: 1}}, "names of resources"),
    ({"resources_per_worker": {"GPU": 1}, "use_gpu": False}, "contradicts resources_per_worker={'GPU': 1}"),
    ({"placement_strategy": "pack"}, "expected one of 'PACK', 'SPREAD'"),
    ({"name": ""}, "name=''"),
    ({"name": "a/b"}, "without path separators"),
    ({"name": ".."}, "without path separators"),
    ({"storage_path": ""}, "storage_path=''"),
    ({"storage_path": 3}, "storage_path=3"),
    ({"max_failures": -2}, "max_failures=-2"),
    ({"runtime_env": ["numpy"]}, "expected a dict"),
    ({"scaling_config": {"num_workers": 2}}, "expected a ray.train.ScalingConfig"),
    ({"run_config": "x"}, "expected a ray.train.RunConfig"),
    ({"failure_config": 3}, "expected a ray.train.FailureConfig"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_trainer_args(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument() -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'max_epochs'"):
        parse_trainer_args(max_epoch=3)
    with pytest.raises(TypeError, match="use_gpu=True"):
        parse_trainer_args(gpus=1)


value = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.one_of(st.integers(), st.text()), max_size=2),
)  # fmt: skip


@given(st.sampled_from(TRAINER_ARGUMENTS), value)
def test_any_value_is_taken_or_refused_by_name(name: str, given: object) -> None:
    try:
        config = parse_trainer_args(**{name: given})
    except ConfigError as error:
        named = name in str(error)
        config = None
    if config is None:
        assert named
        return
    assert dataclasses.replace(config.fit) == config.fit
    assert dataclasses.replace(config.placement) == config.placement


@pytest.mark.parametrize(("given", "n"), [(True, 1), (1, 1), (7, 7)])
def test_fast_dev_run(given: Any, n: int) -> None:
    logger = object()  # kept: the driver puts one that keeps nothing in its place
    fit = parse_trainer_args(
        fast_dev_run=given, max_epochs=30, min_steps=100, overfit_batches=0.5, logger=logger, val_check_interval=3
    ).fit
    assert (fit.fast_dev_run, fit.max_steps, fit.max_epochs, fit.min_steps) == (n, n, 1, None)
    assert (fit.train_batch_limit, fit.val_batch_limit, fit.limit_test_batches, fit.limit_predict_batches) == (n,) * 4
    assert (fit.enable_checkpointing, fit.num_sanity_val_steps, fit.val_check_interval) == (False, 0, 1)
    assert fit.logger == (logger,)
    assert as_fast_dev_run(fit) == fit


def test_without_fast_dev_run_nothing_changes() -> None:
    fit = FitConfig(max_epochs=3)
    assert as_fast_dev_run(fit) is fit


@pytest.mark.parametrize(
    ("given", "train", "val"),
    [
        ({}, 1.0, 1.0),
        ({"overfit_batches": 3}, 3, 3),
        ({"overfit_batches": 0.5}, 0.5, 0.5),
        ({"overfit_batches": 3, "limit_val_batches": 0}, 3, 0),
        ({"limit_train_batches": 2}, 2, 1.0),
    ],
)
def test_overfit_batches(given: dict[str, Any], train: float, val: float) -> None:
    fit = FitConfig(**given)
    assert (fit.train_batch_limit, fit.val_batch_limit) == (train, val)


def test_in_process() -> None:
    config = parse_trainer_args(num_workers=0, max_epochs=1, name="run", max_failures=2, placement_strategy="SPREAD")
    assert config.placement.in_process
    assert config.placement.worker_range == (0, 0)
    assert config.placement.unused_in_process == ("placement_strategy", "max_failures")
    assert config.notes == (
        "num_workers=0 runs in this process, without Ray: placement_strategy, max_failures have no effect.",
    )
    assert parse_trainer_args(num_workers=2, max_failures=2).placement.unused_in_process == ()


def test_asking_for_a_gpu_is_using_it() -> None:
    assert parse_trainer_args(resources_per_worker={"GPU": 0.5}).placement.use_gpu is True


def test_parsing_does_not_import_ray() -> None:
    code = (
        "import sys; from raylit.config.trainer import parse_trainer_args; parse_trainer_args(max_epochs=1)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_placement_alone() -> None:
    assert PlacementConfig(num_workers=(1, 4)).worker_range == (1, 4)
