"Distances between sets and pairs of pictures: closed forms, other people's code on the same features, and names that say whose features"
import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from synseg import realism
from synseg.backbone import InceptionFeatures
from synseg.check import expect_fail, test_same
from synseg.realism import Features, feature_extractor, frechet_distance, kernel_distance, perceptual_distance, squared_mmd, ssim
from synseg.zoo import create_model


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) * scale
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + shift


def with_moments(n, mean, std, seed):
    "A sample whose mean and covariance (N - 1) are exactly these, the covariance diagonal"
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    q = torch.linalg.qr(x).Q * (n - 1)**0.5
    return q * torch.tensor(std).double() + torch.tensor(mean, dtype=torch.float64)


def test_frechet_of_diagonal_gaussians():
    x = with_moments(40, [0.0, 1.0, -2.0], [1.0, 0.5, 3.0], 1)
    y = with_moments(31, [0.3, 1.0, 2.0], [2.0, 0.5, 0.0], 2)
    want = 0.09 + 16 + 1 + 9
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(y, x) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("n", [2, 7, 30, 200])
def test_frechet_of_a_set_to_itself_is_zero_also_where_singular(n):
    x = normal(n, 30, scale=100.0)
    assert 0 <= frechet_distance(x, x) < 1e-9 * float(x.var(0).sum())


def test_frechet_invariants():
    x, y = normal(50, 9, 1), normal(33, 9, 2, shift=0.5)
    d, turn = frechet_distance(x, y), torch.linalg.qr(normal(9, 9, 3)).Q
    assert frechet_distance(x @ turn + 7, y @ turn + 7) == pytest.approx(d, rel=1e-9)
    assert frechet_distance(-3 * x, -3 * y) == pytest.approx(9 * d, rel=1e-9)
    assert frechet_distance(x.flip(0), y) == pytest.approx(d, rel=1e-12)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(d, rel=1e-5)


def test_frechet_against_the_symmetric_root():
    x, y = normal(60, 12, 4), normal(70, 12, 5)
    values, vectors = torch.linalg.eigh(x.T.cov())
    half = vectors * values.sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ y.T.cov() @ half).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(float(want), rel=1e-10)


@pytest.mark.parametrize("n, m, rel", [(300, 200, 1e-10), (20, 25, 1e-5)])
def test_frechet_as_torchmetrics(n, m, rel):
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = normal(n, 40, 6), normal(m, 40, 7)
    theirs = fid._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(float(theirs), rel=rel)


@pytest.mark.parametrize("n, m, rel", [(300, 200, 1e-10), (20, 25, 1e-5)])
def test_frechet_as_torch_fidelity(n, m, rel):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(n, 40, 6), normal(m, 40, 7)
    a, b = (fid.fid_features_to_statistics(v) for v in (x, y))
    theirs = fid.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=rel)


def test_bad_features():
    x = normal(5, 3)
    for measure in (frechet_distance, squared_mmd, kernel_distance):
        with expect_fail(ValueError, "two or more"): measure(x[:1], x)
        with expect_fail(ValueError, "expected (N, D)"): measure(x, x[:, :2])
        with expect_fail(ValueError, "expected (N, D)"): measure(x[0], x[0])
        with expect_fail(ValueError, "NaN"): measure(x, x * torch.nan)
    for size in (1, 5, 6):
        with expect_fail(ValueError, "fewer pictures"): kernel_distance(x, x, subset_size=size)


def test_squared_mmd_by_loops_and_its_expectation():
    x, y = normal(6, 4, 1), normal(5, 4, 2)
    k = lambda a, b: float((a @ b / 4 + 1)**3)
    within = [np.mean([k(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if i != j]) for v in (x, y)]
    want = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert squared_mmd(x, y) == pytest.approx(want, rel=1e-10)
    g = torch.Generator().manual_seed(0)
    null = np.array([squared_mmd(*torch.randn(2, 20, 5, generator=g)) for _ in range(500)])
    assert abs(null.mean()) < 3 * null.std() / 500**0.5 and (null < 0).any()


def test_squared_mmd_as_others():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(40, 7, 3), normal(40, 7, 4)
    assert squared_mmd(x, y) == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-9)


def test_kernel_distance_as_torch_fidelity():
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(40, 7, 3).numpy(), normal(40, 7, 4).numpy()
    matrices = [kid.kernel_poly(a, b, kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
                for a, b in ((x, x), (x, y), (y, y))]
    assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(kid.mmd2(*matrices), rel=1e-9)


def test_kernel_distance_is_the_mean_over_its_subsets():
    x, y = normal(31, 6, 5), normal(24, 6, 6, shift=0.4)
    g = torch.Generator().manual_seed(9)
    picks = [[torch.randperm(n, generator=g)[:10] for _ in range(8)] for n in (31, 24)]
    each = np.array([squared_mmd(x[i], y[j]) for i, j in zip(*picks)])
    found = kernel_distance(x, y, subsets=8, subset_size=10, seed=9)
    assert found.mean == pytest.approx(each.mean(), rel=1e-9) and found.std == pytest.approx(each.std(ddof=1), rel=1e-9)
    half = 1.96 * found.std * (10 / 14)**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1) and kernel_distance(x, y).subset_size == 12


