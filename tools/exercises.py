"""Give the exercises of a chapter their hidden hints, a cell that checks the reader's own answer, and folded answers.

    python tools/exercises.py nbs/17_speed.ipynb hints.json    add what is missing; nothing is executed, no other cell is touched
    python tools/exercises.py --key 17.1 200 --step 0.5        the key of an answer, for a check_answer cell

hints.json: {"hints": ["...", one for each exercise],
             "check": {"exercise": 1, "ask": "frames per second", "answers": [200], "step": 0.5}}"""
import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TITLE, ITEM, HINT = r"^## Exercises$", r"^\d+\. ", r"<summary>Hint (\d+)</summary>\n\n(.+?)\n\n</details>"


def text(cell):
    return "".join(cell["source"])


def new(kind, source, outputs=()):
    cell = {"cell_type": kind, "id": hashlib.sha256(source.encode()).hexdigest()[:8], "metadata": {},
            "source": source.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": list(outputs)}


def section(cells):
    "First and last index of the exercises: from their heading to the next one, or to the hidden cell at the end"
    start = next(i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and re.search(TITLE, text(c), re.M))
    if re.search(r"^## ", re.split(TITLE, text(cells[start]), flags=re.M)[1], re.M):
        return start, start + 1
    for i, c in enumerate(cells[start + 1:], start + 1):
        if c["cell_type"] == "markdown" and re.search(r"^## ", text(c), re.M) or "#| hide" in text(c):
            return start, i
    return start, len(cells)


def exercises(cells):
    "The section's text without what precedes its heading or follows with the next"
    start, stop = section(cells)
    found = "\n\n".join(text(c) for c in cells[start:stop] if c["cell_type"] == "markdown")
    return re.split(r"^## ", re.split(TITLE, found, flags=re.M)[1], flags=re.M)[0]


def with_hints(source, hints):
    "(section up to its last hint, what followed the numbered list, the headings behind)"
    before, rest = re.split(r"(?<=^## Exercises)$", source, maxsplit=1, flags=re.M)
    body, *behind = re.split(r"(?=^## )", rest, maxsplit=1, flags=re.M)
    last = [m for m in re.finditer(ITEM + r".*(?:\n(?!\n).*)*", body, re.M)][-1].end()
    blocks = [f"<details><summary>Hint {k}</summary>\n\n{hint}\n\n</details>" for k, hint in enumerate(hints, 1)]
    return "\n\n".join([before + body[:last].rstrip(), *blocks]), body[last:].strip(), "".join(behind).strip()


def check_cell(number, check):
    "A cell for the reader's own answer; a key hides what is right, `test` is code that judges"
    from synseg.check import answer_key
    step, name = check.get("step", 0), f"{number}.{check['exercise']}"
    key = check.get("test") or json.dumps(answer_key(name, *map(frozen, check["answers"]), step=step))
    source = f"from synseg.check import check_answer\nmine = None  # your answer to exercise {check['exercise']}: {check['ask']}\ncheck_answer(mine, {key}{f', step={step}' if step else ''})"
    said = ["exercise: not tried yet\n" if check.get("test") else f"exercise {name}: not tried yet\n"]
    output = {"name": "stdout", "output_type": "stream", "text": said}
    return new("code", source, [output])


def frozen(answer):
    return tuple(answer) if isinstance(answer, list) else answer


def answered(source):
    "Numbers of the exercises that a cell answers, as its comments and prints say"
    found = re.findall(r"^# (\d)[.:]|^# (\d) and (\d)$|  # (\d)(?:$|[:.])|print\(\s*f?[\"'](?:answer )?(\d)[:.]|^f?[\"'](\d)[:.]|[;>\"n] ?(\d): |\"\"\"(\d)\.|\"(\d)\. ", source, re.M)
    return sorted({int(n) for groups in found for n in groups if n})


def folded(cell, numbers=None):
    "An answer, hidden until it is opened"
    source = text(cell)
    if "code-fold:" in source:
        return cell
    numbers = numbers or answered(source)
    label = "Answer" + ("s" if len(numbers) > 1 else "") + (f" to exercise{'s' if len(numbers) > 1 else ''} " + ", ".join(map(str, numbers)) if numbers else "")
    return {**cell, "source": f'#| code-fold: true\n#| code-summary: "{label}"\n{source}'.splitlines(keepends=True)}


def improve(cells, number, hints, check, labels=()):
    "The cells of a chapter with hints, a self-check and folded answers; `labels` name the exercises that each answer cell answers"
    start, stop = section(cells)
    if re.search(HINT, exercises(cells), re.S):
        raise ValueError("this chapter has hints already")
    top, then, behind = with_hints(text(cells[start]), hints)
    made = [{**cells[start], "source": top.splitlines(keepends=True)}, check_cell(number, check)]
    made += [new("markdown", then)] if then else []
    labels = list(labels)
    for cell in cells[start + 1:stop]:
        made.append(folded(cell, labels.pop(0) if labels else None) if cell["cell_type"] == "code" else cell)
    made += [new("markdown", behind)] if behind else []
    return cells[:start] + made + cells[stop:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path)
    parser.add_argument("hints", nargs="?", type=Path)
    parser.add_argument("--key", nargs=2, metavar=("EXERCISE", "ANSWER"))
    parser.add_argument("--step", type=float, default=0)
    args = parser.parse_args()
    if args.key:
        from synseg.check import answer_key
        name, answer = args.key
        return print(answer_key(name, float(answer) if args.step else answer, step=args.step))
    nb, wanted = json.loads(args.notebook.read_text(encoding="utf-8")), json.loads(args.hints.read_text(encoding="utf-8"))
    nb["cells"] = improve(nb["cells"], int(args.notebook.name[:2]), wanted["hints"], wanted["check"], wanted.get("labels", ()))
    args.notebook.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
