"The badge of a chapter that failed: shown where it must be, harmless everywhere else"
import json
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import course  # noqa: E402
import status as tool  # noqa: E402

FAILED = dict(ok=False, seconds=3.0, error="Traceback\nValueError: <b>no</b> & never")


def made(tmp_path, **chapters):
    return tool.write_status(tmp_path / "out" / "status.json", chapters, date="2026-11-28")


def test_written_and_read(tmp_path, monkeypatch):
    status = made(tmp_path, b=dict(ok=True, seconds=1.0), a=FAILED)
    assert tool.read_status(tmp_path / "out" / "status.json") == status and list(status["chapters"]) == ["a", "b"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["status.json"]
    monkeypatch.setenv("SYNSEG_STATUS", str(tmp_path / "out" / "status.json"))
    assert tool.read_status() == status


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"chapters": 3}'])
def test_no_status_no_badge(tmp_path, text):
    path = tmp_path / "status.json"
    if text is not None:
        path.write_text(text)
    assert tool.read_status(path) is None and tool.badge("14_unet", tool.read_status(path)) == ""


def test_only_failures_have_a_badge(tmp_path):
    status = made(tmp_path, **{"14_unet": FAILED, "15_zoo": dict(ok=True, seconds=1.0)})
    shown = tool.badge("14_unet.ipynb", status)
    assert shown == tool.badge("14_unet", status)
    assert "failed on 2026-11-28 with the newest dependencies" in shown and "&lt;b&gt;no&lt;/b&gt; &amp; never" in shown and "<b>" not in shown
    assert shown.count("<div") == shown.count("</div>") == 1
    assert tool.badge("15_zoo", status) == tool.badge("99_none", status) == tool.badge("14_unet", {}) == tool.badge("14_unet", {"chapters": {"14_unet": "?"}}) == ""


def test_two_runs_are_merged():
    newest = dict(date="2026-11-23", environment="the newest dependencies", chapters={"a": dict(ok=True), "b": FAILED})
    colab = dict(date="2026-11-24", environment="Colab's versions", chapters={"a": FAILED, "b": dict(ok=True)})
    both = tool.merged(newest, None, colab)
    assert both["date"] == "2026-11-24" and "2026-11-24 with Colab&#x27;s versions" in tool.badge("a", both)
    assert "2026-11-23 with the newest" in tool.badge("b", both) and tool.merged(None)["chapters"] == {}


def test_the_course_says_which_chapters_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "OUT", tmp_path / "course-out")
    (tmp_path / "nbs").mkdir()
    for name, source in {"01_good": "print('Headline: 3 of 3')", "02_bad": "raise ValueError('rotten')"}.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / "nbs" / f"{name}.ipynb")
    monkeypatch.setattr(sys, "argv", ["course.py"])
    with pytest.raises(SystemExit, match="02_bad"):
        course.main()
    status = json.loads((tmp_path / "course-out" / "status.json").read_text())["chapters"]
    assert status["01_good"]["ok"] and status["01_good"]["seconds"] > 0 and not status["02_bad"]["ok"] and "rotten" in status["02_bad"]["error"]


def test_workflows_and_templates_are_yaml():
    import yaml
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text())
    assert {"newest", "colab", "publish-status"} <= set(weekly["jobs"])
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        assert yaml.safe_load(path.read_text()), path
    forms = [yaml.safe_load(p.read_text()) for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert len(forms) >= 3 and all({"name", "description", "body"} <= set(f) for f in forms)


def test_colab_versions_are_allowed():
    from packaging.requirements import Requirement
    pinned = dict(line.split("==") for line in (ROOT / ".github" / "colab-requirements.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    settings = (ROOT / "settings.ini").read_text().splitlines()
    needed = next(line for line in settings if line.startswith("requirements = ")).split(" = ")[1].split()
    course_needs = next(line for line in settings if line.startswith("course_requirements = ")).split(" = ")[1].split()
    for text in needed + course_needs:
        need = Requirement(text)
        if need.name in pinned:
            assert pinned[need.name] in need.specifier, f"Colab has {need.name} {pinned[need.name]}, settings.ini wants {need.specifier}"
    assert {Requirement(t).name for t in needed} <= set(pinned)


def test_shipped_weights_are_small():
    files = list((ROOT / "synseg" / "weights").glob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) <= 8e6
    for f in files:
        assert (ROOT / "results" / f"scenes_{f.stem.removesuffix('-scenes')}.json").exists(), "trained by a recorded recipe"
