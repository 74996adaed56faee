"""DataModule: loaders and their preparation, kept apart from the Module. Floor 1; a copy lives on every worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from raylit.errors import NotAttachedError
from raylit.hparams import HyperparametersMixin
from raylit.module import Module


class DataModule(HyperparametersMixin):
    """Override what you need; a loader method that is missing falls back to the Module's.

    ``prepare_data`` runs once in the whole run, on global rank 0, while all others wait
    (``prepare_data_per_node = True``: once on each node). ``setup`` and ``teardown`` run on every worker.
    """

    prepare_data_per_node: bool = False
    trainer: Any = None
    # Stands a floor above; put here by the package's root.
    _build_from_checkpoint: ClassVar[Callable[..., Any]]

    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def val_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def test_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    def predict_dataloader(self) -> Any:
        """Return a DataLoader, any iterable of batches, or a list of these."""

    # == how a batch travels; an override here goes before the Module's ===========================================
    def on_before_batch_transfer(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, dataloader_idx†): change the batch before it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, device, dataloader_idx†): move the batch to the device."""
        if self.trainer is None:
            name = type(self).__name__
            raise NotAttachedError(
                f"{name}.transfer_batch_to_device works in hooks, while a Trainer runs this DataModule"
            )
        return Module.transfer_batch_to_device(self.trainer.model, batch, device)

    def on_after_batch_transfer(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """(batch, dataloader_idx†): change the batch on the device."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this DataModule."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None,
                             hparams_file: str | Path | None = None, **kwargs: Any) -> Any:  # fmt: skip
        """Build the DataModule from the checkpoint of a fit with it: its hyperparameters, then its ``state_dict``.

        Arguments and errors as in ``Module.load_from_checkpoint``.
        """
        return cls._build_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The trainer belongs to one process.
        return {key: value for key, value in self.__dict__.items() if key != "trainer"}
