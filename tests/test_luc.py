"Luc's critics: counts, fields of view, inputs, truths; what an independent restatement computes"
import math
from functools import partial

import pytest
import torch
from test_adversarial import batch, duel
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from conftest import scramble
from synseg.adversarial import one_hot
from synseg.check import count_parameters, receptive_field
from synseg.discriminators import create_discriminator, list_discriminators
from synseg.luc import CRITICS, INPUTS, FieldOfView, TwoBranch, every, scaled_truth

SIZES = [(64, 64), (67, 93), (98, 65)]
narrow = dict(width=8)


def pair(n=2, k=5, size=(67, 93), dtype=torch.float32):
    return torch.rand(n, 3, *size, dtype=dtype), torch.randn(n, k, *size, dtype=dtype).softmax(1)


@pytest.mark.parametrize("name", CRITICS)
def test_counts_at_the_papers_classes(name):
    entry = CRITICS[name]
    assert name in list_discriminators()
    assert count_parameters(create_discriminator(name, entry.info.classes)) == entry.info.parameters
    assert entry.info.arxiv == "1611.08408" and entry.info.deviations


def by_hand(c_in, layers):
    "Weights and biases of a chain of (channels, kernel)"
    total = 0
    for c, k in layers: total, c_in = total + c*(c_in*k*k + 1), c
    return total


def test_counts_by_hand():
    layers = dict(luc_largefov=[(96, 3), (128, 3), (128, 3), (256, 3), (256, 3), (512, 3), (2, 3)],
                  luc_largefov_light=[(96, 3), (128, 3), (128, 3), (128, 3), (128, 3), (256, 3), (2, 3)],
                  luc_smallfov=[(96, 3), (128, 1), (256, 3), (256, 1), (512, 3), (2, 1)],
                  luc_smallfov_light=[(96, 3), (128, 1), (128, 3), (128, 1), (256, 3), (2, 1)])
    for name, chain in layers.items():
        for kind, c_in in dict(basic=21, product=63, both=24).items():
            assert count_parameters(create_discriminator(name, 21, input=kind)) == by_hand(c_in, chain)
    branches = by_hand(8, [(64, 5)]) + by_hand(3, [(16, 5), (64, 5)])
    assert CRITICS["luc_two_branch"].info.parameters == branches + by_hand(128, [(128, 3), (256, 3), (512, 3), (2, 3)])


class OneCell(nn.Module):
    "The map of verdicts, of whatever part of the input is let through"
    def __init__(self, critic, part):
        super().__init__()
        self.critic, self.part = critic, part

    def forward(self, x):
        # a random partner: the field is what the wiring lets through, whatever stands beside it
        other = torch.rand(1, dict(maps=3, images=2)[self.part], *x.shape[-2:], dtype=x.dtype)
        return self.critic(*((x, other) if self.part == "images" else (other, x)))


@pytest.mark.parametrize("name, part, step, want", [
    ("luc_largefov", "maps", 1, 34), ("luc_smallfov", "maps", 1, 18), ("luc_largefov_light", "maps", 1, 34),
    ("luc_smallfov_light", "maps", 1, 18), ("luc_two_branch", "images", 1, 116)])
