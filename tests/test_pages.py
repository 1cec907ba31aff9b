"What the website asks of the notebooks, as far as it can be said without quarto"
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cells, text

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_readers_of_the_site_see_the_exported_source(path):
    for source in map(text, cells(path, "code")):
        if source.startswith("#| export\n"):
            body = ast.parse(source).body
            assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body), f"use #| exports here:\n{source[:120]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_headings_and_formulas(path):
    for source in map(text, cells(path, "markdown")):
        assert not re.search(r"^#+\s*$", re.sub("```.*?```", "", source, flags=re.S), re.M), "a heading that says nothing"
        assert not re.search(r"\\[bB]igg?[lr]\b", source), "pandoc's MathML knows \\Big( but not \\Bigl("


def test_every_page_is_prepared(tmp_path):
    pytest.importorskip("nbdev")
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True)
    run = subprocess.run([sys.executable, str(ROOT / "tools" / "pages.py"), "--prepare"], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr[-3000:]
    made = sorted((tmp_path / "_proc").glob("*.ipynb"))
    assert [p.name for p in made] == [p.name for p in PAGES]
    assert (tmp_path / "_proc" / "images").is_dir()
    for page in made:
        for cell in cells(page):
            if "show_doc(" in text(cell):
                entry = "".join(cell["outputs"][0]["data"]["text/markdown"])
                assert "### " in entry and "__main__" not in entry and "\x08" not in entry and "#LNone" not in entry, page.name
    labels = (tmp_path / "_proc" / "02_labels.ipynb").read_text(encoding="utf-8")
    assert re.search(r'title: .{0,2}2 .{1,6} Labels', labels), "chapters carry their number"
    one, other, source = labels.index("### one_hot"), labels.index("### from_one_hot"), labels.rindex("def one_hot(labels")
    assert one < other < source, "entries in the order of their cell, then its source"
    for page in made:
        invited = [k for k, cell in enumerate(cells(page)) if "Run this chapter" in text(cell)]
        assert invited == ([1] if page.stem[:2].isdigit() else []), f"{page.name}: how to run it stands below the title, once"
    grid = text(cells(tmp_path / "_proc" / "44_gridnet.ipynb")[1])
    assert "jupyter lab course/nbs/44_gridnet.ipynb" in grid and "/blob/main/nbs/44_gridnet.ipynb" in grid
    assert "[13 Segmenter](13_segmenter.ipynb)" in grid and re.search(r"\*\*Run this chapter\*\*( \(\d+ s on two processor cores\))?\n", grid)
    folded = next(text(c) for c in cells(tmp_path / "_proc" / "44_gridnet.ipynb", "code") if text(c).strip())
    assert folded.startswith("#| code-fold: true\n#| code-summary: \"Imports\"\n") and "import" in folded, "no page opens with a screen of imports"
    for page in made:
        for source in map(text, cells(page, "code")):
            keys = re.findall(r"^#\| ([\w-]+):", source, re.M)
            assert len(keys) == len(set(keys)), f"{page.name}: quarto stops at an option that is given twice:\n{source[:200]}"
            assert "code-fold: show" not in source or not re.search(r"\bconst \w+=", source), "no page opens with two screens of JavaScript"
    entries = {page.stem: "\n".join("".join(o["data"]["text/markdown"]) for c in cells(page, "code") if "show_doc(" in text(c) for o in c["outputs"])
               for page in made}
    assert r"as an \<svg>" in entries["35_microscope"], "a tag in a docstring is text: raw, it swallowed the sentence"
    assert r"go to \--out" in entries["92_cli"], "an option, not a dash"
    assert r"f\*H, f\*W" in entries["31_upsample"] and "*longer* side" in entries["20_kmeans"], "products are no emphasis"
    assert "class Block(NamedTuple):\n    kind: str\n" in entries["44_gridnet"], "the fields of a record"
    assert "class GridNet(_Modules):\n    def __init__(self, num_classes: int" in entries["44_gridnet"], "an inherited __init__"
    assert "-> frozenset[Block]:" in entries["44_gridnet"] and "# (K,) float32, 1 for the class" in entries["10_losses"], "types and comments whole"
