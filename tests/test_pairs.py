"Pictures of two sets: cut and resized as the study does it, written whole or not at all, read back as they were"
import json

import numpy as np
import pytest
import torch

from synseg.labels import label_space
from synseg.pairs import CROP, HELD_OUT, camvid, drawn, pictures, prepared, same_plan, stack, write_pictures
from synseg.scenes import Scenes

SPACE = label_space("scenes")


class Fixed:
    def __init__(self, *pairs): self.pairs = pairs
    def __len__(self): return len(self.pairs)
    def raw(self, i): return self.pairs[i]


def test_the_studys_crop_and_size():
    y, x = np.mgrid[:1052, :1914]
    image = np.stack([y % 256, x % 256, 0 * x], -1).astype(np.uint8)
    label = np.where((y >= 200) & (y < 600) & (x >= 600) & (x < 1200), 3, 255).astype(np.uint8)
    (picture, mask), = prepared(Fixed((image, label)), 5, (80, 160), CROP)
    assert picture.shape == (3, 80, 160) and picture.dtype == torch.uint8 and mask.shape == (80, 160)
    assert (mask == 3).all(), "the cut-out holds nothing from outside, and resizing invents no class"
    with pytest.raises(ValueError, match="full size"):
        list(prepared(Fixed((image[:500], label[:500])), 1, (80, 160), CROP))


def test_spread_evenly_and_bytes_kept():
    data = Scenes(9, (64, 96))
    found = list(prepared(data, 3, (64, 96)))
    for (image, label), i in zip(found, (0, 4, 8)):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), data.raw(i)[0]) and np.array_equal(label.numpy(), data.raw(i)[1])


def test_written_and_read_back(tmp_path):
    data = Scenes(3, (64, 96), "camera")
    write_pictures(tmp_path / "train", prepared(data, 3, (64, 96)), SPACE)
    back = pictures(tmp_path, "train")
    assert back.label_space == SPACE or back.label_space.names == SPACE.names
    for i in range(3):
        torch.testing.assert_close(back[i][0], data[i][0], rtol=0, atol=1e-6)
        assert torch.equal(back[i][1], data[i][1])
    assert stack(back, 2).shape == (2, 3, 64, 96) and len(stack(back)) == 3
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.png"))
    write_pictures(tmp_path / "train", prepared(Scenes(3, (64, 96)), 3, (64, 96)), SPACE)
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")), "what is there stays"


def test_all_or_nothing(tmp_path):
    def broken():
        yield torch.zeros(3, 8, 8), torch.zeros(8, 8).long()
        raise OSError("disk")
    with pytest.raises(OSError):
        write_pictures(tmp_path / "train", broken(), SPACE)
    assert not (tmp_path / "train").exists()
    write_pictures(tmp_path / "train", [(torch.zeros(3, 64, 64), torch.zeros(64, 64).long())], SPACE)
    assert len(pictures(tmp_path, "train")) == 1


def test_a_change_draws_its_own_chance_for_each_picture(tmp_path):
    pairs = [(torch.full((3, 64, 64), 0.5), torch.zeros(64, 64).long())] * 2
    noisy = lambda image, label, rng: (image + float(rng.uniform(-.4, .4))).clamp(0, 1)
    for name in ("a", "b"):
        write_pictures(tmp_path / name / "train", pairs, SPACE, noisy, seed=3)
    a, b = (stack(pictures(tmp_path / n, "train")) for n in ("a", "b"))
    assert torch.equal(a, b) and not torch.equal(a[0], a[1])


def test_scenes_to_train_and_to_test_differ():
    for domain in ("synthetic", "camera"):
        train, test = (drawn(domain, split, 2, (64, 96), None) for split in ("train", "test"))
        assert train.domain == domain and not np.array_equal(train.raw(0)[1], test.raw(0)[1])


def test_the_held_out_sequence_is_tested_on_and_never_trained_on(data_root):
    root = data_root("camvid")
    train, test = (camvid(split, 0, (96, 128), root) for split in ("train", "test"))
    assert not any(HELD_OUT in n for n in train.names) and sum(HELD_OUT in n for n in test.names) == 62
    assert len(train) == 305 and len(test) == 163 and not set(train.names) & set(test.names)


def test_settings_stay_beside_what_they_made(tmp_path):
    same_plan(tmp_path / "plan.json", dict(size=(64, 96), epochs=1))
    same_plan(tmp_path / "plan.json", dict(size=[64, 96], epochs=1))
    with pytest.raises(ValueError, match="epochs"):
        same_plan(tmp_path / "plan.json", dict(size=(64, 96), epochs=2))
    assert json.loads((tmp_path / "plan.json").read_text())["epochs"] == 1
