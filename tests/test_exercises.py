"Every chapter of the course lets its readers try first: a hint for each exercise, answers folded, one answer checked unseen"
import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from conftest import cells

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
sys.path.insert(0, str(ROOT / "tools"))
import exercises as tool  # noqa: E402

SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
COURSE = [n for part in SITE if isinstance(part, dict) and part["section"] not in ("Tools", "Under the hood")
          for n in part["contents"] if re.match(r"\d\d_", n)]
RIGHT = {"10": 2.398, "13": (96, 64), "09": "mean iou", "31": [5, 10], "33": 230_144, "53": 24, "57": 18, "69": 0.693, "49": 54, "75": (16, 34, 142)}
WRONG = {"10": 11, "13": (65, 64), "09": "pixel accuracy", "31": [5], "33": 230_145, "53": 23, "57": 3, "69": 0.5, "49": 50, "75": (34, 70, 142)}


def checks(name):
    return [tool.text(c) for c in cells(NBS / name) if c["cell_type"] == "code" and re.search(r"^mine = None", tool.text(c), re.M)]


@pytest.mark.parametrize("name", COURSE)
def test_exercises_have_hints_and_folded_answers(name):
    body = tool.exercises(cells(NBS / name))
    if "None yet." in body:
        pytest.skip("a chapter that is being written")
    hints = re.findall(tool.HINT, body, re.S)
    numbers = re.findall(r"^(\d+)\. ", re.sub(r"<details>.*?</details>", "", body, flags=re.S), re.M)
    assert [k for k, _ in hints] == numbers == [str(k) for k in range(1, len(numbers) + 1)] and numbers
    assert all(len(hint.split()) >= 5 for _, hint in hints)
    assert body.count("<details>") == body.count("</details>") == body.count("<details><summary>")
    start, stop = tool.section(cells(NBS / name))
    for cell in cells(NBS / name)[start:stop]:
        if cell["cell_type"] == "code" and "mine = None" not in tool.text(cell):
            assert tool.text(cell).startswith("#| code-fold: true\n#| code-summary: \"Answer"), tool.text(cell)[:200]


@pytest.mark.parametrize("name", COURSE)
def test_an_answer_can_be_checked_unseen(name):
    if "None yet." in tool.exercises(cells(NBS / name)):
        pytest.skip("a chapter that is being written")
    assert checks(name), "no check_answer cell"
    for source in checks(name):
        with redirect_stdout(StringIO()) as said:
            exec(source, {})
        assert said.getvalue().endswith(": not tried yet\n")
        key = re.search(r'check_answer\(mine, "(\d+)\.', source)
        assert key is None or int(key[1]) == int(name[:2]), "salted with the chapter's own number"


@pytest.mark.parametrize("chapter", RIGHT)
def test_right_answers_are_accepted_and_wrong_ones_not(chapter):
    name = next(n for n in COURSE if n.startswith(chapter))
    for answer, verdict in ((RIGHT[chapter], "right"), (WRONG[chapter], "not yet")):
        with redirect_stdout(StringIO()) as said:
            exec(checks(name)[0].replace("mine = None", f"mine = {answer!r}"), {})
        assert verdict in said.getvalue(), said.getvalue()


def test_predict_then_reveal():
    for part in SITE:
        if isinstance(part, dict) and part["section"] not in ("Tools", "Under the hood", "Fast and big", "Reference"):
            texts = [tool.text(c) for n in part["contents"] if (NBS / n).exists() for c in cells(NBS / n) if c["cell_type"] == "markdown"]
            asked = sum(t.count("<summary>Predict first, then open</summary>\n\n") for t in texts)
            assert asked >= 2, f"{part['section']}: {asked}"


def test_the_tool_adds_hints_a_check_and_folds(tmp_path):
    made = [tool.new("markdown", "# T\n\n> t"), tool.new("markdown", "## What we know now\n\n- x\n\n## Exercises\n\n1. *Predict.* One?\n2. *Prove.* Two\n   and more.\n\nThe next cell answers."),
            tool.new("code", "print('1: one')"), tool.new("markdown", "## References\n\n- r"), tool.new("code", "#| hide\nx")]
    (tmp_path / "17_x.ipynb").write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "h.json").write_text(json.dumps({"hints": ["look at the first number", "and then at the other"], "check": {"exercise": 1, "ask": "one", "answers": [1]}}))
    sys.argv = ["exercises.py", str(tmp_path / "17_x.ipynb"), str(tmp_path / "h.json")]
    tool.main()
    done = json.loads((tmp_path / "17_x.ipynb").read_text())["cells"]
    assert [c["cell_type"][0] for c in done] == list("mmcmcmc")
    assert tool.text(done[1]).endswith("and then at the other\n\n</details>") and "and more.\n\n<details>" in tool.text(done[1])
    assert done[2]["outputs"][0]["text"] == ["exercise 17.1: not tried yet\n"] and tool.text(done[3]) == "The next cell answers."
    assert tool.text(done[4]) == '#| code-fold: true\n#| code-summary: "Answer to exercise 1"\nprint(\'1: one\')'
    with pytest.raises(ValueError, match="hints already"):
        tool.main()
