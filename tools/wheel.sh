#!/bin/sh
# Build wheel and sdist, install the wheel into an environment of its own, and use it there as a user would.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m build --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { tail -40 "$work/build.log"; exit 1; }
ls -l "$work/dist"
"${BASE_PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --progress-bar off "$work"/dist/*.whl
cd "$work"
bin="$work/env/bin"
"$bin/synseg" doctor
"$bin/synseg" models
"$bin/synseg" train --model unet_small --data scenes --epochs 1 --size 64x96 --images 64 --out runs/first
"$bin/python" - <<'PY'
from PIL import Image
from synseg import Scenes
Image.fromarray(Scenes(1, size=(240, 320), domain="camera", seed=9).raw(0)[0]).save("photo.jpg")
PY
"$bin/synseg" predict photo.jpg --out first
test -f first/photo_overlay.png
"$bin/synseg" predict runs/first photo.jpg --out out
ls out
test "$(ls out | wc -l)" -ge 3
"$bin/synseg" predict scenes photo.jpg --out refined --crf dense
"$bin/synseg" predict scenes photo.jpg --out refined --crf conv
"$bin/synseg" benchmark
"$bin/synseg" benchmark kmeans crf --size 48x64 --rounds 1 --json | "$bin/python" -c "import json,sys; print('benchmarks', sorted(json.load(sys.stdin)))"
"$bin/synseg" evaluate runs/first --data scenes --images 16 --json | "$bin/python" -c "import json,sys; print('mean IoU', json.load(sys.stdin)['mean_iou'])"
"$bin/synseg" notebooks course
test -f course/00_core.ipynb -o -f course/nbs/00_core.ipynb
"$bin/python" -c "import synseg, sys; assert not {'nbdev','fastcore'} & set(sys.modules); print('synseg', synseg.__version__, 'from the wheel')"
"$bin/python" -c "from synseg import load_result; assert load_result('camvid_metric_reference')['metrics']['images'] == 101; print('recorded results: in the wheel')"
echo "wheel: ok"
