"The dense CRF against brute force, against pydensecrf, and against itself"
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from synseg.crf_fit import summary_of, turned, voc_samples
from synseg.dense_crf import DenseCRF, ExactFilter, dense_inference, gaussian_kernel, normalised
from synseg.filters import NORMALIZATIONS
from synseg.grid_crf import log_probs_from_labels
from synseg.lattice import bilateral_features
from synseg.metrics import confusion_counts


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def smooth_scores(k, height, width, n=1, seed=0, scale=3):
    "Log-probabilities that vary slowly over the image"
    noise = torch.randn(n, k, 7, 9, generator=torch.Generator().manual_seed(seed))
    return (scale * F.interpolate(noise, size=(height, width), mode="bilinear")).log_softmax(1)


def whole(image):
    "Colours in whole steps of 0-255, as pydensecrf takes them"
    return (image * 255).round() / 255


def photographs():
    "Five photographs in five sizes, one of them odd"
    data, datasets = pytest.importorskip("skimage.data"), pytest.importorskip("sklearn.datasets")
    pictures = dict(astronaut=data.astronaut(), coffee=data.coffee(), chelsea=data.chelsea(),
                    china=datasets.load_sample_image("china.jpg"), flower=datasets.load_sample_image("flower.jpg"))
    sizes = [(96, 128), (80, 120), (75, 113), (107, 160), (128, 90)]
    for (name, picture), size in zip(pictures.items(), sizes):
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        yield name, whole(F.interpolate(image, size=size, mode="area"))


def reference(log_probs, image, gaussian_xy=3, gaussian_weight=3, bilateral_xy=80, bilateral_rgb=13, bilateral_weight=10,
              iterations=10, normalization="symmetric"):
    "pydensecrf's marginals; weights may be (K, K) cost matrices"
    package = pytest.importorskip("pydensecrf.densecrf")
    norm = dict(symmetric=package.NORMALIZE_SYMMETRIC, before=package.NORMALIZE_BEFORE, after=package.NORMALIZE_AFTER,
                none=package.NO_NORMALIZATION)[normalization]
    k, h, w = log_probs.shape[1:]
    d = package.DenseCRF2D(w, h, k)
    d.setUnaryEnergy(np.ascontiguousarray(-log_probs[0].reshape(k, -1).numpy()))
    rgb = np.ascontiguousarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    if np.any(gaussian_weight): d.addPairwiseGaussian(sxy=gaussian_xy, compat=gaussian_weight, normalization=norm)
    if np.any(bilateral_weight):
        d.addPairwiseBilateral(sxy=bilateral_xy, srgb=bilateral_rgb, rgbim=rgb, compat=bilateral_weight, normalization=norm)
    return torch.from_numpy(np.array(d.inference(iterations))).view(1, k, h, w)


def assert_same_answer(ours, theirs, what=""):
    "The promise: marginals within 1e-4, the same label at 99.99 % of the pixels or more"
    assert (ours - theirs).abs().max() < 1e-4, f"{what}: {(ours - theirs).abs().max():.1e}"
    equal = (ours.max(1).indices == theirs.max(1).indices).float().mean()
    assert equal >= 0.9999, f"{what}: {100 * equal:.3f} % of the labels"


KERNELS = {"gaussian": dict(bilateral_weight=0), "bilateral": dict(gaussian_weight=0), "both": {}}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_same_as_pydensecrf_on_photographs(kernels, normalization):
    for i, (name, image) in enumerate(photographs()):
        # without normalisation a pixel hears thousands: weights that leave a few votes' worth, as the others do
        weights = dict(gaussian_weight=0.06, bilateral_weight=0.005) if normalization == "none" else {}
        settings = weights | KERNELS[kernels] | dict(normalization=normalization, iterations=(10, 1, 3, 5, 7)[i])
        scores = smooth_scores(5, *image.shape[2:], seed=i)
        assert_same_answer(DenseCRF(5, **settings)(scores, image), reference(scores, image, **settings), f"{name} {settings}")


def test_raw_sums_are_as_far_from_double_precision_as_pydensecrf_s():
    "Customary weights without normalisation: 10,000 votes and more, so that single precision itself moves marginals by 1e-3"
    for i, (name, image) in enumerate(photographs()):
        settings, scores = dict(normalization="none", iterations=5), smooth_scores(5, *image.shape[2:], seed=i)
        ours, theirs = DenseCRF(5, **settings)(scores, image), reference(scores, image, **settings)
        exact = DenseCRF(5, **settings)(scores.double(), image.double())
        assert (ours - exact).abs().max() < 3 * (theirs - exact).abs().max() + 1e-3, name
        assert (ours.max(1).indices == theirs.max(1).indices).float().mean() >= 0.9999


