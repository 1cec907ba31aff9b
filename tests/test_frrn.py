"FRRN against its counts, a restatement with functions only, and what the full-resolution stream promises"
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.frrn import ENTRIES, FRRN, FRRU, LAYOUTS, ResidualUnit, Stage, at_stride, frrn_a, frrn_b

TINY = (Stage(2, 1, 2), Stage(8, 2, 3), Stage(4, 1, 1))


def scramble(net):
    "Random weights, scales and running statistics, in double precision"
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=m.weight[0].numel()**-0.5)
            if m.bias is not None: nn.init.normal_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return net.double().eval()


def restated(image, t, strides):
    "The paper's network with functions only; `t` is a state dict, `strides` one number for each unit"
    def norm(x, name): return F.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"], t[name + ".bias"])
    def conv(x, name):
        w = t[name + ".0.weight"]
        return norm(F.conv2d(x, w, padding=w.shape[-1] // 2), name + ".1")
    def ru(x, name):
        short = F.conv2d(x, t[name + ".project.weight"]) if name + ".project.weight" in t else x
        return short + conv(conv(x, name + ".convs.0").relu(), name + ".convs.1")
    def shrink(x, s): return x.unfold(2, s, s).unfold(3, s, s).amax((-1, -2))
    def copied(x, s): return torch.kron(x, torch.ones(s, s, dtype=x.dtype))
    def smooth(x, s): return F.interpolate(x, (x.shape[2] * s, x.shape[3] * s), mode="bilinear")
    height, width = image.shape[-2:]
    big = max(strides)
    x = F.pad((image - 0.5) / 0.25, (0, -width % big, 0, -height % big), mode="reflect")
    pooled = conv(x, "head.0").relu()
    for i in (1, 2, 3): pooled = ru(pooled, f"head.{i}")
    lanes, last = conv(pooled, "split"), 1
    for i, s in enumerate(strides):
        if s != last: pooled = shrink(pooled, s // last) if s > last else smooth(pooled, last // s)
        pooled = torch.cat([pooled, shrink(lanes, s)], 1)
        for j in (0, 1): pooled = conv(pooled, f"units.{i}.convs.{j}").relu()
        lanes = lanes + copied(F.conv2d(pooled, t[f"units.{i}.back.weight"], t[f"units.{i}.back.bias"]), s)
        last = s
    x = torch.cat([smooth(pooled, last), lanes], 1)
    for i in range(3): x = ru(x, f"tail.{i}")
    return F.conv2d(x, t["score.weight"], t["score.bias"])[..., :height, :width]


@pytest.mark.parametrize("name, count, units, stride", [("frrn_a", 17_746_803, 17, 16), ("frrn_b", 24_755_699, 21, 32)])
def test_counts_of_the_paper(name, count, units, stride):
    entry = ENTRIES[name]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters == count and entry.info.deviations
    assert len(net.units) == units and net.stride == stride and net.units[0].back.out_channels == 32
    with torch.device("meta"): other = entry.build(11, 1)
    assert count_parameters(other) == count - 8 * 49 - 2 * 25 * 48


def test_channels_of_the_paper():
    with torch.device("meta"): net = frrn_b(19)
    seen = [(u.stride, u.back.in_channels) for u in net.units]
    assert seen == ([(2, 96)] * 3 + [(4, 192)] * 4 + [(8, 384)] * 2 + [(16, 384)] * 2 + [(32, 384)] * 2 + [(16, 192)] * 2
                    + [(8, 192)] * 2 + [(4, 192)] * 2 + [(2, 96)] * 2)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), TINY], ids=["a", "b", "tiny"])
@pytest.mark.parametrize("size", [(64, 96), (67, 93)])
def test_same_as_the_restatement(layout, size):
    net = scramble(FRRN(3, 2, layout=layout, width=3))
    x = torch.rand(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), restated(x, net.state_dict(), [s.stride for s in layout for _ in range(s.units)]))


def stream(net, x):
    y, z = net.begin(net.prepare(x))
    return [z, *(z for _, z in net.walk(y, z))]


@pytest.mark.parametrize("build", [frrn_a, frrn_b])
def test_zeroed_writing_leaves_the_stream(build):
    net = scramble(build(3, width=4))
    x = torch.rand(1, 3, 67, 93, dtype=torch.float64)
    for u in net.units: nn.init.zeros_(u.back.weight), nn.init.zeros_(u.back.bias)
    with torch.no_grad(): assert all(torch.equal(z, stream(net, x)[0]) for z in stream(net, x))


