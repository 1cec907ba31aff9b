"The compiled mean field beside PyTorch's and pydensecrf's, and what happens where it cannot run"
import importlib.util, subprocess, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synseg.compiled import PARTS, Visits, available, compiled, mean_field_compiled, visit, wanted
from synseg.dense_crf import DenseCRF, mean_field_inplace
from synseg.filters import NORMALIZATIONS, PairwiseFilter
from synseg.lattice import Lattice, bilateral_features, spatial_features

numba = pytest.mark.skipif(not available(), reason="numba is not installed: pip install synseg[fast]")


def smooth(height, width, classes, seed=0):
    "A soft picture and noisy scores"
    rng = torch.Generator().manual_seed(seed)
    coarse = lambda c: F.interpolate(torch.randn(1, c, 4, 5, generator=rng), size=(height, width), mode="bicubic")
    return 2*coarse(classes) + torch.randn(1, classes, height, width, generator=rng), coarse(3).sigmoid()


def both(scores, image, **settings):
    return [DenseCRF(scores.shape[1], compiled=choice, **settings)(scores, image) for choice in (False, True)]


def same(slow, fast, atol=1e-5):
    torch.testing.assert_close(fast, slow, atol=atol, rtol=0)
    top = slow.topk(min(2, slow.shape[1]), 1).values
    clear = top[:, 0] - top[:, -1] > 1e-4
    assert (slow.argmax(1) == fast.argmax(1))[clear].all()


@numba
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 10])
def test_same_as_pytorch_for_every_normalization(normalization, iterations):
    scores, image = smooth(33, 47, 6)
    same(*both(scores, image, normalization=normalization, iterations=iterations, bilateral_xy=20),
         atol=1e-4 if normalization == "none" else 1e-5)  # hundreds of votes, each rounded


@numba
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 8, 9, 12, 21, 33])
def test_any_number_of_classes(classes): same(*both(*smooth(21, 34, classes)))


@numba
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (5, 1), (8, 8), (37, 53)])
def test_odd_sizes_and_fewer_pixels_than_parts(size): same(*both(*smooth(*size, 5)))


@numba
@pytest.mark.parametrize("weights", [(3, 0), (0, 10), (0, 0), (300, 1000)])
def test_one_kernel_none_or_heavy_ones(weights):
    scores, image = smooth(30, 41, 4)
    same(*both(scores, image, gaussian_weight=weights[0], bilateral_weight=weights[1], iterations=5))


@numba
def test_scores_far_apart_infinite_or_shifted():
    scores, image = smooth(20, 30, 4)
    scores[:, 0, :5], scores[:, 1, 5:9] = -torch.inf, -1e5
    slow, fast = both(scores, image)
    same(slow, fast)
    assert fast.isfinite().all()
    torch.testing.assert_close(fast.sum(1), torch.ones(1, 20, 30), atol=1e-5, rtol=0)
    same(*both(smooth(20, 30, 4)[0] + 30, image), atol=1e-4)


@numba
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_batches(dtype):
    scores, image = (torch.cat(pair) for pair in zip(smooth(20, 30, 4), smooth(20, 30, 4, seed=1)))
    slow, fast = both(scores.to(dtype), image)
    assert fast.dtype == dtype and fast.shape == scores.shape
    torch.testing.assert_close(fast, slow, atol=1e-2, rtol=0)


@numba
def test_the_callers_scores_are_left_alone():
    for size, classes in (((9, 9), 1), ((1, 1), 4), ((12, 13), 8)):
        scores, image = smooth(*size, classes)
        before = scores.clone()
        DenseCRF(classes, compiled=True)(scores, image)
        assert torch.equal(scores, before)


@numba
def test_same_bits_again_and_on_any_number_of_threads():
    scores, image = smooth(64, 80, 12)
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 16):
            torch.set_num_threads(count)
            answers.append(DenseCRF(12, compiled=True)(scores, image))
    finally: torch.set_num_threads(threads)
    assert all(torch.equal(answers[0], answer) for answer in answers[1:])


@numba
def test_callers_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor
    given = [smooth(24, 30, 4, seed) for seed in range(6)]
    crf = DenseCRF(4, compiled=True)
    want = [crf(*pair) for pair in given]
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(lambda pair: crf(*pair), given))
    assert all(map(torch.equal, got, want))