def test_fields_of_view(name, part, step, want):
    torch.manual_seed(0)
    options = {} if name == "luc_two_branch" else dict(input="basic", step=step)
    critic = create_discriminator(name, 2, width=4, verdict="cells", **options)
    for m in critic.modules():
        if isinstance(m, nn.Conv2d): nn.init.uniform_(m.weight, 0.01, 0.1)  # no ReLU is ever off: the field is that of the wiring
    size = 192 if want > 100 else 96
    assert receptive_field(OneCell(critic, part), size, dict(maps=2, images=3)[part], samples=24) == (want, want)


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_gives_one_verdict(name, size):
    for n in (1, 2):
        images, maps = pair(n, size=size)
        maps.requires_grad_()
        for verdict in ("image", "cells"):
            critic = create_discriminator(name, 5, verdict=verdict, **narrow)
            out = critic(images, maps)
            h, w = (s//(16 if name == "luc_two_branch" else 32) for s in size)
            assert out.shape == ((n, 1) if verdict == "image" else (n, 1, h, w))
            maps.grad = None
            out.sum().backward()
            assert maps.grad.any() and all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


@pytest.mark.parametrize("kind", INPUTS)
def test_against_a_restatement_of_large_fov(kind):
    "Written out with functions and loops; two scores and a softmax as in the paper, whose log-probability is softplus of our logit"
    critic = scramble(FieldOfView(4, input=kind, step=2, width=12))
    images, maps = pair(k=4, size=(66, 81), dtype=torch.float64)
    small = F.avg_pool2d(images, 2)
    picked = torch.stack([torch.stack([maps[:, :, 2*i + 1, 2*j + 1] for j in range(40)], -1) for i in range(33)], -2)
    if kind == "product": x = torch.cat([picked[:, i:i + 1]*small for i in range(4)], 1)
    else: x = picked if kind == "basic" else torch.cat([picked, small], 1)
    p = [v for v in critic.state_dict().values()]
    for i in range(6):
        x = F.conv2d(x, p[2*i], p[2*i + 1], padding=1).clamp(min=0)
        if i in (2, 4): x = F.max_pool2d(x, 2)
    scores = F.conv2d(x, p[12], p[13], padding=1)
    z = critic(images, maps)
    assert_close(z, (scores[:, 1] - scores[:, 0]).mean((1, 2))[:, None])
    critic.verdict = "cells"
    assert_close(F.softplus(-critic(images, maps))[:, 0], -scores.log_softmax(1)[:, 1])


def test_against_a_restatement_of_two_branches():
    critic = scramble(TwoBranch(4, width=6))
    images, maps = pair(k=4, size=(70, 83), dtype=torch.float64)
    p = dict(critic.named_parameters())
    conv = lambda x, name: F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding="same")
    pool = lambda x: F.max_pool2d(x, 2)
    image = pool(conv(pool(conv(images, "image.0").relu()), "image.3").relu())
    x = torch.cat([conv(maps[..., 2:70:4, 2:82:4], "labels.0").relu(), image], 1)
    for i in (0, 3, 6):
        x = conv(x, f"features.{i}").relu()
        if i < 6: x = pool(x)
    scores = conv(x, "score")
    assert_close(critic(images, maps), (scores[:, 1] - scores[:, 0]).mean((1, 2))[:, None])


def test_inputs_show_what_they_say():
    images, maps = pair()
    product = INPUTS["product"](images, maps)
    assert_close(product[:, 3:6], maps[:, 1:2]*images)
    assert_close(product.unflatten(1, (5, 3)).sum(1), images)  # the softmax adds up: so do the cut-outs
    images[:, :, 10:20] = 0
    other = maps.roll(1, 1)
    assert torch.equal(INPUTS["product"](images, maps)[:, :, 10:20], INPUTS["product"](images, other)[:, :, 10:20])  # black hides labels
    critic = FieldOfView(5, input="basic", **narrow)
    assert torch.equal(critic(images, maps), critic(torch.rand_like(images), maps))  # and basic never looks at the image


