"PSPNet against the fact sheet's counts, the authors' network restated, timm's deep stem, smp's pyramid, and where a pixel looks"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.backbone import create_encoder
from synseg.blocks import PyramidPooling
from synseg.check import check_segmenter, count_parameters
from synseg.parity import stirred
from synseg.pspnet import ENTRIES, RESNETS, PSPNet, cell_means, cells, deep_stem, deep_stem_encoder, grow_to_grid, on_grid
from synseg.zoo import create_model, load_model, save_model

BINS = (1, 2, 3, 6)
SIZES = ((6, 6), (60, 60), (7, 11), (13, 17), (9, 9), (6, 25))


@pytest.mark.parametrize("encoder, paper", [("resnet50", 46_716_373), ("resnet101", 65_708_501)])
def test_parameters(encoder, paper):
    with torch.device("meta"): net, more = PSPNet(21, encoder=encoder), PSPNet(21, encoder=encoder, aux=True)
    assert count_parameters(net) == paper and count_parameters(more) - paper == 2_365_205
    assert net.head[0].in_channels == 4096 and net.encoder.conv1[6].out_channels == 128


def test_entry():
    entry = ENTRIES["pspnet"]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters and entry.encoders == RESNETS and net.aux_head is None


# the authors' network, restated: their block, their dilations, their tail, on a state dict of ours

def norm(x, s, key): return F.batch_norm(x, s[key + ".running_mean"], s[key + ".running_var"], s[key + ".weight"], s[key + ".bias"])


def bottleneck(x, s, key, stride, dilation):
    out = F.relu(norm(F.conv2d(x, s[key + ".conv1.weight"]), s, key + ".bn1"))
    out = F.relu(norm(F.conv2d(out, s[key + ".conv2.weight"], stride=stride, padding=dilation, dilation=dilation), s, key + ".bn2"))
    out = norm(F.conv2d(out, s[key + ".conv3.weight"]), s, key + ".bn3")
    if key + ".downsample.0.weight" in s: x = norm(F.conv2d(x, s[key + ".downsample.0.weight"], stride=stride), s, key + ".downsample.1")
    return F.relu(out + x)


def basic(x, s, key, stride, dilation):
    first, second = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    out = F.relu(norm(F.conv2d(x, s[key + ".conv1.weight"], stride=stride, padding=first, dilation=first), s, key + ".bn1"))
    out = norm(F.conv2d(out, s[key + ".conv2.weight"], padding=second, dilation=second), s, key + ".bn2")
    if key + ".downsample.0.weight" in s: x = norm(F.conv2d(x, s[key + ".downsample.0.weight"], stride=stride), s, key + ".downsample.1")
    return F.relu(out + x)


def trunk(x, s, block, first):
    "`first`: dilations of the first blocks of stages 4 and 5; the others have 2 and 4"
    for conv, after in (("0", "1"), ("3", "4")):
        x = F.relu(norm(F.conv2d(x, s[f"conv1.{conv}.weight"], stride=2 if conv == "0" else 1, padding=1), s, f"conv1.{after}"))
    x = F.max_pool2d(F.relu(norm(F.conv2d(x, s["conv1.6.weight"], padding=1), s, "bn1")), 3, 2, 1)
    for stage, stride, rate, start in ((1, 1, 1, 1), (2, 2, 1, 1), (3, 1, 2, first[0]), (4, 1, 4, first[1])):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in s:
            x = block(x, s, f"layer{stage}.{i}", stride if i == 0 else 1, start if i == 0 else rate)
            i += 1
        if stage == 3: middle = x
    return middle, x


def scores(x, s, key):
    x = F.relu(norm(F.conv2d(x, s[key + ".0.weight"], padding=1), s, key + ".1"))
    return F.conv2d(x, s[key + ".4.weight"], s[key + ".4.bias"])


def authors(x, net, block=bottleneck, first=(2, 4), order=(0, 1, 2, 3)):
    assert all((n - 1) % 8 == 0 for n in x.shape[-2:])
    whole = {k: v for k, v in net.state_dict().items()}
    s = {k.removeprefix("encoder."): v for k, v in whole.items() if k.startswith("encoder.")}
    middle, top = trunk((x - net.mean) / net.std, s, block, first)
    stack = [top]
    for i in order:
        z = F.conv2d(F.adaptive_avg_pool2d(top, BINS[i]), whole[f"pyramid.levels.{i}.1.weight"])
        stack.append(F.interpolate(F.relu(norm(z, whole, f"pyramid.levels.{i}.2")), top.shape[-2:], mode="bilinear", align_corners=True))
    back = lambda z: F.interpolate(z, x.shape[-2:], mode="bilinear", align_corners=True)
    return back(scores(torch.cat(stack, 1), whole, "head")), back(scores(middle, whole, "aux_head"))


