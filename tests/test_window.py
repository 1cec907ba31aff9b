"Windowed kernels: half a window, shifted products, their gradients and their memory"
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from synseg.window import FAINT, from_cells, gaussian_blur, half_window, likeness, pair_views, peak_bytes, shifted_sum, to_cells


def all_pairs(features, window):
    "The windowed kernel (HW, HW) of one image (F, H, W), by definition"
    h, w = features.shape[-2:]
    f = features.flatten(1).T
    at = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2)
    inside = (at[:, None] - at).abs().amax(-1) <= window // 2
    return torch.exp((-0.5 * (f[:, None] - f).square().sum(-1)).clamp(min=FAINT)) * inside


@pytest.mark.parametrize("k,h,w", [(1, 5, 5), (3, 1, 1), (3, 1, 6), (5, 4, 1), (11, 30, 40), (99, 4, 7), (7, 3, 50)])
def test_half_window_holds_one_of_each_pair(k, h, w):
    half = half_window(k, h, w)
    both = set(half) | {(-dy, -dx) for dy, dx in half}
    down, right = min(k // 2, h - 1), min(k // 2, w - 1)
    assert len(both) == 2 * len(half)
    assert both == {(dy, dx) for dy in range(-down, down + 1) for dx in range(-right, right + 1)} - {(0, 0)}


@pytest.mark.parametrize("h,w,k", [(1, 1, 3), (1, 9, 5), (8, 1, 7), (7, 10, 5), (6, 5, 21)])
@pytest.mark.parametrize("own", [True, False])
def test_the_sum_equals_its_matrix(h, w, k, own):
    torch.manual_seed(h * w + k)
    features, q = torch.randn(2, 3, h, w), torch.randn(2, 4, h, w)
    offsets = half_window(k, h, w)
    got = shifted_sum(q, likeness(features, offsets), offsets, own)
    for i in range(2):
        matrix = all_pairs(features[i], k) - (0 if own else torch.eye(h * w))
        torch.testing.assert_close(got[i].flatten(1), q[i].flatten(1) @ matrix.T, rtol=1e-5, atol=1e-5)


def test_tiles_do_not_show():
    torch.manual_seed(0)
    q, features = torch.rand(1, 7, 211, 397), 2 * torch.rand(1, 3, 211, 397)
    offsets = half_window(5, 211, 397)
    kernel = likeness(features, offsets)
    want = q.clone()
    for d, offset in enumerate(offsets):
        here, there = pair_views(offset, 211, 397)
        want[here] += kernel[:, d:d + 1][here] * q[there]
        want[there] += kernel[:, d:d + 1][here] * q[here]
    torch.testing.assert_close(shifted_sum(q, kernel, offsets), want, rtol=1e-5, atol=1e-5)


def test_constant_features_make_a_convolution():
    q, offsets = torch.rand(2, 3, 12, 9), half_window(7, 12, 9)
    got = shifted_sum(q, likeness(torch.ones(2, 1, 12, 9), offsets), offsets)
    torch.testing.assert_close(got, F.conv2d(q, torch.ones(3, 1, 7, 7), padding=3, groups=3), rtol=1e-5, atol=1e-5)


def test_gaussian_blur_is_the_kernel_of_positions():
    q, sigma = torch.rand(2, 3, 11, 6), 1.7
    at = torch.stack(torch.meshgrid(torch.arange(11), torch.arange(6), indexing="ij"))[None].expand(2, -1, -1, -1) / sigma
    for k in (1, 3, 9, 31):
        offsets = half_window(k, 11, 6)
        got = gaussian_blur(q, torch.tensor(1 / sigma), k // 2)
        torch.testing.assert_close(got, shifted_sum(q, likeness(at, offsets), offsets), rtol=1e-5, atol=1e-5)


def test_gradients():
    torch.manual_seed(0)
    offsets = half_window(5, 4, 5)
    q, f, decay = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 5), (2, 2, 4, 5), (len(offsets),)))
    assert gradcheck(lambda q, f, c: shifted_sum(q, likeness(f, offsets, c), offsets), (q, f, decay))
    assert gradcheck(lambda q, s: gaussian_blur(q, s, 2), (q, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)))


def test_only_what_is_asked_for_gets_a_gradient():
    offsets = half_window(3, 6, 7)
    q, f = torch.rand(1, 2, 6, 7, requires_grad=True), torch.rand(1, 3, 6, 7)
    shifted_sum(q, likeness(f, offsets), offsets).sum().backward()
    ones = shifted_sum(torch.ones_like(q), likeness(f, offsets), offsets)
    torch.testing.assert_close(q.grad, ones, rtol=1e-5, atol=1e-5)  # the kernel is its own transpose
    assert f.grad is None


def test_no_denormal_numbers_in_the_kernel():
    f = torch.randn(1, 3, 20, 20) * 13
    kernel = likeness(f, half_window(5, 20, 20))
    assert kernel[kernel > 0].min() >= torch.exp(torch.tensor(FAINT)) * 0.99
    assert torch.exp(torch.tensor(2 * FAINT)) > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("cell", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 12), (13, 7)])
def test_cells_keep_constants_and_sizes(cell, size):
    x = torch.full((1, 2, *size), 0.25)
    small = to_cells(x, cell)
    assert small.shape[-2:] == tuple(-(-n // cell) for n in size)
    torch.testing.assert_close(from_cells(small, cell, size), x, rtol=1e-5, atol=1e-6)


def test_kernel_of_another_size_is_refused():
    with pytest.raises(ValueError, match="one plane for each offset"):
        shifted_sum(torch.rand(1, 2, 5, 5), torch.rand(1, 4, 5, 6), half_window(3, 5, 5))


def test_peak_bytes():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: (x + 1) * 2 + 3) == 8000
    assert peak_bytes(lambda: None) == 0
