"""Every network learns on a GPU, in bfloat16 and in float32; what it needs there is kept beside what a CPU needs.

    pytest -m gpu tests/test_gpu.py                    all names on the first CUDA device
    SYNSEG_RECORD=1 pytest -m gpu tests/test_gpu.py    and writes results/gpu_training.json
"""
import os
import time

import pytest
import torch
from test_zoo import SMALL

from synseg.core import record_result
from synseg.engine import Engine, adamw
from synseg.losses import CrossEntropyLoss
from synseg.zoo import create_model, list_models, model_info

SIZE, BATCH, STEPS, CLASSES = (256, 320), 2, 16, 5
RATE, SLOW = 3e-4, 1e-4
GENTLE = {"fcn32s", "fcn16s", "fcn8s", "dilated_vgg", "deeplabv1", "deconvnet", "ternausnet"}  # VGGs; at RATE the loss of FCN goes up by six in its third step
ROWS = {}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: run on a machine with a GPU")


def steps(name, precision, size=SIZE, steps=STEPS, batch=BATCH, cpu=False, **options):
    "Train on one batch on the device that Accelerate finds (or the CPU): losses, images per second of the second half, peak MB"
    torch.manual_seed(0)
    model = create_model(name, CLASSES, model_info(name).in_channels, **options)
    images = torch.rand(batch, model.in_channels, *size)
    labels = (images.mean(1)*2*CLASSES - CLASSES/2).long().clamp(0, CLASSES - 2)  # brightness decides; one class never occurs
    labels[:, :5] = 255
    engine = Engine(model, CrossEntropyLoss(), lambda m: adamw(m, SLOW if name in GENTLE else RATE), precision=precision, clip=1.0)
    device = engine.device
    if cpu:
        device = engine.device = torch.device("cpu")
        engine.model.to(device)
        engine.loss.to(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    images, labels, losses = images.to(device), labels.to(device), []
    engine.begin()
    engine.model.train()
    for i in range(steps):
        if i == steps//2:
            losses[-1].item() if losses else None  # waits for the device
            start = time.perf_counter()
        losses.append(engine.step(1.0, images, labels))
    losses = [float(v) for v in losses]
    speed = batch*(steps - steps//2)/(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()/2**20 if cuda else None
    return dict(losses=losses, images_per_second=speed, peak_mb=peak, device=device.type)


def check(found):
    losses = torch.tensor(found["losses"])
    assert losses.isfinite().all(), losses
    assert losses[-3:].mean() < losses[:2].mean(), f"the loss did not fall: {losses.tolist()}"


@pytest.fixture(scope="module", autouse=True)
def record():
    "Writes what was measured, where SYNSEG_RECORD asks for it"
    yield
    if ROWS and os.environ.get("SYNSEG_RECORD"):
        record_result("gpu_training", dict(size=SIZE, batch=BATCH, steps=STEPS, optimizer=f"adamw {RATE:g} ({SLOW:g} for {', '.join(sorted(GENTLE))}), clip 1"), ROWS, seed=0)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", list_models())
def test_learns_on_cuda(name, precision):
    found = steps(name, precision)
    assert found["device"] == "cuda"
    row = ROWS.setdefault(name, {})
    row[precision] = {k: found[k] for k in ("images_per_second", "peak_mb")} | dict(first=found["losses"][0], last=found["losses"][-1])
    if os.environ.get("SYNSEG_RECORD") and "cpu" not in row:
        row["cpu"] = dict(images_per_second=steps(name, "fp32", steps=4, cpu=True)["images_per_second"])
    torch.cuda.empty_cache()
    check(found)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["unet_small", "contextnet_cn14", "enet"])
def test_the_same_on_the_cpu(name, precision):
    "So that what runs on a GPU elsewhere is known to run"
    found = steps(name, precision, size=(64, 96), steps=24, cpu=True, **SMALL[name])
    assert found["device"] == "cpu" and found["images_per_second"] > 0
    check(found)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="sync batch norm needs two CUDA devices")
def test_sync_norms_count_over_both(tmp_path):
    "Two GPUs with synchronised norms give the weights of one with the whole batch"
    import subprocess
    import sys
    from pathlib import Path
    run = [*"-m synseg train --images 8 --epochs 1 --batch-size 4 --size 64x64 --precision fp32 --sync-norms --out".split()]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    subprocess.run([sys.executable, *run, str(tmp_path/"one")], env=dict(env, CUDA_VISIBLE_DEVICES="0"), check=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *run, str(tmp_path/"two")],
                   env=env, check=True)
    from safetensors.torch import load_file
    one, two = (load_file(tmp_path/n/"last.safetensors") for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)
