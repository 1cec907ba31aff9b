"""Record what each chapter costs: results/chapter_seconds.json, from the last run of the course (course-out/status.json) or from logs.

    make course;                   python tools/seconds.py
    make notebooks | tee test.log; python tools/seconds.py test.log      (nbdev_test --timing; tools/outputs.py too)
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from status import read_status  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LINES = (re.compile(r"^(\d\d_\w+)\.ipynb: (\d+) secs$"),           # nbdev_test --timing
         re.compile(r"^(\d\d_\w+)\.ipynb +(\d+(?:\.\d+)?) s +\d+ kB"))  # tools/outputs.py


def parse(text):
    "{chapter: seconds} of all lines that time one; a chapter that comes twice keeps its last time"
    found = (pattern.match(line) for line in text.splitlines() for pattern in LINES)
    return {m[1]: float(m[2]) for m in found if m}


def last_run():
    "{chapter: seconds} of the chapters that came to their end when tools/course.py ran last"
    status = read_status(ROOT / "course-out" / "status.json") or {"chapters": {}}
    return {name: c["seconds"] for name, c in status["chapters"].items() if c["ok"]}


def main():
    from synseg.core import load_result, record_result

    seconds = parse("".join(Path(name).read_text(encoding="utf-8") for name in sys.argv[1:])) if sys.argv[1:] else last_run()
    chapters = {p.stem for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
    if not seconds.keys() & chapters:
        sys.exit("no chapter is timed: run make course first, or name a log of make notebooks or tools/outputs.py")
    before = (load_result("chapter_seconds") or {}).get("metrics", {}).get("seconds", {})
    seconds = {name: t for name, t in sorted({**before, **seconds}.items()) if name in chapters}
    path = record_result("chapter_seconds", config=dict(logs=len(sys.argv[1:])),
                         metrics=dict(chapters=len(seconds), total=round(sum(seconds.values()), 1), seconds=seconds), folder=ROOT / "results")
    print(f"{path.relative_to(ROOT)}: {len(seconds)} of {len(chapters)} chapters, {sum(seconds.values()) / 60:.1f} minutes")
    if missing := sorted(chapters - seconds.keys()):
        print("not timed:", ", ".join(missing))


if __name__ == "__main__":
    main()
