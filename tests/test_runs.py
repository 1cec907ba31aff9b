"Runs and recipes: the same record gives the same weights, nothing is overwritten, what is scored is never trained on"
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from synseg.labels import label_space
from synseg.recipes import RECIPES, describe, recipe
from synseg.runs import VALID_SEED, Chosen, Run, build, read_run, scenes, score_set, settled, train, training_set
from synseg.scenes import Scenes

TINY = Run(images=12, size=(64, 64), epochs=2, batch_size=4)


@pytest.fixture
def files(tmp_path):
    "A folder data set of two sequences, three classes"
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 2)):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
        for i in range(n):
            name = f"{'dusk' if i % 3 == 0 else 'noon'}{i}.png"
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / split / "images" / name)
            Image.fromarray(rng.integers(0, 3, (70, 90), dtype=np.uint8)).save(tmp_path / split / "masks" / name)
    return tmp_path


@pytest.mark.parametrize("bad", [dict(loss="hinge"), dict(domain="oil"), dict(size=(20, 64)), dict(size=(64,)), dict(epochs=0),
                                 dict(minutes=-1), dict(batch_size=0), dict(lr=0), dict(images=0)])
def test_impossible_runs_are_refused(bad):
    with pytest.raises(ValueError):
        Run(**bad)


def test_what_is_left_open_is_settled():
    data = scenes(TINY, 10, 0)
    assert settled(Run(), data, "cpu").size == (96, 128)
    assert settled(Run(), data, "cpu").epochs == 2800
    assert settled(Run(minutes=2), data).epochs is None
    assert settled(Run(), data, "cpu").minutes == 9 and settled(Run(), data, "cuda").minutes is None
    assert settled(TINY, data) == TINY


def test_defaults_for_camvid(data_root):
    run = Run(data="camvid")
    data = training_set(run, data_root("camvid"))
    on_cpu, on_gpu = settled(run, data, "cpu"), settled(run, data, "cuda")
    assert (len(data), on_cpu.size, on_cpu.epochs, on_gpu.size) == (367, (120, 160), 76, (360, 480))


def test_held_out_sequence_of_camvid(data_root):
    run = Run(data="camvid", hold_out="0001TP")
    kept, held = training_set(run, data_root("camvid")), score_set(run, data_root("camvid"))
    assert (len(kept), len(held)) == (305, 62)
    assert not set(kept.names) & set(held.names) and all("0001TP" in n for n in held.names)
    assert held[0][0].shape == (3, 360, 480)


