"Convolutional CRFs: brute force, the dense CRF's exact form, the authors' arithmetic, gradients, batches, memory"
import math

import pytest
import torch
import torch.nn.functional as F

from synseg.check import count_parameters
from synseg.conv_crf import ConvCRF, noisy_log_probs, window_study
from synseg.core import VOID
from synseg.metrics import ConfusionMatrix
from synseg.window import peak_bytes


def street(n=1, k=4, h=11, w=14, seed=0, dtype=torch.float32):
    "Scores and images with areas of one colour"
    g = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(n, 3, 3, 4, generator=g), (h, w)) + 0.05 * torch.randn(n, 3, h, w, generator=g)
    return 2 * torch.randn(n, k, h, w, generator=g).to(dtype), image.clamp(0, 1).to(dtype)


def brute_force(crf, log_probs, image):
    "Mean field over all pairs of pixels of one image, in float64"
    h, w = image.shape[-2:]
    near, far, rgb = crf.inverse_sigmas.double()
    at = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2).double()
    colour = image[0].double().flatten(1).T * 255 * rgb
    gauss = lambda f: torch.exp(-0.5 * (f[:, None] - f).square().sum(-1))
    kernels = [gauss(at * near), gauss(torch.cat([at * far, colour], 1))]
    if not crf.self_term: kernels = [k - torch.eye(h * w) for k in kernels]
    if crf.normalization == "symmetric": kernels = [k / (k.sum(1)[:, None] * k.sum(1)).sqrt() for k in kernels]
    pairs = sum(a * k for a, k in zip(crf.weights.double(), kernels))
    unary = log_probs[0].double().flatten(1).T.log_softmax(1)
    cost = -torch.eye(crf.num_classes).double() if crf.compatibility is None else crf.compatibility.double()
    q = unary.softmax(1)
    for _ in range(crf.iterations):
        message = -(pairs @ q) @ cost.T
        q = (unary + message if crf.class_weight is None else torch.lerp(unary, message, crf.class_weight.double())).softmax(1)
    return q.T.view(log_probs.shape)


MILD = dict(gaussian_xy=2.0, gaussian_weight=0.05, bilateral_xy=4.0, bilateral_weight=0.08)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("options", [
    dict(), dict(normalization="none"), dict(gaussian_weight=2.0, bilateral_weight=3.0), dict(bilateral_xy=None),
    dict(class_weight=0.3), dict(class_weight=torch.tensor([0.1, 0.2, 0.5, 0.9])), dict(compatibility=torch.rand(4, 4)), dict(iterations=1)])
