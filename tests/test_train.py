"Training: exact resume after a kill, errors in plain words, files that survive"
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same_state, two_processes
from torch import nn
from torch.utils.data import Dataset, Subset

from synseg.callbacks import Callback, Samples
from synseg.datasets import Seeded
from synseg.engine import OwnItems
from synseg.labels import label_space
from synseg.runstate import Diverged, Interrupted, load_state
from synseg.schedules import ClassBalancedSampler
from synseg.scoring import evaluate
from synseg.train import Learner

ROOT = Path(__file__).resolve().parent.parent


class Squares(Dataset):
    "Bright squares (class 1) on dark ground, drawn with the global generator: random unless someone seeds it"
    def __init__(self, n=20, size=(17, 22), value=None):
        self.n, self.size, self.value = n, size, value

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        label = torch.zeros(self.size, dtype=torch.int64)
        y, x = torch.randint(0, 10, (2,)).tolist()
        label[y:y + 6, x:x + 6] = 1
        image = (0.2 + 0.5*label + 0.1*torch.randn(3, *self.size)).clamp(0, 1)
        label[0] = 255
        if self.value is not None and i == 3:
            label[4, 5] = self.value
        return image, label


class Named(Squares):
    label_space = label_space("camvid")
    names = [f"frame_{i}.png" for i in range(20)]


def small_net(classes=2, dropout=0.3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(dropout),
                        nn.Conv2d(8, classes, 3, padding=1))
    net.num_classes = classes
    return net


def learner(out=None, **changes):
    settings = dict(batch_size=3, progress=False, ema=0.9, clip=1.0, out=out, valid=Subset(OwnItems(Squares(6), 1), range(5)))
    settings.update(changes)
    data, model = settings.pop("data", Squares()), settings.pop("model", None)
    return Learner(small_net() if model is None else model, data, **settings)


class At(Callback):
    "Do something once, after a given step"
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, learner):
        if learner.progress.step == self.step:
            self.action(learner)


