"The study's refiner and critic against a restatement in plain torch; its losses, its plan as plain values, its rule for the best step"
from dataclasses import asdict, replace
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble
from torch import nn

from synseg.check import count_parameters, receptive_field
from synseg.realism import feature_extractor, perceptual_distance
from synseg.refiner import (CRITICS, OURS, REFINERS, SIMGAN, PerceptualLoss, Refinement, choose_step, grey_levels, rank_sums,
                            study_critic, study_refiner)
from synseg.simgan import HistoryBuffer
from synseg.unpaired import Refining


def restated_refiner(x, w, blocks=5):
    "One before and two after each 4x4 window, spelled out; `w` is a state dict"
    conv = lambda z, name: F.conv2d(F.pad(z, (1, 2, 1, 2)), w[name + ".weight"], w[name + ".bias"])
    z = F.relu(conv(2*x - 1, "first"))
    for b in range(blocks):
        z = F.relu(z + conv(F.relu(conv(z, f"blocks.{b}.conv1")), f"blocks.{b}.conv2"))
    return (1 + torch.tanh(F.conv2d(z, w["last.weight"], w["last.bias"])))/2


def restated_critic(x, w):
    "Table 1 on 80x160, every margin written out: left, right, top, bottom"
    names = sorted({k.rsplit(".", 1)[0] for k in w}, key=int)
    weights = [(w[n + ".weight"], w[n + ".bias"]) for n in names]
    z = F.relu(F.conv2d(F.pad(2*x - 1, (2, 2, 1, 2)), *weights[0], stride=3))               # 80 -> 27, 160 -> 54: 3 and 4 more
    z = F.relu(F.conv2d(F.pad(z, (1, 1, 1, 2)), *weights[1], stride=2))                     # 27 -> 14, 54 -> 27
    z = F.max_pool2d(F.pad(z, (1, 1, 0, 1), value=-torch.inf), 3, 2)                        # 14 -> 7, 27 -> 14
    z = F.relu(F.conv2d(F.pad(z, (0, 1, 1, 1)), *weights[2], stride=2))                     # 7 -> 4, 14 -> 7
    return F.conv2d(F.relu(F.conv2d(z, *weights[3])), *weights[4])


def test_counts_and_fields():
    for table, field in ((REFINERS, 34), (CRITICS, 50)):
        with torch.device("meta"): net = table["study"].build(2, 3)
        assert count_parameters(net) == table["study"].info.parameters and table["study"].info.deviations
    assert (REFINERS["study"].info.parameters, CRITICS["study"].info.parameters) == (659_331, 125_250)
    assert receptive_field(study_refiner(width=3), 61) == (34, 34) and receptive_field(study_critic(width=24), 161) == (50, 50)


@pytest.mark.parametrize("width, size", [(64, (17, 23)), (3, (1, 1)), (5, (33, 20))])
def test_refiner_is_the_restatement(width, size):
    net = scramble(study_refiner(width=width), 0.03 if width == 64 else 0.2)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad(): torch.testing.assert_close(net(x), restated_refiner(x, net.state_dict()))


@pytest.mark.parametrize("width", [96, 7])
def test_critic_is_the_restatement(width):
    net = scramble(study_critic(width=width), 0.1)
    x = torch.rand(2, 3, 80, 160, dtype=torch.float64)
    with torch.no_grad():
        assert net(x).shape == (2, 2, 4, 7)
        torch.testing.assert_close(net(x), restated_critic(x, net.state_dict()))
        rectified = study_critic(width=width, final_relu=True).double()
        rectified.load_state_dict(net.state_dict())
        torch.testing.assert_close(rectified(x), net(x).relu())