def test_equals_brute_force_when_the_window_covers_the_image(own, options):
    crf = ConvCRF(4, 27, **MILD | dict(self_term=own) | options)
    log_probs, image = street()
    want = brute_force(crf, log_probs, image)
    assert (want - log_probs.double().softmax(1)).abs().max() > 1e-3  # the pairs do something
    torch.testing.assert_close(crf(log_probs, image).double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(crf.double()(log_probs.double(), image.double()), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_equals_the_exact_dense_crf(own, normalization):
    from synseg.dense_crf import DenseCRF
    log_probs, image = street(seed=1, h=17, w=9)
    settings = MILD | dict(normalization=normalization, self_term=own, iterations=5)
    want = DenseCRF(4, exact=True, **settings)(log_probs.double(), image.double())
    torch.testing.assert_close(ConvCRF(4, 33, **settings)(log_probs, image), want.float(), rtol=1e-4, atol=1e-5)


def test_exact_solution_of_the_reference(data_root):
    "The 80x60 picture solved by brute force elsewhere: with and without oneself"
    np = pytest.importorskip("numpy")
    solved = np.load(data_root("densecrf") / "exact_small.npz")
    image = torch.from_numpy(solved["image"]).permute(2, 0, 1)[None].float() / 255
    log_probs = -torch.from_numpy(solved["unary"]).float()[None]
    for own, name, steps in ((True, "self", 2), (False, "noself", 1)):  # each step visits every pair of pixels
        crf = ConvCRF(2, 161, steps, gaussian_xy=1, gaussian_weight=3, bilateral_xy=20, bilateral_rgb=13, bilateral_weight=10, self_term=own)
        with torch.no_grad(): q = crf(log_probs, image)
        want = torch.from_numpy(solved[f"q_exact_{name}_{steps}"])[None].double()
        torch.testing.assert_close(q.double(), want, rtol=0, atol=2e-5)


def as_released(log_probs, image, k, cell, w=0.2, iterations=5):
    "The arithmetic of the authors' code, unfolded"
    h, width = image.shape[-2:]
    def unfolded(f, q):
        windows = lambda x: F.unfold(x, k, padding=k // 2).view(len(x), x.shape[1], k * k, *x.shape[-2:])
        inside = windows(torch.ones_like(q[:, :1]))
        return (torch.exp(-0.5 * (windows(f) - f[:, :, None]).square().sum(1, keepdim=True)) * inside * windows(q)).sum(2)
    at = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(width), indexing="ij"))[None].float().expand(len(image), -1, -1, -1)
    near, alike = F.avg_pool2d(at / 3, cell), F.avg_pool2d(image * 255 / 13, cell)
    unary = z = log_probs.log_softmax(1)
    for step in range(iterations):
        small = F.avg_pool2d(z.softmax(1) if step else z, cell)
        message = 3 * unfolded(near, small) + 10 * unfolded(alike, small)
        z = (1 - w) * unary + w * F.interpolate(message, scale_factor=cell, mode="bilinear")
    return z.log_softmax(1)


@pytest.mark.parametrize("k,cell", [(3, 1), (7, 1), (5, 2), (3, 4)])
def test_published_is_the_released_arithmetic(k, cell):
    log_probs, image = street(2, 5, 24, 36, seed=2)
    got, want = ConvCRF.published(5, k, blur=cell).log_marginals(log_probs, image), as_released(log_probs, image, k, cell)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)  # logarithms down to -1000
    torch.testing.assert_close(got.exp(), want.exp(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(blur=2), dict(blur=3, normalization="none", log_first=True), dict(self_term=False)])
def test_gradients(options):
    log_probs, image = street(2, 3, 4, 5, seed=3, dtype=torch.float64)
    crf = ConvCRF(3, 3, 2, **MILD | dict(class_weight=0.4, compatibility=1 - torch.eye(3), trainable=True) | options).double()
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in crf.named_parameters()))
    assert len(names) == 4 and count_parameters(crf) == 3 + 2 + 3 + 9
    call = lambda p, x, *v: torch.func.functional_call(crf, dict(zip(names, v)), (p, x))
    inputs = [log_probs.requires_grad_(), (image * 0.05).requires_grad_(), *values]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("h,w", [(1, 1), (1, 17), (9, 1), (6, 7), (37, 53)])
@pytest.mark.parametrize("blur", [1, 2, 4])
def test_any_size(h, w, blur):
    log_probs, image = street(2, 3, h, w)
    q = ConvCRF(3, 7, blur=blur)(log_probs, image)
    assert q.shape == log_probs.shape and q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(2, h, w), rtol=1e-5, atol=1e-5)


