"Clusters: against scikit-learn from the same start, against invariants on random points, and against bad input"
import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from synseg.kmeans import KMeansSegmenter, kmeans, match_clusters, plus_plus, xyrgb
from synseg.metrics import ConfusionMatrix
from synseg.scenes import Scenes


def street(size=(61, 83), i=7):
    return Scenes(8, size=size, domain="camera", seed=20)[i]


def never_rises(history, points):
    rounding = 1e-6 * (points - points.mean(0)).square().sum().item() + 1e-9
    return all(b <= a + rounding for a, b in zip(history, history[1:]))


@pytest.mark.parametrize("k, weight", [(1, 1.0), (2, 0.0), (8, 1.0), (13, 0.3), (40, 3.0)])
def test_same_start_same_inertia_as_scikit_learn(k, weight):
    points = xyrgb(street()[0], weight)
    start = plus_plus(points, k, generator=torch.Generator().manual_seed(k))[0]
    ours = kmeans(points, k, start=start, tolerance=0)
    theirs = KMeans(k, init=start.double().numpy(), n_init=1, tol=0).fit(points.double().numpy())
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert (ours.labels.numpy() == theirs.labels_).mean() > 0.999
    np.testing.assert_allclose(ours.centres.numpy(), theirs.cluster_centers_, atol=1e-4)


@pytest.mark.parametrize("i", [2, 7])
def test_one_attempt_is_no_worse_than_scikit_learn_by_more_than_one_percent(i):
    points = xyrgb(street((90, 120), i)[0])
    best = min(KMeans(8, n_init=1, random_state=s).fit(points.numpy()).inertia_ for s in range(5))
    assert all(kmeans(points, 8, seed=s).inertia <= 1.01 * best for s in range(3))
    assert kmeans(points, 8, restarts=10).inertia <= 1.001 * best


@pytest.mark.parametrize("n, d, k", itertools.product([7, 97, 5000], [1, 3, 5], [1, 2, 7]))
@pytest.mark.parametrize("coarse", [True, False])
def test_invariants_on_random_points(n, d, k, coarse):
    torch.manual_seed(n + d + k)
    points = torch.randn(n, d) * torch.rand(d) + 5 * torch.rand(d)
    found = kmeans(points, k, coarse=coarse, tolerance=0, seed=1)
    assert found.labels.dtype == torch.int64 and found.labels.shape == (n,) and found.centres.shape == (k, d)
    assert never_rises(found.history, points) and found.history[-1] == found.inertia
    distance = torch.cdist(points.double(), found.centres.double())
    nearest = distance.amin(1)
    torch.testing.assert_close(distance.gather(1, found.labels[:, None])[:, 0], nearest, rtol=1e-4, atol=1e-4)
    assert found.inertia == pytest.approx(nearest.square().sum().item(), rel=1e-4, abs=1e-6)
    for j in range(k):
        torch.testing.assert_close(found.centres[j], points[found.labels == j].mean(0), rtol=1e-4, atol=1e-4)


def test_half_steps_never_raise_the_inertia():
    points = torch.rand(501, 4)
    start = points[:6].clone()
    paid = [kmeans(points, 6, start=start, iterations=n, tolerance=0).inertia for n in range(8)]
    assert never_rises(paid, points)
    for n in range(7):  # means of the members of iteration n, the assignment still the old one
        old = kmeans(points, 6, start=start, iterations=n, tolerance=0)
        means = torch.stack([points[old.labels == j].mean(0) for j in range(6)])
        between = (points - means[old.labels]).square().sum().item()
        assert paid[n + 1] - 1e-4 <= between <= paid[n] + 1e-4


def test_one_cluster_is_the_mean_and_all_clusters_cost_nothing():
    points = torch.rand(37, 3)
    one = kmeans(points, 1)
    torch.testing.assert_close(one.centres[0], points.mean(0))
    assert one.inertia == pytest.approx((points - points.mean(0)).square().sum().item(), rel=1e-5)
    every = kmeans(points, 37)
    assert every.inertia < 1e-9 and len(every.labels.unique()) == 37


def test_colour_alone_does_not_know_where_a_pixel_is():
    points = xyrgb(street()[0], 0)
    order = torch.randperm(len(points))
    start = plus_plus(points, 6)[0]
    a, b = kmeans(points, 6, start=start), kmeans(points[order], 6, start=start)
    assert a.inertia == pytest.approx(b.inertia, rel=1e-5)
    assert (a.labels[order] == b.labels).double().mean() > 0.999


