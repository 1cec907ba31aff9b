"ENet and ERFNet against their counts, a restatement with functions only, and what splitting a kernel can and cannot keep"
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.enet import ENTRIES, PLAN, ConvPool, ENet, ENetBlock, ENetDown, ENetUp, ERFNet, NonBottleneck1D, log_weights, split_kernel
from synseg.zoo import create_model, load_model, save_model

NETS = [ENet, ERFNet]


class Tape:
    "The tensors of a state dict in the order in which the paper's layers need them; each layer takes its own"
    def __init__(self, net): self.left = [v for k, v in net.state_dict().items() if not k.endswith("tracked")]
    def take(self, n): return [self.left.pop(0) for _ in range(n)]
    def conv(self, x, bias=True, **how): return F.conv2d(x, *self.take(1 + bias), **how)
    def transposed(self, x, **how): return F.conv_transpose2d(x, *self.take(2), **how)
    def prelu(self, x): return F.prelu(x, *self.take(1))
    def norm(self, x):
        scale, shift, mean, var = self.take(4)
        c = lambda t: t[None, :, None, None]
        return (x - c(mean)) / (c(var) + 1e-3).sqrt() * c(scale) + c(shift)


DOUBLE = dict(stride=2, padding=1, output_padding=1)


def restated_enet(x, t):
    "Table 1 of the paper, layer by layer: encoder with PReLU, decoder with ReLU, places of the matching stage"
    def bottleneck(x, kind=1, relu=False):
        act = F.relu if relu else t.prelu
        y = act(t.norm(t.conv(x, False)))
        if kind == "asymmetric": y = t.conv(t.conv(y, False, padding=(0, 2)), padding=(2, 0))
        else: y = t.conv(y, padding=kind, dilation=kind)
        y = t.norm(t.conv(act(t.norm(y)), False))
        return act(x + y)
    def down(x):
        pooled, at = F.max_pool2d(x, 2, 2, return_indices=True)
        y = t.prelu(t.norm(t.conv(x, False, stride=2)))
        y = t.norm(t.conv(t.prelu(t.norm(t.conv(y, padding=1))), False))
        short = torch.zeros_like(y)
        short[:, :pooled.shape[1]] = pooled
        return t.prelu(short + y), at
    def up(x, at):
        y = F.relu(t.norm(t.conv(x, False)))
        y = F.relu(t.norm(t.transposed(y, **DOUBLE)))
        y = t.norm(t.conv(y, False))
        return F.relu(F.max_unpool2d(t.norm(t.conv(x, False)), at, 2) + y)
    x = torch.cat([t.conv(x, stride=2, padding=1), F.max_pool2d(x, 2)], 1)
    x, fine = down(t.prelu(t.norm(x)))
    for _ in range(4): x = bottleneck(x)
    x, coarse = down(x)
    for kind in (1, 2, "asymmetric", 4, 1, 8, "asymmetric", 16) * 2: x = bottleneck(x, kind)
    x = up(x, coarse)
    for _ in range(2): x = bottleneck(x, relu=True)
    x = bottleneck(up(x, fine), relu=True)
    return t.transposed(x, stride=2)


def restated_erfnet(x, t):
    def down(x): return F.relu(t.norm(torch.cat([t.conv(x, stride=2, padding=1), F.max_pool2d(x, 2)], 1)))
    def block(x, d=1):
        y = F.relu(t.conv(x, padding=(1, 0)))
        y = F.relu(t.norm(t.conv(y, padding=(0, 1))))
        y = F.relu(t.conv(y, padding=(d, 0), dilation=(d, 1)))
        return F.relu(x + t.norm(t.conv(y, padding=(0, d), dilation=(1, d))))
    x = down(down(x))
    for _ in range(5): x = block(x)
    x = down(x)
    for d in (2, 4, 8, 16, 2, 4, 8, 16): x = block(x, d)
    for _ in range(2): x = block(block(F.relu(t.norm(t.transposed(x, **DOUBLE)))))
    return t.transposed(x, stride=2)