def test_images_of_a_batch_do_not_meet():
    log_probs, image = street(3, seed=4)
    crf = ConvCRF(4, 7)
    together = crf(log_probs, image)
    for i in range(3): torch.testing.assert_close(together[i:i + 1], crf(log_probs[i:i + 1], image[i:i + 1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(crf(log_probs, image, pairwise=crf.pairwise(image)), together, rtol=0, atol=0)


def test_a_pixel_reaches_as_far_as_window_times_iterations():
    log_probs, image = street(h=5, w=40, dtype=torch.float64)
    changed = log_probs.clone()
    changed[..., 0] += torch.tensor([5.0, -5.0, 0.0, 0.0])[:, None]
    crf = ConvCRF(4, 5, 3, normalization="none", **MILD).double()
    touched = (crf(log_probs, image) - crf(changed, image)).abs().amax((0, 1, 2)) > 0
    assert touched[:3].all() and not touched[7:].any()  # 3 steps of 2 pixels


def test_limits():
    log_probs, image = street()
    torch.testing.assert_close(ConvCRF(4, gaussian_weight=0, bilateral_weight=0)(log_probs, image), log_probs.softmax(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ConvCRF(4, iterations=0)(log_probs, image), log_probs.softmax(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ConvCRF(4)(log_probs + 7, image), ConvCRF(4)(log_probs, image), rtol=1e-4, atol=1e-5)
    potts = ConvCRF(4, compatibility=1 - torch.eye(4))(log_probs, image)
    torch.testing.assert_close(potts, ConvCRF(4)(log_probs, image), rtol=1e-3, atol=1e-5)
    turn = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(ConvCRF(4)(log_probs[:, turn], image), ConvCRF(4)(log_probs, image)[:, turn], rtol=1e-4, atol=1e-5)
    flip = ConvCRF(4)(log_probs.flip(-1), image.flip(-1)).flip(-1)
    torch.testing.assert_close(flip, ConvCRF(4)(log_probs, image), rtol=1e-4, atol=1e-5)


def test_types():
    log_probs, image = street()
    want = ConvCRF(4)(log_probs, image)
    half = ConvCRF(4)(log_probs.bfloat16(), image)
    assert half.dtype == torch.bfloat16 and (half.float() - want).abs().mean() < 0.02
    assert ConvCRF(4)(log_probs.double(), image).dtype == torch.float64
    torch.testing.assert_close(ConvCRF(4).log_marginals(log_probs, image).exp(), want, rtol=1e-4, atol=1e-6)


def test_mixed_precision_leaves_it_alone():
    log_probs, image = street()
    crf = ConvCRF(4, compatibility=1 - torch.eye(4))
    want = crf(log_probs, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(crf(log_probs, image), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(crf(log_probs, image, pairwise=crf.pairwise(image)), want, rtol=1e-5, atol=1e-6)


def test_extreme_scores_stay_finite():
    log_probs, image = street(seed=5)
    scores = (1e4 * log_probs).requires_grad_()
    q = ConvCRF(4, trainable=True)(scores, image)
    q[:, 0].sum().backward()
    assert q.isfinite().all() and scores.grad.isfinite().all()


def test_parameters_and_state():
    assert count_parameters(ConvCRF(4)) == 0
    trained = ConvCRF(4, gaussian_weight=1.5, class_weight=0.3, trainable=True)
    assert count_parameters(trained) == 3 + 2 + 4
    fixed = ConvCRF(4, class_weight=0.1)
    fixed.load_state_dict(trained.state_dict())
    log_probs, image = street()
    torch.testing.assert_close(fixed(log_probs, image), trained(log_probs, image), rtol=0, atol=0)
    assert "window 11" in repr(fixed)


def test_learns_through_a_network():
    torch.manual_seed(0)
    image = street(4, 3, 16, 16, seed=6)[1]
    labels = (image.sum(1) > image.sum(1).mean()).long() + (image[:, 0] > 0.6)
    net, crf = torch.nn.Conv2d(3, 3, 1), ConvCRF(3, 5, 3, gaussian_weight=0.3, bilateral_weight=0.5, trainable=True)
    optimiser = torch.optim.Adam([*net.parameters(), *crf.parameters()], lr=0.1)
    losses = []
    for _ in range(30):
        loss = F.nll_loss(crf.log_marginals(net(image), image), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in [*net.parameters(), crf.weights])


def test_memory_stays_near_half_a_kernel():
    "Bytes of all tensors made, at a quarter of 360x480 with 12 classes and a window of 11; unfolding needs 2 x 121 x 12 planes"
    log_probs, image = street(1, 12, 180, 240)
    plane = 180 * 240 * 4
    with torch.no_grad():
        for crf in (ConvCRF(12, iterations=2), ConvCRF.published(12, blur=1, iterations=2)):
            assert peak_bytes(lambda: crf(log_probs, image)) < (60 + 9 * 12) * plane  # 116 MB at 360x480
        assert peak_bytes(lambda: ConvCRF(12, iterations=2, blur=4)(log_probs, image)) < 90 * plane


@pytest.mark.parametrize("options,words", [
    (dict(kernel_size=10), "odd"), (dict(kernel_size=-1), "odd"), (dict(normalization="before"), "symmetric or none"), (dict(blur=0), "blur=0"),
    (dict(iterations=-1), "iterations=-1"), (dict(bilateral_rgb=0), "positive"), (dict(class_weight=torch.ones(3)), "one number for each class"),
    (dict(compatibility=torch.eye(3)), r"expected \(4, 4\)")])
def test_settings_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words): ConvCRF(4, **options)


def test_inputs_that_do_not_fit():
    log_probs, image = street()
    crf = ConvCRF(4)
    for p, x, words in ((log_probs[0], image, r"expected \(N, 4, H, W\)"), (log_probs[:, :3], image, r"expected \(N, 4, H, W\)"),
                        (log_probs, image[..., 1:], "resize the scores"), (log_probs, image.repeat(2, 1, 1, 1), "one number and one size"),
                        (log_probs, image * 255, "divide by 255"), (log_probs, (image * 255).byte(), "divide by 255"),
                        (log_probs.long(), image, "floating point")):
        with pytest.raises(ValueError, match=words): crf(p, x)


def test_noisy_log_probs():
    labels = torch.randint(0, 5, (3, 5, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :3, :3] = VOID
    same = noisy_log_probs(labels, 5, cell=8, keep=1.0)
    torch.testing.assert_close(same.exp().sum(1), torch.ones(3, 40, 32), rtol=1e-4, atol=1e-4)
    centre = lambda x: x[..., 4::8, 4::8]
    assert (centre(same.max(1).indices) == centre(labels)).float().mean() > 0.9
    assert math.isclose(same.exp().max().item(), 0.7 + 0.3 / 5, rel_tol=1e-3)
    spoiled = noisy_log_probs(labels, 5, cell=8, keep=0.5, seed=1)
    assert (spoiled.max(1).indices == labels).float().mean() < (same.max(1).indices == labels).float().mean()
    torch.testing.assert_close(spoiled, noisy_log_probs(labels, 5, cell=8, keep=0.5, seed=1), rtol=0, atol=0)
    assert noisy_log_probs(labels[:, :37, :29], 5).shape == (3, 5, 37, 29)


def test_window_study_counts_as_the_confusion_matrix_does():
    log_probs, image = street(5, 4, 20, 20)
    labels = torch.randint(0, 3, (5, 20, 20))  # class 3 is never true
    labels[:, :4] = VOID
    row = window_study({}, (), (log_probs, image, labels))["unary"]
    matrix = ConfusionMatrix(4).update(log_probs.max(1).indices, labels)
    assert math.isclose(row["mean_iou"], matrix.mean_iou(), rel_tol=1e-9)
    assert math.isclose(row["pixel_accuracy"], matrix.pixel_accuracy(), rel_tol=1e-9)


def test_window_study_chooses_on_other_images():
    log_probs, image = street(6, 3, 12, 12)
    labels = log_probs.max(1).indices
    keep, spoil = (lambda p, x: p), (lambda p, x: -p)
    rows = window_study({"a": [spoil, keep], "b": [spoil]}, (log_probs[:2], image[:2], labels[:2]), (log_probs[2:], image[2:], labels[2:]))
    assert list(rows) == ["unary", "a", "b"] and rows["a"]["mean_iou"] == rows["unary"]["mean_iou"] == 1
    assert rows["b"]["mean_iou"] < 0.2 and rows["a"]["seconds"] > 0 and "function" in rows["a"]["chosen"]
