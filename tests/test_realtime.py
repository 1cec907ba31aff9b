"Frame rates: answers do not depend on settings, nothing is left out in silence, printed numbers are as printed. No time is asserted"
import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from synseg import benchmark, realtime
from synseg.core import load_result
from synseg.realtime import (PUBLISHED, RIVALS, Setting, agree, camera, download, frame_memory, network, plan, prepare, present,
                             profile_layers, rates, report, serve, settings, sizes, upload)
from synseg.zoo import model_info

CPU = torch.device("cpu")
SMALL = Setting((64, 96))
HAS_FOLD = hasattr(importlib.import_module("synseg.compress"), "fold_batchnorm")


@pytest.fixture
def two(monkeypatch):
    "Two small networks, and a compiler that does nothing"
    monkeypatch.setattr(realtime, "RIVALS", ("contextnet_cn14_160", "no_such_net", "contextnet_cn14_500"))
    monkeypatch.setattr(realtime, "TURNED", ("contextnet_cn14_160",))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.parametrize("wrong,part", [(dict(precision="fp8"), "fp32, bf16"), (dict(layout="NHWC"), "channels-last"),
                                        (dict(transfers="none"), "pipelined"), (dict(size=(32, 96)), "at least 64")])
def test_settings_that_cannot_be(wrong, part):
    with pytest.raises(ValueError, match=part):
        replace(SMALL, **wrong)


def test_settings_have_names():
    assert str(SMALL) == "" and SMALL.group == "64x96"
    best = replace(SMALL, folded=True, layout="channels-last", precision="bf16", compiled=True, transfers="pipelined")
    assert str(best) == "folded, bf16, compiled, channels-last" and best.group == "64x96, pipelined"
    assert len({SMALL, best, Setting((64, 96))}) == 2


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_a_frame_arrives_unchanged(layout):
    setting = replace(SMALL, size=(67, 93), layout=layout)
    shots = camera(setting.size, 4)
    assert shots[0].shape == (67, 93, 3) and shots[0].dtype == torch.uint8 and torch.equal(shots[0], shots[3])
    x = upload(shots[1], setting, CPU)
    assert x.shape == (1, 3, 67, 93) and x.is_contiguous(memory_format=setting.memory_format)
    assert torch.equal((255 * x[0]).round().to(torch.uint8).movedim(0, -1), shots[1])
    labels = torch.randint(0, 19, (1, 67, 93), dtype=torch.uint8)
    back = download(labels)
    assert torch.equal(back, labels) and back.data_ptr() != labels.data_ptr()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_pipelined_gives_the_same_labels_in_the_same_order(n):
    setting = replace(SMALL, size=(67, 93))
    shots = [torch.randint(0, 256, (67, 93, 3), dtype=torch.uint8) for _ in range(n)]
    run = prepare(nn.Conv2d(3, 5, 3, padding=1), setting)
    want = serve(run, shots, setting, CPU)
    got = serve(run, shots, replace(setting, transfers="pipelined"), CPU)
    assert len(got) == n and all(torch.equal(a, b) for a, b in zip(got, want)) and want[0].dtype == torch.uint8
    assert torch.equal(want[-1], run(upload(shots[-1], setting, CPU)))


def test_an_error_in_a_helper_is_not_swallowed():
    def broken(x): raise RuntimeError("out of paper")
    for how in ("sequential", "pipelined"):
        with pytest.raises(RuntimeError, match="out of paper"):
            serve(broken, camera((64, 96), 3), replace(SMALL, transfers=how), CPU)


def test_networks_repeat_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = network("contextnet_cn14_160"), network("contextnet_cn14_160")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not a.training and any(m.running_mean.abs().max() > 0.01 for m in a.modules() if isinstance(m, nn.BatchNorm2d))


def test_prepare_leaves_the_network_as_it_was():
    net = network("contextnet_cn14_160")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for kind in (SMALL, replace(SMALL, layout="channels-last"), replace(SMALL, precision="bf16")):
        labels = prepare(net, kind)(torch.rand(1, 3, 64, 96))
        assert labels.shape == (1, 64, 96) and labels.max() < 19
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["contextnet_cn14", "enet", "erfnet", "icnet"])
def test_folding_keeps_the_labels(name):
    if name not in present() or not HAS_FOLD:
        pytest.skip(f"not run: {name} or synseg.compress is missing")
    net, shots = network(name), camera((67, 93), 2)
    plain = replace(SMALL, size=(67, 93))
    want, got = (serve(prepare(net, s), shots, s, CPU) for s in (plain, replace(plain, folded=True)))
    assert max(float((a != b).float().mean()) for a, b in zip(got, want)) < 1e-3


def test_without_compress_folding_says_so(monkeypatch):
    monkeypatch.setattr(realtime.importlib, "import_module", lambda name: object())
    with pytest.raises(RuntimeError, match="no synseg.compress"):
        prepare(nn.Conv2d(3, 2, 1), replace(SMALL, folded=True))