@pytest.mark.parametrize("size", [(65, 65), (73, 113), (97, 129)])
def test_same_as_the_authors_network(size):
    "Exactly theirs once the first blocks of stages 4 and 5 are dilated as they do; without that, theirs with (1, 2) there"
    torch.manual_seed(0)
    net = stirred(PSPNet(7, encoder="resnet50", width=8, aux=True)).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for first in ((1, 2), (2, 4)):
            for layer, rate in zip((net.encoder.layer3, net.encoder.layer4), first):
                conv = layer[0].conv2
                conv.padding = conv.dilation = (rate, rate)
            want, (got, (aux,)) = authors(x, net, first=first), net.forward_aux(x)
            torch.testing.assert_close(got, want[0])
            torch.testing.assert_close(aux, want[1])
            torch.testing.assert_close(net(x), got)
        assert (authors(x, net, first=(1, 2))[0] - got).abs().max() > 1e-3 * got.abs().max()


def test_resnet18_has_the_same_body():
    net = stirred(PSPNet(5, encoder="resnet18", width=4, aux=True)).double()
    x = torch.rand(1, 3, 81, 73, dtype=torch.float64)
    with torch.no_grad(): want = authors(x, net, basic, first=((1, 2), (2, 4)))
    torch.testing.assert_close(net.forward_aux(x)[0], want[0])
    torch.testing.assert_close(net.forward_aux(x)[1][0], want[1])


def test_caffes_order_is_a_permutation_of_weights():
    "The authors' Caffe nets stack map, 6, 3, 2, 1: the same network with the 3x3's input channels permuted"
    net = stirred(PSPNet(4, encoder="resnet50", width=8, aux=True)).double()
    x = torch.rand(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        want = authors(x, net, first=(1, 2))[0]
        weight, step = net.head[0].weight, 64
        net.head[0].weight.copy_(torch.cat([weight[:, :256], *weight[:, 256:].split(step, 1)[::-1]], 1))
        torch.testing.assert_close(authors(x, net, first=(1, 2), order=(3, 2, 1, 0))[0], want)
        assert (net(x) - want).abs().max() > 1e-6


@pytest.mark.parametrize("name, ours", [("resnet50s", "resnet50"), ("resnet101s", "resnet101")])
def test_deep_stem_is_timms(name, ours):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = stirred(timm.create_model(name, pretrained=False, output_stride=8, num_classes=0, global_pool=""))
    net, x = PSPNet(2, encoder=ours, bins=()), torch.rand(1, 3, 73, 97)
    net.load_encoder(theirs.state_dict(), name)
    with torch.no_grad(): torch.testing.assert_close(net.encoder.eval()(x)[-1], theirs(x), rtol=1e-4, atol=1e-4)
    assert count_parameters(net.encoder) == count_parameters(theirs)


@pytest.mark.parametrize("size", SIZES)
def test_pyramid_is_smps_in_another_order(size):
    "smp stacks the pyramid before the map and has no norm in the first level: a bias there, which a still norm can carry"
    decoder = pytest.importorskip("segmentation_models_pytorch.decoders.pspnet.decoder")
    theirs, ours = stirred(decoder.PSPModule(16, BINS)).double(), stirred(PyramidPooling(16)).double()
    assert theirs.blocks[0].pool[1][0].bias is not None and ours.levels[0][1].bias is None
    with torch.no_grad():
        for a, b in zip(theirs.blocks, ours.levels):
            conv, bn = a.pool[1][0], a.pool[1][1]
            b[1].weight.copy_(conv.weight)
            if isinstance(bn, nn.BatchNorm2d): b[2].load_state_dict(bn.state_dict())
            else: b[2].weight.fill_(1), b[2].bias.copy_(conv.bias), b[2].running_mean.zero_(), b[2].running_var.fill_(1 - b[2].eps)
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x).roll(16, 1))