@pytest.mark.parametrize("iterations", range(1, 11))
def test_same_as_pydensecrf_after_each_iteration(iterations):
    name, image = next(photographs())
    scores = smooth_scores(4, *image.shape[2:], seed=3)
    ours = DenseCRF(4, iterations=iterations)(scores, image)
    assert_same_answer(ours, reference(scores, image, iterations=iterations))


def test_same_as_pydensecrf_with_other_widths_and_costs():
    for i, (name, image) in enumerate(photographs()):
        scores = smooth_scores(4, *image.shape[2:], seed=i)
        settings = dict(gaussian_xy=(2, 5), gaussian_weight=2, bilateral_xy=(30, 10), bilateral_rgb=5, bilateral_weight=4, iterations=4)
        assert_same_answer(DenseCRF(4, **settings)(scores, image), reference(scores, image, **settings), name)
        mu = np.random.default_rng(i).random((4, 4)).astype(np.float32)
        mu = mu + mu.T  # pydensecrf makes matrices symmetric
        costs = dict(gaussian_weight=np.ascontiguousarray(2 * mu), bilateral_weight=np.ascontiguousarray(4 * mu))
        assert_same_answer(DenseCRF(4, **settings, compatibility=torch.from_numpy(mu))(scores, image),
                           reference(scores, image, **settings | costs), name)


@pytest.fixture(scope="module")
def voc(data_root):
    return voc_samples(data_root("voc_samples").parent)


def test_same_as_pydensecrf_on_network_outputs(voc):
    for i, s in enumerate(voc):
        settings = dict(iterations=2) if i % 3 else dict(bilateral_xy=50, bilateral_rgb=4, bilateral_weight=5, iterations=2)
        ours = DenseCRF(21, **settings)(s.log_probs[None], s.image[None])
        assert_same_answer(ours, reference(s.log_probs[None], s.image[None], **settings), f"sample {i}, {tuple(s.label.shape)}")


FITTED = dict(bilateral_xy=50, bilateral_rgb=4, bilateral_weight=5)


@pytest.mark.parametrize("settings, expected", [(None, (76.90, 95.03)), (FITTED, (78.25, 95.61)), ({}, (66.19, 93.66))], ids=("network", "fitted", "customary"))
def test_published_scores_on_ten_photographs(voc, settings, expected):
    "The published scores were made with the row as first feature: the picture on its side"
    counts = []
    for s in map(turned, voc):
        q = s.log_probs[None] if settings is None else DenseCRF(21, **settings)(s.log_probs[None], s.image[None])
        counts.append(confusion_counts(q, s.label[None], 21)[0])
    summary = summary_of(torch.stack(counts))
    assert 100 * summary["mean_iou"] == pytest.approx(expected[0], abs=0.006)
    assert 100 * summary["pixel_accuracy"] == pytest.approx(expected[1], abs=0.006)


@pytest.fixture(scope="module")
def small(data_root):
    with np.load(data_root("densecrf") / "exact_small.npz") as z:
        return {name: torch.from_numpy(z[name]) for name in z.files}


EXACT = dict(gaussian_xy=1, bilateral_xy=20)


@pytest.mark.parametrize("self_term", (True, False))
def test_exact_meets_brute_force(small, self_term):
    image, scores = small["image"].permute(2, 0, 1)[None].float() / 255, -small["unary"][None]
    crf = DenseCRF(2, **EXACT, exact=True, self_term=self_term)
    filters = crf.pairwise(image)
    for crf.iterations in (1, 2, 5, 10):
        q = crf(scores, image, filters)[0]
        assert (q - small[f"q_exact_{'self' if self_term else 'noself'}_{crf.iterations}"]).abs().max() < 1e-5


def test_lattice_is_as_near_to_brute_force_as_a_lattice_is(small):
    image, scores = small["image"].permute(2, 0, 1)[None].float() / 255, -small["unary"][None]
    for steps in (1, 2, 5, 10):
        q, exact = DenseCRF(2, **EXACT, iterations=steps)(scores, image)[0], small[f"q_exact_self_{steps}"]
        assert (q - exact).abs().mean() < 3e-3
        assert (q.max(0).indices == exact.max(0).indices).float().mean() > 0.997
        # the file's lattice took the row first
        side = DenseCRF(2, **EXACT, iterations=steps)(scores.mT.contiguous(), image.mT.contiguous())[0].mT
        assert (side - small[f"q_permutohedral_{steps}"]).abs().max() < 1e-4


