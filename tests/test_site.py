"What the rendered site needs, checked without rendering it: titles, links, alt text, no errors, no paths of one machine"
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import cells, text

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGES = sorted(NBS.glob("*.ipynb"))
CHAPTERS = [p for p in PAGES if p.stem[:2].isdigit()]
PLAIN = [p for p in PAGES if p not in CHAPTERS]  # the home page, the glossary and their like: no number, no module
LIMIT_KB = 600


def outputs(path):
    return [(cell, out) for cell in cells(path, "code") for out in cell["outputs"]]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_front_matter(path):
    first = text(cells(path)[0])
    assert re.match(r"# \S.*\n+> \S", first), "the first cell is a title (# ...) and one line about it (> ...)"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exports_to_the_module_of_its_name(path):
    names = [m for c in cells(path, "code") for m in re.findall(r"^#\| *default_exp (\S+)", text(c), re.M)]
    assert names == [path.stem.split("_", 1)[1]]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)\)", text(cell)):
            if re.match(r"[a-z]+:|#", target):
                continue
            assert (NBS / target.split("#")[0]).exists(), f"{path.name} links to {target}, which is not there"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pictures_have_alt_text(path):
    for cell, out in outputs(path):
        data = out.get("data", {})
        if "image/png" in data or "image/svg+xml" in data:
            assert re.search(r"^#\| *fig-alt: *\S", text(cell), re.M), f"no fig-alt: {text(cell)[:80]!r}"
        html = "".join(data.get("text/html", ""))
        for tag in re.findall(r"<img[^>]*>", html):
            assert re.search(r"alt=.\S", tag), f"an <img> without alt text in {path.name}: {tag[:60]}"
    for cell in cells(path, "markdown"):
        assert "![](" not in text(cell), f"an image without alt text in {path.name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_outputs_are_clean(path):
    assert path.stat().st_size <= LIMIT_KB * 1024, f"{path.name} is over {LIMIT_KB} kB"
    for cell, out in outputs(path):
        assert out["output_type"] != "error", f"a stored error in {path.name}"
        assert out.get("name") != "stderr", f"stderr stored in {path.name}"
        shown = json.dumps(out.get("text", "")) + json.dumps(out.get("data", {}).get("text/plain", ""))
        assert not re.search(r"/(?:work|tmp|root|home|Users)/[\w.-]+", shown), f"{path.name} shows a path of one machine: {shown[:200]}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_were_executed_and_check_themselves(path):
    code = cells(path, "code")
    assert any(c["outputs"] for c in code), "no outputs are stored: make outputs"
    checks = [c for c in code if re.search(r"\bassert\b|\btest_same\(|expect_fail|assert_close|check_\w+\(", text(c))]
    assert len(checks) >= 0.2 * len(code), f"only {len(checks)} of {len(code)} code cells check anything"
    assert any(re.search(r"^## Exercises", text(c), re.M) for c in cells(path, "markdown")), "exercises are missing"
    longest = max(len(text(c).splitlines()) for c in code)
    assert longest <= 45, f"a cell of {longest} lines"


@pytest.mark.parametrize("path", PLAIN, ids=lambda p: p.stem)
def test_plain_pages_belong_to_no_module_and_were_executed(path):
    code = cells(path, "code")
    assert not any(re.search(r"^#\| *(default_exp|exports?)\b", text(c), re.M) for c in code), "only chapters export"
    asked = [c for c in code if not re.search(r"^#\| *(slow|gpu|eval: *false)", text(c), re.M)]
    assert not asked or any(c["outputs"] for c in asked), "no outputs are stored: make outputs"
    assert all(len(text(c).splitlines()) <= 45 for c in code)


def test_the_map_has_the_parts_of_the_sidebar():
    source = "\n".join(text(c) for c in cells(NBS / "index.ipynb", "code"))
    parts = eval(re.search(r"^PARTS = (\{.*?\})$", source, re.M | re.S)[1])
    site = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = {e["section"]: [int(p[:2]) for p in e["contents"]] for e in site
              if isinstance(e, dict) and e["section"] not in ("Reference", "Under the hood")}
    assert {name: sorted(numbers) for name, numbers in parts.items()} == {name: sorted(numbers) for name, numbers in listed.items()}
    headings = re.findall(r"^### (.+)$", "\n".join(text(c) for c in cells(NBS / "index.ipynb", "markdown")), re.M)
    assert headings[:len(parts)] == list(parts)
    named = re.search(r"^PAPERS = (\{.*?\})$", source, re.M | re.S)[1]
    assert all(any(p.stem.startswith(f"{n:02d}_") for p in CHAPTERS) for n in eval(named))


def test_every_page_is_in_the_sidebar():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = {page for entry in site for page in (entry["contents"] if isinstance(entry, dict) else [entry])}
    assert listed == {p.name for p in PAGES}


def test_quarto_file_is_linked():
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == NBS.parent / "_quarto.yml"


def test_readme_has_no_dead_picture():
    readme = (NBS.parent / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", readme):
        assert target.startswith("http") or (NBS.parent / target).exists()
