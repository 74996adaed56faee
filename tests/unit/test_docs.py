"""The documentation against the code: what would drift is compared."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import raylit
from raylit.config.trainer import TRAINER_ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]


def test_trainer_page_lists_every_argument_with_its_default() -> None:
    page = (ROOT / "docs" / "trainer.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, flags=re.MULTILINE))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(raylit.Trainer.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(defaults) == set(TRAINER_ARGUMENTS)
    # None stands for "norm", so that giving it without a value can be told apart.
    documented = {name: repr(value).replace("'", '"') for name, value in defaults.items()}
    documented["gradient_clip_algorithm"] = '"norm"'
    assert rows == documented


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/**/README.md"))]
    broken = []
    for page in pages:
        if ".venv" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
