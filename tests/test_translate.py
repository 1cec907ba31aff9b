"Changes that need no training by their definitions; a refiner's training that is followed, resumed to the bit, and chosen by the rule"
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synseg.labels import label_space
from synseg.pairs import drawn, pictures, prepared, stack, write_pictures
from synseg.realism import feature_extractor
from synseg.refiner import OURS, choose_step
from synseg.runstate import Interrupted
from synseg.translate import (Painting, Follow, by_refiner, chain, chosen, from_lab, match_colours, nearness, pseudo_labels, randomise, read_rows,
                              repaint, shoot, to_lab, train_refiner, weights_at)
from synseg.zoo import create_model

SIZE = (64, 96)
PLAN = Painting(replace(OURS.at(SIZE), pretrain=(3, 1), steps=4, batch=2, buffer=4, lr=1e-3), 4, 12, first_rate=2.0, settle=0.5, every=4)


def rng(*key): return np.random.default_rng(key)


def test_colour_space_and_back():
    x = torch.rand(3, 9, 7)*0.9 + 0.05
    torch.testing.assert_close(from_lab(to_lab(x)), x, rtol=0, atol=1e-4)
    grey = to_lab(torch.full((3, 1, 1), .5))
    assert grey[1:].abs().max() < 0.02, "grey has next to no colour"


def test_colours_become_those_of_a_real_picture():
    image, real = torch.rand(3, 20, 30)*0.2 + 0.4, (torch.rand(1, 3, 12, 10)*60 + 90).byte()
    out = match_colours(real)(image, torch.zeros(20, 30).long(), rng(0))
    ours, theirs = to_lab(out), to_lab(real[0].float()/255)
    torch.testing.assert_close(ours.mean((1, 2)), theirs.mean((1, 2)), rtol=0, atol=2e-3)
    torch.testing.assert_close(ours.std((1, 2)), theirs.std((1, 2)), rtol=0, atol=2e-3)
    flat = match_colours(real)(torch.full((3, 8, 8), .3), torch.zeros(8, 8).long(), rng(0))
    assert torch.isfinite(flat).all()


def test_randomising_paints_each_class_as_one():
    label = torch.zeros(16, 16).long()
    label[:, 8:] = 3
    label[0] = 255
    change = randomise(texture=0.0)
    out = change(torch.full((3, 16, 16), .5), label, rng(1))
    for k in (0, 3, 255):
        assert (out[:, label == k].std(1) < 1e-6).all(), "no texture: one colour per class, void too"
    assert (out[:, 5, 0] - out[:, 5, 12]).abs().max() > 0.01
    assert torch.equal(out, change(torch.full((3, 16, 16), .5), label, rng(1))) and not torch.equal(out, change(torch.full((3, 16, 16), .5), label, rng(2)))
    rough = randomise()(torch.rand(3, 13, 17), torch.zeros(13, 17).long(), rng(0))
    assert rough.shape == (3, 13, 17) and 0 <= rough.min() <= rough.max() <= 1


def test_chains_and_cameras():
    image, label = torch.rand(3, 11, 14), torch.zeros(11, 14).long()
    twice = chain(shoot(), lambda x, y, r: 1 - x)(image, label, rng(4))
    torch.testing.assert_close(twice, 1 - shoot()(image, label, rng(4)))


def test_pseudo_labels_keep_the_surest_of_each_class():
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.p = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x): return torch.cat([x[:, :1], 1 - x[:, :1]], 1)*3
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    said = Net()(images.float()/255).argmax(1)
    found = pseudo_labels(Net(), images, share=0.25, sure=2.0)
    assert found.dtype == torch.uint8 and torch.equal(found[found != 255].long(), said[found != 255])
    for k in (0, 1): assert (found == k).sum() == pytest.approx(0.25*(said == k).sum().item(), abs=3)
    best = Net()(images.float()/255).softmax(1).max(1)[0]
    assert best[(found == 0)].min() >= best[(found == 255) & (said == 0)].max()
    assert (pseudo_labels(Net(), images, share=0.0, sure=0.0) != 255).all(), "whatever is sure enough stays"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    home = tmp_path_factory.mktemp("sets")
    for domain in ("synthetic", "camera"):
        write_pictures(home / domain / "train", prepared(drawn(domain, "train", 8, SIZE, None), 8, SIZE), label_space("scenes"))
    features = feature_extractor(create_model("unet_small", 11, weights="scenes"))
    synthetic, real = (pictures(home / d, "train") for d in ("synthetic", "camera"))
    shown = stack(synthetic, 4)
    measure = nearness(shown, stack(real), features)
    return synthetic, real, features, lambda model: measure(repaint(model, shown))


def test_followed_chosen_and_found_again(sets, tmp_path):
    found = train_refiner(PLAN, *sets[:2], tmp_path, *sets[2:], progress=False)
    assert [r["step"] for r in found["rows"]] == [0, 4, 8, 12, 16] and found["pretrained"] == 4 and found["step"] in (12, 16)
    assert "first" in found["rows"][1] and all("critic_real" in r and "adversarial" in r for r in found["rows"][2:])
    assert found["step"] == choose_step(found["rows"][3:]) and read_rows(tmp_path / "follow.jsonl") == found["rows"]
    model = chosen(PLAN, tmp_path, found["step"])
    image = torch.rand(3, 64, 64)
    torch.testing.assert_close(by_refiner(model)(image, None, None), model(image[None])[0].detach(), rtol=0, atol=1e-6)
    again = train_refiner(PLAN, *sets[:2], tmp_path, *sets[2:], progress=False)
    assert again == json.loads((tmp_path / "chosen.json").read_text())


def test_killed_and_resumed_to_the_bit(sets, tmp_path, monkeypatch):
    whole = train_refiner(PLAN, *sets[:2], tmp_path / "whole", *sets[2:], progress=False)
    step = Follow.on_step
    def killed(self, learner):
        step(self, learner)
        if learner.engine.updates == 10: raise Interrupted("killed between two checkpoints")
    monkeypatch.setattr(Follow, "on_step", killed)
    with pytest.raises(Interrupted): train_refiner(PLAN, *sets[:2], tmp_path / "killed", *sets[2:], progress=False)
    monkeypatch.setattr(Follow, "on_step", step)
    again = train_refiner(PLAN, *sets[:2], tmp_path / "killed", *sets[2:], progress=False)
    assert again["rows"] == whole["rows"] and again["step"] == whole["step"]
    for n in (0, 4, 8, 12, 16):
        a, b = (load_file(weights_at(tmp_path / name, n)) for name in ("whole", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a), n


def test_the_first_rate_is_that_of_pre_training_alone():
    rate = PLAN.schedule(5, 4)
    assert [rate(n/20) for n in range(6)] == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="whole multiples"): replace(PLAN, every=3)


def test_nearness_of_the_same_pictures(sets):
    real = stack(sets[1])
    found = nearness(real, real, sets[2])(real.float()/255)
    assert found["distance"] < 1e-6 and found["ssim_own"] == pytest.approx(1) and found["ssim_real"] == pytest.approx(1)
