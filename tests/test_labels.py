"Label spaces, the label contract and its messages, colours"
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from synseg.labels import LabelSpace, check_labels, from_one_hot, label_space, one_hot, voc_colours

NAMES = ["voc2012", "cityscapes", "gta5", "camvid", "scenes", "coco_stuff", "isbi2012"]


def random_labels(space, shape=(3, 33, 47)):
    labels = torch.randint(0, space.num_classes, shape)
    return labels.masked_fill(torch.rand(shape) < 0.1, 255)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (1, 1)])
def test_one_hot_and_back(shape):
    labels = torch.randint(0, 6, shape)
    planes = one_hot(labels, 6)
    assert torch.equal(planes, F.one_hot(labels, 6).movedim(-1, -3).float())
    assert torch.equal(from_one_hot(planes), labels)
    labels.view(-1)[0] = 255
    assert one_hot(labels, 6).sum() == labels.numel() - 1
    assert torch.equal(from_one_hot(one_hot(labels.byte(), 6)), labels)


@pytest.mark.parametrize("name", NAMES)
def test_colours_and_disk_ids_survive_the_journey(name):
    space = label_space(name)
    labels = random_labels(space)
    for kind in (labels, labels.numpy(), labels.byte()):
        assert np.array_equal(space.from_colour(space.to_colour(kind)), labels.numpy())
    assert space.to_colour(labels).dtype == np.uint8 and space.to_colour(labels).shape == (3, 33, 47, 3)
    if not space.void:
        labels = labels.masked_fill(labels == 255, 0)
    on_disk = space.to_disk(labels)
    assert set(np.unique(on_disk)) <= {*space.ids, *space.void}
    back = space.from_disk(on_disk)
    assert back.dtype == np.uint8 and np.array_equal(back, labels.numpy())
    assert torch.equal(space.from_disk(torch.from_numpy(on_disk)), labels)
    assert np.array_equal(space.from_disk(on_disk.astype(np.uint16)), back)
    assert np.array_equal(space.from_disk(Image.fromarray(on_disk[0])), back[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_id_on_disk_is_a_class_or_void_or_refused(name):
    space = label_space(name)
    for value in range(256):
        label = np.full((4, 5), value, np.uint8)
        if value in space.ids:
            assert (space.from_disk(label) == space.ids.index(value)).all()
        elif value in space.void:
            assert (space.from_disk(label) == 255).all()
        else:
            with pytest.raises(ValueError, match=rf"label value {value} found at \(0, 0\)"):
                space.from_disk(label)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_sound(name):
    space = label_space(name)
    assert len(set(space.names)) == space.num_classes
    assert len(set(space.palette)) == space.num_classes and space.void_colour not in space.palette
    assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert hash(space) == hash(LabelSpace.from_dict(space.to_dict()))
    assert space.safe().names == space.names and len(set(space.safe().palette)) == space.num_classes


def test_known_numbers():
    assert [label_space(n).num_classes for n in NAMES] == [21, 19, 19, 11, 11, 171, 2]
    camvid, city, voc, coco = (label_space(n) for n in ("camvid", "cityscapes", "voc2012", "coco_stuff"))
    assert camvid.names == label_space("scenes").names == tuple(
        "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split())
    assert 11 in camvid.void and len(camvid.folds) + 11 == 31
    assert city.names[:2] + city.names[-1:] == ("road", "sidewalk", "bicycle") and (city.ids[0], city.ids[-1]) == (7, 33)
    assert len(city.ids + city.void) == 34 and len(label_space("gta5").void) == 16
    assert city.palette[13] == (0, 0, 142) and city.names[13] == "car"
    assert voc.names[0] == "background" and voc.palette[20] == (0, 64, 128) and voc_colours()[255] == (224, 224, 192)
    assert max(coco.ids) == 181 and coco.names[-1] == "wood"
    assert label_space("sbd") is label_space("voc2012_aug") is voc


def test_the_contract_passes_lawful_labels():
    for labels in (torch.randint(0, 11, (40, 50)), torch.full((2, 9, 9), 255), torch.zeros(4, 4, dtype=torch.bool),
                   np.zeros((5, 5), np.uint8), torch.randint(0, 11, (4, 5, 3)), torch.zeros(6, 7, dtype=torch.int32)):
        assert check_labels(labels, 11) is None
    assert check_labels(torch.zeros(3, 3).long(), label_space("camvid")) is None


def test_the_contracts_message():
    labels = torch.zeros(30, 60, dtype=torch.int64)
    labels[12, 40] = 11
    with pytest.raises(ValueError) as error:
        check_labels(labels, label_space("camvid"))
    assert str(error.value) == ("label value 11 found at (12, 40); this label space has ids 0-10 and 255 (void). "
                                "CamVid files use 11 for void: load them with load_dataset('camvid', ...).")


@pytest.mark.parametrize("labels, classes, words", [
    (torch.full((5, 5), 26), 19, "labelIds, not trainIds"),
    (torch.full((5, 5), -1), 19, "never negative"),
    (torch.full((5, 5), 300), 19, "label value 300 found at (0, 0)"),
    (torch.tensor([[1, 2], [3, 4]]), 4, "No 0 occurs"),
    (torch.rand(5, 5), 19, "float32; expected whole numbers"),
    (torch.zeros(2, 1, 5, 5).long(), 19, "squeeze(1)"),
    (np.zeros((40, 50, 3), np.uint8), 19, "from_colour"),
    (torch.zeros(0, 5).long(), 19, "empty"),
    (torch.zeros(5).long(), 19, "expected (H, W)"),
    (torch.tensor([[[0, 0], [0, 0]], [[0, 0], [0, 9]]]), 3, "found at (1, 1) of item 1"),
])
def test_violations_are_explained(labels, classes, words):
    with pytest.raises(ValueError) as error:
        check_labels(labels, classes, "file.png")
    assert words in str(error.value) and str(error.value).startswith("file.png: ")


def test_disk_violations_are_explained():
    city, camvid = label_space("cityscapes"), label_space("camvid")
    with pytest.raises(ValueError, match="look like labelTrainIds"):
        city.from_disk(np.array([[0, 18], [255, 3]], np.uint8))
    with pytest.raises(ValueError, match="label value 70000 found"):
        camvid.from_disk(torch.tensor([[70000, 0]]))
    with pytest.raises(ValueError, match="label value -3 found"):
        camvid.from_disk(np.array([[-3, 0]]))
    with pytest.raises(ValueError, match="resized with interpolation, or saved as JPEG"):
        label_space("isbi2012").from_disk(np.arange(256, dtype=np.uint8).reshape(16, 16), "00.png")
    with pytest.raises(ValueError, match="expected whole numbers"):
        camvid.from_disk(np.random.rand(4, 4))


def test_colour_violations_are_explained():
    space = label_space("cityscapes")
    coloured = space.to_colour(random_labels(space, (20, 30)))
    with pytest.raises(ValueError, match="BGR"):
        space.from_colour(coloured[..., ::-1], "a.png")
    with pytest.raises(ValueError, match="expected uint8"):
        space.from_colour(coloured / 255)
    with pytest.raises(ValueError, match="convert"):
        space.from_colour(np.zeros((5, 5, 4), np.uint8))
    smeared = coloured.copy()
    smeared[3, 4] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"colour \(1, 2, 3\) found at \(3, 4\), 1 unknown"):
        space.from_colour(smeared)


def test_camvid_folds():
    space = label_space("camvid")
    colour = lambda *rgb: space.names[int(space.from_colour(np.full((1, 1, 3), rgb, np.uint8))[0, 0])]
    assert colour(192, 0, 64) == "Road" and colour(192, 128, 192) == "Car" and colour(64, 128, 64) == "Pedestrian"
    assert space.from_colour(np.zeros((1, 1, 3), np.uint8)) == 255


@pytest.mark.parametrize("fields, words", [
    ((("a", "b"), ((0, 0, 0),)), "as many of each"),
    (((), ()), "1 to 254"),
    ((("a", "b"), ((0, 0, 0), (1, 1, 1)), (1, 1)), "must differ"),
    ((("a",), ((0, 0, 0),), (300,)), "within 0-255"),
    ((("a",), ((0, 0, 0),), (4,), (4,)), "must differ"),
])
def test_unsound_records_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        LabelSpace(*fields)


def test_a_space_of_ones_own():
    space = LabelSpace(["water", "land"], [[0, 0, 255], [0, 255, 0]], ids=[10, 20], void=0)
    assert space.from_disk(np.array([[10, 20, 0]], np.uint8)).tolist() == [[0, 1, 255]]
    assert len(space.safe().palette) == 2


def test_unknown_space():
    with pytest.raises(ValueError, match="no label space is called 'camvid12'; there are camvid, cityscapes"):
        label_space("camvid12")


def test_camvid_files(data_root):
    root, space = data_root("camvid"), label_space("camvid")
    for path in sorted((root / "valannot").glob("*.png"))[::20]:
        on_disk = np.asarray(Image.open(path))
        labels = space.from_disk(on_disk, path.name)
        check_labels(labels, space)
        assert ((labels == 255) == (on_disk == 11)).all()
        with pytest.raises(ValueError, match="CamVid files use 11 for void"):
            check_labels(on_disk, space)
