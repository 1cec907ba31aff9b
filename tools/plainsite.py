"""The notebooks as plain HTML pages by nbconvert, for machines without quarto: to read, and to check in a browser.

    python tools/plainsite.py DIR [glossary 44_gridnet ...]

What quarto does with nbdev's directives is done here in small: hidden cells, folded code, alt text, links between pages, the
table that says how to run a chapter. Formulas stay as they are written."""
import functools
import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor
from pygments.formatters import HtmlFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run_it import imports_alone, invitation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
HERE = Path(__file__).resolve().parent
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
DIRECTIVES = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", re.M)


def address(notebook):
    "The page of a notebook, as nbdev names it: unet.html for 14_unet.ipynb"
    return re.sub(r"^\d\d_", "", Path(notebook).stem) + ".html"


class Prepare(Preprocessor):
    "Directives obeyed and removed, links turned to pages, alt text where nbconvert looks for it"

    def preprocess(self, nb, resources):
        nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(hide|default_exp|exporti?)\s*(\s|$)", c.source, re.M)]
        if text := invitation(resources["notebook"]):
            nb.cells.insert(1, nbformat.v4.new_markdown_cell(text))
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = self.links(re.sub(r"^::: \{\.(\S+)\}$(.*?)^:::$", r'<div class="\1">\n\2\n</div>', cell.source, flags=re.M | re.S))
            elif cell.cell_type == "code":
                self.code(cell)
        return nb, resources

    def links(self, text):
        return re.sub(r"\]\(([\w-]+\.ipynb)(#[^)]*)?\)", lambda m: f"]({address(m[1])}{m[2] or ''})", text)

    def code(self, cell):
        said = dict(DIRECTIVES.findall(cell.source))
        if not cell.outputs and imports_alone(cell.source):
            said |= {"code-fold": "true", "code-summary": "Imports"}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        cell.metadata.synseg = dict(hidden=said.get("echo") == "false" or not cell.source, fold="code-fold" in said,
                                    summary=said.get("code-summary", "Code").strip("\"'"))
        alt = said.get("fig-alt", "").strip("\"'") or "figure"
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for kind in ("image/png", "image/svg+xml"):
                if kind in data:
                    out.setdefault("metadata", {})[kind] = {"alt": alt}
            if "text/markdown" in data:
                data["text/markdown"] = self.links(data["text/markdown"])
            if "text/html" in data:
                data.pop("image/png", None)


def exporter():
    made = HTMLExporter(template_name="synseg", extra_template_basedirs=[str(HERE / "templates")])
    made.register_preprocessor(Prepare, enabled=True)
    return made


def sidebar(here):
    "The parts of the course and their pages, of which one is here"
    name = lambda page: page if page not in titles() else titles()[page]
    item = lambda page: (f'<li><a href="{address(page)}"' + (' aria-current="page"' if page == here else "") + f">{html.escape(name(page))}</a></li>")
    parts = []
    for entry in SITE["sidebar"]["contents"]:
        if isinstance(entry, str):
            parts.append(f"<ul>{item(entry)}</ul>")
            continue
        pages = [p for p in entry["contents"] if p in titles()]
        opened = " open" if here in pages else ""
        parts.append(f"<details{opened}><summary>{html.escape(entry['section'])}</summary><ul>{''.join(map(item, pages))}</ul></details>")
    return "".join(parts)


@functools.cache
def titles():
    "{notebook: title} of all pages, read once"
    found = {}
    for path in sorted(NBS.glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        number = f"{int(path.stem[:2])} · " if path.stem[:2].isdigit() else ""
        found[path.name] = number + first.split("\n")[0].lstrip("# ")
    return found


def order():
    "All pages in the order of the sidebar"
    found = [p for e in SITE["sidebar"]["contents"] for p in (e["contents"] if isinstance(e, dict) else [e])]
    return [p for p in found if p in titles()]


def turn(name):
    "Links to the pages before and after"
    pages, link = order(), lambda p, word: f'<a href="{address(p)}" rel="{word}">{html.escape(titles()[p])}</a>'
    if name not in pages:
        return ""
    at = pages.index(name)
    return (link(pages[at - 1], "prev") if at else "<span></span>") + (link(pages[at + 1], "next") if at + 1 < len(pages) else "")


def page(path, made):
    "One notebook as a page"
    nb = nbformat.read(path, as_version=4)
    description = re.search(r"^> (.+)$", nb.cells[0].source, re.M)
    resources = dict(notebook=path.name, title=titles()[path.name], description=html.escape(description[1] if description else "", quote=True),
                     sidebar=sidebar(path.name), turn=turn(path.name), site=SITE["title"])
    text, _ = made.from_notebook_node(nb, resources=resources)
    return text


def build(folder, names=()):
    "Write the pages of the notebooks (all, or those named), pictures and style sheets to a folder; returns their paths"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made, written = exporter(), []
    for path in sorted(NBS.glob("*.ipynb")):
        if names and path.stem not in names and path.stem[3:] not in names:
            continue
        target = folder / address(path.name)
        target.write_text(page(path, made), encoding="utf-8")
        written.append(target)
    shutil.copytree(NBS / "images", folder / "images", dirs_exist_ok=True)
    for source in (NBS / "styles.css", *NBS.glob("*.bib")):
        shutil.copy(source, folder)
    colours = lambda style: HtmlFormatter(style=style).get_style_defs(".highlight")
    (folder / "plain.css").write_text((HERE / "templates" / "plain.css").read_text(encoding="utf-8") + "\n" + colours("xcode")
                                      + "\n@media (prefers-color-scheme: dark) {\n" + colours("monokai") + "\n}\n", encoding="utf-8")
    return written


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    print(f"{len(build(sys.argv[1], sys.argv[2:]))} pages in {sys.argv[1]}")
