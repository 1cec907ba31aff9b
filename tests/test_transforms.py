"Paired transforms: image and label stay together, and no label value is invented"
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from synseg.core import IMAGENET_MEAN, VOID
from synseg.transforms import (
    ElasticGrid, Paired, Photometric, RandomScaleCrop, RandomWarp, adjust_colour, as_pair, colour_matrix, elastic_field,
    eval_transforms, resize_pair, rotation_field, to_tensors, train_transforms, warp)

CLASSES = 5


def blocks(height, width, cell=16, seed=0):
    "An image that encodes its label: every channel is 50 times the class id, in blocks of `cell` pixels"
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(CLASSES, (-(-height // cell), -(-width // cell)), generator=g)
    label = coarse.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width].to(torch.uint8)
    return (label * 50).expand(3, -1, -1).contiguous(), label


def disagreement(image, label):
    "Share of pixels inside a block whose colour names another class (colours mix only where classes meet)"
    near = F.pad(label[None, None].float(), (1, 1, 1, 1), value=VOID).unfold(2, 3, 1).unfold(3, 3, 1)[0, 0]
    inside = (near == label[..., None, None]).all(-1).all(-1) & (label != VOID)
    assert inside.sum() > 50
    return ((image[0] * 255 / 50).round().long() != label)[inside].float().mean().item()


def test_the_witness_sees_two_pixels():
    image, label = Paired()(*blocks(80, 90))
    assert disagreement(image, label) == 0 and disagreement(image, label.roll(2, 1)) > 0.05


GEOMETRY = [
    RandomScaleCrop((61, 83)), RandomScaleCrop((61, 83), (0.3, 0.4)), RandomScaleCrop((61, 83), reference="pixel"),
    RandomWarp(rotation=30, shift=0.2), RandomWarp(elastic=4), RandomWarp(20, 0.1, 3, outside="mirror"), ElasticGrid(5)]


@pytest.mark.parametrize("step", GEOMETRY, ids=lambda s: type(s).__name__ + s.extra_repr()[:40])
@pytest.mark.parametrize("size", [(97, 131), (64, 64), (45, 200)])
def test_image_and_label_stay_together(step, size):
    for seed in range(5):
        torch.manual_seed(seed)
        image, label = Paired(step)(*blocks(*size, seed=seed))
        assert set(label.unique().tolist()) <= {*range(CLASSES), VOID}
        # a warp may squeeze a corner of two blocks into less than a pixel
        assert disagreement(image, label) <= (0.001 if isinstance(step, RandomWarp) else 0)
        assert image.dtype == torch.float32 and label.dtype == torch.int64 and image.shape[1:] == label.shape
        assert image.min() >= 0 and image.max() <= 1


def test_the_whole_training_pipeline_invents_no_value():
    for seed in range(20):
        torch.manual_seed(seed)
        transforms = train_transforms((40, 56), scale=(0.3, 3), rotation=25, shift=0.1, elastic=3)
        image, label = transforms(*blocks(77, 91, seed=seed))
        assert image.shape == (3, 40, 56) and label.shape == (40, 56)
        assert set(label.unique().tolist()) <= {*range(CLASSES), VOID}
        assert image.min() >= 0 and image.max() <= 1 and type(image) is torch.Tensor


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_labels_are_read_at_pixel_centres(factor):
    "torch's 'nearest' would be off by up to half an output pixel; centres are off by nothing on average"
    columns = torch.arange(60 * factor, dtype=torch.float32).expand(8 * factor, -1)
    image = (columns / columns.max()).expand(3, -1, -1)
    label = columns.to(torch.int64)
    small, ids = resize_pair(*as_pair(image, label), (8, 60))
    difference = (small[0] * columns.max() - ids)[:, 2:-2].mean().abs().item()
    assert difference <= (0.51 if factor % 2 == 0 else 0.01)


def test_void_is_exactly_what_lies_outside():
    for seed in range(10):
        torch.manual_seed(seed)
        image, label = Paired(RandomScaleCrop((50, 50), (0.5, 0.5)))(*blocks(100, 80))
        outside = label == VOID
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        fill = (image - mean).abs().amax(0) < 0.003
        assert outside.any() and (fill == outside).all()
        inside = (~outside).nonzero()
        assert (inside.max(0).values - inside.min(0).values + 1).tolist() == [31, 25]  # max(50/100, 50/80) * 0.5


def test_scale_one_is_the_whole_image_or_its_own_pixels():
    image, label = blocks(120, 160)
    whole, ids = Paired(RandomScaleCrop((30, 40), (1, 1)))(image, label)
    expected = resize_pair(*as_pair(image, label), (30, 40))
    assert torch.equal(ids, expected[1].long()) and torch.allclose(whole, expected[0].float() / 255)
    own, ids = Paired(RandomScaleCrop((30, 40), (1, 1), reference="pixel"))(image, label)
    windows = (label.unfold(0, 30, 1).unfold(1, 40, 1) == ids.to(torch.uint8)).all(-1).all(-1)
    assert windows.any() and torch.equal((own[0] * 255 / 50).round().long(), ids)


def test_scales_are_spread_over_the_range():
    torch.manual_seed(0)
    crop, seen = RandomScaleCrop((100, 100), (0.5, 2.0)), []
    for _ in range(300):
        where = crop.make_params([tv_tensors.Image(torch.zeros(3, 100, 100))])
        source, target = where["source"][0], where["target"][0]
        seen.append((target.stop - target.start) / (source.stop - source.start))
    assert 0.5 <= min(seen) < 0.56 and 1.9 < max(seen) <= 2.02 and abs(np.mean(seen) - 1.25) < 0.08


def test_rotation_there_and_back():
    y, x = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
    smooth = tv_tensors.Image((0.5 + 0.4 * torch.sin(x / 9) * torch.cos(y / 11)).expand(3, -1, -1))
    turned = warp(warp(smooth, rotation_field((101, 101), 20)), rotation_field((101, 101), -20))
    assert (turned - smooth)[:, 30:70, 30:70].abs().max() < 0.01
    quarter = warp(smooth, rotation_field((101, 101), 90))
    assert torch.allclose(quarter, torch.rot90(smooth, -1, (1, 2)), atol=1e-4)  # clockwise


def test_shift_moves_content_right_and_down_and_leaves_void():
    image, label = as_pair(*blocks(40, 50))
    field = rotation_field((40, 50), 0, (7, 3))
    moved = warp(label, field)
    assert torch.equal(moved[3:, 7:], label[:-3, :-7]) and (moved[:3] == VOID).all() and (moved[:, :7] == VOID).all()
    assert torch.equal(warp(image, field)[:, 3:, 7:], image[:, :-3, :-7])
    assert not (warp(label, field, "mirror") == VOID).any()


def test_no_displacement_changes_nothing():
    image, label = as_pair(*blocks(33, 47))
    assert torch.equal(warp(image, torch.zeros(2, 33, 47)), image) and torch.equal(warp(label, torch.zeros(2, 33, 47)), label)


def test_elastic_grid_has_the_papers_statistics():
    fields = torch.stack([elastic_field((65, 65), 10, 3) for _ in range(400)])
    corner, centre = fields[:, :, 0, 0], fields[:, :, 32, 32]
    for at in (corner, centre):  # a grid point's displacement is the drawn vector itself
        assert abs(at.std().item() - 10) < 0.8 and abs(at.mean().item()) < 1
    assert abs(np.corrcoef(corner[:, 0], centre[:, 0])[0, 1]) < 0.15


@pytest.mark.parametrize("name, value", [("brightness", 0.8), ("contrast", 0.8), ("saturation", 1.2), ("saturation", 0.5)])
def test_colour_agrees_with_torchvision_one_at_a_time(name, value):
    image = torch.rand(3, 37, 41) * 0.6 + 0.2  # nothing clips
    ours = adjust_colour(tv_tensors.Image(image), **{name: value})
    assert torch.allclose(ours, getattr(tvf, f"adjust_{name}")(image, value), atol=2e-4)


def test_colour_changes_commute_and_keep_grey():
    image = tv_tensors.Image(torch.rand(3, 20, 30) * 0.3 + 0.35)
    both = adjust_colour(image, brightness=1.1, contrast=0.8, saturation=1.2, hue=0.03)
    chained = image
    for change in (dict(hue=0.03), dict(saturation=1.2), dict(brightness=1.1), dict(contrast=0.8)):
        chained = adjust_colour(chained, **change)
    assert torch.allclose(both, chained, atol=1e-5)
    assert torch.allclose(colour_matrix(1, 1, 0.3) @ torch.ones(3), torch.ones(3), atol=1e-5)
    assert torch.allclose(colour_matrix(hue=0.2) @ colour_matrix(hue=0.3), colour_matrix(hue=0.5), atol=1e-5)
    as_bytes = tv_tensors.Image((image * 255).round().to(torch.uint8))
    assert torch.allclose(adjust_colour(as_bytes, contrast=0.7), adjust_colour(image, contrast=0.7), atol=0.004)


def test_colour_leaves_the_label_and_the_input_alone():
    image, label = as_pair(*blocks(30, 40))
    before = image.clone()
    new, same = Photometric(0.9, 0.9, 0.9, 0.5)(image, label)
    assert same is label and torch.equal(image, before) and new.min() >= 0 and new.max() <= 1


def test_inputs_are_never_changed_in_place():
    image, label = blocks(50, 60)
    kept = image.clone(), label.clone()
    for _ in range(10): train_transforms((50, 60), rotation=10, elastic=2)(image, label)
    for _ in range(3): train_transforms((50, 60), scale=(1, 1), flip=1, jitter=0)(image, label)
    assert torch.equal(image, kept[0]) and torch.equal(label, kept[1])


def test_arrays_are_height_width_channel():
    image, label = blocks(30, 40)
    pair = Paired()(image.permute(1, 2, 0).numpy(), label.numpy())
    assert torch.equal(pair[0], image.float() / 255) and torch.equal(pair[1], label.long())


def test_evaluation_keeps_the_label():
    image, label = blocks(60, 80)
    small, same = eval_transforms((30, 40))(image, label)
    assert small.shape == (3, 30, 40) and torch.equal(same, label.long())
    assert torch.equal(eval_transforms()(image, label)[0], image.float() / 255)
    again = pickle.loads(pickle.dumps(eval_transforms((30, 40))))  # spawned workers need that
    assert torch.equal(again(image, label)[0], small)
    pickle.loads(pickle.dumps(train_transforms((30, 40), rotation=5)))


@pytest.mark.parametrize("image, label, message", [
    (torch.zeros(1, 8, 8), torch.zeros(8, 8), r"\(1, 8, 8\).*\(3, H, W\)"),
    (torch.zeros(4, 8, 8), torch.zeros(8, 8), "alpha"),
    (torch.zeros(8, 8), torch.zeros(8, 8), r"\(8, 8\)"),
    (torch.zeros(3, 8, 9), torch.zeros(9, 8), "8x9 and its label 9x8"),
    (torch.zeros(3, 0, 9), torch.zeros(0, 9), "zero size"),
    (np.zeros((3, 8, 9), np.uint8), np.zeros((8, 9), np.uint8), "H x W x 3")])
def test_bad_pairs_are_explained(image, label, message):
    with pytest.raises(ValueError, match=message): train_transforms((8, 8))(image, label)


def test_bad_settings_are_explained():
    for make in (lambda: RandomScaleCrop((0, 5)), lambda: RandomScaleCrop((5, 5), (0, 1)), lambda: RandomScaleCrop((5, 5), (2, 1)),
                 lambda: RandomScaleCrop((5, 5), reference="half"), lambda: RandomWarp(outside="black")):
        with pytest.raises(ValueError): make()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3)])
def test_tiny_images_survive(size):
    for seed in range(5):
        torch.manual_seed(seed)
        image, label = train_transforms((16, 16), rotation=10, elastic=1)(torch.rand(3, *size), torch.zeros(size, dtype=torch.int64))
        assert image.shape == (3, 16, 16) and not math.isnan(image.sum())


def test_floats_and_wide_labels_pass_through():
    image, label = to_tensors(tv_tensors.Image(torch.rand(3, 4, 5, dtype=torch.float64)), tv_tensors.Mask(torch.zeros(4, 5, dtype=torch.int16)))
    assert image.dtype == torch.float32 and label.dtype == torch.int64


def test_read_only_and_mirrored_arrays_are_welcome(recwarn):
    image, label = np.random.rand(6, 8, 3).astype(np.float32), np.zeros((6, 8), np.uint8)
    for array in (image, label): array.flags.writeable = False
    as_pair(image, label), as_pair(image[:, ::-1], label[:, ::-1])
    assert not recwarn.list