@pytest.mark.parametrize("step", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_every_keeps_truths_one_hot_and_size_as_pooling_does(step, size):
    labels = torch.randint(0, 5, (2, *size))
    labels[:, :20] = 255
    maps = every(one_hot(labels, torch.zeros(2, 5, *size)), step)
    assert set(maps.unique().tolist()) <= {0.0, 1.0}
    assert maps.shape[-2:] == F.avg_pool2d(labels[:, None].float(), step).shape[-2:]


# --- scaling ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
def test_scaled_truth_is_that_of_the_formula(tau):
    probs, labels = (2*torch.randn(2, 4, 9, 7, dtype=torch.float64)).softmax(1), torch.randint(0, 4, (2, 9, 7))
    probs[0, :, 0] = F.one_hot(labels[0, 0], 4).T.double()  # an answer that is certain and right
    labels[1, :2] = 255
    got = scaled_truth(labels, probs, tau)
    for n in range(2):
        for i in range(9):
            for j in range(7):
                y, p = int(labels[n, i, j]), probs[n, :, i, j].tolist()
                if y == 255: want = [0.0]*4
                else:
                    true = max(tau, p[y])
                    want = [true if c == y else (p[c]*(1 - true)/(1 - p[y]) if p[y] < 1 else 0.0) for c in range(4)]
                assert_close(got[n, :, i, j].tolist(), want)
    if tau == 1: assert_close(got, one_hot(labels, probs))
    if tau == 0: assert_close(got, probs*(labels != 255)[:, None])


def test_scaled_truth_is_the_nearest_distribution():
    "No other distribution with at least tau on the true class is nearer in Kullback-Leibler divergence, in either direction"
    divergence = lambda a, b: (a*(a/b).log()).sum()
    for _ in range(20):
        p = torch.randn(5, dtype=torch.float64).softmax(0)
        q = scaled_truth(torch.zeros(1, 1, 1, dtype=torch.long), p[None, :, None, None])[0, :, 0, 0]
        assert math.isclose(q.sum(), 1) and q[0] >= 0.9
        for _ in range(50):
            r = torch.rand(5, dtype=torch.float64)
            r[0] = 9*r[1:].sum()*(1 + torch.rand(()))
            r = r/r.sum()
            assert divergence(q, p) <= divergence(r, p) + 1e-12 and divergence(p, q) <= divergence(p, r) + 1e-12


# --- bad input, learning ------------------------------------------------------------------------------------------------

def test_errors_are_plain():
    critic, (images, maps) = FieldOfView(5, **narrow), pair()
    for call, match in [((images, maps[:, :4]), "one map per class"), ((images, maps[:1]), r"expected \(2, 5, 67, 93\)"),
                        ((images, maps[..., :64]), "at the images' size"), ((images[:, :1], maps), "built for 3 channels"),
                        ((images[..., :40], maps[..., :40]), "at least 64x64"), ((images, maps[0]), "got maps")]:
        with pytest.raises(ValueError, match=match): critic(*call)
    for options, match in [(dict(input="sum"), "basic, product, both"), (dict(step=16), "step is 16"), (dict(verdict="pixel"), "image or cells")]:
        with pytest.raises(ValueError, match=match): create_discriminator("luc_largefov", 5, **options)


@pytest.mark.parametrize("name, options", [("luc_largefov", dict(input="basic", step=2)), ("luc_smallfov", dict(step=2)),
                                           ("luc_two_branch", {})])
def test_learns_one_batch_by_heart(name, options):
    torch.manual_seed(0)
    critic = create_discriminator(name, 3, **options, **narrow)
    images, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    fake = (torch.randn(2, 3, 64, 64)).softmax(1)
    truth = one_hot(labels, fake)
    optimiser = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(40):
        loss = F.softplus(-critic(images, truth)).mean() + F.softplus(critic(images, fake)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (critic(images, truth) > 0).all() and (critic(images, fake) < 0).all()


@pytest.mark.parametrize("name", CRITICS)
def test_plays_on_the_engine(name):
    class Upscaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        def forward(self, x): return self.net(x)
    images, labels = batch(2)
    images, labels = F.interpolate(images, (64, 72)), F.interpolate(labels[:, None].float(), (64, 72))[:, 0].long()
    engine = duel(Upscaled(), critic=create_discriminator(name, 2, **narrow), weight=0.5, truth=partial(scaled_truth, tau=0.8))
    for _ in range(2): engine.step(1.0, images, labels)
    assert all(math.isfinite(v) for v in engine.report().values()) and engine.settings["critic"] in ("FieldOfView", "TwoBranch")