# the pyramid

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [1, 2, 3, 5, 6])
def test_cells_are_adaptive_poolings(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    want = torch.stack([torch.stack([x[..., t:b, l:r].mean((-2, -1)) for l, r in cells(size[1], bins)], -1) for t, b in cells(size[0], bins)], -2)
    torch.testing.assert_close(cell_means(x, bins), want)
    torch.testing.assert_close(F.adaptive_avg_pool2d(x, bins), want)
    for n in size:
        rows = cells(n, bins)
        assert rows[0][0] == 0 and rows[-1][1] == n and all(b - t <= -(-n // bins) + 1 for t, b in rows)
        overlap = sum(b - t for t, b in rows) - n
        assert overlap == sum(i * n % bins > 0 for i in range(1, bins)) and (overlap == 0) == (n % bins == 0)


@pytest.mark.parametrize("bins", BINS)
def test_constant_cells_come_back_and_permute(bins):
    grid = torch.randn(2, 3, bins, bins, dtype=torch.float64)
    x = F.interpolate(grid, scale_factor=(4, 5), mode="nearest")
    torch.testing.assert_close(F.adaptive_avg_pool2d(x, bins), grid)
    order = torch.randperm(bins * bins)
    moved = F.interpolate(grid.flatten(2)[..., order].view_as(grid), scale_factor=(4, 5), mode="nearest")
    torch.testing.assert_close(F.adaptive_avg_pool2d(moved, bins).flatten(2), grid.flatten(2)[..., order])


def test_the_first_level_knows_no_place():
    torch.manual_seed(0)
    pyramid = stirred(PyramidPooling(8)).double()
    x = torch.randn(2, 8, 13, 17, dtype=torch.float64)
    mixed = x.flatten(2)[..., torch.randperm(13 * 17)].view_as(x)
    a, b = pyramid(x), pyramid(mixed)
    torch.testing.assert_close(a[:, 8:10], b[:, 8:10])
    torch.testing.assert_close(a[:, 8:10], a[:, 8:10, :1, :1].expand(-1, -1, 13, 17))
    torch.testing.assert_close(a[:, :8], x)  # the map itself first, untouched
    for k in range(1, 4): assert (a[:, 8 + 2*k:10 + 2*k] - b[:, 8 + 2*k:10 + 2*k]).abs().max() > 1e-2
    for k, level in enumerate(pyramid.levels): torch.testing.assert_close(level(x), a[:, 8 + 2*k:10 + 2*k])


# the grid

def test_grid():
    for n in range(64, 90):
        x = torch.rand(1, 2, n, 153 - n)
        y = grow_to_grid(x)
        assert all((m - 1) % 8 == 0 and 0 <= m - k < 8 for m, k in zip(y.shape[-2:], x.shape[-2:]))
        assert torch.equal(y[..., :n, :153 - n], x)
    for n in (65, 473, 713): assert grow_to_grid(torch.empty(1, 1, n, n, device="meta")).shape[-1] == n
    z = torch.randn(1, 2, 9, 12)
    torch.testing.assert_close(on_grid(z)[..., ::8, ::8], z)


@pytest.mark.parametrize("encoder, stem", [("resnet18", "deep"), ("resnet18", "plain"), ("resnet50", "deep")])
def test_a_pixel_looks_at_itself(encoder, stem):
    "With a linear, positive network without a pyramid the centre of mass of what a pixel listens to is the pixel"
    net = PSPNet(1, encoder=encoder, width=1 if encoder == "resnet18" else 4, stem=stem, bins=()).double().eval()
    for m in net.modules():
        if isinstance(m, nn.Conv2d): nn.init.constant_(m.weight, 1 / m.weight[0].numel())
    net.encoder.maxpool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    x = torch.ones(1, 3, 1001, 1009, dtype=torch.float64, requires_grad=True)
    z, places = net.compute(x), torch.arange(1209, dtype=torch.float64)
    for row, column in ((504, 512), (501, 499)):
        seen = torch.autograd.grad(z[0, 0, row, column], x, retain_graph=True)[0].sum((0, 1))
        across, down = seen.sum(0) @ places[:x.shape[-1]] / seen.sum(), seen.sum(1) @ places[:x.shape[-2]] / seen.sum()
        assert abs(down - row) < 1e-6 and abs(across - column) < 1e-6


# the contract

NARROW = [dict(encoder="resnet18", width=8), dict(encoder="resnet34", width=4, stem="plain", aux=True), dict(encoder="resnet18", width=4, bins=()),
          dict(encoder="resnet50", width=4, aux=True, bins=[1, 6]), dict(encoder="resnet101", width=2)]


@pytest.mark.parametrize("options", NARROW, ids=str)
def test_contract(options): check_segmenter(lambda: PSPNet(5, **options))


def test_every_size():
    net = PSPNet(2, encoder="resnet18", width=2).eval().requires_grad_(False)
    for n in range(64, 82): assert net(torch.rand(1, 3, n, 145 - n)).shape == (1, 2, n, 145 - n)


def test_batch_of_one_needs_still_norms_or_no_first_level():
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="batch of one"): PSPNet(2, encoder="resnet18", width=2).train()(x)
    assert PSPNet(2, encoder="resnet18", width=2, bins=(2, 3)).train()(x).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("options, says", [(dict(stem="7x7"), "deep, plain"), (dict(encoder="vgg16"), "resnet101, resnet50"), (dict(width=0), "at least 1"),
                                           (dict(bins=(0,)), "at least 1")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): PSPNet(3, **options)


def test_stems_and_weights(tmp_path):
    from torchvision import models
    with pytest.raises(ValueError, match="vgg16.*resnet101"): deep_stem_encoder("vgg16")
    assert deep_stem(4, 5)(torch.rand(1, 4, 33, 40)).shape == (1, 10, 17, 20)
    deep, plain = deep_stem_encoder("resnet50", width=8, in_channels=1), create_encoder("resnet50", 1, 8, 8)
    x = torch.rand(1, 1, 64, 72)
    assert [m.shape[1] for m in deep(x)] == list(deep.channels) == [16, *plain.channels[1:]] and deep.strides == plain.strides
    assert deep_stem_encoder("resnet50", 32).strides == (2, 4, 8, 16, 32)
    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "r.pth")
    net = create_model("pspnet", 2, encoder="resnet18", stem="plain", encoder_weights=tmp_path / "r.pth")
    assert torch.equal(net.encoder.conv1.weight, state["conv1.weight"]) and net.imagenet == "ResNet18_Weights.IMAGENET1K_V1"
    for weights in ("imagenet", tmp_path / "r.pth"):
        with pytest.raises(ValueError, match="stem='plain'"): create_model("pspnet", 2, encoder="resnet18", encoder_weights=weights)
    split = sum(p.numel() for p in net.encoder_parameters())
    assert split == count_parameters(net.encoder) and sum(p.numel() for p in net.decoder_parameters()) == count_parameters(net) - split


def test_round_trip_of_options(tmp_path):
    net = create_model("pspnet", 3, 4, encoder="resnet18", width=2, bins=(2, 3), stem="plain", aux=True).eval()
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(2, 4, 70, 91)
    assert torch.equal(again(x), net(x)) and len(again.pyramid.levels) == 2 and len(again.forward_aux(x)[1]) == 1


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = PSPNet(3, encoder="resnet18", width=8, dropout=0.0, aux=True)
    x, y = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    y[:, :, 32:], y[0, 40:] = 1, 2
    x[:, 0] += 0.5 * y
    optimiser, losses = torch.optim.Adam(net.parameters(), 5e-3), []
    for _ in range(40):
        z, (a,) = net.forward_aux(x)
        loss = F.cross_entropy(z, y) + 0.4 * F.cross_entropy(a, y)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_the_learner_weighs_the_auxiliary_loss():
    from synseg.engine import AUX_WEIGHT, Engine
    from synseg.losses import CrossEntropyLoss
    net, loss = PSPNet(3, encoder="resnet18", width=2, dropout=0.0, aux=True), CrossEntropyLoss()
    engine = Engine(net, loss, lambda m: torch.optim.SGD(m.parameters(), 0.1), "fp32")
    x, y = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    z, (a,) = net.train().forward_aux(x)
    torch.testing.assert_close(engine.loss_of(x, y), loss(z, y) + 0.4 * loss(a, y))
    assert AUX_WEIGHT == 0.4


def test_exports():
    net = PSPNet(3, encoder="resnet18", width=2).eval().requires_grad_(False)
    x = torch.rand(2, 3, 96, 72)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
