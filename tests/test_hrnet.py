"HRNet against its counts, timm's maps by carried weights, a restatement with functions only, and its streams cut apart"
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.conv import multiply_adds
from synseg.hrnet import ENTRIES, EXCHANGES, LAYOUTS, Exchange, HRNet, Layout, StreamModule, Streams, lane, resize, transition
from synseg.parity import stirred

SMALL = dict(width=4, modules=(1, 1, 1), blocks=1, first=(1, 4), stem=8)


def stir(net, seed=0):
    "Random norms and biases, in double precision and eval mode"
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim == 1: nn.init.normal_(p, std=0.1)
    return stirred(net, seed).double()


def restated(x, t, layout, talks=lambda stage, module: True):
    "Logits of a normalised image whose sides are multiples of 32, from a state dict, with functions only"
    def norm(x, name): return F.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"], t[name + ".bias"])
    def conv(x, name, stride=1): return F.conv2d(x, t[name + ".weight"], None, stride, t[name + ".weight"].shape[-1] // 2)
    def cn(x, name, stride=1): return norm(conv(x, name + ".0", stride), name + ".1")
    def up(x, times): return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)
    def basic(x, name):
        out = F.relu(norm(conv(x, name + ".conv1"), name + ".bn1"))
        return F.relu(x + norm(conv(out, name + ".conv2"), name + ".bn2"))
    def bottleneck(x, name):
        out = x
        for i in (1, 2, 3):
            out = norm(conv(out, f"{name}.conv{i}"), f"{name}.bn{i}")
            if i < 3: out = F.relu(out)
        return F.relu(out + (cn(x, name + ".downsample") if name + ".downsample.0.weight" in t else x))
    for i in (1, 2): x = F.relu(norm(conv(x, f"encoder.conv{i}", 2), f"encoder.bn{i}"))
    for i in range(layout.first[0]): x = bottleneck(x, f"encoder.layer1.{i}")
    maps = [x]
    for stage in (2, 3, 4):
        name, old = f"encoder.transition{stage - 1}", maps
        kept = [F.relu(cn(m, f"{name}.{i}")) if f"{name}.{i}.0.weight" in t else m for i, m in enumerate(old)]
        if len(old) == 1: new = F.relu(cn(old[0], f"{name}.1.0", 2))
        else: new = F.relu(cn(old[-1], f"{name}.{len(old)}.0", 2))
        maps = [*kept, new]
        for module in range(layout.modules[stage - 2]):
            name = f"encoder.stage{stage}.{module}"
            for b in range(stage):
                for k in range(layout.blocks): maps[b] = basic(maps[b], f"{name}.branches.{b}.{k}")
            if not talks(stage, module): continue
            out = []
            for i in range(stage):
                total = maps[i].clone()
                for j in range(stage):
                    if j > i: total += up(cn(maps[j], f"{name}.fuse_layers.{i}.{j}"), 2 ** (j - i))
                    if j < i:
                        way = maps[j]
                        for k in range(i - j):
                            way = cn(way, f"{name}.fuse_layers.{i}.{j}.{k}", 2)
                            if k < i - j - 1: way = F.relu(way)
                        total += way
                out.append(F.relu(total))
            maps = out
    x = torch.cat([maps[0], up(maps[1], 2), up(maps[2], 4), up(maps[3], 8)], 1)
    x = F.relu(norm(F.conv2d(x, t["head.0.weight"], t["head.0.bias"]), "head.1"))
    return F.conv2d(x, t["head.3.weight"], t["head.3.bias"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_of_the_release(name):
    info = ENTRIES[name].info
    with torch.device("meta"): net = ENTRIES[name].build(19)
    c, k = LAYOUTS[name].width, 19
    assert count_parameters(net) == info.parameters == dict(
        hrnet_w18=9_641_119, hrnet_w32=29_546_515, hrnet_w48=65_859_379, hrnet_w18_small_v1=1_540_819, hrnet_w18_small_v2=3_939_579)[name]
    assert count_parameters(net.head) == 15 * c * (15 * c + 1) + 30 * c + 15 * c * k + k
    assert info.deviations and info.name == name


@pytest.mark.parametrize("name, printed", [("hrnet_w48", 696.2), ("hrnet_w18_small_v1", 31.1), ("hrnet_w18_small_v2", 71.6)])
def test_work_of_the_release(name, printed):
    "The authors' README prints multiply-adds at 1024x2048 in units of 2^30"
    with torch.device("meta"): net = ENTRIES[name].build(19)
    assert round(multiply_adds(net, (1024, 2048)).multiply_adds / 2**30, 1) == printed


def test_maps_of_the_paper():
    with torch.device("meta"): maps = Streams(LAYOUTS["hrnet_w48"])(torch.rand(1, 3, 512, 1024, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 128, 256), (96, 64, 128), (192, 32, 64), (384, 16, 32)]


@pytest.mark.parametrize("name, theirs", [("hrnet_w18", "hrnet_w18"), ("hrnet_w18_small_v1", "hrnet_w18_small"),
                                          ("hrnet_w18_small_v2", "hrnet_w18_small_v2")])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_same_maps_as_timm(name, theirs, mode, monkeypatch):
    timm = pytest.importorskip("timm")
    net = timm.create_model(theirs, pretrained=False, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    assert {m.mode for m in net.modules() if isinstance(m, nn.Upsample)} == {"nearest"}
    if mode == "bilinear":
        for m in net.modules():
            if isinstance(m, nn.Upsample): m.mode = mode
    else: monkeypatch.setattr("synseg.hrnet.resize", lambda x, size: F.interpolate(x, tuple(size), mode="nearest"))
    net, ours = stirred(net).double(), Streams(LAYOUTS[name]).double().eval()
    ours.load_state_dict(net.state_dict())  # all names, none left over
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(ours(x), net(x), strict=True): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout, stem", [(Layout(3, (1, 2, 1), 2, (2, 4)), 5), (Layout(8, (2, 1, 2), 1, (1, 2)), 8)])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_same_as_the_restatement(layout, stem, exchange):
    net = stir(HRNet(3, 2, **vars(layout), stem=stem, exchange=exchange))
    talks = dict(always=lambda s, m: True, never=lambda s, m: False, stage=lambda s, m: m == layout.modules[s - 2] - 1,
                 last=lambda s, m: (s, m) == (4, layout.modules[2] - 1))[exchange]
    x = torch.rand(2, 2, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        want = F.interpolate(restated((x - net.mean) / net.std, net.state_dict(), layout, talks), scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(net(x), want)


def hear(maps, run):
    "Which of `maps` each of the outputs depends on: (out, in), by gradients"
    maps = [m.requires_grad_() for m in maps]
    rows = [[g is not None and bool(g.any()) for g in torch.autograd.grad(y.square().sum(), maps, allow_unused=True, retain_graph=True)]
            for y in run(maps)]
    return torch.tensor(rows)


def maps_of(widths, size=(16, 24)):
    return [torch.rand(2, c, *(-(-n // 2**i) for n in size), dtype=torch.float64) for i, c in enumerate(widths)]


@pytest.mark.parametrize("widths", [(3,), (2, 5), (3, 4, 6), (2, 4, 8, 16)])
@pytest.mark.parametrize("size", [(16, 24), (17, 21)])
def test_one_exchange_lets_everyone_hear_everyone(widths, size):
    module = stir(StreamModule(widths, blocks=1))
    assert hear(maps_of(widths, size), module).all()
    alone = stir(StreamModule(widths, blocks=1, exchange=False))
    assert torch.equal(hear(maps_of(widths, size), alone), torch.eye(len(widths), dtype=torch.bool))
    assert [m.shape for m in module(maps_of(widths, size))] == [m.shape for m in maps_of(widths, size)]


def silence(net):
    "All lanes between different streams put out zeros"
    for m in net.modules():
        if not isinstance(m, Exchange): continue
        for i, row in enumerate(m):
            for j, way in enumerate(row):
                if i != j: last = [k for k in way.modules() if isinstance(k, nn.BatchNorm2d)][-1]; last.weight.data.zero_(); last.bias.data.zero_()


def test_without_exchange_the_streams_are_independent_networks():
    net = stir(HRNet(3, **SMALL | dict(modules=(1, 2, 2))))
    silence(net)
    quiet = HRNet(3, **SMALL | dict(modules=(1, 2, 2)), exchange="never").double().eval()
    quiet.load_state_dict({k: v for k, v in net.state_dict().items() if k in quiet.state_dict()})
    x = torch.rand(1, 3, 67, 93, dtype=torch.float64)
    with torch.no_grad():
        before = net.encoder(net.prepare(x))
        assert torch.equal(net(x), quiet(x))
        for p in net.encoder.stage4[0].branches[2].parameters(): p.add_(torch.randn_like(p))
        after = net.encoder(net.prepare(x))
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, True, False, True]


def test_lanes():
    assert isinstance(lane(4, 4, 0), nn.Identity)
    down, up = lane(4, 9, 3), lane(9, 4, -3)
    assert [c.out_channels for c in down.modules() if isinstance(c, nn.Conv2d)] == [4, 4, 9]
    assert [isinstance(m, nn.ReLU) for m in down[-1]] == [False, False] and len(up) == 2
    assert down(torch.rand(2, 4, 33, 20)).shape == (2, 9, 5, 3)
    begin = transition([4, 8], [4, 8, 16])
    assert [type(m).__name__ for m in begin] == ["Identity", "Identity", "Sequential"]
    assert resize(torch.rand(1, 1, 2, 2), (2, 2)).shape == (1, 1, 2, 2)


def test_upsampling_commutes_with_the_lane():
    up = stir(lane(6, 3, -2))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(resize(up(x), (20, 28)), up(resize(x, (20, 28))))


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (97, 66)])
def test_any_size(size):
    net = HRNet(3, **SMALL).eval()
    with torch.no_grad(): assert net(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_contract(exchange):
    check_segmenter(lambda: HRNet(5, **SMALL, exchange=exchange))


def test_number_of_routes():
    "An exchange among b streams multiplies the ways by b: counted through a network of ones"
    net = HRNet(1, **SMALL | dict(modules=(1, 4, 3)))
    exchanges = [m for m in net.modules() if isinstance(m, Exchange)]
    assert math.prod(len(m) for m in exchanges) == 2 * 3**4 * 4**3 == 10_368


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = HRNet(4, **SMALL | dict(width=8))
    x = torch.rand(2, 3, 64, 64)
    y = (x.mean(1) * 4).long().unfold(1, 8, 8).unfold(2, 8, 8).amax((-1, -2)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(40):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_encoder_weights_by_name():
    net, other = HRNet(3, **SMALL), HRNet(7, **SMALL)
    net.load_encoder({**other.encoder.state_dict(), "classifier.weight": torch.zeros(2)})
    assert all(torch.equal(a, b) for a, b in zip(net.encoder.state_dict().values(), other.encoder.state_dict().values()))
    assert sum(p.numel() for p in net.decoder_parameters()) == count_parameters(net.head)
    with pytest.raises(ValueError, match="does not fit"): net.load_encoder(HRNet(3, **SMALL | dict(width=5)).encoder.state_dict())


@pytest.mark.parametrize("options, says", [
    (dict(width=0), "width is 0"), (dict(width=2.5), "whole number"), (dict(modules=4), "give 3"), (dict(modules=(1, 4)), "give 3"),
    (dict(modules=(1, 0, 3)), r"modules\[1\] is 0"), (dict(first=64), "give 2"), (dict(blocks=True), "blocks is True"),
    (dict(stem=-1), "stem is -1"), (dict(exchange="often"), "always, stage, last, never")])
def test_refuses(options, says):
    with pytest.raises(ValueError, match=says): HRNet(3, **SMALL | options)


def test_refuses_images():
    net = HRNet(3, **SMALL)
    for x, says in [(torch.rand(1, 1, 64, 64), "3 channels"), (torch.rand(1, 3, 32, 64), "at least"), (torch.rand(3, 64, 64), "batch")]:
        with pytest.raises(ValueError, match=says): net(x)