# --- exact resume ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import os, resource, signal, torch
from test_train import *
{body}
"""


def in_a_process_of_its_own(body):
    "Run `body` with the thread count of this process, without which bits would differ"
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads()), ACCELERATE_USE_CPU="true")
    code = SCRIPT.format(tests=str(ROOT/"tests"), body=body)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("settings", [
    dict(save_every=2),
    dict(save_every=1, accumulate=2, precision="fp32", sampler="balanced", workers=1),
    dict(save_every=5, ema=0.0, clip=None)])
def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, settings):
    whole = learner(tmp_path/"whole", **settings).fit(4)
    killed = in_a_process_of_its_own(  # inside an epoch: there are 6 (or 3) steps in each
        "kill = At(10, lambda l: os.kill(os.getpid(), signal.SIGKILL))\n"
        f"learner({str(tmp_path/'killed')!r}, callbacks=[kill], **{settings}).fit(4)")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < load_state(tmp_path/"killed")["progress"]["step"] <= 10
    resumed = learner(tmp_path/"killed", **settings).resume().fit(4)
    for part, value in whole.state().items():
        assert same_state(value, resumed.state()[part]), part
    assert (tmp_path/"whole/model.safetensors").read_bytes() == (tmp_path/"killed/model.safetensors").read_bytes()
    rows = [[json.loads(line) for line in open(tmp_path/run/"metrics.jsonl")] for run in ("whole", "killed")]
    assert len(rows[0]) == 4 and same_state(*rows)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11])  # within an epoch, at its end, at the next one's start
def test_ctrl_c_saves_and_resumes_exactly(tmp_path, step):
    whole = learner(tmp_path/"whole").fit(2)
    stop = At(step, lambda l: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="saved in .*resume") as caught:
        learner(tmp_path/"cut", callbacks=[stop]).fit(2)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert load_state(tmp_path/"cut")["progress"]["step"] == step
    torch.manual_seed(99)
    resumed = learner(tmp_path/"cut").resume().fit(2)
    assert same_state(whole.state(), resumed.state())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_without_a_folder_says_that_nothing_is_kept():
    with pytest.raises(Interrupted, match="Nothing was saved"):
        learner(callbacks=[At(2, lambda l: os.kill(os.getpid(), signal.SIGINT))]).fit(2)


def test_same_seed_same_bits_and_other_seed_other_bits():
    weights = [learner(seed=seed, valid=None).fit(1).model[0].weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_two_learners_take_turns():
    "Accelerate shares its state among learners: neither must disturb the other"
    alone = learner(accumulate=2).fit(2)
    first, second = learner(accumulate=2), learner(accumulate=1)
    second.fit(1)
    first.fit(2)
    assert torch.equal(alone.model[0].weight, first.model[0].weight)
    assert (first.progress.step, second.progress.step) == (6, 6)


def test_resume_wants_the_same_run(tmp_path):
    learner(tmp_path).fit(1)
    with pytest.raises(ValueError, match="batch_size was 3 and is 4"):
        learner(tmp_path, batch_size=4).resume()
    with pytest.raises(ValueError, match="another model"):
        learner(tmp_path, model=small_net(3), class_weights=None).resume()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        learner(tmp_path).resume(tmp_path/"elsewhere")


@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"not a state at all"])
def test_damaged_state_is_refused(tmp_path, damage):
    learner(tmp_path).fit(1)
    (tmp_path/"state.pt").write_bytes(damage((tmp_path/"state.pt").read_bytes()))
    with pytest.raises(ValueError, match="truncated or not"):
        learner(tmp_path).resume()


def test_state_file_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path/"evil"),)
    torch.save(dict(progress=Evil()), tmp_path/"state.pt")
    with pytest.raises(ValueError):
        learner(tmp_path).resume()
    assert not (tmp_path/"evil").exists()


# --- what goes wrong ------------------------------------------------------------------------------------------------

def test_diverged_loss_stops_and_keeps_the_last_good_state(tmp_path):
    class Spoiled:
        calls = 0

        def __call__(self, logits, labels):
            self.calls += 1
            return logits.mean()*(float("nan") if self.calls == 9 else 1.0)
    run = learner(tmp_path, loss=Spoiled())
    with pytest.raises(Diverged, match=r"loss is nan at step 8 \(epoch 2.*third of it.*state.pt") as caught:
        run.fit(3)
    assert isinstance(caught.value, ValueError)
    state = load_state(tmp_path)
    assert state["progress"]["step"] == 6
    assert all(torch.isfinite(t).all() for t in state["model"].values())
    assert learner(tmp_path).resume().progress.step == 6


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    run = learner(tmp_path).fit(1)
    before = (tmp_path/"state.pt").read_bytes()
    with torch.no_grad():
        run.model[0].weight[0] = float("nan")
    with pytest.raises(Diverged, match="not saved"):
        run.save()
    assert (tmp_path/"state.pt").read_bytes() == before


def test_full_disk_loses_no_earlier_checkpoint(tmp_path):
    pytest.importorskip("resource")
    whole = learner().fit(3)
    done = in_a_process_of_its_own(  # no file may grow beyond 2000 bytes from step 8 on
        "full = At(8, lambda l: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))\n"
        f"learner({str(tmp_path)!r}, callbacks=[full], save_every=2).fit(3)")
    assert done.returncode == 1 and "OSError: could not save" in done.stderr and "still stands" in done.stderr, done.stderr
    assert load_state(tmp_path)["progress"]["step"] == 6
    assert not list(tmp_path.glob(".*.tmp"))
    resumed = learner(tmp_path).resume().fit(3)
    assert torch.equal(whole.model[0].weight, resumed.model[0].weight)


def test_first_batch_is_checked_and_its_file_named():
    wrong = Named(value=11)
    with pytest.raises(ValueError, match=r"training image 3 \(frame_3.png\).*value 11 found at \(4, 5\).*load_dataset"):
        learner(model=small_net(11), data=wrong, batch_size=20, class_weights=None).fit(1)


def test_images_out_of_range_are_refused():
    class Bytes(Squares):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return (image*255).byte(), label
    with pytest.raises(ValueError, match="uint8.*divide by 255"):
        learner(data=Bytes(), valid=None).fit(1)


@pytest.mark.parametrize("changes, message", [
    (dict(data=Squares(0)), "training set is empty"),
    (dict(precision="fp64"), "precision is 'fp64'"),
    (dict(sampler="fair"), "sampler is 'fair'"),
    (dict(class_weights="median"), "class_weights is 'median'"),
    (dict(accumulate=0), "accumulate is 0"),
    (dict(ema=1.5), "ema decay is 1.5"),
    (dict(data=Named()), "the model has 2 classes, the training set 11"),
])
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        learner(**changes)


def test_fit_must_know_when_to_end():
    with pytest.raises(ValueError, match="how long"):
        learner().fit()
    with pytest.raises(ValueError, match="positive"):
        learner().fit(0)


# --- what goes right ------------------------------------------------------------------------------------------------

def test_it_learns_and_leaves_its_files(tmp_path):
    run = learner(tmp_path, model=small_net(dropout=0.0), data=Squares(60), lr=0.02).fit(8)
    scores = run.evaluate()
    assert scores["mean_iou"] > 0.9 and scores["images"] == 5
    assert {"metrics.jsonl", "samples.png", "model.safetensors", "last.safetensors", "state.pt"} <= {p.name for p in tmp_path.iterdir()}
    rows = [json.loads(line) for line in open(tmp_path/"metrics.jsonl")]
    assert rows == run.history and [r["epoch"] for r in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["mean_iou"] == scores["mean_iou"]
    assert {"loss", "lr", "mean_iou", "pixel_accuracy", "iou", "images_per_second", "step", "images"} <= rows[-1].keys()
    assert not run.model.training


def test_accumulated_batches_equal_one_large_batch():
    "Without batch norm, and with a loss that is a mean over equally many pixels"
    def plain():
        torch.manual_seed(0)
        return nn.Conv2d(3, 2, 3, padding=1)
    kw = dict(precision="fp32", ema=0.0, class_weights=None, data=Squares(24), schedule=lambda t: 1.0, valid=None, clip=None,
              optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    large = learner(model=plain(), batch_size=8, **kw).fit(2)
    small = learner(model=plain(), batch_size=4, accumulate=2, **kw).fit(2)
    assert large.progress.step == small.progress.step == 6
    torch.testing.assert_close(large.model.weight, small.model.weight, rtol=1e-3, atol=1e-5)


def test_schedule_drives_the_learning_rate():
    seen = []
    run = learner(schedule=lambda t: 1 - t, lr=0.5,
                  callbacks=[At(k, lambda l: seen.append(l.engine.optimizer.param_groups[0]["lr"])) for k in range(1, 13)])
    run.fit(2)
    torch.testing.assert_close(seen, [0.5*(1 - k/12) for k in range(12)])


def test_minutes_bound_the_run():
    run = learner(data=Squares(3000), ema=0.0).fit(minutes=0.03)
    assert run.progress.elapsed() < 10 and run.fraction() == 1 and len(run.history) >= 1
    assert run.engine.optimizer.param_groups[0]["lr"] < 3e-3*0.2


def test_a_callback_can_end_the_run():
    class Enough(Callback):
        def on_step(self, learner):
            if learner.progress.step == 4:
                learner.stop = "seen enough"
    run = learner(callbacks=[Enough()]).fit(5)
    assert run.progress.step == 4 and "mean_iou" in run.history[-1]


def test_validations_are_rationed():
    rows = learner(validations=2).fit(6).history
    assert [r["epoch"] for r in rows if "mean_iou" in r] == [3, 6]


def test_evaluate_scores_at_the_labels_size():
    class Big(Squares):
        "Labels twice as large as what the network sees"
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return (image.repeat_interleave(2, 1).repeat_interleave(2, 2),
                    label.repeat_interleave(2, 0).repeat_interleave(2, 1))
    seen = []
    net = small_net()
    net.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[-2:])))
    scores = evaluate(net, Big(4), size=(17, 22), precision="fp32")
    assert set(seen) == {(17, 22)} and scores["images"] == 4 and net.training


def test_evaluate_takes_images_of_different_sizes():
    class Mixed(Squares):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return (image, label) if i % 2 else (image[:, :14], label[:14])
    assert evaluate(small_net(), Mixed(5))["images"] == 5


def test_auxiliary_heads_are_trained():
    class Two(nn.Module):
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.head(self.body(x))

        def forward_aux(self, x):
            h = self.body(x)
            return self.head(h), [self.aux(h)]
    torch.manual_seed(0)
    model = Two()
    before = model.aux.weight.clone()
    learner(model=model).fit(1)
    assert not torch.equal(before, model.aux.weight)


def test_zoo_models_are_saved_with_label_space_and_size(tmp_path):
    from synseg.zoo import create_model, load_model
    class Scene(Named):
        def __init__(self):
            super().__init__(4, (64, 70))
    run = Learner(create_model("unet_small", 11), Scene(), Scene(), batch_size=2, out=tmp_path, eval_size=(64, 70),
                  progress=False).fit(1)
    card = load_model(tmp_path/"model.safetensors").card
    assert card.input_size == (64, 70) and card.label_space.names == Named.label_space.names
    again = Learner.load(tmp_path, valid=run.valid, progress=False)
    assert again.eval_size == (64, 70)
    image = Scene()[0][0][None]
    torch.testing.assert_close(again.model(image), load_model(tmp_path/"model.safetensors")(image))
    further = Learner.load(tmp_path, Scene(), Scene(), batch_size=2, progress=False)
    assert further.progress.epoch == 1 and further.fit(2).progress.epoch == 2


def test_load_without_training_data_can_only_evaluate(tmp_path):
    with pytest.raises(FileNotFoundError):
        Learner.load(tmp_path)
    run = Learner(small_net(), None, Squares(3), progress=False)
    assert 0 <= run.evaluate()["mean_iou"] <= 1
    with pytest.raises(ValueError, match="no training set"):
        run.fit(1)
    with pytest.raises(ValueError, match="without a training set"):
        run.resume(tmp_path)


def test_samples_show_image_truth_and_prediction(tmp_path):
    from PIL import Image
    run = learner()
    sheet = Samples(Squares(5), tmp_path/"s.png", n=2).draw(run)
    assert isinstance(sheet, Image.Image) and sheet.size == (3*22 + 2*4, 2*17 + 4)


def test_tensorboard_rows(tmp_path):
    pytest.importorskip("tensorboard")
    learner(tmp_path, tensorboard=True).fit(2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [6, 12]


def test_inner_seeded_sets_hear_of_the_epoch():
    inner = Seeded(Squares(8), lambda image, label: (image + torch.rand(()), label), 0)
    run = learner(data=Subset(inner, range(6)), valid=None)
    run.data.set_epoch(0)
    first = run.data[0][0]
    run.data.set_epoch(1)
    assert not torch.equal(first, run.data[0][0])
    run.data.set_epoch(0)
    assert torch.equal(first, run.data[0][0])


def test_balanced_sampler_shows_rare_classes():
    class Rare(Squares):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image, label*0 + (i == 0)
    run = learner(data=Rare(40), sampler="balanced", valid=None)
    assert isinstance(run.sampler, ClassBalancedSampler)
    assert sum(i == 0 for i in run.sampler.order()) > 8


TWO = """
run = learner({out!r}, save_every=2).fit(2)
scores = run.evaluate()
weights = run.engine.gather(run.model[0].weight.detach())
assert run.engine.world == 2 and torch.equal(*weights), "the processes drifted apart"
assert scores["images"] == 5 and all(s["iou"] == scores["iou"] for s in run.engine.gather(scores))
sys.stdout.write(f"[fine {run.progress.step}]")
import torch.distributed
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit
"""


def test_two_processes_stay_together(tmp_path):
    assert two_processes(tmp_path/"two.py", SCRIPT.format(tests=str(ROOT/"tests"), body=TWO.replace("{out!r}", repr(str(tmp_path/"run"))))).count("fine 6") == 2
