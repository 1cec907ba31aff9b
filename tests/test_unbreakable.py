"Whatever comes in: public functions on drawn input, loaders on spoiled files, savers killed at random moments"
import contextlib
import errno
import gc
import hashlib
import http.server
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import test_layouts as trees
from synseg.callbacks import Callback, MetricsLog
from synseg.conv_crf import ConvCRF
from synseg.core import load_result, read_json, write_json
from synseg.datasets import load_dataset
from synseg.dense_crf import DenseCRF
from synseg.files import Archive, fetch, read_image, read_label, unpack
from synseg.inference import as_image, predict
from synseg.kmeans import KMeansSegmenter
from synseg.labels import label_space
from synseg.losses import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszSoftmaxLoss
from synseg.metrics import ConfusionMatrix, boundary_iou, trimap_iou
from synseg.pairs import same_plan
from synseg.leaderboard import read_records
from synseg.runs import Run, read_run, train
from synseg.runstate import Diverged, alone_in, load_state, save_state
from synseg.scenes import Scenes
from synseg.show import read_history
from synseg.train import Learner
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
    for value in (trimap_iou(answer, truth, width), boundary_iou(answer, truth, width/50)):
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


def archive(path: Path, members: dict, kind: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items(): z.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{kind}") as t:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["zip", "", "gz", "bz2", "xz"])
def test_spoiled_archives_leave_nothing_outside(tmp_path, kind):
    whole, inside = archive(tmp_path/"whole", {f"folder/{i}.txt": bytes(range(256))*3 for i in range(4)}, kind).read_bytes(), tmp_path/"inside"
    with contextlib.suppress(OSError):  # a header that asks for more bytes than the disk has
        assert reads_or_explains(lambda path: unpack(path, inside), tmp_path/"bad", whole, 80) > 10
    assert {p.name for p in tmp_path.iterdir()} <= {"whole", "bad", "inside"}


@pytest.mark.parametrize("kind", ["zip", "", "gz"])
@pytest.mark.parametrize("name", ["../up.txt", "/tmp/root.txt", "a/../../up.txt", "a/b/../../../up.txt"])
def test_archives_that_climb_out(tmp_path, name, kind):
    with pytest.raises(ValueError, match="outside"): unpack(archive(tmp_path/"climb", {"fine.txt": b"x", name: b"gotcha"}, kind), tmp_path/"inside")
    assert not (tmp_path/"up.txt").exists() and not Path("/tmp/root.txt").exists() and not list((tmp_path/"inside").iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["..", "../secret.txt", "/etc/passwd"])
def test_links_are_no_ladder(tmp_path, kind, target):
    "A link to the outside, and then a file through it"
    (tmp_path/"secret.txt").write_text("mine")
    with tarfile.open(tmp_path/"links.tar", "w") as t:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, target
        t.addfile(link)
        for name in ("link/up.txt", "link"):
            info = tarfile.TarInfo(name)
            info.size = 6
            t.addfile(info, io.BytesIO(b"gotcha"))
        for device in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"device{device!r}")
            info.type = device
            t.addfile(info)
    with contextlib.suppress(ValueError, OSError): unpack(tmp_path/"links.tar", tmp_path/"inside")
    assert (tmp_path/"secret.txt").read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"secret.txt", "links.tar", "inside"}
    assert all(p.is_dir() or p.is_file() and not p.is_symlink() for p in (tmp_path/"inside").rglob("*"))


# Every loader, on tiny trees of which one file is spoiled or gone

def camvid(root):
    trees.image(root/"train/a.png"), trees.label(root/"trainannot/a.png", [0, 3, 11])
    trees.text(root/"train.txt", ["/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png"])


def aug(root):
    trees.voc(root)
    (root/"dataset").mkdir()
    trees.sbd(root/"dataset", ("2008_1",), ("2008_2",))


def cityscapes(root):
    trees.image(root/"leftImg8bit/train/ulm/ulm_0_leftImg8bit.png"), trees.label(root/"gtFine/train/ulm/ulm_0_gtFine_labelIds.png", range(34))


def gta5(root):
    for n in (1, 2): trees.image(root/f"images/{n:05d}.png"), trees.label(root/f"labels/{n:05d}.png", range(34))
    trees.savemat(root/"split.mat", dict(trainIds=np.array([[1], [2]]), valIds=np.array([[2]]), testIds=np.array([[2]])))


def coco(root): trees.image(root/"train2017/1.jpg"), trees.label(root/"stuffthingmaps/train2017/1.png", [0, 91, 181, 255])


