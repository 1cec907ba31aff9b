"Upsampling: transposes, interpolation as a layer, phase sums, the artefact measure and the cures"
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from synseg.conv import conv_matrix, output_size, transposed_size
from synseg.upsample import (
    ResizeConv, SubPixel, artefact_energy, bed_of_nails, bilinear_init_, bilinear_kernel, bilinear_upsampler, icnr_,
    max_pool_with_indices, phase_sums, unpool)

close = torch.testing.assert_close


def random_case(seed):
    "Size, kernel, stride, padding, dilation (each a pair, axes unlike) and groups of a random convolution"
    rng = random.Random(seed)
    k, s, d = (tuple(rng.randint(1, n) for _ in range(2)) for n in (5, 4, 3))
    p = tuple(rng.randint(0, d[i]*(k[i] - 1)) for i in range(2))
    n = tuple(d[i]*(k[i] - 1) + s[i] + rng.randint(0, 8) for i in range(2))
    return n, k, s, p, d, rng.choice((1, 1, 2, 3))


@pytest.mark.parametrize("seed", range(60))
def test_transposed_convolution_is_the_adjoint(seed):
    n, k, s, p, d, g = random_case(seed)
    torch.manual_seed(seed)
    weight = torch.randn(2*g, 3, *k, dtype=torch.float64)
    x = torch.randn(2, 3*g, *n, dtype=torch.float64)
    hx = F.conv2d(x, weight, None, s, p, d, g)
    assert tuple(hx.shape[-2:]) == tuple(output_size(n, k, s, p, d))
    y = torch.randn_like(hx)
    plain = transposed_size(tuple(hx.shape[-2:]), k, s, p, d)
    extra = tuple(a - b for a, b in zip(n, plain))
    hty = F.conv_transpose2d(y, weight, None, s, p, extra, g, d)
    assert tuple(hty.shape[-2:]) == n == tuple(transposed_size(tuple(hx.shape[-2:]), k, s, p, d, extra))
    close((hx*y).sum(), (x*hty).sum(), rtol=1e-9, atol=1e-9)
    matrix = conv_matrix(weight, n, s, p, d, g)
    close((matrix.t()@y[0].flatten()).view_as(x[0]), hty[0], rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    close(torch.autograd.grad(F.conv2d(x, weight, None, s, p, d, g), x, y)[0], hty, rtol=1e-9, atol=1e-9)


def test_the_survey_s_example_in_numbers():
    "3x3 image, 2x2 kernel: each entry of H^T z as the sum of products written out by hand"
    (k11, k12), (k21, k22) = k = torch.tensor([[2., -1.], [.5, 3.]])
    (z11, z12), (z21, z22) = z = torch.tensor([[1., 4.], [-2., 5.]])
    want = torch.stack([k11*z11, k12*z11 + k11*z12, k12*z12,
                        k21*z11 + k11*z21, k22*z11 + k21*z12 + k12*z21 + k11*z22, k22*z12 + k12*z22,
                        k21*z21, k22*z21 + k21*z22, k22*z22]).view(3, 3)
    close(F.conv_transpose2d(z[None, None], k[None, None])[0, 0], want)
    close((conv_matrix(k, 3).to_dense().T@z.flatten()).view(3, 3), want)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_bed_of_nails(stride):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    up = bed_of_nails(x, stride)
    assert up.shape == (2, 3, 5*stride, 7*stride)
    close(up[..., ::stride, ::stride], x)
    close(up.abs().sum(), x.abs().sum())
    wide = torch.randn_like(up)
    close((up*wide).sum(), (x*wide[..., ::stride, ::stride]).sum())
    assert gradcheck(lambda v: bed_of_nails(v, stride), x[:1, :1, :2, :3])


@pytest.mark.parametrize("kernel,stride", [((3, 2), 2), ((4, 3), 3), ((2, 5), 2)])
def test_transposed_is_nails_then_the_turned_kernel(kernel, stride):
    x, w = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(3, 2, *kernel, dtype=torch.float64)
    nails = bed_of_nails(x, stride)[..., :1 - stride, :1 - stride]
    kh, kw = kernel
    got = F.conv2d(F.pad(nails, (kw - 1, kw - 1, kh - 1, kh - 1)), w.flip(2, 3).transpose(0, 1))
    close(got, F.conv_transpose2d(x, w, stride=stride), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (45, 60), (3, 4)])