@pytest.mark.parametrize("name, share", [("1", 1), ("1-b", 0.9998), ("2", 1), ("3", 1)])
def test_published_examples(data_root, name, share):
    read = lambda kind, n: torch.from_numpy(np.array(Image.open(data_root("densecrf") / f"{kind}{n}.png").convert("RGB"))).long()
    codes = lambda picture: picture @ torch.tensor([65536, 256, 1])
    marks, expected = codes(read("anno", name)), codes(read("out", name))
    colours = marks.unique()[1:] if (marks == 0).any() else marks.unique()
    labels = torch.where(marks == 0, 255, torch.searchsorted(colours, marks))
    image = read("im", name[0]).permute(2, 0, 1)[None].float() / 255
    scores = log_probs_from_labels(labels[None], len(colours), 0.7)
    for on_side, least in ((True, share), (False, 0.9985)):
        turn = (lambda t: t.mT.contiguous()) if on_side else (lambda t: t)
        q = turn(DenseCRF(len(colours), iterations=5)(turn(scores), turn(image)))
        assert (colours[q.max(1).indices[0]] == expected).float().mean() >= least


def test_kernel_and_normalisations():
    features = torch.rand(23, 5) * 3
    slow = torch.tensor([[math.exp(-((a - b) ** 2).sum() / 2) for b in features.double()] for a in features.double()])
    torch.testing.assert_close(gaussian_kernel(features), slow.double(), rtol=0, atol=1e-6)
    assert gaussian_kernel(features, self_term=False).diag().abs().max() == 0
    n = 1 / slow.double().sum(1)
    wanted = dict(none=slow, before=slow * n[None], after=slow * n[:, None], symmetric=slow * (n[:, None] * n[None]).sqrt())
    for name in NORMALIZATIONS:
        torch.testing.assert_close(normalised(gaussian_kernel(features), name), wanted[name].double(), rtol=0, atol=1e-5)


def test_update_pixel_by_pixel():
    "The formula of the paper, in loops"
    image, scores = torch.rand(1, 3, 3, 4), torch.randn(1, 3, 3, 4)
    settings = dict(gaussian_xy=1.5, gaussian_weight=0.7, bilateral_xy=3, bilateral_rgb=70, bilateral_weight=1.3)
    mu = torch.rand(3, 3)
    k = ExactFilter([gaussian_features(image[0], 1.5), bilateral_features(image[0], 3, 70)], [0.7, 1.3], "none", self_term=False).matrix
    q = scores[0].flatten(1).T.softmax(1).double()
    for _ in range(2):
        new = torch.zeros_like(q)
        for i in range(12):
            for label in range(3):
                paid = sum(mu[label, other] * k[i, j] * q[j, other] for j in range(12) if j != i for other in range(3))
                new[i, label] = scores[0, label].flatten()[i] - paid
        q = new.softmax(1)
    ours = DenseCRF(3, **settings, iterations=2, normalization="none", compatibility=mu, exact=True, self_term=False)(scores, image)
    torch.testing.assert_close(ours[0].flatten(1).T.double(), q, rtol=0, atol=1e-5)


def gaussian_features(image, xy):
    y, x = torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2) / xy


@pytest.mark.parametrize("exact", (True, False))
def test_weights_of_zero_return_the_softmax(exact):
    scores, image = torch.randn(2, 4, 11, 13), torch.rand(2, 3, 11, 13)
    torch.testing.assert_close(DenseCRF(4, gaussian_weight=0, bilateral_weight=0, exact=exact)(scores, image), scores.softmax(1), rtol=0, atol=1e-6)
    silent = DenseCRF(4, gaussian_weight=0, bilateral_weight=0, trainable=True, exact=exact)
    torch.testing.assert_close(silent(scores, image).detach(), scores.softmax(1), rtol=0, atol=1e-6)
    assert torch.equal(DenseCRF(4, iterations=0, exact=exact)(scores, image).max(1).indices, scores.max(1).indices)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (17, 23), (31, 30)])
@pytest.mark.parametrize("k", (1, 2, 5))
def test_sizes_and_batches(size, k):
    scores, image = torch.randn(3, k, *size), torch.rand(3, 3, *size)
    crf = DenseCRF(k, 2, 1, 10, 20, 2, iterations=3)
    q = crf(scores, image)
    assert q.shape == scores.shape and q.dtype == scores.dtype
    torch.testing.assert_close(q.sum(1), torch.ones(3, *size), rtol=0, atol=1e-5)
    for i in range(3): torch.testing.assert_close(crf(scores[i:i + 1], image[i:i + 1]), q[i:i + 1])
    torch.testing.assert_close(crf(scores, image, pairwise=crf.pairwise(image)), q)
    assert crf(scores[:0], image[:0]).shape == (0, k, *size)


