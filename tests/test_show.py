"Figures hold what they should, and explain what they cannot draw"
import json

import numpy as np
import pytest
import torch
from torch import nn

from synseg.labels import label_space
from synseg.show import (as_picture, class_bars, curves, error_rate, legend, mistakes, overlay, read_history, set_style,
                         show_confusion, show_segmentation, worst_cases)

SPACE = label_space("scenes")


def batch(n=3, size=(13, 17)):
    return torch.rand(n, 3, *size), torch.randint(0, 11, (n, *size)), torch.randint(0, 11, (n, *size))


def test_pictures_from_anything():
    image = torch.rand(3, 5, 7)
    want = as_picture(image)
    assert want.shape == (5, 7, 3) and want.dtype == np.uint8
    assert (as_picture(want) == want).all() and (as_picture(torch.from_numpy(want.copy()).movedim(-1, 0)) == want).all()
    assert as_picture(torch.rand(1, 5, 7)).shape == as_picture(np.zeros((5, 7))).shape == (5, 7, 3)
    for bad in (torch.rand(4, 5, 7), torch.rand(2, 3, 5, 7)):
        with pytest.raises(ValueError, match="channels"):
            as_picture(bad)


def test_overlay_and_mistakes_leave_void_alone():
    (image, *_), (label, *_), (pred, *_) = batch()
    label[:3] = 255
    assert (overlay(image, label, SPACE)[:3] == as_picture(image)[:3]).all()
    picture = mistakes(image, label, pred)
    vermilion = (picture == [213, 94, 0]).all(-1)
    assert (vermilion == ((label != pred) & (label != 255)).numpy()).all()
    assert error_rate(label, pred) == pytest.approx(vermilion[3:].mean())
    assert error_rate(torch.full((2, 2), 255), torch.zeros(2, 2)) == 0
    with pytest.raises(ValueError, match="one size"):
        overlay(image, label[:5], SPACE)


def test_panels_follow_what_is_given(tmp_path):
    images, labels, preds = batch()
    set_style()
    for arguments, columns in (((images,), 1), ((images, labels), 2), ((images, labels, preds), 4)):
        assert len(show_segmentation(*arguments, space=SPACE, rows=2).axes) == 2 * columns
    assert len(show_segmentation(images[0], labels[0], preds[0]).axes) == 4
    mixed = show_segmentation([images[0], images[1, :, :9]], [labels[0], labels[1, :9]], titles=["a", "b"])
    mixed.savefig(tmp_path / "mixed.png")
    assert (tmp_path / "mixed.png").stat().st_size > 1000 and mixed.axes[0].get_ylabel() == "a"
    with pytest.raises(ValueError, match="a map for each image"):
        show_segmentation(images, labels[:1])
    assert len(legend(SPACE).legends[0].get_texts()) == 11


def test_bars_name_absent_classes():
    figure = class_bars({"a": 0.5, "b": None, "c": float("nan"), "d": 1.0}, title="t")
    assert [t.get_text() for t in figure.axes[0].texts] == ["100.0", "50.0", "absent", "absent"]
    assert figure.axes[0].get_title() == "t, mean 75.0"
    class_bars(torch.full((3,), float("nan")))
    with pytest.raises(ValueError, match="2 values and 1 names"):
        class_bars([0.1, 0.2], ["a"])


def test_confusion_in_percent_of_rows():
    texts = [t.get_text() for t in show_confusion(torch.tensor([[3, 1], [0, 0]])).axes[0].texts]
    assert texts == ["75", "25"]
    with pytest.raises(ValueError, match="K, K"):
        show_confusion(torch.zeros(2, 3))


def test_curves_read_logs_also_of_killed_runs(tmp_path):
    rows = [dict(epoch=i, loss=1 / i, mean_iou=0.1 * i, lr=0.1) for i in range(1, 4)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"epoch": 4, "lo')
    assert read_history(tmp_path) == read_history(log) == read_history(rows) == rows
    left, right = curves({"a": tmp_path, "b": rows}).axes
    assert [len(left.lines), len(right.lines)] == [2, 2]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [10, 20, 30])
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        read_history(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'loss'"):
        curves([])


def test_worst_cases_are_the_worst_and_the_mode_is_kept():
    images, labels, _ = batch(6)
    labels[:] = 0
    for i, n in enumerate([3, 9, 1, 7, 0, 5]):
        labels[i, :n] = 1
    model = nn.Conv2d(3, 11, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.eye(11)[0])
    model.train()
    figure = worst_cases(model, list(zip(images, labels)), 2, space=SPACE)
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == ["image 1", "image 3"] and model.training
