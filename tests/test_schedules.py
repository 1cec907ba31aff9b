"Schedules against closed forms and PyTorch's, averages against loops, orders that depend on seed and epoch alone"
import math

import pytest
import torch
from torch import nn

from synseg.schedules import (ClassBalancedSampler, Ema, EpochSampler, constant, cosine, exponential, poly, step_decay)

ALL = [constant, poly, cosine, step_decay, exponential]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_shape_of_a_schedule(make, warmup):
    s = make(warmup=warmup)
    values = [s(i/997) for i in range(998)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    peak = math.ceil(warmup*997)
    assert all(a <= b + 1e-12 for a, b in zip(values[:peak], values[1:peak]))
    assert all(a >= b - 1e-12 for a, b in zip(values[peak:], values[peak + 1:]))
    assert s(warmup) == pytest.approx(1.0)
    assert s(0.0) == pytest.approx(0.01 if warmup else 1.0)
    assert s(-1) == s(0) and s(2) == s(1)


@pytest.mark.parametrize("ours, theirs", [
    (poly(0.9), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 40, 0.9)),
    (cosine(), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40)),
    (exponential(0.01), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01**(1/40))),
    (step_decay((0.25, 0.75), 0.3), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 30], 0.3)),
])
def test_agrees_with_pytorch(ours, theirs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = theirs(optimizer)
    for i in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours(i/40), abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("call", [
    lambda: cosine(warmup=1.0), lambda: poly(warmup=-0.1), lambda: poly(0), lambda: step_decay((0.5, 1.2)),
    lambda: exponential(0), lambda: Ema(nn.Linear(1, 1), 0.0), lambda: EpochSampler(0),
    lambda: ClassBalancedSampler(torch.zeros(3, 2))])
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_ema_equals_the_loop_buffers_included():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ema, want = Ema(net, 0.8), None
    for n in range(25):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net(torch.randn(2, 2, 5, 7))
        ema.update_parameters(net)
        rate = min(0.8, (1 + n)/(10 + n)) if n else 0.0
        now = {k: v.detach().clone().double() for k, v in net.state_dict().items()}
        want = now if want is None else {k: rate*want[k] + (1 - rate)*now[k] for k in now}
    got = ema.module.state_dict()
    for k in want:
        if k.endswith("num_batches_tracked"):
            assert got[k] == 25
        else:
            torch.testing.assert_close(got[k].double(), want[k], rtol=1e-4, atol=1e-5)


def test_ema_leaves_the_model_alone_and_survives_a_round_trip():
    net = nn.Conv2d(1, 2, 3)
    weight = net.weight.detach().clone()
    ema = Ema(net, 0.9)
    ema.update_parameters(net)
    assert torch.equal(weight, net.weight) and net.weight.requires_grad
    other = Ema(nn.Conv2d(1, 2, 3), 0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.module.weight, ema.module.weight) and other.n_averaged == 1


@pytest.mark.parametrize("n", [1, 2, 17, 101])
def test_an_epoch_is_a_permutation_of_seed_and_epoch(n):
    s = EpochSampler(n, seed=5)
    s.set_epoch(3)
    order = list(s)
    assert sorted(order) == list(range(n)) and len(s) == n
    torch.rand(10)
    assert list(s) == order
    for k in (0, 1, n - 1, n):
        again = EpochSampler(n, seed=5)
        again.set_epoch(3)
        again.skip(k)
        assert list(again) == order[k:]


def test_seeds_and_epochs_do_not_collide():
    orders = set()
    for seed in range(30):
        s = EpochSampler(50, seed)
        for epoch in range(30):
            s.set_epoch(epoch)
            orders.add(tuple(s))
    assert len(orders) == 900


def test_a_new_epoch_forgets_the_skip_and_the_same_one_keeps_it():
    s = EpochSampler(10)
    s.set_epoch(1)
    s.skip(4)
    s.set_epoch(1)  # Accelerate says it once more
    assert len(list(s)) == 6
    s.set_epoch(2)
    assert len(list(s)) == 10


def test_without_shuffling_order_is_order():
    assert list(EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


def test_negative_seed_is_a_seed():
    assert sorted(EpochSampler(9, seed=-3)) == list(range(9))


def test_balanced_weights_are_the_mean_over_classes():
    torch.manual_seed(2)
    counts = torch.randint(0, 3, (31, 5))
    counts[:, 4] = 0
    s = ClassBalancedSampler(counts, min_pixels=2)
    want = torch.zeros(31, dtype=torch.float64)
    classes = [c for c in range(5) if (counts[:, c] >= 2).any()]
    for c in classes:
        shows = counts[:, c] >= 2
        want += shows.double()/shows.sum()/len(classes)
    torch.testing.assert_close(s.weights, want)
    s.set_epoch(2)
    assert len(list(s)) == 31 and all(want[i] > 0 for i in s)
