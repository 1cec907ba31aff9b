"Convolution by loops, by a table of windows, as a matrix and by the library; sizes, costs and receptive fields against measurement"
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from synseg.check import count_parameters, receptive_field
from synseg.conv import conv_matrix, multiply_adds, output_size, theoretical_receptive_field, transposed_size

GEOMETRY = [  # size, kernel, stride, padding, dilation, c_in, c_out, groups
    ((7, 9), (3, 3), (1, 1), (0, 0), (1, 1), 1, 1, 1),
    ((7, 9), (3, 2), (2, 1), (1, 0), (1, 2), 2, 4, 1),
    ((11, 8), (3, 3), (2, 2), (1, 1), (2, 2), 4, 6, 2),
    ((6, 5), (1, 4), (1, 1), (0, 3), (1, 1), 1, 3, 1),
    ((5, 5), (5, 5), (3, 3), (2, 2), (1, 1), 3, 3, 3),
    ((13, 10), (2, 5), (1, 4), (2, 1), (3, 1), 2, 2, 1),
    ((4, 4), (1, 1), (3, 3), (0, 0), (1, 1), 3, 5, 1),
]


def problem(size, kernel, c_in, c_out, groups, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(c_out, c_in // groups, *kernel, generator=g, dtype=torch.float64)
    return torch.randn(c_in, *size, generator=g, dtype=torch.float64), weight


def loops(x, weight, stride, padding, dilation, groups):
    "The definition: (c_in, H, W), (c_out, c_in/groups, kh, kw) -> (c_out, h, w)"
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    c_out, share, kh, kw = weight.shape
    span = [d * (k - 1) + 1 for d, k in zip(dilation, (kh, kw))]
    h, w = ((n - m) // s + 1 for n, m, s in zip(x.shape[1:], span, stride))
    out = torch.zeros(c_out, h, w, dtype=x.dtype)
    for o, i, j in itertools.product(range(c_out), range(h), range(w)):
        first = o // (c_out // groups) * share
        window = x[first:first + share, i * stride[0]:i * stride[0] + span[0]:dilation[0], j * stride[1]:j * stride[1] + span[1]:dilation[1]]
        out[o, i, j] = (window * weight[o]).sum()
    return out


@pytest.mark.parametrize("size, kernel, stride, padding, dilation, c_in, c_out, groups", GEOMETRY)
def test_loops_windows_matrix_and_library_agree(size, kernel, stride, padding, dilation, c_in, c_out, groups):
    x, weight = problem(size, kernel, c_in, c_out, groups)
    want = F.conv2d(x[None], weight, None, stride, padding, dilation, groups)[0]
    assert_close(loops(x, weight, stride, padding, dilation, groups), want)
    columns = F.unfold(x[None], kernel, dilation, padding, stride)[0].view(groups, -1, want[0].numel())
    assert_close((weight.view(groups, c_out // groups, -1) @ columns).view_as(want), want)
    matrix = conv_matrix(weight, size, stride, padding, dilation, groups)
    assert matrix.shape == (want.numel(), x.numel()) and matrix.is_sparse and matrix.dtype == weight.dtype
    assert_close((matrix @ x.flatten()).view_as(want), want)


@pytest.mark.parametrize("size, kernel, stride, padding, dilation, c_in, c_out, groups", GEOMETRY)
def test_matrix_transposed_is_the_gradient_and_the_transposed_convolution(size, kernel, stride, padding, dilation, c_in, c_out, groups):
    x, weight = problem(size, kernel, c_in, c_out, groups, seed=1)
    out = F.conv2d(x.requires_grad_()[None], weight, None, stride, padding, dilation, groups)[0]
    y = torch.randn_like(out)
    back = (conv_matrix(weight, size, stride, padding, dilation, groups).t() @ y.flatten()).view_as(x)
    assert_close(back, torch.autograd.grad(out, x, y)[0])
    short = [n - transposed_size(m, k, s, p, d) for n, m, k, s, p, d in zip(size, out.shape[1:], kernel, stride, padding, dilation)]
    assert_close(back, F.conv_transpose2d(y[None], weight, None, stride, padding, short, groups, dilation)[0])
    assert_close((out * y).sum(), (x * back).sum())


def test_matrix_invariants():
    kernel = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    want = [[1, 2, 0, 3, 4, 0, 0, 0, 0], [0, 1, 2, 0, 3, 4, 0, 0, 0], [0, 0, 0, 1, 2, 0, 3, 4, 0], [0, 0, 0, 0, 1, 2, 0, 3, 4]]
    matrix = conv_matrix(kernel, 3)
    assert matrix.to_dense().tolist() == want and matrix.is_coalesced()
    assert torch.equal(matrix.to_dense(), conv_matrix(kernel[None, None], (3, 3)).to_dense())
    indices = matrix.indices()
    assert torch.equal(torch.argsort(indices[0] * 9 + indices[1]), torch.arange(indices.shape[1]))  # sorted, none twice
    padded = conv_matrix(torch.ones(3, 3), 6, padding=1)
    assert padded.values().numel() == 4 * 4 * 9 + 4 * 4 * 6 + 4 * 4  # inside 9 taps, edges 6, corners 4


def test_matrix_is_differentiable_in_the_kernel():
    x, weight = problem((6, 5), (3, 2), 2, 4, 2)
    weight.requires_grad_()
    run = lambda w: conv_matrix(w, (6, 5), (2, 1), 1, 1, 2) @ x.flatten()
    assert torch.autograd.gradcheck(run, weight)
    want = torch.autograd.grad(F.conv2d(x[None], weight, None, (2, 1), 1, 1, 2).square().sum(), weight)[0]
    assert_close(torch.autograd.grad(run(weight).square().sum(), weight)[0], want)


@pytest.mark.parametrize("wrong, says", [
    (dict(kernel=torch.ones(3)), "expected (kh, kw) or"), (dict(kernel=torch.ones(4, 1, 3, 3), groups=3), "3 groups found for 4"),
    (dict(size=2), "spans 3 pixels, and the input has 2"), (dict(stride=0), "stride is 0"), (dict(padding=-1), "padding is -1"),
    (dict(size=(4, 5, 6)), "size is (4, 5, 6)"), (dict(dilation=1.5), "dilation is 1.5"), (dict(groups=0), "0 groups"),
])
def test_matrix_says_what_is_wrong(wrong, says):
    with pytest.raises(ValueError) as error:
        conv_matrix(**(dict(kernel=torch.ones(3, 3), size=5) | wrong))
    assert says in str(error.value)


@pytest.mark.parametrize("kernel, stride, padding, dilation", itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2, 3)))
def test_sizes_are_the_librarys(kernel, stride, padding, dilation):
    for n in range(1, 24):
        x, w = torch.zeros(1, 1, n), torch.zeros(1, 1, kernel)
        if n + 2 * padding < dilation * (kernel - 1) + 1:
            with pytest.raises(ValueError, match="spans"):
                output_size(n, kernel, stride, padding, dilation)
            continue
        assert output_size(n, kernel, stride, padding, dilation) == F.conv1d(x, w, None, stride, padding, dilation).shape[-1]
        for extra in range(stride):
            if (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 < 1:
                continue
            made = F.conv_transpose1d(x, w, None, stride, padding, extra, 1, dilation).shape[-1]
            assert transposed_size(n, kernel, stride, padding, dilation, extra) == made
            assert output_size(made, kernel, stride, padding, dilation) == n


def test_sizes_by_axis_and_their_errors():
    assert output_size((360, 480), 7, 2, 3) == (180, 240) and output_size(8, 3) == 6
    assert output_size((9, 12), (3, 5), (1, 2), (0, 2), (2, 1)) == (5, 6)
    assert transposed_size((5, 6), (3, 5), (1, 2), (0, 2), (2, 1), (0, 1)) == (9, 12)
    assert output_size(9, (3, 5)) == (7, 5)  # one size, two kernels: two answers
    for call, says in [(lambda: transposed_size(4, 3, 2, output_padding=2), "output_padding 2"), (lambda: transposed_size(1, 3, padding=2), "leave -1"),
                       (lambda: output_size(0, 3), "size is 0"), (lambda: output_size("9", 3), "size is '9'")]:
        with pytest.raises(ValueError, match=says):
            call()


def test_shift_equivariance_on_a_torus():
    x, weight = problem((12, 10), (3, 3), 2, 3, 1)
    torus = lambda x, s: F.conv2d(F.pad(x[None], (1,) * 4, mode="circular"), weight, stride=s)[0]
    assert_close(torus(x.roll((3, 5), (1, 2)), 1), torus(x, 1).roll((3, 5), (1, 2)))
    assert_close(torus(x.roll((4, 2), (1, 2)), 2), torus(x, 2).roll((2, 1), (1, 2)))
    assert not torch.allclose(torus(x.roll(1, 2), 2), torus(x, 2))


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 1, 1), (1, 3, 2), (3, 2, 1)])
def test_separable_is_a_full_convolution_in_disguise(stride, padding, dilation):
    x, depthwise = problem((11, 8), (3, 3), 4, 4, 4)
    pointwise = torch.randn(5, 4, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    apart = F.conv2d(F.conv2d(x[None], depthwise, None, stride, padding, dilation, 4), pointwise[:, :, None, None])
    assert_close(F.conv2d(x[None], pointwise[:, :, None, None] * depthwise[:, 0], None, stride, padding, dilation), apart)


def test_factorised_windows_are_sums_of_rank_one():
    x, down = problem((9, 12), (5, 1), 3, 2, 1)
    across = torch.randn(4, 2, 1, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    whole = torch.einsum("rcau,orvb->ocab", down, across)  # through 2 channels: each window has rank 2 at most
    assert_close(F.conv2d(F.conv2d(x[None], down), across), F.conv2d(x[None], whole))
    assert (torch.linalg.matrix_rank(whole) <= 2).all()
    one = torch.linalg.matrix_rank(down[0, 0] @ across[0, 0])
    assert one == 1


def test_grouped_matrix_is_block_diagonal():
    x, weight = problem((5, 6), (3, 3), 4, 6, 2)
    dense = conv_matrix(weight, (5, 6), padding=1, groups=2).to_dense()
    top, left = 3 * 30, 2 * 30
    assert not dense[:top, left:].any() and not dense[top:, :left].any()
    assert_close(dense[:top, :left], conv_matrix(weight[:3], (5, 6), padding=1).to_dense())


def random_chain(seed):
    "Windows of any shape; leaky, so that no weight is behind a dead ReLU"
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[torch.randint(len(values), (), generator=g)]
    conv = lambda c: nn.Conv2d(c, 2, (pick(1, 2, 3, 5), pick(1, 3, 4)), (pick(1, 2), pick(1, 2)), (pick(0, 1, 2), pick(0, 1)), (pick(1, 2, 3), pick(1, 2)))
    pool = pick(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, 1), nn.Identity())
    return nn.Sequential(conv(3), nn.BatchNorm2d(2), nn.LeakyReLU(), pool, nn.Sequential(conv(2), nn.Dropout()), conv(2))


@pytest.mark.parametrize("seed", range(12))
def test_receptive_field_formula_agrees_with_the_gradient(seed):
    net = random_chain(seed)
    assert theoretical_receptive_field(net) == receptive_field(net, (131, 129), samples=16)


class Branches(nn.Module):
    "A residual step, scaled by a parameter that belongs to no layer, beside a far-sighted branch"
    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=4, dilation=4)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        y = self.near(x) * self.scale
        return torch.cat([F.leaky_relu(x + y), self.far(y)], dim=1)


class Lopsided(nn.Module):
    "Even windows look ahead, odd ones around: the box around both is wider than either"
    def __init__(self):
        super().__init__()
        self.ahead = nn.Sequential(nn.Conv2d(3, 3, 2, padding="same"), nn.Conv2d(3, 3, 2, padding="same"))
        self.around = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x): return self.ahead(x) + self.around(x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_receptive_field_follows_branches():
    assert theoretical_receptive_field(Branches()) == receptive_field(Branches(), 33) == (11, 11)
    assert theoretical_receptive_field(Lopsided().ahead) == theoretical_receptive_field(Lopsided().around) == (3, 3)
    assert theoretical_receptive_field(Lopsided()) == receptive_field(Lopsided(), 33) == (4, 4)
    same = nn.Conv2d(3, 2, (4, 2), padding="same", dilation=(1, 3))
    assert theoretical_receptive_field(same) == receptive_field(same, 33) == (4, 4)


def test_receptive_field_of_lists_and_known_networks():
    assert theoretical_receptive_field([]) == (1, 1)
    assert theoretical_receptive_field([(7, 2), (3, 2)]) == (11, 11)
    assert theoretical_receptive_field([3, (3, 1), (3, 1, 2), nn.ReLU()]) == (9, 9)
    assert theoretical_receptive_field([((3, 1), 2), ((1, 3), 1, (1, 2))]) == (3, 9)
    rates = (1, 1, 2, 4, 8, 16, 1)  # Yu & Koltun's context module
    assert [theoretical_receptive_field([(3, 1, r) for r in rates[:n]])[0] for n in range(1, 8)] == [3, 5, 9, 17, 33, 65, 67]
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert theoretical_receptive_field(models.vgg16().features) == (212, 212)
        assert theoretical_receptive_field(models.mobilenet_v2().features) == (491, 491)


class Pooled(nn.Module):
    def forward(self, x): return x * x.mean((2, 3), keepdim=True)


class Beside(nn.Module):
    def forward(self, x): return torch.cat([x, x], -1)


class Strides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x): return self.a(x) + self.b(x)


class Choosing(nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, says", [
    (Pooled(), "mean"), (Beside(), "cat"), (Strides(), "different stride"), (Choosing(), "at run time"), (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d"),
    (nn.ConvTranspose2d(3, 3, 2, 2), "ConvTranspose2d"), (nn.GroupNorm(1, 3), "GroupNorm"), ([(3, 1, 1, 1)], "expected \\(kernel"), ([("a",)], "kernel is 'a'"),
])
def test_receptive_field_refuses_what_has_no_formula(model, says):
    with pytest.raises(ValueError, match=says):
        theoretical_receptive_field(model)


def test_multiply_adds_by_counting():
    net = nn.Sequential(nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 2, 4, 2, 1, groups=2, bias=False))
    costs = multiply_adds(net, (11, 8), in_channels=4)
    h, w = output_size((11, 8), (3, 5), (2, 1), (1, 2))
    weight = conv_matrix(torch.ones(6, 2, 3, 5), (11 + 2, 8 + 4), (2, 1), groups=2)  # padding written out: every tap is a multiplication
    assert costs[0].multiply_adds == weight.values().numel() == 6 * h * w * 2 * 15
    assert costs[3].multiply_adds == 6 * h * w * 1 * 16 and costs[3].output == (1, 2, 2 * h, 2 * w)
    assert costs[1].multiply_adds == costs[2].multiply_adds == 0
    assert costs.parameters == count_parameters(net) and costs.multiply_adds == sum(c.multiply_adds for c in costs)
    assert "multiply-adds" in repr(costs) and f"{costs.multiply_adds:,}" in costs._repr_html_()


