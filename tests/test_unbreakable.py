"Whatever comes in: public functions on drawn input, loaders on spoiled files, savers killed at random moments"
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from synseg.conv_crf import ConvCRF
from synseg.dense_crf import DenseCRF
from synseg.files import read_image, read_label, unpack
from synseg.inference import as_image, predict
from synseg.kmeans import KMeansSegmenter
from synseg.labels import label_space
from synseg.losses import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszSoftmaxLoss
from synseg.metrics import ConfusionMatrix, boundary_iou, trimap_iou
from synseg.runstate import load_state, save_state
from synseg.scenes import Scenes
from synseg.transforms import train_transforms
from synseg.zoo import create_model, load_model, read_card, save_model

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ROOT = Path(__file__).resolve().parents[1]
LOSSES = [CrossEntropyLoss, FocalLoss, DiceLoss, LovaszSoftmaxLoss]
DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


@st.composite
def label_maps(draw, smallest=1, largest=9):
    "(truth, prediction, K): any size from one pixel, any share of void, any integer type, whole or strided in memory"
    n, h, w = (draw(st.integers(a, b)) for a, b in ((1, 3), (smallest, largest), (smallest, largest)))
    classes, void, dtype = draw(st.integers(1, 12)), draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from(DTYPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    truth, answer = (torch.randint(0, classes, (n, h, 2*w), generator=rng) for _ in range(2))
    truth[torch.rand(truth.shape, generator=rng) < void] = 255
    cut = (slice(None), slice(None), slice(None, None, 2)) if draw(st.booleans()) else (slice(None), slice(None), slice(w))
    return truth[cut].to(dtype), answer[cut].to(dtype), classes


@QUICK
@given(label_maps())
def test_counts_of_any_labels(case):
    truth, answer, classes = case
    matrix = ConfusionMatrix(classes).update(answer, truth)
    known = truth != 255
    assert int(matrix.counts[:classes].sum()) == int(known.sum())
    assert int(matrix.counts[:classes].diag().sum()) == int((answer[known] == truth[known]).sum())
    for score in (matrix.pixel_accuracy, matrix.mean_iou):
        value = score() if callable(score) else score
        assert np.isnan(float(value)) if not known.any() else 0 <= float(value) <= 1
    parts = [ConfusionMatrix(classes).update(answer[i:i + 1], truth[i:i + 1]) for i in range(len(truth))]
    assert torch.equal(parts[0].merge(*parts[1:]).counts, matrix.counts)


@QUICK
@given(label_maps(), st.integers(1, 12))
def test_bands_of_any_labels(case, width):
    truth, answer, classes = case
    for value in (trimap_iou(answer, truth, width), boundary_iou(answer, truth, width)):
        value = float(value[0] if isinstance(value, tuple) else value)
        assert np.isnan(value) or 0 <= value <= 1


@QUICK
@given(label_maps(), st.sampled_from(LOSSES), st.sampled_from([0.0, 1.0, 30.0, 1e4]), st.booleans())
def test_losses_of_any_logits(case, loss, scale, double):
    truth, _, classes = case
    if classes < 2: return
    logits = (scale*torch.randn(len(truth), classes, *truth.shape[1:], generator=torch.Generator().manual_seed(0),
                                dtype=torch.float64 if double else torch.float32)).requires_grad_()
    value = loss()(logits, truth.long())
    value.backward()
    assert value.ndim == 0 and value.isfinite() and value >= -1e-6 and logits.grad.isfinite().all()
    assert not logits.grad[(truth == 255)[:, None].expand_as(logits)].any()
    if (truth == 255).all(): assert value == 0


@QUICK
@given(st.integers(8, 40), st.integers(8, 40), st.integers(2, 6), st.sampled_from([1.0, 50.0]), st.sampled_from(["noise", "black", "white"]))
def test_fields_give_probabilities(height, width, classes, scale, look):
    rng = torch.Generator().manual_seed(height*width)
    image = {"noise": torch.rand(1, 3, height, width, generator=rng), "black": torch.zeros(1, 3, height, width), "white": torch.ones(1, 3, height, width)}[look]
    log_probs = (scale*torch.randn(1, classes, height, width, generator=rng)).log_softmax(1)
    for field in (DenseCRF(classes, iterations=2), ConvCRF(classes, 5, iterations=2)):
        found = field(log_probs, image)
        assert found.shape == log_probs.shape and found.isfinite().all() and (found >= 0).all()
        torch.testing.assert_close(found.sum(1), torch.ones(1, height, width), rtol=1e-4, atol=1e-4)


@QUICK
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 6), st.sampled_from(["noise", "flat"]))
def test_kmeans_on_any_picture(height, width, k, look):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(k)) if look == "noise" else torch.full((3, height, width), 0.5)
    try: found = KMeansSegmenter(min(k, height*width))(image)
    except ValueError as error: assert "cluster" in str(error) or "colour" in str(error) or "pixel" in str(error)
    else: assert found.shape == (height, width) and found.dtype == torch.int64 and 0 <= found.min() and found.max() < k


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return create_model("unet_small", 5, width=4).eval()


