"The course as scripts and Markdown: Jupytext reads our scripts back, every picture arrives"
import json

import pytest

from synseg.notebooks import copy_course, course_home, to_markdown, to_script

CHAPTERS = sorted((course_home() / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_scripts_are_what_jupytext_reads(path):
    jupytext = pytest.importorskip("jupytext")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    script = to_script(notebook)
    compile(script, path.stem, "exec")
    cells = jupytext.reads(script, fmt="py:percent").cells
    want = [c for c in notebook["cells"] if "".join(c["source"]).strip()]
    assert [c.cell_type for c in cells] == [c["cell_type"] for c in want]
    plain = lambda text: [line.rstrip() for line in text.strip().split("\n") if not line.lstrip().startswith(("%", "!", "# %", "# !"))]
    for ours, theirs in zip(cells, want):
        assert plain(ours.source) == plain("".join(theirs["source"]))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_markdown_keeps_text_code_and_pictures(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    text, files = to_markdown(notebook, "pictures")
    pngs = [o for c in notebook["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(files) == len(pngs) and all(f"]({name})" in text and content[:4] == b"\x89PNG" for name, content in files.items())
    assert text.count("```python\n") >= sum(c["cell_type"] == "code" for c in notebook["cells"])


def test_records_come_along(tmp_path):
    written = copy_course(tmp_path / "a")
    assert len(written) >= len(CHAPTERS)
    have = {p.name for p in (tmp_path / "a" / "results").glob("*.json")}
    assert have == {p.name for p in (course_home() / "results").glob("*.json")}
    with pytest.raises(FileExistsError):
        copy_course(tmp_path / "a")
    with pytest.raises(ValueError):
        copy_course(tmp_path / "b", "docx")
