"""Execute notebooks from top to bottom in a clean kernel and store their outputs.

    python tools/outputs.py                      every notebook, flagged cells keep the outputs they have
    python tools/outputs.py nbs/14_unet.ipynb    one notebook
    python tools/outputs.py --flags slow ...     run the cells flagged slow as well
    python tools/outputs.py --to DIR ...         write the executed copies to DIR, leave nbs/ alone
"""
import argparse
import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("slow", "gpu")
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)


def cell_flags(source):
    "Names of the nbdev directives at the top of a cell"
    return {d.split(":")[0].strip() for d in DIRECTIVE.findall(source)}


def skipped(cell, run):
    "True for a cell that is left as it is: flagged and not asked for, or `eval: false`"
    found = DIRECTIVE.findall(cell.source)
    if any(re.fullmatch(r"eval:\s*false", d) for d in found):
        return True
    return bool((cell_flags(cell.source) & set(FLAGS)) - set(run))


class KeepingClient(NotebookClient):
    "A notebook client that leaves flagged cells, and the outputs they carry, alone"
    run_flags = ()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and skipped(cell, self.run_flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def merge_streams(outputs):
    "Join neighbouring pieces of the same stream and keep only what a carriage return leaves"
    merged = []
    for out in outputs:
        if merged and out.output_type == "stream" == merged[-1].output_type and out.name == merged[-1].name:
            merged[-1].text += out.text
        else:
            merged.append(out)
    for out in merged:
        if out.output_type == "stream":
            out.text = "\n".join(line.rsplit("\r", 1)[-1] for line in out.text.split("\n"))
    return [o for o in merged if not (o.output_type == "stream" and o.name == "stderr")]


def lighter(png, above=30_000):
    "A PNG with 256 well-chosen colours: a third of the bytes, and the eye sees no difference. Small ones only where they are drawings"
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    colours = picture.getcolors(1 << 24)
    drawing = len(colours) < 4000 and max(colours)[0] > 0.3 * picture.width * picture.height
    if not drawing and len(png) * 3 // 4 < above:
        return png
    dither = Image.Dither.NONE if drawing else Image.Dither.FLOYDSTEINBERG
    buffer = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=dither).save(buffer, "PNG", optimize=True)
    small = base64.b64encode(buffer.getvalue()).decode()
    return small if len(small) < 0.8 * len(png) else png


def tidy(nb):
    "Drop what changes from run to run: counts, timings, ids of widgets, stderr"
    for cell in nb.cells:
        cell.metadata = nbformat.NotebookNode({})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = merge_streams(cell.outputs)
        for out in cell.outputs:
            if "image/png" in out.get("data", {}):
                out.data["image/png"] = lighter(out.data["image/png"].replace("\n", ""))
            if "execution_count" in out:
                out.execution_count = None
            if "text/html" in out.get("data", {}) or "text/plain" in out.get("data", {}):
                plain = out.data.get("text/plain", "")
                out.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", plain)
    nb.metadata = nbformat.NotebookNode(
        kernelspec=dict(display_name="python3", language="python", name="python3"))
    return nb


def execute(path, run=(), timeout=3600):
    "The executed notebook and the seconds it took; raises CellExecutionError where a cell fails"
    nb = nbformat.read(path, as_version=4)
    client = KeepingClient(nb, timeout=timeout, kernel_name="python3",
                           extra_arguments=["--IPKernelApp.log_level=40"],  # not its advice on transport encryption
                           resources=dict(metadata=dict(path=str(Path(path).parent))))
    client.run_flags = run
    start = time.perf_counter()
    client.execute()
    return nb, time.perf_counter() - start


def write(nb, path):
    "Write as nbdev does, so that a clean notebook is byte for byte what nbdev_clean leaves"
    from execnb.nbio import write_nb, read_nb
    from nbdev.clean import clean_nb
    temporary = path.with_suffix(".tmp")
    nbformat.write(tidy(nb), temporary)
    light = read_nb(temporary)
    clean_nb(light)
    write_nb(light, temporary)
    json.loads(temporary.read_text(encoding="utf-8"))
    temporary.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="flags to run, as in 'slow gpu'")
    parser.add_argument("--to", type=Path, help="write executed copies here")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.pop("MPLBACKEND", None)  # the kernel's own, which shows figures
    failed = []
    for path in args.paths or sorted((ROOT / "nbs").glob("*.ipynb")):
        try:
            nb, seconds = execute(path, run=args.flags.replace(",", " ").split())
        except CellExecutionError as error:
            failed.append(path.name)
            print(f"{path.name:<28} FAILED\n{str(error)[-3000:]}", flush=True)
            continue
        target = path if args.to is None else args.to / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write(nb, target)
        print(f"{path.name:<28} {seconds:6.1f} s  {target.stat().st_size/1024:6.0f} kB", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
