"""What stands at the top of each chapter's page: the command that runs it here, Colab, its cost, the chapters it needs, its imports, folded."""
import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com/github/synseg/synseg/blob/main/nbs"


@cache
def chapters():
    from synseg.notebooks import read_chapters

    return {c.path.name: c for c in read_chapters(ROOT / "nbs")}


def listed(numbers):
    "Links to chapters by number and title"
    by_number = {c.number: c for c in chapters().values()}
    return ", ".join(f"[{n} {by_number[n].title}]({by_number[n].path.name})" for n in numbers)


def invitation(name):
    "Markdown for the chapter in the file `name`; nothing for a page that is none"
    c = chapters().get(name)
    if c is None:
        return ""
    cost = "" if c.seconds is None else f" ({c.cost()} on two processor cores)"
    needs = f"needs {listed(c.needs)}" if c.needs else "needs no other chapter"
    uses = f"; its cells also use {listed(c.uses)}" if c.uses else ""
    return (f"::: {{.run-it}}\n**Run this chapter**{cost}\n\n```sh\nsynseg notebooks course && jupyter lab course/nbs/{name}\n```\n\n"
            f"or [open it in Colab]({COLAB}/{name}), where `%pip install synseg` comes first. It {needs}{uses}.\n:::")


def imports_alone(source):
    "True for a cell of three or more imports and a few settings, which says nothing to a reader of the page: it is folded there"
    if re.search(r"^(#\||[%!])", source, re.M):
        return False
    body = ast.parse(source).body
    imports = sum(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
    return imports >= max(3, len(body)/2) and all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)) for n in body)