def test_place_alone_gives_voronoi_cells():
    image = street()[0]
    segmenter = KMeansSegmenter(6, spatial_weight=300)
    found = segmenter(image).flatten()
    cells = torch.cdist(xyrgb(image, 300)[:, :2].double(), segmenter.centres_[:, :2].double()).argmin(1)
    assert (found == cells).double().mean() > 0.999


def test_scaling_points_scales_the_inertia():
    points = torch.rand(400, 5)
    start = points[:5]
    a, b = kmeans(points, 5, start=start), kmeans(points * 10 + 3, 5, start=start * 10 + 3)
    assert b.inertia == pytest.approx(100 * a.inertia, rel=1e-4)


def test_the_same_seed_gives_the_same_bits():
    image = street()[0]
    a, b = KMeansSegmenter(8, seed=3), KMeansSegmenter(8, seed=3)
    assert a(image).equal(b(image)) and a.inertia_ == b.inertia_ and a.centres_.equal(b.centres_)


def test_more_restarts_keep_the_best():
    points = torch.rand(300, 2)
    inertia = [kmeans(points, 12, restarts=r, coarse=False, seed=5).inertia for r in (1, 3, 9)]
    assert inertia == sorted(inertia, reverse=True)


def test_an_empty_cluster_takes_the_worst_point():
    points = torch.cat([torch.rand(100, 2), torch.tensor([[9.0, 9.0]])])
    start = torch.tensor([[0.5, 0.5], [-50.0, -50.0], [-60.0, -60.0]])  # the last two win nobody
    found = kmeans(points, 3, start=start, tolerance=0)
    assert found.labels.bincount(minlength=3).min() > 0 and never_rises(found.history, points)
    assert (found.labels == found.labels[-1]).sum() == 1  # the far point has a cluster of its own


def test_ties_and_doubles_count_once():
    points = torch.tensor([[-1.0], [0.0], [1.0]]).repeat(7, 1)  # 0 lies as near to both centres
    found = kmeans(points, 2, start=torch.tensor([[-1.0], [1.0]]), tolerance=0)
    assert found.labels.bincount().sum() == 21 and never_rises(found.history, points)
    twins = kmeans(torch.rand(50, 3), 3, start=torch.ones(3, 3), tolerance=0)
    assert twins.labels.bincount(minlength=3).min() > 0


def test_rare_colours_that_a_sample_misses_are_found():
    image = torch.zeros(3, 150, 201)
    for j in range(5):
        image[:, 20 * j + 3, 17 * j + 5] = (j + 1) / 5
    assert KMeansSegmenter(6, spatial_weight=0)(image).unique().numel() == 6
    with pytest.raises(ValueError, match=r"only 6 distinct values; choose k <= 6, or a spatial_weight > 0"):
        KMeansSegmenter(7, spatial_weight=0)(image)
    assert KMeansSegmenter(7, spatial_weight=0.5)(image).unique().numel() == 7


def test_a_constant_image_is_cut_by_place_or_refused():
    image = torch.full((3, 20, 31), 0.25)
    assert KMeansSegmenter(4)(image).unique().numel() == 4
    assert KMeansSegmenter(1, spatial_weight=0)(image).unique().tolist() == [0]
    with pytest.raises(ValueError, match="only 1 distinct"):
        KMeansSegmenter(2, spatial_weight=0)(image)


def test_images_one_at_a_time_or_in_a_batch():
    images = torch.stack([street((33, 47), i)[0] for i in (1, 2, 3)])
    segmenter = KMeansSegmenter(5)
    batch = segmenter(images)
    assert batch.shape == (3, 33, 47) and batch.dtype == torch.int64
    for image, found in zip(images, batch):
        assert segmenter(image).equal(found)
    assert segmenter(images.bfloat16()).shape == batch.shape and segmenter(images[0].double()).equal(batch[0])


def test_gradients_are_not_recorded_and_input_is_left_alone():
    image = street((20, 30))[0].requires_grad_()
    before = image.detach().clone()
    segmenter = KMeansSegmenter(3)
    assert not segmenter(image).requires_grad and not segmenter.centres_.requires_grad and image.equal(before)