@pytest.mark.parametrize("build, restated", [(ENet, restated_enet), (ERFNet, restated_erfnet)])
@pytest.mark.parametrize("width, size", [(16, (64, 72)), (4, (72, 136))])
def test_restatement(build, restated, width, size):
    torch.manual_seed(0)
    net, x = scramble(build(5, width=width), lambda p: p[0].numel()**-0.5 if p.ndim == 4 else 0.3), torch.rand(2, 3, *size, dtype=torch.float64)
    tape = Tape(net)
    with torch.no_grad(): want, got = restated(x, tape), net(x)
    assert not tape.left and want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("classes, count", [(20, 364_376), (19, 364_311), (12, 363_856), (11, 363_791)])
def test_enet_counts(classes, count): assert count_parameters(ENet(classes)) == count


def test_counts_and_structure():
    assert count_parameters(ERFNet(19)) == 2_064_191
    for name, entry in ENTRIES.items():
        net = entry.build(entry.info.classes, entry.info.in_channels)
        assert entry.info.name == name and count_parameters(net) == entry.info.parameters
        assert all(m.eps == 1e-3 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    enet, erfnet = ENet(19), ERFNet(19)
    drops = lambda net: [m.p for m in net.modules() if isinstance(m, nn.Dropout2d)]
    assert drops(enet) == [0.01] * 5 + [0.1] * 17 and drops(erfnet) == [0.03] * 5 + [0.3] * 8
    assert all(m.num_parameters > 1 for m in enet.modules() if isinstance(m, nn.PReLU))
    assert not any(isinstance(m, nn.PReLU) for part in (enet.up4, enet.stage4, enet.up5, enet.stage5) for m in part.modules())
    assert len(enet.stage2) == len(enet.stage3) == len(PLAN) == 8
    assert enet.down1.branch[0].out_channels == 16  # a quarter of what goes out, not of what comes in
    for block in erfnet.down:
        if isinstance(block, NonBottleneck1D):
            first, second = ([m.dilation for m in block.branch if isinstance(m, nn.Conv2d)][i:i + 2] for i in (0, 2))
            assert first == [(1, 1)] * 2 and second[0][1] == second[1][0] == 1 and second[0][0] == second[1][1]


def test_encoders_map():
    x = torch.rand(1, 3, 64, 88)
    with torch.no_grad():
        z, memory = ENet(5).eval().encode(x)
        assert z.shape == ERFNet(5).eval().encode(x).shape == (1, 128, 8, 11)
    assert [(tuple(at.shape), size) for at, size in memory] == [((1, 16, 16, 22), (32, 44)), ((1, 64, 8, 11), (16, 22))]


def test_unpooling_keeps_maxima_in_place():
    down, up = ENetDown(8, 16).double().eval(), ENetUp(16, 8).double().eval()
    x = torch.rand(2, 8, 10, 14, dtype=torch.float64) + 0.1
    y, (at, size) = down(x)
    pooled = F.max_pool2d(x, 2)
    nn.init.zeros_(up.branch[-1].weight); nn.init.zeros_(up.branch[-1].bias)  # the long way is silent
    out = up(y, at, size)
    short = up.shortcut(y).relu()
    assert torch.equal(F.max_pool2d(out, 2), short)
    assert not out[x != F.interpolate(pooled, scale_factor=2)].any()


@pytest.mark.parametrize("kind", [1, 3, "asymmetric"])
def test_a_middle_has_one_convolution_with_bias(kind):
    convs = [m for m in ENetBlock(16, kind).branch if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convs] == ([False, False, True, False] if kind == "asymmetric" else [False, True, False])


@pytest.mark.parametrize("c_in, c_out, size", [(1, 1, (7, 9)), (3, 5, (11, 8)), (6, 2, (9, 9))])
def test_split_kernel_of_a_pair_is_exact(c_in, c_out, size):
    torch.manual_seed(0)
    column, row = torch.randn(c_out, c_in, 3, 1).double(), torch.randn(c_out, c_out, 1, 3).double()
    full = torch.einsum("omb,mia->oiab", row[:, :, 0], column[..., 0])
    a, b, kept = split_kernel(full)
    assert a.shape == column.shape and b.shape == row.shape and kept == pytest.approx(1)
    x = torch.rand(2, c_in, *size).double()
    want = F.conv2d(x, full, padding=1)
    for v, h in ((column, row), (a, b)):
        torch.testing.assert_close(F.conv2d(F.conv2d(x, v, padding=(1, 0)), h, padding=(0, 1)), want)


def test_split_kernel_is_the_best_and_says_how_good():
    torch.manual_seed(0)
    w = torch.randn(4, 5, 3, 3).double()
    shares = []
    for inner in (1, 3, 4, 12, 20):
        column, row, kept = split_kernel(w, inner)
        near = torch.einsum("omb,mia->oiab", row[:, :, 0], column[..., 0])
        assert kept == pytest.approx(1 - ((w - near).square().sum() / w.square().sum()).item())
        shares.append(kept)
    assert shares == sorted(shares) and shares[2] < 0.9 and shares[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one channel"): split_kernel(w, 0)


def test_log_weights():
    w = log_weights(torch.tensor([0, 10, 0]))
    torch.testing.assert_close(w, torch.tensor([1 / math.log(1.02), 1 / math.log(2.02), 1 / math.log(1.02)]))
    assert w[0].item() == pytest.approx(50.5, abs=0.05) and w[1].item() == pytest.approx(1.42, abs=0.005)
    for c in (1.0, 0.5):
        with pytest.raises(ValueError, match="above 1"): log_weights(torch.ones(3), c)
    for bad in (torch.zeros(3), torch.tensor([1, -1, 3])):
        with pytest.raises(ValueError, match="counts"): log_weights(bad)


@pytest.mark.parametrize("build", [lambda: ENet(5, width=4), lambda: ENet(5, width=4, unpool="nearest"), lambda: ERFNet(5, width=4)])
def test_contract(build): check_segmenter(build, sizes=((64, 64), (67, 93)))


def test_other_channels_and_one_class():
    for build in NETS:
        with torch.no_grad(): assert build(1, 4, width=8).eval()(torch.rand(1, 4, 65, 130)).shape == (1, 1, 65, 130)


@pytest.mark.parametrize("build", NETS)
def test_refuses(build):
    for width in (0, -4, 6, 8.0, True):
        with pytest.raises(ValueError, match="multiple of 4"): build(5, width=width)
    with pytest.raises(ValueError, match="larger width"): build(5, 4, width=4)
    with pytest.raises(ValueError, match="at least 64x64"): build(5, width=4)(torch.rand(1, 3, 60, 90))


def test_refuses_more():
    with pytest.raises(ValueError, match="'indices' or 'nearest'"): ENet(5, unpool="bilinear")
    with pytest.raises(ValueError, match="multiple of 4"): ENetBlock(6)
    with pytest.raises(ValueError, match="pooling keeps 8"): ConvPool(8, 8)


@pytest.mark.parametrize("build", NETS)
def test_overfits_one_batch(build):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    y = (F.avg_pool2d(x, 9, 1, 4)[:, 0] > F.avg_pool2d(x, 9, 1, 4)[:, 1]).long()
    x[:, 0] += y  # the class is to be seen
    net, losses = build(2, width=8), []
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(70):
        loss = F.cross_entropy(net(x.clamp(0, 1)), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::5]


@pytest.mark.parametrize("name", list(ENTRIES))
def test_through_the_zoo(name, tmp_path):
    net = create_model(name, 5, width=4).eval()
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(1, 3, 64, 80)
    with torch.no_grad(): assert torch.equal(again(x), net(x))
