"""What the tests of clusters/ share: where the files are, and which versions constraints.txt pins."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"


def pin(package: str) -> str:
    """The version that constraints.txt pins, of a package that has one for all Pythons."""
    (version,) = re.findall(rf"^{re.escape(package)}==([^\s;]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version
