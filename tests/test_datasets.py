"Data sets: bad input, cache, seeded augmentation, batches"
import hashlib
import http.server
import random
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import synseg.layouts
from synseg.core import IMAGENET_MEAN, VOID
from synseg.datasets import Seeded, class_frequencies, download_dataset, load_dataset, pad_collate
from synseg.files import Archive
from synseg.transforms import train_transforms

RNG = np.random.default_rng(0)
H, W = 24, 32


@pytest.fixture
def root(tmp_path):
    "Four CamVid-like pairs"
    for part in ("train", "trainannot"): (tmp_path / part).mkdir()
    for i in range(4):
        Image.fromarray(RNG.integers(0, 256, (H, W, 3), np.uint8)).save(tmp_path / f"train/{i}.png")
        Image.fromarray(RNG.integers(0, 12, (H, W), np.uint8)).save(tmp_path / f"trainannot/{i}.png")
    (tmp_path / "train.txt").write_text("".join(f"train/{i}.png trainannot/{i}.png\n" for i in range(4)))
    return tmp_path


def first(root): return load_dataset("camvid", root, "train")[0]


def test_size_mismatch(root):
    Image.fromarray(np.zeros((W, H), np.uint8)).save(root / "trainannot/0.png")
    with pytest.raises(ValueError, match=r"train/0.png is 24x32 and its label .*trainannot/0.png is 32x24.*skip=\['0'\]"): first(root)
    data = load_dataset("camvid", root, "train", skip=["0"])
    assert data.names == ["1", "2", "3"] and len(data.check()) == 0
    with pytest.raises(ValueError, match="'9'"): load_dataset("camvid", root, "train", skip=["9"])


def test_label_value_out_of_range(root):
    values = np.zeros((H, W), np.uint8)
    values[5, 7] = 12
    Image.fromarray(values).save(root / "trainannot/0.png")
    with pytest.raises(ValueError, match=r"trainannot/0.png.*12.*\(5, 7\).*0-10"): first(root)


def test_sixteen_bit_label(root):
    values = RNG.integers(0, 11, (H, W), np.uint16)
    Image.fromarray(values).save(root / "trainannot/0.png")
    assert np.array_equal(first(root)[1], values)  # the numbers count, not how many bits they are stored in
    values[3, 4] = 26001  # as in Cityscapes' instanceIds
    Image.fromarray(values).save(root / "trainannot/0.png")
    with pytest.raises(ValueError, match=r"26001.*\(3, 4\)"): first(root)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_other_image_modes_become_rgb(root, mode):
    path = root / ("train/0.tif" if mode == "CMYK" else "train/0.png")
    Image.fromarray(RNG.integers(0, 256, (H, W, 3), np.uint8)).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    (root / "train.txt").write_text(f"{path.relative_to(root)} trainannot/0.png\n")
    assert first(root)[0].shape == (3, H, W)


def test_corrupt_and_empty_files(root):
    whole = (root / "train/0.png").read_bytes()
    (root / "train/0.png").write_bytes(whole[:90])
    with pytest.raises(ValueError, match="train/0.png cannot be read.*Fetch it again"): first(root)
    (root / "train/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"): first(root)
    (root / "train/1.png").write_bytes(whole[:16] + b"\0\0\0\0" + whole[20:])
    wrong = load_dataset("camvid", root, "train").check()
    assert len(wrong) == 2 and "0.png" in wrong[0] and "1.png" in wrong[1]


def test_colour_label_with_and_without_a_known_palette(root):
    data = load_dataset("camvid", root, "train")
    ids = np.array(data.raw(0)[1])
    Image.fromarray(data.label_space.to_colour(ids)).save(root / "trainannot/0.png")
    assert np.array_equal(data[0][1], ids)
    Image.fromarray(np.full((H, W, 3), 7, np.uint8)).save(root / "trainannot/0.png")
    with pytest.raises(ValueError, match=r"trainannot/0.png.*\(7, 7, 7\)"): data[0]