def test_scenes_of_both_domains_take_turns():
    data = scenes(Run(domain="both", size=(64, 64)), 6, seed=4)
    for i in range(6):
        image, label = Scenes(3, (64, 64), ("camera", "synthetic")[i % 2], 4)[i // 2]
        torch.testing.assert_close(data[i][0], image)
        assert torch.equal(torch.as_tensor(np.asarray(data.raw(i)[1])).long(), label)


def test_training_and_scoring_scenes_differ():
    run = Run(images=4, size=(64, 64))
    assert not torch.equal(training_set(run)[0][0], score_set(run)[0][0]) and run.seed != VALID_SEED


def test_a_run_repeats_to_the_bit_and_is_not_overwritten(tmp_path):
    first = train(TINY, tmp_path / "a", progress=False)
    run, root = read_run(tmp_path / "a")
    assert run == settled(TINY, training_set(TINY)) and root is None
    second = train(run, tmp_path / "b", progress=False)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    train(TINY, tmp_path / "a", resume=True, progress=False)  # finished: nothing left to do
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_files_one_channel_and_held_out(files, tmp_path):
    run = Run(data="folder", in_channels=1, hold_out="dusk", size=(64, 64), epochs=1, batch_size=2)
    learner = train(run, tmp_path / "run", files, progress=False)
    assert learner.model.in_channels == 1 and learner.evaluate()["images"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["root"] == str(files)
    with pytest.raises(ValueError, match="none is left"):
        training_set(Run(data="folder", hold_out="n"), files) and score_set(Run(data="folder", hold_out="xyz"), files)
    with pytest.raises(ValueError, match="--root"):
        training_set(Run(data="folder"))


def test_damaged_runs_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_run(tmp_path)


def test_every_recipe_is_complete():
    for name, r in RECIPES.items():
        assert r.name == name and r.about.endswith(".") and set(r.profiles) == {"smoke", "cpu", "gpu"}
        if getattr(r, "seeded", False):  # a study makes the pictures that it trains with: tests/test_downstream.py
            assert all(run.data == "folder" for runs in r.profiles.values() for run in runs.values())
        else:
            assert all(run.data == "scenes" and run.images <= 64 for run in r.profiles["smoke"].values())
            assert all((run.data == "scenes") == (r.needs is None) for run in r.profiles["cpu"].values())
        for profile in r.profiles:
            assert profile in describe(r, profile)
    with pytest.raises(ValueError, match="did you mean"):
        recipe("camvid_unet")
    with pytest.raises(ValueError, match="no profile"):
        recipe("unet_losses").run("tpu")
    with pytest.raises(ValueError, match="not recorded"):
        recipe("unet_losses").run("smoke", record="results")


def test_a_recipe_runs_resumes_and_records(tmp_path, monkeypatch):
    from dataclasses import replace
    small = replace(recipe("scenes_domain_gap"), profiles={"cpu": {d: Run(domain=d, images=8, size=(64, 64), epochs=1)
                                                                   for d in ("synthetic", "camera")}})
    monkeypatch.setattr("synseg.recipes._domain_set", lambda learner, domain: scenes(Run(domain=domain, size=(64, 64)), 4, VALID_SEED))
    first = small.run("cpu", out=tmp_path, record=tmp_path / "results", progress=False)
    assert set(first) == {f"{a}_on_{b}" for a in ("synthetic", "camera") for b in ("synthetic", "camera")}
    stamp = (tmp_path / "scenes_domain_gap" / "cpu" / "camera" / "model.safetensors").stat().st_mtime_ns
    again = small.run("cpu", out=tmp_path, progress=False)
    assert stamp == (tmp_path / "scenes_domain_gap" / "cpu" / "camera" / "model.safetensors").stat().st_mtime_ns
    assert again["camera_on_camera"]["mean_iou"] == first["camera_on_camera"]["mean_iou"]
    record = json.loads((tmp_path / "results" / "scenes_domain_gap.json").read_text())
    assert record["config"]["profile"] == "cpu" and record["config"]["runs"]["camera"]["size"] == [64, 64]


def test_published_network_scores_as_published(data_root):
    root = data_root("camvid_espnet_ref").parent
    data_root("camvid")
    found = recipe("camvid_metric_reference").run("cpu", root)
    expected = dict(mean_iou=0.69995, pixel_accuracy=0.92634, mean_accuracy=0.79632, frequency_weighted_iou=0.88337,
                    mean_iou_void_charged=0.68562)
    assert {k: round(found[k], 5) for k in expected} == expected


def test_chosen_keeps_names_and_space():
    class Data:
        names, label_space = ["p", "q", "r"], label_space("camvid")
        def raw(self, i): return i, i
        def __getitem__(self, i): return self.names[i]
    chosen = Chosen([(Data(), 2), (Data(), 0)])
    assert chosen.names == ["r", "p"] and chosen[0] == "r" and chosen.raw(1) == (0, 0) and len(chosen) == 2


def test_old_records_are_read(tmp_path):
    "A run.json written before there were optimisers to choose"
    old = dict(model="unet_small", data="scenes", epochs=2, size=[64, 64], lr=3e-3, weight_decay=1e-2, seed=0, loss="cross_entropy", gone=1)
    (tmp_path / "run.json").write_text(json.dumps(dict(run=old, root=None)))
    run = read_run(tmp_path)[0]
    assert (run.optimizer, run.schedule, run.class_weights, run.start, run.clip) == ("adamw", "cosine", "sqrt", None, None)


@pytest.mark.parametrize("optimizer,momentum", [("adamw", None), ("adam", None), ("rmsprop", None), ("sgd", 0.9)])
def test_momentum_in_old_records_means_what_it_did(tmp_path, optimizer, momentum):
    "All of them said 0.9, and only SGD listened"
    old = dict(model="unet_small", size=[64, 64], optimizer=optimizer, momentum=0.9)
    (tmp_path / "run.json").write_text(json.dumps(dict(run=old, root=None)))
    assert read_run(tmp_path)[0].momentum == momentum


def test_an_old_rmsprop_run_resumes_without_momentum_and_a_new_one_with_it(tmp_path):
    run = Run(images=8, size=(64, 64), epochs=1, batch_size=4, optimizer="rmsprop", options=dict(width=4))
    for name, old in [("old", True), ("new", False)]:
        train(run if old else replace(run, momentum=0.9), tmp_path / name, progress=False)
        content = json.loads((tmp_path / name / "run.json").read_text())
        content["run"]["epochs"] = 2
        if old:
            del content["format"]
            content["run"]["momentum"] = 0.9
        (tmp_path / name / "run.json").write_text(json.dumps(content))
        learner = train(run, tmp_path / name, resume=True, progress=False)
        assert {g["momentum"] for g in learner.engine.optimizer.param_groups} == ({0} if old else {0.9})
        assert read_run(tmp_path / name)[0].momentum == (None if old else 0.9)


def test_log_weights_are_enets():
    from synseg.datasets import class_frequencies
    from synseg.enet import log_weights
    run = settled(Run(images=4, size=(64, 64), epochs=1, class_weights="log", options=dict(width=4)), None)
    data = scenes(run, 4, 0)
    learner = build(run, data, None, progress=False)
    torch.testing.assert_close(learner.engine.loss.weight.cpu(), log_weights(class_frequencies(data).pixels))


@pytest.mark.parametrize("bad", [dict(optimizer="lion"), dict(schedule="linear"), dict(class_weights="cube"), dict(momentum=1), dict(clip=0),
                                 dict(momentum=0.9), dict(optimizer="rmsprop", optimizer_options=dict(momentum=0.9)),
                                 dict(optimizer="sgd", optimizer_options=dict(betas=(0.9, 0.99))), dict(eval_size=(20, 20)),
                                 dict(schedule="poly", schedule_options=dict(power=-1)), dict(schedule_options=dict(at=[0.5]))])
def test_impossible_optimisers_are_refused(bad):
    with pytest.raises(ValueError):
        Run(**bad)


PAPERS = [dict(optimizer="sgd", lr=0.05, optimizer_options=dict(nesterov=True), schedule="poly", class_weights="median"),
          dict(optimizer="rmsprop", optimizer_options=dict(alpha=0.9, eps=1e-3), schedule="exponential", schedule_options=dict(end=0.3)),
          dict(optimizer="rmsprop", momentum=0.9, optimizer_options=dict(alpha=0.9, eps=1.0), lr=0.045, schedule="poly", class_weights="log"),
          dict(optimizer="adam", schedule="constant", clip=1.0, class_weights=None)]


@pytest.mark.parametrize("settings", PAPERS, ids=lambda s: s["optimizer"])
def test_papers_optimisers_resume_to_the_bit(tmp_path, settings):
    "Killed in the second epoch and taken up again, a run ends in the weights it would have had"
    from synseg.callbacks import Callback
    from synseg.runstate import Interrupted

    class Kill(Callback):
        def on_step(self, learner):
            if learner.progress.step == 4:
                learner._request.number = 2

    run = Run(images=12, size=(64, 64), epochs=2, batch_size=4, **settings)
    whole = train(run, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "parts", progress=False, callbacks=[Kill()])
    parts = train(run, tmp_path / "parts", resume=True, progress=False)
    for (k, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values()):
        assert torch.equal(a, b), k
    assert [r["lr"] for r in whole.history] == [r["lr"] for r in parts.history]


def test_a_stage_starts_where_the_last_one_ended(tmp_path):
    from synseg.runs import take_over
    from synseg.zoo import create_model
    first = train(TINY, tmp_path / "crops", progress=False)
    stage = Run(images=12, size=(64, 64), eval_size=(96, 128), epochs=1, batch_size=4, lr=1e-4, start="crops")
    second = train(stage, tmp_path / "whole", progress=False)
    assert second.eval_size == (96, 128)
    moved = [(a - b).abs().max() for a, b in zip(first.model.parameters(), second.model.parameters())]
    assert 0 < max(moved) < 2e-3  # three steps of 1e-4 from there, nothing like a fresh start
    (tmp_path / "crops" / "last.safetensors").unlink()
    train(stage, tmp_path / "whole", resume=True, progress=False)  # a run that has begun does not look back
    with pytest.raises(FileNotFoundError, match="train that run first"):
        train(stage, tmp_path / "other", progress=False)
    file = tmp_path / "crops" / "model.safetensors"
    assert take_over(create_model("unet_small", 11), file) == []
    assert take_over(create_model("unet_small", 7), file) == ["score.weight", "score.bias"]
    with pytest.raises(ValueError, match="by name and shape"):
        take_over(create_model("unet_small", 11, width=24), file)


def test_median_weights_of_camvid_are_segnets(data_root):
    "SegNet's published weights. Theirs have void as a twelfth class in the median; their sign's, 9.6, these labels do not give"
    from synseg.datasets import class_frequencies
    from synseg.losses import median_frequency_weights
    published = [.2595, .1826, 4.5640, .1417, .9051, .3826, 9.6446, 1.8418, .6823, 6.2478, 7.3614]
    ours = median_frequency_weights(*class_frequencies(training_set(Run(data="camvid"), data_root("camvid"))))
    same = [i for i, name in enumerate(label_space("camvid").names) if name != "SignSymbol"]
    torch.testing.assert_close(ours[same], torch.tensor(published)[same], rtol=0.21, atol=0)


def test_encoder_weights_of_a_recipe(tmp_path):
    from dataclasses import replace
    from synseg.zoo import create_model
    state = create_model("ternausnet", 11).encoder.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, tmp_path / "vgg11.pth")
    run = replace(TINY, model="ternausnet", encoder_weights="imagenet", images=4, epochs=1)
    small = replace(recipe("unet_losses"), name="pretrained", profiles={"cpu": {"a": replace(run, lr=1e-9)}})
    small.run("cpu", out=tmp_path, record=tmp_path / "results", encoder_weights=tmp_path / "vgg11.pth", progress=False)
    saved = torch.load(tmp_path / "pretrained/cpu/a/state.pt", weights_only=True)["model"]
    torch.testing.assert_close(saved["encoder.0.weight"], state["0.weight"], atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "results" / "pretrained.json").read_text())
    assert record["config"]["runs"]["a"]["encoder_weights"] == "vgg11.pth"  # the file, not the folder of one machine
    (tmp_path / "vgg11.pth").unlink()
    small.run("cpu", out=tmp_path, progress=False, encoder_weights=tmp_path / "vgg11.pth")  # done: the file is no longer needed
    with pytest.raises(ValueError, match="starts from ImageNet"):
        recipe("unet_losses").run("cpu", encoder_weights="vgg11.pth", out=tmp_path)


