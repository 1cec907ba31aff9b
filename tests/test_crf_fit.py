"Search, leave one out and the layer"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.crf_fit import (RefinedSegmenter, Scored, band_scores, best_of, counts_of, fit_layer, leave_one_out, margins,
                            network_counts, own_votes, scored, settings_grid, summary_of, turned, voc_samples, voc_samples_crf)
from synseg.dense_crf import DenseCRF
from synseg.metrics import ConfusionMatrix, confusion_counts, trimap_iou
from synseg.scenes import Scenes

GRID = settings_grid(gaussian_xy=[2], iterations=[2], bilateral_xy=[4, 9], bilateral_rgb=[10], bilateral_weight=[1, 4])


@pytest.fixture(scope="module")
def samples():
    drawn = [Scenes(3, size=(24, 33), domain="camera", seed=5)[i] for i in range(3)]
    noise = torch.Generator().manual_seed(0)
    return [Scored((F.one_hot(y.clamp(max=10), 11).permute(2, 0, 1) + torch.randn(11, 24, 33, generator=noise)).log_softmax(0), x, y)
            for x, y in drawn]


def test_grid_has_every_combination():
    assert len(GRID) == 4 and settings_grid() == [{}]
    assert settings_grid(a=[1, 2], b=[3]) == [dict(a=1, b=3), dict(a=2, b=3)]


def test_counts_are_those_of_one_setting_at_a_time(samples):
    counts = counts_of(samples, GRID, 11)
    assert counts.shape == (4, 3, 12, 12)
    for i, setting in enumerate(GRID):
        for j, s in enumerate(samples):
            q = DenseCRF(11, **setting)(s.log_probs[None], s.image[None])
            assert torch.equal(counts[i, j], confusion_counts(q, s.label[None], 11)[0])
    order = [3, 0, 2, 1]  # widths that come back
    assert torch.equal(counts_of(samples, [GRID[i] for i in order], 11), counts[order])


def test_summary_is_that_of_the_confusion_matrix(samples):
    matrix = ConfusionMatrix(11)
    for s in samples: matrix.update(s.log_probs[None], s.label[None])
    summary = summary_of(network_counts(samples, 11))
    assert summary["mean_iou"] == matrix.mean_iou() and summary["pixel_accuracy"] == matrix.pixel_accuracy()
    assert all(a == b or a is None and b != b for a, b in zip(summary["iou"], matrix.iou().tolist()))


def test_leave_one_out_by_hand():
    "Setting 0 is right on all pixels of samples 0 and 1 and wrong on 2; setting 1 the other way round"
    counts = torch.zeros(2, 3, 3, 3, dtype=torch.int64)
    right, wrong = torch.tensor([[5, 0, 0], [0, 5, 0], [0, 0, 0]]), torch.tensor([[0, 5, 0], [5, 0, 0], [0, 0, 0]])
    for j, good in enumerate((0, 0, 1)): counts[good, j], counts[1 - good, j] = right, wrong
    assert best_of(counts) == 0
    choices, held_out = leave_one_out(counts)
    assert choices[2] == 0 and torch.equal(held_out[2], wrong)  # fitted to the other two, wrong on the third
    assert choices[:2] == [0, 0] and summary_of(held_out)["pixel_accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two at least"): leave_one_out(counts[:, :1])


def test_own_votes_against_the_exact_kernel(samples):
    from synseg.dense_crf import gaussian_kernel
    from synseg.lattice import bilateral_features
    s = samples[0]
    kernel, ids = gaussian_kernel(bilateral_features(s.image, 4, 40)).float(), s.label.flatten()
    known = ids != 255
    votes = kernel[:, known] @ F.one_hot(ids[known], 11).float()
    share = (votes[known].gather(1, ids[known][:, None])[:, 0] / votes[known].sum(1)).mean().item()
    assert own_votes(s, 4, 40) == pytest.approx(share, abs=0.03)
    assert own_votes(s, 2, 5) > own_votes(s, 30, 60)


def test_margins_and_bands(samples):
    right, wrong = margins(samples)
    known = sum((s.label != 255).sum() for s in samples)
    assert len(right) + len(wrong) == known and right.min() >= 0 and wrong.min() >= 0
    one = samples[:1]
    assert band_scores(one, None, 11, (2,))["2"] == pytest.approx(trimap_iou(one[0].log_probs[None], one[0].label[None], 2, 11))


def test_turning_twice_changes_nothing(samples):
    assert turned(samples[0]).image.shape == (3, 33, 24)
    assert all(torch.equal(a, b) for a, b in zip(turned(turned(samples[0])), samples[0]))


def test_recipe_score_function(tmp_path):
    metrics = voc_samples_crf({}, "smoke", None)
    assert set(metrics["settings"]) == set(metrics["turned"]) == {"50/4/5", "80/13/10"}
    assert 0 < metrics["network"]["mean_iou"] < 1 and len(metrics["leave_one_out"]["choices"]) == 3
    with pytest.raises(FileNotFoundError, match="must hold voc_samples/"): voc_samples_crf({}, "cpu", tmp_path)


def test_voc_samples_score_as_published(data_root):
    samples = voc_samples(data_root("voc_samples").parent)
    assert len(samples) == 10
    summary = summary_of(network_counts(samples, 21))
    assert 100 * summary["mean_iou"] == pytest.approx(76.901, abs=0.002) and 100 * summary["pixel_accuracy"] == pytest.approx(95.028, abs=0.002)


def small_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 11, 3, padding=1))


def layer(**more):
    return DenseCRF(11, 1, 1, 5, 20, 1, iterations=3, trainable=True, **more)


def test_fit_layer_lowers_the_loss_and_moves_everything(samples):
    crf = layer()
    before = [p.detach().clone() for p in crf.parameters()]
    losses = fit_layer(crf, samples, steps=8, lr=0.1, batch_size=3)
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert all((a != b).all() for a, b in zip(before, crf.parameters()))
    with pytest.raises(ValueError, match="nothing to learn"): fit_layer(DenseCRF(11), samples)


def test_end_to_end_loss_falls_and_every_parameter_moves(samples):
    model = RefinedSegmenter(small_network(), layer())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = torch.stack([s.image for s in samples]), torch.stack([s.label for s in samples])
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(8):
        out = model(images)
        torch.testing.assert_close(out.exp().sum(1), torch.ones(3, 24, 33), rtol=0, atol=1e-4)
        loss = F.nll_loss(out, labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_scored_gives_log_probabilities():
    found = scored(small_network(), [Scenes(2, size=(16, 20))[i] for i in range(2)])
    assert len(found) == 2 and found[0].log_probs.shape == (11, 16, 20)
    torch.testing.assert_close(found[0].log_probs.exp().sum(0), torch.ones(16, 20), rtol=0, atol=1e-5)