@QUICK
@given(st.integers(64, 150), st.integers(64, 150), st.sampled_from([None, 64, 96]), st.booleans(), st.sampled_from(["tensor", "uint8", "pil", "grey"]))
def test_predict_takes_any_picture(net, height, width, tile, tta, kind):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = {"tensor": torch.from_numpy(pixels).movedim(-1, 0)/255, "uint8": pixels, "pil": Image.fromarray(pixels), "grey": pixels[..., 0]}[kind]
    labels = predict(net, image, tile=tile, tta=tta)
    assert labels.shape == (height, width) and labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() < 5


@QUICK
@given(st.integers(0, 2), st.integers(0, 70), st.integers(0, 70), st.sampled_from([float("nan"), float("inf"), -float("inf"), 7.0, -1.0]))
def test_pixels_that_are_no_colours_are_refused(net, channel, y, x, value):
    image = torch.rand(3, 71, 71, generator=torch.Generator().manual_seed(0))
    image[channel, y, x] = value
    with pytest.raises(ValueError): predict(net, as_image(image))


@QUICK
@given(st.integers(64, 100), st.integers(64, 100), st.integers(0, 1000))
def test_augmentation_keeps_the_contracts(height, width, seed):
    torch.manual_seed(seed)
    image, label = train_transforms((height, width))(*Scenes(1, (96, 128), seed=seed).raw(0))
    assert image.shape == (3, height, width) and label.shape == (height, width)
    assert 0 <= image.min() and image.max() <= 1 and ((label < 11) | (label == 255)).all()


@QUICK
@given(st.sampled_from(["camvid", "cityscapes", "voc2012", "scenes"]), st.integers(0, 255), st.integers(1, 5), st.integers(1, 5))
def test_every_byte_is_a_label_or_refused(name, value, height, width):
    space = label_space(name)
    try: labels = torch.as_tensor(space.from_disk(np.full((height, width), value, np.uint8)))
    except ValueError as error: assert str(value) in str(error)
    else: assert ((labels < space.num_classes) | (labels == 255)).all()


# Spoiled files

def spoil(content: bytes, rng: random.Random) -> bytes:
    "One of: a byte changed, a stretch overwritten, cut, doubled, replaced"
    data, at = bytearray(content), rng.randrange(len(content))
    kind = rng.choice(["byte", "stretch", "cut", "doubled", "noise", "zeros"])
    if kind == "byte": data[at] ^= rng.randrange(1, 256)
    elif kind == "stretch": data[at:at + 40] = rng.randbytes(len(data[at:at + 40]))
    elif kind == "cut": del data[at:]
    elif kind == "doubled": data = data*2
    elif kind == "noise": data = bytearray(rng.randbytes(min(len(data), 2000)))
    else: data[at:] = bytes(len(data) - at)
    return bytes(data)


def reads_or_explains(read, path: Path, content: bytes, rounds: int) -> int:
    "How many spoiled copies were refused; each is read or refused by a ValueError, nothing else"
    rng, refused = random.Random(0), 0
    for _ in range(rounds):
        path.write_bytes(spoil(content, rng))
        try: read(path)
        except ValueError as error:
            refused += 1
            assert len(str(error)) > 10
    return refused


@pytest.mark.parametrize("rounds", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_spoiled_checkpoints(tmp_path, rounds):
    whole = save_model(create_model("unet_small", 3, width=2), tmp_path/"whole.safetensors").read_bytes()
    for read in (load_model, read_card):
        assert reads_or_explains(read, tmp_path/"bad.safetensors", whole, rounds) > rounds/10


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_spoiled_states(tmp_path, rounds):
    state = dict(progress=dict(step=3), model={"w": torch.randn(5, 5)}, config={})
    whole = save_state(state, tmp_path/"whole.pt").read_bytes()
    assert reads_or_explains(load_state, tmp_path/"bad.pt", whole, rounds) > rounds/10


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "gif"])
def test_spoiled_pictures(tmp_path, suffix):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 11, (40, 50), dtype=np.uint8))
    picture.save(tmp_path/f"whole.{suffix}")
    whole = (tmp_path/f"whole.{suffix}").read_bytes()
    for read in (read_image, read_label): assert reads_or_explains(read, tmp_path/f"bad.{suffix}", whole, 60) > 5


