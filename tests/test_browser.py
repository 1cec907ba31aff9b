"A few pages in headless Chromium, where there is one: `make browser` does all, in minutes. And what needs no browser"
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
pytest.importorskip("nbconvert")
pytest.importorskip("websocket")
import browser  # noqa: E402
import plainsite  # noqa: E402

FEW = ["index", "glossary", "stopwatch", "leaderboard", "cheatsheet", "console"]
chromium = pytest.mark.skipif(not browser.chromium(), reason="no Chromium on the PATH (chromium or google-chrome): pages are not opened")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Plain pages of a few notebooks"
    folder = tmp_path_factory.mktemp("pages")
    plainsite.build(folder, FEW)
    return folder


def test_plain_pages_obey_directives(pages):
    assert {p.stem for p in pages.glob("*.html")} == set(FEW)
    home, clock = ((pages / f"{n}.html").read_text(encoding="utf-8") for n in ("index", "stopwatch"))
    assert "Run this chapter" in clock and "Run this chapter" not in home
    assert "KMeansSegmenter" not in home, "hidden cells stay hidden"
    assert ".ipynb\"" not in home.replace("course/nbs", "") and 'href="unet.html"' in home
    assert "#| " not in clock and "default_exp" not in clock
    assert "<summary>Imports</summary>" in clock and "import importlib" not in re.sub("<[^>]+>", "", clock), "imports are folded, those of the module left out"
    assert 'rel="prev"' in clock and 'rel="next"' in clock
    assert "No description has been provided" not in home + clock


def test_addresses():
    assert plainsite.address("14_unet.ipynb") == "unet.html" and plainsite.address("nbs/index.ipynb") == "index.html"
    assert len({plainsite.address(n) for n in plainsite.titles()}) == len(plainsite.titles())


@chromium
@pytest.mark.browser
def test_pages_in_a_browser(pages, capsys):
    if not browser.axe():
        print("axe-core is not at hand (AXE=axe.min.js): its rules are left out")
    known = {plainsite.address(n) for n in plainsite.titles()}
    found = browser.examine(pages, FEW, seconds=45, known=known)
    assert found and not {name: problems for name, problems in found.items() if problems}


@chromium
@pytest.mark.browser
def test_each_fault_is_found(tmp_path):
    (tmp_path / "bad.html").write_text("""<html lang=en><head><title>bad</title><meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href=data:,></head><body><main><h1>One</h1>
      <img src=none.png alt=x><a href=gone.html>gone</a><a href=#nowhere>here</a><a href=far.html>known</a>
      <div style="width:900px">wide</div><button tabindex=-1 onclick=1>no</button><a href="#x" id="x" onfocus="this.blur()">cannot be held</a>
      <script>console.error('oh'); setTimeout(() => { throw new Error('late') }, 0); fetch('http://192.0.2.1/x').catch(() => 0)</script>
      <p style="color:#ccc;background:#fff">pale</p></main></body></html>""")
    said = "\n".join(browser.examine(tmp_path, known={"far.html"})["bad"])
    for fault in ("picture does not load", "link leads nowhere: gone.html", "no such anchor: #nowhere", "pixels wide on 390", "on paper: ",
                  "console: oh", "script: Error: late", "asks elsewhere: http://192.0.2.1/x"):
        assert fault in said, f"{fault!r} was not found in:\n{said}"
    assert "far.html" not in said and ("color-contrast" in said or not browser.axe())
