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


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_rmsprop_by_hand(momentum):
    "ContextNet's: a memory of squares, an epsilon of 1 outside the root, and a memory of steps where it is asked for"
    model, x, square, speed = net(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {}, {}
    for _ in range(4):
        model.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                square[n] = 0.9 * square.get(n, 0) + 0.1 * p.grad**2
                speed[n] = (momentum or 0) * speed.get(n, 0) + p.grad / (square[n].sqrt() + 1)
                p -= 0.045 * speed[n]
    for a, b in zip(trained(lambda m: create_optimizer("rmsprop", m, 0.045, momentum=momentum, alpha=0.9, eps=1.0)), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_momentum_unless_told_otherwise():
    momentum = lambda name, **said: create_optimizer(name, net(), 0.1, **said).param_groups[0]["momentum"]
    assert (momentum("sgd"), momentum("rmsprop"), momentum("sgd", momentum=0.0), momentum("rmsprop", momentum=0.5)) == (0.9, 0, 0, 0.5)
    with pytest.raises(ValueError, match="setting of its own"):
        from synseg.optimizers import check_optimizer
        check_optimizer("rmsprop", None, dict(momentum=0.9))


@pytest.mark.parametrize("make", [lambda: create_optimizer("sgd", net(), 0.1, momentum=-0.1), lambda: create_optimizer("SGD", net(), 0.1),
                                  lambda: create_optimizer("adam", net(), 0.1, momentum=0.5), lambda: create_optimizer("adam", net(), 0.1, params=[]), lambda: create_schedule("poly", at=[1]),
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


def test_the_encoder_has_a_rate_of_its_own():
    from synseg.zoo import create_model
    model = create_model("unet", 3, encoder="resnet18", encoder_width=8, width=4)
    groups = create_optimizer("rmsprop", model, 1e-2, 5e-4, encoder_lr=0.1).param_groups
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {rate[id(p)] for p in model.encoder_parameters()} == {1e-3} and {rate[id(p)] for p in model.decoder_parameters()} == {1e-2}
    assert groups[0]["lr"] == 1e-2, "the rate that is logged is the one that was asked for"
    assert len(rate) == sum(1 for _ in model.parameters())
    held = create_optimizer("sgd", model, 1e-2, encoder_lr=0).param_groups
    assert {id(p) for g in held for p in g["params"]} == {id(p) for p in model.decoder_parameters()}
    with pytest.raises(ValueError, match="no encoder"):
        create_optimizer("sgd", create_model("unet_small", 3, width=4), 1e-2, encoder_lr=0.1)


def test_frozen_norms_stay_frozen_also_in_a_copy():
    import copy
    from synseg.optimizers import freeze_norms
    net = freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.rand(1, 3, 3, 3)  # one value per channel: a norm in train mode would refuse it
    for model in (net, copy.deepcopy(net)):
        before = model[1].running_mean.clone()
        torch.testing.assert_close(model.train()(x), model.eval()(x))
        assert torch.equal(model[1].running_mean, before) and not any(p.requires_grad for p in model[1].parameters())