def test_any_size_and_narrow():
    for size in ((1, 1), (9, 31), (64, 65)):
        assert study_refiner(width=2)(torch.rand(1, 3, *size)).shape == (1, 3, *size)
        assert study_critic(width=6)(torch.rand(1, 3, *size)).shape == (1, 2, *(-(-n//24) for n in size))
    assert study_refiner(1, 2)(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8) and study_critic(1, 3)(torch.rand(1, 1, 50, 50)).shape[1] == 2
    x = torch.rand(2, 3, 20, 30).clamp(0.01, 0.99)
    torch.testing.assert_close(study_refiner(width=2, skip=True)(x), x, atol=1e-5, rtol=0)


def test_refiner_learns_a_picture_by_heart():
    net, x = study_refiner(width=8), F.avg_pool2d(torch.rand(2, 3, 28, 28), 5)
    optimiser, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(100):
        loss = (net(x) - x).abs().mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4*losses[0]


def test_grey_levels():
    x = torch.rand(3, 3, 80, 160)*0.9
    assert float(grey_levels(x, x)) == 0
    assert float(grey_levels(x + 10/255, x)) == pytest.approx(10*38_400, rel=1e-4)
    assert OURS.beta*float(grey_levels(x + 10/255, x)) == pytest.approx(1.536, rel=1e-4)


def test_perceptual_loss_is_equation_5():
    a, b = torch.rand(2, 3, 40, 50), torch.rand(2, 3, 40, 50)
    features = feature_extractor("squeezenet1_0", layers=("features.3", "features.5"))
    torch.testing.assert_close(PerceptualLoss(features.maps)(a, b), 2*perceptual_distance(a, b, features).mean())  # a sum, not a mean, of two layers
    one = PerceptualLoss(lambda x: F.avg_pool2d(x, 2))
    by_hand = ((F.avg_pool2d(a, 2) - F.avg_pool2d(b, 2))**2).sum((1, 2, 3))/(3*20*25)
    torch.testing.assert_close(one(a, b), by_hand.mean())
    assert float(one(a, a)) == 0


def test_perceptual_loss_teaches_the_refined_picture_alone():
    (a, b), net = (torch.rand(1, 3, 8, 8, requires_grad=True) for _ in range(2)), nn.Conv2d(3, 4, 3)
    PerceptualLoss(net)(a, b).backward()
    assert a.grad.any() and b.grad is None and all(p.grad is None for p in net.parameters()) and not net.training
    with pytest.raises(ValueError, match="one shape"): PerceptualLoss(net)(a, b[..., :4])


def test_plans_are_plain_values():
    assert OURS == Refinement() and (OURS.alpha, OURS.beta, OURS.pretrain, OURS.lr, OURS.critic_lr) == (50, 4e-6, (1200, 400), 1e-4, 1e-3)
    assert OURS.updates() == 1600 + 3*5000 and OURS.updates(0) == 1600 and OURS.updates(1800) == 7000
    assert Refinement(**asdict(SIMGAN)) == SIMGAN and SIMGAN.first == "regular" and SIMGAN.pretrain == (1000, 200)
    for name in (OURS.critic, SIMGAN.critic): assert name in CRITICS


def test_beta_follows_the_size():
    small = OURS.at((40, 80))
    x, y = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1)
    big_term = OURS.beta*grey_levels(x.expand(-1, -1, 80, 160), y.expand(-1, -1, 80, 160))
    torch.testing.assert_close(small.beta*grey_levels(x.expand(-1, -1, 40, 80), y.expand(-1, -1, 40, 80)), big_term)
    assert small.at(OURS.size) == OURS and SIMGAN.at((40, 80)) == replace(SIMGAN, size=(40, 80))


def test_first_loss():
    assert SIMGAN.first_loss() is grey_levels and isinstance(OURS.first_loss(lambda x: x), PerceptualLoss)
    with pytest.raises(ValueError, match="weights=path"): OURS.first_loss()


@pytest.mark.parametrize("options, says", [(dict(first="l1"), "'regular'"), (dict(reduction="none"), "'sum'"), (dict(beta=-1), "0 or more"), (dict(alpha=float("nan")), "0 or more")])
def test_refuses_plans(options, says):
    with pytest.raises(ValueError, match=says): Refinement(**options)


@pytest.mark.parametrize("make, says", [(partial(study_refiner, width=0), "width is 0"), (partial(study_critic, width=0), "width is 0"),
                                        (lambda: study_refiner(width=2)(torch.rand(3, 8, 8)), "batch dimension"), (lambda: study_critic(width=3)(torch.rand(1, 1, 8, 8)), "3 channels")])
def test_refuses(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_the_engine_takes_the_plan():
    plan = replace(OURS, pretrain=(2, 1), buffer=4).at((16, 24))
    net = study_refiner(width=2)
    engine = Refining(net, grey_levels, lambda m: torch.optim.Adam(m.parameters(), plan.lr), critic=study_critic(width=6),
                      first_loss=plan.first_loss(lambda x: F.avg_pool2d(x, 2)), buffer=HistoryBuffer(plan.buffer), **plan.engine())
    turns, rows = [], []
    for _ in range(9):
        turns.append(engine.turn())
        engine.step(1.0, torch.rand(4, 3, 16, 24), torch.rand(4, 3, 16, 24))
    assert turns == ["first refiner"]*2 + ["first critic"] + ["refiner", "refiner", "critic"]*2
    rows.append(dict(step=9, **engine.report()))
    assert choose_step(rows) == 9 and engine.critic_optimizer.param_groups[0]["lr"] == plan.critic_lr


def row(step, real, adversarial, refined): return dict(step=step, critic_real=real, adversarial=adversarial, critic_refined=refined)


def test_the_rule_on_hand_made_rows():
    rows = [dict(step=0, loss=3.0), row(1, 0.9, 0.9, 0.5), row(2, 0.5, 0.6, 0.9), row(3, 0.6, 0.5, 0.8)]
    assert rank_sums(rows) == {1: 6, 2: 1, 3: 2} and choose_step(rows) == 2
    for order in permutations(rows): assert choose_step(order) == 2
    assert choose_step([row(7, 1, 1, 1), row(4, 1, 1, 1)]) == 4  # equals: the earlier
    assert choose_step([row(1, 0, 2, 1), row(2, 1, 1, 1)]) == 1


def test_the_rule_has_no_units_and_is_never_dominated():
    for seed in range(20):
        torch.manual_seed(seed)
        rows = [row(i, *v) for i, v in enumerate(torch.randint(4, (12, 3)).tolist())]
        chosen = choose_step(rows)
        best = next(r for r in rows if r["step"] == chosen)
        cost = lambda r: (r["critic_real"], r["adversarial"], -r["critic_refined"])
        assert not any(all(a <= b for a, b in zip(cost(r), cost(best))) and cost(r) != cost(best) for r in rows)
        assert choose_step([row(r["step"], 100*r["critic_real"], r["adversarial"]**3, r["critic_refined"] - 7) for r in rows]) == chosen


def test_the_rule_refuses():
    with pytest.raises(ValueError, match="full training"): choose_step([dict(step=1, loss=0.2, critic_real=0.3, critic_refined=0.1)])
    with pytest.raises(ValueError, match="step 5"): choose_step([row(4, 1, 1, 1), row(5, float("nan"), 1, 1)])