def test_a_small_run_of_the_case(two, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "peak_memory", lambda prepare, *given: dict(peak=2**21, before=2**20))
    outcome = benchmark.run("realtime", (64, 96), rounds=2, record=tmp_path, least=0, repeats=0)
    found, text = outcome.metrics(), benchmark.report(outcome)
    assert json.loads(json.dumps(found)) == found
    assert set(found["groups"]) == {"64x96", "64x96, pipelined"}
    rows = found["groups"]["64x96"]
    assert rows["contextnet_cn14_160"]["peer"] and rows["contextnet_cn14_160"]["figures"]["same"] == [1, 1]
    assert found["not_run"]["no_such_net"] == "the zoo does not know it" and "not run: on a GPU: this run is on the cpu" in text
    assert ("contextnet_cn14_160, folded" in rows) == HAS_FOLD
    assert HAS_FOLD or found["not_run"]["contextnet_cn14_160, folded at 64x96"] == "no synseg.compress"
    assert found["agreement"]["labels that differ, pipelined"] == 0 and all(v < 1e-3 for v in found["agreement"].values())
    fps = rates(found)
    pipelined = found["groups"]["64x96, pipelined"]["contextnet_cn14_160"]
    assert fps["64x96, pipelined", "contextnet_cn14_160"] == pytest.approx(4 / pipelined["median_seconds"])
    assert "57.7" not in text and "22" in text and "not run" in text and (tmp_path / "benchmark_realtime_64x96_cpu.json").exists()


def test_what_fails_is_named(two, monkeypatch):
    def no(net): raise NotImplementedError("no compiler\nhere")
    monkeypatch.setattr(torch, "compile", no)
    monkeypatch.setattr(realtime, "unable", lambda setting: "no synseg.compress" if setting.folded and not setting.compiled else None)
    monkeypatch.setattr(realtime.importlib, "import_module", lambda name: type("M", (), dict(fold_batchnorm=staticmethod(lambda net: net))))
    _, skipped = plan((64, 96), CPU)
    assert skipped["contextnet_cn14_160, folded, compiled, channels-last at 64x96"] == "no compiler"


def test_sizes_and_settings():
    assert sizes((1024, 2048)) == [(1024, 2048), (512, 1024), (256, 512)]
    assert sizes((512, 1024)) == [(512, 1024), (256, 512)] and sizes((360, 480)) == [(360, 480)]
    assert settings("segnet", (64, 96), True, CPU) == [SMALL]
    here, there = settings(RIVALS[0], (64, 96), False, CPU), settings(RIVALS[0], (64, 96), False, torch.device("cuda"))
    assert here[0] == SMALL and len(set(here)) == len(here) and {s.precision for s in there} == {"fp32", "bf16"}
    assert not any(s.compiled for s in here) and any(s.compiled for s in there)


def test_agreement_names_what_it_compared(two):
    found = agree((64, 96))
    assert found["labels that differ, pipelined"] == 0 and ("labels that differ, folded" in found) == HAS_FOLD


def test_memory_of_a_frame(two):
    (labels,) = frame_memory("contextnet_cn14_160", 64, 96)()
    assert labels.shape == (1, 64, 96)


def test_profile_shares():
    net = network("contextnet_cn14_160")
    found = profile_layers(net, (64, 96), repeats=1)
    assert {"depthwise", "1x1", "norm", "elsewhere"} <= set(found)
    for what in ("time", "multiply_adds"):
        assert sum(v[what] for v in found.values()) == pytest.approx(1) and min(v[what] for v in found.values()) >= 0
    assert found["norm"]["multiply_adds"] == 0 and found["1x1"]["multiply_adds"] > found["depthwise"]["multiply_adds"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_printed_numbers():
    ours, enet = PUBLISHED["contextnet_cn14"], PUBLISHED["enet"]
    assert ours.fps == (18.3, 65.5, 139.2) and ours.pipelined == (41.9, 136.2, 299.5) and enet.fps[0] > ours.fps[0]
    assert (ours.class_iou, ours.category_iou) == (66.1, 82.7) and set(PUBLISHED) <= set(RIVALS)
    for name in set(PUBLISHED) & set(present()):  # SegNet: 29,440,000 or so against 29.46M
        assert model_info(name).parameters / 1e6 == pytest.approx(float(PUBLISHED[name].parameters), rel=0.05), name


def test_a_report_without_a_record_says_not_run():
    text = report(None)
    row = next(line for line in text.splitlines() if line.startswith("contextnet_cn14 "))
    assert all(part in row for part in ("66.1", "82.7", "0.85", "0.86", "5.6", "18.3", "65.5", "139.2", "not run"))
    assert rates(None) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no GPU here")
def test_streams_on_a_gpu():
    net, gpu = network("contextnet_cn14_160"), torch.device("cuda")
    shots, setting = camera((128, 256), 9, pinned=True), Setting((128, 256))
    run = prepare(net, setting, gpu)
    want = serve(run, shots, setting, gpu)
    got = serve(run, shots, replace(setting, transfers="pipelined"), gpu)
    assert all(torch.equal(a, b) and not a.is_cuda for a, b in zip(got, want))


def test_the_recorded_run():
    record = load_result("benchmark_realtime_1024x2048_cpu")
    metrics = record["metrics"]
    assert {g.split(",")[0] for g in metrics["groups"]} == {"1024x2048", "512x1024", "256x512"}
    assert all(v < 5e-3 for v in metrics["agreement"].values())
    assert set(metrics["memory"]) <= set(RIVALS)
    assert report(metrics).count("\n") >= len(RIVALS)