def test_multiply_adds_of_a_lone_layer_of_shared_ones_and_of_loose_parameters():
    alone = multiply_adds(nn.Conv2d(3, 4, 3), 9)
    assert alone.multiply_adds == 7 * 7 * 4 * 27 and alone.parameters == 4 * 28
    layer = nn.Conv2d(3, 3, 1)
    twice = multiply_adds(nn.Sequential(layer, layer), 5)
    assert twice.multiply_adds == 2 * 25 * 9 and twice.parameters == 12
    assert multiply_adds(Branches(), 16).parameters == count_parameters(Branches())  # its scale belongs to no layer
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    assert multiply_adds(flat, 9).multiply_adds == 30


def test_multiply_adds_leaves_the_model_alone_and_computes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)).double().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    costs = multiply_adds(net, (30_000, 40_000))  # petabytes of activations, had they been made
    assert costs.multiply_adds == 30_000 * 40_000 * 9 * 8 * (3 + 8)
    assert net.training and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(p.device.type == "cpu" and p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match=r"does not take an image \(1, 4, 9, 9\)"):
        multiply_adds(net, 9, in_channels=4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg16"])
def test_multiply_adds_against_published_numbers(name):
    models = pytest.importorskip("torchvision.models")
    published = models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        costs = multiply_adds(models.get_model(name), 224)
    assert costs.parameters == published["num_params"]
    assert math.isclose(costs.multiply_adds / 1e9, published["_ops"], rel_tol=0.01)


def test_separable_and_factorised_costs():
    full = multiply_adds(nn.Conv2d(64, 96, 3, padding=1, bias=False), (10, 12), 64)
    apart = multiply_adds(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.Conv2d(64, 96, 1, bias=False)), (10, 12), 64)
    line = multiply_adds(nn.Sequential(nn.Conv2d(64, 64, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(64, 96, (1, 3), padding=(0, 1), bias=False)), (10, 12), 64)
    assert math.isclose(apart.multiply_adds / full.multiply_adds, 1 / 96 + 1 / 9)
    assert math.isclose(line.multiply_adds / full.multiply_adds, (64 + 96) / (96 * 3))
    assert (full.parameters, apart.parameters, line.parameters) == (64 * 96 * 9, 64 * 9 + 64 * 96, 3 * 64 * 64 + 3 * 64 * 96)
