"""Ray's own configuration objects beside the shorthands: what they say, and what contradicts."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest

from raylit.config.placement import PlacementConfig
from raylit.config.trainer import parse_trainer_args
from raylit.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray's import warns on its own account
    import ray.train
    import ray.tune


def placement(**given: Any) -> PlacementConfig:
    config = parse_trainer_args(**given).placement
    assert dataclasses.replace(config) == config
    return config


def test_the_shorthands_take_what_a_scaling_config_says() -> None:
    scaling = ray.train.ScalingConfig(
        num_workers=4, use_gpu=True, resources_per_worker={"GPU": 1, "CPU": 2}, placement_strategy="SPREAD"
    )
    config = placement(scaling_config=scaling)
    assert (config.num_workers, config.use_gpu, config.placement_strategy) == (4, True, "SPREAD")
    assert config.resources_per_worker == {"GPU": 1, "CPU": 2}
    assert config.scaling_config is scaling


def test_a_scaling_config_without_gpu_means_none() -> None:
    assert placement(scaling_config=ray.train.ScalingConfig(num_workers=2)).use_gpu is False


def test_an_elastic_scaling_config() -> None:
    assert placement(scaling_config=ray.train.ScalingConfig(num_workers=(1, 3))).worker_range == (1, 3)


def test_the_same_in_both_places_is_fine() -> None:
    assert placement(num_workers=2, scaling_config=ray.train.ScalingConfig(num_workers=2)).num_workers == 2


def test_a_run_config() -> None:
    run = ray.train.RunConfig(
        name="digits",
        storage_path="/tmp/here",
        failure_config=ray.train.FailureConfig(max_failures=3),
        worker_runtime_env={"env_vars": {"A": "1"}},
    )
    config = placement(run_config=run)
    assert (config.name, config.storage_path, config.max_failures) == ("digits", "/tmp/here", 3)
    assert config.runtime_env == {"env_vars": {"A": "1"}}
    assert config.failure_config is run.failure_config


def test_what_a_run_config_made_up_itself_is_no_wish() -> None:
    config = placement(run_config=ray.train.RunConfig(), name="mine", storage_path="s3://bucket/x", max_failures=2)
    assert (config.name, config.storage_path, config.max_failures) == ("mine", "s3://bucket/x", 2)
    assert placement(run_config=ray.train.RunConfig()).name is None


def test_a_failure_config() -> None:
    assert placement(failure_config=ray.train.FailureConfig(max_failures=-1)).max_failures == -1


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"num_workers": 2, "scaling_config": {"num_workers": 4}}, ("num_workers=2", "scaling_config.num_workers=4")),
        ({"num_workers": 0, "scaling_config": {"num_workers": 4}}, ("num_workers=0", "scaling_config.num_workers=4")),
        ({"use_gpu": True, "scaling_config": {}}, ("use_gpu=True", "scaling_config.use_gpu=False")),
        ({"use_gpu": False, "scaling_config": {"use_gpu": True}}, ("use_gpu=False", "scaling_config.use_gpu=True")),
        (
            {"resources_per_worker": {"CPU": 1}, "scaling_config": {"resources_per_worker": {"CPU": 2}}},
            ("{'CPU': 1}", "{'CPU': 2}"),
        ),
        (
            {"placement_strategy": "SPREAD", "scaling_config": {}},
            ("placement_strategy='SPREAD'", "scaling_config.placement_strategy='PACK'"),
        ),
        ({"name": "a", "run_config": {"name": "b"}}, ("name='a'", "run_config.name='b'")),
        ({"storage_path": "/a", "run_config": {"storage_path": "/b"}}, ("'/a'", "run_config.storage_path='/b'")),
        ({"max_failures": 1, "failure_config": {"max_failures": 2}}, ("max_failures=1", "max_failures=2")),
        (
            {"runtime_env": {"pip": []}, "run_config": {"worker_runtime_env": {"env_vars": {}}}},
            ("{'pip': []}", "run_config.worker_runtime_env={'env_vars': {}}"),
        ),
    ],
)
def test_contradictions_name_both_values(given: dict[str, Any], both: tuple[str, str]) -> None:
    kinds = {
        "scaling_config": ray.train.ScalingConfig,
        "run_config": ray.train.RunConfig,
        "failure_config": ray.train.FailureConfig,
    }
    made = {name: kinds[name](**value) if name in kinds else value for name, value in given.items()}
    with pytest.raises(ConfigError, match="contradicts") as caught:
        parse_trainer_args(**made)
    for part in both:
        assert part in str(caught.value)


def test_two_failure_configs() -> None:
    run = ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=2))
    with pytest.raises(ConfigError, match="failure_config"):
        parse_trainer_args(run_config=run, failure_config=ray.train.FailureConfig(max_failures=1))


def test_another_librarys_object_of_the_same_name() -> None:
    with pytest.raises(ConfigError, match=r"is a ray.tune.*RunConfig, expected a ray.train.RunConfig"):
        parse_trainer_args(run_config=ray.tune.RunConfig())
