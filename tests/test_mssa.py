"MSSA as we read it: the drawn shapes, the counts, a restatement with functions only, and the gates' invariants"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import scramble
from synseg.check import check_segmenter, count_parameters
from synseg.conv import multiply_adds
from synseg.mssa import (DECLARED, DETAILS, ENTRIES, GATES, MSSA, RATES, SHAPES, Attention, ChannelGate, DilatedBlock, Fuse, SpatialGate, attend,
                         dilated_stage)


def restated(x, t, rates, kind):
    "The network with functions only; `t` is a state dict. Concatenations are made, and what is below is enlarged before it is mixed"
    def norm(x, name):
        return F.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"], t[name + ".bias"])
    def conv(x, name, stride=1, rate=1):
        w = t[name + ".weight"]
        return F.conv2d(x, w, None, stride, rate * (w.shape[-1] // 2), rate, x.shape[1] if w.shape[1] == 1 != x.shape[1] else 1)
    def separable(x, name, stride=1, rate=1):
        return norm(conv(norm(conv(x, f"{name}.0.0", stride, rate), f"{name}.0.1"), f"{name}.1.0"), f"{name}.1.1")
    def gated(x, name):
        if kind == "none": return x
        z = x.mean((2, 3), keepdim=True) if kind == "channel" else torch.stack([x.mean(1), x.amax(1)], 1)
        return x * (1 + torch.sigmoid(norm(conv(z, f"{name}.gate.score.0"), f"{name}.gate.score.1")))
    maps = []
    for i, dilations in enumerate(rates):
        x = F.relu(separable(x, f"stages.{i}.0", 2) if i else norm(conv(x, "stages.0.0.0", 2), "stages.0.0.1"))
        for j, rate in enumerate(dilations, 1): x = F.relu(x + separable(x, f"stages.{i}.{j}.conv", 1, rate))
        maps.append(x := gated(x, f"attentions.{i}"))
    x = gated(x, "attention2")
    for i, skip in enumerate(maps[::-1]):
        up = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
        mix = torch.cat([t[f"fuses.{i}.skip.weight"], t[f"fuses.{i}.below.weight"]], 1)
        x = F.relu(norm(F.conv2d(torch.cat([skip, up], 1), mix), f"fuses.{i}.norm"))
        x = F.relu(norm(conv(x, f"fuses.{i}.atrous.0", 1, 2), f"fuses.{i}.atrous.1"))
    return F.conv2d(x, t["head.weight"], t["head.bias"])


def permuted(x, seed=0):
    "The pixels of x in another order, the same for all channels"
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    return x.flatten(2)[..., order].view_as(x)


def test_drawn_shapes():
    with torch.device("meta"): maps = MSSA(19).eval().maps(torch.rand(1, 3, 1024, 1024, device="meta"))
    assert [(m.shape[-1], m.shape[1]) for m in maps] == list(SHAPES) == [(512, 8), (256, 48), (128, 96), (64, 192)]


@pytest.mark.parametrize("classes, channels, count", [(19, 3, 318_043), (11, 3, 318_043 - 8 * 9), (19, 1, 318_043 - 2 * 8 * 9)])
def test_parameters(classes, channels, count):
    with torch.device("meta"): assert count_parameters(MSSA(classes, channels)) == count


def test_parameters_by_hand():
    "Stage by stage: dense or separable, two numbers for each norm's channel; then gates, fusions and scores"
    sep, w = (lambda a, b: 9 * a + 2 * a + a * b + 2 * b), (8, 48, 96, 192)
    stages = 27 * 8 + 16 + sep(8, 8) + sum(sep(a, b) + sep(b, b) for a, b in zip(w, w[1:])) + sep(192, 192)
    gates = sum(c * c + 2 * c for c in (*w, 192))
    fuses = sum(c * c + c * b + 2 * c + 9 * c + 2 * c for c, b in zip(w, (*w[1:], 192)))
    assert stages + gates + fuses + 8 * 19 + 19 == 318_043
    with torch.device("meta"):
        nets = {k: count_parameters(MSSA(19, attention=k)) for k in GATES}
    assert nets["channel"] - nets["none"] == gates and nets["spatial"] - nets["none"] == 5 * (2 * 49 + 2)


def test_multiply_adds():
    with torch.device("meta"): costs = multiply_adds(MSSA(19).eval(), 1024)
    assert costs.multiply_adds == 1_849_642_304 and round(costs.multiply_adds / 1e9, 1) == DECLARED["multiply_adds"] / 1e9
    gates = sum(r.multiply_adds for r in costs if "attention" in r.module)
    assert gates == sum(c * c for c in (8, 48, 96, 192, 192))


def test_no_weight_of_a_convolution_works_less_than_4096_times():
    "So 1.8e9 multiply-adds pay for at most 439,453 of them, and the declared 5.5 million are out of reach"
    with torch.device("meta"): costs = multiply_adds(MSSA(19).eval(), 1024)
    uses = [r.multiply_adds / r.parameters for r in costs if r.kind == "Conv2d" and "attention" not in r.module and r.module != "head"]
    assert min(uses) == 64**2 and DECLARED["multiply_adds"] // 64**2 == 439_453 < DECLARED["parameters"]


def test_entry():
    entry = ENTRIES["mssa"]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters and entry.info.published == "5.5M"
    assert len(entry.info.deviations) == len(DETAILS) + 1 and all(d.what and d.given and d.reading for d in DETAILS)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("width, rates", [(3, RATES), (2, ((1,), (2, 3), (), (2,)))])
def test_same_as_the_restatement(kind, width, rates):
    net = scramble(MSSA(5, 2, width=width, attention=kind, rates=rates)).requires_grad_(False)
    x = torch.rand(2, 2, 80, 64, dtype=torch.float64)
    z = (x - 0.5) / 0.25
    torch.testing.assert_close(net.compute(z), restated(z, net.state_dict(), rates, kind))


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x): return torch.full_like(x[:, :1, :1, :1], self.value)


@pytest.mark.parametrize("gate, factor", [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)])
def test_constant_gates(gate, factor):
    x = torch.randn(2, 5, 7, 9)
    torch.testing.assert_close(Attention(Constant(gate))(x), factor * x, rtol=0, atol=0)


