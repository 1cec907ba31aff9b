"Bricks: torchvision's numbers with torchvision's weights, sizes, counts, identities, and what is refused"
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from synseg.blocks import (ASPP, Bottleneck, ConvNormAct, DenseBlock, DenseLayer, InvertedResidual, PooledBranch, PyramidPooling,
                           Residual, SeparableConv, SqueezeExcite, pyramid_sum, same_padding)

CLOSE = dict(rtol=1e-4, atol=1e-5)
SIZES = [(7, 7), (9, 14), (16, 5)]


def shaken(model, seed=0):
    "Random norms and no dropout, so that swapped or missing parts show"
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -1, 1)
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def same_as(theirs, ours, channels, by_name=True):
    state = shaken(theirs).state_dict()
    ours.load_state_dict(state if by_name else dict(zip(ours.state_dict(), state.values(), strict=True)))
    for size in SIZES:
        for mode in (False, True):
            x = torch.randn(2, channels, *size)
            assert_close(ours.train(mode)(x), theirs.train(mode)(x), **CLOSE)
    x = torch.randn(2, channels, *SIZES[1])
    gradient = {}
    for which, model in (("ours", ours), ("theirs", theirs)):
        y = x.clone().requires_grad_()
        model(y).square().mean().backward()
        gradient[which] = y.grad
    assert_close(gradient["ours"], gradient["theirs"], **CLOSE)
    if by_name:
        assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)  # running statistics too


def weights(model):
    return sum(p.numel() for p in model.parameters() if p.ndim == 4)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def shortcut(c_in, c_out, stride):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


# torchvision

@pytest.mark.parametrize("options", [dict(), dict(stride=2), dict(dilation=3), dict(groups=3), dict(kernel_size=(3, 1)), dict(kernel_size=1),
                                     dict(norm_layer=None), dict(activation_layer=None), dict(activation_layer=nn.ReLU6)])
def test_conv_norm_act_is_torchvisions(options):
    from torchvision.ops import Conv2dNormActivation
    rename = dict(kernel_size="kernel", norm_layer="norm", activation_layer="act")
    ours = ConvNormAct(6, 9, **{rename.get(k, k): v for k, v in options.items()})
    same_as(Conv2dNormActivation(6, 9, **options), ours, 6)


@pytest.mark.parametrize("c_in,c_out,stride", [(8, 8, 1), (8, 12, 1), (8, 12, 2), (8, 8, 2), (3, 5, 3)])
def test_residual_is_torchvisions_basic_block(c_in, c_out, stride):
    from torchvision.models.resnet import BasicBlock
    down = shortcut(c_in, c_out, stride) if stride > 1 or c_in != c_out else None
    same_as(BasicBlock(c_in, c_out, stride, down), Residual(c_in, c_out, stride), c_in)


