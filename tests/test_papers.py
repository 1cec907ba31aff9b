"The papers' experiments: complete, chained as printed, fixed in length, and each able to run"
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from synseg.cli import app
from synseg.optimizers import create_optimizer, create_schedule
from synseg.papers import ABLATIONS, CONTEXT, LADDERS, PAPERS, REALTIME, ROWS, contextnet_ablations, cpu, smoke
from synseg.authors import (BISENET, CONTEXTNET, DEEPLABV1, DEEPLABV2, DFANET, ENET, ERFNET, FRAME, FRRN, HRNET, ICNET, MSSA, PSPNET,
                            deconvnet_stages, deeplabv3_stages, dilated_stages, fcn_stages, on_camvid, tiramisu_stages)
from synseg.recipes import RECIPES, describe
from synseg.runs import Run
from synseg.scenes import Scenes
from synseg.zoo import create_model, list_models, model_options


def models(recipe):
    return {run.model for runs in recipe.profiles.values() for run in runs.values()}


def there(recipe):
    gone = models(recipe) - set(list_models())
    if gone:
        pytest.skip(f"not in the zoo yet: {', '.join(sorted(gone))}")


def test_they_are_among_the_recipes():
    assert set(PAPERS) <= set(RECIPES)
    for row in ROWS.values():
        assert {f"camvid_{row.model}", f"camvid_{row.model}_holdout"} <= set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_every_recipe_is_fixed_in_length_and_within_its_profile(name):
    r = PAPERS[name]
    for profile, runs in r.profiles.items():
        assert runs and name in describe(r, profile)
        stages = list(runs)
        for i, run in enumerate(runs.values()):
            assert run.epochs and run.minutes is None, "the same steps on any machine"
            assert run.start is None or run.start in stages[:i]
            assert run.split == "train" and run.valid == "val", "no test split is touched"
            assert bool(run.hold_out) == (name.endswith(("_holdout", "camvid_frames")) and profile != "smoke")
    for run in r.profiles["cpu"].values():
        assert run.encoder_weights is None and (run.data == "scenes" or (run.size, run.batch_size) == ((120, 160), 4))
        assert "width" not in run.options or run.data == "scenes" or name == "camvid_frames", "the cpu size keeps the paper's network"


def test_networks_meet_on_photographs_as_equals():
    "The same pictures for all; at full size every network as its paper has it, but for what keeps small images small"
    r = PAPERS["camvid_frames"]
    for profile, runs in r.profiles.items():
        assert set(runs) == {*ROWS, "unet_small"} and len({(x.size, x.epochs, x.batch_size, x.seed, x.start) for x in runs.values()}) == 1
        for n, run in runs.items():
            assert (run.options.get("width") is None) == (profile == "gpu" or n == "unet_small")
    assert all(run.eval_size == FRAME for run in r.profiles["gpu"].values())


def test_both_clips_are_scored(tmp_path):
    "What was left out, which decides the order, and val beside it"
    root = tmp_path/"camvid"
    for split, names in (("train", ["0001TP_1", "0001TP_2", "0016E5_1", "0016E5_2"]), ("val", ["0016E5_3"])):
        for part in (split, f"{split}annot"): (root/part).mkdir(parents=True)
        for name, (image, label) in zip(names, Scenes(len(names), (64, 96), seed=len(names))):
            Image.fromarray((image*255).byte().permute(1, 2, 0).numpy()).save(root/split/f"{name}.png")
            Image.fromarray(label.where(label != 255, 11).byte().numpy()).save(root/f"{split}annot/{name}.png")
        (root/f"{split}.txt").write_text("".join(f"{split}/{n}.png {split}annot/{n}.png\n" for n in names))
    r = PAPERS["camvid_frames"]
    runs = {n: replace(r.profiles["cpu"][n], size=(64, 96), epochs=1, batch_size=2) for n in ("enet", "contextnet_cn14")}
    found = replace(r, profiles={"cpu": runs}).run("cpu", root, out=tmp_path/"runs", progress=False)
    assert set(found) == set(runs) and list(found) == sorted(found, key=lambda n: -found[n]["mean_iou"])
    for row in found.values():
        assert row["images"] == 2 and row["trained_images"] == 2 and row["val"]["images"] == 1


