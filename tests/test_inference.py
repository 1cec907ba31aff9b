"Any image, any size: tiles equal the whole, files of every kind are read, and what cannot be read is explained"
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from synseg.check import receptive_field
from synseg.inference import (SCALES, _bands, _resized, as_image, halo_for, predict, predict_probabilities, tile_spans)
from synseg.unet import UNet, ValidUNet, unet_small
from synseg.zoo import create_model


def network(num_classes=5, in_channels=3, seed=0, **options):
    "A small U-Net whose batch norm has statistics worth the name"
    torch.manual_seed(seed)
    model = UNet(num_classes, in_channels, width=6, depth=2, norm=True, up="nearest", **options)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.score.bias)  # no ties where all features are zero
    return model.eval()


@pytest.mark.parametrize("shape", [(64, 64), (150, 333), (97, 201), (64, 511), (40, 90), (7, 9)])
@pytest.mark.parametrize("tta", [False, True])
def test_tiles_equal_the_whole(shape, tta):
    model, x = network(), torch.rand(3, *shape)
    whole, tiled = (predict_probabilities(model, x, tile, tta) for tile in (None, 64))
    assert whole.shape == (5, *shape)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.sum(0), torch.ones(shape))


def test_whole_is_what_the_model_says():
    model, x = network(), torch.rand(3, 77, 101)
    with torch.inference_mode():
        want = model(x[None])[0].softmax(0)
    torch.testing.assert_close(predict_probabilities(model, x), want, rtol=1e-4, atol=1e-5)
    assert (predict(model, x) == want.max(0).indices).double().mean() > 0.999


def test_labels_and_probabilities_agree_when_resized():
    model, x = network(), torch.rand(3, 130, 187)
    labels, probabilities = predict(model, x, size=80), predict_probabilities(model, x, size=80)
    assert labels.shape == x.shape[-2:] and labels.dtype == torch.int64
    assert (labels == probabilities.max(0).indices).double().mean() > 0.999


def test_a_missing_halo_leaves_seams():
    model, x = network(), torch.rand(3, 128, 128)
    whole = predict_probabilities(model, x)
    errors = [float((predict_probabilities(model, x, 32, halo=h) - whole).abs().max()) for h in (0, halo_for(model))]
    assert errors[0] > 1e-3 > 1e-5 > errors[1]


def test_halo_covers_the_receptive_field():
    model = network()
    assert halo_for(model) % model.stride == 0
    assert max(receptive_field(model, 97)) <= 2 * halo_for(model) + 1
    assert halo_for(unet_small(4).eval()) == 48


class Pooled(nn.Module):
    stride = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        z = self.conv(x)
        return z + z.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("model", [Pooled(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4))])
def test_networks_that_see_everything_have_no_halo_and_say_so(model):
    assert halo_for(model, limit=256) is None
    with pytest.warns(UserWarning, match="whole image"):
        predict(model, torch.rand(3, 80, 90), tile=64)


def test_modes_come_back():
    model = network().train()
    model.down[0].eval()
    before = [m.training for m in model.modules()]
    predict(model, torch.rand(3, 64, 64), tile=64)
    assert [m.training for m in model.modules()] == before


def test_valid_networks_and_single_scores():
    valid = ValidUNet(2, 1, width=4).eval()
    x = torch.rand(1, 130, 215)
    torch.testing.assert_close(predict_probabilities(valid, x, tile=64), predict_probabilities(valid, x), rtol=1e-4, atol=1e-5)
    single = network(num_classes=1)
    p = predict_probabilities(single, torch.rand(3, 64, 70))
    assert p.shape == (2, 64, 70) and set(predict(single, torch.rand(3, 64, 70)).unique().tolist()) <= {0, 1}


def test_mirror_images_are_treated_alike():
    model, x = network(), torch.rand(3, 96, 112)  # multiples of 4 strides: no padding, which has a side
    torch.testing.assert_close(predict_probabilities(model, x.flip(2), tta=True).flip(2),
                               predict_probabilities(model, x, tta=True), rtol=1e-3, atol=1e-4)
    assert 1.0 in SCALES


def test_crf_is_called_with_log_probabilities_and_image():
    seen = {}

    def crf(log_probs, image):
        seen.update(sums=log_probs.exp().sum(1), image=image)
        return log_probs.flip(1)
    model, x = network(), torch.rand(3, 64, 80)
    flipped = predict(model, x, crf=crf)
    torch.testing.assert_close(seen["sums"], torch.ones(1, 64, 80))
    torch.testing.assert_close(seen["image"], x[None])
    assert (flipped == 4 - predict(model, x)).double().mean() > 0.999


@pytest.mark.parametrize("length,tile,halo", [(250, 64, 16), (64, 64, 0), (65, 64, 8), (1000, 96, 200), (70, 200, 40)])
def test_spans_cover_without_gap_or_overlap(length, tile, halo):
    spans = tile_spans(length, tile, halo, minimum=64, stride=8)
    assert spans[0][2] == 0 and spans[-1][3] == length
    assert all(a[3] == b[2] for a, b in zip(spans, spans[1:]))
    for start, stop, a, b in spans:
        assert 0 <= start <= max(0, a - halo) and min(length, b + halo) == stop
        assert start % 8 == 0 and (stop - start >= 64 or start == 0)


