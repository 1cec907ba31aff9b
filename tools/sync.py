"""Check that notebooks and exported code agree, that notebooks are clean, and that README.md is what index.ipynb says.

Works on a copy, so that the working tree is left as it is.
"""
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORE = shutil.ignore_patterns(".git", ".venv", "__pycache__", "_proc", "_docs", "build", "dist", "runs", "course-out",
                                "*.egg-info", ".ipynb_checkpoints")


def differing(copy):
    "Files under nbs/ and synseg/, and README.md, that export, cleaning or rendering would change"
    found = []
    for pattern in ("nbs/*.ipynb", "synseg/**/*.py", "README.md"):
        names = {p.relative_to(base) for base in (ROOT, copy) for p in base.glob(pattern) if "__pycache__" not in p.parts}
        for name in sorted(names):
            ours, theirs = ROOT / name, copy / name
            if not (ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)):
                found.append(str(name))
    return found


def out_of_order():
    "Notebooks whose cells were not run from top to bottom, or that store an error"
    found = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        counts = [c["execution_count"] for c in cells if c.get("execution_count")]
        errors = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        if counts != sorted(counts) or errors:
            found.append(path.name)
    return found


def main():
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "synseg"
        shutil.copytree(ROOT, copy, ignore=IGNORE, symlinks=True)
        here = Path(sys.executable).parent
        for command in (["nbdev_export"], ["nbdev_clean"], [sys.executable, "tools/readme.py"]):
            program = command[0] if Path(command[0]).is_absolute() else str(here / command[0])
            subprocess.run([program, *command[1:]], cwd=copy, check=True)
        changed = differing(copy)
    bad = out_of_order()
    if changed:
        print("Export, cleaning or rendering would change these: run nbdev_export, nbdev_clean and tools/readme.py:")
        print("\n".join(f"  {name}" for name in changed))
    if bad:
        print("Not executed top to bottom, or an error is stored:", ", ".join(bad))
    if changed or bad:
        sys.exit(1)
    print("sync: exported code, notebooks and README agree")


if __name__ == "__main__":
    main()