def test_corrections_are_constant_over_cells():
    net = scramble(frrn_b(3, width=4))
    with torch.no_grad(): maps = stream(net, torch.rand(1, 3, 70, 99, dtype=torch.float64))
    for u, a, b in zip(net.units, maps, maps[1:]):
        step = b - a
        cells = step.unfold(2, u.stride, u.stride).unfold(3, u.stride, u.stride)
        torch.testing.assert_close(cells.amax((-1, -2)), cells.amin((-1, -2)))
        assert step.abs().amax() > 1e-3
    total = (maps[-1] - maps[0]).unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(total.amax((-1, -2)), total.amin((-1, -2)))


def test_gradient_is_the_identity_and_corrections():
    net = scramble(frrn_a(3, width=3)).requires_grad_(False)
    y, z = net.begin(net.prepare(torch.rand(1, 3, 64, 64, dtype=torch.float64)))
    v = torch.randn_like(z)
    def pulled(net):
        start = z.clone().requires_grad_()
        *_, (_, last) = net.walk(y, start)
        return torch.autograd.grad((last * v).sum(), start)[0]
    silent = copy.deepcopy(net)
    for u in silent.units: u.back.weight.zero_()
    assert torch.equal(pulled(silent), v)
    start, parts = z.clone().requires_grad_(), []
    before = start
    for _, after in net.walk(y, start): parts.append(after - before); before = after
    corrections = sum(torch.autograd.grad((p * v).sum(), start, retain_graph=True)[0] for p in parts)
    torch.testing.assert_close(pulled(net), v + corrections)
    assert corrections.abs().max() > 1e-6


def test_unit_shapes_and_no_change_in_place():
    unit, y, z = FRRU(3, 5, 2, 4), torch.randn(2, 3, 4, 6), torch.randn(2, 2, 16, 24)
    kept = y.clone(), z.clone()
    new, lanes = unit(y, z)
    assert new.shape == (2, 5, 4, 6) and lanes.shape == z.shape and unit.back.bias is not None
    assert torch.equal(y, kept[0]) and torch.equal(z, kept[1]) and (new >= 0).all()
    x = torch.randn(2, 3, 9, 7)
    assert ResidualUnit(3, 3).project is None and ResidualUnit(3, 4)(x).shape == (2, 4, 9, 7)
    assert (ResidualUnit(3, 3).eval()(x) < 0).any()


def test_no_norm_on_the_way_back():
    net = frrn_a(3, width=3)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert norms == 1 + 6 + 1 + 2 * 17 + 6 and all(isinstance(u.back, nn.Conv2d) for u in net.units)


def test_at_stride():
    x = torch.randn(1, 2, 8, 12)
    assert at_stride(x, 4, 4) is x
    torch.testing.assert_close(at_stride(x, 2, 8), F.max_pool2d(F.max_pool2d(x, 2), 2))
    torch.testing.assert_close(at_stride(x, 4, 2), F.interpolate(x, (16, 24), mode="bilinear"))


def test_start():
    torch.manual_seed(0)
    net = frrn_a(3, width=12)
    for conv, gain in [(net.units[8].convs[0][0], 6), (net.units[8].back, 3), (net.split[0], 3), (net.tail[1].convs[1][0], 3), (net.head[0][0], 6)]:
        bound = (gain / conv.weight[0].numel())**0.5
        assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert not any(u.back.bias.any() for u in net.units)


@pytest.mark.parametrize("build, size", [(frrn_a, (64, 64)), (frrn_a, (67, 93)), (frrn_b, (66, 101)), (frrn_b, (64, 71))])
def test_odd_sizes(build, size):
    with torch.no_grad(): assert build(4, width=3).eval()(torch.rand(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("options, says", [
    (dict(width=0), "width: found 0"), (dict(width=4, lanes=0), "lanes: found 0"), (dict(width=4, lanes=2.0), "lanes: found 2.0"),
    (dict(layout=[]), "empty"), (dict(layout=[(3, 1, 1)]), "power of two"), (dict(layout=[(2, 0, 1)]), "units of stage 0: found 0")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): FRRN(5, **options)


@pytest.mark.parametrize("build", [frrn_a, frrn_b])
def test_contract(build): check_segmenter(lambda: build(5, width=4))


def test_overfits_one_batch():
    torch.manual_seed(0)
    net, x = frrn_a(3, width=4), torch.rand(2, 3, 64, 64)
    y = F.avg_pool2d(x, 9, 1, 4).argmax(1)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
