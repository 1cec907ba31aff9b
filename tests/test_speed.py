"What default settings change is the speed: answers, records and reports. No time is asserted"
import json
import math

import pytest
import torch
from torch import nn

from synseg import benchmark, speed
from synseg.benchmark import CASES, report, run
from synseg.check import count_parameters
from synseg.conv import multiply_adds
from synseg.core import VOID
from synseg.datasets import packed, unpacked
from synseg.engine import Engine, memory_layout
from synseg.losses import CrossEntropyLoss
from synseg.rivals import SMP, plain_step, smp_network, torchvision_augment
from synseg.scenes import Scenes
from synseg.speed import (CLASSES, FETCH, PAIRS, PRODUCT, STEP, Pair, copy_bandwidth, default_learner, default_step, kind_of,
                          matmul_peak, profile_step)
from synseg.stopwatch import missing, rate
from synseg.transforms import as_pair, train_transforms
from synseg.zoo import create_model

TINY = Pair("U-Net, small", "unet_small", dict(width=4))
RIVAL = Pair("U-Net on MobileNetV2", "unet", dict(encoder="mobilenet_v2"), lambda: smp_network("Unet", "mobilenet_v2", CLASSES), "segmentation_models_pytorch")


@pytest.fixture
def few(monkeypatch):
    "Two networks, small products, a batch of two"
    monkeypatch.setattr(speed, "PAIRS", (TINY, RIVAL))
    monkeypatch.setattr(speed, "BATCH", 2)
    monkeypatch.setattr(speed, "_product", lambda n, precision, device: lambda number=0: torch.ones(8, 8) @ torch.ones(8, 8))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 64, 72), generator=g)
    return torch.rand(2, 3, 64, 72, generator=g), labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.1, VOID)


def gradients(layout, seed, name="unet_small", **options):
    "Loss and gradients of one batch in the engine, in a layout"
    torch.manual_seed(seed)
    net, batch = create_model(name, CLASSES, **options).train(), (torch.rand(2, 3, 64, 72), torch.randint(0, CLASSES, (2, 64, 72)))
    for m in net.modules():
        if isinstance(m, (nn.Dropout, nn.Dropout2d)):
            m.p = 0.0  # the mask is drawn in the order of memory
    engine = Engine(net, CrossEntropyLoss(), precision="fp32")
    engine.layout = layout
    engine.model.to(memory_format=layout)
    engine.begin()
    loss = engine.loss_of(*batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize("options", [dict(name="unet_small", width=8), dict(name="contextnet_cn14")])
def test_layout_does_not_change_what_is_learnt(options):
    "But for rounding, which at times turns a ReLU or the winner of a pooling window: so the best of five batches is exact"
    apart = []
    for seed in range(1, 6):
        (plain, g), (last, h) = (gradients(layout, seed, **options) for layout in (torch.contiguous_format, torch.channels_last))
        assert last == pytest.approx(plain, rel=1e-4)
        apart.append(float((g - h).norm() / g.norm()))
    assert max(apart) < 0.1 and min(apart) < 5e-4, apart


def test_fused_adamw_in_channels_last_is_adamw():
    "PyTorch's fused optimiser copies weights that lie otherwise; what it writes must come back"
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(6, 5, 3, 3, generator=g), torch.randn(4, 6, 5, 3, 3, generator=g)
    found = []
    for layout, fused in ((torch.contiguous_format, False), (torch.channels_last, True)):
        w = nn.Parameter(start.clone().contiguous(memory_format=layout))
        optimizer = torch.optim.AdamW([w], lr=1e-2, fused=fused)
        for grad in grads:
            w.grad = grad.contiguous(memory_format=layout)
            optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_layout_of_networks():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    ordinary, spread = create_model("unet_small", CLASSES, width=4), nn.Conv2d(4, 4, 3, dilation=2, groups=4)
    assert memory_layout(ordinary, cpu) == memory_layout(ordinary, cuda) == memory_layout(spread, cuda) == torch.channels_last
    assert memory_layout(spread, cpu) == memory_layout(ordinary, torch.device("mps")) == torch.contiguous_format


def test_labels_travel_as_bytes_and_come_back():
    items = [(torch.rand(3, 4, 5), torch.tensor([[0, 10, VOID, 1, 2]] * 4)) for _ in range(3)]
    images, labels = packed(items)
    assert labels.dtype == torch.uint8 and torch.equal(unpacked(labels), torch.stack([y for _, y in items]))
    assert torch.equal(images, torch.stack([x for x, _ in items]))
    *_, weight = packed([(*items[0], torch.ones(4, 5))])
    assert weight.shape == (1, 4, 5)
    for strange in (torch.tensor([[-1]]), torch.tensor([[256]]), torch.tensor([[0.5]]), torch.zeros(0, 3, dtype=torch.int64)):
        assert torch.equal(unpacked(packed([(items[0][0], strange)])[1])[0], strange)


def test_default_step_is_the_plain_loop_in_float32(batch):
    learner = default_learner(TINY, (64, 72), 2, precision="fp32", class_weights=None, weight_decay=0.0)
    plain = TINY.ours()
    plain.load_state_dict(learner.model.state_dict())
    ours, theirs = default_step(learner, *batch), plain_step(plain, *batch, weight_decay=0.0)
    for _ in range(4):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-4)
    assert learner.engine.optimizer.optimizer.defaults["fused"] and not learner.engine.bf16


