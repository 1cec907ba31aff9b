"""Every public name on drawn input: any size, type and layout in memory gives the right kind of answer, the same for the same
values, or a ValueError in plain words. `@covers` names what a test is about; a public name without one fails the last test."""
import contextlib
import io
import json
import math
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.pyplot import close
from PIL import Image
from torch import nn

import synseg
from synseg import (VOID, ConfusionMatrix, ConvCRF, CrossEntropyLoss, DenseCRF, DiceLoss, FocalLoss, GridCRF, HistoryBuffer, KMeansSegmenter,
                    LabelSpace, Learner, LovaszSoftmaxLoss, ModelInfo, Refiner, Scenes, Segmenter, Shards, boundary_iou, check_labels, check_segmenter,
                    count_parameters, create_discriminator, create_model, default_device, discriminator_info, draw_network, eval_transforms, expect_fail, export,
                    feature_extractor, fold_batchnorm, frechet_distance, import_labelme, kernel_distance, label_space, list_discriminators, list_models, load_dataset,
                    load_model, load_result, log_probs_from_labels, median_frequency_weights, model_info, overlay, perceptual_distance, predict,
                    prune_filters, receptive_field, record_result, save_model, seed_everything, show_segmentation, ssim, test_same, trace,
                    trace_network, train_transforms, trimap_iou, write_shards)
from synseg.inference import as_image

COVERED, NAN, INF = {}, math.nan, math.inf
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def covers(*names):
    def mark(test):
        for name in names: COVERED.setdefault(name, []).append(test)
        return test
    return mark


def drawn(examples, **strategies):
    "A property on `examples` draws, the same ones in every run"
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return lambda test: settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet, database=None)(given(**strategies)(test))


def refused(call):
    "A ValueError in words, and nothing else"
    with pytest.raises(ValueError) as error: call()
    assert len(str(error.value)) > 20 and " " in str(error.value), str(error.value)


def answered(call):
    "What the call gives, or None where it is refused in words"
    try: return call()
    except ValueError as error: assert len(str(error)) > 20, error


def arranged(x, layout: str):
    "The same values, laid out differently in memory"
    if layout == "strided": return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if layout == "transposed" and x.ndim > 1: return x.mT.contiguous().mT
    if layout == "channels last" and x.ndim == 4: return x.contiguous(memory_format=torch.channels_last)
    if layout == "cut out": return torch.cat([x, x], -1)[..., x.shape[-1]:]
    return x


def random(seed: int): return torch.Generator().manual_seed(seed)


SEED, SIDE, LAYOUT = st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(["strided", "transposed", "channels last", "cut out"])
DEVICE = st.sampled_from(DEVICES)


# Core and instruments

@covers("VOID", "seed_everything", "default_device")
@drawn(25, seed=st.one_of(st.integers(-2**63, 2**64 - 1), st.integers(-2**80, 2**80), st.floats(), st.sampled_from([None, "a", np.int64(3)])))
def test_seeds(seed):
    assert VOID == 255 and default_device().type in ("cpu", "cuda", "mps")
    if isinstance(seed, (int, np.integer)) and -2**63 <= seed < 2**64:
        first = seed_everything(seed), torch.rand(3), np.random.rand()
        again = seed_everything(seed), torch.rand(3), np.random.rand()
        assert torch.equal(first[1], again[1]) and first[2] == again[2]
    else: refused(lambda: seed_everything(seed))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), lambda x: st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6)


