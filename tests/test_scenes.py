"The embedded data set: what it promises to everybody who trains on it"
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from synseg.core import VOID
from synseg.scenes import Scenes

CAMVID = np.array([16.845, 23.259, .983, 31.658, 4.486, 9.724, 1.173, 1.127, 5.866, .639, .292])
both = pytest.mark.parametrize("domain", ["synthetic", "camera"])


@both
@pytest.mark.parametrize("size", [(96, 128), (61, 77), (64, 200)])
def test_items(domain, size):
    data = Scenes(3, size, domain)
    image, label = data[1]
    assert image.shape == (3, *size) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1 and image.is_contiguous()
    assert label.shape == size and label.dtype == torch.int64
    assert set(label.unique().tolist()) <= set(range(11)) | {VOID}
    pixels, ids = data.raw(1)
    assert pixels.dtype == ids.dtype == np.uint8
    assert torch.equal(torch.from_numpy(ids.astype(np.int64)), label) and np.array_equal(np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8), pixels)


@both
def test_the_same_scene_in_any_order_process_and_length(domain):
    data = Scenes(20, (24, 32), domain, seed=5)
    want = [data.raw(i) for i in range(20)]
    for i in (13, 2, 19): assert np.array_equal(data.raw(i)[0], want[i][0])
    other = pickle.loads(pickle.dumps(Scenes(4000, (24, 32), domain, seed=5)))
    assert np.array_equal(other.raw(7)[0], want[7][0]) and np.array_equal(other.raw(7)[1], want[7][1])
    assert np.array_equal(data.raw(-1)[0], want[19][0])


def test_loading_workers_draw_the_same_scenes():
    data = Scenes(8, (24, 32), "camera")
    plain, workers = (torch.cat([x for x, _ in DataLoader(data, 4, num_workers=n)]) for n in (0, 2))
    assert torch.equal(plain, workers)


def test_seeds_and_domains_are_disjoint():
    seen = {Scenes(40, (24, 32), d, seed=s).raw(i)[1].tobytes() for d in ("synthetic", "camera") for s in range(3) for i in range(40)}
    assert len(seen) == 240


@both
def test_labels_agree_across_sizes(domain):
    small, large = Scenes(4, (41, 53), domain), Scenes(4, (123, 159), domain)
    assert np.mean([(large.raw(i)[1][1::3, 1::3] == small.raw(i)[1]).mean() for i in range(4)]) > .95


@both
def test_proportions_are_those_of_camvid_within_a_factor_of_two(domain):
    data, counts = Scenes(200, (48, 64), domain, seed=9), np.zeros(256)
    for i in range(200): counts += np.bincount(data.raw(i)[1].ravel(), minlength=256)
    share = 100 * counts / counts.sum()
    factor = share[:11] / CAMVID
    assert factor.min() > .5 and factor.max() < 2, np.round(factor, 2)
    assert .5 < share[VOID] < 5


def test_the_domains_look_different():
    mean = {d: np.mean([Scenes(30, (24, 32), d).raw(i)[0].mean((0, 1)) for i in range(30)], 0) for d in ("synthetic", "camera")}
    assert np.abs(mean["synthetic"] - mean["camera"]).max() > 10


def test_a_set_can_be_walked_through():
    assert len(list(Scenes(3, (16, 16)))) == 3


@pytest.mark.parametrize("wrong, message", [
    (dict(domain="photo"), "choose 'synthetic' or 'camera'"), (dict(n=-1), "0 or more"), (dict(seed=-4), "0 or more"), (dict(size=(0, 8)), "at least 1"), (dict(size=(8,)), "height, width")])
def test_bad_arguments_are_explained(wrong, message):
    with pytest.raises(ValueError, match=message): Scenes(**{"n": 3, **wrong})


def test_beyond_the_end():
    for i in (3, -4):
        with pytest.raises(IndexError, match="set of 3"): Scenes(3)[i]
