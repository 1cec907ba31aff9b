"Encoders against torchvision's and timm's own networks, the dilated twin against the strided one, bad wishes and narrow versions"
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from synseg.backbone import Encoder, InceptionFeatures, PhasePool, create_encoder, dilate_, encoder_names
from synseg.check import count_parameters, expect_fail
from synseg.core import IMAGENET_MEAN, IMAGENET_STD
from synseg.segmenter import PretrainedEncoder

TORCHVISION = [n for n in encoder_names() if n != "xception65"]
same = torch.testing.assert_close


def lively(net):
    "Norm statistics and weights at random, so that a forgotten norm shows; eval mode"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 0.6)
            nn.init.uniform_(m.bias, -0.1, 0.1)
            nn.init.uniform_(m.running_mean, -0.1, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval().requires_grad_(False)


def carried(state, prefix="features."):
    return {k.removeprefix(prefix): v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "head."))}


def test_names_of_the_interface():
    assert encoder_names() == ("vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn resnet18 resnet34 resnet50 resnet101 "
                               "mobilenet_v2 xception65").split()


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_are_torchvisions_less_the_classifier(name):
    with torch.device("meta"):
        ours, theirs = create_encoder(name), getattr(models, name)()
    assert count_parameters(ours) == sum(p.numel() for k, p in theirs.named_parameters() if not k.startswith(("fc.", "classifier.")))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in carried(theirs.state_dict()).items()}
    assert models.get_weight(ours.imagenet).meta["num_params"] == count_parameters(theirs)


@pytest.mark.parametrize("name, channels, strides", [
    ("vgg16", (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)), ("vgg11_bn", (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)),
    ("resnet18", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)), ("resnet101", (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)),
    ("mobilenet_v2", (16, 24, 32, 96, 1280), (2, 4, 8, 16, 32)), ("xception65", (128, 256, 728, 1024, 2048), (2, 4, 8, 16, 32))])
def test_channels_and_strides(name, channels, strides):
    for stride in (32, 8):
        with torch.device("meta"): net = create_encoder(name, output_stride=stride).eval()
        maps = net(torch.empty(1, 3, 128, 192, device="meta"))
        assert net.channels == channels and net.strides == tuple(min(s, stride) for s in strides)
        assert [tuple(m.shape) for m in maps] == [(1, c, 128 // s, 192 // s) for c, s in zip(net.channels, net.strides)]


def torchvisions_maps(name, net, x):
    "The rungs, read from torchvision's network by hooks"
    where = dict(vgg16_bn=["features.5", "features.12", "features.22", "features.32", "features.42", "features.43"],
                 vgg11=["features.1", "features.4", "features.9", "features.14", "features.19", "features.20"],
                 mobilenet_v2=["features.1", "features.3", "features.6", "features.13", "features.18"])
    maps = []
    for layer in where.get(name, ["relu", "layer1", "layer2", "layer3", "layer4"]):
        net.get_submodule(layer).register_forward_hook(lambda m, a, out: maps.append(out.clone()))
    net(x)
    return maps


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "resnet18", "resnet50", "mobilenet_v2"])
def test_same_maps_as_torchvision(name):
    if name.startswith("vgg"):  # without the 120 million weights of its classifier
        theirs = models.vgg.VGG(models.vgg.make_layers(models.vgg.cfgs["A" if "11" in name else "D"], "bn" in name), 2, False)
        theirs.avgpool, theirs.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 2)
    else: theirs = getattr(models, name)()
    ours = create_encoder(name)
    ours.load_state_dict(carried(lively(theirs).state_dict()))
    x = torch.randn(2, 3, 70, 99)
    wanted = torchvisions_maps(name, theirs, x)
    for a, b in zip(ours.eval()(x), wanted, strict=True): same(a, b)


