"The grid CRF against brute force over all labelings, dense matrices and its own invariants"
import math

import pytest
import torch

from synseg.core import VOID
from synseg.grid_crf import GridCRF, contrast_beta, log_probs_from_labels, neighbourhood

SHAPES = [(2, 3, 3), (3, 2, 4), (2, 1, 7), (3, 5, 1), (2, 1, 1), (4, 2, 3)]
FIELDS = [dict(connectivity=4), dict(connectivity=8), dict(radius=2.3), dict(radius=math.inf)]


def problem(num_classes, height, width, seed=0, n=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logp = 1.5 * torch.randn(n, num_classes, height, width, generator=g, dtype=dtype)
    return logp, torch.rand(n, 3, height, width, generator=g, dtype=dtype)


def all_labelings(num_classes, height, width):
    axes = [torch.arange(num_classes)] * (height * width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, height, width)


def weight_matrix(crf, image):
    "(HW, HW) weights by the formula, pair by pair, for one image"
    height, width = image.shape[-2:]
    colour, beta = image[0].flatten(1).T, contrast_beta(image)[0]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()
    matrix = torch.zeros(height * width, height * width, dtype=image.dtype)
    for i in range(len(place)):
        for j in range(len(place)):
            distance = (place[i] - place[j]).norm()
            if i != j and distance <= crf.radius + 1e-9:
                look = (colour[i] - colour[j]).square().sum()
                matrix[i, j] = (crf.smoothness + crf.contrast * torch.exp(-beta * look)) / distance
    return matrix


@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_energy_messages_and_mean_field_by_the_formula(shape, field):
    crf, (logp, image) = GridCRF(shape[0], 0.4, 1.1, **field), problem(*shape)
    matrix, labels = weight_matrix(crf, image), logp.max(1).indices
    flat = labels.flatten()
    expected = -logp[0].flatten(1).gather(0, flat[None]).sum() + (matrix * (flat[:, None] != flat)).sum() / 2
    torch.testing.assert_close(crf.energy(labels, logp, image)[0], expected)
    q = logp.softmax(1)[0].flatten(1)
    for _ in range(3):
        q = (logp[0].flatten(1) + q @ matrix).softmax(0)
    torch.testing.assert_close(crf.mean_field(logp, image, 3, parallel=True)[0].flatten(1), q)


@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_descent_against_all_labelings(shape, field, seed):
    crf, (logp, image) = GridCRF(shape[0], 0.3, 0.9, **field), problem(*shape, seed=seed)
    energies = crf.energy(all_labelings(*shape), logp, image)
    cost = lambda labels: crf.energy(labels, logp, image).item()
    icm, expansion = crf.icm(logp, image), crf.expansion(logp, image)
    assert energies.min() - 1e-6 <= cost(expansion) <= cost(icm) + 1e-9 <= cost(logp.max(1).indices) + 2e-9
    assert torch.equal(crf.icm(logp, image, start=expansion), expansion)
    if shape[0] == 2:
        assert cost(crf.min_cut(logp, image)) == pytest.approx(energies.min().item(), abs=1e-6)
        assert cost(expansion) == pytest.approx(energies.min().item(), abs=1e-6)


@pytest.mark.parametrize("field", FIELDS[:3], ids=str)
def test_energy_and_free_energy_never_rise(field):
    crf, (logp, image) = GridCRF(5, 1.0, 2.0, **field), problem(5, 13, 17, n=2)
    start = torch.randint(0, 5, (2, 13, 17))
    walk = [crf.energy(crf.icm(logp, image, start, sweeps=s), logp, image) for s in range(6)]
    free = [crf.free_energy(crf.mean_field(logp, image, t), logp, image) for t in range(6)]
    for trail in (walk, free):
        assert all((b <= a + 1e-9).all() for a, b in zip(trail, trail[1:]))
    finished = crf.icm(logp, image, start, sweeps=1000)
    assert torch.equal(crf.icm(logp, image, finished), finished)
    assert torch.equal(crf.local_log_probs(finished, logp, image).max(1).indices, finished)


def test_free_energy_is_above_minus_log_z_and_exact_without_edges():
    crf, (logp, image) = GridCRF(3, 0.5, 0.5), problem(3, 2, 4)
    log_z = (-crf.energy(all_labelings(3, 2, 4), logp, image)).logsumexp(0)
    assert crf.free_energy(crf(logp, image), logp, image) >= -log_z
    loose = GridCRF(3, 0, 0)
    torch.testing.assert_close(loose.free_energy(loose(logp, image), logp, image), -logp.logsumexp(1).sum((1, 2)))


def test_zero_weight_returns_the_unary():
    crf, (logp, image) = GridCRF(4, 0, 0), problem(4, 9, 11, n=2)
    best = logp.max(1).indices
    for found in (crf.icm(logp, image), crf.expansion(logp, image), crf(logp, image).max(1).indices):
        assert torch.equal(found, best)
    torch.testing.assert_close(crf(logp, image), logp.softmax(1))
    two, (logp, image) = GridCRF(2, 0, 0), problem(2, 9, 11)
    assert torch.equal(two.min_cut(logp, image), logp.max(1).indices)


def test_a_huge_weight_makes_one_label_of_all():
    crf, (logp, image) = GridCRF(3, smoothness=1e6), problem(3, 7, 9)
    assert torch.equal(crf.expansion(logp, image), logp.sum((2, 3)).max(1).indices[:, None, None].expand(1, 7, 9))


@pytest.mark.parametrize("size", [(8, 8), (1, 5), (1, 1), (5, 1)])
def test_images_of_one_colour(size):
    logp, _ = problem(2, *size)
    image = torch.full((1, 3, *size), 0.7, dtype=torch.float64)
    assert contrast_beta(image).item() == 0
    crf, same = GridCRF(2, 0.5, 1.5), GridCRF(2, 2.0, 0.0)
    assert crf(logp, image).isfinite().all()
    torch.testing.assert_close(crf(logp, image), same(logp, image))
    assert torch.equal(crf.min_cut(logp, image), same.min_cut(logp, image))
    tiny = image + 1e-20 * torch.rand_like(image)
    assert contrast_beta(tiny).isfinite().all() and crf(logp, tiny).isfinite().all()


def test_beta_is_half_the_inverse_of_the_mean_and_images_do_not_mix():
    image = torch.rand(2, 3, 6, 7, dtype=torch.float64) * torch.tensor([1.0, 0.1], dtype=torch.float64).view(2, 1, 1, 1)
    each = torch.cat([contrast_beta(one[None]) for one in image])
    torch.testing.assert_close(contrast_beta(image), each)
    right, down = (image[..., 1:] - image[..., :-1]), (image[..., 1:, :] - image[..., :-1, :])
    slant, back = image[..., 1:, 1:] - image[..., :-1, :-1], image[..., 1:, :-1] - image[..., :-1, 1:]
    squares = torch.cat([d.square().sum(1).flatten(1) for d in (right, down, slant, back)], 1)
    torch.testing.assert_close(each, 0.5 / squares.mean(1))
    crf, logp = GridCRF(3), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    for name in ("icm", "mean_field", "expansion"):
        both = getattr(crf, name)(logp, image)
        torch.testing.assert_close(both, torch.cat([getattr(crf, name)(logp[i:i + 1], image[i:i + 1]) for i in range(2)]))


def test_parallel_updates_can_oscillate_and_turns_do_not():
    board = ((torch.arange(6)[:, None] + torch.arange(6)) % 2)[None]
    logp, image = 0.1 * torch.randn(1, 2, 6, 6), torch.full((1, 3, 6, 6), 0.5)
    crf = GridCRF(2, smoothness=1, contrast=0, connectivity=4)
    step = lambda labels: crf.local_log_probs(labels, logp, image).max(1).indices
    assert torch.equal(step(board), 1 - board) and torch.equal(step(step(board)), board)
    assert crf.energy(crf.icm(logp, image, board), logp, image) < crf.energy(board, logp, image)


def test_gradients():
    crf, (logp, image) = GridCRF(3, iterations=3), problem(3, 4, 5)
    logp.requires_grad_()
    for parallel in (False, True):
        assert torch.autograd.gradcheck(lambda x: crf.mean_field(x, image, parallel=parallel), logp)


def test_equivariance_and_impossible_labels():
    crf, (logp, image) = GridCRF(3, 0.5, 1.0), problem(3, 9, 12)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(crf.mean_field(logp[:, order], image, parallel=True), crf.mean_field(logp, image, parallel=True)[:, order])
    flip = lambda x: x.flip(-1)
    torch.testing.assert_close(crf.mean_field(flip(logp), flip(image), parallel=True), flip(crf.mean_field(logp, image, parallel=True)))
    logp[:, 1, :, :6] = -math.inf
    q = crf(logp, image)
    assert q.isfinite().all() and (q[:, 1, :, :6] == 0).all()
    for found in (crf.icm(logp, image), crf.expansion(logp, image)):
        assert (found[..., :6] != 1).all()


def test_inputs_stay_as_they_were_and_dtypes_follow():
    crf, (logp, image) = GridCRF(3), problem(3, 5, 6, dtype=torch.float32)
    start, keep = torch.zeros(1, 5, 6, dtype=torch.long), (logp.clone(), image.clone())
    q, x, e = crf(logp, image), crf.icm(logp, image, start), crf.expansion(logp, image, start)
    assert torch.equal(logp, keep[0]) and torch.equal(image, keep[1]) and not start.any()
    assert q.dtype == torch.float32 and x.dtype == e.dtype == torch.int64 and q.shape == logp.shape
    torch.testing.assert_close(q.sum(1), torch.ones(1, 5, 6))


def test_neighbourhoods():
    assert neighbourhood(1, 9, 9) == [(0, 1), (1, 0)]
    assert set(neighbourhood(2**0.5, 9, 9)) == {(0, 1), (1, -1), (1, 0), (1, 1)}
    assert neighbourhood(1, 1, 1) == [] and neighbourhood(5, 1, 3) == [(0, 1), (0, 2)]
    for height, width in ((3, 4), (1, 6), (5, 2)):
        pairs = sum((height - y) * (width - abs(x)) for y, x in neighbourhood(math.inf, height, width))
        assert pairs == height * width * (height * width - 1) // 2


def test_log_probs_from_labels():
    labels = torch.tensor([[[0, 1, VOID], [2, VOID, 3]]])
    p = log_probs_from_labels(labels, 4, 0.4).exp()
    assert p.shape == (1, 4, 2, 3) and p.dtype == torch.float32
    torch.testing.assert_close(p.sum(1), torch.ones(1, 2, 3))
    torch.testing.assert_close(p[0, :, 0, 1], torch.tensor([0.2, 0.4, 0.2, 0.2]))
    torch.testing.assert_close(p[0, :, 0, 2], torch.full((4,), 0.25))
    torch.testing.assert_close(log_probs_from_labels(labels.to(torch.uint8), 4), log_probs_from_labels(labels, 4))
    unary = pytest.importorskip("pydensecrf.utils").unary_from_labels
    one = torch.tensor([[1, 0, 2], [0, 3, 3]])  # there 0 means unknown and classes count from 1
    ours = log_probs_from_labels(torch.where(one == 0, VOID, one - 1)[None], 3, 0.6)
    torch.testing.assert_close(-ours[0].flatten(1), torch.from_numpy(unary(one.numpy(), 3, 0.6)))


def test_bad_input_says_what_to_do():
    crf, (logp, image) = GridCRF(3), problem(3, 4, 5)
    for message, call in {
        "expected \\(N, 3, H, W\\)": lambda: crf(logp[:, :2], image),
        "floats in \\[0, 1\\]": lambda: crf(logp, image[..., :4]),
        "torch.uint8 found": lambda: crf(logp, (image * 255).to(torch.uint8)),
        "use expansion": lambda: crf.min_cut(logp, image),
        "expected a class for every pixel": lambda: crf.energy(torch.full((1, 4, 5), VOID), logp, image),
        "start of shape": lambda: crf.icm(logp, image, torch.zeros(4, 5, dtype=torch.long)),
        "label value 3": lambda: crf.icm(logp, image, torch.full((1, 4, 5), 3)),
        "two or more": lambda: GridCRF(1),
        "connectivity=6": lambda: GridCRF(2, connectivity=6),
        "neighbours that repel": lambda: GridCRF(2, smoothness=-1),
        "contrast=nan": lambda: GridCRF(2, contrast=math.nan),
        "radius=0.5": lambda: GridCRF(2, radius=0.5),
        "add a batch axis": lambda: log_probs_from_labels(torch.zeros(4, 5, dtype=torch.long), 3),
        "both excluded": lambda: log_probs_from_labels(torch.zeros(1, 4, 5, dtype=torch.long), 3, 1.0),
        "label value 7": lambda: log_probs_from_labels(torch.full((1, 4, 5), 7), 3),
        "NaN found": lambda: GridCRF(2).min_cut(torch.full((1, 2, 4, 5), math.nan), image),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
