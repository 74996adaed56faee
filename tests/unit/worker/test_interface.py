"""Where gloo listens, and on which interface it is told to: with the interfaces of this machine, and names made up."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
import ray.util
from ray import cloudpickle

from raylit.driver.process_group import torch_config
from raylit.worker import interface

LOOKUP = socket.getaddrinfo
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let this host's own name stand for these addresses; for none: let it be unknown."""

    def look_up(host: str, port: int | None, **more: Any) -> list[Any]:
        assert host == socket.gethostname()
        if not addresses:
            raise socket.gaierror("Name or service not known")
        return [each for address in addresses for each in LOOKUP(address, port, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def rays_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)


def own_address() -> tuple[str, str]:
    """An interface of this machine that is not loopback, and its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the system says which address it would send from
        except OSError:
            pytest.skip("this machine has no network")
        address = str(probe.getsockname()[0])
    name = interface.interface_of(address)
    if name is None or name == LOOPBACK:
        pytest.skip("this machine has no network")
    return name, address


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.VARIABLE, "")  # torch takes that for none; what is set later goes with the test


NOT_HERE = "203.0.113.7"  # of a range that is for documents only


@pytest.mark.parametrize(
    "addresses", [("127.0.1.1",), ("127.0.0.1",), ("::1",), (), (NOT_HERE,), (NOT_HERE, "127.0.0.1")]
)
def test_gloo_is_deaf_where_the_own_name_leads_no_other_host_here(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolves_to(monkeypatch, *addresses)
    assert interface.gloo_is_deaf()


def test_gloo_is_not_deaf_at_an_address_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _, address = own_address()
    resolves_to(monkeypatch, NOT_HERE, address, "127.0.1.1")
    assert not interface.gloo_is_deaf()
    resolves_to(monkeypatch, "127.0.0.1", address)  # it takes the first one
    assert interface.gloo_is_deaf()


def test_an_interface_is_found_by_its_address() -> None:
    assert interface.interface_of("127.0.0.1") == LOOPBACK
    if sys.platform == "linux" and os.path.exists("/proc/net/if_inet6"):
        assert interface.interface_of("::1") in (LOOPBACK, None)  # none where IPv6 is switched off
    for unknown in (NOT_HERE, "2001:db8::7", "some-host", ""):
        assert interface.interface_of(unknown) is None


def test_it_is_told_the_interface_of_rays_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name, address = own_address()
    rays_address(monkeypatch, address)
    resolves_to(monkeypatch, "127.0.0.1")
    interface.name_interface(apart=False)
    assert os.environ[interface.VARIABLE] == ""
    interface.name_interface(apart=True)
    assert os.environ[interface.VARIABLE] == name


def test_what_is_well_or_was_said_by_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    _, address = own_address()
    rays_address(monkeypatch, address)
    resolves_to(monkeypatch, address)
    interface.name_interface(apart=True)
    assert os.environ[interface.VARIABLE] == ""
    resolves_to(monkeypatch, "127.0.0.1")
    for ours in ("127.0.0.1", "127.0.0.2", "::1", NOT_HERE):  # a cluster on loopback; an address of nobody's here
        rays_address(monkeypatch, ours)
        interface.name_interface(apart=True)
        assert os.environ[interface.VARIABLE] == ""
    rays_address(monkeypatch, address)
    monkeypatch.setenv(interface.VARIABLE, "ib0")
    interface.name_interface(apart=True)
    assert os.environ[interface.VARIABLE] == "ib0"


class Workers:
    """A worker group of Ray Train's as a backend sees it: it notes what the workers are to do."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[str]()

    def __len__(self) -> int:
        return self.count

    def execute(self, function: Any) -> None:
        self.asked.append(function.__name__)

    def get_resources_per_worker(self) -> dict[str, float]:
        self.asked.append("Ray's own")
        raise ZeroDivisionError  # the rest is Ray's business


@pytest.mark.parametrize(("count", "asked"), [(1, ["Ray's own"]), (2, ["name_interface_under_train", "Ray's own"])])
def test_ray_train_tells_all_workers_before_it_makes_their_group(count: int, asked: list[str]) -> None:
    config = cloudpickle.loads(cloudpickle.dumps(torch_config()))  # as it reaches the run's controller
    backend = config.backend_cls()
    for _ in range(2):  # a group that replaces a lost one begins anew
        workers = Workers(count)
        with pytest.raises(ZeroDivisionError):
            backend.on_start(workers, config)
        assert workers.asked == asked


def test_what_else_ray_train_does_for_torch_stays() -> None:
    import ray.train.torch

    ours, rays = torch_config(), ray.train.torch.TorchConfig()
    for part in ("backend", "init_method", "timeout_s", "train_func_context"):
        assert getattr(ours, part) == getattr(rays, part)
    assert issubclass(ours.backend_cls, rays.backend_cls)
    assert ours.backend_cls.share_cuda_visible_devices is True