@pytest.mark.parametrize("stride, replace", [(16, [False, False, True]), (8, [False, True, True])])
def test_same_maps_as_torchvisions_dilated_resnet(stride, replace):
    theirs = lively(models.resnet50(replace_stride_with_dilation=replace))
    ours = create_encoder("resnet50", output_stride=stride).eval()
    ours.load_state_dict(carried(theirs.state_dict()))
    x = torch.randn(1, 3, 65, 83)
    for a, b in zip(ours(x), torchvisions_maps("resnet50", theirs, x), strict=True): same(a, b)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_same_maps_as_timm(name):
    timm = pytest.importorskip("timm")
    ours, x = create_encoder(dict(mobilenetv2_100="mobilenet_v2").get(name, name), output_stride=16).eval(), torch.randn(1, 3, 65, 83)
    theirs = lively(timm.create_model(name, features_only=True, output_stride=16))
    values = [v for v in theirs.state_dict().values() if v.ndim]  # other names, the same order
    want = {k: v for k, v in ours.state_dict().items() if v.ndim}
    used = values + list(want.values())[len(values):]  # features_only leaves MobileNetV2's last 1x1 convolution out
    ours.load_state_dict(dict(zip(want, used, strict=True)), strict=False)
    for i, (a, b) in enumerate(zip(ours(x), theirs(x), strict=True)):
        if a.shape[1] == b.shape[1]: same(a, b)
        else: assert (name, i) == ("mobilenetv2_100", 4)


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_xception_is_timms(stride):
    timm = pytest.importorskip("timm")
    theirs = lively(timm.create_model("xception65", num_classes=0, output_stride=stride))
    ours = create_encoder("xception65", output_stride=stride).eval()
    ours.load_state_dict(carried(theirs.state_dict()))
    assert count_parameters(ours) == 37_867_312 == count_parameters(theirs)
    x = torch.randn(1, 3, 65, 91)
    final, maps = theirs.forward_intermediates(x)
    found = ours(x)
    same(found[-1], final)
    for a, b in zip(found[:-1], maps, strict=False): same(a.relu(), b)  # timm taps after the ReLU, DeepLab's code before


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "xception65"])
def test_strided_is_dilated_subsampled(name, stride):
    a = lively(create_encoder(name, width=8).double())
    b = create_encoder(name, output_stride=stride, width=8).double().eval()
    b.load_state_dict(a.state_dict())
    for size in ((64, 64), (65, 91), (33, 110)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        for m, n, s, t in zip(a(x), b(x), a.strides, b.strides, strict=True):
            same(n[..., ::s // t, ::s // t], m)
            assert m.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_strided_is_dilated_subsampled_at_full_width(name):
    a = lively(create_encoder(name).double())
    b = dilate_(copy.deepcopy(a), 8)
    x = torch.randn(1, 3, 67, 94, dtype=torch.float64)
    assert a.strides == (2, 4, 8, 16, 32) and b.strides == (2, 4, 8, 8, 8)
    for m, n, s, t in zip(a(x), b(x), a.strides, b.strides, strict=True): same(n[..., ::s // t, ::s // t], m)


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "vgg16"])
def test_vgg_without_its_last_pools(name):
    a = lively(create_encoder(name, width=8).double())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    for stride in (16, 8):
        b = create_encoder(name, output_stride=stride, width=8).double().eval()
        b.load_state_dict(a.state_dict())
        for m, n, s, t in zip(a(x), b(x), a.strides, b.strides, strict=True): same(n[..., ::s // t, ::s // t], m)
    pools = [m for m in b.modules() if isinstance(m, PhasePool)]
    assert [p.dilation for p in pools] == [1, 2]
    assert [m.dilation for m in b.modules() if isinstance(m, nn.Conv2d)][-2:] == [(2, 2)] * 2


def test_dilating_twice_is_dilating_once():
    once = create_encoder("resnet18", output_stride=16, width=8)
    settings = lambda net: [(m.stride, m.dilation, m.padding) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert settings(dilate_(copy.deepcopy(once), 16)) == settings(once)
    assert settings(dilate_(copy.deepcopy(once), 8)) == settings(create_encoder("resnet18", output_stride=8, width=8))


@pytest.mark.parametrize("last, why", [(nn.Conv2d(4, 4, 4, 2, 1), "would not keep its size"), (nn.AvgPool2d(2), "only convolutions"),
                                       (nn.Conv2d(4, 4, 3, 2), "expected padding")])
def test_what_cannot_be_dilated(last, why):
    with expect_fail(ValueError, why): dilate_(nn.Sequential(nn.Conv2d(3, 4, 3, 8, 1), last), 8)


def test_bad_wishes():
    for wish, why in ((dict(name="resnet19"), "'resnet19'"), (dict(name="vgg16", output_stride=12), "found; expected 8, 16 or 32"),
                      (dict(name="vgg16", in_channels=0), "in_channels is 0"), (dict(name="vgg16", width=2.5), "width is 2.5"),
                      (dict(name="vgg16", in_channels=True), "in_channels is True")):
        with expect_fail(ValueError, why): create_encoder(**wish)


@pytest.mark.parametrize("name", encoder_names())
def test_narrow_with_other_channels_trains(name):
    net = create_encoder(name, in_channels=5, output_stride=16, width=4)
    maps = net.train()(torch.rand(2, 5, 67, 93))
    assert tuple(m.shape[1] for m in maps) == net.channels and net.in_channels == 5 and isinstance(net, Encoder)
    assert next(net.parameters()).shape[:2] == (4, 5)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_width_of_the_paper_is_the_default():
    for name, width in (("vgg16_bn", 64), ("resnet50", 64), ("mobilenet_v2", 32)):
        with torch.device("meta"):
            assert {k: v.shape for k, v in create_encoder(name, width=width).state_dict().items()} == {
                k: v.shape for k, v in create_encoder(name).state_dict().items()}


def test_signals_survive_the_start():
    for name in ("vgg16", "resnet50", "mobilenet_v2", "xception65"):
        maps = create_encoder(name, width=16).train()(torch.randn(2, 3, 64, 64))
        assert all(m.isfinite().all() and 1e-3 < m.std() < 1e3 for m in maps), name


def test_same_seed_same_weights():
    def made():
        torch.manual_seed(3)
        return create_encoder("mobilenet_v2", width=8).state_dict()
    for a, b in zip(made().values(), made().values()): assert torch.equal(a, b)


def test_weights_come_in_through_load_encoder():
    class Net(PretrainedEncoder):
        def __init__(self):
            super().__init__()
            self.encoder = create_encoder("mobilenet_v2", output_stride=8)
    net, state = Net(), models.mobilenet_v2().state_dict()
    net.load_encoder(state)
    same(net.encoder.state_dict()["18.0.weight"], state["features.18.0.weight"])
    assert sum(1 for _ in net.encoder_parameters()) == sum(1 for _ in net.parameters())


def test_maps_are_not_overwritten_later_on():
    for name in ("vgg11_bn", "resnet18", "mobilenet_v2", "xception65"):
        net = lively(create_encoder(name, width=8))
        x = torch.randn(1, 3, 64, 64)
        kept = [m.clone() for i, m in enumerate(net.road(x)) if i in net.taps]
        for a, b in zip(net(x), kept, strict=True): assert torch.equal(a, b)


def test_real_weights_name_real_photographs(data_root):
    folder = data_root("weights")
    imaging = pytest.importorskip("PIL.Image")
    state = torch.load(folder / "mobilenet_v2_imagenet.pth", map_location="cpu", weights_only=True)
    expected = json.loads((folder / "expected.json").read_text())["mobilenet_v2"]
    strided, dense = create_encoder("mobilenet_v2"), create_encoder("mobilenet_v2", output_stride=8)
    head = nn.Linear(1280, 1000)
    head.load_state_dict({k.removeprefix("classifier.1."): v for k, v in state.items() if k.startswith("classifier.")})
    for net in (strided, dense): net.load_state_dict(carried(state)), net.eval()
    for photo, wanted in expected.items():
        picture = imaging.open(folder / "photos" / f"{photo}.png").convert("RGB")  # resized by Pillow: a tensor's resize rounds otherwise
        x = models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(picture)[None]
        with torch.no_grad():
            maps, more = strided(x), dense(x)
            logits = head(maps[-1].mean((2, 3)))[0]
        found = logits[wanted["top5_index"]]
        assert logits.argmax() == wanted["top5_index"][0]
        same(found, torch.tensor(wanted["top5_logit"]), atol=0.05, rtol=0)
        same(more[-1][..., ::4, ::4], maps[-1], atol=1e-3, rtol=1e-3)


def test_inception_is_torchvisions(tmp_path):
    theirs = lively(models.inception_v3(init_weights=False, transform_input=True, aux_logits=True))
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    ours = InceptionFeatures(tmp_path / "inception.pth").train()
    x = torch.rand(2, 3, 96, 128)
    maps = []
    theirs.avgpool.register_forward_hook(lambda m, a, out: maps.append(out.flatten(1)))
    theirs.Mixed_6e.register_forward_hook(lambda m, a, out: maps.append(out))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    theirs((F.interpolate(x, (299, 299), mode="bilinear", antialias=True) - mean) / std)  # it turns this into 2x - 1 itself
    same(ours(x), maps[1], rtol=1e-4, atol=1e-5)
    same(ours.middle(x), maps[0], rtol=1e-4, atol=1e-5)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters()) and "FID" not in ours.name


def test_inception_refuses_what_does_not_fit(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pth")
    with expect_fail(ValueError, "does not fit"): InceptionFeatures(tmp_path / "wrong.pth")
    with expect_fail(FileNotFoundError, "nowhere.pth"): InceptionFeatures("nowhere.pth")
    def offline(self, **options): raise OSError("no network")
    monkeypatch.setattr(type(models.Inception_V3_Weights.IMAGENET1K_V1), "get_state_dict", offline)
    with expect_fail(FileNotFoundError, "could not download"): InceptionFeatures("imagenet")
    with expect_fail(ValueError, "float images"): InceptionFeatures()(torch.zeros(1, 1, 64, 64))


def test_receptive_gradient_reaches_the_image():
    x = torch.rand(1, 3, 96, 128, requires_grad=True)
    InceptionFeatures()(x).square().sum().backward()
    assert x.grad.abs().sum() > 0  # frozen weights, but a picture can be moved towards features