@pytest.mark.parametrize("c_in,c_out,stride,dilation", [(8, 8, 1, 1), (8, 24, 2, 1), (8, 24, 1, 2), (16, 16, 1, 4), (12, 8, 2, 2)])
def test_bottleneck_is_torchvisions(c_in, c_out, stride, dilation):
    from torchvision.models.resnet import Bottleneck as Theirs
    down = shortcut(c_in, c_out, stride) if stride > 1 or c_in != c_out else None
    same_as(Theirs(c_in, c_out // 4, stride, down, dilation=dilation), Bottleneck(c_in, c_out, stride, dilation), c_in)


def test_bricks_take_the_weights_of_a_whole_resnet():
    from torchvision.models import resnet18, resnet50
    torch.manual_seed(0)
    for net, build, widths in [(resnet18(), Residual, [64, 128, 256, 512]), (resnet50(), Bottleneck, [256, 512, 1024, 2048])]:
        c_in = 64
        for i, width in enumerate(widths, 1):
            theirs = getattr(net, f"layer{i}")
            ours = nn.Sequential(*(build(c_in if j == 0 else width, width, 2 if i > 1 and j == 0 else 1) for j in range(len(theirs))))
            ours.load_state_dict(theirs.state_dict())
            c_in = width
        x = torch.randn(1, widths[2], 6, 5)
        assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expansion", [1, 4, 6])
@pytest.mark.parametrize("c_out", [8, 5])
def test_inverted_residual_is_torchvisions(stride, expansion, c_out):
    from torchvision.models.mobilenetv2 import InvertedResidual as Theirs
    same_as(Theirs(8, c_out, stride, expansion), InvertedResidual(8, c_out, stride, expansion), 8)


def test_inverted_residuals_make_the_whole_mobilenet():
    from torchvision.models import mobilenet_v2
    net, c_in, layers = mobilenet_v2().features, 32, []
    for t, c, n, s in [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]:
        for i in range(n):
            layers.append(InvertedResidual(c_in, c, s if i == 0 else 1, t))
            c_in = c
    ours = nn.Sequential(ConvNormAct(3, 32, stride=2, act=nn.ReLU6), *layers, ConvNormAct(320, 1280, 1, act=nn.ReLU6))
    ours.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 65, 47)
    assert_close(ours.eval()(x), net.eval()(x), **CLOSE)


@pytest.mark.parametrize("channels,reduction", [(32, 16), (32, 4), (5, 16), (7, 2)])
def test_squeeze_excite_is_torchvisions(channels, reduction):
    from torchvision.ops import SqueezeExcitation
    same_as(SqueezeExcitation(channels, max(channels // reduction, 1)), SqueezeExcite(channels, reduction), channels)


@pytest.mark.parametrize("layers,growth", [(1, 4), (4, 5)])
def test_dense_block_is_torchvisions(layers, growth):
    from torchvision.models.densenet import _DenseBlock
    ours = DenseBlock(7, layers, growth, bottleneck=4, dropout=0.0, bias=False)
    same_as(_DenseBlock(layers, 7, 4, growth, 0.0), ours, 7, by_name=False)


def test_aspp_is_torchvisions():
    from torchvision.models.segmentation.deeplabv3 import ASPP as Theirs
    same_as(Theirs(10, (2, 3, 5), 8), ASPP(10, 8, (2, 3, 5)), 10)
    assert parameters(ASPP(2048)) == parameters(Theirs(2048, (6, 12, 18)))


def test_pooled_branch_is_torchvisions_image_pooling():
    from torchvision.models.segmentation.deeplabv3 import ASPPPooling
    same_as(ASPPPooling(6, 4), PooledBranch(6, 4), 6)


# sizes

@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 1), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_sizes_are_divided_by_the_stride_and_rounded_up(kernel, stride, dilation):
    for make in (ConvNormAct, SeparableConv):
        for size in SIZES:
            out = make(3, 4, kernel, stride, dilation)(torch.randn(2, 3, *size))
            assert out.shape == (2, 4, *(math.ceil(n / stride) for n in size))


@pytest.mark.parametrize("make", [
    lambda s, d: Residual(8, 12, s, d), lambda s, d: Bottleneck(8, 12, s, d), lambda s, d: Bottleneck(8, 12, s, d, stride_first=True),
    lambda s, d: InvertedResidual(8, 12, s, dilation=d)])
@pytest.mark.parametrize("stride,dilation", [(1, 1), (2, 1), (1, 4), (2, 2), (3, 1)])
def test_blocks_divide_sizes_as_well(make, stride, dilation):
    for size in SIZES:
        assert make(stride, dilation)(torch.randn(2, 8, *size)).shape == (2, 12, *(math.ceil(n / stride) for n in size))


@pytest.mark.parametrize("make", [
    lambda: ConvNormAct(8, 6), lambda: SeparableConv(8, 6), lambda: Residual(8, 6), lambda: Bottleneck(8, 16),
    lambda: InvertedResidual(8, 6), lambda: DenseBlock(8, 3), lambda: DenseBlock(8, 3, keep_input=False), lambda: SqueezeExcite(8, 1),
    lambda: PooledBranch(8, 3, 2), lambda: PyramidPooling(8), lambda: PyramidPooling(8, 5, (1, 4)), lambda: ASPP(8, 6),
    lambda: ASPP(8, 6, (), conv=SeparableConv)])
def test_every_block_says_its_width_and_uses_every_parameter(make):
    torch.manual_seed(0)
    block = make()
    out = shaken(block)(torch.randn(3, 8, 13, 9))
    assert out.shape == (3, block.out_channels, 13, 9)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_same_padding():
    assert same_padding(1) == (0, 0) and same_padding(7, 3) == (9, 9) and same_padding((3, 5), (2, 1)) == (2, 2)


# identities

def test_a_bias_before_a_norm_is_left_out_and_there_without():
    assert ConvNormAct(3, 4)[0].bias is None and ConvNormAct(3, 4, norm=None)[0].bias is not None
    for block in (Residual(4, 8), Bottleneck(4, 8), InvertedResidual(4, 8), ASPP(4, 8), PyramidPooling(4, 8), SeparableConv(4, 8)):
        assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))


def test_separable_is_a_full_convolution_with_weights_that_are_products():
    torch.manual_seed(0)
    pair = SeparableConv(5, 7, (3, 5), 2, 2, norm=None, act=None)
    (d, around), (m, offset) = ((p.weight, p.bias) for p in (pair[0][0], pair[1][0]))
    full = torch.einsum("oi,iyx->oiyx", m[:, :, 0, 0], d[:, 0])
    x = torch.randn(2, 5, 13, 18)
    assert_close(pair(x), F.conv2d(x, full, m[:, :, 0, 0] @ around + offset, 2, (2, 4), 2), **CLOSE)
    assert sum(isinstance(m, nn.ReLU) for m in SeparableConv(5, 7).modules()) == 1
    assert sum(isinstance(m, nn.ReLU) for m in SeparableConv(5, 7, inner=nn.ReLU).modules()) == 2


@pytest.mark.parametrize("make,last", [(Residual, "bn2"), (Bottleneck, "bn3")])
def test_with_a_silent_branch_the_input_passes(make, last):
    block = make(8, 8)
    nn.init.zeros_(getattr(block, last).weight)
    x = torch.randn(2, 8, 9, 7)
    assert torch.equal(block(x), x.relu())


def test_the_linear_bottleneck_is_linear_and_the_sum_is_not_rectified():
    block = InvertedResidual(8, 8)
    nn.init.zeros_(block.conv[-1].weight)
    x = torch.randn(2, 8, 9, 7)
    assert torch.equal(block(x), x)
    assert isinstance(block.conv[-1], nn.BatchNorm2d) and not InvertedResidual(8, 8, 2).adds and not InvertedResidual(8, 9).adds


@pytest.mark.parametrize("pair", [
    lambda d: [Residual(6, 8, 1 if d else 2, (1, 2) if d else 1), Residual(8, 8, 1, 2 if d else 1)],
    lambda d: [Bottleneck(6, 8, 1 if d else 2, 1), Bottleneck(8, 8, 1, 2 if d else 1)],
    lambda d: [Bottleneck(6, 8, 1 if d else 2, 2 if d else 1, stride_first=True), Bottleneck(8, 8, 1, 2 if d else 1)],
    lambda d: [InvertedResidual(6, 8, 1 if d else 2), InvertedResidual(8, 8, dilation=2 if d else 1)]])
@pytest.mark.parametrize("size", [(16, 20), (21, 34), (15, 15)])
def test_a_stage_without_its_stride_holds_the_strided_one(pair, size):
    coarse, fine = (shaken(nn.Sequential(*pair(d))).eval() for d in (False, True))
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(2, 6, *size)
    assert_close(fine(x)[..., ::2, ::2], coarse(x), **CLOSE)


def test_dense_block_keeps_its_input_and_new_maps_alone():
    torch.manual_seed(0)
    block = DenseBlock(5, 3, 4).eval()
    x = torch.randn(2, 5, 9, 7)
    whole = block(x)
    block.keep_input = False
    assert torch.equal(whole[:, :5], x) and torch.equal(whole[:, 5:], block(x))


def test_dense_layers_read_all_that_was_made_before():
    block = DenseBlock(5, 4, 3)
    assert [layer[0].num_features for layer in block] == [5, 8, 11, 14]
    assert isinstance(block[0][-1], nn.Dropout) and block[0][-1].p == 0.2 and block[0][2].bias is not None


@pytest.mark.parametrize("layers,growth,want", [((4,) * 11, 12, 1376795), ((4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4), 16, 9322091)])
def test_dense_blocks_make_fc_densenet(layers, growth, want):
    "The parameter counts of FC-DenseNet56 and 103 (11 classes), from these blocks and the transitions of the paper's table 1"
    total, width, skips = 48 * 28, 48, []
    for n in layers[:5]:
        block = DenseBlock(width, n, growth)
        width = block.out_channels
        skips.append(width)
        total += parameters(block) + 2 * width + width * width + width
    block = DenseBlock(width, layers[5], growth, keep_input=False)
    total += parameters(block)
    for n, skip in zip(layers[6:], reversed(skips)):
        new = block.out_channels
        total += new * new * 9 + new
        block = DenseBlock(new + skip, n, growth, keep_input=False)
        total += parameters(block)
    assert total + (new + skip + block.out_channels) * 11 + 11 == want


def test_the_gate_knows_what_and_not_where():
    torch.manual_seed(0)
    block, x, order = SqueezeExcite(12, 3), torch.randn(2, 12, 6, 7), torch.randperm(42)
    move = lambda v: v.flatten(2)[..., order].view_as(v)  # noqa: E731
    assert_close(block(move(x)), move(block(x)), **CLOSE)
    gate = block.gate(x)
    assert gate.shape == (2, 12, 1, 1) and 0 < gate.min() and gate.max() < 1
    assert_close(block(x[:1]), block(x)[:1], **CLOSE)


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (12, 18), (3, 5)])
@pytest.mark.parametrize("corners", [True, False])
def test_pyramid_levels_by_hand(size, corners):
    torch.manual_seed(0)
    bins = (1, 2, 3, 6)
    block = PyramidPooling(4, 3, bins, corners, norm=None)
    x, (h, w) = torch.randn(2, 4, *size), size
    levels = [x]
    for b, level in zip(bins, block.levels):
        cell = torch.stack([torch.stack([x[..., i*h//b:-(-(i+1)*h//b), j*w//b:-(-(j+1)*w//b)].mean((-2, -1)) for j in range(b)], -1)
                            for i in range(b)], -2)
        small = torch.einsum("oc,nchw->nohw", level[1].weight[:, :, 0, 0], cell) + level[1].bias[:, None, None]
        levels.append(F.interpolate(small.relu(), size, mode="bilinear", align_corners=corners))
    assert_close(block(x), torch.cat(levels, 1), **CLOSE)
    assert block.out_channels == 4 + 4 * 3


def test_pyramid_sum():
    x = torch.randn(2, 3, 8, 12)
    assert_close(pyramid_sum(x, (1,)), x + x.mean((2, 3), keepdim=True), **CLOSE)
    flat = torch.full((1, 2, 7, 9), 3.0)
    assert_close(pyramid_sum(flat), 5 * flat, **CLOSE)


def test_separable_aspp_is_lighter_and_keeps_its_rates():
    block = ASPP(64, 16, (3, 5), conv=SeparableConv)
    assert parameters(block) < parameters(ASPP(64, 16, (3, 5)))
    assert [m.dilation[0] for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] == [3, 5]


# counts

def test_counts_by_formula():
    assert weights(Residual(64, 64)) == 2 * 64 * 64 * 9
    assert weights(Bottleneck(256, 256)) == 69632
    for c, t, out in [(24, 6, 24), (32, 6, 48), (96, 4, 17)]:
        assert parameters(InvertedResidual(c, out, 1, t)) == c*t*c + 9*t*c + t*c*out + 4*t*c + 2*out
    extra = parameters(InvertedResidual(32, 32, 1, 1, always_expand=True)) - parameters(InvertedResidual(32, 32, 1, 1))
    assert extra == 32 * 32 + 2 * 32 == 1088
    assert parameters(SqueezeExcite(256)) == 2 * 256 * 16 + 256 + 16
    assert PyramidPooling(2048).out_channels == 4096


# training with one image, frozen norms, other norms

@pytest.mark.parametrize("block", [PyramidPooling(8), ASPP(8, 4, (2,)), PooledBranch(8, 4)], ids=lambda b: type(b).__name__)
def test_one_image_in_training_is_explained(block):
    x = torch.randn(1, 8, 9, 7)
    with pytest.raises(ValueError, match="batches of two or more"):
        block.train()(x)
    assert block.eval()(x).isfinite().all()
    block.train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert block(x).isfinite().all()


def test_one_image_trains_where_bins_are_many_or_norms_look_at_one_image():
    x = torch.randn(1, 8, 9, 7)
    assert PyramidPooling(8, bins=(2, 3)).train()(x).isfinite().all()
    groups = lambda c: nn.GroupNorm(2, c)  # noqa: E731
    assert ASPP(8, 4, (2,), norm=groups).train()(x).isfinite().all()
    assert Residual(8, 8, norm=groups).train()(x).isfinite().all()


def test_inputs_are_not_overwritten():
    torch.manual_seed(0)
    for block in (ConvNormAct(8, 8), Residual(8, 8), Bottleneck(8, 8), InvertedResidual(8, 8), DenseBlock(8, 2), DenseLayer(8, 3, norm=nn.Identity),
                  SqueezeExcite(8), PyramidPooling(8), ASPP(8, 8)):
        x = torch.randn(2, 8, 9, 7)
        kept = x.clone()
        block(x)
        assert torch.equal(x, kept), type(block).__name__


@pytest.mark.parametrize("make", [lambda: Residual(2, 3, 2), lambda: InvertedResidual(2, 2, act=nn.Softplus), lambda: SqueezeExcite(4, 2),
                                  lambda: PyramidPooling(2, 1, (1, 2)), lambda: ASPP(2, 2, (1, 2))])
def test_gradients(make):
    torch.manual_seed(0)
    block = shaken(make()).double().eval()
    c = next(p.shape[1] for p in block.parameters() if p.ndim == 4)
    x = torch.randn(2, c, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


# refused

@pytest.mark.parametrize("make,says", [
    (lambda: ConvNormAct(3, 4, 2), "odd"), (lambda: ConvNormAct(3, 4, (3, 4)), "odd"), (lambda: ConvNormAct(6, 4, groups=3), "groups 3"),
    (lambda: ConvNormAct(0, 4), "c_in is 0"), (lambda: ConvNormAct(3, 4.0), "c_out is 4.0"), (lambda: Residual(3, 4, 0), "stride is 0"),
    (lambda: Bottleneck(8, 10), "multiple of expansion=4"), (lambda: InvertedResidual(3, 3, expansion=0), "expansion is 0"),
    (lambda: DenseBlock(3, 0), "layers is 0"), (lambda: DenseBlock(3, 2, 0), "growth is 0"), (lambda: SqueezeExcite(True), "channels is True"),
    (lambda: PyramidPooling(8, bins=()), "no bins"), (lambda: PooledBranch(8, 4, 0), "bins is 0")])
def test_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