def test_scores_need_not_be_normalised_nor_contiguous():
    scores, image = torch.randn(2, 4, 15, 18), torch.rand(2, 3, 15, 18)
    crf = DenseCRF(4)
    q = crf(scores, image)
    torch.testing.assert_close(crf(scores + 30 * torch.randn(2, 1, 15, 18), image), q, rtol=0, atol=1e-4)
    torch.testing.assert_close(crf(scores.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)), q)
    torch.testing.assert_close(crf(scores.mT.contiguous().mT, image), q)


def test_other_types():
    scores, image = torch.randn(1, 3, 14, 19), torch.rand(1, 3, 14, 19)
    crf = DenseCRF(3, bilateral_xy=10)
    q = crf(scores, image)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        other = crf(scores.to(dtype), image)
        assert other.dtype == dtype
        assert (other.float() - crf(scores.to(dtype).float(), image)).abs().max() < tolerance
    assert (crf(scores, image.half()) - crf(scores, image.half().float())).abs().max() < 1e-5
    assert (crf(scores.double(), image.double()).float() - q).abs().max() < 1e-4


def test_the_fast_loop_equals_the_plain_one():
    for scale, weight in ((1, 3), (60, 3), (1, 200)):  # extreme scores; votes too loud for the fast loop
        scores, image = scale * torch.randn(1, 6, 21, 25), torch.rand(1, 3, 21, 25)
        crf = DenseCRF(6, gaussian_weight=weight, bilateral_xy=8, bilateral_rgb=30, bilateral_weight=weight, iterations=4)
        fast, plain = crf(scores, image), crf.log_marginals(scores, image).exp()
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-3 if weight > 100 else 1e-4)


def test_minus_infinity_forbids_a_label():
    scores, image = torch.randn(1, 3, 12, 12), torch.rand(1, 3, 12, 12)
    scores[:, 2, :6] = -math.inf
    for q in (DenseCRF(3)(scores, image), DenseCRF(3, exact=True)(scores, image)):
        assert q.isfinite().all() and q[:, 2, :6].max() < 1e-6


def test_potts_in_three_spellings():
    scores, image = torch.randn(1, 4, 16, 17), torch.rand(1, 3, 16, 17)
    for normalization in NORMALIZATIONS:
        make = lambda **more: DenseCRF(4, 2, 1, 6, 40, 2, iterations=3, normalization=normalization, **more)(scores, image).detach()
        for other in (make(compatibility=1 - torch.eye(4)), make(compatibility=-torch.eye(4)), make(trainable=True)):
            torch.testing.assert_close(other, make(), rtol=0, atol=2e-5)


def test_constant_image_is_smoothed_and_labels_follow_edges():
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 1
    truth = (image[:, 0] > 0.5).long()
    noisy = torch.where(torch.rand(1, 24, 24) < 0.25, 1 - truth, truth)
    q = DenseCRF(2, gaussian_weight=0, bilateral_xy=10)(log_probs_from_labels(noisy, 2, 0.7), image)
    assert (noisy != truth).float().mean() > 0.15 and torch.equal(q.max(1).indices, truth)


def test_free_energy_never_rises_with_the_own_vote():
    for seed in range(4):
        torch.manual_seed(seed)
        scores, image = 2 * torch.randn(1, 3, 9, 10), torch.rand(1, 3, 9, 10)
        crf = DenseCRF(3, 1, 20, 5, 40, 20, exact=True)
        filters, values = crf.pairwise(image), []
        for crf.iterations in range(8): values.append(crf.kl(crf(scores, image, filters), scores, image, filters).item())
        assert (np.diff(values) < 1e-4).all()


def test_energy_and_divergence_by_enumeration():
    image, scores = torch.rand(1, 3, 2, 3), torch.randn(1, 2, 2, 3)
    mu = torch.tensor([[0.0, 1.0], [1.0, 0.3]])
    crf = DenseCRF(2, 1, 0.8, 2, 50, 1.2, normalization="none", compatibility=mu, exact=True, self_term=False)
    filters = crf.pairwise(image)
    labelings = torch.tensor([[n >> i & 1 for i in range(6)] for n in range(64)]).view(64, 2, 3)
    energies = crf.energy(labelings, scores.expand(64, -1, -1, -1), image.expand(64, -1, -1, -1), filters * 64)
    k = filters[0][0].matrix
    for n in (0, 13, 63):
        x = labelings[n].flatten()
        slow = -sum(scores[0].flatten(1)[x[i], i] for i in range(6)) + sum(mu[x[i], x[j]] * k[i, j] for i in range(6) for j in range(i))
        assert energies[n].item() == pytest.approx(slow.item(), abs=1e-5)
    q = torch.rand(1, 2, 2, 3).softmax(1)
    log_q = q[0].flatten(1).log().T[torch.arange(6), labelings.flatten(1)].sum(1).double()
    slow = (log_q.exp() * (log_q + energies)).sum()
    assert crf.kl(q, scores, image).item() == pytest.approx(slow.item(), abs=1e-5)


