"ContextNet against its counts, a restatement with functions only, and each branch alone"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.contextnet import (DESIGNS, ENTRIES, ContextBranch, ContextNet, ContextNet12, ContextNet18, ContextNet124, DetailBranch,
                               FusionUnit, bottleneck, folded_parameters, shrink)
from synseg.conv import multiply_adds
from synseg.zoo import create_model, load_model, save_model

BUILDS = (ContextNet, ContextNet12, ContextNet18, ContextNet124)
FOLDED = dict(cn14=846_179, cn12=846_179, cn18=846_179, cn124=910_563, cn14_500=490_459, cn14_160=159_387)


def stirred(net):
    "In double precision and eval mode, norms with random scales, shifts and statistics"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return net.double().eval()


def restated(image, net, context, detail, ratios, strides=(1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1), pyramid=True):
    "The paper's tables 1 to 3 with functions only; weights are taken from `net` in the order in which tensors lie in its state"
    tensors = iter([v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")])

    def conv(x, stride=1, dilation=1, act=True):
        w, scale, shift, mean, var = (next(tensors) for _ in range(5))
        x = F.conv2d(x, w, None, stride, (w.shape[-1] // 2) * dilation, dilation, x.shape[1] // w.shape[1])
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        return x.clamp(0, 6) if act else x

    def resized(x, size): return F.interpolate(x, size, mode="bilinear", align_corners=False)
    x = (image - 0.5) / 0.25
    low = conv(resized(x, (x.shape[-2] // context, x.shape[-1] // context)), 2)
    for stride in strides:
        out = conv(conv(conv(low), stride), act=False)
        low = low + out if stride == 1 and low.shape == out.shape else out
    if pyramid:
        low = low + sum(F.interpolate(F.adaptive_avg_pool2d(low, b), low.shape[-2:], mode="bilinear", align_corners=True) for b in (1, 2, 3, 6))
    low, high = conv(low), []
    for d in detail:
        h = conv(resized(x, (x.shape[-2] // d, x.shape[-1] // d)), 2)
        for stride in (2, 2, 1): h = conv(conv(h, stride, act=False))
        high.append(h)
    for h, r in zip(high, ratios):
        up = conv(conv(resized(low, h.shape[-2:]), dilation=r), act=False)
        low = (up + conv(h, act=False)).clamp(0, 6)
    z = F.conv2d(low, next(tensors), next(tensors))
    assert not list(tensors)
    return resized(z, image.shape[-2:])


@pytest.mark.parametrize("variant", FOLDED)
def test_counts(variant):
    entry = ENTRIES[f"contextnet_{variant}"]
    with torch.device("meta"):
        net, aux, five = entry.build(19, 3), entry.build(19, 3, aux=True), entry.build(5, 1)
    last = DESIGNS[variant].last
    assert folded_parameters(net) == FOLDED[variant] and count_parameters(net) == entry.info.parameters and entry.info.deviations
    assert count_parameters(aux) - count_parameters(net) == last * 19 + 19
    firsts = DESIGNS[variant].stem + len(DESIGNS[variant].detail) * DESIGNS[variant].shallow[0]
    assert count_parameters(net) - count_parameters(five) == 14 * (last + 1) + 2 * 9 * firsts


@pytest.mark.parametrize("width, count", [(2, 3_270_323), (1.5, 1_861_003), (1.25, 1_304_279), (0.75, 486_703)])
def test_counts_of_other_widths(width, count):
    with torch.device("meta"): assert folded_parameters(ContextNet(19, width=width)) == count


@pytest.mark.parametrize("build, giga", [(ContextNet18, 3.517), (ContextNet, 5.630), (ContextNet12, 14.083)])
def test_multiply_adds_and_maps(build, giga):
    with torch.device("meta"): net = build(19)
    assert round(multiply_adds(net, (1024, 2048)).multiply_adds / 1e9, 3) == giga
    low, high = net.eval().maps(torch.empty(1, 3, 1024, 2048, device="meta"))
    d = net.design.context
    assert low.shape == (1, 128, 128 // d, 256 // d) and [tuple(h.shape) for h in high] == [(1, 128, 128, 256)]


def test_layers():
    branch = ContextBranch(3)
    convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 38 and all(c.bias is None for c in convs) and sum(c.stride == (2, 2) for c in convs) == 3
    assert sum(b.adds for b in branch.blocks) == 8 and len(branch.blocks) == 12
    assert not any(isinstance(m, nn.ReLU) for m in ContextNet(2, width=0.1, aux=True).modules())
    details = [m for m in DetailBranch(3).modules() if isinstance(m, (nn.Conv2d, nn.ReLU6))]
    assert [type(m).__name__ for m in details] == ["Conv2d", "ReLU6"] + ["Conv2d", "Conv2d", "ReLU6"] * 3
    unit = FusionUnit(4, 4, 4)
    assert [c.dilation for c in unit.low.modules() if isinstance(c, nn.Conv2d)] == [(4, 4), (1, 1)]
    assert sum(isinstance(m, nn.ReLU6) for m in unit.low.modules()) == 1 and not any(isinstance(m, nn.ReLU6) for m in unit.high.modules())


@pytest.mark.parametrize("build", BUILDS)
def test_same_as_the_restatement(build):
    torch.manual_seed(0)
    net = stirred(build(3, width=0.25, pyramid=build is not ContextNet12))
    x, d = torch.rand(2, 3, 128, 192, dtype=torch.float64), net.design
    ratios = [a // b for a, b in zip((d.context, *d.detail), d.detail)]
    with torch.no_grad():
        torch.testing.assert_close(net(x), restated(x, net, d.context, d.detail, ratios, pyramid=build is not ContextNet12))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ["context", "detail"])
@pytest.mark.parametrize("size", [(64, 64), (67, 93)])
def test_a_silent_branch_is_as_if_it_were_not_there(build, name, size):
    "The other may hold anything and gets no gradient; a network built without it gives the same logits"
    net = stirred(build(3, width=0.25))
    alone, x = build(3, width=0.25, branches=(name,)).double().eval(), torch.rand(2, 3, *size, dtype=torch.float64)
    alone.load_state_dict({k: v for k, v in net.state_dict().items() if k in alone.state_dict()})
    both, out = net(x), net.switch(name)(x)
    torch.testing.assert_close(out, alone(x))
    assert not torch.allclose(both, out)
    other = "detail" if name == "context" else "context"
    out.square().sum().backward()
    mine, theirs = getattr(net, name).parameters(), list(getattr(net, other).parameters())
    assert all(p.grad is not None for p in mine) and all(p.grad is None for p in theirs)
    for p in theirs: nn.init.normal_(p, std=9)
    torch.testing.assert_close(net(x), alone(x))
    assert net.switch().on == ("context", "detail")


def test_no_coupling_before_the_sum():
    net = stirred(ContextNet(3, width=0.25))
    x = net.prepare(torch.rand(1, 3, 70, 100, dtype=torch.float64))
    low, (high,) = net.maps(x)
    size, unit = (x.shape[-2] // 8, x.shape[-1] // 8), net.fusions[0]
    a, b = unit.terms(low, high, size)
    torch.testing.assert_close(unit(low, high, size), (a + b).clamp(0, 6))
    torch.testing.assert_close(unit(low, None, size), a.clamp(0, 6))
    torch.testing.assert_close(unit(None, high, size), b.clamp(0, 6))
    a2, b2 = unit.terms(low, 2 * high, size)
    torch.testing.assert_close(a2, a)
    assert not torch.allclose(b2, b)


@pytest.mark.parametrize("build", [ContextNet18, ContextNet, ContextNet12])
def test_the_context_branch_sees_the_resized_image_and_no_more(build):
    net, seen = build(3, width=0.1).eval(), []
    net.context.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    d, x = net.design.context, torch.rand(2, 3, 128, 192)
    net(x)
    cells = x.reshape(2, 3, 128 // d, d, 192 // d, d)
    middle = slice(d // 2 - 1, d // 2 + 1)
    want = (cells[:, :, :, middle, :, middle].mean((3, 5)) - 0.5) / 0.25
    torch.testing.assert_close(seen[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shrink(x, d), cells[:, :, :, middle, :, middle].mean((3, 5)))
    assert shrink(x, 1) is x


def test_depthwise_then_pointwise_is_one_factored_convolution():
    "Without a norm between them: kernel[o, i] = pointwise[o, i] * depthwise[i], a matrix of rank one for every input map"
    depth, point = nn.Conv2d(5, 5, 3, 2, 1, groups=5, bias=False).double(), nn.Conv2d(5, 7, 1, bias=False).double()
    kernel, x = point.weight * depth.weight[:, 0][None], torch.randn(2, 5, 13, 11, dtype=torch.float64)
    torch.testing.assert_close(point(depth(x)), F.conv2d(x, kernel, None, 2, 1))
    assert torch.linalg.matrix_rank(kernel.permute(1, 0, 2, 3).reshape(5, 7, 9)).tolist() == [1] * 5
    assert depth.weight.numel() + point.weight.numel() < kernel.numel()


def test_asymmetric_pair():
    block = bottleneck(8, 8, 2, 6, asymmetric=5)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert [c.kernel_size for c in convs] == [(1, 1), (5, 1), (1, 5), (1, 1)] and [c.stride for c in convs[1:3]] == [(2, 1), (1, 2)]
    assert block(torch.rand(2, 8, 11, 13)).shape == bottleneck(8, 8, 2, 6)(torch.rand(2, 8, 11, 13)).shape == (2, 8, 6, 7)
    with torch.device("meta"): plain, net = ContextBranch(3), ContextBranch(3, asymmetric=7)
    wide = sum(b.conv[0][0].out_channels for b in plain.blocks)
    assert folded_parameters(net) - folded_parameters(plain) == wide * (14 - 9 + 1)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("size", [(64, 64), (65, 131), (127, 90), (200, 71)])
def test_odd_sizes(build, size):
    net = build(4, width=0.1, aux=True).eval()
    with torch.no_grad(): logits, (aux,) = net.forward_aux(torch.rand(1, 3, *size))
    assert logits.shape == aux.shape == (1, 4, *size) and net.stride == 8 * net.design.context


def test_padding_is_a_mirror():
    net, x = ContextNet(2, width=0.1).eval(), torch.rand(1, 3, 70, 90)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 6, 0, 26), mode="reflect"))[..., :70, :90])


@pytest.mark.parametrize("options", [dict(aux=True), dict(pyramid=False, asymmetric=7), dict(branches=("context",), aux=True), dict(branches="detail")])
def test_contract(options): check_segmenter(lambda: ContextNet(5, width=0.25, dropout=0.0, **options))


@pytest.mark.parametrize("build", [ContextNet12, ContextNet18, ContextNet124])
def test_contract_of_variants(build): check_segmenter(lambda: build(5, width=0.125, dropout=0.0))


def test_a_batch_of_one_on_one_cell():
    net, x = ContextNet18(3, width=0.1).train(), torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="batches of two or more"): net(x)
    assert net(x.repeat(2, 1, 1, 1)).shape == (2, 3, 64, 64) and net(torch.rand(1, 3, 65, 64)).shape == (1, 3, 65, 64)
    assert net.eval()(x).isfinite().all()


def test_auxiliary_head_reads_the_context_alone():
    net = stirred(ContextNet(3, width=0.25, aux=True))
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    logits, (aux,) = net.forward_aux(x)
    aux.square().sum().backward()
    assert all(p.grad is None for p in [*net.detail.parameters(), *net.fusions.parameters(), *net.head.parameters()])
    assert all(p.grad is not None for p in [*net.context.parameters(), *net.aux_head.parameters()])
    torch.testing.assert_close(logits, net(x))
    assert ContextNet(3, width=0.1).forward_aux(x.float())[1] == [] and net.switch("detail").forward_aux(x)[1] == []


@pytest.mark.parametrize("options, says", [
    (dict(width=0), "width is 0"), (dict(width="1"), "width is '1'"), (dict(width=True), "width is True"), (dict(width=float("inf")), "above 0"),
    (dict(branches=()), "context, detail"), (dict(branches=("contxt",)), "context, detail"), (dict(aux=True, branches=("detail",)), "reads the context"),
    (dict(asymmetric=4), "odd"), (dict(num_classes=0), "num_classes"), (dict(dropout=2), "dropout")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): ContextNet(**{"num_classes": 5, "width": 0.1, **options})


def test_refuses_switches():
    net = ContextNet(3, width=0.1, branches=("context",))
    for names in [("detail",), ("other",)]:
        with pytest.raises(ValueError, match="branches"): net.switch(*names)
    assert net.on == ("context",)


def test_branches_are_in_the_checkpoint(tmp_path):
    net = create_model("contextnet_cn12", 3, width=0.1, branches=("detail",)).eval()
    again, x = load_model(save_model(net, tmp_path / "c.safetensors")), torch.rand(1, 3, 64, 64)
    assert again.branches == ("detail",) and torch.equal(again(x), net(x))


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = ContextNet(3, width=0.25, aux=True, dropout=0.0)
    y = torch.randint(3, (2, 2, 3)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    x = (F.one_hot(y, 3).movedim(-1, 1) + torch.rand(2, 3, 64, 96)) / 2
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(30):
        logits, (aux,) = net.forward_aux(x)
        loss = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(aux, y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
