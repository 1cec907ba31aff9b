"The study in small, from nothing to its page: every stage once, nothing twice, equal updates, figures where they belong"
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import synseg.downstream as downstream
from synseg.downstream import BASELINES, ROWS, STUDIES, Bench, trainings
from synseg.experiments import recipe_app
from synseg.pairs import stack
from synseg.recipes import RECIPES, describe

STUDY = STUDIES["refiner-scenes2camera"]


def quick(study=STUDY, **changed):
    "The smoke profile under the name cpu, which may be recorded; one network, smaller still"
    scale = study.scales["smoke"]
    scale = replace(scale, networks={"unet": scale.networks["unet"]}, test=2, **changed)
    return replace(study, scales=study.scales | dict(cpu=scale), profiles=study.profiles | dict(cpu=trainings(scale)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    home = tmp_path_factory.mktemp("study")
    return home, quick().run("cpu", out=home, record=home / "results", progress=False)


def test_the_three_studies_are_recipes():
    assert set(STUDIES) == {"refiner-scenes2camera", "refiner-scenes2camvid", "refiner-gta2cityscapes"} <= set(RECIPES)
    for study in STUDIES.values():
        assert set(study.scales) == set(study.profiles) == {"smoke", "cpu", "gpu"} and "unet-ours" in describe(study, "cpu")
        gpu = study.scales["gpu"].painters
        assert gpu["ours"].settings.steps == 5000 and gpu["ours"].settings.pretrain == (1200, 400) and gpu["ours"].width == 64
        assert gpu["ours"].settings.first == "perceptual" and gpu["simgan"].settings.first == "regular"


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda s: s.name)
def test_equally_many_pictures_for_every_kind(study):
    for profile in ("cpu", "gpu"):
        scale = study.scales[profile]
        seen = {n: r.epochs*(scale.real if n.endswith("-real") else scale.synthetic) for n, r in trainings(scale).items() if not n.endswith("combined")}
        assert max(seen.values()) <= 1.05*min(seen.values()), seen
        runs = trainings(scale, seed=3)
        assert {r.seed for r in runs.values()} == {3} and [n for n in runs if n.startswith("unet-")] == [f"unet-{k}" for k in ROWS + BASELINES]
        assert runs["unet-combined"].start == "unet-colours" and list(runs).index("unet-colours") < list(runs).index("unet-combined")


def test_from_nothing_to_the_page(done):
    home, found = done
    folder = home / STUDY.name / "cpu"
    assert found["page"] == str(folder / "index.html") and "Table 3" in (folder / "index.html").read_text(encoding="utf-8")
    for file in ("pictures.png", "answers_unet.png", "study.json", "plan.json", "seed0/refiner-ours/chosen.json", "seed0/refiner-ours/follow.jsonl",
                 "seed0/unet-real/last.safetensors", "seed0/unet-real/metrics.jsonl"):
        assert (folder / file).is_file(), file
    table = found["tables"]["unet"]["mean_iou"]
    assert set(table) == {*ROWS, *BASELINES} and set(table["real"]) == {*ROWS, "refined"}
    assert set(found["near"]) == {"synthetic", "simgan", "ours", "colours", "randomised", "simgan pre-trained", "ours pre-trained"}
    assert found["near"]["synthetic"]["ssim_own"]["mean"] == pytest.approx(1) and found["preserved"]["unet"]["synthetic"]["mean"] == 1


def test_the_record_holds_numbers_only(done):
    home, found = done
    record = json.loads((home / "results" / f"{STUDY.name}.json").read_text(encoding="utf-8"))
    assert record["metrics"]["tables"] == found["tables"] and record["config"]["profile"] == "cpu" and len(record["metrics"]["each"]) == 1
    text = json.dumps(record)
    assert str(home) not in text and "png" not in text and "page" not in record["metrics"]


def test_nothing_is_done_twice_and_seeds_are_added(done, monkeypatch):
    home, found = done
    trained = []
    monkeypatch.setattr(downstream, "train", lambda run, out, *a, **k: trained.append(out) or pytest.fail("trained again"))
    again = quick().run("cpu", out=home, progress=False)
    assert again["tables"] == found["tables"] and again["near"] == found["near"] and not trained


def test_seeds_differ_and_intervals_appear(tmp_path):
    both = quick().run("cpu", out=tmp_path, seeds=2, progress=False)
    assert both["seeds"] == 2 and both["tables"]["unet"]["mean_iou"]["ours"]["real"]["half"] is not None
    a, b = both["curves"]
    assert a["ours"][-1] != b["ours"][-1]
    shared = tmp_path / STUDY.name / "cpu" / "sets"
    assert sorted(p.name for p in shared.iterdir()) == ["colours", "randomised", "real", "synthetic"]


def test_other_settings_need_another_folder(done):
    home, _ = done
    with pytest.raises(ValueError, match="epochs"): quick(epochs=2).run("cpu", out=home, progress=False)


def test_refined_pictures_keep_their_labels(done):
    home, _ = done
    bench = Bench(quick().scales["cpu"], STUDY.sources, home / STUDY.name / "cpu")
    for kind in ("ours", "simgan", "colours", "randomised"):
        for split in ("train", "test"):
            theirs, ours = bench.set("synthetic", split), bench.set(kind, split)
            assert len(theirs) == len(ours) and all(torch.equal(theirs[i][1], ours[i][1]) for i in range(len(ours))), kind
            assert not torch.equal(stack(theirs), stack(ours))
    mixed = bench.set("combined-unet")
    real = stack(bench.set("real"))
    assert len(mixed) == 16 and torch.equal(stack(mixed)[8:], real), "half of them recoloured, half real"
    assert not any(torch.equal(mixed[8 + i][1], bench.set("real")[i][1]) for i in range(8)), "real labels are nobody's but real's"


def test_what_cannot_work_is_said(tmp_path):
    for options, part in [(dict(profile="cpu"), "--data-root"), (dict(profile="tpu"), "no profile"), (dict(record=tmp_path), "not recorded"),
                          (dict(seeds=0), "1 or more"), (dict(encoder_weights="x.pth"), "leave out")]:
        with pytest.raises(ValueError, match=part): STUDIES["refiner-scenes2camvid"].run(out=tmp_path, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_seeds_on_the_command_line(monkeypatch):
    asked = {}
    monkeypatch.setattr(downstream.Study, "run", lambda self, *a, **k: asked.update(a=a, k=k) or {})
    assert CliRunner().invoke(recipe_app, ["run", STUDY.name, "--seeds", "3"]).exit_code == 0 and asked["k"] == dict(seeds=3)
    assert CliRunner().invoke(recipe_app, ["run", STUDY.name]).exit_code == 0 and asked["k"] == {}
    refused = CliRunner().invoke(recipe_app, ["run", "unet_losses", "--seeds", "3"])
    assert refused.exit_code == 2 and "has no --seeds" in refused.stderr
