"""How Ray Train makes the workers' process group. Runs on the driver; imports Ray inside functions only.

Ray makes it before the worker's function runs, so what the workers need before that is Ray's ``Backend`` to see to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylit.worker.interface import name_interface_under_train

if TYPE_CHECKING:
    import ray.train.torch


def torch_config() -> ray.train.torch.TorchConfig:
    """Ray's own, but each group of workers, of a run's first start and of every later one, is told where to listen."""
    from ray.train.torch import TorchConfig

    # The class that Ray means us to get it by; whatever else it does, in this release or the next, stays as it is.
    rays_backend: Any = TorchConfig().backend_cls

    class Backend(rays_backend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if len(worker_group) > 1:
                worker_group.execute(name_interface_under_train)  # one message to all at a time, some ms
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config()
