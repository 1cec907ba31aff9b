"The scores: against two libraries, against themselves in other orders, and against a published network"
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from synseg.labels import label_space
from synseg.metrics import ConfusionMatrix, boundary_band, boundary_counts, boundary_iou, confusion_counts, trimap_iou


def random_maps(n=3, size=(13, 17), classes=5, void=0.1):
    target = torch.randint(0, classes, (n, *size))
    pred = torch.where(torch.rand(target.shape) < 0.6, target, torch.randint(0, classes, target.shape))
    return pred, target.masked_fill(torch.rand(target.shape) < void, 255)


@pytest.mark.parametrize("classes", [1, 2, 5, 15, 16, 21, 171, 300])
def test_counts_equal_scikit_learn(classes):
    pred, target = random_maps(classes=classes, void=0.0 if classes > 255 else 0.1)
    void = -1 if classes > 255 else 255
    counts = confusion_counts(pred, target, classes, void).sum(0)
    known = target != void
    want = confusion_matrix(target[known], pred[known], labels=range(classes))
    assert counts.sum() == target.numel()
    torch.testing.assert_close(counts[:classes, :classes], torch.from_numpy(want))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_counts_alike_and_nothing_is_changed(dtype):
    pred, target = random_maps()
    pred[0, 0, 0] = 255
    a, b = pred.to(dtype) if dtype != torch.int16 else pred.short(), target.to(dtype)
    before = a.clone(), b.clone()
    torch.testing.assert_close(confusion_counts(a, b, 5), confusion_counts(pred, target, 5))
    assert a.equal(before[0]) and b.equal(before[1])


def test_agrees_with_torchmetrics_and_scikit_learn():
    pred, target = random_maps(4, (31, 23), 11)
    matrix, known = ConfusionMatrix(11).update(pred, target), target != 255
    oracle = MulticlassJaccardIndex(11, ignore_index=255)(pred, target).item()
    assert matrix.mean_iou() == pytest.approx(oracle, abs=1e-6)
    np.testing.assert_allclose(matrix.iou(), jaccard_score(target[known], pred[known], average=None))


def test_logits_arrays_and_single_images():
    pred, target = random_maps()
    logits = torch.nn.functional.one_hot(pred, 5).movedim(-1, 1).float() + 0.1 * torch.rand(3, 5, 13, 17)
    want = ConfusionMatrix(5).update(pred, target)
    assert ConfusionMatrix(5).update(logits, target).counts.equal(want.counts)
    assert ConfusionMatrix(5).update(pred.numpy(), target.numpy()).counts.equal(want.counts)
    one = ConfusionMatrix(5)
    for p, t in zip(pred, target):
        one.update(p, t)
    assert one.summary() == want.summary()


def test_void_rule():
    target = torch.tensor([[[0, 0, 1, 255], [0, 1, 1, 255]]])
    pred = torch.tensor([[[0, 255, 1, 1], [0, 1, 0, 255]]])
    matrix = ConfusionMatrix(2).update(pred, target)
    assert matrix.matrix.tolist() == [[2, 0], [1, 2]] and matrix.missed.tolist() == [1, 0]
    assert matrix.iou().tolist() == [2 / 4, 2 / 3] and matrix.iou(charge_void=True).tolist() == [2 / 4, 2 / 4]
    assert matrix.pixel_accuracy() == 4 / 6
    assert matrix.accuracy().tolist() == [2 / 3, 2 / 3]


def test_known_small_matrix():
    matrix = ConfusionMatrix(2)
    matrix.counts[:2, :2] = torch.tensor([[3, 1], [2, 4]])
    assert matrix.pixel_accuracy() == pytest.approx(0.7)
    assert matrix.mean_accuracy() == pytest.approx(0.70833, abs=1e-5)
    assert matrix.mean_iou() == pytest.approx(0.53571, abs=1e-5)
    assert matrix.frequency_weighted_iou() == pytest.approx(0.54286, abs=1e-5)


def test_absent_classes_are_left_out_and_false_alarms_are_not():
    target, pred = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)
    matrix = ConfusionMatrix(3).update(pred, target)
    assert matrix.mean_iou() == 1 and matrix.iou()[1:].isnan().all()
    pred[0, 0, 0] = 2
    assert ConfusionMatrix(3).update(pred, target).mean_iou() == pytest.approx(15 / 32)


def test_nothing_labelled_is_nan_and_counts_as_no_image():
    matrix = ConfusionMatrix(3).update(torch.zeros(2, 4, 4, dtype=torch.long), torch.full((2, 4, 4), 255))
    assert all(np.isnan(v) for v in matrix.summary().values()) and matrix.image_scores == []
    assert "nan" in repr(matrix)


def test_merge_is_exact_in_any_order_and_across_pickles():
    pred, target = random_maps(12, (9, 11))
    whole = ConfusionMatrix(5).update(pred, target)
    parts = [ConfusionMatrix(5).update(pred[i::4], target[i::4]) for i in range(4)]
    merged = ConfusionMatrix(5).merge(*(pickle.loads(pickle.dumps(part)) for part in reversed(parts)))
    assert merged.counts.equal(whole.counts) and merged.summary() == whole.summary()
    with pytest.raises(ValueError, match="4 classes"):
        whole.merge(ConfusionMatrix(4))
    assert whole.reset().counts.sum() == 0 and whole.image_scores == []


