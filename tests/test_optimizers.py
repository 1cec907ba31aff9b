"Optimisers and schedules by a paper's name: equal to the rule in words, wherever PyTorch's own words differ"
import pytest
import torch
from torch import nn

from synseg.engine import adamw
from synseg.optimizers import OPTIMIZERS, SCHEDULES, create_optimizer, create_schedule
from synseg.schedules import cosine


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def trained(make, steps=4):
    model, x = net(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectors_do_not_decay(name):
    model = net()
    optimizer = create_optimizer(name, model, 1e-3, 0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.1 if p.ndim > 1 else 0.0 for p in model.parameters()]
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in create_optimizer("sgd", model, 0.1).param_groups) == 4


def test_the_default_is_the_engines():
    for a, b in zip(trained(lambda m: create_optimizer("adamw", m, 3e-3, 1e-2)), trained(adamw)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    model, x, speed = net(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {}
    for _ in range(4):
        model.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                g = p.grad + (5e-4 * p if p.ndim > 1 else 0)
                speed[n] = 0.9 * speed.get(n, 0) + g
                p -= 0.1 * (g + 0.9 * speed[n] if nesterov else speed[n])
    for a, b in zip(trained(lambda m: create_optimizer("sgd", m, 0.1, 5e-4, 0.9, nesterov=nesterov)), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: create_optimizer("sgd", net(), 0.1, momentum=-0.1), lambda: create_optimizer("SGD", net(), 0.1),
                                  lambda: create_optimizer("adam", net(), 0.1, momentum=0.5, params=[]), lambda: create_schedule("poly", at=[1]),
                                  lambda: create_schedule("exponential", end=0), lambda: create_schedule("")])
def test_refusals_are_sentences(make):
    with pytest.raises(ValueError) as refusal:
        make()
    assert len(str(refusal.value)) > 30


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_between_0_and_1(name):
    factor = create_schedule(name)
    assert all(0 <= factor(t / 50) <= 1 for t in range(51)) and factor(0.05) == pytest.approx(1, abs=0.25)
    if name == "cosine":
        assert [factor(t / 50) for t in range(51)] == [cosine(warmup=0.05)(t / 50) for t in range(51)]