@pytest.mark.parametrize("kernel,stride", [(2, None), (3, None), (3, 2)])
def test_unpooling_is_the_transpose_of_the_choice(size, kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    pooled, at = max_pool_with_indices(x, kernel, stride)
    assert pooled.shape == at.shape and at.dtype == torch.int64
    y = torch.randn_like(pooled)
    up = unpool(y, at, size)
    assert up.shape == x.shape
    close((pooled*y).sum(), (x*up).sum(), rtol=1e-9, atol=1e-9)
    close(torch.autograd.grad(pooled, x, y)[0], up, rtol=1e-9, atol=1e-9)


def test_unpooling_as_pytorch_and_back():
    x = torch.rand(2, 3, 7, 9) + .1
    pooled, at = max_pool_with_indices(x)
    close(unpool(pooled, at, (7, 9)), F.max_unpool2d(pooled, at, 2, output_size=(7, 9)))
    close(F.max_pool2d(unpool(pooled, at, (7, 9)), 2, ceil_mode=True), pooled)
    assert unpool(pooled, at, (7, 9)).count_nonzero() == pooled.numel()
    assert max_pool_with_indices(x, ceil_mode=False)[0].shape[-2:] == (3, 4)


def test_unpool_has_gradients():
    _, at = max_pool_with_indices(torch.randn(1, 2, 5, 6))
    y = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: unpool(v, at, (5, 6)), y)


@pytest.mark.parametrize("factor", range(1, 10))
@pytest.mark.parametrize("groups", [1, 3])
def test_bilinear_layer_interpolates(factor, groups):
    torch.manual_seed(factor)
    x, f = torch.randn(2, 3, 5, 4), factor
    up = bilinear_upsampler(3, f, groups)
    want = F.interpolate(x, scale_factor=f, mode="bilinear", align_corners=False)
    got, edge = up(x), f//2
    assert got.shape == want.shape
    inside = (..., slice(edge, 5*f - edge), slice(edge, 4*f - edge))
    close(got[inside], want[inside], rtol=1e-5, atol=1e-5)
    close(up(F.pad(x, (1, 1, 1, 1), mode="replicate"))[..., f:-f, f:-f], want, rtol=1e-5, atol=1e-5)
    if f > 1: assert (got - want).abs().amax() > .01  # zeros outside: at the borders they differ
    assert up.weight.requires_grad and up.weight.count_nonzero() == 3*len(bilinear_kernel(f))**2


@pytest.mark.parametrize("factor", range(1, 17))
def test_bilinear_kernel(factor):
    k = bilinear_kernel(factor)
    assert k.shape == (2*factor - factor % 2,)*2 and k.dtype == torch.float32
    close(k, k.T)
    close(k, k.flip(0))
    close(phase_sums(k, factor), torch.ones(factor, factor), rtol=1e-5, atol=1e-5)


