"""Execute the course on the embedded scenes and say what each chapter found and where its figures are."""
import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from outputs import ROOT, execute  # noqa: E402
from status import write_status  # noqa: E402

OUT = ROOT / "course-out"
ENVIRONMENT = os.environ.get("SYNSEG_ENVIRONMENT", "the newest dependencies")


def headline(nb):
    "The last line printed as 'Headline: ...', or the chapter's own one-line description"
    text = "\n".join(o.text for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")
    found = re.findall(r"^Headline:\s*(.+)$", text, re.M)
    return found[-1] if found else ""


def save_figures(nb, folder):
    "Write every PNG of a notebook; returns how many there are"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = [o.data["image/png"] for c in nb.cells if c.cell_type == "code" for o in c.outputs
                if "image/png" in o.get("data", {})]
    for k, data in enumerate(pictures, 1):
        (folder / f"{k:02d}.png").write_bytes(base64.b64decode(data))
    return len(pictures)


def main():
    os.environ.update(PYTHONPATH=str(ROOT), TQDM_DISABLE="1")
    OUT.mkdir(exist_ok=True)
    wanted = sys.argv[1:]
    paths = [p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not wanted or any(w in p.name for w in wanted)]
    failed, total, ran = [], 0.0, {}
    print(f"{'chapter':<20} {'seconds':>7} {'figures':>7}  headline", flush=True)
    for path in paths:
        began = time.perf_counter()
        try:
            nb, seconds = execute(path)
        except CellExecutionError as error:
            failed.append(path.stem)
            lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
            ran[path.stem] = dict(ok=False, seconds=round(time.perf_counter() - began, 1), error=lines[-1] if lines else type(error).__name__)
            write_status(OUT / "status.json", ran, ENVIRONMENT)
            print(f"{path.stem:<20} {'FAILED':>7}\n{str(error)[-2000:]}", flush=True)
            continue
        nbformat.write(nb, OUT / path.name)
        figures = save_figures(nb, OUT / "figures" / path.stem)
        total += seconds
        ran[path.stem] = dict(ok=True, seconds=round(seconds, 1))
        write_status(OUT / "status.json", ran, ENVIRONMENT)  # after each, so that a run that is cut off has said something
        print(f"{path.stem:<20} {seconds:7.1f} {figures:7d}  {headline(nb)}", flush=True)
    print(f"\n{len(paths) - len(failed)} chapters in {total/60:.1f} minutes.")
    print(f"Executed notebooks: {OUT}\nFigures:            {OUT / 'figures'}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
