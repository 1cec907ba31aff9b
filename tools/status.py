"""Which chapters ran, and the badge of one that did not.

tools/course.py writes course-out/status.json; the weekly run publishes it, and the site shows a badge on top of a page
where a status file lies at nbs/status.json or where SYNSEG_STATUS points. tools/seconds.py reads it for what each chapter costs.
Nothing but Python is imported: the job that merges two runs installs nothing."""
import argparse
import html
import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_status(path, chapters, environment="the newest dependencies", date=None):
    "`chapters`: {name: dict(ok=bool, seconds=float, error=str)}; written whole or not at all"
    date = date or datetime.now(timezone.utc).strftime("%Y-%m-%d")
    status = dict(date=date, environment=environment, chapters={n: dict(sorted(c.items())) for n, c in sorted(chapters.items())})
    return save(path, status)


def save(path, status):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return status


def read_status(path=None):
    "The status file, or None where there is none or it cannot be read: a site is built without it as well"
    path = Path(path or os.environ.get("SYNSEG_STATUS") or ROOT / "nbs" / "status.json")
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) and isinstance(status.get("chapters"), dict) else None


def merged(*statuses):
    "One status of several runs (newest dependencies, Colab): a chapter is ok where it is ok in all, and each failure keeps where it was"
    found = {}
    for status in filter(None, statuses):
        for name, chapter in status["chapters"].items():
            at = dict(chapter, date=status.get("date"), environment=status.get("environment"))
            if name not in found or found[name].get("ok") and not chapter.get("ok"):
                found[name] = at
    dates = [s["date"] for s in statuses if s and s.get("date")]
    return dict(date=max(dates, default=None), environment="all", chapters=found)


def badge(name, status):
    "HTML for the top of the page `name` (with or without .ipynb); empty where it ran, is unknown, or there is no status"
    chapter = ((status or {}).get("chapters") or {}).get(re.sub(r"\.ipynb$", "", str(name)))
    if not isinstance(chapter, dict) or chapter.get("ok", True):
        return ""
    date, where = (html.escape(str(chapter.get(k) or status.get(k) or "an unknown date")) for k in ("date", "environment"))
    said = str(chapter.get("error") or "").strip().splitlines()
    why = f" <code>{html.escape(said[-1][:160])}</code>" if said else ""
    return (f'<div class="callout callout-warning chapter-failed" role="note"><p><strong>This chapter failed on {date} with {where}.</strong> '
            f"What is shown below is from its last good run.{why}</p></div>")


def main():
    parser = argparse.ArgumentParser(description="Merge status files of several runs into one")
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    both = save(args.to, merged(*map(read_status, args.paths)))
    bad = [name for name, c in both["chapters"].items() if not c.get("ok")]
    print(f"{len(both['chapters'])} chapters, {len(bad)} failed" + "".join(f"\n  {name}" for name in bad))


if __name__ == "__main__":
    main()
