"Two processes are one: weights, scores, files, order and resume; and the arithmetic of more of them"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import two_processes
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import Dataset

from synseg.callbacks import Callback
from synseg.losses import CrossEntropyLoss, DiceLoss, FocalLoss
from synseg.optimizers import freeze_norms, per_process, sync_norms
from synseg.runstate import load_state
from synseg.scaling import (Cluster, fit_link, measure, plan_run, ring_all_reduce, ring_seconds, scaled_lr, step_time,
                            timeline)
from synseg.schedules import EpochSampler
from synseg.train import Learner

ROOT = Path(__file__).resolve().parents[1]


class Uneven(Dataset):
    "Bright squares on dark ground; every image has another share of void, the last but one nothing else. Remembers who asked"
    def __init__(self, n):
        self.n, self.seen = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.seen.append(i)
        draw = torch.Generator().manual_seed(i)
        label = torch.zeros(12, 14, dtype=torch.int64)
        y, x = torch.randint(0, 8, (2,), generator=draw).tolist()
        label[y:y + 4, x:x + 5] = 1
        image = (0.2 + 0.5*label + 0.1*torch.randn(3, 12, 14, generator=draw)).clamp(0, 1)
        label[:(5*i) % 12] = 255
        if i == self.n - 2:
            label[:] = 255
        return image, label


class SaveAt(Callback):
    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_step(self, learner):
        if learner.progress.step == self.step:
            learner.save(self.folder)


def net(kind):
    torch.manual_seed(0)
    norm = nn.Identity() if kind == "plain" else nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    model.num_classes = 2
    if kind == "frozen":
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        freeze_norms(model)
    return model


def learner(kind, batch_size, n=14, **settings):
    "Of 14 images in steps of 4 two are left out of every epoch"
    return Learner(net(kind), Uneven(n), batch_size=batch_size, progress=False, seed=5, clip=1.0, **settings)


