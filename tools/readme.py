"""Render README.md from nbs/index.ipynb: text as it is, code as code, outputs below it, pictures by their address."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = "https://synseg.github.io/synseg"


def outputs(cell):
    "What a cell shows: Markdown as Markdown, text as an indented block"
    for out in cell["outputs"]:
        data = out.get("data", {})
        if "text/markdown" in data:
            yield "".join(data["text/markdown"])
        elif out["output_type"] == "stream" or "text/plain" in data:
            text = "".join(out.get("text") or data["text/plain"])
            yield "\n".join(f"    {line}" for line in text.rstrip().split("\n"))


def render(nb):
    "The notebook as GitHub's Markdown"
    parts = ["<!-- Written by tools/readme.py from nbs/index.ipynb: edit the notebook, not this file. -->"]
    for cell in nb["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\s*$", source, re.M):
            continue
        hidden = re.search(r"^#\|\s*echo:\s*false", source, re.M)
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and not hidden:
            parts.append(f"```python\n{code}\n```")
        parts += outputs(cell)
    text = "\n\n".join(p for p in parts if p) + "\n"
    text = re.sub(r"\]\((?:\d\d_)?(\w+)\.ipynb", rf"]({SITE}/\1.html", text)
    return re.sub(r"\]\(images/", "](nbs/images/", text)


if __name__ == "__main__":
    notebook = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(render(notebook), encoding="utf-8")
