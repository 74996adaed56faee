"""``plots.search``: the files, where they go, and what of matplotlib is left as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

import raylit
from raylit import plots
from raylit.errors import ConfigError, MissingDependencyError
from tests.unit.plots.fakes import FakeGrid, realistic, result

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["parallel.png", "metric_by_hparam.png", "learning_curves.png", "search.html"]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, and complains of a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_files_are_written_and_named(tmp_path: Path) -> None:
    written = plots.search(realistic(), path=tmp_path / "new" / "folder")
    assert list(written) == NAMES
    assert all(Path(path) == tmp_path / "new" / "folder" / name for name, path in written.items())
    for name in NAMES[:3]:
        with Image.open(written[name]) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 900 and image.height >= 500
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50, "something is drawn"
    again = plots.search(realistic(), path=str(tmp_path / "new" / "folder"))
    assert again == written, "a second call replaces the files"


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    text = Path(plots.search(realistic(), path=tmp_path)["search.html"]).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 3 and "script" not in page.tags and "link" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text)
    words = "".join(page.words)
    assert "20 trials, compared by val_loss (lower is better)" in words
    assert "failed: RuntimeError: CUDA out of memory" in words and "done: no finite last value" in words
    assert page.tags.count("tr") == 5 + 1 + 20, "the best one's hyperparameters, a head, all trials"
    assert re.search(r'<g id="parallel-a3f1c_00005"><title>a3f1c_00005, failed: val_loss .*lr=', text)


def test_what_comes_from_the_search_cannot_break_the_page(tmp_path: Path) -> None:
    evil = "</table><script>alert(1)</script>&\"'"
    results = [result(f"t{i}", {evil: f"{evil}{i}", "n": i}, [1.0 + i]) for i in range(3)]
    results.append(result("t9", {evil: evil}, error=ValueError(evil)))
    page = Page(Path(plots.search(results, path=tmp_path)["search.html"]).read_text(encoding="utf-8"))
    assert "script" not in page.tags and evil in "".join(page.words)


def test_the_folder_of_the_search_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    results = [result("a", {"lr": 1}, [1.0])]
    local = plots.search(FakeGrid(results, str(tmp_path / "run")))
    assert local["search.html"] == str(tmp_path / "run" / "plots" / "search.html")
    for elsewhere in ("bucket/run", str(tmp_path / "gone"), "s3://bucket/run"):
        assert plots.search(FakeGrid(results, elsewhere))["parallel.png"] == "search-plots/parallel.png"
    assert plots.search(results)["parallel.png"] == "search-plots/parallel.png", "a plain list of results"
    assert sorted(path.name for path in (tmp_path / "search-plots").iterdir()) == sorted(NAMES)


def test_a_path_that_cannot_be() -> None:
    results = [result("a", {"lr": 1}, [1.0])]
    with pytest.raises(ConfigError, match="s3://bucket/x.*folder of this machine"):
        plots.search(results, path="s3://bucket/x")
    with pytest.raises(ConfigError, match="this is a file"):
        plots.search(results, path=__file__)


def test_nothing_is_written_for_a_search_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all 1 trials failed"):
        plots.search([result("a", {"lr": 1}, error=RuntimeError("x"))], path=tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"plots.search needs the package 'matplotlib'.*raylit\[plots\]"):
        plots.search([result("a", {"lr": 1}, [1.0])])


def test_a_persons_settings_change_nothing_and_stay(tmp_path: Path) -> None:
    plain = {name: Path(path).read_bytes() for name, path in plots.search(realistic(), path=tmp_path / "a").items()}
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9.0, "font.size": 30.0}):
        before = dict(matplotlib.rcParams)
        styled = plots.search(realistic(), path=tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    assert {name: Path(path).read_bytes() for name, path in styled.items()} == plain


def test_pyplot_is_not_touched_and_import_is_light(tmp_path: Path) -> None:
    code = f"""
import sys
import raylit
raylit.plots
assert "matplotlib" not in sys.modules, "loaded by the name alone"
from tests.unit.plots.fakes import realistic
raylit.plots.search(realistic(), path={str(tmp_path)!r})
assert "matplotlib.pyplot" not in sys.modules and "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_plots_is_one_of_raylits_names() -> None:
    assert raylit.plots is plots and "plots" in raylit.__all__