def test_subset_sums_in_blocks():
    x, y = normal(11, 3, 1), normal(7, 3, 2)
    s, t = torch.rand(4, 11, dtype=torch.float64).round(), torch.rand(4, 7, dtype=torch.float64).round()
    for a, b, u, v in ((x, x, s, s), (x, y, s, t)):
        test_same(realism._subset_sums(a, b, u, v, block=4), realism._subset_sums(a, b, u, v), rtol=1e-9, atol=1e-9)


def test_the_interval_covers():
    g, hits = torch.Generator().manual_seed(1), 0
    k = lambda mn, mm, nn, d=8: (mn**3 + 3*mn*mm + 3*mn*(nn + d + 2)) / d**3 + 3 * (d + mm + nn + mn**2) / d**2 + 3 * mn / d + 1
    truth = k(0, 0, 0) + k(1, 1, 1) - 2 * k(0, 0, 1)
    for i in range(60):
        x, y = torch.randn(2, 60, 8, generator=g, dtype=torch.float64)
        y[:, 0] += 1
        d = kernel_distance(x, y, seed=i)
        hits += d.low <= truth <= d.high
    assert hits >= 54


def test_ssim_ends_of_the_scale():
    black, x = torch.zeros(2, 3, 11, 14), torch.rand(2, 3, 23, 17)
    test_same(ssim(black, black + 1), torch.full((2,), 1e-4 / 1.0001).double())
    test_same(ssim(x, x), torch.ones(2, dtype=torch.float64))
    y = torch.rand(2, 3, 23, 17)
    test_same(ssim(255 * x.double(), 255 * y.double(), 255), ssim(x.double(), y.double()))
    test_same(ssim(x, y), ssim(y, x))
    p = x.clone().requires_grad_()
    ssim(p, y).sum().backward()
    assert p.grad.isfinite().all() and p.grad.any()


def test_ssim_of_one_window_by_hand():
    x, y = torch.rand(2, 1, 1, 11, 11, dtype=torch.float64)
    line = torch.exp(-(torch.arange(11).double() - 5)**2 / 4.5)
    w = line[:, None] * line / line.sum()**2
    a, b = (w * x).sum(), (w * y).sum()
    va, vb, cov = (w * (x - a)**2).sum(), (w * (y - b)**2).sum(), (w * (x - a) * (y - b)).sum()
    want = (2*a*b + 1e-4) * (2*cov + 9e-4) / ((a*a + b*b + 1e-4) * (va + vb + 9e-4))
    test_same(ssim(x, y), want[None])