def test_zero_gates_are_no_attention():
    "A whole network whose gates are zero is the network without attention"
    net, bare = (scramble(MSSA(3, width=2, attention=k)).requires_grad_(False) for k in ("channel", "none"))
    for a in (*net.attentions, net.attention2): a.gate = Constant(0.0)
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if ".gate." not in k})
    x = torch.rand(2, 3, 67, 70, dtype=torch.float64)
    torch.testing.assert_close(net(x), bare(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 3)])
def test_channel_gate_does_not_see_where(size):
    module, x = scramble(Attention(ChannelGate(6))).requires_grad_(False), torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(module.gate(permuted(x)), module.gate(x))
    torch.testing.assert_close(module(permuted(x)), permuted(module(x)))
    assert module.gate(x).shape == (2, 6, 1, 1) and 0 < module.gate(x).min() and module.gate(x).max() < 1


def test_spatial_gate_sees_where_and_not_which():
    module, x = scramble(Attention(SpatialGate(6))).requires_grad_(False), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert module.gate(x).shape == (2, 1, 9, 8)
    assert not torch.allclose(module.gate(permuted(x)), permuted(module.gate(x)))
    torch.testing.assert_close(module.gate(x[:, [3, 1, 5, 0, 2, 4]]), module.gate(x))
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))  # away from the padding it moves with the image
    x = torch.randn(1, 6, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x.roll(1, -1))[inner], module(x).roll(1, -1)[inner])


def test_channel_gate_in_training():
    "The norm sees one value for each image: with one nothing is left, with two only the sign of the difference"
    gate = ChannelGate(16)
    with pytest.raises(ValueError, match="batch of one"): gate(torch.rand(1, 16, 8, 8))
    gate.score[1].eval()
    assert gate(torch.rand(1, 16, 8, 8)).shape == (1, 16, 1, 1)  # frozen norms are all it takes
    x = 100 * torch.randn(2, 16, 1, 1)
    pair = gate.train()(x.expand(2, 16, 4, 4)).flatten(1)
    ends = torch.sigmoid(torch.tensor([-1.0, 1.0]))
    assert ((pair[..., None] - ends).abs().amin(-1) < 1e-2).float().mean() > 0.8
    torch.testing.assert_close(pair.sum(0), torch.ones(16))


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (5, 4)])
def test_fuse_is_a_convolution_of_the_concatenation(size):
    fuse = scramble(Fuse(4, 6)).requires_grad_(False)
    skip, below = torch.randn(2, 4, *size, dtype=torch.float64), torch.randn(2, 6, *((n + 1) // 2 for n in size), dtype=torch.float64)
    up = F.interpolate(below, size, mode="bilinear", align_corners=False)
    mixed = F.conv2d(torch.cat([skip, up], 1), torch.cat([fuse.skip.weight, fuse.below.weight], 1))
    torch.testing.assert_close(fuse(skip, below), fuse.atrous(F.relu(fuse.norm(mixed))))


def test_bricks():
    x = torch.randn(2, 6, 9, 8)
    assert dilated_stage(6, 5, (1, 3)).eval()(x).shape == (2, 5, 5, 4)
    block = DilatedBlock(6, 2).eval()
    nn.init.zeros_(block.conv[1][1].weight)
    torch.testing.assert_close(block(x), F.relu(x))


@pytest.mark.parametrize("kind", GATES)
def test_contract(kind): check_segmenter(lambda: MSSA(5, width=3, attention=kind))


@pytest.mark.parametrize("size", [(64, 64), (65, 79), (71, 64), (97, 110)])
def test_odd_sizes(size):
    net = MSSA(4, 1, width=2).eval()
    assert net(torch.rand(1, 1, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("options, says", [
    (dict(width=0), "width is 0"), (dict(width=2.0), "whole number"), (dict(width=True), "width"), (dict(attention="self"), "channel, spatial, none"),
    (dict(rates=((2,),)), "4 stages"), (dict(rates=((2,), (2,), (2,), (0,))), "from 1 up"), (dict(rates=((2,), (2,), (2,), (1.5,))), "from 1 up")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): MSSA(5, **{"width": 2, **options})


def test_refuses_an_unknown_gate():
    with pytest.raises(ValueError, match="choose one of"): attend("bello", 8)
    assert isinstance(attend("none", 8), nn.Identity)


def test_batch_of_one():
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="two or more"): MSSA(3, width=2)(x)
    assert MSSA(3, width=2, attention="spatial")(x).shape == MSSA(3, width=2).eval()(x).shape == (1, 3, 64, 64)


def test_overfits_one_batch():
    torch.manual_seed(0)
    net, x = MSSA(3, width=4), torch.rand(4, 3, 64, 64)
    y = F.avg_pool2d(x, 9, 1, 4).argmax(1)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(40):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
