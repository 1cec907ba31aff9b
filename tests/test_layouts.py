"Each loader on tiny files in its true directory layout"
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from synseg.core import VOID
from synseg.datasets import load_dataset
from synseg.labels import LabelSpace, label_space

RNG = np.random.default_rng(0)
H, W = 6, 8
IMAGE = RNG.integers(0, 256, (H, W, 3), np.uint8)


def image(path, array=IMAGE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def label(path, values, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.resize(np.asarray(values, np.uint8), (H, W))
    file = Image.fromarray(values)
    if palette is not None: file.putpalette(np.resize(np.asarray(palette, np.uint8), 768).tobytes())
    file.save(path)
    return values


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def voc(root, train=("2007_000032",), val=("2007_000033",)):
    for name in (*train, *val):
        image(root / f"JPEGImages/{name}.jpg")
        # a scrambled palette: whoever converts to RGB or grey reads nonsense
        label(root / f"SegmentationClass/{name}.png", [0, 1, 20, 255], RNG.integers(0, 256, 768))
    for split, names in dict(train=train, val=val, trainval=(*train, *val)).items():
        text(root / f"ImageSets/Segmentation/{split}.txt", names)


def sbd(root, train, val):
    for name in (*train, *val):
        image(root / f"img/{name}.jpg")
        (root / "cls").mkdir(exist_ok=True)
        field = np.zeros((1, 1), [("Boundaries", object), ("Segmentation", object), ("CategoriesPresent", object)])
        field["Segmentation"][0, 0] = np.resize(np.array([0, 15], np.uint8), (H, W))
        savemat(root / f"cls/{name}.mat", {"GTcls": field})
    text(root / "train.txt", train)
    text(root / "val.txt", val)


@pytest.mark.parametrize("where", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc2012(tmp_path, where):
    voc(tmp_path / where)
    data = load_dataset("voc2012", tmp_path, "train")
    assert data.names == ["2007_000032"] and data.label_space == label_space("voc2012")
    x, y = data[0]
    assert x.shape == (3, H, W) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.unique().tolist() == [0, 1, 20, VOID]
    assert len(load_dataset("voc2012", tmp_path, "trainval")) == 2


def test_sbd_reads_mat_files(tmp_path):
    sbd(tmp_path / "benchmark_RELEASE/dataset", ("2008_000002",), ("2008_000003", "2008_000004"))
    data = load_dataset("sbd", tmp_path, "val")
    assert data.names == ["2008_000003", "2008_000004"] and data[0][1].unique().tolist() == [0, 15]
    (tmp_path / "benchmark_RELEASE/dataset/cls/2008_000003.mat").write_bytes(b"MATLAB 5.0 nonsense" * 20)
    with pytest.raises(ValueError, match="2008_000003.mat cannot be read"): data[0]
    with pytest.raises(FileNotFoundError, match="train_noval.txt"): load_dataset("sbd", tmp_path, "train_noval")


def test_voc2012_aug_is_train_plus_sbd_minus_val(tmp_path):
    voc(tmp_path / "VOCdevkit/VOC2012", train=("a", "b"), val=("v", "w"))
    sbd(tmp_path / "benchmark_RELEASE/dataset", train=("b", "c", "v"), val=("d", "w"))
    data = load_dataset("voc2012_aug", tmp_path, "train")
    assert data.names == ["a", "b", "c", "d"]
    assert VOID in data[1][1] and VOID not in data[2][1]  # b has VOC's label with its void border, c has SBD's
    assert load_dataset("voc2012_aug", tmp_path, "val").names == ["v", "w"]
    label(tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug/c.png", [0, 7])
    for name in ("a", "b", "v", "w"):
        shutil.copy(tmp_path / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png", tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug")
    shutil.copy(tmp_path / "VOCdevkit/VOC2012/JPEGImages/a.jpg", tmp_path / "VOCdevkit/VOC2012/JPEGImages/c.jpg")
    assert load_dataset("voc2012_aug", tmp_path, "train").names == ["a", "b", "c"]


def lists_only(tmp_path, monkeypatch, shared):
    "VOC and SBD with lists of the true lengths, and files that are only claimed to exist"
    from pathlib import Path
    train, val = [f"t{i}" for i in range(1464)], [f"v{i}" for i in range(1449)]
    extra = train[:shared] + val[: 11355 - 9118 - shared] + [f"s{i}" for i in range(9118)]
    home, sets = tmp_path / "dataset", tmp_path / "VOC2012/ImageSets/Segmentation"
    text(sets / "train.txt", train)
    text(sets / "val.txt", val)
    (home / "cls").mkdir(parents=True)
    text(home / "train.txt", extra[:8498])
    text(home / "val.txt", extra[8498:])
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda p: p.suffix in (".jpg", ".png", ".mat") or real(p))


def test_trainaug_has_10582_images_when_complete(tmp_path, monkeypatch):
    lists_only(tmp_path, monkeypatch, shared=1464)
    data = load_dataset("voc2012_aug", tmp_path, "train")
    assert len(data) == 10582 == 1464 + 9118 and not any(n.startswith("v") for n in data.names)


def test_an_altered_trainaug_is_noticed(tmp_path, monkeypatch):
    lists_only(tmp_path, monkeypatch, shared=1464)
    listed = (tmp_path / "dataset/train.txt").read_text().splitlines()
    text(tmp_path / "dataset/train.txt", ["new", *[n for n in listed if n != "t0"]])
    with pytest.raises(ValueError, match="10583 images instead of 10582"): load_dataset("voc2012_aug", tmp_path, "train")


def test_cityscapes(tmp_path):
    for split, city, frame in (("train", "aachen", "000000_000019"), ("train", "ulm", "000001_000019"), ("val", "lindau", "000002_000019")):
        stem = f"{city}_{frame}"
        image(tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        label(tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", range(34))
        label(tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png", [0])  # present in many copies, never read
    data = load_dataset("cityscapes", tmp_path, "train")
    assert data.names == ["aachen_000000_000019", "ulm_000001_000019"]
    y = data[0][1].ravel()
    assert y[7] == 0 and y[8] == 1 and y[11] == 2 and y[33] == 18 and y[0] == VOID and y[29] == VOID
    assert sorted(set(y.tolist())) == [*range(19), VOID]
    assert len(load_dataset("cityscapes", tmp_path, "val")) == 1


def test_gta5_with_and_without_split(tmp_path):
    palette = np.zeros((256, 3), np.uint8)
    for n in range(1, 5):
        image(tmp_path / f"images/{n:05d}.png")
        label(tmp_path / f"labels/{n:05d}.png", range(34), palette)  # all black: only the indices tell
    assert load_dataset("gta5", tmp_path, "all").names == ["00001", "00002", "00003", "00004"]
    with pytest.raises(FileNotFoundError, match="split='all'"): load_dataset("gta5", tmp_path, "train")
    savemat(tmp_path / "split.mat", dict(trainIds=np.array([[1], [3], [99]]), valIds=np.array([[2]]), testIds=np.array([[4]])))
    with pytest.warns(UserWarning, match="1 of 3 listed images"): data = load_dataset("gta5", tmp_path, "train")
    assert data.names == ["00001", "00003"] and sorted(set(data[0][1].ravel().tolist())) == [*range(19), VOID]
    Image.fromarray(np.array([[[128, 64, 128], [0, 0, 0]]], np.uint8)).save(tmp_path / "labels/00001.png")
    image(tmp_path / "images/00001.png", IMAGE[:1, :2])
    assert data[0][1].tolist() == [[0, VOID]]  # a label converted to colour is read through the palette


@pytest.mark.parametrize("line", ["{s}/a.png {s}annot/a.png", "/SegNet/CamVid/{s}/a.png /SegNet/CamVid/{s}annot/a.png",
                                  "CamVid\\{s}\\a.png CamVid\\{s}annot\\a.png", "{s}/a.png"])
@pytest.mark.parametrize("where", [".", "CamVid"])
def test_camvid_lists(tmp_path, line, where):
    image(tmp_path / where / "val/a.png")
    label(tmp_path / where / "valannot/a.png", range(12))
    text(tmp_path / where / "val.txt", [line.format(s="val")])
    y = load_dataset("camvid", tmp_path, "val")[0][1]
    assert sorted(set(y.ravel().tolist())) == [*range(11), VOID] and (y.ravel()[11] == VOID).item()


def test_coco_stuff_with_a_grey_photograph(tmp_path):
    for name in ("000000000139", "000000000285"):
        image(tmp_path / f"val2017/{name}.jpg", IMAGE[..., 0] if name.endswith("285") else IMAGE)
        label(tmp_path / f"stuffthingmaps/val2017/{name}.png", [0, 91, 181, 255])
    data = load_dataset("coco_stuff", tmp_path, "val")
    assert len(data) == 2 and data[1][0].shape == (3, H, W) and VOID in data[0][1]
    assert data.label_space.num_classes == label_space("coco_stuff").num_classes


def test_isbi_as_files_and_as_stacks(tmp_path):
    stack = [np.full((H, W), n, np.uint8) for n in range(30)]
    truth = [np.where(np.arange(H * W).reshape(H, W) < n, 0, 255).astype(np.uint8) for n in range(1, 31)]
    for n in range(30):
        image(tmp_path / f"files/train/image/{n}.png", stack[n])  # unpadded names: 10 must not come before 2
        image(tmp_path / f"files/train/label/{n}.png", truth[n])
    (tmp_path / "stacks").mkdir()
    for name, pages in (("train-volume", stack), ("train-labels", truth)):
        first, *rest = map(Image.fromarray, pages)
        first.save(tmp_path / f"stacks/{name}.tif", save_all=True, append_images=rest)
    for split, length in (("train", 24), ("val", 6), ("all", 30)):
        a, b = (load_dataset("isbi2012", tmp_path / kind, split) for kind in ("files", "stacks"))
        assert len(a) == len(b) == length and a.names == b.names
        for i in (0, length - 1):
            assert all(torch.equal(p, q) for p, q in zip(a[i], b[i]))
    assert a[9][0].max() * 255 == 9 and (a[9][1] == 0).sum() == 10  # membrane is class 0, cell class 1


def folder(root, n=3, values=(0, 1, 2, 255)):
    for i in range(n):
        image(root / f"images/p{i}.jpg")
        label(root / f"masks/p{i}.png", values)
    return root


def test_folder_in_its_three_forms(tmp_path):
    folder(tmp_path / "a")
    assert load_dataset("folder", tmp_path / "a", "all").names == ["p0", "p1", "p2"]
    text(tmp_path / "a/val.txt", ["p1", "p2.jpg"])
    assert load_dataset("folder", tmp_path / "a", "val").names == ["p1", "p2"]
    folder(tmp_path / "b/train", 2)
    assert load_dataset("folder", tmp_path / "b", "train").names == ["p0", "p1"]
    (tmp_path / "a/images/.DS_Store").touch()
    assert len(load_dataset("folder", tmp_path / "a", "all")) == 3


def test_folder_label_space_from_file_or_from_values(tmp_path):
    folder(tmp_path)
    space = load_dataset("folder", tmp_path, "all").label_space
    assert space.names == ("class 0", "class 1", "class 2") and load_dataset("folder", tmp_path, "all")[0][1].max() == VOID
    own = LabelSpace(("sea", "land"), ((0, 0, 255), (0, 255, 0)), (1, 2), (0, 255))
    (tmp_path / "label_space.json").write_text(json.dumps(own.to_dict()))
    data = load_dataset("folder", tmp_path, "all")
    assert data.label_space == own and data[0][1].ravel()[:4].tolist() == [VOID, 0, 1, VOID]
    image(tmp_path / "masks/p0.png", np.resize(np.array([[0, 0, 255], [0, 255, 0]], np.uint8), (H, W, 3)))
    assert data[0][1].ravel()[:2].tolist() == [0, 1]
    (tmp_path / "label_space.json").unlink()
    with pytest.raises(ValueError, match="label_space.json"): load_dataset("folder", tmp_path, "all")


def test_what_is_missing_is_said(tmp_path):
    for name in ("voc2012", "sbd", "voc2012_aug", "cityscapes", "gta5", "camvid", "coco_stuff", "isbi2012", "folder"):
        with pytest.raises(FileNotFoundError, match=f"{name}: the folder .*nowhere does not exist") as error:
            load_dataset(name, tmp_path / "nowhere", "train")
        assert "expected:" in str(error.value) and "to get it:" in str(error.value)
        with pytest.raises(FileNotFoundError, match=f"{name}: ") as error: load_dataset(name, tmp_path, "train")
        assert "expected:" in str(error.value)
    with pytest.raises(ValueError, match="no data set 'camvit'.*camvid"): load_dataset("camvit", tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'trian'; it has train, val"): load_dataset("camvid", tmp_path, "trian")


def test_empty_folders_lists_and_missing_members(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match="no images found"): load_dataset("folder", tmp_path, "all")
    image(tmp_path / "images/x.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images have no mask.*masks/x.png"): load_dataset("folder", tmp_path, "all")
    text(tmp_path / "train.txt", [""])
    with pytest.raises(FileNotFoundError, match="no images found"): load_dataset("camvid", tmp_path, "train")
    text(tmp_path / "train.txt", ["train/a.png trainannot/a.png"])
    with pytest.raises(FileNotFoundError, match="2 of 2 files .* missing, the first is .*train/a.png"):
        load_dataset("camvid", tmp_path, "train")


def test_a_folder_knows_the_classes_of_all_its_splits(tmp_path):
    folder(tmp_path / "train", 2, (0, 1, 2))
    folder(tmp_path / "val", 2, (0, 1, 7))
    spaces = [load_dataset("folder", tmp_path, split).label_space for split in ("train", "val")]
    assert spaces[0] == spaces[1] and spaces[0].num_classes == 8


def test_black_and_white_masks_are_not_taken_for_void(tmp_path):
    folder(tmp_path, 2, (0, 255))
    with pytest.raises(ValueError, match="no class but 0, and 255 means void.*label_space.json") as error: load_dataset("folder", tmp_path, "all")
    (tmp_path / "label_space.json").write_text(str(error.value).split("says so: ")[1])
    data = load_dataset("folder", tmp_path, "all")
    assert data.label_space.names == ("background", "object") and set(data[0][1].unique().tolist()) == {0, 1}


def test_what_lies_beside_pictures_is_no_picture(tmp_path):
    folder(tmp_path, 2)
    for name in ("images/Thumbs.db", "images/notes.txt", "masks/desktop.ini"): (tmp_path / name).write_text("x")
    assert load_dataset("folder", tmp_path, "all").names == ["p0", "p1"]


def test_a_missing_split_names_those_that_are_there(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "valid")
    with pytest.raises(FileNotFoundError, match="val/images is missing; there is one in train, valid"): load_dataset("folder", tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="synseg data download voc2012"): load_dataset("voc2012", tmp_path, "val")