def isbi(root):
    for n in range(3): trees.image(root/f"train/image/{n}.png", trees.IMAGE[..., 0]), trees.label(root/f"train/label/{n}.png", [0, 255])


def stacks(root):
    for name in ("train-volume", "train-labels"):
        first, *rest = (Image.fromarray(np.full((6, 8), 255*(n % 2), np.uint8)) for n in range(30))
        first.save(root/f"{name}.tif", save_all=True, append_images=rest)


def own(root):
    trees.folder(root/"train", 2)
    (root/"label_space.json").write_text(json.dumps(dict(names=["a", "b", "c"], palette=[[0, 0, 0], [1, 2, 3], [9, 9, 9]], ids=[0, 1, 2])))


TREES = {"voc2012": trees.voc, "sbd": lambda root: (root/"dataset").mkdir() or trees.sbd(root/"dataset", ("2008_1",), ("2008_2",)), "voc2012_aug": aug, "cityscapes": cityscapes,
         "gta5": gta5, "camvid": camvid, "coco_stuff": coco, "isbi2012": isbi, "isbi2012 stacks": stacks, "folder": own, "folder lists": lambda root: trees.folder(root, 2) and trees.text(root/"train.txt", ["p0", "p1"])}


@pytest.mark.parametrize("rounds", [60, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TREES)
def test_spoiled_data_sets(tmp_path, name, rounds):
    TREES[name](tmp_path)
    files, rng, refused = sorted(p for p in tmp_path.rglob("*") if p.is_file()), random.Random(0), 0
    load = lambda: [pair for data in [load_dataset(name.split()[0], tmp_path, "train")] for pair in (data[i] for i in range(min(2, len(data))))]
    assert load()
    for _ in range(rounds):
        file = rng.choice(files)
        whole = file.read_bytes()
        if rng.random() < 0.1: file.unlink()
        else: file.write_bytes(spoil(whole, rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # listed images that are not there are left out with a warning
                for image, label in load(): assert 0 <= image.min() and image.max() <= 1 and ((label < 255) | (label == 255)).all() and image.shape[1:] == label.shape
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert len(str(error)) > 20 and ("/" in str(error) or "lists" in str(error)), error
        file.write_bytes(whole)
    assert refused > rounds/10 and load()


RUN = dict(format=2, run=dict(model="unet_small", data="scenes", size=[64, 64], epochs=3, lr=0.1, options={"width": 4}), root=None)
ROWS = [dict(epoch=i + 1, loss=0.5, mean_iou=0.25, iou={"sky": 0.5, "road": None}) for i in range(4)]
RECORD = dict(name="x", config=dict(runs=dict(run=dict(data="camvid", model="unet_small"))), metrics=dict(mean_iou=0.5), machine={}, seed=None)
READERS = {"run.json": (RUN, lambda path: read_run(path.parent)), "metrics.jsonl": (ROWS, read_history), "plan.json": (dict(a=1, b=[1, 2]), lambda path: same_plan(path, dict(a=1, b=[1, 2]))),
           "results/x.json": (RECORD, lambda path: load_result("x")), "results/y.json": (RECORD, lambda path: read_records(path.parent)), "any.json": (RUN, read_json)}


@pytest.mark.parametrize("rounds", [150, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_spoiled_text(tmp_path, monkeypatch, name, rounds):
    monkeypatch.chdir(tmp_path)
    content, read = READERS[name]
    (tmp_path/name).parent.mkdir(exist_ok=True)
    whole = "".join(json.dumps(r) + "\n" for r in content) if name.endswith("l") else json.dumps(content)
    (tmp_path/name).write_text(whole)
    read(tmp_path/name)
    refused = reads_or_explains(read, tmp_path/name, whole.encode(), rounds)
    for junk in (b"[]", b"3", b"null", b"{}", b"[" * 100_000, b'{"run": 3}', b'{"run": {"size": 3}}', b'{"run": {"epochs": "many"}}', b'{"config": 3, "metrics": 3}', b'{"config": {"runs": 3}}'):
        (tmp_path/name).write_bytes(junk)
        try: read(tmp_path/name)
        except ValueError as error: assert len(str(error)) > 20
    assert refused > rounds/10


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


# Disks that are full or closed, and downloads that break off

def savers(folder: Path) -> dict:
    "What writes, by name; each overwrites what the one before wrote"
    net, state = create_model("unet_small", 3, width=64), dict(progress=dict(step=1), model={"w": torch.zeros(400_000)}, config={})
    return {"m.safetensors": lambda: save_model(net, folder/"m.safetensors"), "state.pt": lambda: save_state(state, folder/"state.pt"),
            "x.json": lambda: write_json(folder/"x.json", dict(x=["0"*50]*30_000)), "metrics.jsonl": lambda: MetricsLog(folder/"metrics.jsonl").replace([dict(x="0"*100)]*15_000)}


@pytest.mark.parametrize("name", ["m.safetensors", "state.pt", "x.json", "metrics.jsonl"])
def test_a_full_disk_of_one_megabyte(tmp_path, name):
    (disk := tmp_path/"disk").mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; the test below pretends")
    try:
        (disk/name).write_bytes(b"the file of before")
        with pytest.raises(OSError, match="space|could not|No space"): savers(disk)[name]()
        assert (disk/name).read_bytes() == b"the file of before" and [p.name for p in disk.iterdir()] == [name]
    finally: subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["m.safetensors", "state.pt", "x.json", "metrics.jsonl"])
def test_a_disk_that_fills_up_while_writing(tmp_path, name, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path/name).write_bytes(b"the file of before")
    monkeypatch.setattr(os, "replace", full)  # the last moment at which it can fail
    with pytest.raises(OSError, match="No space left"): savers(tmp_path)[name]()
    assert (tmp_path/name).read_bytes() == b"the file of before" and [p.name for p in tmp_path.iterdir()] == [name]


@contextlib.contextmanager
def closed_folder():
    "A folder that this process cannot write to, root or not: root becomes nobody for a while"
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    (folder/"m.safetensors").write_bytes(b"the file of before")
    folder.chmod(0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield folder
    finally:
        if root: os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no such folders there")
def test_a_folder_that_is_closed():
    net, scenes = create_model("unet_small", 11, width=1), Scenes(2, (64, 64))
    with closed_folder() as folder:
        for name, save in savers(folder).items():
            with pytest.raises(OSError, match="ermission denied|could not"): save()
        with pytest.raises(OSError, match="ermission denied|could not"): Learner(net, scenes, batch_size=2, out=folder, progress=False).fit(1)
        with pytest.raises(OSError, match="ermission denied"): train(Run(images=2, size=(64, 64), epochs=1), folder/"run", progress=False)
        assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("m.safetensors", b"the file of before")]


@pytest.fixture
def breaking(tmp_path):
    "A server that breaks off in mid-file as often as `left` says, and how often it was asked"
    content = random.Random(0).randbytes(200_000)
    class Breaking(http.server.BaseHTTPRequestHandler):
        left, asked = 1, 0
        def do_GET(self):
            Breaking.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            cut = Breaking.left > 0
            Breaking.left -= cut
            self.wfile.write(content[:70_000] if cut else content)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Breaking, Archive("data.bin", hashlib.sha256(content).hexdigest(), len(content), (f"http://127.0.0.1:{server.server_port}/data.bin",)), content
    server.shutdown()


def test_a_download_that_breaks_off_is_tried_again(tmp_path, breaking):
    server, file, content = breaking
    assert fetch(file, tmp_path/"root", progress=False).read_bytes() == content and server.asked == 2


def test_nothing_half_has_the_right_name(tmp_path, breaking):
    server, file, content = breaking
    server.left = 99
    with pytest.raises(FileNotFoundError, match="could not be downloaded"): fetch(file, tmp_path/"root", progress=False)
    wrong = Archive(file.file, "0"*64, file.size, file.urls)
    server.left = 0
    with pytest.raises(FileNotFoundError, match="SHA-256"): fetch(wrong, tmp_path/"root", progress=False)
    assert not list((tmp_path/"root").iterdir())
    (tmp_path/"root"/file.file).write_bytes(content[:70_000])  # as some other program may have left it
    assert fetch(file, tmp_path/"root", progress=False).read_bytes() == content


# Two runs in one folder

ENDLESS = """
import sys
from pathlib import Path
from synseg.callbacks import Callback
from synseg.scenes import Scenes
from synseg.train import Learner
from synseg.zoo import create_model
class Say(Callback):
    def on_start(self, learner): print("on", flush=True)
Learner(create_model("unet_small", 11, width=1), Scenes(4, (64, 64)), batch_size=2, out=Path(sys.argv[1]), progress=False, callbacks=[Say()]).fit(minutes=5)
"""


def test_two_runs_in_one_folder(tmp_path):
    "The second is refused and changes nothing; when the first is killed, even with -9, the folder is free"
    environment, out = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), tmp_path/"run"
    first = subprocess.Popen([sys.executable, "-c", ENDLESS, str(out)], stdout=subprocess.PIPE, env=environment)
    second = lambda: Learner(create_model("unet_small", 11, width=1), Scenes(4, (64, 64)), batch_size=2, out=out, progress=False)
    try:
        assert first.stdout.readline() == b"on\n"
        with pytest.raises(ValueError, match="another run is at work in .*--out"): second().fit(1)
        if not (out/"state.pt").exists():
            with pytest.raises(ValueError, match="another run is at work"): train(Run(images=2, size=(64, 64), epochs=1), out, progress=False)
        assert not (out/"run.json").exists() and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert second().fit(1).progress.epoch == 1


def test_a_folder_is_held_once_and_let_go(tmp_path):
    with alone_in(tmp_path/"new"):
        with pytest.raises(ValueError, match="another run"):
            with alone_in(tmp_path/"new"): pass
        with alone_in(tmp_path), alone_in(None): pass
    with pytest.raises(KeyError):
        with alone_in(tmp_path/"new"): raise KeyError
    with alone_in(tmp_path/"new"): pass
    assert not list((tmp_path/"new").iterdir()) or sys.platform == "win32"


# NaN in mid-training, and memory

class Poisoned(torch.utils.data.Dataset):
    "Good pictures, and from the `after`-th item on (the four of samples.png count) one that holds a NaN or infinity"
    label_space, count = label_space("scenes"), 0
    def __init__(self, value: float, after: int): self.value, self.after, self.scenes = value, after, Scenes(4, (64, 64))
    def __len__(self): return 4
    def __getitem__(self, i):
        image, label = self.scenes[i]
        self.count += 1
        if self.count > self.after: image[0, 5, 5] = self.value
        return image, label


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_no_number_stops_training_and_the_last_state_stands(tmp_path, value):
    torch.manual_seed(0)
    learner = Learner(create_model("unet_small", 11, width=2), Poisoned(value, 8), batch_size=2, out=tmp_path, progress=False, class_weights=None)
    with pytest.raises(Diverged, match="the loss is nan at step .*NaN in the images.*last good state is in"): learner.fit(5)
    state = load_state(tmp_path)
    assert state["progress"]["step"] == 2 and all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())
    with pytest.raises(ValueError, match="training images"): Learner(create_model("unet_small", 11, width=2), Poisoned(value, 0), batch_size=2, progress=False, class_weights=None).fit(1)


class Memory(Callback):
    "Megabytes of this process, every 10th step"
    def __init__(self): self.seen = []
    def on_step(self, learner):
        if learner.progress.step % 10 == 0: self.seen.append(int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")/1e6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(tmp_path, steps, record_property):
    memory, kept = Memory(), [Scenes(20, (64, 64))[i] for i in range(20)]
    class Kept(torch.utils.data.Dataset):
        label_space = label_space("scenes")
        def __len__(self): return len(kept)
        def __getitem__(self, i): return kept[i]
    learner = Learner(create_model("unet_small", 11, width=1), Kept(), batch_size=1, out=tmp_path, progress=False, callbacks=[memory])
    gc.collect()
    learner.fit(steps//20)
    fifth = len(memory.seen)//5
    begin, end = (sorted(part)[len(part)//2] for part in (memory.seen[fifth:2*fifth], memory.seen[-fifth:]))
    record_property("memory", dict(steps=learner.progress.step, megabytes_after_a_fifth=round(begin, 1), megabytes_at_the_end=round(end, 1)))
    assert learner.progress.step == steps and end - begin < 10, f"{begin:.1f} MB grew to {end:.1f} MB"


# Killed at random moments

class Nursery:
    """A process that has imported everything once and forks a fresh child for each `begin`; the child says "on" when its work begins,
    and is killed there: so the kills hit saving and training, not the import of PyTorch"""
    CODE = """
import os, sys, traceback
{work}
for line in sys.stdin:
    if (child := os.fork()) == 0:
        try: work(line.strip()); os._exit(0)
        except BaseException: traceback.print_exc(); os._exit(1)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    def __init__(self, work: str, folder: Path):
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE.format(work=work)], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    def __enter__(self): return self
    def __exit__(self, *failure):
        self.process.kill()
        self.process.communicate()

    def run(self, argument: str, kill_after: float | None = None) -> int:
        "0 where the child came to its end, -9 where it was killed"
        self.process.stdin.write(f"{argument}\n".encode())
        word, child = self.process.stdout.readline().split()
        assert word == b"on"
        if kill_after is not None and not select.select([self.process.stdout], [], [], kill_after)[0]:  # else it came to its end before
            with contextlib.suppress(ProcessLookupError): os.kill(int(child), signal.SIGKILL)
        word, code = self.process.stdout.readline().split()
        assert word == b"ended"
        return int(code)


FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SAVER = """
import torch
from synseg.runstate import save_state
from synseg.zoo import create_model, save_model
def work(argument):
    net, i = create_model("unet_small", 5, width=16), 0
    while True:
        i += 1
        save_state(dict(progress=dict(step=i), model={"w": torch.full((400_000,), float(i))}), "state.pt")
        save_model(net, "model.safetensors", extra=dict(step=i))
        if i == 1: print("on", os.getpid(), flush=True)
"""


@FORKS
@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, times, record_property):
    rng, steps = random.Random(times), []
    with Nursery(SAVER, tmp_path) as nursery:
        for _ in range(times):
            assert nursery.run("", rng.uniform(0, 0.2)) == -signal.SIGKILL
            state = load_state(tmp_path/"state.pt")
            assert (state["model"]["w"] == state["progress"]["step"]).all()
            assert abs(load_model(tmp_path/"model.safetensors").card.extra["step"] - state["progress"]["step"]) <= 1
            steps.append(state["progress"]["step"])
    record_property("saving", dict(kills=times, files_checked=2*times, failures=0, saves=sum(steps)))
    assert len(set(steps)) > 1, "the moments were not random"


TRAINER = """
from pathlib import Path
from synseg.core import seed_everything
from synseg.scenes import Scenes
from synseg.train import Learner
from synseg.zoo import create_model
def work(argument):
    out = Path(argument)
    seed_everything(0)
    run = Learner(create_model("unet_small", 11, width=4), Scenes(12, (64, 64)), batch_size=4, out=out, progress=False, save_every=1)
    print("on", os.getpid(), flush=True)
    if (out/"state.pt").exists(): run.resume()
    run.fit(6)
"""


@FORKS
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_training_ends_the_same(tmp_path, kills, record_property):
    rng, whole, out, done, through, steps = random.Random(1), tmp_path/"whole", tmp_path/"killed", 0, 0, set()
    with Nursery(TRAINER, tmp_path) as nursery:
        began = time.perf_counter()
        assert nursery.run(str(whole)) == 0
        usual, same = time.perf_counter() - began, (whole/"last.safetensors").read_bytes()
        while done < kills:
            began = time.perf_counter()
            code = nursery.run(str(out), rng.uniform(0, 0.7*usual))
            usual = min(usual, time.perf_counter() - began) if code == 0 else usual  # a machine may be busy only at first
            if (out/"state.pt").exists(): steps.add(load_state(out)["progress"]["step"])  # the last checkpoint is whole, whenever the run died
            if code:
                assert code == -signal.SIGKILL
                done += 1
            else:  # it got through, after any number of kills: the same bits; begin anew
                assert (out/"last.safetensors").read_bytes() == same
                through += 1
                shutil.rmtree(out)
        assert nursery.run(str(out)) == 0
    assert (out/"last.safetensors").read_bytes() == same and len(steps) > 1
    record_property("training", dict(kills=done, runs_that_ended_the_same=through + 1, failures=0, distinct_steps_found=len(steps)))


class Recorder:
    "A pytest plugin: what tests measured, by name, and how long they took"
    def __init__(self): self.found, self.failed = {}, []
    def pytest_runtest_logreport(self, report):
        if report.failed: self.failed.append(report.nodeid)
        if report.when == "call": self.found.update({k: dict(v, seconds=round(report.duration, 1)) for k, v in report.user_properties})


if __name__ == "__main__":  # python tests/test_unbreakable.py --record [-k saving]: the slow tests, kept in results/unbreakable.json
    from synseg.core import record_result
    recorder = Recorder()
    code = pytest.main([__file__, "-m", "slow", "-q", *[a for a in sys.argv[1:] if a != "--record"]], plugins=[recorder])
    if "--record" in sys.argv and recorder.found:
        old = ROOT/"results"/"unbreakable.json"
        before = json.loads(old.read_text(encoding="utf-8"))["metrics"] if old.exists() else {}
        record_result("unbreakable", dict(kill="SIGKILL at random moments", net="unet_small"), {**before, **recorder.found, "failed": recorder.failed}, folder=ROOT/"results")
    sys.exit(code)