def test_ssim_as_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = torch.rand(2, 3, 3, 31, 45, dtype=torch.float64)
    options = dict(data_range=2.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    theirs = [metrics.structural_similarity(a.numpy(), b.numpy(), **options) for a, b in zip(x, y)]
    test_same(ssim(x, y, 2.0), torch.tensor(theirs))


def test_ssim_bad_input():
    x = torch.rand(1, 3, 20, 20)
    with expect_fail(ValueError, "11x11"): ssim(x[..., :10], x[..., :10])
    with expect_fail(ValueError, "two float batches"): ssim(x, x[:, :2])
    with expect_fail(ValueError, "two float batches"): ssim((255 * x).byte(), (255 * x).byte())
    with expect_fail(ValueError, "max_val"): ssim(x, x, 0)


@pytest.fixture(scope="module")
def unet():
    return create_model("unet_small", 11, weights="scenes").eval()


def test_features_are_the_means_of_the_maps(unet):
    f, x = feature_extractor(unet), torch.rand(5, 3, 40, 56)
    z, want = (x - unet.mean) / unet.std, []
    with torch.no_grad():
        for level in unet.down:
            z = level(z)
            want.append(z.mean((2, 3)))
            z = nn.functional.max_pool2d(z, 2)
    test_same(f(x), torch.cat(want, 1))
    test_same(f(x, batch=2), f(x), rtol=1e-5, atol=1e-6)
    assert f.name == "unet_small features" and f(x[:, :, :33, :49]).shape == (5, 240)
    assert feature_extractor(unet, layers=["down.3"]).name == "unet_small features (down.3)"


def test_features_do_not_change_with_the_network(unet):
    net, x = create_model("unet_small", 11, width=4), torch.rand(2, 3, 32, 32)
    f = feature_extractor(net)
    before = f(x)
    with torch.no_grad():
        for p in net.parameters(): p.add_(1)
    test_same(f.train()(x), before)
    assert not f.training and not f.net.training and all(p.requires_grad for p in net.parameters()) and net.min_size == 64


def test_a_kept_map_is_not_painted_over():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    x = torch.rand(2, 3, 9, 9)
    test_same(Features(net, ["0"], "raw").maps(x)[0], net[0](x).detach())


def test_names_and_errors(tmp_path):
    with expect_fail(ValueError, "choose one of"): feature_extractor("vgg")
    with expect_fail(ValueError, "such as"): feature_extractor(nn.Sequential(nn.Conv2d(3, 1, 1)))
    with expect_fail(FileNotFoundError, "pass its path"): feature_extractor("squeezenet1_0", tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pth")
    with expect_fail(ValueError, "does not fit"): feature_extractor("squeezenet1_0", tmp_path / "wrong.pth")
    f = feature_extractor("squeezenet1_0", layers=["features.3"])
    assert f.name == "SqueezeNet features of random weights (features.3)" and f.column() == f"Fréchet distance, {f.name}"
    with expect_fail(ValueError, "divide by 255"): f(torch.full((1, 3, 32, 32), 200.0))
    with expect_fail(ValueError, "float pictures"): f(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with expect_fail(ValueError, "float pictures"): f(torch.rand(1, 1, 32, 32))
    off = Features(nn.ModuleDict({"used": nn.Conv2d(3, 3, 1), "unused": nn.Conv2d(3, 3, 1)}), ["unused"], "odd")
    off.net.forward = off.net["used"].forward
    with expect_fail(ValueError, "never came"): off.maps(torch.rand(1, 3, 4, 4))


def test_torchvision_inception_is_the_one_of_chapter_40(tmp_path):
    eye = InceptionFeatures()
    torch.save(eye.net.state_dict(), tmp_path / "inception.pth")
    f, x = feature_extractor("inception_v3", tmp_path / "inception.pth"), torch.rand(1, 3, 50, 70)
    test_same(f(x), eye(x), rtol=1e-4, atol=1e-5)
    assert f.column() == "Fréchet distance, torchvision Inception-v3 features"
    middle = feature_extractor("inception_v3", tmp_path / "inception.pth", ["Mixed_6e"])
    test_same(middle.maps(x)[0], eye.middle(x), rtol=1e-4, atol=1e-5)


def test_perceptual_distance(unet):
    f, (x, y) = feature_extractor(unet, layers=["down.1", "down.2"]), torch.rand(2, 3, 3, 35, 41)
    want = sum((a - b).square().sum((1, 2, 3)) / a[0].numel() for a, b in zip(f.maps(x), f.maps(y))) / 2
    test_same(perceptual_distance(x, y, f), want)
    assert perceptual_distance(x, x, f).max() == 0
    p = x.clone().requires_grad_()
    perceptual_distance(p, y, f).mean().backward()
    assert p.grad.any() and all(q.grad is None for q in f.parameters())
    with expect_fail(ValueError, "one shape"): perceptual_distance(x, y[:2], f)


def test_imagenet_weights(data_root):
    folder = data_root("weights")
    f = feature_extractor("squeezenet1_0", folder / "squeezenet1_0_imagenet.pth")
    assert f(torch.rand(2, 3, 64, 64)).shape == (2, 512) and f.name == "SqueezeNet features"
    assert feature_extractor("mobilenet_v2", folder / "mobilenet_v2_imagenet.pth")(torch.rand(2, 3, 64, 64)).shape == (2, 1280)


def test_fid_without_its_package_or_file(monkeypatch, tmp_path):
    monkeypatch.setattr(realism.importlib.util, "find_spec", lambda name: None)
    with expect_fail(ImportError, "pip install torch-fidelity"): feature_extractor("inception-2015")


def test_fid_is_only_what_has_the_right_weights(monkeypatch, tmp_path):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with expect_fail(FileNotFoundError, realism._FID_FILE): feature_extractor("inception-2015", tmp_path / "none.pth")
    def offline(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with expect_fail(FileNotFoundError, str(tmp_path / "checkpoints" / realism._FID_FILE)): feature_extractor("inception-2015")
    path = tmp_path / "random.pth"
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: None)
    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    net = theirs.FeatureExtractorInceptionV3("x", ["2048"])
    monkeypatch.undo()
    torch.save(net.state_dict(), path)
    with expect_fail(ValueError, "is not FID"): feature_extractor("inception-2015", path)
    monkeypatch.setattr(realism, "_FID_HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    f, x = feature_extractor("inception-2015", path), torch.rand(2, 3, 40, 60)
    assert f.column() == "FID" and f.column("kernel distance") == "KID" and f.column("perceptual distance").endswith("Inception-2015 features")
    with torch.no_grad(): test_same(f(x), net((x * 255).round().byte())[0], rtol=1e-4, atol=1e-5)