@covers("record_result", "load_result")
@drawn(25, name=st.one_of(st.sampled_from(["run", "", "../up", "a/b", "/root"]), st.text("abc_-.", min_size=1, max_size=8)), metrics=st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_records(tmp_path, name, metrics):
    folder, here = tmp_path/"in"/"results", os.getcwd()
    made = answered(lambda: record_result(name, {}, metrics, folder=folder))
    assert (made is not None) == (name != "" and "/" not in name and name not in (".", ".."))
    assert not [p for p in tmp_path.rglob("*.json") if p.parent != folder]
    refused(lambda: record_result("run", {}, dict(x=torch.zeros(2)), folder=folder))
    if made:
        os.chdir(folder.parent)
        try:
            assert load_result(name)["metrics"] == metrics and load_result("never made") is None
            made.write_text("{")
            refused(lambda: load_result(name))
        finally: os.chdir(here)
        made.unlink()


@covers("test_same", "expect_fail")
@drawn(20, seed=SEED, layout=LAYOUT, dtype=st.sampled_from([*FLOATS, torch.int64, torch.bool]))
def test_sameness(seed, layout, dtype):
    x = (4*torch.rand(2, 3, 4, 5, generator=random(seed))).to(dtype)
    test_same(arranged(x, layout), x)
    other = x.clone()
    other[1, 2, 3, 4] = not other[1, 2, 3, 4] if dtype == torch.bool else other[1, 2, 3, 4] + 1
    for wrong in (other, x[:1], x.to(torch.int16)):
        with expect_fail(AssertionError) as failure: test_same(wrong, x)
        assert failure.message
    with pytest.raises(AssertionError):
        with expect_fail(ValueError): pass


class Plain(Segmenter):
    def __init__(self, classes=3, channels=3, kernel=3, stride=1):
        super().__init__(classes, channels, stride)
        self.conv, self.norm = nn.Conv2d(channels, 4, kernel, padding=kernel//2), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, classes, 1)
    def compute(self, x): return self.head(self.norm(self.conv(x)).relu())


@covers("Segmenter", "check_segmenter", "count_parameters", "trace", "receptive_field")
@drawn(8, classes=st.integers(-1, 4), channels=st.integers(0, 4), half=st.integers(0, 3), stride=st.sampled_from([1, 2, 8]))
def test_networks_of_ones_own(classes, channels, half, stride):
    if classes < 1 or channels < 1: return refused(lambda: Plain(classes, channels))
    build = lambda: Plain(classes, channels, 2*half + 1, stride)
    net = build()
    count = channels*4*(2*half + 1)**2 + 4 + 8 + 4*classes + classes
    assert count_parameters(net) == count == check_segmenter(build, classes, channels, sizes=((64, 64), (67, 65)))["parameters"]
    assert sum(row.parameters for row in trace(net, torch.rand(1, channels, 64, 70))) == count
    net.min_size = 1
    assert receptive_field(net, (9, 11), channels, samples=2) == (2*half + 1,)*2


@covers("Segmenter")
@drawn(40, seed=SEED, h=st.integers(0, 90), w=st.integers(0, 90), n=st.integers(0, 3), dtype=st.sampled_from([*FLOATS, *WHOLE, torch.bool, torch.complex64]),
       layout=LAYOUT, device=DEVICE, own=st.sampled_from([torch.float32, torch.float64]))
def test_a_network_takes_any_float_image(seed, h, w, n, dtype, layout, device, own):
    net = Plain(stride=8).eval().to(device, own)
    x = torch.rand(n, 3, h, w, generator=random(seed)).to(device, dtype)
    if min(h, w) < 64 or dtype not in FLOATS: return refused(lambda: net(x))
    with torch.no_grad(): out, again = net(x), net(arranged(x, layout))
    assert out.shape == (n, 3, h, w) and out.dtype == own and out.isfinite().all()
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-4)


# Labels, data and pictures

@st.composite
def labels(draw, dtypes=tuple(WHOLE), dims=3):
    "(labels int64, the same in another type and layout, K): from one pixel, all of it void in some"
    n, h, w, k = draw(st.integers(1, 3)), draw(SIDE), draw(SIDE), draw(st.integers(2, 12))
    dtype, void, rng = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.0, 0.3, 1.0])), random(draw(SEED))
    y = torch.randint(0, k, (n, h, w), generator=rng)
    if dtype != torch.int8: y[torch.rand(y.shape, generator=rng) < void] = VOID
    y = y if dims == 3 else y[0]
    return y, arranged(y.to(dtype), draw(LAYOUT)), k


@covers("check_labels", "label_space", "LabelSpace", "log_probs_from_labels")
@drawn(40, case=labels(), bad=st.sampled_from([-1, 12, 254, 256, 2**31, -2**31]), space=st.sampled_from(["camvid", "cityscapes", "voc2012", "coco_stuff", "nowhere"]))
def test_label_contract(case, bad, space):
    y, same, k = case
    check_labels(same, k)
    logp = log_probs_from_labels(same, k)
    assert torch.equal(logp, log_probs_from_labels(y, k)) and torch.allclose(logp.exp().sum(1), torch.ones(()))
    wrong = y.clone()
    wrong[0, 0, 0] = bad
    for call in (check_labels, log_probs_from_labels): refused(lambda: call(wrong, k))
    for junk in (y.float(), y[:0], y[..., :0], y + 0j): refused(lambda: check_labels(junk, k))
    if space == "nowhere": return refused(lambda: label_space(space))
    s = label_space(space)
    assert LabelSpace.from_dict(asdict(s)) == s
    fits = y.where((y < s.num_classes) | (y == VOID), 0)
    colours = s.to_colour(fits)
    assert colours.shape == (*y.shape, 3) and colours.dtype == np.uint8 and s.to_disk(fits.clamp(max=s.num_classes - 1)).dtype == np.uint8


@covers("LabelSpace")
@drawn(30, names=st.lists(st.text(max_size=3), max_size=3), colours=st.lists(st.lists(st.integers(-2, 300), min_size=2, max_size=4), max_size=3), ids=st.lists(st.integers(-1, 300), max_size=3))
def test_label_spaces_are_checked_when_made(names, colours, ids):
    space = answered(lambda: LabelSpace(names, colours, ids))
    if space is not None: assert space.to_colour(np.arange(space.num_classes)[None]).shape == (1, space.num_classes, 3)
    for junk in ({}, dict(nmaes=[]), dict(names=3, palette=4)): refused(lambda: LabelSpace.from_dict(junk))


@covers("Scenes")
@drawn(12, n=st.one_of(st.integers(-1, 3)), h=st.integers(0, 40), w=st.integers(0, 40), seed=st.integers(-1, 2**70), domain=st.sampled_from(["synthetic", "camera", "moon"]))
def test_scenes_of_any_size(n, h, w, seed, domain):
    if n < 0 or min(h, w) < 1 or seed < 0 or domain == "moon": return refused(lambda: Scenes(n, (h, w), domain, seed))
    scenes = Scenes(n, (h, w), domain, seed)
    if not n: return
    image, label = scenes[n - 1]
    assert image.shape == (3, h, w) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    check_labels(label, 11)
    assert label.dtype == torch.int64 and torch.equal(scenes[-1][0], image)


PICTURE = [torch.uint8, *FLOATS]


