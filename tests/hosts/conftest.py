"""What starts Ray on hosts takes many minutes, and runs where it is asked for."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``hosts`` but under ``make test-hosts``; the reason is printed at the end."""
    if not os.environ.get("RAYLIT_TEST_HOSTS"):
        for item in items:
            if item.get_closest_marker("hosts"):
                item.add_marker(pytest.mark.skip(reason="Ray on hosts of its own, for many minutes: make test-hosts"))