def test_bands_are_interpolate():
    z = torch.randn(3, 23, 31)
    bands = torch.cat([b for _, b in _bands(z, (117, 64), rows=50)], 1)
    torch.testing.assert_close(bands, F.interpolate(z[None], (117, 64), mode="bilinear")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size,want", [(None, (60, 90)), (30, (30, 45)), ((20, 70), (20, 70)), (60, (60, 90))])
def test_sizes(size, want):
    assert _resized(torch.rand(3, 60, 90), size).shape[-2:] == want


def test_tiling_bounds_memory():
    if sys.platform != "linux":
        pytest.skip("reads peak memory from /proc")
    probe = """
import json, torch
from pathlib import Path
from synseg import create_model, predict
read = lambda f: int(Path("/proc/self/status").read_text().split(f + ":")[1].split()[0])
model, x, peaks = create_model("unet_small", 11), torch.rand(3, 512, 768), []
predict(model, x[:, :256, :256], tile=128)
for tile in (128, None):
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    predict(model, x, tile)
    peaks.append(read("VmHWM") - before)
print(json.dumps(peaks))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not let us reset peak memory")
    tiled, whole = json.loads(done.stdout)
    assert tiled * 3 < whole


def test_every_kind_of_file_is_read(tmp_path):
    value, rgb = 102, np.full((5, 8, 3), 102, np.uint8)
    base = Image.fromarray(rgb)
    for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        base.convert(mode).save(tmp_path / f"{mode}.{suffix}")
        x = as_image(tmp_path / f"{mode}.{suffix}")
        torch.testing.assert_close(x, torch.full((3, 5, 8), value / 255), atol=0.02, rtol=0)
    Image.fromarray(np.full((5, 8), value * 257, np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(as_image(tmp_path / "deep.png"), torch.full((3, 5, 8), value / 255))
    Image.fromarray(rgb[..., 0] > 50).save(tmp_path / "bit.png")
    assert as_image(tmp_path / "bit.png").eq(1).all()


def test_orientation_is_obeyed(tmp_path):
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10))
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(tmp_path / "a.png", exif=exif)
    torch.testing.assert_close(as_image(tmp_path / "a.png", 1)[0] * 255, torch.arange(60.).view(6, 10).rot90())


@pytest.mark.parametrize("array", [torch.rand(3, 6, 7), torch.rand(1, 3, 6, 7), np.random.rand(6, 7, 3),
                                   np.zeros((6, 7, 4), np.uint8), np.zeros((6, 7), np.uint16), torch.zeros(6, 7, dtype=torch.uint8)])
def test_arrays_and_tensors(array):
    for channels in (1, 3):
        x = as_image(array, channels)
        assert x.shape == (channels, 6, 7) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


def test_grey_is_the_luma_of_colour():
    x = torch.rand(3, 9, 9)
    want = np.asarray(Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).convert("L")) / 255
    torch.testing.assert_close(as_image(x, 1)[0].double(), torch.from_numpy(want), atol=0.006, rtol=0)


@pytest.mark.parametrize("bad,sentence", [
    (torch.rand(3, 6, 7) * 255, "divide by 255"), (torch.full((3, 6, 7), float("nan")), "must lie in"),
    (np.zeros((0, 7, 3), np.uint8), "empty"), (np.zeros((2, 6, 7, 3), np.uint8), "expected one image"),
    (np.zeros((6, 7), np.int64), "expected uint8"), (torch.rand(5, 6, 7), "expected one image"), ([1, 2], "expected a path")])
def test_what_is_no_image_is_explained(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_image(bad)


def test_bad_files_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file"):
        as_image(tmp_path / "gone.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "none.png").write_bytes(b"")
    for name in ("text.jpg", "cut.png", "none.png"):
        with pytest.raises(ValueError, match="cannot be read"):
            as_image(tmp_path / name)


@pytest.mark.parametrize("how", [dict(tile=0), dict(tile=64, halo=-1), dict(size=0), dict(size=(0, 5))])
def test_impossible_settings_are_refused(how):
    with pytest.raises(ValueError):
        predict(network(), torch.rand(3, 64, 64), **how)


@pytest.mark.parametrize("name, options", [("segnet", dict(width=4)), ("fc_densenet56", dict(width=4, growth=2))])
def test_networks_that_say_stride_1_and_pool_have_no_seams_either(name, options):
    torch.manual_seed(0)
    model, x = create_model(name, 3, **options).eval(), torch.rand(3, 70, 411)
    torch.testing.assert_close(predict_probabilities(model, x, tile=150, halo=250), predict_probabilities(model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape,size,want", [((3, 5000), 96, (3, 5000)), ((40, 800), 96, (96, 1920)), ((40, 3000), 96, (55, 4096)), ((300, 9000), 120, (120, 3600))])
def test_a_strip_is_not_enlarged_without_end(shape, size, want):
    assert _resized(torch.rand(3, *shape), size).shape[-2:] == want
