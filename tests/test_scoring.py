"Scores against torchmetrics, wrapped data sets, sizes"
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from synseg.callbacks import MetricsLog, contact_sheet
from synseg.labels import label_space
from synseg.scoring import confusion, evaluate, innermost, label_space_of, pixel_counts, scores_at, source_of


class Noise(Dataset):
    def __init__(self, n=7, size=(31, 45), k=11):
        g = torch.Generator().manual_seed(0)
        self.items = [(torch.rand(3, *size, generator=g), torch.randint(0, k, size, generator=g)) for _ in range(n)]
        for _, label in self.items:
            label[:5] = 255
        self.label_space, self.names = label_space("camvid"), [f"f{i}" for i in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_mean_iou_is_torchmetrics():
    tm = pytest.importorskip("torchmetrics.classification")
    data = Noise()
    torch.manual_seed(0)
    net = nn.Conv2d(3, 11, 3, padding=1)
    scores = evaluate(net, data, precision="fp32", batch_size=3)
    metric = tm.MulticlassJaccardIndex(11, ignore_index=255)
    with torch.no_grad():
        for image, label in data:
            metric.update(net(image[None]), label[None])
    assert scores["mean_iou"] == pytest.approx(float(metric.compute()), abs=1e-6)
    assert list(scores["iou"]) == list(data.label_space.names) and scores["images"] == 7


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_do_not_matter(batch_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11))
    want = confusion(net, Noise(), precision="fp32", batch_size=7).matrix
    assert torch.equal(confusion(net, Noise(), precision="fp32", batch_size=batch_size).matrix, want)


def test_wrappers_are_seen_through():
    data = Noise()
    part = Subset(Subset(data, [6, 4, 2]), [2, 1])
    assert innermost(part, 0) == (data, 2) and label_space_of(part) is data.label_space
    assert source_of(part, 1) == "image 1 (f4)"
    counts = pixel_counts(part, 11)
    assert counts.shape == (2, 11) and int(counts[0].sum()) == 26*45


def test_logits_are_resized_not_labels():
    net = nn.Conv2d(3, 4, 1)
    z = scores_at(net, torch.rand(2, 3, 40, 60), (20, 30), (41, 59))
    assert z.shape == (2, 4, 41, 59) and z.dtype == torch.float32


def test_a_wrong_label_names_its_source():
    data = Noise()
    data.items[0][1][9, 9] = 11
    with pytest.raises(ValueError, match="first images to evaluate on.*11"):
        evaluate(nn.Conv2d(3, 11, 1), data)


def test_an_absent_class_has_no_iou():
    data = Noise(k=3)
    net = nn.Conv2d(3, 11, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    scores = evaluate(net, data)
    assert scores["iou"]["Bicyclist"] is None and 0 < scores["mean_iou"] < 1


def test_log_is_rewritten_on_resume(tmp_path):
    log = MetricsLog(tmp_path/"deep"/"metrics.jsonl")
    for i in range(3):
        log.append(dict(epoch=i))
    log.replace(log.rows[:1])
    assert (tmp_path/"deep/metrics.jsonl").read_text() == '{"epoch": 0}\n'


def test_contact_sheet_size():
    import numpy as np
    assert contact_sheet([[np.zeros((5, 7, 3), np.uint8)]*2]*3, gap=2).size == (16, 19)


def test_scores_that_are_nan_are_misses_and_end_no_training():
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), torch.nan))
        def forward(self, x): return torch.zeros(len(x), 11, *x.shape[-2:]) * self.weight
    scores = evaluate(Lost(), Noise())
    assert scores["mean_iou"] == scores["pixel_accuracy"] == 0