@pytest.mark.parametrize("name", PAPERS)
def test_every_network_can_be_built_as_its_recipe_says(name):
    there(PAPERS[name])
    for runs in PAPERS[name].profiles.values():
        for run in runs.values():
            with torch.device("meta"):
                assert create_model(run.model, 11, encoder=run.encoder, **run.options).num_classes == 11


def test_stages_of_fcn():
    runs = fcn_stages(Run(data="camvid", size=FRAME), 1e-5, 3)
    assert [r.start for r in runs.values()] == [None, "fcn32s", "fcn16s"]
    assert [round(math.log10(r.lr), 6) for r in runs.values()] == [-5, -7, -9]
    assert [r.encoder_weights for r in runs.values()] == ["imagenet", None, None]
    assert [r.start for r in cpu(ROWS["fcn8s"]).values()] == [r.start for r in smoke(ROWS["fcn8s"]).values()] == [None, "fcn32s", "fcn16s"]


def test_printed_schedules():
    first, then = deconvnet_stages().values()
    assert [create_schedule("step", **then.schedule_options)(k / 40_000) for k in (9_999, 10_001, 39_999)] == pytest.approx([1, 0.1, 1e-3])
    crops, frames = tiramisu_stages("fc_densenet67").values()
    assert (crops.size, crops.eval_size, frames.size, frames.start) == ((224, 224), FRAME, FRAME, "crops")
    decay = create_schedule(crops.schedule, **crops.schedule_options)
    assert decay(100 / crops.epochs) == pytest.approx(0.995**100)


def test_schedules_of_those_that_look_further():
    images = {"voc2012_aug": 10_582, "cityscapes": 2_975}
    steps = lambda run: run.epochs * images[run.data] / run.batch_size
    first, then = deeplabv3_stages().values()
    printed = [(DEEPLABV1, 6_000), (DEEPLABV2, 20_000), (PSPNET, 30_000), (first, 30_000), (then, 30_000), (dilated_stages()["front"], 60_000)]
    for run, n in printed:
        assert steps(run) == pytest.approx(n, rel=0.06) and run.momentum == 0.9 and run.optimizer == "sgd"
    assert [r.lr * r.encoder_lr for r in (DEEPLABV1, DEEPLABV2, PSPNET)] == pytest.approx([1e-3, 2.5e-4, 1e-2])
    assert [r.freeze_norms for r in (DEEPLABV2, first, then, PSPNET)] == [True, False, True, False]
    assert (DEEPLABV2.aux_weight, PSPNET.aux_weight, PSPNET.options["aux"], PSPNET.augment["rotation"]) == (1, 0.4, True, 10)
    assert (HRNET.epochs, HRNET.batch_size, HRNET.size, HRNET.augment["scale"]) == (484, 12, (512, 1024), (0.5, 2.1))
    assert (MSSA.lr, MSSA.epochs, MSSA.optimizer_options, MSSA.momentum) == (1e-4, 300, dict(alpha=0.995), None)
    assert create_schedule("poly")(0.5) == pytest.approx(0.5**0.9)


def test_schedules_of_those_that_are_quick():
    factor = lambda run, t: create_schedule(run.schedule, **run.schedule_options)(t)
    assert (CONTEXTNET.optimizer, CONTEXTNET.momentum, CONTEXTNET.optimizer_options) == ("rmsprop", 0.9, dict(alpha=0.9, eps=1.0))
    assert (CONTEXTNET.lr, CONTEXTNET.epochs, CONTEXTNET.aux_weight, CONTEXTNET.augment["scale"]) == (0.045, 1000, 0.4, (0.5, 2.0))
    assert factor(CONTEXTNET, 0.5) == pytest.approx(0.5**0.98) and CONTEXTNET.class_weights is None
    for run, printed in [(ENET, ("adam", None, 5e-4, 2e-4, 10, 300, "log")), (ERFNET, ("adam", None, 5e-4, 1e-4, 6, 150, "log")),
                         (ICNET, ("sgd", 0.9, 0.01, 1e-4, 16, 161, None)), (BISENET, ("sgd", 0.9, 0.025, 1e-4, 16, 430, None)),
                         (FRRN, ("adam", None, 1e-3, 0.0, 3, 61, None))]:
        found = (run.optimizer, run.momentum, run.lr, run.weight_decay, run.batch_size, run.epochs, run.class_weights)
        assert found == printed, run.model
    assert ICNET.epochs * 2_975 / 16 == pytest.approx(30_000, rel=0.01)
    assert [factor(FRRN, step / 60_000) for step in (44_900, 45_100)] == pytest.approx([1, 0.1])
    assert BISENET.aux_weight == 1 and DFANET.encoder_weights is None and replace(DFANET, model="bisenet", aux_weight=1.0, encoder_weights="imagenet", options=dict(aux=True)) == BISENET