# What both processes do, once for all tests: the rest is compared with what this one process does.
TWO = """
import io, json, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_scaling import *

folder, rank, written = Path({folder!r}), int(os.environ["RANK"]), []
def watch(event, args):
    if rank and event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"): written.append(str(args[0]))
    if rank and event in ("os.mkdir", "os.rename", "os.remove"): written.append(str(args[0]))
sys.addaudithook(watch)
screen = sys.stdout, sys.stderr
if rank: sys.stdout = sys.stderr = io.StringIO()

for kind in ("plain", "frozen"):
    run = learner(kind, 2, out=folder/kind, callbacks=[SaveAt(4, folder/f"half_{{kind}}")]).fit(2)
focal = learner("plain", 2, loss=FocalLoss(weight=torch.tensor([0.3, 1.0])), out=folder/"focal").fit(1)
told = run.__class__(net("plain"), Uneven(14), Uneven(7), batch_size=2, seed=5, out=folder/"told").fit(1)
said = sys.stderr.getvalue() + sys.stdout.getvalue() if rank else ""
sys.stdout, sys.stderr = screen

scores = {{n: told.evaluate(Uneven(n)) for n in (1, 2, 7)}}  # one image for two processes, and sets that they cannot halve

later = learner("plain", 2, out=folder/"later", valid=Uneven(3)).resume({one!r})
later.train.seen.clear()
later.fit(2)
seen = later.engine.gather(later.train.seen)
small = learner("plain", 4, n=3).fit(1)  # fewer images than one step of both would take
everyone = run.engine.gather(dict(written=written, said=said, scores=scores, small=sorted(small.train.seen[-1:]),
                                  same=[p.sum().item() for p in later.model.parameters()]))
if not rank: (folder/"found.json").write_text(json.dumps(dict(everyone=everyone, seen=seen)))
run.engine.accelerator.wait_for_everyone()
run.engine.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The folder in which two processes have worked, and what they found"
    folder = tmp_path_factory.mktemp("pair")
    learner("plain", 4, callbacks=[SaveAt(4, folder/"one")]).fit(2)
    two_processes(folder/"two.py", TWO.format(tests=str(ROOT/"tests"), folder=str(folder), one=str(folder/"one")))
    return folder, json.loads((folder/"found.json").read_text())


def close(folder, model):
    saved = load_state(folder)["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_two_processes_give_the_weights_of_one(pair, kind):
    "Void is uneven, classes are weighted, gradients clipped, AdamW: each of these knows whether the means were merged rightly"
    alone = learner(kind, 4).fit(2)
    close(pair[0]/kind, alone.model)
    assert load_state(pair[0]/kind)["rows"][-1]["loss"] == pytest.approx(alone.history[-1]["loss"], abs=1e-6)


def test_focal_loss_too(pair):
    close(pair[0]/"focal", learner("plain", 4, loss=FocalLoss(weight=torch.tensor([0.3, 1.0]))).fit(1).model)


def test_scores_are_those_of_one_process(pair):
    folder, found = pair
    alone = learner("plain", 4)
    alone.model.load_state_dict(load_state(folder/"told")["model"])
    for n in (1, 2, 7):
        want = dict(alone.evaluate(Uneven(n)), seconds=0)
        for process in found["everyone"]:
            assert dict(process["scores"][str(n)], seconds=0) == want  # counts are whole numbers: equal, not close


def test_only_the_first_process_writes_and_speaks(pair):
    folder, found = pair
    assert [p["written"] for p in found["everyone"]] == [[], []] and found["everyone"][1]["said"] == ""
    assert {f.name for f in (folder/"told").iterdir()} == {"metrics.jsonl", "model.safetensors", "last.safetensors", "state.pt", "samples.png"}
    assert len((folder/"told"/"metrics.jsonl").read_text().splitlines()) == 1


def test_one_process_hands_over_to_two(pair):
    folder, found = pair
    close(folder/"later", learner("plain", 4).fit(2).model)
    assert found["everyone"][0]["same"] == found["everyone"][1]["same"]
    order = EpochSampler(14, 5)
    order.set_epoch(1)
    assert sorted(sum(found["seen"], [])) == sorted(order.order()[4:12])  # four were seen before, two are left out


@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_two_processes_hand_over_to_one(pair, kind):
    run = learner(kind, 4).resume(pair[0]/f"half_{kind}")
    assert (run.progress.epoch, run.progress.batch, run.progress.images) == (1, 1, 16)
    run.train.seen.clear()
    run.fit(2)
    close(pair[0]/kind, run.model)
    assert sorted(run.train.seen) == sorted(run.sampler.order()[4:12])
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):  # as many images in all, or it is another run
        learner(kind, 2).resume(pair[0]/f"half_{kind}")


def test_a_set_smaller_than_one_step_is_shared_without_repeating(pair):
    first, second = (p["small"] for p in pair[1]["everyone"])
    assert first != second and len(first) == len(second) == 1


@pytest.mark.parametrize("make", [CrossEntropyLoss, FocalLoss])
def test_mass_makes_parts_add_up(make):
    logits, labels = torch.randn(6, 3, 5, 7), torch.randint(0, 3, (6, 5, 7))
    labels[1:3] = 255
    loss = make(weight=torch.tensor([0.2, 1.0, 3.0]))
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    masses = torch.stack([loss.mass(labels[p]) for p in parts])
    means = torch.stack([loss(logits[p], labels[p]) for p in parts])
    torch.testing.assert_close((masses*means).sum()/masses.sum(), loss(logits, labels))
    assert masses[1] == 0 and not torch.isclose(means.mean(), loss(logits, labels))
    assert not hasattr(DiceLoss(), "mass")  # a ratio over the whole batch: no weights make the parts add up


def test_batches_are_shared_or_refused(monkeypatch):
    from synseg import optimizers
    state = type("State", (), dict(num_processes=1, device=torch.device("cpu")))()
    monkeypatch.setattr(optimizers, "process_state", lambda: state)
    model = net("norm")
    assert per_process(8) == 8 and sync_norms(model) is model and type(model[1]) is nn.BatchNorm2d
    state.num_processes = 3
    assert per_process(6) == 2
    with pytest.raises(ValueError, match="batch_size is 8, in all; 3 processes share it: choose a multiple of 3"):
        per_process(8)
    with pytest.raises(ValueError, match="needs GPUs"):
        sync_norms(model)
    with pytest.raises(ValueError, match="frozen or synchronised"):
        sync_norms(net("frozen"))
    state.device = torch.device("cuda")
    assert type(sync_norms(model)[1]) is nn.SyncBatchNorm


COMMAND = ["train", "--images", "8", "--epochs", "1", "--batch-size", "4", "--size", "64x64", "--freeze-norms"]


def launched(tmp_path, *launcher):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")  # nothing says that CPUs are meant
    done = subprocess.run([sys.executable, "-m", *launcher, "-m", "synseg", *COMMAND, "--out", str(tmp_path/"two")],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("launcher", [
    ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    pytest.param(["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                  "--dynamo_backend", "no"], marks=pytest.mark.slow)])
def test_the_command_line_runs_on_two_processes(tmp_path, launcher):
    from safetensors.torch import load_file

    from synseg.runs import Run, train
    done = launched(tmp_path, *launcher)
    assert done.stdout.count("8 images in") == 1, done.stdout
    alone = train(Run(images=8, epochs=1, batch_size=4, size=(64, 64), freeze_norms=True), tmp_path/"one", progress=False)
    assert alone.progress.step == 2
    two = load_file(tmp_path/"two"/"last.safetensors")
    for name, value in load_file(tmp_path/"one"/"last.safetensors").items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
    assert json.loads((tmp_path/"two"/"run.json").read_text())["run"] == json.loads((tmp_path/"one"/"run.json").read_text())["run"]


# --- the arithmetic -------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30))
def test_a_ring_gives_all_the_same_bits_of_the_sum(n, length):
    vectors = [torch.randn(length) for _ in range(n)]
    before = [v.clone() for v in vectors]
    sums, sent = ring_all_reduce(vectors)
    assert all(torch.equal(s, sums[0]) for s in sums) and sum(sent) == 2*(n - 1)*length
    torch.testing.assert_close(sums[0], torch.stack(before).sum(0), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(vectors, before))


def test_seconds_on_the_wire():
    assert ring_seconds(1e9, 1, 1e9, 1) == 0
    assert ring_seconds(8e9, 8, 1e9, 0.5) == pytest.approx(14*0.5 + 14)  # 2 * 7/8 * 8 s
    assert Cluster(1, 10).all_reduce(1e9) == 0
    for n in (2, 4, 8):
        assert Cluster(n, 10).ring(1e8) == Cluster(n, 10).two_level(1e8) > 0
    sizes = [1e3, 1e5, 1e7]
    assert fit_link(sizes, [ring_seconds(s, 2, 2e9, 5e-5) for s in sizes]) == pytest.approx((5e-5, 2e9))


def test_a_step_hides_what_it_can():
    free, hall = Cluster(1, 10), Cluster(64, 10)
    alone = step_time(free, 4, 10**7)
    assert (alone.compute, alone.total, alone.efficiency) == (0.4, 0.4, 1.0)
    hidden, plain = step_time(hall, 4, 10**7), step_time(hall, 4, 10**7, overlap=False)
    assert 0 < hidden.exposed < plain.exposed == pytest.approx(plain.reduce) and hidden.efficiency > plain.efficiency
    rows = timeline(0.3, [0.05]*4)
    assert [r[0] for r in rows] == pytest.approx([0.15, 0.2, 0.25, 0.3]) and rows[-1][2] == pytest.approx(0.35)
    assert timeline(0.3, [1.0]*2)[-1][2] == pytest.approx(0.2 + 2)  # a wire that is never free


def test_a_plan_says_what_to_look_at():
    one = plan_run(Cluster(8, 20), 2975, 500, 2, 10**7, lr=0.01, lr_batch=16)
    assert (one.batch, one.steps, one.left_out, one.lr) == (16, 185, 15, 0.01)
    assert one.gpu_hours == pytest.approx(8*one.hours) and one.hours == pytest.approx(185*500*one.step.total/3600)
    far = plan_run(Cluster(256, 20), 2975, 500, 2, 10**7, lr=0.01, lr_batch=16)
    assert far.lr == pytest.approx(0.32) and any("5 steps an epoch" in n for n in far.notes) and any("32 times" in n for n in far.notes)
    assert scaled_lr(0.01, 4, "sqrt") == pytest.approx(0.02) and scaled_lr(0.01, 4, "none") == 0.01
    for bad, message in [(lambda: plan_run(Cluster(8, 20), 9, 1, 2, 10, 0.1, 16), "do not fill one batch of 16"), (lambda: scaled_lr(1, 2, "cubic"), "choose one of linear"),
                         (lambda: Cluster(12, 20), "do not fill machines"), (lambda: Cluster(0, 20), "1 GPU or more"), (lambda: Cluster(1, 0), "speed above 0")]:
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.slow
def test_measuring_two_processes():
    found = measure(2, batch=1, size=(64, 64), steps=2)
    assert found["world"] == 2 and len(found["seconds"]) == 2 and min(found["links"].values()) > 0
