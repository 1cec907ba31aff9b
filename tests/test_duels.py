"The experiments with critics: paired seeds, honest intervals, nothing chosen on what is scored, and every training can be built"
import json
from dataclasses import asdict, replace

import pytest
import torch
from scipy.stats import ttest_1samp
from torch import nn
from torch.testing import assert_close

from synseg import discriminators
from synseg.crf_fit import Scored
from synseg.discriminators import adversary, create_discriminator
from synseg.duels import (DUELS, FIGURES, GRID, ON_VOC, SMALL, TEST, TUNE, WEIGHTS, Tally, answers, believed, chosen, critic, curve,
                          duel_scores, interval, pull, rivals, seeded, summarised, tallied, timed, verdict)
from synseg.plans import Recipe
from synseg.recipes import RECIPES, describe
from synseg.runs import VALID_SEED, Run, build, scenes, train
from synseg.scenes import Scenes
from synseg.segmenter import ModelEntry, ModelInfo
from synseg.zoo import create_model

TINY = Run(images=8, size=(64, 96), batch_size=4, epochs=2, options={"width": 8}, precision="fp32")
TOY = dict(name="toy", critic_lr=1e-2)
EVERY = [(n, p, name, run) for n, r in DUELS.items() for p, runs in r.profiles.items() for name, run in runs.items()]


class Toy(nn.Module):
    "Judges how sure a map is, pixel by pixel"
    def __init__(self, num_classes=11, in_channels=3, scale=10.0):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(0.99))

    def forward(self, images, maps): return self.scale*(maps.amax(1, keepdim=True) - self.shift)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    entry = ModelEntry(Toy, ModelInfo("toy", "this test", 2026, None, 11, 3, 2, None))
    monkeypatch.setitem(discriminators.DISCRIMINATORS, "toy", entry)


@pytest.fixture(scope="module")
def samples():
    noise = torch.Generator().manual_seed(1)
    drawn = [Scenes(4, size=(65, 83), domain="camera", seed=3)[i] for i in range(4)]
    return [Scored((torch.randn(11, 65, 83, generator=noise) + 2*nn.functional.one_hot(y.clamp(max=10), 11).permute(2, 0, 1)).log_softmax(0), x, y)
            for x, y in drawn]


@pytest.fixture(scope="module")
def duel(tmp_path_factory):
    "A learner that fought the toy"
    patch = pytest.MonkeyPatch()
    patch.setitem(discriminators.DISCRIMINATORS, "toy", ModelEntry(Toy, ModelInfo("toy", "this test", 2026, None, 11, 3, 2, None)))
    yield train(replace(TINY, adversary=TOY), tmp_path_factory.mktemp("duel")/"toy_0", progress=False)
    patch.undo()


def test_near_and_inside_share_the_pixels_out(samples):
    tally = Tally(11)
    for s in samples: tally.update(s.log_probs, s.label)
    assert_close(tally.near.matrix + tally.inside.matrix, tally.whole.matrix)
    assert tally.near.matrix.sum() > 0 and tally.inside.matrix.sum() > 0 and set(tally.scores()) == set(FIGURES)


def test_truth_scores_one_and_a_shift_costs_most_at_boundaries(samples):
    maps = lambda label: nn.functional.one_hot(label.masked_fill(label == 255, 0), 11).permute(2, 0, 1).float()
    perfect, moved = Tally(11), Tally(11)
    for s in samples:
        perfect.update(maps(s.label), s.label)
        moved.update(maps(torch.cat([s.label[:, :1], s.label[:, :-1]], 1)), s.label)
    assert all(v == 1 for v in perfect.scores().values())
    found = moved.scores()
    assert found["near_iou"] < found["mean_iou"] < found["inside_iou"] == 1
    assert tallied(samples, 11)["mean_iou"] < 1


def test_intervals_are_student_s():
    values = torch.randn(5, generator=torch.Generator().manual_seed(0)).double().tolist()
    found, theirs = interval(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high)) and found["n"] == 5
    assert interval([0.3]) == dict(mean=0.3, half=None, low=None, high=None, n=1)
    assert interval([0.3, 0.3])["low"] == pytest.approx(0.3)


