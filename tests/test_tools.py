"The tools behind make: executing keeps what it should keep, the README says what the index says"
import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from synseg.labels import label_space
from synseg.zoo import create_model, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import course  # noqa: E402
import outputs  # noqa: E402
import readme  # noqa: E402
import run_it  # noqa: E402
import seconds  # noqa: E402
import ship  # noqa: E402
import status  # noqa: E402


def code(source, *stored):
    cell = nbformat.v4.new_code_cell(source)
    cell.outputs = list(stored)
    return cell


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_flagged_cells_keep_their_outputs_and_others_are_run_anew(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[
        code("x = 2 + 2\nprint(x)", stream("stale\n")),
        code("#| slow\nraise SystemError('must not run')", stream("from a long run\n")),
        code("#| eval: false\nraise SystemError('must not run')"),
        code("#|gpu\nraise SystemError('must not run')"),
    ])
    nbformat.write(nb, tmp_path / "nb.ipynb")
    done, _ = outputs.execute(tmp_path / "nb.ipynb")
    assert done.cells[0].outputs[0].text == "4\n"
    assert done.cells[1].outputs[0].text == "from a long run\n"
    with pytest.raises(outputs.CellExecutionError, match="must not run"):
        outputs.execute(tmp_path / "nb.ipynb", run=["slow"])


def test_tidy_drops_what_changes_from_run_to_run():
    nb = nbformat.v4.new_notebook(cells=[
        code("f()", stream("10%\r 50%\r100%\n"), stream("a warning", "stderr"), stream("done\n"),
             nbformat.v4.new_output("execute_result", {"text/plain": "<Net at 0x7f00aa>"}, execution_count=7))])
    nb.cells[0].execution_count = 7
    cell = outputs.tidy(nb).cells[0]
    assert cell.execution_count is None
    assert [o.get("text") for o in cell.outputs[:1]] == ["100%\n"]
    assert all(o.get("name") != "stderr" for o in cell.outputs)
    assert cell.outputs[-1].data["text/plain"] == "<Net>"


def test_large_pictures_become_lighter_and_stay_the_same_to_the_eye():
    y, x = np.mgrid[:200, :300]
    pixels = np.stack([x * 255 // 299, y * 255 // 199, (x + y) % 256], -1).astype(np.uint8)
    pixels += np.random.default_rng(0).integers(0, 8, pixels.shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    before = base64.b64encode(buffer.getvalue()).decode()
    after = outputs.lighter(before)
    assert len(after) < 0.8 * len(before)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB"), dtype=float)
    assert abs(seen - pixels).mean() < 20 and seen.shape == pixels.shape
    small = io.BytesIO()
    Image.fromarray(pixels[:50, :60]).save(small, "PNG")
    small = base64.b64encode(small.getvalue()).decode()
    assert outputs.lighter(small) == small, "a small photograph is left alone"


def test_headline_is_the_last_one_printed():
    nb = nbformat.v4.new_notebook(cells=[code("", stream("Headline: first\n")), code("", stream("x\nHeadline: 42 points\n"))])
    assert course.headline(nb) == "42 points"
    assert course.headline(nbformat.v4.new_notebook()) == ""


def test_readme_shows_code_and_answers_but_not_what_is_hidden():
    nb = dict(cells=[
        dict(cell_type="markdown", source="# T\n[go](14_unet.ipynb) ![x](images/a.png)"),
        dict(cell_type="code", source="#| hide\nsecret()", outputs=[]),
        dict(cell_type="code", source="print(1)", outputs=[dict(output_type="stream", text="1\n")]),
        dict(cell_type="code", source="#| echo: false\ntable()",
             outputs=[dict(output_type="display_data", data={"text/markdown": "| a |"})]),
    ])
    text = readme.render(nb)
    assert "secret" not in text and "table()" not in text and "| a |" in text
    assert "```python\nprint(1)\n```\n\n    1\n" in text
    assert "/unet.html" in text and "(nbs/images/a.png)" in text


def test_seconds_are_read_from_the_log_of_each_command():
    log = """00_core                 6.1       2  one forgotten seed moves
45_pretrained.ipynb: 27 secs
96_notebooks.ipynb             24.6 s      17 kB
99 chapters in 40.0 minutes.
"""
    assert seconds.parse(log) == {"45_pretrained": 27.0, "96_notebooks": 24.6}
    assert seconds.parse("no chapter here") == {}


def test_seconds_are_those_of_the_last_course(tmp_path, monkeypatch):
    monkeypatch.setattr(seconds, "ROOT", tmp_path)
    assert seconds.last_run() == {}
    status.save(tmp_path / "course-out" / "status.json", dict(chapters={"00_core": dict(ok=True, seconds=6.1), "44_gridnet": dict(ok=False, seconds=2.0)}))
    assert seconds.last_run() == {"00_core": 6.1}


def test_what_is_shipped_has_no_training_head(tmp_path):
    torch.manual_seed(0)
    trained = create_model("contextnet_cn14", 11, width=0.125, aux=True).eval()
    save_model(trained, tmp_path / "run" / "model.safetensors", label_space("scenes"), (96, 128))
    path, x = ship.ship(tmp_path / "run", tmp_path), torch.rand(1, 3, 96, 128)
    again = load_model(path)
    assert path.name == "contextnet_cn14-scenes.safetensors" and again.card.options == {"width": 0.125} and again.card.input_size == (96, 128)
    torch.testing.assert_close(again(x), trained(x), rtol=0.01, atol=0.01)


def test_a_chapter_says_how_it_is_run_and_other_pages_do_not():
    text = run_it.invitation("44_gridnet.ipynb")
    assert "synseg notebooks course && jupyter lab course/nbs/44_gridnet.ipynb" in text and run_it.COLAB + "/44_gridnet.ipynb" in text
    assert run_it.invitation("index.ipynb") == run_it.invitation("glossary.ipynb") == ""
    home = Path(run_it.COLAB.partition("/blob/main/")[2])
    assert (ROOT / home / "44_gridnet.ipynb").is_file()