def test_on_camvid_what_is_said_counts():
    half = on_camvid({"run": FRRN}, size=(180, 240), eval_size=(180, 240))["run"]
    assert (half.size, half.eval_size, half.epochs, half.data) == ((180, 240), (180, 240), 300, "camvid")


def test_contextnets_ablation_changes_one_thing_at_a_time():
    for name, runs in PAPERS["scenes_contextnet"].profiles.items():
        usual = asdict(runs["cn14"])
        for n, run in runs.items():
            own = asdict(run)
            changed = {k for k in usual if usual[k] != own[k] and k != "options"}
            changed |= {k for k in {*usual["options"], *own["options"]} if usual["options"].get(k) != own["options"].get(k)}
            wanted = {"cn14": 0, "asymmetric": 2, "detail": 2}.get(n, 1)  # asymmetric filters are cn12's; the detail branch has no head to train
            assert len(changed) == wanted, (name, n, changed)
    assert set(contextnet_ablations(Run())) == {"cn14", "no_pyramid", "no_aux", "balanced", "asymmetric", "cn12", "cn18", "cn124", "context", "detail",
                                                "cn14_seed1", "cn14_seed2"}


def test_contextnets_branches_are_silenced_and_averaged(tmp_path):
    "The recipe from end to end, on four scenes"
    recipe = PAPERS["scenes_contextnet"]
    there(recipe)
    few = {n: replace(run, images=4, size=(64, 64)) for n, run in recipe.profiles["smoke"].items() if n in ("cn14", "context", "detail")}
    found = replace(recipe, profiles={"smoke": few}).run("smoke", out=tmp_path, progress=False)
    assert set(found) == {"cn14", "context", "detail", "only_context", "only_detail", "ensemble"}
    assert all(0 <= row["mean_iou"] <= 1 and 0 <= row["pixel_accuracy"] <= 1 for row in found.values())


def test_six_contextnets_differ_in_nothing_but_the_network():
    for runs in PAPERS["cityscapes_contextnet"].profiles.values():
        assert len(runs) == 6 and all(n == r.model for n, r in runs.items())
        assert len({str(asdict(r) | dict(model="")) for r in runs.values()}) == 1


def test_on_camvid_crops_fit_and_epochs_are_shared():
    for stages in (deeplabv3_stages(), dilated_stages(), {"run": HRNET}, {"run": MSSA}):
        frames = on_camvid(stages, 200)
        assert sum(r.epochs for r in frames.values()) == 200 and [r.start for r in frames.values()] == [r.start for r in stages.values()]
        assert all(r.size[0] <= FRAME[0] and r.size[1] <= FRAME[1] and r.eval_size == FRAME and r.data == "camvid" for r in frames.values())


def test_comparisons_are_of_equal_pictures():
    for name, wanted in [("scenes_encoder_decoder", {*LADDERS, "unet_small"}), ("scenes_context", {*CONTEXT, "unet_small"}), ("scenes_realtime", {*REALTIME, "unet_small"}), ("scenes_deeplab", set(ABLATIONS))]:
        for runs in PAPERS[name].profiles.values():
            assert set(runs) == wanted
            assert len({(r.images, r.epochs, r.batch_size, r.size, r.seed, r.domain) for r in runs.values()}) == 1
    whole, *others = PAPERS["scenes_deeplab"].profiles["cpu"].values()
    for run in others:
        changed = {k for k in {**whole.options, **run.options} if whole.options.get(k) != run.options.get(k)}
        assert len(changed) + (run.model != whole.model) == 1, "one thing at a time"