def test_plain_python_is_the_same_loops():
    scores, image = smooth(6, 7, 3)
    pairwise = DenseCRF(3).pairwise(image)[0][0]
    want = mean_field_inplace(torch.log_softmax(scores, 1)[0].flatten(1).T.contiguous(), pairwise, 3)
    got = mean_field_compiled(scores[0].flatten(1).T, pairwise, 3, run=lambda function: function)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_parts_cover_every_pixel_and_number_vertices_densely():
    _, image = smooth(13, 11, 1)
    pairwise = PairwiseFilter([Lattice(spatial_features(13, 11)), Lattice(bilateral_features(image[0]))], [1, 1])
    visits = Visits(pairwise, run=lambda function: function)
    assert visits.bounds[0] == 0 and visits.bounds[-1] == 143 and len(visits.bounds) == PARTS + 1
    for part in range(PARTS):
        local, members = visits.local[visits.bounds[part]:visits.bounds[part + 1]], visits.members[part, :visits.counts[part]]
        assert len(set(members)) == len(members) and set(local.flatten()) == set(range(len(members)))
        shift = np.repeat(visits.starts[:2], [3, 6])
        assert (members[local] - shift == pairwise_columns(pairwise)[visits.bounds[part]:visits.bounds[part + 1]]).all()


def pairwise_columns(pairwise): return torch.cat([k.columns for k in pairwise.kernels], 1).numpy()


@numba
def test_what_the_visit_does_not_know_goes_to_pytorch(monkeypatch):
    import synseg.dense_crf as module
    monkeypatch.setattr(module, "mean_field_compiled", lambda *a: pytest.fail("compiled was called"))
    scores, image = smooth(12, 15, 3)
    DenseCRF(3, compiled=True)(scores.clone().requires_grad_(), image)[0, 0, 0, 0].backward()
    DenseCRF(3, compiled=True, trainable=True)(scores, image)
    DenseCRF(3, compiled=True, exact=True)(scores, image)
    DenseCRF(3, compiled=True, compatibility=torch.rand(3, 3))(scores, image)
    DenseCRF(3, compiled=True)(scores.double(), image.double())
    DenseCRF(3, compiled=False)(scores, image)
    monkeypatch.setenv("SYNSEG_COMPILED", "0")
    DenseCRF(3)(scores, image)


@numba
def test_it_is_taken_where_it_can_be(monkeypatch):
    import synseg.dense_crf as module
    monkeypatch.delenv("SYNSEG_COMPILED", raising=False)
    calls = []
    monkeypatch.setattr(module, "mean_field_compiled", lambda *a: calls.append(1) or mean_field_compiled(*a))
    DenseCRF(3)(*smooth(12, 15, 3))
    assert calls


@pytest.mark.parametrize("how", ["absent", "broken"])
def test_without_numba(monkeypatch, how):
    scores, image = smooth(12, 15, 3)
    want = DenseCRF(3, compiled=False)(scores, image)
    if how == "absent":
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "numba" else real(name, *more))
    else: monkeypatch.setitem(sys.modules, "numba", None)
    assert not wanted(None)
    assert torch.equal(DenseCRF(3)(scores, image), want)
    with pytest.raises(ValueError, match=r"pip install synseg\[fast\]"): DenseCRF(3, compiled=True)


def test_importing_the_package_does_not_import_numba():
    code = "import sys, synseg.dense_crf, synseg.compiled; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@numba
def test_machine_code_without_a_folder_to_keep_it(monkeypatch):
    import numba as package
    real = package.njit
    def njit(cache=False, **options):
        if cache: raise RuntimeError("cannot cache function")
        return real(**options)
    monkeypatch.setattr(package, "njit", njit)
    assert callable(compiled.__wrapped__(visit))


@numba
def test_pydensecrf():
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    scores, image = smooth(60, 83, 12)
    image, scores = (255*image).round()/255, scores.log_softmax(1)
    field = densecrf.DenseCRF2D(83, 60, 12)
    field.setUnaryEnergy(np.ascontiguousarray(-scores[0].flatten(1).numpy()))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=80, srgb=13, rgbim=np.ascontiguousarray((255*image[0]).round().byte().movedim(0, -1).numpy()), compat=10)
    want = torch.from_numpy(np.array(field.inference(10))).view(1, 12, 60, 83)
    got = DenseCRF(12, compiled=True)(scores, image)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(1), want.argmax(1))
