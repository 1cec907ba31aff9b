"labelme's files to label maps: right to the pixel, distrusted, and never half written"
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from synseg.core import VOID
from synseg.datasets import load_dataset
from synseg.labelme import Shape, cover, fill_polygon, find_drawings, import_labelme, paint, read_labelme

SIZE = (12, 16)
CAR = dict(label="car", shape_type="polygon", points=[[2, 2], [9, 2], [9, 8], [2, 8]])


def write(folder, name="a", shapes=(CAR,), image=None, size=SIZE, **more):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.png").exists():
        Image.new("RGB", size[::-1], (90, 100, 110)).save(folder / f"{name}.png")
    content = dict(version="5.5.0", shapes=list(shapes), imagePath=image or f"{name}.png", imageData="not to be read", imageHeight=size[0], imageWidth=size[1])
    (folder / f"{name}.json").write_text(json.dumps(content | more))
    return folder / f"{name}.json"


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def crossings(points, size):
    "By definition: count the sides to the right of every pixel's centre"
    inside = np.zeros(size, bool)
    for r in range(size[0]):
        for c in range(size[1]):
            x, y = c + 0.5, r + 0.5
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
                if (y0 <= y) != (y1 <= y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    inside[r, c] ^= True
    return inside


def test_polygons_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = tuple(rng.integers(1, 14, 2))
        points = rng.uniform(-6, 18, (rng.integers(3, 10), 2))
        assert (fill_polygon(points, size) == crossings(points, size)).all()


def test_a_partition_covers_every_pixel_once():
    rng = np.random.default_rng(1)
    for _ in range(60):
        h, w = rng.integers(2, 40, 2)
        rim = np.array([(0, 0), (w * rng.random(), 0), (w, 0), (w, h * rng.random()), (w, h), (0, h)], float)
        middle = np.array([w, h]) * rng.random(2) if rng.random() < 0.7 else np.floor(np.array([w, h]) * rng.random(2)) + 0.5
        total = sum(fill_polygon(np.array([a, b, middle]), (h, w)).astype(int) for a, b in zip(rim, np.roll(rim, -1, 0)))
        assert (total == 1).all()


def test_rectangles_agree_with_polygons_and_circles_with_their_area():
    rng = np.random.default_rng(2)
    for _ in range(20):
        (x0, y0), (x1, y1) = rng.uniform(-5, 30, (2, 2))
        as_polygon = fill_polygon(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), (23, 27))
        assert (cover(Shape("a", "rectangle", np.array([(x0, y0), (x1, y1)])), (23, 27)) == as_polygon).all()
    assert abs(cover(Shape("a", "circle", np.array([(50.0, 40.0), (50.0, 10.0)])), (90, 110)).sum() - np.pi * 900) < 20


@pytest.mark.parametrize("left, top", [(3, 2), (-2, -3), (14, 9), (40, 40), (-20, 0)])
def test_brushes_are_put_where_their_box_is(tmp_path, left, top):
    mask = np.random.default_rng(3).random((5, 6)) < 0.5
    entry = dict(label="car", shape_type="mask", points=[[left, top], [left + 5, top + 4]], mask=png(mask))
    covered = cover(read_labelme(write(tmp_path, shapes=[entry])).shapes[0], SIZE)
    for r in range(SIZE[0]):
        for c in range(SIZE[1]):
            inside = 0 <= r - top < 5 and 0 <= c - left < 6
            assert covered[r, c] == (inside and mask[r - top, c - left])


def test_later_shapes_cover_earlier_ones_and_void_is_a_label(tmp_path):
    over = dict(label="person", shape_type="rectangle", points=[[4, 0], [6, 12]], group_id=1)
    hole = dict(label="__ignore__", shape_type="circle", points=[[5, 5], [5, 4]])
    drawing = read_labelme(write(tmp_path, shapes=[CAR, over, hole]))
    label = paint(drawing, ["background", "car", "person"])
    assert label.dtype == np.uint8 and label.shape == SIZE
    assert (label[3, 3], label[3, 4], label[4, 4], label[0, 0]) == (1, 2, VOID, 0)
    assert paint(drawing, ["car", "person"], rest=None)[0, 0] == VOID
    turned = paint(drawing._replace(shapes=drawing.shapes[::-1]), ["background", "car", "person"])
    assert turned[3, 4] == 1
    assert paint(drawing, ["background", "car", "person", "x"], label_void=("__ignore__", "person"))[3, 5] == VOID


