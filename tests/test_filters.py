"The fused filters against the plain lattice and against pydensecrf; transposes, gradients, the cache, bounded memory"
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from synseg.filters import NORMALIZATIONS, Kernel, PairwiseFilter, Rows, blur_matrices, gaussian_lattice, kernel, pieces, read_vertices, transposed
from synseg.lattice import Lattice, bilateral_features, spatial_features


def picture(h, w, seed=0):
    g = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 5, generator=g), size=(h, w), mode="bilinear")[0]
    return (smooth + 0.05*torch.randn(3, h, w, generator=g)).clamp(0, 1).mul(255).round()/255


def both(h, w, dtype=torch.float32):
    return [Lattice(spatial_features(h, w, 3.0).to(dtype)), Lattice(bilateral_features(picture(h, w), 20, 13).to(dtype))]


def plain(lattices, weights, normalization, q):
    out = 0
    for lattice, weight in zip(lattices, weights):
        n = 1/(lattice.filter(torch.ones(len(q), 1, dtype=q.dtype)) + 1e-20)
        inner, outer = {"none": (1, 1), "before": (n, 1), "after": (1, n), "symmetric": (n.sqrt(), n.sqrt())}[normalization]
        out = out + weight*outer*lattice.filter(inner*q)
    return out


def test_rows_and_transposes_against_dense_matrices():
    g = torch.Generator().manual_seed(0)
    columns, values = torch.randint(0, 17, (29, 4), generator=g, dtype=torch.int32), torch.rand(29, 4, generator=g)
    dense = torch.zeros(29, 17).scatter_add_(1, columns.long(), values)
    turned, v = transposed(columns, values, 17), torch.rand(29, 3)
    torch.testing.assert_close(turned @ v, dense.T @ v)
    table, out = torch.rand(17, 3), torch.empty(29, 3)
    for chunk in (1, 5, 29, 100):
        torch.testing.assert_close(read_vertices(pieces(columns, values, chunk), table, out), dense @ table)
    empty = Rows(torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    assert torch.equal(empty @ table, torch.zeros(3, 3))


def test_blur_matrices_are_symmetric_and_equal_the_lattices_blur():
    lattice = both(13, 17)[1]
    m = lattice.num_vertices
    x, eye = torch.rand(m, 3), torch.eye(m)
    for matrix in blur_matrices(lattice.neighbours, lattice.weights.dtype):
        dense = matrix @ eye
        assert torch.equal(dense, dense.T) and torch.equal(dense.diag(), torch.ones(m)) and set(dense.unique().tolist()) <= {0, 0.5, 1}
    want = lattice.blur(x)
    for matrix in blur_matrices(lattice.neighbours, lattice.weights.dtype): x = matrix @ x
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("h, w, c", [(19, 23, 2), (31, 17, 12), (12, 12, 21)])
def test_message_is_the_sum_of_plain_filters(h, w, c, normalization):
    lattices, q = both(h, w), torch.rand(h*w, c).softmax(1)
    f = PairwiseFilter(lattices, [3, 10], normalization)
    want = plain(lattices, [3, 10], normalization, q)
    torch.testing.assert_close(f.message(q), want, rtol=1e-4, atol=1e-4)
    bias, out = torch.randn(h*w, c), torch.full((h*w, c), float("nan"))
    assert f.message(q, out=out, bias=bias) is out
    torch.testing.assert_close(out, want + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f.message(q.T.contiguous().T), f.message(q), rtol=0, atol=0)
    torch.testing.assert_close(f.message(q, out=q), want, rtol=1e-4, atol=1e-4)  # in place: q has been read before it is written


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_adjoint_and_gradient(normalization):
    f = PairwiseFilter(both(9, 11, torch.float64), [3, -2.5], normalization)
    u, v = torch.rand(2, 99, 3, dtype=torch.float64)
    torch.testing.assert_close((f.message(u)*v).sum(), (u*f.adjoint(v)).sum(), rtol=1e-9, atol=1e-12)
    assert gradcheck(f, u[:, :1].clone().requires_grad_())


def test_call_keeps_the_dtype_and_gives_a_gradient():
    f = PairwiseFilter(both(8, 9), [3, 10])
    q = torch.rand(72, 3, requires_grad=True)
    f(q).sum().backward()
    torch.testing.assert_close(q.grad, f.adjoint(torch.ones(72, 3)))
    assert f(torch.rand(72, 3, dtype=torch.float64)).dtype == torch.float64


def test_weights_scale_and_kernels_are_shared():
    lattices, q = both(14, 15), torch.rand(210, 4)
    one, three = (PairwiseFilter(lattices[:1], [w]) for w in (1, 3))
    assert one.kernels[0] is three.kernels[0] is kernel(lattices[0])
    torch.testing.assert_close(3*one.message(q), three.message(q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(PairwiseFilter(lattices, [0, 0]).message(q), torch.zeros(210, 4))


def test_gaussian_lattices_are_cached_by_size():
    gaussian_lattice.cache_clear()
    a = gaussian_lattice(11, 13, 2.0)
    assert gaussian_lattice(11, 13, 2.0) is a and gaussian_lattice(13, 11, 2.0) is not a and kernel(a) is kernel(a)
    for size in range(20, 30): gaussian_lattice(size, size)
    assert gaussian_lattice.cache_info().currsize <= 4
    assert gaussian_lattice(11, 13, 2.0) is not a


def test_after_is_an_average_and_symmetric_is_symmetric_enough():
    lattice = both(20, 21)[1]
    ones = torch.ones(420, 1)
    torch.testing.assert_close(PairwiseFilter([lattice], [1], "after").message(ones), ones, rtol=0, atol=1e-4)
    assert Kernel(lattice, "symmetric").into is not lattice.weights and Kernel(lattice, "none").into is lattice.weights


@pytest.mark.parametrize("h, w", [(37, 61), (40, 48), (53, 47)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_mean_field_of_pydensecrf(h, w, normalization):
    dcrf = pytest.importorskip("pydensecrf.densecrf")
    form = {"none": dcrf.NO_NORMALIZATION, "before": dcrf.NORMALIZE_BEFORE, "after": dcrf.NORMALIZE_AFTER, "symmetric": dcrf.NORMALIZE_SYMMETRIC}
    image, scores = picture(h, w, 1).mul(127).round()/255, torch.randn(h*w, 5, generator=torch.Generator().manual_seed(2)).log_softmax(1)
    weights = (0.03, 0.03) if normalization == "none" else (3, 10)
    theirs = dcrf.DenseCRF2D(w, h, 5)
    theirs.setUnaryEnergy(np.ascontiguousarray(-scores.T.numpy()))
    theirs.addPairwiseGaussian(sxy=3, compat=weights[0], normalization=form[normalization])
    rgb = np.ascontiguousarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
    theirs.addPairwiseBilateral(sxy=30, srgb=13, rgbim=rgb, compat=weights[1], normalization=form[normalization])
    f = PairwiseFilter([gaussian_lattice(h, w, 3.0), Lattice(bilateral_features(image, 30, 13))], weights, normalization)
    q = scores.softmax(1)
    for _ in range(5): q = f.message(q, bias=scores).softmax(1)
    want = torch.from_numpy(np.array(theirs.inference(5))).view(5, -1).T
    torch.testing.assert_close(q, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make, message", [
    (lambda: PairwiseFilter([], []), "one lattice at least"),
    (lambda: PairwiseFilter(both(5, 6), [1.0]), "one weight for each lattice"),
    (lambda: PairwiseFilter([gaussian_lattice(5, 6), gaussian_lattice(5, 7)], [1, 1]), "30, 35 points"),
    (lambda: PairwiseFilter([gaussian_lattice(5, 6)], [1], "sideways"), "none, before, after, symmetric"),
    (lambda: PairwiseFilter([gaussian_lattice(5, 6)], [1]).message(torch.zeros(29, 2)), r"expected \(30, C\)"),
    (lambda: PairwiseFilter([gaussian_lattice(5, 6)], [1]).message(torch.zeros(30, 2, dtype=torch.float64)), "float32"),
])
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message): make()


MEMORY = """
import resource, torch
torch.set_num_threads(1)
from synseg.filters import PairwiseFilter, gaussian_lattice
from synseg.lattice import Lattice, bilateral_features
image = torch.nn.functional.interpolate(torch.rand(1, 3, 60, 80), size=(360, 480), mode="bilinear")[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q = torch.rand(360*480, 12).softmax(1)
f = PairwiseFilter([gaussian_lattice(360, 480), Lattice(bilateral_features(image))], [3, 10])
for _ in range(2): f.message(q)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts kilobytes as Linux does")
def test_peak_memory_at_360x480_stays_far_under_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500