CAREFUL = Run(model="unet", encoder="resnet18", images=12, size=(64, 64), epochs=2, batch_size=4, lr=1e-2, optimizer="sgd", schedule="poly",
              encoder_lr=0.1, freeze_norms=True, ema=0.9, options=dict(encoder_width=8, width=4))


def test_a_slow_encoder_and_frozen_norms_resume_to_the_bit(tmp_path):
    from synseg.callbacks import Callback
    from synseg.runstate import Interrupted

    class Kill(Callback):
        def on_step(self, learner):
            if learner.progress.step == 4:
                learner._request.number = 2

    whole = train(CAREFUL, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(CAREFUL, tmp_path / "parts", progress=False, callbacks=[Kill()])
    parts = train(CAREFUL, tmp_path / "parts", resume=True, progress=False)
    for (k, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values()):
        assert torch.equal(a, b), k
    assert all(torch.equal(v, torch.zeros_like(v)) for k, v in whole.model.state_dict().items() if k.endswith("running_mean"))
    assert read_run(tmp_path / "parts")[0].encoder_lr == 0.1 and whole.history[0]["lr"] > 4e-3


def test_a_share_below_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a share"):
        Run(encoder_lr=-0.1)
    with pytest.raises(ValueError, match="no encoder"):
        train(Run(images=4, size=(64, 64), epochs=1, encoder_lr=0.1), tmp_path / "nowhere", progress=False)