def test_energy_of_the_lattice_is_near_the_exact_one():
    scores, image = smooth_scores(3, 24, 30), next(photographs())[1][..., :24, :30]
    labels = scores.max(1).indices
    exact, fast = (DenseCRF(3, bilateral_xy=20, exact=e).energy(labels, scores, image) for e in (True, False))
    assert fast.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients(exact, normalization):
    image = torch.rand(2, 3, 3, 4, dtype=torch.float64)
    crf = DenseCRF(3, 1, 0.6, 3, 60, 0.9, iterations=2, trainable=True, exact=exact, normalization=normalization).double()
    filters, names = crf.pairwise(image), [name for name, _ in crf.named_parameters()]
    assert names == ["compatibility", "gaussian_weight", "bilateral_weight"]

    def run(scores, *values):
        return torch.func.functional_call(crf, dict(zip(names, values)), (scores, image, filters))

    values = [torch.rand_like(p, requires_grad=True) for p in crf.parameters()]
    assert torch.autograd.gradcheck(run, [torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True), *values])


def test_gradients_reach_the_scores_without_parameters():
    scores, image = torch.randn(1, 3, 10, 12, requires_grad=True), torch.rand(1, 3, 10, 12)
    crf = DenseCRF(3, bilateral_xy=10, iterations=3)
    assert not list(crf.parameters()) and set(crf.state_dict()) == {"compatibility"}
    crf(scores, image)[0, 0].sum().backward()
    assert scores.grad.isfinite().all() and scores.grad.abs().sum() > 0
    with torch.no_grad(): assert not crf(scores, image).requires_grad


def test_errors_say_what_to_do():
    crf, scores, image = DenseCRF(3), torch.randn(1, 3, 8, 9), torch.rand(1, 3, 8, 9)
    wrong = [(lambda: crf(scores, image[..., :8]), "resize the scores to the image"), (lambda: crf(scores[:, :2], image), r"expected \(N, 3, H, W\)"),
             (lambda: crf(scores[0], image[0]), "expected"), (lambda: crf(scores, image * 255), "divide by 255"),
             (lambda: crf(scores, image[:, :1]), r"expected \(N, 3, H, W\)"), (lambda: crf(scores, image.repeat(2, 1, 1, 1)), "one number"),
             (lambda: crf(scores.softmax(1), image), "expected their logarithm"), (lambda: crf(scores * math.nan, image), "NaN"),
             (lambda: crf(scores, image * math.nan), "image"), (lambda: DenseCRF(0), "num_classes=0"), (lambda: DenseCRF(3, iterations=-1), "iterations=-1"),
             (lambda: DenseCRF(3, normalization="both"), "choose one of|expected one of"), (lambda: DenseCRF(3, self_term=False), "needs exact=True"),
             (lambda: DenseCRF(3, compatibility=torch.eye(2)), r"expected \(3, 3\)"), (lambda: DenseCRF(3, bilateral_rgb=0)(scores, image), "above zero"),
             (lambda: crf.energy(torch.full((1, 8, 9), 255), scores, image), "void"), (lambda: crf.energy(torch.full((1, 8, 9), 3), scores, image), "3"),
             (lambda: crf.energy(torch.zeros(1, 9, 8).long(), scores, image), "expected"),
             (lambda: dense_inference(torch.zeros(1, 2, 200, 200), torch.zeros(1, 3, 200, 200)), "use the lattice")]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message): call()


def test_dense_inference_is_the_exact_form():
    scores, image = torch.randn(1, 3, 8, 9), torch.rand(1, 3, 8, 9)
    torch.testing.assert_close(dense_inference(scores, image), DenseCRF(3, exact=True)(scores, image))
    torch.testing.assert_close(dense_inference(scores, image, self_term=False, iterations=2), DenseCRF(3, exact=True, self_term=False, iterations=2)(scores, image))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_marginals():
    scores, image = smooth_scores(5, 60, 81), torch.rand(1, 3, 60, 81)
    crf = DenseCRF(5)
    assert (crf.cuda()(scores.cuda(), image.cuda()).cpu() - crf.cpu()(scores, image)).abs().max() < 1e-4