def test_differences_are_paired_by_seed():
    row = lambda value: dict.fromkeys(FIGURES, value)
    easy = {"a": {0: row(0.1), 1: row(0.2), 2: row(0.3)}, "b": {0: row(0.2), 1: row(0.29), 2: row(0.41), 7: row(0.9)}}
    shift = {0: 0.0, 1: 0.3, 2: -0.1, 7: 0.0}
    hard = {name: {s: row(r["mean_iou"] + shift[s]) for s, r in seeds.items()} for name, seeds in easy.items()}
    first, second = (summarised(rows, "a")["b"]["difference"]["mean_iou"] for rows in (easy, hard))
    assert first == pytest.approx(second) and first["n"] == 3 and first["mean"] == pytest.approx(0.1)
    assert summarised(easy, "a")["a"]["difference"] is None


@pytest.mark.parametrize("values, word", [([0.01, 0.012, 0.011], "better"), ([-0.01, -0.012, -0.011], "worse"),
                                          ([0.01, -0.012, 0.011], "cannot be told from nothing"), ([0.5], "nothing follows"),
                                          ([-0.001, -0.0011, -0.0009], "the same within 0.5 points"), ([0.004, 0.0041, 0.0039], "the same")])
def test_verdicts_say_no_more_than_the_interval(values, word):
    assert word in verdict(interval(values))


def test_a_crf_is_chosen_or_given(samples):
    grid = [dict(bilateral_weight=0, gaussian_weight=0), dict(bilateral_xy=4, bilateral_rgb=8, bilateral_weight=3, gaussian_weight=0)]
    assert chosen([], grid[:1], 11) == grid[0]
    best = chosen(samples, grid, 11)
    assert tallied(samples, 11, best)["mean_iou"] == max(tallied(samples, 11, g)["mean_iou"] for g in grid)
    assert tallied(samples, 11, grid[0]) == pytest.approx(tallied(samples, 11))


def test_a_critic_of_sureness_is_fooled_by_hard_answers(duel, samples):
    duel.engine.critic.load_state_dict(Toy().state_dict())
    found = believed(duel.engine, samples)
    assert found["hard"] > 0.9 and found["truth"] > 0.9 and found["answer"] < 0.5


def test_the_pull_grows_with_the_weight_and_vanishes_with_the_critic(duel, samples):
    duel.engine.critic.load_state_dict(Toy().state_dict())
    first, weight = pull(duel.engine, samples), duel.engine.weight
    duel.engine.weight = 2*weight
    twice = pull(duel.engine, samples)
    duel.engine.critic.load_state_dict(Toy(scale=0.0).state_dict())
    nothing = pull(duel.engine, samples)
    duel.engine.weight = weight
    assert twice["share"] == pytest.approx(2*first["share"], rel=1e-4) and twice["cosine"] == pytest.approx(first["cosine"], abs=1e-4)
    assert nothing["share"] == 0 and nothing["cosine"] == 0


def test_answers_have_the_size_of_the_labels(duel):
    odd = scenes(Run(size=(70, 90)), 2, 5)
    assert [s.log_probs.shape for s in answers(duel, odd)] == [(11, 70, 90)]*2


def test_times_are_measured_and_change_no_weight(duel):
    before = {n: p.clone() for n, p in duel.model.named_parameters()}
    found = timed({"plain": duel}, "plain", GRID[0], rounds=1)
    assert set(found["inference"]) == {"network", "network + CRF"} and all(v > 0 for rows in found.values() for v in rows.values())
    for n, p in duel.model.named_parameters(): assert torch.equal(p, before[n]), n
    assert not duel.model.training and set(timed({"plain": duel}, "plain", None, rounds=1)["inference"]) == {"network"}


def test_a_critic_without_weight_changes_nothing_and_the_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("synseg.duels").duels.COUNTS, "smoke", (1, 2))
    runs = seeded({"plain": replace(TINY, epochs=1), "silent": replace(TINY, epochs=1, adversary=TOY | dict(weight=0.0))}, range(2))
    recipe = Recipe("toy", "A duel.", {"smoke": runs}, lambda *a: duel_scores(*a, grid=GRID[:2]))
    found = recipe.run("smoke", out=tmp_path, progress=False)
    assert json.loads(json.dumps(found)) == found and set(found["variants"]) == {"plain", "plain + CRF", "silent"}
    assert found["variants"]["silent"]["difference"]["mean_iou"] == dict(mean=0, half=0, low=0, high=0, n=2)
    assert found["variants"]["plain + CRF"]["difference"]["boundary_iou"]["n"] == 2 and set(found["crf"]) == {"0", "1"}
    assert set(found["critics"]) == {"silent_0", "silent_1"} and found["critics"]["silent_0"]["share"] == 0
    rows = found["curves"]["silent_1"]
    assert {"step", "supervised", "critic_real", "critic_fake", "mean_iou"} <= set(rows) and rows["step"] == [2]
    assert set(found["seconds"]["step"]) == {"plain", "silent"} and found["pictures"] == 2


