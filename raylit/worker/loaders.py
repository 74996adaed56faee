"""Asks the person's objects for loaders and prepares them for this rank. Floor 4; a worker or the local process."""

from __future__ import annotations

from typing import Any, cast

from torch.utils.data import DataLoader, RandomSampler

from raylit.data.loader import prepare_all, prepare_train
from raylit.data.ray_data import RayDataLoader, Sharing
from raylit.data.rebuild import rebuilt
from raylit.datamodule import DataModule
from raylit.hooks import overridden
from raylit.module import Module
from raylit.ports import LoaderLike
from raylit.wire import ClusterCpus, World
from raylit.worker.ray_data import check_cpus, cpus_to_read

# How a stage's loader is called: the hook, and the argument of fit/validate/test/predict.
HOOK = {"train": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader",
        "predict": "predict_dataloader"}  # fmt: skip


def find_source(kind: str, given: Any, module: Module, datamodule: DataModule | None) -> tuple[Any, str]:
    """Return the loader of ``kind`` and where it came from: the argument, the DataModule's hook, or the Module's."""
    if given is not None:
        return given, {"train": "train_dataloaders", "validate": "val_dataloaders"}.get(kind, "dataloaders")
    hook = HOOK[kind]
    if datamodule is not None and overridden(datamodule, hook, DataModule):
        return getattr(datamodule, hook)(), f"{type(datamodule).__name__}.{hook}"
    if overridden(module, hook, Module):
        return getattr(module, hook)(), f"{type(module).__name__}.{hook}"
    return None, hook


class Loaders:
    """Implements ``engine.parts.LoaderSource``. ``given``: what was passed to fit, validate, test or predict.

    ``sharing``, ``cpus``: how the workers share a ``ray.data.Dataset``, and the CPUs that are there for its tasks,
    where that is known. ``validates_within``: a validation may come before the training data are read to their end.
    ``resized``: the number of workers may change in the middle of an epoch.
    """

    def __init__(self, given: dict[str, Any], module: Module, datamodule: DataModule | None, world: World, seed: int,
                 shard: bool, overfit: bool, sharing: Sharing | None = None, cpus: ClusterCpus | None = None,
                 validates_within: bool = False, resized: bool = False) -> None:  # fmt: skip
        self._cpus, self._beside, self._train_source = cpus, validates_within, None
        self._given, self._module, self._datamodule = given, module, datamodule
        self._place: dict[str, Any] = {
            "rank": world.global_rank, "world_size": world.world_size, "seed": seed, "shard": shard,
            "sharing": sharing,
        }  # fmt: skip
        self._overfit = overfit
        self._elastic: dict[str, Any] = {"shares": world.shares, "resized": resized}

    def train(self) -> LoaderLike:
        """The training loader of this rank."""
        source, name = find_source("train", self._given.get("train"), self._module, self._datamodule)
        if self._overfit:
            source = in_order(source)
        self._train_source = source
        check_cpus(cpus_to_read(source, None, beside=False), self._cpus)
        return cast(LoaderLike, prepare_train(source, name=name, **self._place, **self._elastic))

    def evaluation(self, stage: str) -> list[LoaderLike]:
        """The loaders of an evaluation; under ``overfit_batches`` validation sees the training batches."""
        source, name = find_source(stage, self._given.get(stage), self._module, self._datamodule)
        if stage == "validate" and self._overfit and source is not None:
            train, name = find_source("train", self._given.get("train"), self._module, self._datamodule)
            source = in_order(train)
        count = cpus_to_read(self._train_source, source, beside=self._beside, predicting=stage == "predict")
        check_cpus(count, self._cpus)
        return cast("list[LoaderLike]", prepare_all(source, stage=stage, name=name, **self._place))


def in_order(source: Any) -> Any:
    """Return a loader that walks the same data set without shuffling: ``overfit_batches`` wants the same batches."""
    if isinstance(source, RayDataLoader):
        return source.in_order()
    if not isinstance(source, DataLoader) or not isinstance(getattr(source, "sampler", None), RandomSampler):
        return source
    return rebuilt(
        source, "train_dataloader", dataset=source.dataset, batch_size=source.batch_size,
        drop_last=source.drop_last, shuffle=False,
    )  # fmt: skip