def test_bilinear_init_of_a_given_layer():
    "FCN's last layer: kernel 64, stride 32, no padding, half precision as well; groups in pairs"
    layer = bilinear_init_(nn.ConvTranspose2d(21, 21, 64, 32, bias=False))
    close(layer.weight[3, 3], bilinear_kernel(32))
    assert layer.weight[3, 4].count_nonzero() == 0
    pairs = bilinear_init_(nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=3, dtype=torch.float64))
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    close(pairs(x).float(), bilinear_upsampler(6, 2)(x.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (4, 6), (5, 2), (7, 8)])
def test_phase_sums_are_what_a_flat_input_becomes(kernel, stride):
    torch.manual_seed(0)
    k = torch.randn(3, *kernel, dtype=torch.float64)
    sums = phase_sums(k, stride)
    assert sums.shape == (3, stride, stride)
    close(sums.sum((1, 2)), k.sum((1, 2)))
    n = 16
    flat = F.conv_transpose2d(torch.ones(1, 1, n, n, dtype=torch.float64), k[None], stride=stride)[0]
    middle = 8*stride
    close(flat[:, middle:middle + 2*stride, middle:middle + 2*stride], sums.repeat(1, 2, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", range(1, 6))
def test_even_kernels_are_flat_where_the_stride_divides_them(stride):
    flat = [k for k in range(1, 16) if phase_sums(torch.ones(k, k), stride).unique().numel() == 1]
    assert flat == [k for k in range(1, 16) if k % stride == 0]


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (67, 101)])
def test_artefact_energy_of_patterns(stride, size):
    torch.manual_seed(stride)
    tile = torch.randn(5, stride, stride)
    pattern = tile.repeat(1, -(-size[0]//stride), -(-size[1]//stride))[:, :size[0], :size[1]]
    got = artefact_energy(pattern + 3, stride)
    assert got.shape == (5,)
    close(got, torch.ones(5), rtol=0, atol=1e-3)
    for scale in (-7, 1e25, 1e-25):  # neither scale nor mean matters, and no square overflows
        close(artefact_energy(scale*pattern, stride), got, rtol=1e-3, atol=2e-3)
    assert (artefact_energy(pattern, 5 if stride != 5 else 7) < .5).all()  # another period is another pattern


def test_artefact_energy_of_what_is_no_pattern():
    torch.manual_seed(0)
    slope = torch.linspace(0, 1, 64)[:, None]*torch.ones(80) + torch.linspace(0, 2, 80)
    assert artefact_energy(slope, 2) < 1e-5
    assert artefact_energy(torch.full((2, 3, 40, 40), 123.4), 2).tolist() == [[0.0]*3]*2
    assert artefact_energy(torch.zeros(40, 40), 2) == 0
    noise = torch.randn(300, 64, 80)
    for stride in (2, 4):
        close(artefact_energy(noise, stride).mean().item(), 9*(stride**2 - 1)/(64*80), rtol=.06, atol=0)
    board = (torch.arange(64)[:, None] + torch.arange(80)) % 2*2. - 1
    close(artefact_energy(noise + board, 2).mean().item(), .5, rtol=.03, atol=0)
    close(artefact_energy(noise + 3*board, 2).mean().item(), .9, rtol=.03, atol=0)


def test_artefact_energy_follows_type_and_gradient():
    x = torch.randn(2, 32, 32, dtype=torch.float64, requires_grad=True)
    energy = artefact_energy(x, 2)
    assert energy.dtype == torch.float64
    energy.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    half = artefact_energy(x.detach().bfloat16(), 2)
    assert half.dtype == torch.float32
    close(half.double(), energy.detach(), rtol=.1, atol=.01)


@pytest.mark.parametrize("factor,kernel", [(2, 3), (3, 5), (4, 1)])
def test_cures_have_the_promised_shape(factor, kernel):
    x = torch.randn(2, 3, 5, 7)
    for layer in (ResizeConv(3, 4, kernel, factor), ResizeConv(3, 4, kernel, factor, "bilinear"),
                  SubPixel(3, 4, kernel, factor), SubPixel(3, 4, kernel, factor, icnr=False, bias=False)):
        out = layer(x)
        assert out.shape == (2, 4, 5*factor, 7*factor)
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resize_convolution_keeps_a_flat_input_flat_whatever_it_learns(mode):
    torch.manual_seed(0)
    for _ in range(5):
        layer = ResizeConv(3, 4, 5, 3, mode)
        with torch.no_grad(): out = layer(torch.randn(1, 3, 1, 1).expand(1, 3, 8, 8))[..., 2:-2, 2:-2]
        close(out, out[..., :1, :1].expand_as(out), rtol=1e-4, atol=1e-5)


def test_resize_convolution_is_a_transposed_one_with_tied_weights():
    torch.manual_seed(0)
    layer, x = ResizeConv(3, 4).double(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    turned = layer.conv.weight.flip(2, 3)
    tied = sum(F.pad(turned, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)).transpose(0, 1)
    close(layer(x), F.conv_transpose2d(x, tied, layer.conv.bias, stride=2, padding=1), rtol=1e-9, atol=1e-9)
    sums = phase_sums(tied, 2)
    close(sums, sums[..., :1, :1].expand_as(sums), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor,kernel", [(2, 3), (3, 3), (2, 5)])
def test_icnr_starts_as_nearest(factor, kernel):
    torch.manual_seed(0)
    layer, x = SubPixel(3, 4, kernel, factor), torch.randn(2, 3, 6, 5)
    small = F.conv2d(x, layer.conv.weight[::factor**2], padding=kernel//2)
    close(layer(x), F.interpolate(small, scale_factor=factor), rtol=1e-5, atol=1e-5)
    assert layer.conv.weight[0].std() > 0 and not torch.equal(layer.conv.weight[0], layer.conv.weight[factor**2])


def test_icnr_takes_any_initialisation_and_type():
    weight = torch.empty(8, 3, 1, 1, dtype=torch.float64)
    assert icnr_(weight, 2, init=lambda w: nn.init.constant_(w, .25)) is weight
    close(weight, torch.full_like(weight, .25))


def test_what_the_chapter_says_of_random_layers():
    "With weights as PyTorch draws them, transposed and plain sub-pixel layers show the pattern; resize and ICNR hardly"
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(1, 8, 8, 8), size=(32, 32), mode="bilinear")
    makers = dict(t3=lambda: nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), t4=lambda: nn.ConvTranspose2d(8, 4, 4, 2, 1),
                  plain=lambda: SubPixel(8, 4, icnr=False), icnr=lambda: SubPixel(8, 4), resize=lambda: ResizeConv(8, 4))
    with torch.no_grad():
        share = {name: torch.cat([artefact_energy(make()(x)[..., 4:-4, 4:-4], 2) for _ in range(10)]).median().item()
                 for name, make in makers.items()}
    assert min(share["t3"], share["t4"], share["plain"]) > 20*max(share["icnr"], share["resize"])


@pytest.mark.parametrize("call,words", [
    (lambda: bed_of_nails(torch.ones(2, 2), 0), "expected 1 or more"),
    (lambda: bilinear_kernel(0), "from 1 up"),
    (lambda: phase_sums(torch.ones(3, 3), 0), "expected 1 or more"),
    (lambda: artefact_energy(torch.ones(40, 40), 1), "period of 2 pixels or more"),
    (lambda: artefact_energy(torch.ones(40, 7), 2), "expected 8 or more"),
    (lambda: ResizeConv(3, 3, mode="cubic"), "choose 'nearest' or 'bilinear'"),
    (lambda: ResizeConv(3, 3, kernel=2), "odd"),
    (lambda: SubPixel(3, 3, kernel=4), "odd"),
    (lambda: icnr_(torch.ones(6, 1, 1, 1), 2), "multiple of 2^2 = 4"),
    (lambda: bilinear_init_(nn.ConvTranspose2d(3, 3, 3, 2)), "expected kernel 4 for stride 2"),
    (lambda: bilinear_init_(nn.ConvTranspose2d(3, 3, 4, (2, 1))), "expected kernel 4"),
    (lambda: bilinear_init_(nn.ConvTranspose2d(3, 6, 4, 2)), "3 channels in, 6 out"),
    (lambda: unpool(torch.ones(1, 2, 3, 3), torch.zeros(1, 1, 3, 3).long(), (6, 6)), "as many channels"),
    (lambda: unpool(torch.ones(1, 1, 3, 3), torch.full((1, 1, 3, 3), 36), (6, 6)), "pass the size before pooling"),
])
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError) as error: call()
    assert words in str(error.value)
