"""The check of a storage over the real S3 protocol: pyarrow's client against moto's server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raylit.driver.storage_check import check_storage
from tests.unit.checkpoint.test_s3 import SECRET, Server
from tests.unit.doctor.test_storage import Nodes

pytest.importorskip("moto", reason="needs moto, which the extra 'test' installs")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def test_an_object_store_with_credentials_in_its_uri(server: Server) -> None:
    server.filesystem.create_dir("runs")
    uri = server.uri("runs/mine")
    report = check_storage(uri, actors=Nodes({"a": uri, "b": uri, "c": uri}))  # type: ignore[arg-type]
    assert report.problem is None and report.left is None and len(report.sharing) == 3
    assert SECRET not in report.storage
    assert not any("storage-check" in name for name in server.everything("runs"))


def test_a_missing_bucket_is_a_fault_without_the_secret(server: Server) -> None:
    uri = server.uri("nowhere/mine")
    report = check_storage(uri, actors=Nodes({"a": uri, "b": uri}))  # type: ignore[arg-type]
    assert all(each.fault for each in report.nodes) and report.sharing == ()
    assert report.problem is not None and SECRET not in report.problem and "wJalr" not in report.problem