@pytest.mark.parametrize("shapes, words", [
    ([CAR | dict(shape_type="line", points=[[0, 0], [1, 1]])], "shape 1 is a line; expected one of polygon"),
    ([CAR, CAR | dict(shape_type="point")], "shape 2 is a point"),
    ([CAR | dict(shape_type="heptagon")], "heptagon"),
    ([CAR | dict(points=[[0, 0], [1, 1]])], "has 2 corners; a polygon has 3 or more"),
    ([CAR | dict(shape_type="circle")], "has 4 corners; a circle has 2"),
    ([CAR | dict(points=[[0, 0], [1, "x"], [2, 2]])], "no list of [x, y]"),
    ([CAR | dict(points=[[0, 0], [1, 1e300], [2, 2]])], "a million pixels away"),
    ([CAR | dict(points=None)], "no list of [x, y]"),
    ([CAR | dict(label=3)], "has no label"),
    (["car"], "is a None"),
    ([dict(label="car", shape_type="mask", points=[[0, 0], [3, 3]], mask="!!")], "brush's mask cannot be used"),
    ([dict(label="car", shape_type="mask", points=[[0, 0], [3, 3]])], "brush's mask cannot be used"),
    ([dict(label="car", shape_type="mask", points=[[0, 0], [3, 3]], mask=png(np.ones((9, 9), bool)))], "it is 9x9 and its box 4x4"),
])
def test_shapes_that_cannot_be_used(tmp_path, shapes, words):
    with pytest.raises(ValueError) as error:
        read_labelme(write(tmp_path, shapes=shapes))
    assert words in str(error.value) and "a.json" in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    path = write(tmp_path / "in")
    Image.new("RGB", (16, 12)).save(tmp_path / "outside.png")
    for more, words in [(dict(imagePath="../outside.png"), "neither in"), (dict(imagePath="/etc/passwd"), "neither in"), (dict(imagePath=""), "neither in"),
                        (dict(imageHeight=24), "drawn on a picture of 24x16"), (dict(shapes=None), "not written by labelme")]:
        path.write_text(json.dumps(json.loads(write(tmp_path / "in").read_text()) | more))
        with pytest.raises(ValueError, match=words):
            read_labelme(path)
    for text, words in [("{", "no JSON"), ("[]", "not written by labelme"), ("[" * 100_000, "no JSON")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_labelme(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no JSON"):
        read_labelme(path)
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    write(tmp_path / "in")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_labelme(path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="neither in"):
        read_labelme(write(tmp_path / "in"))


def test_windows_paths_and_folders_below(tmp_path):
    write(tmp_path / "day1", "x")
    (tmp_path / "outlines").mkdir()
    (tmp_path / "day1" / "x.json").rename(tmp_path / "outlines" / "x.json")
    path = tmp_path / "outlines" / "x.json"
    path.write_text(path.read_text().replace('"x.png"', json.dumps("..\\day1\\x.png")))
    assert read_labelme(path, tmp_path).image.resolve() == (tmp_path / "day1" / "x.png").resolve()
    with pytest.raises(ValueError, match="put picture and JSON together"):
        read_labelme(path)


def pictures(folder, n=5):
    for i in range(n):
        write(folder / "day", f"p{i}", [CAR, CAR | dict(label="person", points=[[0, 9], [4, 9], [4, 12]])])
    return folder


def test_import_into_the_folder_layout(tmp_path):
    Image.new("RGB", (5, 5)).save(pictures(tmp_path / "in") / "spare.jpg")
    found = import_labelme(tmp_path / "in", tmp_path / "out", val=0.4)
    train, val = (load_dataset("folder", tmp_path / "out", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2) and train.names == found["train"] and val.names == found["val"]
    assert train.label_space.names == ("background", "car", "person") and not train.check() + val.check()
    assert train[0][1][3, 3] == 1 and train.names[0].startswith("day-p")
    assert abs(sum(found["shares"].values()) - 1) < 1e-3 and found["shares"]["car"] == round(42 / 192, 4)
    assert [p.name for p in found["unlabelled"]] == ["spare.jpg"]
    assert import_labelme(tmp_path / "in", tmp_path / "again", val=0.4)["val"] == found["val"]
    one = import_labelme(tmp_path / "in", tmp_path / "third", ["person", "car"], rest=None)
    assert list(one["shares"]) == ["person", "car"] and load_dataset("folder", tmp_path / "third", "train")[0][1][0, 0] == VOID


@pytest.mark.parametrize("change, words", [
    (dict(classes=["car"]), "labelled 'person'"), (dict(classes=["cars", "person"]), "did you mean 'cars'"), (dict(val=0), "val is 0"), (dict(val=1.5), "val is 1.5"),
    (dict(label_void=("person", "car")), "only one class found"), (dict(classes=["car", "person", "void"]), "means void as well"),
])
def test_nothing_is_written_where_something_is_wrong(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        import_labelme(pictures(tmp_path / "in"), tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_imported(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find_drawings(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no JSON"):
        find_drawings(tmp_path / "empty")
    with pytest.raises(ValueError, match="two are needed"):
        import_labelme(pictures(tmp_path / "one", 1), tmp_path / "out")
    pictures(tmp_path / "in")
    write(tmp_path / "in" / "day", "other", image="p0.png")
    with pytest.raises(ValueError, match="are both about"):
        find_drawings(tmp_path / "in")
    with pytest.raises(ValueError, match="is not empty"):
        import_labelme(tmp_path / "in", tmp_path / "in")


def test_pictures_that_lie_on_their_side(tmp_path):
    for i in range(2):
        picture = Image.new("RGB", (12, 16), (9, 9, 9))
        exif = picture.getexif()
        exif[274] = 6
        (tmp_path / "in").mkdir(exist_ok=True)
        picture.save(tmp_path / "in" / f"t{i}.jpg", exif=exif)
        write(tmp_path / "in", f"t{i}", [CAR], image=f"t{i}.jpg")
        (tmp_path / "in" / f"t{i}.png").unlink()
    import_labelme(tmp_path / "in", tmp_path / "out")
    data = load_dataset("folder", tmp_path / "out", "train")
    assert data[0][0].shape == (3, 12, 16) and data[0][1][3, 3] == 1


def test_at_the_command_line(tmp_path):
    from synseg.cli import app
    pictures(tmp_path / "in")
    run = CliRunner().invoke(app, ["data", "import-labelme", str(tmp_path / "in"), str(tmp_path / "out"), "--val", "0.4"])
    assert run.exit_code == 0 and "3 pictures to learn from, 2 to be judged by" in run.stdout and f"synseg train --data folder --root {tmp_path / 'out'}" in run.stdout
    assert "car" in run.stdout and "21.88 %" in run.stdout
    run = CliRunner().invoke(app, ["data", "import-labelme", str(tmp_path / "in"), str(tmp_path / "out2"), "--classes", "car,bus", "--rest", "void"])
    assert run.exit_code == 2 and "labelled 'person'" in run.stderr
    run = CliRunner().invoke(app, ["data", "import-labelme", str(tmp_path / "in"), str(tmp_path / "out3"), "--classes", "car", "--rest", "void", "--ignore", "person"])
    assert run.exit_code == 2 and "only one class" in run.stderr


def test_an_outline_beside_the_picture_is_reported(tmp_path):
    write(tmp_path / "in", "a", [CAR, CAR | dict(points=[[40, 40], [60, 40], [60, 60]])])
    write(tmp_path / "in", "b")
    found = import_labelme(tmp_path / "in", tmp_path / "out")
    assert found["nothing"] == [f"{tmp_path / 'in' / 'a.json'}: shape 2 (car)"]


def test_where_a_set_cannot_be_put(tmp_path):
    for name in ("a", "b"): write(tmp_path / "in", name)
    (tmp_path / "file").touch()
    for out, words in ((tmp_path / "in" / "set", "lies in"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=words): import_labelme(tmp_path / "in", out)
    assert not (tmp_path / "in" / "set").exists()
