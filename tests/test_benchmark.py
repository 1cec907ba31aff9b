"Cases at small sizes: every entry runs, the rivals answer alike, records hold plain values. No time is asserted"
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from synseg import benchmark, rivals
from synseg.benchmark import CASES, case, report, run
from synseg.compiled import available
from synseg.core import load_result
from synseg.rivals import pictures, unaries
from synseg.stopwatch import peak_memory

SMALL = (40, 56)
HAS = {name: importlib.util.find_spec(name) is not None for name in ("pydensecrf", "torchmetrics")}


@pytest.mark.parametrize("size", [(40, 56), (97, 131), (360, 480), (500, 300)])
def test_pictures_have_the_size_and_the_values_of_bytes(size):
    found = pictures(size)
    assert set(found) == {"china", "flower", "street"}
    for image in found.values():
        assert image.shape == (3, *size) and image.dtype == torch.float32
        torch.testing.assert_close(image * 255, (image * 255).round(), rtol=0, atol=1e-4)
        assert image.std() > 0.05 and image.min() >= 0 and image.max() <= 1


def test_unaries_are_log_probabilities_and_repeat():
    u = unaries((41, 57), 5, seed=3)
    torch.testing.assert_close(u.exp().sum(1), torch.ones(1, 41, 57))
    assert torch.equal(u, unaries((41, 57), 5, seed=3)) and not torch.equal(u, unaries((41, 57), 5, seed=4))


@pytest.mark.parametrize("name", ["metrics", "kmeans", "crf"])  # tests/test_realtime.py and test_speed.py have the others
def test_a_small_run_of_each_case(name, monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "SMALL", (20, 28))
    heard = []
    monkeypatch.setattr(benchmark, "peak_memory", lambda prepare, *arguments: dict(peak=2**21, before=2**20) if prepare(*arguments)() is not None else {})
    outcome = run(name, SMALL, rounds=1, record=tmp_path, say=heard.append, least=0, repeats=0)
    text, found = report(outcome), outcome.metrics()
    assert json.loads(json.dumps(found)) == found
    for entry in outcome.table.entries:
        assert entry.group in text and entry.name in text
        assert outcome.table.median(entry.group, entry.name) > 0
    groups = found["groups"]
    assert all(sum(row["peer"] for row in rows.values()) <= 1 for rows in groups.values())
    assert found["machine"]["cores"] >= 1 and "cores" in text and heard
    record = json.loads((tmp_path / f"benchmark_{name}_40x56_cpu.json").read_text())
    assert record["metrics"]["groups"] == groups and record["config"]["size"] == [40, 56]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest point is only kept apart on Linux")
def test_memory_of_the_dense_field_in_a_fresh_process():
    held = peak_memory(rivals.dense_memory, 96, 128)
    assert 96 * 128 * 12 * 4 < held["peak"] - held["before"] < 400 * 2**20


def test_metrics_agree_to_the_last_pixel():
    assert case("metrics").agree((53, 47)) == {"cells of confusion matrices that differ": 0}


@pytest.mark.skipif(not HAS["pydensecrf"], reason="pydensecrf2 is not installed")
@pytest.mark.parametrize("size", [(48, 64), (37, 61)])
def test_fields_agree_with_pydensecrf(size, monkeypatch):
    monkeypatch.setattr(rivals, "SMALL", (20, 28))
    found = case("crf").agree(size)
    largest = {text: v for text, v in found.items() if "from pydensecrf2" in text and "largest" in text}
    same = {text: v for text, v in found.items() if "from pydensecrf2" in text and "same class" in text}
    assert len(largest) == len(same) == (4 if available() else 2)  # two pictures, compiled too where numba is
    assert max(largest.values()) < 1e-4 and min(same.values()) > 0.999
    assert found["synseg from exact, 20x28: mean difference"] < 0.05


def test_both_programs_cluster_the_same_numbers():
    for entry in case("kmeans").prepare((30, 40), torch.device("cpu"))[:4]:
        assert math.isfinite(entry.figures(entry.call(0))["inertia"])
    ours, theirs = (e.figures(e.call(0))["inertia"] for e in case("kmeans").prepare((60, 80), torch.device("cpu"))[2:4])
    assert abs(ours / theirs - 1) < 0.05  # ten restarts each


def test_without_rivals_ours_still_runs_and_they_are_named(monkeypatch):
    hide = lambda peers: dict(peers)
    monkeypatch.setattr(benchmark, "missing", hide)
    monkeypatch.setattr(rivals, "missing", hide)
    monkeypatch.setattr(rivals, "SMALL", (16, 20))
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: dict(peak=2**21, before=2**20))
    for name in ("metrics", "crf"):
        outcome = run(name, (20, 24), rounds=1, least=0, repeats=0)
        text = report(outcome)
        assert all(e.name.startswith("synseg") for e in outcome.table.entries)
        assert "not installed: " in text and "pip install" in text
        assert all(row["speedup"] is None for rows in outcome.metrics()["groups"].values() for row in rows.values())
    assert "2 MiB at most, 1 MiB of them" in text


def test_what_cannot_be_run(tmp_path):
    with pytest.raises(ValueError, match="choose of metrics, kmeans, crf"):
        run("speed")
    with pytest.raises(ValueError, match="at least 16"):
        run("metrics", (15, 100))
    with pytest.raises(ValueError, match="at least one"):
        run("metrics", rounds=0)
    with pytest.raises(ValueError, match="does not work here"):
        run("metrics", device="cuda:77", record=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_recorded_runs_were_quiet_and_complete(name):
    record = load_result("benchmark_realtime_1024x2048_cpu" if name == "realtime" else f"benchmark_{name}")
    metrics = record["metrics"]
    assert metrics["disturbed_rounds"] == 0 and metrics["rounds"] >= 5 and metrics["not_installed"] == {}
    assert record["config"]["size"] == ([1024, 2048] if name == "realtime" else list(CASES[name].size))
