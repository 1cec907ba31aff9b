"""Render the website into _docs: nbdev prepares the notebooks, quarto makes the pages.

Some things differ from plain nbdev_docs. Entries of the API are made from the installed module: no cell is run.
The entries of a cell stand in its order, and its source below them. A command shows its help, not its signature.
Names link within the site. Chapters carry their number, and say how to run them. README.md is left alone (tools/readme.py writes it)."""
import ast
import inspect
import re
import shutil
import sys
import textwrap
from dataclasses import is_dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Annotated, get_origin

import nbdev.serve
import yaml
from execnb.nbio import mk_cell
from nbdev import processors as p
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import Processor
from nbdev.quarto import nbdev_docs
from nbdev.showdoc import BasicMarkdownRenderer
from run_it import imports_alone, invitation
from status import badge, read_status

from synseg.notebooks import as_markdown

CHAPTERS = {name for section in yaml.safe_load(Path("_quarto.yml").read_text())["website"]["sidebar"]["contents"]
            if isinstance(section, dict) and section["section"] not in ("Tools", "Reference", "Under the hood") for name in section["contents"]}


def tidy(doc):
    "A docstring as Markdown: its first sentence on one line, what follows Click's mark as code"
    first, *rest = [part if "\x08" in part else as_markdown(part) for part in doc.split("\n\n")]
    rest = [re.sub(r"\x08\n\s*(.*?:)\n((?:.|\n)*)", lambda m: f"{m[1]}\n\n```sh\n{inspect.cleandoc(m[2])}\n```", part) for part in rest]
    return "\n\n".join([" ".join(first.split("\n")), *rest])


def head(source):
    "The lines of a definition up to its colon, comments among them"
    lines, node = source.splitlines(), ast.parse(textwrap.dedent(source)).body[0]
    margin = len(lines[0]) - len(lines[0].lstrip())
    first = node.body[0]  # on the same line in `def f(x): return x`
    return "\n".join([*lines[node.lineno - 1:first.lineno - 1], lines[first.lineno - 1][:first.col_offset + margin]]).rstrip()


def header(sym):
    "A function or class as its author wrote it: all types, all comments; of records the fields, of other classes `__init__`, also an inherited one"
    source = inspect.getsource(sym)
    node = ast.parse(source).body[0]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)] if is_dataclass(sym) or hasattr(sym, "_fields") else []
    if fields:
        return "\n".join([head(source), *source.splitlines()[fields[0].lineno - 1:fields[-1].end_lineno]])
    init = getattr(sym, "__init__", None)
    ours = inspect.isclass(sym) and not is_dataclass(sym) and getattr(init, "__module__", "").startswith("synseg.")
    return f"{head(source)}\n{head(inspect.getsource(init))}" if ours else head(source)


def entry(sym):
    "Heading, signature and docstring of a function or a class"
    renderer = BasicMarkdownRenderer(sym)
    doc, renderer.docs = tidy(inspect.getdoc(sym) or "") if renderer.docs else "", ""  # nbdev would print its first line in italics
    text = re.sub(r"#LNone\b", f"#L{inspect.getsourcelines(sym)[1]}", renderer._repr_markdown_(), count=1)
    annotations = [x.annotation for x in renderer.sig.parameters.values()] if renderer.sig else []
    is_command = any(get_origin(a) is Annotated for a in annotations) or "\x08" in (sym.__doc__ or "")
    signature = "" if is_command else f"```python\n{header(sym)}\n```"
    text, found = re.subn(r"```python\n.*?\n```", lambda _: signature, text, count=1, flags=re.S)
    assert found, f"nbdev wrote no signature of {sym.__name__}"
    return f"{text}\n\n{doc}"


class Numbered(FrontmatterProc):
    "The number of a chapter of the course in its title, as the text counts"

    def end(self):
        name = Path(self.nb.path_).name
        if name in CHAPTERS and "title" in self.fm:
            self.fm["title"] = f"{int(name[:2])} · {self.fm['title']}"
        super().end()


class invite(Processor):
    "How to run this chapter, what it costs and needs, and a badge where it failed last week: the first thing below the title, on the page alone"

    def end(self):
        name = Path(self.nb.path_).name
        text = "\n\n".join(filter(None, [badge(name, read_status()), invitation(name)]))
        if text:
            first = next((i for i, cell in enumerate(self.nb.cells, 1) if cell.cell_type == "raw"), 0)
            self.nb.cells.insert(first, mk_cell(text, "markdown"))


class from_module(Processor):
    "Fill the entries from the installed module"

    def begin(self):
        names = [cell.directives_["default_exp"][0] for cell in self.nb.cells if "default_exp" in (cell.directives_ or {})]
        self.module = import_module(f"{get_config().lib_path.name}.{names[0]}") if names else None

    def __call__(self, cell):
        shown = cell.cell_type == "code" and re.search(r"^show_doc\(([\w.]+)\)", cell.source, re.M)
        if shown:
            text = entry(attrgetter(shown[1])(self.module))
            cell.outputs = [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text.splitlines(keepends=True)}}]


class arrange(Processor):
    "Entries in the order of the cell, then its source"

    def begin(self):
        cells = self.nb.cells
        for cell in [c for c in cells if c.cell_type == "code" and "exports" in (c.directives_ or {})]:
            start = next(i for i, c in enumerate(cells, 1) if c is cell)
            end = start
            while end < len(cells) and getattr(cells[end], "has_sd", 0):
                end += 1
            cells[start - 1:end] = [*cells[start:end][::-1], cell]


def as_page(cell):
    "HTML outputs as part of the page: quarto would load two libraries from elsewhere for them"
    for out in cell.get("outputs", []):
        html = out.get("data", {}).pop("text/html", None)
        if html:
            out["data"]["text/markdown"] = ["```{=html}\n", *html, "\n```\n"]


def fold(cell):
    "A page opens with its question, not with a screen of imports; and what a browser runs is there for whoever asks"
    if cell.cell_type != "code" or cell.get("outputs"): return
    if imports_alone(cell.source):
        cell.source = f'#| code-fold: true\n#| code-summary: "Imports"\n{cell.source}'
    elif re.search(r"\bconst \w+=", cell.source):
        cell.source = cell.source.replace("#| code-fold: show", "#| code-fold: true")  # nbdev's, of an exported cell


class Names(NbdevLookup):
    "Names that have an entry on this site. A plain word, such as `train`, may be anything and is left alone"

    def doc(self, sym):
        url = super().doc(sym)
        here = get_config().doc_host.rstrip("/") + "/" + get_config().doc_baseurl.strip("/") + "/"
        if not url or not url.startswith(here):
            return url
        return url[len(here):] if re.fullmatch(r"(?!_)(\w*[A-Z_]\w*)", sym) else None


class Pages(p.FilterDefaults):
    def base_procs(self):
        ours = {FrontmatterProc: Numbered, p.exec_show_docs: from_module, p.mv_exports: arrange}
        return [*(ours.get(proc, proc) for proc in super().base_procs()), as_page, fold, invite]


if __name__ == "__main__":
    nbdev.serve.FilterDefaults, p.NbdevLookup = Pages, Names
    if "--prepare" in sys.argv:  # the notebooks alone, for which quarto is not needed
        raise SystemExit(nbdev.serve.proc_nbs(n_workers=0) and None)
    if not shutil.which("quarto"):
        raise SystemExit("quarto makes the pages and is not on the PATH: https://quarto.org/docs/get-started")
    (get_config().config_path / "README.md").touch()  # else nbdev renders its own
    nbdev_docs.__wrapped__(n_workers=0)