@covers("train_transforms", "eval_transforms")
@drawn(40, seed=SEED, h=SIDE, w=SIDE, out=st.tuples(SIDE, SIDE), dtype=st.sampled_from([*PICTURE, torch.int64, torch.bool, torch.complex64]), ldtype=st.sampled_from(WHOLE),
       layout=LAYOUT, warp=st.booleans(), arrays=st.booleans())
def test_augmentation_of_any_picture(seed, h, w, out, dtype, ldtype, layout, warp, arrays):
    scale = 255 if dtype == torch.uint8 else 1
    image = (scale*torch.rand(3, h, w, generator=random(seed))).to(dtype)
    label = torch.randint(0, 11, (h, w), generator=random(seed))
    given = (image, label.to(ldtype)) if not arrays or dtype == torch.bfloat16 else (image.permute(1, 2, 0).flip(0).numpy()[::-1], label.to(ldtype).numpy())
    train, test = train_transforms(out, rotation=20*warp, elastic=3.0*warp), eval_transforms(out)
    if dtype not in PICTURE:
        for t in (train, test): refused(lambda: t(*given))
        return
    torch.manual_seed(seed)
    x, y = train(*given)
    assert x.shape == (3, *out) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 and y.dtype == torch.int64
    check_labels(y, 11)
    torch.manual_seed(seed)
    x2, y2 = train(arranged(image, layout), arranged(label, layout))
    assert torch.equal(y, y2)
    torch.testing.assert_close(x2, x, rtol=1e-4, atol=1e-4)
    x, y = test(*given)
    assert x.shape == (3, *out) and torch.equal(y, label)


@covers("train_transforms", "eval_transforms")
@drawn(30, key=st.sampled_from(["size", "scale", "flip", "jitter", "rotation", "shift", "elastic"]), value=st.sampled_from([NAN, INF, -1.0, -INF]))
def test_settings_of_augmentation(key, value):
    pair = dict(size=(8, 8), **{key: (value, value) if key in ("size", "scale") else value}) if key != "size" else dict(size=(8, value if value == -1 else 0))
    refused(lambda: train_transforms(**pair))
    for size in ((0, 4), (2.5, 4), 7, (4,), "ab"): refused(lambda: eval_transforms(size))
    image, label = torch.rand(3, 4, 4), torch.zeros(4, 4).long()
    image[0, 0, 0] = NAN if value == -1 else value
    for t in (train_transforms((8, 8)), eval_transforms()):
        if math.isfinite(float(image[0, 0, 0])): continue
        refused(lambda: t(image, label))
        refused(lambda: t(image.nan_to_num(), label + 0.5))


@covers("load_dataset")
@drawn(25, name=st.one_of(st.text(max_size=6), st.sampled_from(["camvid", "voc2012", "folder", "gta5", "isbi2012"])), split=st.one_of(st.text(max_size=5), st.sampled_from(["train", "val", "all"])))
def test_data_sets_that_are_not_there(tmp_path, name, split):
    with pytest.raises((ValueError, FileNotFoundError)) as error: load_dataset(name, tmp_path, split)
    assert len(str(error.value)) > 20


@covers("overlay", "show_segmentation")
@drawn(30, case=labels(dims=2), dtype=st.sampled_from([*PICTURE, torch.int64, torch.bool]), channels=st.sampled_from([1, 2, 3]), extreme=st.sampled_from([0.5, NAN, INF, -5.0, 1e30]), alpha=st.sampled_from([0, 0.5, 1, -1, NAN, 5]))
def test_pictures_of_any_labels(case, dtype, channels, extreme, alpha):
    y, same, _ = case
    image = (torch.rand(channels, *y.shape)*(1 if dtype.is_floating_point else 255)).to(dtype)
    if dtype.is_floating_point: image[0, 0, 0] = extreme
    fine = channels != 2 and not (dtype.is_floating_point and math.isnan(extreme))
    if not fine or not 0 <= alpha <= 1: return refused(lambda: overlay(image, same, alpha=alpha))
    tinted = overlay(image, same, alpha=alpha)
    assert tinted.shape == (*y.shape, 3) and tinted.dtype == np.uint8 and np.array_equal(tinted, overlay(image, y, alpha=alpha))
    refused(lambda: overlay(image, torch.zeros(y.shape[0] + 1, y.shape[1]).long()))
    refused(lambda: overlay((torch.rand(3, *y.shape)*60000 + 300).int(), y))
    for empty in ([], torch.rand(0, 3, 4, 4)): refused(lambda: show_segmentation(empty))
    refused(lambda: show_segmentation(image, y, rows=0))


@covers("show_segmentation")
@drawn(3, case=labels(dims=2))
def test_a_figure_of_any_labels(case):
    y, same, _ = case
    figure = show_segmentation(torch.rand(3, *y.shape), same, y)
    assert len(figure.axes) == 4
    figure.savefig(io.BytesIO(), format="png", dpi=30)


# Scores and losses

