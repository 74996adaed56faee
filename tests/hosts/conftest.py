"""The faults take many minutes, and run where they are asked for."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``hosts`` but under ``make test-hosts``; the reason is printed at the end."""
    if not os.environ.get("RAYLIT_TEST_HOSTS"):
        for item in items:
            if item.get_closest_marker("hosts"):
                item.add_marker(pytest.mark.skip(reason="faults on hosts, for many minutes: make test-hosts"))