def test_spatial_unit_is_the_longer_side():
    tall, wide = xyrgb(torch.zeros(3, 8, 4)), xyrgb(torch.zeros(3, 4, 8), 2.0)
    assert tall[-1].tolist() == [3.5 / 8, 7.5 / 8, 0, 0, 0]
    assert wide[-1].tolist() == [2 * 7.5 / 8, 2 * 3.5 / 8, 0, 0, 0]
    assert tall[4].tolist() == [0.5 / 8, 1.5 / 8, 0, 0, 0]  # row by row


def test_plus_plus_draws_points_and_spreads_them():
    points = torch.cat([torch.randn(50, 2) + 100 * torch.tensor(c) for c in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])])
    chosen = plus_plus(points, 3, 20, torch.Generator().manual_seed(0))
    assert chosen.shape == (20, 3, 2)
    assert (chosen.flatten(0, 1)[:, None] == points).all(2).any(1).all()
    corners = (chosen / 100).round()
    assert all(len({tuple(c) for c in one.tolist()}) == 3 for one in corners)  # one in each clump


@pytest.mark.parametrize("image, message", [
    (torch.zeros(1, 5, 5), r"one RGB image \(3, H, W\)"),
    (torch.zeros(3, 5), r"one RGB image"),
    (torch.zeros(3, 5, 5, dtype=torch.uint8), "divide bytes by 255"),
    (torch.full((3, 5, 5), 3.0), "divide bytes by 255"),
    (torch.full((3, 5, 5), torch.nan), r"not all in \[0, 1\]"),
    (torch.zeros(3, 0, 5), "not all in"),
])
def test_images_that_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        KMeansSegmenter(2)(image)


@pytest.mark.parametrize("call, message", [
    (lambda p: kmeans(p, 0), "k=0 clusters of 10 points"),
    (lambda p: kmeans(p, 11), "expected 1 <= k <= 10"),
    (lambda p: kmeans(p, 2, restarts=0), "restarts=0"),
    (lambda p: kmeans(p[0], 1), r"expected finite floats \(N, d\)"),
    (lambda p: kmeans(p.long(), 1), "expected finite floats"),
    (lambda p: kmeans(p / 0, 1), "expected finite floats"),
    (lambda p: kmeans(p, 2, start=p[:3]), r"start of shape \(3, 4\)"),
    (lambda p: kmeans(p * 0, 2), "only 1 distinct"),
    (lambda p: xyrgb(torch.zeros(3, 4, 4), -1), "spatial_weight=-1"),
    (lambda p: xyrgb(torch.zeros(3, 4, 4), float("nan")), "spatial_weight=nan"),
])
def test_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(10, 4))


def best_by_trying_all(clusters, labels, k, classes):
    "Mean IoU of the best one-to-one naming, over all of them"
    best = 0
    for names in itertools.permutations([*range(classes), *[255] * k], k):
        matrix = ConfusionMatrix(classes).update(torch.tensor(names)[clusters][None], labels[None])
        best = max(best, matrix.mean_iou())
    return best


@pytest.mark.parametrize("k, classes", [(2, 3), (3, 3), (4, 2), (3, 4)])
def test_one_to_one_matching_is_the_best_of_all(k, classes):
    torch.manual_seed(10 * k + classes)
    labels = torch.randint(0, classes, (9, 11))
    clusters = torch.where(torch.rand(9, 11) < 0.5, labels % k, torch.randint(0, k, (9, 11)))
    labels[0, :4] = 255
    named = match_clusters(clusters, labels, classes)
    assert ConfusionMatrix(classes).update(named[None], labels[None]).mean_iou() == pytest.approx(best_by_trying_all(clusters, labels, k, classes))


def test_many_to_one_gets_the_most_pixels_right_and_grows_with_k():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (8, 9))
    finest = torch.arange(72).view(8, 9)
    assert match_clusters(finest, labels, 4, one_to_one=False).equal(labels)
    right = [(match_clusters(finest // s, labels, 4, one_to_one=False) == labels).sum().item() for s in (72, 36, 12, 4, 2, 1)]
    assert right == sorted(right)


def test_matching_leaves_void_out():
    clusters, labels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[255, 255, 2, 2]])
    for one_to_one in (True, False):
        assert match_clusters(clusters, labels, 3, one_to_one).tolist() == [[255, 255, 2, 2]]
    with pytest.raises(ValueError, match="expected one shape"):
        match_clusters(clusters, labels[0], 3)


def test_memory_stays_bounded():
    "Scores of all pixels against all centres would be 600 MB here"
    import resource
    image = torch.rand(3, 500, 600)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kmeans(xyrgb(image), 500, start=xyrgb(image)[:500], iterations=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
