"DeepLab against its counts, torchvision, segmentation-models-pytorch, restatements with functions only, and its own strides"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import accuracy_by_heart
from synseg.check import check_segmenter, count_parameters
from synseg.deeplab import (CRF_V2, ENTRIES, FIELDS, DeepLabSum, DeepLabV3, DeepLabV3Plus, deeplabv1, deeplabv2, deeplabv3plus_xception,
                            load_torchvision, pyramid, valid_taps)
from synseg.dense_crf import DenseCRF
from synseg.zoo import create_model, load_model, save_model

NARROW = [dict(width=4, encoder="resnet18"), dict(width=4, encoder="resnet50"), dict(width=2, encoder="mobilenet_v2"),
          dict(width=2, encoder="xception65")]


def stir(net, seed=0):
    "Batch norms with random statistics, scales and shifts; in double precision, eval mode"
    torch.manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if not isinstance(m, nn.BatchNorm2d): continue
            for t, low, high in ((m.running_mean, -.2, .2), (m.running_var, .7, 1.4), (m.weight, .7, 1.3), (m.bias, -.2, .2)):
                t.uniform_(low, high)
    return net.double().eval()


def close(a, b, share=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize("build, count", [
    *((lambda f=f: deeplabv1(21, field=f), c) for f, c in (("largefov", 20_505_429), ("4x4", 65_140_565), ("7x7", 134_346_581))),
    (lambda: deeplabv2(21), 44_048_532), (lambda: deeplabv2(21, encoder="vgg16"), 37_877_652),
    (lambda: DeepLabV3(21), 58_040_661), (lambda: DeepLabV3(21, head="torchvision"), 58_630_997),
    (lambda: DeepLabV3(21, head="torchvision", aux=True), 60_996_202), (lambda: DeepLabV3(21, encoder="resnet50"), 39_048_533),
    (lambda: DeepLabV3Plus(21), 59_344_309), (lambda: DeepLabV3Plus(21, head="smp"), 45_674_853),
    (lambda: deeplabv3plus_xception(21), 41_055_413)])
def test_counts(build, count):
    with torch.device("meta"): assert count_parameters(build()) == count


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name):
    entry = ENTRIES[name]
    for encoder in (entry.encoders[0], entry.encoders[-1]):
        options = {} if name.endswith("xception") else dict(encoder=encoder)
        with torch.device("meta"): net = entry.build(21, 3, **options)
        if encoder == entry.encoders[0]: assert count_parameters(net) == entry.info.parameters and entry.info.deviations
        assert encoder == "xception65" or net.imagenet.endswith("IMAGENET1K_V1")