@covers("ConfusionMatrix", "trimap_iou", "boundary_iou")
@drawn(50, case=labels(), seed=SEED, width=st.one_of(st.integers(1, 20), st.sampled_from([10**6, 2**40, 0, -1, 2.5, NAN, INF])), ratio=st.sampled_from([0, 0.02, 1, NAN, INF, -1, 1e9]), layout=LAYOUT, device=DEVICE)
def test_scores_of_any_labels(case, seed, width, ratio, layout, device):
    y, same, k = case
    guess = torch.randint(0, k, y.shape, generator=random(seed))
    count = lambda p, t: ConfusionMatrix(k).update(p.to(device), t.to(device))
    assert torch.equal(count(arranged(guess, layout).to(same.dtype), same).counts, count(guess, y).counts) and int(count(guess, y).matrix.sum()) == int((y != VOID).sum())
    scores = nn.functional.one_hot(guess, k).movedim(-1, 1).float()
    assert torch.equal(count(arranged(scores, layout), y).counts, count(guess, y).counts)
    for call, plain in ((lambda p, t: trimap_iou(p, t, width), isinstance(width, int) and 1 <= width < 2**31), (lambda p, t: boundary_iou(p, t, ratio), 0 <= ratio <= 1)):
        if not plain:
            refused(lambda: call(guess, y))
            continue
        value = call(guess, y)
        assert math.isnan(value) or 0 <= value <= 1
        assert call(arranged(guess, layout), same) == pytest.approx(value, nan_ok=True)
    for wrong in (guess.float(), guess + 0j, guess - k, guess[:, :0], guess[:0]):
        refused(lambda: trimap_iou(wrong, wrong, 1))
        refused(lambda: boundary_iou(wrong, wrong))
    negative = torch.full((1, 2, 2), -1, dtype=torch.int8)  # -1 is not void, though as a byte it is 255
    refused(lambda: ConfusionMatrix(k).update(negative, negative))
    for count in (0, -3, 2.5, 10**9): refused(lambda: ConfusionMatrix(count))


LOSSES = [CrossEntropyLoss, FocalLoss, DiceLoss, LovaszSoftmaxLoss]


@covers("CrossEntropyLoss", "FocalLoss", "DiceLoss", "LovaszSoftmaxLoss")
@drawn(60, case=labels(), loss=st.sampled_from(LOSSES), seed=SEED, dtype=st.sampled_from(FLOATS), layout=LAYOUT, extreme=st.sampled_from([0.0, 1e4, -1e30, -INF, INF, NAN]), device=DEVICE)
def test_losses_of_anything(case, loss, seed, dtype, layout, extreme, device):
    y, same, k = case
    logits = torch.randn(len(y), k, *y.shape[1:], generator=random(seed)).to(device, dtype)
    y, same = y.to(device), same.to(device)
    value = loss()(logits, y)
    assert value.shape == () and value.isfinite() and value >= -1e-5 and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (y != VOID).any() or value == 0
    torch.testing.assert_close(loss()(arranged(logits, layout), same), value, rtol=1e-4, atol=1e-5)
    meta = loss()(logits.to("meta"), y.to("meta"))
    assert meta.shape == () and meta.device.type == "meta"
    spoiled = logits.clone().float()
    spoiled[0, 0, 0, 0] = extreme
    found = loss()(spoiled, y)  # NaN may come out where NaN went in: training stops at it
    assert found.isfinite() or not math.isfinite(extreme) or extreme < -1e29
    for bad in (logits.long(), logits > 0, logits + 0j if dtype == torch.float32 else logits.long()): refused(lambda: loss()(bad, y))
    for bad in (y.float(), y[..., :-1], y - 300, torch.full_like(y, k)): refused(lambda: loss()(logits, bad))
    for weight in ([NAN]*k, [-1]*k, [1]*(k + 1)): refused(lambda: loss(weight=torch.tensor(weight, dtype=torch.float32))(logits, y))
    negative = torch.full(y.shape, -1, dtype=torch.int8)
    refused(lambda: loss()(logits, negative))
    for gamma in (NAN, INF, -1): refused(lambda: FocalLoss(gamma))


@covers("median_frequency_weights")
@drawn(40, pixels=st.lists(st.sampled_from([0, 1, 5, 10**12, -1, NAN, INF]), max_size=5), more=st.sampled_from([0, 1, 10**6, -1]))
def test_weights_of_any_counts(pixels, more):
    found = answered(lambda: median_frequency_weights(torch.tensor(pixels), torch.tensor(pixels) + more))
    if found is None: assert more < 0 or not any(p > 0 for p in pixels) or any(not 0 <= p < INF for p in pixels)
    elif all(p < INF for p in pixels): assert found.shape == (len(pixels),) and found.isfinite().all() and (found > 0).all() and found.dtype == torch.float32


# Networks by name

@covers("list_models", "model_info", "ModelInfo", "create_model", "list_discriminators", "discriminator_info")
@drawn(40, name=st.one_of(st.sampled_from(list_models()), st.text(max_size=8)), classes=st.integers(-2, 300), channels=st.integers(-1, 8), width=st.sampled_from([None, 0, -4, 0.5, NAN, "wide", 2, 8, True, INF]))
def test_names_and_numbers(name, classes, channels, width):
    if name not in list_models():
        for call in (model_info, discriminator_info, lambda n: create_model(n, 3)): refused(lambda: call(name))
        return
    info = model_info(name)
    assert isinstance(info, ModelInfo) and info.name == name and info.parameters > 0
    assert [discriminator_info(d).name for d in list_discriminators()] == list_discriminators()
    with torch.device("meta"):
        net = answered(lambda: create_model(name, classes, channels, **({} if width is None else dict(width=width))))
    if net is not None: assert classes >= 1 and channels >= 1 and count_parameters(net) > 0
    else: assert classes < 1 or channels < 1 or width is not None