def test_default_step_changes_the_weights(batch):
    learner = default_learner(TINY, (64, 72), 2)
    before = [p.clone() for p in learner.model.parameters()]
    assert math.isfinite(default_step(learner, *batch)().item())
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.model.parameters()))


@pytest.mark.skipif(bool(missing(SMP)), reason="segmentation-models-pytorch is not installed")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p.name)
def test_pairs_are_the_same_network(pair):
    with torch.device("meta"):
        ours, theirs = pair.ours(), pair.other()
    assert count_parameters(ours) == count_parameters(theirs)
    assert multiply_adds(ours, (128, 160)).multiply_adds == multiply_adds(theirs, (128, 160)).multiply_adds


@pytest.mark.parametrize("name", ["train", "infer", "data"])
def test_a_small_run_of_each_case(name, few, monkeypatch, tmp_path):
    if name != "data" and missing(SMP):
        monkeypatch.setattr(speed, "PAIRS", (TINY,))
    size = (64, 96)
    outcome = run(name, size, rounds=1, record=tmp_path, least=0, repeats=0)
    text, found = report(outcome), outcome.metrics()
    record = json.loads((tmp_path / f"benchmark_{name}_64x96_cpu.json").read_text())
    assert record["metrics"]["groups"] == found["groups"] and record["config"]["size"] == [64, 96]
    for rows in found["groups"].values():
        assert sum(row["peer"] for row in rows.values()) <= 1
        for row in rows.values():
            assert row["median_seconds"] > 0 and rate(row, "multiply_adds" if "multiply_adds" in row["figures"] else "images") > 0
    assert all(v < 1e-3 for v in found["agreement"].values()), found["agreement"]
    if name == "data":
        assert "goal 5% or less" in text and "goal 150 or more" in text and {STEP, FETCH} <= set(next(iter(found["groups"].values())))
    else:
        assert TINY.name in text and "share of peak" in text and PRODUCT in found["groups"]
    if name == "train":
        assert "2.5 for ordinary convolutions" in text and "fp32" in text
        assert all("bf16" in row["figures"] for g, rows in found["groups"].items() if g != PRODUCT for row in rows.values())


def test_without_rivals_ours_runs_against_itself(few, monkeypatch):
    monkeypatch.setattr(speed, "missing", lambda peers: dict(peers))
    monkeypatch.setattr(benchmark, "missing", lambda peers: dict(peers))
    outcome = run("train", (64, 64), rounds=1, least=0, repeats=0)
    assert set(outcome.metrics()["groups"]) == {TINY.name, PRODUCT}
    assert "not installed: segmentation_models_pytorch; to compare with it: pip install" in report(outcome)


def test_another_device_than_accelerates_is_refused():
    with pytest.raises(ValueError, match="training goes where Accelerate finds a device"):
        speed._same_device(default_learner(TINY, (64, 64), 2), torch.device("meta"))


def test_small_sizes_are_refused():
    for name in ("train", "infer", "data"):
        assert CASES[name].least == 64 and CASES[name].sheet
        with pytest.raises(ValueError, match="at least 64"):
            run(name, (40, 64))


def test_kinds_of_operators():
    kinds = {"aten::convolution_backward": "convolution", "aten::_slow_conv2d_forward": "convolution", "aten::native_batch_norm_backward": "norm",
             "aten::copy_": "copies", "aten::_fused_adamw_": "optimiser", "aten::upsample_nearest2d_backward": "resizing, pooling",
             "aten::threshold_backward": "activation", "aten::_log_softmax": "loss", "aten::add_": "sums, scaling", "aten::addmm": "convolution",
             "something else": "other"}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_a_profile_adds_up(batch):
    found = profile_step(plain_step(TINY.ours(), *batch), steps=2)
    seconds = [s for *_, s in found.rows]
    assert seconds == sorted(seconds, reverse=True) and found.total == pytest.approx(sum(seconds))
    assert sum(found.shares().values()) == pytest.approx(1) and found.shares()["convolution"] > 0
    assert next(calls for name, calls, _ in found.rows if name == "aten::convolution_backward") == 15


def test_yardsticks():
    assert matmul_peak(32, repeats=1) > 0 and matmul_peak(32, "bf16", repeats=1) > 0 and copy_bandwidth(1, repeats=1) > 0
    with pytest.raises(KeyError):
        matmul_peak(8, "fp8")


@pytest.mark.parametrize("size", [(48, 64), (65, 97)])
def test_torchvisions_augmentation_gives_what_ours_gives(size):
    pair = as_pair(*Scenes(1, (96, 128), "camera").raw(0))
    for augment in (train_transforms(size), torchvision_augment(size)):
        image, label = augment(*pair)
        assert image.shape == (3, *size) and label.shape == size and image.dtype == torch.float32 and label.dtype == torch.int64
        assert 0 <= image.min() and image.max() <= 1 and set(label.unique().tolist()) <= set(pair[1].unique().tolist()) | {VOID}