def test_items_raw_and_negative_indices(root):
    data = load_dataset("camvid", root, "train", transforms=train_transforms((12, 16)))
    image, label = data.raw(-1)
    assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, H, W) and label.shape == (H, W)
    assert data[-1][0].shape == (3, 12, 16) and data[-1][0].dtype == torch.float32 and data[-1][1].dtype == torch.int64
    with pytest.raises(IndexError): data[4]
    assert len(list(data)) == 4 and repr(data) == "camvid train: 4 images, 11 classes"


def test_cache_reads_each_file_once_and_stays_clean(root):
    plain, cached = (load_dataset("camvid", root, "train", cache=c) for c in (False, True))
    expected = [plain[i] for i in range(4)]
    transforms = train_transforms((H, W), scale=(1, 1), flip=1)
    for i in range(4): transforms(*cached.raw(i))
    for i in range(4): (root / f"train/{i}.png").unlink()
    for i in range(4): assert all(torch.equal(a, b) for a, b in zip(cached[i], expected[i]))
    with pytest.raises(FileNotFoundError): plain[0]


def test_class_frequencies(root):
    data = load_dataset("camvid", root, "train")
    pixels, present = class_frequencies(data)
    labels = torch.stack([data[i][1] for i in range(4)])
    assert pixels.tolist() == [(labels == c).sum().item() for c in range(11)]
    assert present.tolist() == [H * W * sum((labels[i] == c).any().item() for i in range(4)) for c in range(11)]
    assert class_frequencies(data, limit=1).pixels.sum() == (labels[0] != VOID).sum()


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))


def test_seeded_depends_on_seed_epoch_and_index_only(root):
    data = load_dataset("camvid", root, "train")
    a = Seeded(data, train_transforms((16, 16)), seed=3)
    wanted = [a[i] for i in range(4)]
    torch.manual_seed(99)
    assert all(same(a[i], wanted[i]) for i in (2, 0, 3, 1)) and same(a[-1], wanted[3])
    b = Seeded(data, train_transforms((16, 16)), seed=3)
    assert all(same(b[i], wanted[i]) for i in range(4))
    assert not same(Seeded(data, train_transforms((16, 16)), seed=4)[0], wanted[0])
    a.set_epoch(1)
    assert a.epoch == 1 and not same(a[0], wanted[0])
    a.set_epoch(0)
    assert same(a[0], wanted[0]) and a.label_space is data.label_space and len(a) == 4
    with pytest.raises(IndexError): a[4]
    with pytest.raises(AttributeError): a.nonsense