def test_curves_tell_of_missing_validations(duel):
    rows = curve(duel)
    assert len(rows["step"]) == len(rows["mean_iou"]) == 2 and rows["adversarial"][0] > 0


def test_every_seed_has_its_own_start():
    runs = seeded({"a": TINY, "b": replace(TINY, start="a")}, (4, 5))
    assert list(runs) == ["a_4", "b_4", "a_5", "b_5"] and [r.start for r in runs.values()] == [None, "a_4", None, "a_5"]
    assert [r.seed for r in runs.values()] == [4, 4, 5, 5]


@pytest.mark.parametrize("name", DUELS)
def test_recipes_are_complete(name):
    r = DUELS[name]
    assert name in RECIPES and set(r.profiles) == {"smoke", "cpu", "gpu"}
    for profile, runs in r.profiles.items():
        assert name in describe(r, profile)
        for i, run in enumerate(runs.values()):
            assert run.epochs and run.minutes is None and (run.start is None or run.start in list(runs)[:i])
            assert run.seed not in (TUNE, TEST, VALID_SEED) and run.split == "train" and run.valid == "val"
            assert profile != "smoke" or run.data == "scenes"


def test_one_thing_differs_within_a_comparison():
    settled = lambda run: {k: v for k, v in asdict(run).items() if k not in ("adversary", "seed", "start", "lr")}
    for name in ("scenes_seggan", "scenes_seggan_why", "camvid_seggan", "voc_seggan"):
        for profile, runs in DUELS[name].profiles.items():
            first, *others = map(settled, runs.values())
            assert all(o == first for o in others), (name, profile)
    runs = DUELS["scenes_seggan"].profiles["cpu"]
    assert len({r.seed for r in runs.values()}) == 3 and len(runs) == 21
    assert {r.adversary["weight"] for n, r in runs.items() if n.startswith("seggan")} == set(WEIGHTS)


def test_every_network_and_every_critic_can_be_built():
    with torch.device("meta"):
        for model, encoder, options in {(r.model, r.encoder, json.dumps(dict(r.options))) for *_, r in EVERY}:
            assert create_model(model, 11, encoder=encoder, **json.loads(options)).num_classes == 11
        for settings in {json.dumps(dict(r.adversary)) for *_, r in EVERY if r.adversary}: adversary(json.loads(settings), 11)


def test_voc_is_as_the_paper_says():
    run = DUELS["voc_seggan"].profiles["gpu"]["seggan_0.01_0"]
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(run.model, 21, encoder=run.encoder, **run.options).parameters()) == 44_048_532
        one = run.adversary
        assert sum(p.numel() for p in create_discriminator(one["name"], 21, **one["options"]).parameters()) == 1_565_953
    assert one["weight"] == 0.01 and one["critic_lr"] == 1e-4 and run.optimizer_options == {"nesterov": True}
    assert (run.lr, run.weight_decay, run.size, run.batch_size, run.schedule) == (2.5e-4, 5e-4, (319, 319), 11, "poly")
    assert run.epochs*10_582/11 == pytest.approx(50_000, rel=0.01)


def test_the_paper_s_networks_take_a_step():
    run = replace(ON_VOC, data="scenes", encoder_weights=None, size=(64, 64), eval_size=None, images=2, batch_size=2, adversary=critic("gpu"))
    learner = build(run, scenes(run, 2, 0), None, progress=False)
    before = [p.clone() for p in (learner.model.encoder.conv1.weight, learner.model.branches[0].weight, learner.engine.critic.last.weight)]
    learner.fit(epochs=1)
    after = learner.model.encoder.conv1.weight, learner.model.branches[0].weight, learner.engine.critic.last.weight
    assert all(not torch.equal(a, b) for a, b in zip(after, before))
    row = learner.history[0]
    assert all(row[k] > 0 for k in ("supervised", "adversarial", "critic_real", "critic_fake")) and learner.engine.updates == 1


def test_small_runs_hold_the_weights_of_the_paper():
    runs = rivals("cpu")
    assert list(runs) == ["plain", "critic", *(f"seggan_{w:g}" for w in WEIGHTS)] and not runs["plain"].adversary
    assert runs["critic"].adversary["options"]["crf"] is None and runs["seggan_0.05"].adversary["weight"] == 0.05
    assert runs["plain"] == SMALL