@pytest.mark.parametrize("rate", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("size", [(9, 9), (5, 33), (33, 33)])
def test_valid_taps_as_counted_by_a_convolution(rate, size):
    ones = torch.ones(1, 1, 3, 3)
    counted = F.conv2d(torch.ones(1, 1, *size), ones, padding=rate, dilation=rate)[0, 0]
    assert torch.equal(valid_taps(size, rate), counted.long())
    share = [(1 + 2 * max(0, n - rate) / n) / 3 for n in size]
    assert abs(valid_taps(size, rate).double().mean() / 9 - share[0] * share[1]) < 1e-12
    assert valid_taps(7, 2, 5).shape == (7, 7) and valid_taps(7, 2, 5).max() == 4 * 4


# torchvision, segmentation-models-pytorch

@pytest.mark.parametrize("name, aux", [("resnet50", False), ("resnet101", True)])
def test_same_as_torchvision(name, aux):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    theirs = getattr(segmentation, f"deeplabv3_{name}")(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    ours = DeepLabV3(21, encoder=name, head="torchvision", aux=aux)
    stir(theirs)
    assert load_torchvision(ours, theirs.state_dict()) is ours
    theirs, ours = theirs.float(), ours.eval()
    assert count_parameters(theirs) - count_parameters(ours) == (0 if aux else count_parameters(theirs.aux_classifier))
    for size in ((64, 72),):
        x = torch.rand(1, 3, *size)
        with torch.no_grad(): want, (z, more) = theirs((x - ours.mean) / ours.std), ours.forward_aux(x)
        pairs = [(z, want["out"]), *([(more[0], want["aux"])] if aux else [])]
        for a, b in pairs: assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())
        assert len(more) == aux


def test_load_torchvision_refuses():
    net = DeepLabV3(5, encoder="resnet18", width=4, head="torchvision")
    with pytest.raises(ValueError, match="torchvision's form"): load_torchvision(net, {})
    state = {k.replace("encoder.", "backbone.", 1) if k.startswith("encoder") else k.replace("head.", "classifier.", 1): v
             for k, v in net.state_dict().items()}
    load_torchvision(net, state)
    with pytest.raises(ValueError, match="torchvision's form"): load_torchvision(net, {**state, "classifier.4.bias": torch.rand(6)})


def carried(theirs, ours):
    "Weights across, in order"
    a, b = stir(theirs).state_dict(), ours.state_dict()
    assert len(a) == len(b) and all(v.shape == w.shape for v, w in zip(a.values(), b.values()))
    ours.load_state_dict(dict(zip(b, a.values())))
    return theirs, ours.double().eval()


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_v3plus_same_as_smp(encoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs, ours = carried(smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=7), DeepLabV3Plus(7, encoder=encoder, head="smp",
                           multi_grid=(1, 1) if encoder == "resnet18" else None))
    assert count_parameters(theirs) == count_parameters(ours)
    for size in ((64, 96), (112, 80)):
        x = torch.rand(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            features = theirs.encoder(x)
            want = theirs.segmentation_head[0](theirs.decoder(features))
            close(ours.compute(x), want, 1e-10)


def test_v3_same_as_smp():
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = smp.DeepLabV3("resnet50", encoder_weights=None, classes=7, encoder_output_stride=16, decoder_atrous_rates=(6, 12, 18))
    theirs, ours = carried(theirs, DeepLabV3(7, encoder="resnet50", head="torchvision", output_stride=16, multi_grid=(1, 1, 1)))
    x = torch.rand(1, 3, 96, 80, dtype=torch.float64)
    with torch.no_grad(): close(ours.compute(x), theirs.segmentation_head[0](theirs.decoder(theirs.encoder(x))), 1e-10)


def test_xception_trunk_same_as_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("xception65", pretrained=False)
    theirs.head, theirs.act = nn.Identity(), nn.Identity()
    ours = deeplabv3plus_xception(21, output_stride=32).encoder
    ours.load_state_dict(stir(theirs).state_dict())
    ours = ours.double().eval()
    x = torch.rand(1, 3, 80, 64, dtype=torch.float64)
    with torch.no_grad(): close(ours(x)[-1], theirs.forward_features(x))


# Restatements with functions only

def norm(x, t, name, eps=1e-5):
    return F.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"], t[name + ".bias"], eps=eps)


def restated_vgg(x, t, pool):
    "VGG16 at stride 8, with the authors' pools (3) or its own, spread (2)"
    names = iter(sorted({k.rpartition(".")[0] for k in t if k.startswith("encoder.")}, key=lambda k: int(k.split(".")[1])))
    for stage, (layers, rate, stride, spread) in enumerate(((2, 1, 2, 1), (2, 1, 2, 1), (3, 1, 2, 1), (3, 1, 1, 1), (3, 2, 1, 2))):
        for _ in range(layers):
            name = next(names)
            x = F.relu(F.conv2d(x, t[name + ".weight"], t[name + ".bias"], 1, rate, rate))
        if pool == 3: x = F.max_pool2d(x, 3, stride, 1)
        elif stride == 2: x = F.max_pool2d(x, 2)
        else: x = F.max_pool2d(F.pad(x, (0, spread, 0, spread), value=-torch.inf), 2, 1, dilation=spread)
    return x


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("rates, scales", [(None, (1,)), ((6, 12, 18, 24), (1, 0.75, 0.5))])
def test_restated_vgg(pool, rates, scales):
    torch.manual_seed(1)
    net = (deeplabv1(4, pool=pool, width=4) if rates is None else deeplabv2(4, encoder="vgg16", pool=pool, width=4)).double().eval()
    assert rates is None or net.scales == scales
    t, x = net.state_dict(), torch.rand(2, 3, 88, 64, dtype=torch.float64)
    def tower(top, i, r):
        h = F.relu(F.conv2d(top, t[f"branches.{i}.fc6.weight"], t[f"branches.{i}.fc6.bias"], 1, r, r))
        h = F.relu(F.conv2d(h, t[f"branches.{i}.fc7.weight"], t[f"branches.{i}.fc7.bias"]))
        return F.conv2d(h, t[f"branches.{i}.fc8.weight"], t[f"branches.{i}.fc8.bias"])
    maps = []
    for s in scales:
        small = x if s == 1 else F.interpolate(x, (round(88 * s), round(64 * s)), mode="bilinear")
        top = restated_vgg(small, t, pool)
        maps.append(sum(tower(top, i, r) for i, r in enumerate(rates or (12,))))
        if s != 1: maps[-1] = F.interpolate(maps[-1], maps[0].shape[-2:], mode="bilinear")
    with torch.no_grad(): out, all_maps = net.compute_aux(x)
    close(out, torch.stack(maps).max(0).values, 1e-12)
    assert len(all_maps) == (0 if rates is None else 3)
    for a, b in zip(all_maps, maps): close(a, b, 1e-12)


def restated_resnet(x, t, rates3, rates4):
    "ResNet-50 with stride 8 or so: rates of the 3x3s of layer3 and layer4; where the first is None the stage still strides"
    conv = lambda x, name, *how: F.conv2d(x, t[f"encoder.{name}.weight"], None, *how)
    bn = lambda x, name: norm(x, t, "encoder." + name)
    x = F.max_pool2d(F.relu(bn(conv(x, "conv1", 2, 3), "bn1")), 3, 2, 1)
    for stage, rates in ((1, (1,) * 3), (2, (None, 1, 1, 1)), (3, rates3), (4, rates4)):
        for i, r in enumerate(rates):
            p, stride, r = f"layer{stage}.{i}", 2 if r is None else 1, r or 1
            h = F.relu(bn(conv(x, p + ".conv1"), p + ".bn1"))
            h = F.relu(bn(conv(h, p + ".conv2", stride, r, r), p + ".bn2"))
            h = bn(conv(h, p + ".conv3"), p + ".bn3")
            if not i: x = bn(conv(x, p + ".downsample.0", stride), p + ".downsample.1")
            x = F.relu(x + h)
    return x


def test_restated_v2_resnet():
    torch.manual_seed(2)
    net = stir(deeplabv2(4, encoder="resnet50", width=4))
    t, x, maps = net.state_dict(), torch.rand(1, 3, 72, 96, dtype=torch.float64), []
    for s in (1, 0.75, 0.5):
        small = x if s == 1 else F.interpolate(x, (round(72 * s), round(96 * s)), mode="bilinear")
        top = restated_resnet(small, t, (1, 2, 2, 2, 2, 2), (2, 4, 4))
        z = sum(F.conv2d(top, t[f"branches.{i}.weight"], t[f"branches.{i}.bias"], 1, r, r) for i, r in enumerate((6, 12, 18, 24)))
        maps.append(z if s == 1 else F.interpolate(z, maps[0].shape[-2:], mode="bilinear"))
    with torch.no_grad(): close(net.compute(x), torch.stack(maps).amax(0), 1e-11)


@pytest.mark.parametrize("stride, rates3, rates4, rates", [(16, (None, 1, 1, 1, 1, 1), (2, 4, 8), (6, 12, 18)),
                                                           (8, (1, 2, 2, 2, 2, 2), (4, 8, 16), (12, 24, 36))])
def test_restated_v3_and_plus(stride, rates3, rates4, rates):
    torch.manual_seed(3)
    x = torch.rand(1, 3, 112, 96, dtype=torch.float64)
    def block(z, t, name, *how): return F.relu(norm(F.conv2d(z, t[name + ".0.weight"], None, *how), t, name + ".1"))
    def aspp(top, t, name):
        parts = [block(top, t, f"{name}.convs.0")] + [block(top, t, f"{name}.convs.{i}", 1, r, r) for i, r in enumerate(rates, 1)]
        mean = F.conv2d(top.mean((2, 3), keepdim=True), t[f"{name}.convs.4.1.weight"])
        mean = F.relu(norm(mean, t, f"{name}.convs.4.2")).expand(-1, -1, *top.shape[-2:])
        return block(torch.cat([*parts, mean], 1), t, f"{name}.project")
    net = stir(DeepLabV3(4, encoder="resnet50", width=4, output_stride=stride))
    t = net.state_dict()
    seen = aspp(restated_resnet(x, t, rates3, rates4), t, "head.0")
    with torch.no_grad(): close(net.compute(x), F.conv2d(seen, t["head.1.weight"], t["head.1.bias"]), 1e-11)
    net = stir(DeepLabV3Plus(4, encoder="resnet50", width=4, output_stride=stride))
    t, first = net.state_dict(), {}
    net.encoder.layer1.register_forward_hook(lambda m, a, out: first.update(low=out))
    with torch.no_grad(): got = net.compute(x)
    low = block(first["low"], t, "low")
    seen = F.interpolate(aspp(restated_resnet(x, t, rates3, rates4), t, "pyramid"), low.shape[-2:], mode="bilinear")
    fused = block(block(torch.cat([seen, low], 1), t, "fuse.0", 1, 1), t, "fuse.1", 1, 1)
    close(got, F.conv2d(fused, t["classifier.weight"], t["classifier.bias"]), 1e-11)


# Invariants

@pytest.mark.parametrize("options, size", [(NARROW[0], (113, 81)), (NARROW[1], (96, 128)), (NARROW[2], (81, 97)), (NARROW[3], (64, 80))])
def test_strides_share_weights_and_maps(options, size):
    """The map of stride 16 is every second pixel of that of stride 8: without the image's mean, or with the same mean in both.

    torchvision's form is not like that: its last 3x3 has no rate that could follow the stride."""
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    for pooling in (False, True):
        coarse, fine = [stir(DeepLabV3(3, output_stride=s, pooling=pooling, **options)) for s in (16, 8)]
        fine.load_state_dict(coarse.state_dict())
        assert fine.rates == tuple(2 * r for r in coarse.rates) == (12, 24, 36)
        with torch.no_grad():
            if pooling:
                assert (fine.compute(x)[..., ::2, ::2] - coarse.compute(x)).abs().max() > 1e-9
                mean = torch.rand(1, coarse.encoder.channels[-1], 1, 1, dtype=torch.float64)
                for net in (coarse, fine): net.head[0].convs[-1][0].register_forward_hook(lambda m, i, out: mean)
            close(fine.compute(x)[..., ::2, ::2], coarse.compute(x))


def test_whole_vgg_of_exact_pools_is_the_strided_network():
    "v1 with VGG's own pools, at stride 8, subsampled by 4, is VGG at stride 32 with fc6 at a quarter of the rate"
    torch.manual_seed(0)
    net = DeepLabSum(3, encoder="vgg16", branches=[(3, 12, 2)], pool=2, width=4).double().eval()
    strided = DeepLabSum(3, encoder="vgg16", branches=[(3, 3, 2)], pool=2, width=4).double().eval()
    strided.load_state_dict(net.state_dict())
    for key, m in strided.encoder.named_children():
        if isinstance(m, nn.MaxPool2d): setattr(strided.encoder, key, nn.MaxPool2d(2))
        elif isinstance(m, nn.Conv2d): m.dilation = m.padding = (1, 1)
    x = torch.rand(1, 3, 160, 224, dtype=torch.float64)
    with torch.no_grad(): close(net.compute(x)[..., ::4, ::4], strided.compute(x))


def test_multi_grid_rates():
    rates = lambda net: [m.dilation[0] for m in net.encoder.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    small = dict(width=4, encoder="resnet50")
    assert rates(DeepLabV3(2, **small)) == [2, 4, 8] and rates(DeepLabV3(2, output_stride=8, **small)) == [4, 8, 16]
    assert rates(DeepLabV3(2, multi_grid=(1, 1, 1), **small)) == [2, 2, 2] and rates(DeepLabV3(2, multi_grid=(), **small)) == [1, 2, 2]
    assert rates(DeepLabV3(2, head="torchvision", **small)) == [2, 4, 4] and rates(DeepLabV3Plus(2, **small)) == [2, 4, 8]
    assert rates(DeepLabV3(2, encoder="resnet18", width=4)) == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="2 units"): DeepLabV3(2, encoder="resnet18", width=4, multi_grid=(1, 2, 4))
    with pytest.raises(ValueError, match="mobilenet_v2 has 0 units"): DeepLabV3(2, encoder="mobilenet_v2", width=4, multi_grid=(1, 2, 4))


def test_max_fusion_is_the_largest_of_all_scales():
    torch.manual_seed(0)
    net = stir(deeplabv2(3, encoder="resnet18", width=4))
    x = torch.rand(1, 3, 70, 93, dtype=torch.float64)
    with torch.no_grad(): out, maps = net.forward_aux(x)
    assert len(maps) == 3 and out.shape == (1, 3, 70, 93)
    assert len({tuple(m.shape) for m in maps}) == 1
    net.scales = (1,)
    with torch.no_grad(): alone, none = net.forward_aux(x)
    assert none == [] and torch.equal(alone, maps[0])


def test_pyramid_without_mean():
    aspp = pyramid(8, 4, (1, 2), 0.0, pooling=False)
    assert len(aspp.convs) == 3 and aspp.project[0].in_channels == 12
    assert aspp.train()(torch.rand(1, 8, 5, 6)).shape == (1, 4, 5, 6)  # no 1x1 map, so a batch of one trains


# The contract

@pytest.mark.parametrize("build", [
    lambda: deeplabv1(5, width=2, field="7x7", pool=2, encoder="vgg16_bn"), lambda: deeplabv2(5, encoder="resnet18", width=4),
    lambda: deeplabv2(5, encoder="vgg16", width=4, scales=(0.5, 0.75)), lambda: DeepLabV3(5, encoder="mobilenet_v2", width=2),
    lambda: DeepLabV3(5, encoder="resnet50", width=4, head="torchvision", aux=True), lambda: DeepLabV3(5, **NARROW[0], output_stride=32, pooling=False),
    lambda: DeepLabV3Plus(5, **NARROW[1]), lambda: DeepLabV3Plus(5, encoder="resnet18", width=8, head="smp", aux=True, multi_grid=()),
    lambda: deeplabv3plus_xception(5, width=2)])
def test_contract(build): check_segmenter(build, sizes=((64, 64), (67, 93)))


def test_learns_two_stripes_by_heart():
    assert accuracy_by_heart(DeepLabV3Plus(2, encoder="resnet18", width=8), 25) > 0.95


@pytest.mark.parametrize("make, says", [
    (lambda: DeepLabV3(3, head="smp"), "paper, torchvision"), (lambda: DeepLabV3Plus(3, head="torchvision"), "paper, smp"),
    (lambda: DeepLabV3(3, output_stride=4), "8, 16 or 32"), (lambda: DeepLabV3(3, encoder="resnet99"), "Known"),
    (lambda: deeplabv1(3, field="5x5"), "largefov"), (lambda: deeplabv1(3, pool=4), "authors"), (lambda: deeplabv2(3, scales=()), "above 0"),
    (lambda: deeplabv2(3, scales=(1, 2)), "up to 1"), (lambda: DeepLabV3(0, width=4), "num_classes"), (lambda: DeepLabV3(2, width=0), "width")])
def test_refuses(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_batch_of_one_says_why():
    net = DeepLabV3(3, encoder="resnet18", width=4).train()
    with pytest.raises(ValueError, match="batches of two or more"): net(torch.rand(1, 3, 64, 64))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name, options", [("deeplabv2", dict(encoder="resnet18", width=4, scales=(1, 0.5), rates=(1, 2))),
                                           ("deeplabv3", dict(encoder="resnet50", width=4, multi_grid=(1, 2, 1), rates=(1, 2, 3)))])
def test_round_trip_with_tuples_as_options(name, options, tmp_path):
    net = create_model(name, 3, 1, **options).eval()
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(1, 1, 70, 64)
    with torch.no_grad(): assert torch.equal(again(x), net(x))


def test_load_encoder():
    torch.manual_seed(0)
    from torchvision.models import resnet18
    for net in (deeplabv2(2, encoder="resnet18"), DeepLabV3(2, encoder="resnet18"), DeepLabV3Plus(2, encoder="resnet18")):
        theirs = resnet18(weights=None)
        net.load_encoder(theirs.state_dict(), "resnet18")
        assert torch.equal(net.encoder.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
        assert count_parameters(net) == sum(p.numel() for p in [*net.encoder_parameters(), *net.decoder_parameters()])


def test_exports():
    torch.manual_seed(0)
    net, x = DeepLabV3Plus(3, encoder="resnet18", width=4).eval(), torch.rand(1, 3, 96, 64)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_crf_settings_are_settings():
    crf = DenseCRF(3, **CRF_V2)
    assert FIELDS["largefov"] == (3, 12, 2) and crf.bilateral_xy == 67 and crf.iterations == 10