def test_seeded_leaves_the_global_generators_alone(root):
    def draws(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    data = Seeded(load_dataset("camvid", root, "train"), train_transforms((16, 16)))
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = draws()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    data[0]
    assert draws() == expected

    def broken(image, label): raise RuntimeError("in a transform")
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    with pytest.raises(RuntimeError): Seeded(data.dataset, broken)[0]
    assert draws() == expected


def test_seeded_covers_numpy_and_python_randomness(root):
    def noisy(image, label): return torch.tensor([np.random.rand(), random.random()]), label
    data = Seeded(load_dataset("camvid", root, "train"), noisy)
    assert torch.equal(data[1][0], data[1][0]) and not torch.equal(data[1][0], data[2][0])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_items_and_hear_of_new_epochs(root, persistent):
    data = Seeded(load_dataset("camvid", root, "train"), train_transforms((16, 16)))
    loader = DataLoader(data, batch_size=2, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        data.set_epoch(epoch)
        images = torch.cat([x for x, _ in loader])
        assert torch.equal(images, torch.stack([data[i][0] for i in range(4)]))


def test_seeded_takes_any_data_set():
    pairs = [(torch.rand(3, 20, 30), torch.randint(0, 5, (20, 30))) for _ in range(3)]
    data = Seeded(pairs, train_transforms((8, 10)))
    assert data[0][0].shape == (3, 8, 10) and same(data[1], data[1])
    from synseg.scenes import Scenes
    scenes = Seeded(Scenes(2, size=(64, 80)), train_transforms((32, 40)))
    assert scenes[1][1].shape == (32, 40) and scenes.label_space.num_classes == 11


def test_batches_of_different_sizes():
    pairs = [(torch.rand(3, 5, 9), torch.ones(5, 9, dtype=torch.int64)), (torch.rand(3, 7, 4), torch.zeros(7, 4, dtype=torch.int64))]
    images, labels = pad_collate(pairs)
    assert images.shape == (2, 3, 7, 9) and labels.shape == (2, 7, 9)
    assert torch.equal(images[0, :, :5], pairs[0][0]) and (labels[0, 5:] == VOID).all() and (labels[1, :, 4:] == VOID).all()
    assert torch.allclose(images[1, :, 0, 8], torch.tensor(IMAGENET_MEAN))
    with pytest.raises(ValueError, match="one size"): pad_collate([(torch.rand(3, 5, 9), torch.ones(6, 9))])


def test_download_unpacks_once(tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    for part in ("train", "trainannot"): (tmp_path / part).mkdir()
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "train/0.png")
    Image.fromarray(np.zeros((H, W), np.uint8)).save(tmp_path / "trainannot/0.png")
    (tmp_path / "train.txt").write_text("train/0.png trainannot/0.png\n")
    with tarfile.open(tmp_path / "www/camvid.tar", "w") as file:
        for part in ("train", "trainannot", "train.txt"): file.add(tmp_path / part, f"CamVid/{part}")
    content = (tmp_path / "www/camvid.tar").read_bytes()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(tmp_path / "www"))
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    archive = Archive("camvid.tar", hashlib.sha256(content).hexdigest(), len(content), (f"http://127.0.0.1:{server.server_port}/camvid.tar",))
    monkeypatch.setitem(synseg.layouts.LAYOUTS, "camvid", replace(synseg.layouts.LAYOUTS["camvid"], archives=(archive,)))
    data = load_dataset("camvid", tmp_path / "new", "train", download=True)
    assert len(data) == 1 and (tmp_path / "new/CamVid/train/0.png").is_file()
    server.shutdown()
    (tmp_path / "new/camvid.tar").unlink()
    assert len(load_dataset("camvid", tmp_path / "new", "train", download=True)) == 1  # nothing is fetched again


@pytest.mark.parametrize("name", ["cityscapes", "gta5", "camvid", "coco_stuff", "isbi2012", "folder"])
def test_what_cannot_be_downloaded_says_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} cannot be downloaded automatically"): download_dataset(name, tmp_path)


def test_camvid_real(data_root):
    root = data_root("camvid")
    train, val = (load_dataset("camvid", root, s, cache=True) for s in ("train", "val"))
    assert (len(train), len(val)) == (367, 101) and train.names[0] == "0001TP_006690" and not set(train.names) & set(val.names)
    pixels, present = class_frequencies(train)
    assert pixels.tolist() == [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]
    frequency = pixels / present
    weights = frequency.median() / frequency
    assert torch.allclose(weights[:4], torch.tensor([0.2793, 0.2017, 4.7865, 0.1490]), atol=1e-4)
    assert class_frequencies(val).pixels[10] == 387010
    image, label = Seeded(train, train_transforms((120, 160)))[5]
    assert image.shape == (3, 120, 160) and set(label.unique().tolist()) <= {*range(11), VOID}


def test_isbi2012_real(data_root):
    data = load_dataset("isbi2012", data_root("isbi2012"), "all")
    assert len(data) == 30 and data[0][0].shape == (3, 512, 512)
    pixels = class_frequencies(data, limit=10).pixels
    assert 0.15 < pixels[0] / pixels.sum() < 0.3  # membrane


def test_voc_samples_real(data_root, tmp_path):
    source = data_root("voc_samples")
    (tmp_path / "images").symlink_to(source / "images")
    (tmp_path / "masks").symlink_to(source / "labels")
    data = load_dataset("folder", tmp_path, "all")
    assert len(data) == 10 and data.check() == [] and data.label_space.num_classes <= 21


def test_seeded_without_transforms_seeds_the_data_sets_own_chance(root):
    own = load_dataset("camvid", root, "train", transforms=train_transforms((16, 16)))
    data = Seeded(own, seed=1)
    assert same(data[2], data[2]) and not same(own[2], own[2])
    triple = Seeded([(torch.rand(3, 4, 4), torch.zeros(4, 4), torch.ones(4, 4))])
    assert len(triple[0]) == 3
