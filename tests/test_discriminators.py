"Every critic by its name: counts, interfaces, fields, and plain words for what does not fit"
import pytest
import torch
from torch import nn

from synseg.adversarial import Adversarial, one_hot
from synseg.check import count_parameters, expect_fail
from synseg.discriminators import (DISCRIMINATORS, OF_MAPS, OF_PICTURES, TRUTHS, adversary, create_discriminator, discriminator_info,
                                   list_discriminators)
from synseg.losses import CrossEntropyLoss
from synseg.luc import scaled_truth
from synseg.refiner import CRITICS as REFINER
from synseg.simgan import CRITICS as SIMGAN

SETTINGS = dict(name="advsemiseg", options=dict(width=2), weight=0.02, truth="scaled", form="focal", critic_lr=1e-3, betas=[0.5, 0.9], warmup=1, critic_updates=2)


def call(critic, name, x, k):
    return critic(x, torch.rand(len(x), k, *x.shape[-2:]).softmax(1)) if name in OF_MAPS else critic(x)


def test_names():
    assert list_discriminators() == list(DISCRIMINATORS) and {"seggan", "advsemiseg"} <= set(DISCRIMINATORS)
    assert not set(OF_MAPS) & set(OF_PICTURES) and set(OF_MAPS) | set(OF_PICTURES) == set(DISCRIMINATORS)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_count_and_record(name):
    info = discriminator_info(name)
    with torch.device("meta"): critic = create_discriminator(name, info.classes, info.in_channels)
    assert info.name == name and info.deviations and info.year > 2000 and count_parameters(critic) == info.parameters


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_interface(name):
    critic = create_discriminator(name, 5, 3, width=4)
    assert isinstance(critic, nn.Module)
    for size in ((64, 96), (67, 93)):
        out = call(critic, name, torch.rand(2, 3, *size), 5)
        assert out.ndim in ((2, 4) if name in OF_MAPS else (4,)) and out.is_floating_point() and out.isfinite().all()
        assert out.shape[:2] == (2, 2 if name in {**SIMGAN, **REFINER} else 1)
    assert call(create_discriminator(name, 5, 1, width=4), name, torch.rand(1, 1, 64, 64), 5).shape[0] == 1
    out.sum().backward()
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_unknown_options(name):
    with expect_fail(ValueError, contains=f"{name} has no such option"): create_discriminator(name, depth=3)


@pytest.mark.parametrize("name, says", [("segan", "did you mean 'seggan'"), ("critic", "Known: luc"), (None, "no discriminator is called None"), ("", "Known: luc")])
def test_unknown_names(name, says):
    for ask in (create_discriminator, discriminator_info, lambda n: adversary(dict(name=n), 5)):
        with expect_fail(ValueError, contains=says): ask(name)


def test_truths():
    y, p = torch.randint(0, 4, (2, 6, 7)), torch.randn(2, 4, 6, 7).softmax(1)
    y[:, 2:4] = 255
    for truth in TRUTHS.values():
        maps = truth(y, p)
        assert maps.shape == p.shape and not maps[:, :, 2:4].any()
        torch.testing.assert_close(maps.sum(1), (y != 255).float())
        assert torch.equal(maps.argmax(1)[y != 255], y[y != 255])


@pytest.mark.parametrize("wrong, says", [
    (dict(name="patchgan"), "judges pictures"), (dict(truth="soft"), "one_hot, scaled"), (dict(lr=1), "has no lr"), (dict(form="hinge"), "bce, focal"),
    (dict(options=dict(depth=2)), "no such option"), (dict(options=dict(width=0)), "whole number"), (dict(name=None), "no discriminator is called None")])
def test_adversary_refuses(wrong, says):
    with expect_fail(ValueError, contains=says): adversary(SETTINGS | wrong, 5)


@pytest.mark.parametrize("name", OF_MAPS)
def test_adversary_takes_a_step(name):
    net = nn.Conv2d(3, 5, 3, padding=1)
    given = dict(SETTINGS, name=name, options=dict(width=4))
    engine = adversary(given, 5)(net, CrossEntropyLoss())
    assert isinstance(engine, Adversarial) and engine.truth is scaled_truth and engine.weight == 0.02 and given["name"] == name
    before = [p.detach().clone() for p in engine.critic.parameters()]
    engine.begin()
    for _ in range(2): loss = engine.step(1.0, torch.rand(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64)))
    assert loss.isfinite() and any(not torch.equal(a, b) for a, b in zip(before, engine.critic.parameters()))
    assert {"adversarial", "critic_real", "critic_fake"} <= set(engine.report())


def test_defaults_and_functions():
    engine = adversary(dict(name="seggan", options=dict(width=2, cascades=1)), 3)(nn.Conv2d(3, 3, 1), CrossEntropyLoss())
    assert engine.truth is one_hot and engine.form == "bce" and engine.weight == 0.01
    own = lambda labels, probs: probs
    assert adversary(dict(name="advsemiseg", truth=own), 3).keywords["truth"] is own