@covers("create_model")
@pytest.mark.parametrize("name", ["unet_small", "deeplabv3plus", "enet", "pspnet"])
def test_layouts_types_and_devices_of_networks(name):
    net = create_model(name, 4, width=4).eval()
    x = torch.rand(2, 3, 67, 70)
    with torch.no_grad():
        out = net(x)
        for layout in ("strided", "transposed", "channels last", "cut out"): torch.testing.assert_close(net(arranged(x, layout)), out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(net(x.double()), out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(net(x[..., :1].expand_as(x)), net(x[..., :1].expand_as(x).contiguous()), rtol=1e-3, atol=1e-4)
        assert net.to("meta")(x.to("meta")).shape == out.shape


@covers("save_model", "load_model")
@drawn(10, classes=st.integers(1, 5), width=st.integers(1, 5), extra=JSON, dtype=st.sampled_from(FLOATS))
def test_saved_is_loaded(tmp_path, classes, width, extra, dtype):
    net = create_model("unet_small", classes, width=width).eval().to(dtype)
    again = load_model(save_model(net, tmp_path/"m.safetensors", extra=dict(x=extra)))
    assert again.card.extra == dict(x=extra)
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


@covers("fold_batchnorm", "prune_filters")
@drawn(10, width=st.integers(1, 6), keep=st.sampled_from([0.5, 1, 1e-9, 0, -1, NAN, 2, "half", True, {"nowhere": 0.5}]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_smaller_networks(width, keep, dtype):
    net, x = create_model("unet_small", 3, width=width).to(dtype).eval(), torch.rand(1, 3, 65, 66, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(net)(x), net(x), rtol=1e-3, atol=1e-3)
        if keep not in (0.5, 1, 1e-9) or keep is True: return refused(lambda: prune_filters(net, keep))
        small = prune_filters(net, keep)
        assert small(x).shape == (1, 3, 65, 66) and count_parameters(small) <= count_parameters(net)
    refused(lambda: fold_batchnorm(nn.Linear(2, 2)))


@covers("create_discriminator")
@pytest.mark.parametrize("name", list_discriminators())
def test_critics_of_anything(name):
    from synseg.discriminators import OF_MAPS
    critic = create_discriminator(name, 3, width=4).eval()
    maps, images = torch.rand(2, 3, 64, 68).softmax(1), torch.rand(2, 3, 64, 68)
    judge = (lambda x: critic(x, maps)) if name in OF_MAPS else critic
    with torch.no_grad():
        out = judge(images)
        assert len(out) == 2 and out.isfinite().all()
        for layout in ("strided", "transposed", "channels last"): torch.testing.assert_close(judge(arranged(images, layout)), out, rtol=1e-3, atol=1e-4)
        for bad in (images[:, :1], images[0], images.long()): refused(lambda: judge(bad))
        torch.testing.assert_close(judge(images.double()), out, rtol=1e-3, atol=1e-4)
    refused(lambda: create_discriminator(name, 3, wdith=4))


@covers("Refiner", "HistoryBuffer")
@drawn(30, n=st.integers(0, 4), h=SIDE, w=SIDE, dtype=st.sampled_from([*FLOATS, torch.int64]), layout=LAYOUT, size=st.sampled_from([0, -1, 1, 2, 5, NAN, 2.5, True]), width=st.sampled_from([0, 1, 3, 2.5]), device=DEVICE)
def test_refiners_and_their_memory(n, h, w, dtype, layout, size, width, device):
    x = torch.rand(n, 3, h, w, device=device).to(dtype)
    if width in (0, 2.5): refused(lambda: Refiner(3, width))
    else:
        net = Refiner(3, width, 1, skip=True).to(device)
        if dtype == torch.int64: refused(lambda: net(x))
        else:
            with torch.no_grad(): out = net(x)
            assert out.shape == x.shape and out.dtype == torch.float32 and (x.isnan().any() or 0 <= out.min() and out.max() <= 1 if out.numel() else True)
            torch.testing.assert_close(net(arranged(x, layout)), out, rtol=1e-4, atol=1e-4)
    if size not in (1, 2, 5) or size is True: return refused(lambda: HistoryBuffer(size))
    buffer = HistoryBuffer(size)
    for bad in (torch.rand(3), torch.tensor(1.0), torch.rand(2, 3, 4)): refused(lambda: buffer.exchange(bad))
    if n//2 > size: return refused(lambda: buffer.exchange(x))
    for _ in range(4): shown = buffer.exchange(x)
    assert shown.shape == x.shape and shown.dtype == x.dtype and buffer.count <= size


# Realism

@covers("frechet_distance", "kernel_distance")
@drawn(40, n=st.integers(0, 7), m=st.integers(0, 7), d=st.integers(0, 4), dtype=st.sampled_from([*FLOATS, torch.int64, torch.complex64]), scale=st.sampled_from([0, 1e-30, 1, 1e4, 1e30, 1e200, NAN, INF]), layout=LAYOUT)
def test_distances_of_any_features(n, m, d, dtype, scale, layout):
    x, y = (scale*torch.randn(k, d, dtype=torch.float64, generator=random(k)) for k in (n, m))
    x, y = (v.to(dtype) if dtype != torch.int64 else v.clamp(-9, 9).nan_to_num().long() for v in (x, y))
    found = answered(lambda: frechet_distance(x, y))
    if found is None: assert min(n, m) < 2 or not d or dtype == torch.complex64 or not (x.abs() < 1e40).all() or not (y.abs() < 1e40).all()
    else:
        assert 0 <= found < INF and found == pytest.approx(frechet_distance(arranged(x, layout), y), rel=1e-6, abs=1e-9)
        assert frechet_distance(x, x) <= 1e-6*max(1.0, float(x.double().square().sum()))
    kid = answered(lambda: kernel_distance(x, y, subsets=3, subset_size=2))
    assert (kid is None) == (min(n, m) < 3 or found is None)
    if kid: assert kid.low <= kid.mean <= kid.high
    for options in (dict(subsets=1), dict(subsets=2.5), dict(subset_size=0), dict(subset_size=1.5), dict(subset_size=99)): refused(lambda: kernel_distance(torch.rand(9, 2), torch.rand(9, 2), **options))


@pytest.fixture(scope="module")
def judge(): return feature_extractor(create_model("unet_small", 3, width=2))


@covers("ssim", "perceptual_distance", "feature_extractor")
@drawn(30, n=st.integers(0, 3), h=st.integers(0, 20), w=st.integers(0, 20), dtype=st.sampled_from([*FLOATS, torch.uint8, torch.complex64]), layout=LAYOUT, top=st.sampled_from([1, 255, 0, -1, NAN, INF]))
def test_likeness_of_any_pictures(judge, n, h, w, dtype, layout, top):
    x, y = (torch.rand(n, 3, h, w, generator=random(k)).to(dtype) for k in (1, 2))
    good = dtype in FLOATS and n
    if not (good and min(h, w) >= 11 and 0 < top < INF): refused(lambda: ssim(x, y, top))
    else:
        value = ssim(x, y, top)
        assert value.shape == (n,) and value.dtype == torch.float64 and (value <= 1 + 1e-9).all() and torch.allclose(ssim(x, x, top), torch.ones(n).double())
        torch.testing.assert_close(ssim(arranged(x, layout), y, top), value)
    if dtype not in FLOATS: refused(lambda: judge(x))
    elif min(h, w) >= 1 and n:
        assert judge(x).shape == (n, 30) and torch.equal(perceptual_distance(x, x, judge), torch.zeros(n))
        torch.testing.assert_close(judge(arranged(x, layout)), judge(x), rtol=1e-3, atol=1e-4)
        refused(lambda: judge(x.float()*1e9 + 5))
    refused(lambda: perceptual_distance(x, y[..., :-1] if w else y[:, :2], judge))
    for bad in ("vgg", ""): refused(lambda: feature_extractor(bad))
    refused(lambda: feature_extractor(create_model("unet_small", 3, width=2), layers=["no.such"]))


# Prediction, clusters and random fields

@covers("predict")
@drawn(25, h=st.integers(0, 70), w=st.integers(0, 70), dtype=st.sampled_from([*PICTURE, torch.int64, torch.uint16, torch.bool, torch.complex64]), extreme=st.sampled_from([0.5, NAN, INF, -3.0, 7.0]), arrays=st.booleans(), tile=st.sampled_from([None, 64, 0, -1]))
def test_prediction_of_anything(h, w, dtype, extreme, arrays, tile):
    top = {torch.uint8: 255, torch.uint16: 60000, torch.int64: 255}.get(dtype, 1)
    image = (torch.rand(3, h, w, generator=random(h))*top).to(dtype)
    if dtype.is_floating_point and image.numel(): image[0, 0, 0] = extreme
    fits = h and w and (dtype in (torch.uint8, torch.uint16, torch.bool) or dtype.is_floating_point and extreme == 0.5) and (tile is None or tile > 0)
    given = image.movedim(0, -1).numpy()[:, ::-1] if arrays and dtype != torch.bfloat16 else image
    net = Plain().eval()
    if not fits: return refused(lambda: predict(net, given, tile=tile))
    found = predict(net, given, tile=tile)
    assert found.shape == (h, w) and found.dtype == torch.int64 and 0 <= found.min() and found.max() < 3
    for junk in (None, [[1]], np.array([[None]]), np.zeros((4, 4), np.longdouble), np.zeros((4, 4), complex), np.zeros((2, 3, 4, 5))): refused(lambda: as_image(junk))
    assert as_image(np.full((4, 5), 0.5, ">f4")).shape == (3, 4, 5)


@covers("KMeansSegmenter")
@drawn(30, h=st.integers(0, 12), w=st.integers(0, 12), k=st.sampled_from([0, 1, 2, 5, 2.5, NAN, -1]), dtype=st.sampled_from([*FLOATS, torch.uint8, torch.complex64]), extreme=st.sampled_from([0.5, NAN, INF, -INF, -1e-3, 2.0]), layout=LAYOUT, weight=st.sampled_from([0, 1, 1e30, NAN, -1]), device=DEVICE)
def test_clusters_of_anything(h, w, k, dtype, extreme, layout, weight, device):
    image = torch.rand(3, h, w, generator=random(h*w)).to(device, dtype)
    if dtype.is_floating_point and image.numel(): image[0, 0, 0] = extreme
    segment = lambda x: KMeansSegmenter(k, weight)(x)
    found = answered(lambda: segment(image))
    if found is None: return
    assert found.shape == (h, w) and found.dtype == torch.int64 and 0 <= found.min() and found.max() < k and dtype in FLOATS and extreme == 0.5
    assert torch.equal(segment(arranged(image, layout)), found)
    refused(lambda: KMeansSegmenter(2)(torch.rand(0, 3, 4, 4)))


FIELDS = {"grid": lambda k: GridCRF(k, iterations=2), "dense": lambda k: DenseCRF(k, iterations=2), "slow": lambda k: DenseCRF(k, iterations=2, compiled=False),
          "exact": lambda k: DenseCRF(k, iterations=2, exact=True), "conv": lambda k: ConvCRF(k, 5, iterations=2)}


@covers("GridCRF", "DenseCRF", "ConvCRF")
@drawn(60, kind=st.sampled_from(list(FIELDS)), n=st.integers(1, 2), h=SIDE, w=SIDE, k=st.integers(2, 5), scale=st.sampled_from([0.0, 1.0, 50.0]), dtype=st.sampled_from([torch.float32, torch.float64]), layout=LAYOUT, look=st.sampled_from(["noise", "black", "white"]), seed=SEED, device=DEVICE)
def test_fields_give_probabilities_of_anything(kind, n, h, w, k, scale, dtype, layout, look, seed, device):
    log_probs = (scale*torch.randn(n, k, h, w, generator=random(seed))).log_softmax(1).to(device, dtype)
    image = (torch.rand(n, 3, h, w, generator=random(seed + 1)) if look == "noise" else torch.full((n, 3, h, w), float(look == "white"))).to(device, dtype)
    field = FIELDS[kind](k).to(device)
    with torch.no_grad(): found, again = field(log_probs, image), field(arranged(log_probs, layout), arranged(image, layout))
    assert found.shape == log_probs.shape and found.dtype == dtype and found.isfinite().all() and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, found, rtol=1e-3, atol=1e-3)
    if kind == "grid":
        for labeling in (field.icm(log_probs, image), field.expansion(log_probs, image)): check_labels(labeling, k)


@covers("GridCRF", "DenseCRF", "ConvCRF")
@drawn(60, kind=st.sampled_from(list(FIELDS)), where=st.sampled_from(["scores", "all scores", "image", "type", "image type", "empty"]), value=st.sampled_from([NAN, INF, -INF]))
def test_fields_refuse_what_is_no_number(kind, where, value):
    log_probs, image, field = torch.randn(1, 3, 6, 7).log_softmax(1), torch.rand(1, 3, 6, 7), FIELDS[kind](3)
    if where == "scores" and value == -INF:
        log_probs[0, 0, 0, 0] = value  # impossible, which is information
        return (lambda q: torch.testing.assert_close(q.sum(1), torch.ones(1, 6, 7)))(field(log_probs, image))
    if where == "scores": log_probs[0, 0, 0, 0] = value
    if where == "all scores": log_probs[0, :, 2, 3] = value
    if where == "image": image[0, 1, 2, 3] = value
    if where == "type": log_probs = log_probs.long()
    if where == "image type": image = (image*255).byte()
    if where == "empty": log_probs, image = log_probs[:, :, :0], image[:, :, :0]
    refused(lambda: field(log_probs, image))
    if kind == "grid":
        refused(lambda: field.icm(log_probs, image))
        refused(lambda: field.expansion(log_probs, image))


@covers("GridCRF", "DenseCRF", "ConvCRF")
@pytest.mark.parametrize("build, settings", [(b, s) for b, names in ((DenseCRF, ("gaussian_weight", "bilateral_weight")), (ConvCRF, ("gaussian_weight", "bilateral_weight", "gaussian_xy", "bilateral_rgb")),
                                                                    (GridCRF, ("smoothness", "contrast", "beta"))) for n in names for s in ({n: NAN}, {n: -INF})] +
                         [(b, s) for b in (DenseCRF, ConvCRF, GridCRF) for s in (dict(iterations=-1), dict(iterations=1.5), dict(num_classes=0), dict(num_classes=2.5))] +
                         [(b, dict(compatibility=torch.full((3, 3), NAN))) for b in (DenseCRF, ConvCRF)] + [(DenseCRF, {n: v}) for n in ("gaussian_xy", "bilateral_xy", "bilateral_rgb") for v in (0, -1, NAN)])
def test_settings_of_fields(build, settings):
    refused(lambda: build(**{**dict(num_classes=3), **settings})(torch.randn(1, 3, 6, 7), torch.rand(1, 3, 6, 7)))


# Training and export

@covers("Learner")
@drawn(12, setting=st.sampled_from(["batch_size", "lr", "weight_decay", "accumulate", "clip", "ema", "precision", "class_weights", "sampler"]), value=st.sampled_from([0, -1, NAN, -INF, "all"]))
def test_settings_of_training(setting, value):
    net = create_model("unet_small", 11, width=1)
    with contextlib.suppress(TypeError) if value == "all" else contextlib.nullcontext():  # a text for a number
        made = answered(lambda: Learner(net, Scenes(4, (64, 64)), progress=False, **{setting: value}).fit(1))
    assert value == "all" or made is None or all(p.isfinite().all() for p in net.parameters())
    for fit in (dict(), dict(epochs=0), dict(minutes=-1), dict(minutes=NAN)):
        refused(lambda: Learner(net, Scenes(4, (64, 64)), progress=False).fit(**fit))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, pairs): self.pairs, self.label_space = pairs, label_space("scenes")
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i): return self.pairs[i]


@covers("Learner")
@drawn(15, h=st.integers(62, 70), w=st.integers(62, 70), n=st.integers(0, 3), label=st.sampled_from(["void", "classes", "too large", "negative", "float"]), image=st.sampled_from([0.5, NAN, INF, 7.0]))
def test_training_on_anything(h, w, n, label, image):
    y = dict(void=torch.full((h, w), VOID), classes=torch.arange(h*w).view(h, w) % 11, negative=torch.full((h, w), -1), float=torch.rand(h, w)).get(label, torch.full((h, w), 11))
    pairs = Pairs([(torch.full((3, h, w), image), y)]*n)
    net = create_model("unet_small", 11, width=1)
    train = lambda: Learner(net, pairs, batch_size=2, progress=False, class_weights=None).fit(1)
    if n and min(h, w) >= 64 and label in ("void", "classes") and image == 0.5:
        before = [p.clone() for p in net.parameters()]
        assert math.isfinite(train().history[-1]["loss"]) and all(p.isfinite().all() for p in net.parameters())
        if label == "void": assert train().history[-1]["loss"] == 0
        else: assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    else: refused(train)


@covers("export")
@drawn(15, name=st.sampled_from(["a.onnx", "a.pt2", "a.pth", "a", "a.txt"]), form=st.sampled_from(["onnx", "torch", "tf", None, 3]), model=st.sampled_from([None, "net", 3]))
def test_export_of_what_is_none(tmp_path, name, form, model):
    refused(lambda: export(model, tmp_path/name, form))
    if form not in ("onnx", "torch") or not name.endswith(dict(onnx=".onnx", torch=".pt2")[form]): refused(lambda: export(Plain(), tmp_path/name, form))
    refused(lambda: export(Plain(), tmp_path/"a.pt2", "torch", size=(3, 80)))
    assert not list(tmp_path.iterdir())


@covers("export")
def test_an_exported_network_takes_any_size(tmp_path):
    from synseg.deploy import load_exported
    net = Plain(stride=8).eval()
    made = load_exported(export(net, tmp_path/"net.pt2", "torch", check=False))
    for n, h, w in ((1, 64, 64), (3, 67, 90)):
        x = torch.rand(n, 3, h, w)
        with torch.no_grad(): torch.testing.assert_close(made(arranged(x, "transposed")), net(x), rtol=1e-3, atol=1e-4)
    for bad in (torch.rand(1, 3, 10, 90), torch.rand(3, 64, 64), torch.zeros(1, 3, 64, 64).byte()): refused(lambda: made(bad))


# Shards, outlines, wiring

@covers("Shards", "write_shards")
@drawn(10, n=st.integers(1, 6), per=st.integers(-1, 4), quality=st.sampled_from([None, 0, 60, 96, 2.5]), shuffle=st.integers(0, 5), epoch=st.integers(0, 3))
def test_what_is_written_in_shards_is_read(tmp_path_factory, n, per, quality, shuffle, epoch):
    folder, scenes = tmp_path_factory.mktemp("shards"), Scenes(n, (64, 64), seed=n)
    if per < 1 or quality not in (None, 60):
        refused(lambda: write_shards(scenes, folder, per, quality))
        with pytest.raises(FileNotFoundError): Shards(folder)
        return
    assert write_shards(scenes, folder, per, quality).is_file()
    refused(lambda: write_shards(scenes, folder, per))
    data = Shards(folder, shuffle=shuffle)
    data.set_epoch(epoch)
    pairs = list(data)
    assert len(pairs) == len(data) == n and all(x.shape == (3, 64, 64) and 0 <= x.min() and x.max() <= 1 for x, _ in pairs)
    key = lambda label: label.numpy().tobytes()
    assert sorted(key(y) for _, y in pairs) == sorted(key(scenes[i][1]) for i in range(n))
    if not shuffle and quality is None: assert all(torch.equal(torch.as_tensor(x), scenes[i][0]) for i, (x, _) in enumerate(pairs))


@covers("import_labelme")
@drawn(25, points=st.lists(st.tuples(*[st.sampled_from([0, 3.5, 20, -4, 1e9, NAN, None, "a"])]*2), max_size=5), label=st.sampled_from(["car", "void", "", 3, None]),
       kind=st.sampled_from(["polygon", "rectangle", "circle", "point", "mask", None]), said=st.sampled_from([24, 25, None]))
def test_outlines_of_any_shape_are_read_or_refused(tmp_path_factory, points, label, kind, said):
    folder = tmp_path_factory.mktemp("drawn")
    for name in "ab":
        Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(folder/f"{name}.png")
        shapes = [dict(label="road", points=[[0, 0], [9, 0], [9, 9]], shape_type="polygon"), dict(label=label, points=points, shape_type=kind)]
        (folder/f"{name}.json").write_text(json.dumps(dict(shapes=shapes, imagePath=f"{name}.png", imageHeight=said, imageWidth=32)))
    found = answered(lambda: import_labelme(folder, folder/"out"))
    if found is None: assert not (folder/"out").exists()
    else: assert len(found["train"]) == len(found["val"]) == 1 and abs(sum(found["shares"].values()) - 1) < 1e-3


@covers("trace_network", "draw_network")
@drawn(6, size=st.tuples(st.integers(60, 100), st.integers(60, 100)), width=st.integers(1, 6))
def test_a_network_of_any_width_is_traced_and_drawn(size, width):
    net = create_model("unet_small", 3, width=width)
    graph = answered(lambda: trace_network(net, size))
    if graph is None: return
    assert sum(n.parameters for n in graph.nodes) == count_parameters(net) and all(e.source < e.target for e in graph.edges)
    figure = draw_network(graph)
    assert figure.axes and len(figure.axes[0].texts) >= 3
    close(figure)


def test_every_public_name_has_a_property():
    assert set(COVERED) == set(synseg.__all__), f"without a property: {sorted(set(synseg.__all__) - set(COVERED))}; unknown: {sorted(set(COVERED) - set(synseg.__all__))}"