def test_what_the_ablation_turns_is_there_to_be_turned():
    there(PAPERS["scenes_deeplab"])
    for model, options in ABLATIONS.values():
        assert set(options) <= set(model_options(model))


@pytest.mark.parametrize("name", [*CONTEXT, *REALTIME])
def test_the_papers_optimiser_fits_the_network(name):
    "Rates of the encoder, frozen norms, auxiliary heads: what the gpu profile asks of a network, the network has"
    there(PAPERS[f"camvid_{name}"])
    for run in PAPERS[f"camvid_{name}"].profiles["gpu"].values():
        with torch.device("meta"):
            model = create_model(run.model, 11, **run.options)
        groups = create_optimizer(run.optimizer, model, run.lr, run.weight_decay, run.momentum, run.encoder_lr, **run.optimizer_options).param_groups
        assert groups[0]["lr"] == run.lr
        if run.encoder_weights == "imagenet":
            assert model.imagenet, "ImageNet weights are asked for, and torchvision has none that fit"
        assert not getattr(model, "margin", 0), "`margin` is what a network cuts off; the engine would cut the labels by it"


@pytest.mark.parametrize("name", ["camvid_fcn8s", "camvid_segnet_basic", "camvid_gridnet", "camvid_fc_densenet56_holdout",
                                  "camvid_deeplabv1", "camvid_deeplabv3plus_holdout", "camvid_hrnet_w18", "camvid_pspnet", "camvid_spinenet49", "camvid_mssa",
                                  "camvid_contextnet_cn14", "camvid_enet", "camvid_erfnet", "camvid_icnet", "camvid_bisenet", "camvid_dfanet", "camvid_frrn_a"])
def test_smoke_runs_and_resumes(name, tmp_path):
    there(PAPERS[name])
    found = PAPERS[name].run("smoke", out=tmp_path, progress=False)
    stages = PAPERS[name].profiles["smoke"]
    assert 0 <= found["mean_iou"] <= 1 and found["trained_images"] == 32 * len(stages)
    again = PAPERS[name].run("smoke", out=tmp_path, progress=False)
    assert again["mean_iou"] == found["mean_iou"] and set(again.get("stages", stages)) == set(stages)


def camvid(root, split, n=3):
    "Scenes laid out as CamVid's files are: void is 11 on disk"
    for part in (split, f"{split}annot"):
        (root / part).mkdir(parents=True)
    for i, (image, label) in enumerate(Scenes(n, (96, 128), seed=5)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(root / split / f"{i}.png")
        Image.fromarray(label.where(label != 255, 11).byte().numpy()).save(root / f"{split}annot" / f"{i}.png")
    (root / f"{split}.txt").write_text("".join(f"{split}/{i}.png {split}annot/{i}.png\n" for i in range(n)))


def test_whoever_has_the_test_split_can_score_it(tmp_path):
    camvid(tmp_path / "camvid", "test")
    name = next(n for n in ("camvid_segnet_basic", "camvid_gridnet", "camvid_unet_small") if models(RECIPES[n]) <= set(list_models()))
    RECIPES[name].run("smoke", out=tmp_path, progress=False)
    words = ["evaluate", tmp_path / name / "smoke" / "run", "--data", "camvid", "--root", tmp_path / "camvid", "--split", "test", "--json"]
    done = CliRunner().invoke(app, [str(w) for w in words])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["images"] == 3 and len(found["iou"]) == 11


def test_a_cpu_recipe_reads_camvid(tmp_path):
    "The real path, one picture per split: two stages are too long for a test, one epoch is not"
    camvid(tmp_path / "camvid", "train", 4)
    camvid(tmp_path / "camvid", "val", 2)
    small = replace(PAPERS["camvid_segnet_basic"], profiles={"cpu": {"run": Run(data="camvid", size=(64, 96), epochs=1, batch_size=2)}})
    found = small.run("cpu", tmp_path / "camvid", tmp_path, tmp_path / "results", progress=False)
    record = json.loads((tmp_path / "results" / "camvid_segnet_basic.json").read_text())
    assert record["metrics"]["mean_iou"] == found["mean_iou"] and record["config"]["runs"]["run"]["optimizer"] == "adamw"