def test_spoiled_archives_leave_nothing_outside(tmp_path):
    with zipfile.ZipFile(tmp_path/"whole.zip", "w") as z:
        for i in range(4): z.writestr(f"folder/{i}.txt", "x"*300)
    whole, inside = (tmp_path/"whole.zip").read_bytes(), tmp_path/"inside"
    read = lambda path: unpack(path, inside)
    assert reads_or_explains(read, tmp_path/"bad.zip", whole, 80) > 10
    assert {p.name for p in tmp_path.iterdir()} <= {"whole.zip", "bad.zip", "inside"}


@pytest.mark.parametrize("name", ["../up.txt", "/tmp/root.txt", "a/../../up.txt"])
def test_archives_that_climb_out(tmp_path, name):
    with zipfile.ZipFile(tmp_path/"climb.zip", "w") as z: z.writestr(name, "gotcha")
    with pytest.raises(ValueError): unpack(tmp_path/"climb.zip", tmp_path/"inside")
    assert not (tmp_path/"up.txt").exists() and not Path("/tmp/root.txt").exists()


class Payload:
    def __reduce__(self): return os.system, ("touch gotcha",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(progress=Payload()), tmp_path/"state.pt")
    torch.save(Payload(), tmp_path/"model.safetensors")
    for call in (lambda: load_state(tmp_path/"state.pt"), lambda: load_model(tmp_path/"model.safetensors"),
                 lambda: create_model("unet", 3, encoder="mobilenet_v2", encoder_weights=tmp_path/"state.pt")):
        with pytest.raises(ValueError): call()
    assert not (tmp_path/"gotcha").exists()


# Killed at random moments

SAVER = """
import sys, torch
from synseg.runstate import save_state
from synseg.zoo import create_model, save_model
net = create_model("unet_small", 5, width=16)
i = 0
while True:
    i += 1
    save_state(dict(progress=dict(step=i), model={"w": torch.full((400_000,), float(i))}), "state.pt")
    save_model(net, "model.safetensors", extra=dict(step=i))
    if i == 1: print("saved", flush=True)
"""


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, times):
    rng, steps = random.Random(times), []
    for _ in range(times):
        writer = subprocess.Popen([sys.executable, "-c", SAVER], cwd=tmp_path, stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        assert writer.stdout.readline() == b"saved\n"
        time.sleep(rng.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        state = load_state(tmp_path/"state.pt")
        assert (state["model"]["w"] == state["progress"]["step"]).all()
        assert abs(load_model(tmp_path/"model.safetensors").card.extra["step"] - state["progress"]["step"]) <= 1
        steps.append(state["progress"]["step"])
    assert len(set(steps)) > 1, "the moments were not random"


TRAINER = """
import sys
from synseg.train import Learner
from synseg.scenes import Scenes
from synseg.core import seed_everything
from synseg.zoo import create_model
from pathlib import Path
out = Path(sys.argv[1])
seed_everything(0)
run = Learner(create_model("unet_small", 11, width=4), Scenes(12, (64, 64)), batch_size=4, out=out, progress=False, save_every=1)
if (out/"state.pt").exists(): run.resume()
print("on", flush=True)
run.fit(6)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_training_ends_the_same(tmp_path, kills):
    environment, rng = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), random.Random(1)
    whole, out, done = tmp_path/"whole", tmp_path/"killed", 0

    def started(folder):
        run = subprocess.Popen([sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE, env=environment)
        assert run.stdout.readline() == b"on\n"
        return run

    def finished(run): return run.communicate() and run.returncode == 0

    assert finished(started(whole))
    while done < kills:
        run = started(out)
        try: run.wait(timeout=rng.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            done += 1
        run.communicate()
        if (out/"state.pt").exists(): load_state(out)  # the last checkpoint is whole, whenever the run died
        if done < kills and run.returncode == 0: shutil.rmtree(out)  # it got through: begin anew
    assert finished(started(out))
    assert (out/"last.safetensors").read_bytes() == (whole/"last.safetensors").read_bytes()