def test_renaming_classes_permutes_and_categories_merge():
    pred, target = random_maps(classes=6, void=0)
    order = torch.randperm(6)
    matrix = ConfusionMatrix(6).update(pred, target)
    torch.testing.assert_close(ConfusionMatrix(6).update(order[pred], order[target]).iou()[order], matrix.iou())
    assert matrix.category_mean_iou({str(c): [c] for c in range(6)}) == pytest.approx(matrix.mean_iou())
    coarse = ConfusionMatrix(2).update(pred // 3, target // 3)
    assert matrix.category_mean_iou([[0, 1, 2], [3, 4, 5]]) == pytest.approx(coarse.mean_iou())
    for groups in ([[0], [0]], [[0, 6]]):
        with pytest.raises(ValueError, match="once at most"):
            matrix.category_mean_iou(groups)


@pytest.mark.parametrize("pred, target, words", [
    (torch.full((1, 2, 2), 5), torch.zeros(1, 2, 2).long(), r"prediction value 5 found at \(0, 0\)"),
    (torch.zeros(1, 2, 2).long(), torch.tensor([[[0, 0], [0, -1]]]), r"label value -1 found at \(1, 1\)"),
    (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 300), "label value 300"),
    (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 2).long(), "upsample the logits"),
    (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long(), "expected integer labels"),
    (torch.zeros(4).long(), torch.zeros(4).long(), "expected integer labels"),
])
def test_bad_input_is_explained(pred, target, words):
    with pytest.raises(ValueError, match=words):
        ConfusionMatrix(5).update(pred, target)


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match="num_classes 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="width 0"):
        boundary_band(torch.zeros(3, 3).long(), 0)


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_band_equals_the_plain_definition(width):
    labels = (torch.rand(15, 22) < 0.03).long()
    want = torch.zeros_like(labels, dtype=torch.bool)
    for r in range(15):
        for c in range(22):
            window = labels[max(0, r - width):r + width + 1, max(0, c - width):c + width + 1]
            want[r, c] = (window != labels[r, c]).any()
    assert boundary_band(labels, width).equal(want)


def test_boundary_and_trimap_scores():
    pred, target = random_maps(2, (40, 56), 3, void=0)
    assert trimap_iou(pred, target, 100, 3) == pytest.approx(ConfusionMatrix(3).update(pred, target).mean_iou())
    assert boundary_iou(target, target) == 1 == trimap_iou(target, target, 2)
    assert boundary_iou(pred, target) == pytest.approx(boundary_iou(target, pred))  # symmetric
    square = torch.zeros(1, 60, 60).long()
    square[0, 10:50, 10:50] = 1
    hit, union = boundary_counts(square, square, 2, ratio=0.02)  # 2 pixels
    assert hit.tolist() == union.tolist() and hit[1] == 40**2 - 36**2
    smaller = torch.nn.functional.pad(square[:, 2:-2, 2:-2], (2, 2, 2, 2)) * 0
    smaller[0, 12:48, 12:48] = 1
    assert boundary_iou(smaller, square) < ConfusionMatrix(2).update(smaller, square).mean_iou()


def test_a_perfect_prediction_is_perfect_around_void():
    target = torch.zeros(1, 50, 50).long()
    target[0, 10:30, 10:30] = 1
    pred = target.clone()
    target[0, 8:12] = 255
    assert boundary_iou(pred, target) == 1


def test_a_published_network_gets_its_published_score(data_root):
    folder, space = data_root("camvid_espnet_ref"), label_space("camvid")
    truth = data_root("camvid") / "valannot"
    want = json.loads((folder / "expected_val.json").read_text())
    matrix = ConfusionMatrix(11)
    for file in sorted((folder / "val_pred").glob("*.png")):
        matrix.update(*(torch.from_numpy(space.from_disk(Image.open(f))) for f in (file, truth / file.name)))
    assert matrix.counts.tolist() == want["confusion_rows_truth_cols_prediction"]
    scores = (matrix.mean_iou(), matrix.mean_accuracy(), matrix.pixel_accuracy(), matrix.frequency_weighted_iou(),
              matrix.mean_iou(charge_void=True))
    assert [f"{100 * s:.3f}" for s in scores] == ["69.995", "79.632", "92.634", "88.337", "68.562"]
    np.testing.assert_allclose(100 * matrix.iou(), list(want["val"]["iou_void_ignored"].values()), atol=5e-4)


@pytest.mark.parametrize("classes", [3, 300])
def test_nan_among_logits_is_refused_and_nothing_is_counted(classes):
    logits, target = torch.randn(2, classes, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    logits[1, 2, 3, 4] = torch.nan
    matrix = ConfusionMatrix(classes, -1)
    with pytest.raises(ValueError, match="score is NaN"): matrix.update(logits, target)
    assert matrix.counts.sum() == 0 and matrix.image_scores == []
    logits[1, 2, 3, 4] = -torch.inf
    assert matrix.update(logits, target).counts.sum() == 40
