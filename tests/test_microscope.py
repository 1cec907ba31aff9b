"The instruments of the page: JavaScript and Python draw the same, controls are named, nothing comes from elsewhere"
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from synseg.microscope import (BORDERS, DRAW, LAYERS, OPERATORS, Widget, animate_operator, before_after, borders, chessboard, explore,
                               gridding, live, overlap_counts, receptive_fields, tap_counts)

NBS = Path(__file__).resolve().parents[1] / "nbs"
MAKERS = [chessboard, gridding, receptive_fields, borders, animate_operator]


def states(widget):
    "All settings of a widget, or a thousand of them spread evenly"
    values = [list(v) for _, v, _ in widget.controls.values()]
    every = [dict(zip(widget.controls, choice)) for choice in itertools.product(*values)]
    return every[::max(len(every) // 1000, 1)]


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the page's scripts; it is not installed")
@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_both_languages_draw_the_same(make):
    widget = make()
    given = states(widget)
    assert len(given) >= 24
    code = f"{DRAW}\n{widget.script}\nconsole.log(JSON.stringify({json.dumps(given)}.map(p=>draw(...model(p)))))"
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for state, picture in zip(given, json.loads(done.stdout), strict=True):
        assert picture == widget.picture(**state), state


class Reader(html.parser.HTMLParser):
    "Ids, pictures, controls and their labels, and whether all that was opened was closed"
    void = {"input", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.controls, self.unnamed, self.outside = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.void: self.open.append(tag)
        if "id" in attrs: self.ids.append(attrs["id"])
        if tag in ("input", "select", "button"): self.controls.append(tag)
        if tag in ("input", "select") and "label" not in self.open: self.unnamed.append(tag)
        if tag == "img" and not attrs.get("alt", "").strip(): self.unnamed.append(tag)
        if tag == "svg" and not attrs.get("aria-label", "").strip(): self.unnamed.append(tag)
        if tag in ("script", "link", "iframe") and ("src" in attrs or "href" in attrs): self.outside.append(tag)
        if not attrs.get("src", "data:").startswith("data:"): self.outside.append(attrs["src"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void: self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_html(make):
    page = make()._repr_html_()
    read = Reader(page)
    assert not read.open and not read.unnamed and not read.outside and len(read.ids) == 1 and len(read.controls) >= 2
    assert len(page) < 60_000 and 'aria-live="polite"' in page and "<noscript>" in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count(make().words()) >= 2, "the sentence stands below the picture and names it"
    assert make()._repr_html_() != page, "two on a page have two ids"
    assert repr(make()).endswith(".") and "<" not in repr(make())


def test_before_after():
    a, b = np.random.default_rng(0).random((24, 40, 3)), np.zeros((24, 40, 3), np.uint8)
    page = before_after(a, b, '<b>"a" & b</b>', ("<i>", "it's"))
    read = Reader(page._repr_html_())
    assert not read.open and not read.unnamed and not read.outside and read.controls == ["input"] and len(read.ids) == 1
    assert "<b>" not in page and "<i>" not in page and "<b>" in repr(page) and len(page) < 20_000
    with pytest.raises(ValueError, match="alt is empty"): before_after(a, b, " ")
    with pytest.raises(ValueError, match="one size"): before_after(a, b[1:], "two")


@pytest.mark.parametrize("call", [lambda: chessboard(8), lambda: chessboard(3, 0), lambda: gridding((7, 1, 1)), lambda: gridding((1, 1)), lambda: borders("crop"),
                                  lambda: borders("zeros", 4), lambda: receptive_fields(("9x9",) * 4), lambda: animate_operator("pooling"), lambda: animate_operator("x")])
def test_refuses(call):
    with pytest.raises(ValueError): call()


def test_numbers():
    assert overlap_counts(3, 2, 3) == [1, 1, 2, 1, 2, 1, 1] and tap_counts((2, 2)) == [1, 0, 2, 0, 3, 0, 2, 0, 1]
    assert len(LAYERS) >= 8 and set(BORDERS) >= {"valid", "zeros", "reflect"} and len(OPERATORS) == 2
    assert isinstance(chessboard(), Widget)


def figure(sigma=2.0, name="a"): return sigma, name


def test_explore_without_a_frontend(monkeypatch):
    assert not live() and explore(figure, sigma=(1.0, 3.0), name=["a", "b"]) == (2.0, "a")
    for wrong in (dict(other=(1, 2)), dict(sigma=(1, 2), nam=["a"])):
        with pytest.raises(ValueError, match="argument"): explore(figure, **wrong)
    with pytest.raises(ValueError, match="default"): explore(lambda x: x, x=(1, 2))


def test_explore_with_a_frontend_and_without_ipywidgets(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    import IPython
    monkeypatch.setenv("JPY_SESSION_NAME", "course.ipynb")
    monkeypatch.setattr(IPython, "get_ipython", lambda: InteractiveShell.__new__(InteractiveShell))
    ipywidgets = pytest.importorskip("ipywidgets")
    called = []
    monkeypatch.setattr(ipywidgets, "interact", lambda f, **k: called.append(k))
    assert live() and explore(figure, sigma=(1.0, 3.0)) is None and called == [dict(sigma=(1.0, 3.0))]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not live() and explore(figure, sigma=(1.0, 3.0)) == (2.0, "a")


def test_importing_needs_no_ipywidgets():
    code = "import sys; sys.modules['ipywidgets'] = None; import synseg.microscope as m; print(m.explore(lambda a=3: a, a=(1, 5)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=NBS.parent, timeout=120)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_pages(path):
    "What notebooks store: no widget's state, one id once, every picture in HTML with words, every control with a label"
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"]
    ids = []
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            assert not any("widget" in kind for kind in data), f"{path.name} stores the state of a widget"
            page = "".join(data.get("text/html", ""))
            for svg in re.findall(r"<svg[^>]*>(?:\s*<title>[^<])?", page):
                assert "aria-label=" in svg or "<title>" in svg, f"an <svg> without words in {path.name}"
            if "microscope-" in page or "<svg" in page:
                read = Reader(page)
                assert not [u for u in read.unnamed if u != "svg"] and not read.outside and len(page) < 60_000
                ids += read.ids
    assert len(ids) == len(set(ids))
