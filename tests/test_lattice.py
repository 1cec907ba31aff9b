"The lattice against all pairs, against its definition point by point, and against pydensecrf where it is installed"
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from synseg.lattice import (Lattice, bilateral_features, elevate, enclosing_simplex, find_neighbours, group, hash_code, representatives,
                            spatial_features)


def gaussian(features, values):
    return torch.cdist(features, features).square().mul(-0.5).exp() @ values


def draw(n, d, spread=1.0, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)*spread


def vertices_by_definition(x):
    "Corners of the simplex around one point of the plane: nearest point of remainder 0, then raise the largest residual, and so on"
    size, corners = len(x), []
    raised = (x/size).round()*size
    for i in (x - raised).sort(descending=True, stable=True).indices.tolist():
        raised = raised.clone()
        raised[i] += size
        corners.append(raised - raised.sum()/size)
    return torch.stack(corners)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
def test_elevation_is_orthogonal_and_sums_to_zero(d):
    basis = elevate(torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(basis.sum(1), torch.zeros(d, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(d, dtype=torch.float64)*(d + 1)**2*2/3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
def test_corners_weighted_by_shares_give_the_point_back(d):
    x = elevate(draw(301, d, 4.0, dtype=torch.float64))
    whole, order, shares = enclosing_simplex(x)
    assert shares.min() >= 0
    torch.testing.assert_close(shares.sum(1), torch.ones(301, dtype=torch.float64), atol=1e-9, rtol=0)
    for i in range(0, 301, 20):
        corners = vertices_by_definition(x[i])
        torch.testing.assert_close(shares[i] @ corners, x[i], atol=1e-6, rtol=0)
        assert sorted((corners[:, 0].round().long() % (d + 1)).tolist()) == list(range(d + 1))
        assert order[:, i].sort().values.tolist() == list(range(d + 1))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_vertices_and_neighbours_by_dictionary(d):
    features = draw(203, d, 1.3, seed=d)
    lattice, x = Lattice(features), elevate(torch.cat([features, torch.zeros(1, d)]).double())
    names, keys = {}, [tuple(k) for point in x for k in vertices_by_definition(point).round().long().tolist()]
    for key, number in zip(keys, lattice.vertices.flatten().tolist()):
        assert names.setdefault(key, number) == number
    there = set(keys)
    assert lattice.num_vertices == len(there)  # with those of the fourth point of the last four, at the origin
    for key, number in names.items():
        for axis in range(d + 1):
            for side, sign in ((0, 1), (1, -1)):
                other = tuple(k + sign*(1 - (d + 1)*(c == axis)) for c, k in enumerate(key))
                found = lattice.neighbours[axis, side, number].item()
                assert (found == lattice.num_vertices) == (other not in there)
                if other in names: assert found == names[other]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 1000, 1001, 40_003])
def test_representatives_name_equals_alike(n):
    keys = torch.randint(0, max(n//3, 1), (n,), generator=torch.Generator().manual_seed(n))*0x12345
    same, (number, first) = representatives(keys), group(keys)
    assert (keys[same.long()] == keys).all() and len(same.unique()) == len(keys.unique()) == len(first)
    assert (keys[first][number.long()] == keys).all()
    assert number.unique().tolist() == list(range(len(first)))


def test_hash_is_linear_and_neighbours_are_mutual():
    lattice = Lattice(draw(500, 5, 0.8))
    m = lattice.num_vertices
    before, after = lattice.neighbours.long().unbind(1)
    for axis in range(6):
        i = (after[axis] < m).nonzero()[:, 0]
        assert (before[axis][after[axis][i]] == i).all()
    assert torch.equal(hash_code(6), hash_code(6))
    assert (find_neighbours(torch.tensor([5, 7]), 6) == 2).all()


@pytest.mark.parametrize("d, spread, least, most", [(1, 1.5, 0.85, 0.98), (2, 1.5, 0.8, 0.95), (3, 1.2, 0.7, 0.95), (5, 0.7, 0.4, 0.8)])
def test_against_all_pairs(d, spread, least, most):
    features, values = draw(800, d, spread), torch.rand(800, 3, generator=torch.Generator().manual_seed(1))
    lattice, ones = Lattice(features), torch.ones(800, 1)
    raw = lattice.filter(ones)/gaussian(features, ones)
    assert least < raw.mean() < most
    got, want = lattice.filter(values)/lattice.filter(ones), gaussian(features, values)/gaussian(features, ones)
    assert (got - want).abs().mean() < 0.01


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("h, w", [(37, 61), (24, 30), (53, 47)])
def test_one_filtering_of_pydensecrf(h, w, normalized):
    dcrf = pytest.importorskip("pydensecrf.densecrf")
    image = torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)).mul(255).round()/255*0.3
    for features in (spatial_features(h, w, 3.0), bilateral_features(image, 20, 13)):
        q = torch.rand(h*w, 4).softmax(1)
        theirs = dcrf.DenseCRF(h*w, 4)
        theirs.setUnaryEnergy(np.ascontiguousarray(-q.log().T.numpy()))
        form = dcrf.NORMALIZE_AFTER if normalized else dcrf.NO_NORMALIZATION
        theirs.addPairwiseEnergy(np.ascontiguousarray(features.T.numpy()), compat=0.02, kernel=dcrf.CONST_KERNEL, normalization=form)
        want = torch.from_numpy(np.array(theirs.inference(1))).view(4, -1).T
        lattice = Lattice(features)
        message = lattice.filter(q)/(lattice.filter(torch.ones(h*w, 1)) if normalized else 1)
        torch.testing.assert_close((q.log() + 0.02*message).softmax(1), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_transpose_is_the_reversed_blur(d):
    lattice = Lattice(draw(151, d, 1.0, dtype=torch.float64))
    u, v = torch.rand(2, 151, 2, dtype=torch.float64)
    torch.testing.assert_close((lattice.filter(u)*v).sum(), (u*lattice.filter(v, reverse=True)).sum(), rtol=1e-10, atol=0)
    assert gradcheck(lattice.filter, u.requires_grad_())


def test_splat_keeps_the_total_and_one_point_hears_itself():
    lattice = Lattice(draw(77, 5, 2.0))
    values = torch.rand(77, 3)
    torch.testing.assert_close(lattice.splat(values).sum(0), values.sum(0), rtol=1e-4, atol=1e-4)
    alone = Lattice(torch.zeros(1, 2))
    assert alone.num_vertices == 3 and alone.filter(torch.ones(1, 1)) > 0.7
    assert Lattice(torch.full((50, 5), 0.3)).num_vertices <= 12


def test_the_order_of_the_pixels_does_not_matter():
    features, values, order = draw(400, 5, 0.7), torch.rand(400, 2), torch.randperm(400)
    torch.testing.assert_close(Lattice(features[order]).filter(values[order]), Lattice(features).filter(values)[order], rtol=1e-4, atol=1e-5)


def test_features():
    f = spatial_features(2, 3, (2.0, 4.0))
    assert f.tolist() == [[0, 0], [0.5, 0], [1, 0], [0, 0.25], [0.5, 0.25], [1, 0.25]]
    image = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1).expand(3, 2, 3)
    b = bilateral_features(image, 5, 10)
    assert b.shape == (6, 5) and torch.equal(b[:, :2], spatial_features(2, 3, 5))
    torch.testing.assert_close(b[4, 2:], torch.tensor([0.0, 5.1, 25.5]))
    assert bilateral_features(image.double()).dtype == torch.float32


@pytest.mark.parametrize("make, message", [
    (lambda: Lattice(torch.zeros(3)), r"expected \(N, d\)"),
    (lambda: Lattice(torch.zeros(0, 3)), r"expected \(N, d\)"),
    (lambda: Lattice(torch.tensor([[float("inf"), 0.0]])), "finite"),
    (lambda: Lattice(torch.tensor([[float("nan")]])), "finite"),
    (lambda: Lattice(torch.zeros(3, 2)).filter(torch.zeros(4, 1)), r"expected \(3, C\)"),
    (lambda: spatial_features(3, 3, 0), "above zero"),
    (lambda: bilateral_features(torch.zeros(1, 3, 4, 4)), r"\(3, H, W\)"),
    (lambda: bilateral_features(torch.zeros(3, 4, 4), rgb=-1), "above zero"),
])
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message): make()
