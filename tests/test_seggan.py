"Seg-GAN's critic against a restatement with functions only, its counts, and what must not reach or change it"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import accuracy_by_heart
from synseg.adversarial import bystander, known, one_hot, verdict_loss
from synseg.check import check_segmenter, count_parameters, expect_fail, receptive_field
from synseg.conv import theoretical_receptive_field
from synseg.conv_crf import ConvCRF
from synseg.deeplab import deeplabv2
from synseg.seggan import CRITICS, ENTRIES, FIELDS, PAPER, SMALLEST, Cascade, ConvCritic, advsemiseg, seggan, seggan_critic

SIZES = (64, 64), (67, 93), (98, 65)


def maps(n, k, size, sharp=1.0): return (torch.randn(n, k, *size) * sharp).softmax(1)


@pytest.mark.parametrize("name", CRITICS)
def test_counts_and_output_size(name):
    entry = CRITICS[name]
    with torch.device("meta"): critic = entry.build(21)
    assert count_parameters(critic) == entry.info.parameters and entry.info.name == name and len(entry.info.deviations) > 2
    side = 319 if name == "seggan" else 321
    small = CRITICS[name].build(21, width=2)
    with torch.no_grad():
        assert small.verdicts(torch.rand(1, 3, side, side), maps(1, 21, (side, side))).shape == (1, 1, 10, 10)


def test_counts_of_the_options():
    count = lambda **o: count_parameters(seggan_critic(21, **o))
    assert count(batch_norm=True) == 1_565_953 + 2 * (128 + 256 + 512)
    assert count(learn=True) == 1_565_953 + 4 * (3 + 2 + 21)  # inverse sigmas, weights, and one class weight each
    assert count(crf="hidden") == count(crf=None) == 1_565_953
    assert count(crf="hidden", learn=True) == 1_565_953 + 4 * 5 + 64 + 128 + 256 + 512


def test_segmentation_network():
    with torch.device("meta"): net = seggan(21)
    assert count_parameters(net) == ENTRIES["seggan"].info.parameters == 44_048_532 and net.scales == (1,)
    assert not any(isinstance(m, ConvCRF) for m in net.modules())
    ours, theirs = seggan(3, encoder="resnet18", width=4).eval(), deeplabv2(3, encoder="resnet18", scales=(1,), width=4).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 67, 93)
    with torch.no_grad(): assert torch.equal(ours(x), theirs(x))
    rates = {k: {c.dilation[0] for c in getattr(net.encoder, k).modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3)} for k in ("layer3", "layer4")}
    assert 2 in rates["layer3"] and 4 in rates["layer4"] and ENTRIES["seggan"].encoders[0] == "resnet101"


def test_signs_the_contract_and_learns():
    check_segmenter(lambda: seggan(5, encoder="resnet18", width=4), sizes=((64, 64), (67, 93)))
    assert accuracy_by_heart(seggan(2, encoder="resnet18", width=8), 40) > 0.9


def restated(critic, images, maps):
    "The critic with functions only"
    q = maps.clamp(min=SMALLEST).log()
    for field in critic.cascade.fields if critic.cascade else ():
        fresh = ConvCRF.published(critic.num_classes, kernel_size=field.kernel_size, blur=field.blur).double()
        q = fresh(q, images).clamp(min=1e-300).log()
    x = q.exp() if critic.cascade else maps
    for stage in critic.hidden: x = F.leaky_relu(F.conv2d(x, stage[0].weight, stage[0].bias, 2, 1), 0.2)
    x = F.conv2d(x, critic.last.weight, critic.last.bias, 2, 1)
    return F.interpolate(x, maps.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("options", [dict(field=dict(kernel_size=5)), dict(crf=None), dict(crf=None, kernel=4), dict(cascades=2)])
def test_same_as_a_restatement(options):
    critic = ConvCritic(4, width=3, **options).double()
    for size in SIZES[:2]:
        x, m = torch.rand(2, 3, *size).double(), maps(2, 4, size).double()
        torch.testing.assert_close(critic(x, m), restated(critic, x, m), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [dict(), dict(field="normalised"), dict(crf="hidden"), dict(crf=None), dict(batch_norm=True, cascades=1), dict(learn=True)])
def test_any_size_and_every_weight_learns(options):
    critic = seggan_critic(3, width=2, **options)
    for size in (*SIZES, (1, 1), (5, 40)):
        if options.get("batch_norm") and size == (1, 1): continue
        assert critic(torch.rand(2, 3, *size), maps(2, 3, size)).shape == (2, 1, *size)
    critic(torch.rand(2, 3, 64, 96), maps(2, 3, (64, 96), 0.1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())
    if options.get("learn"): assert all(f.weights.grad.any() and f.inverse_sigmas.grad.any() for f in critic.cascade.fields)


@pytest.mark.parametrize("field", [*FIELDS, dict(kernel_size=5, blur=1), dict(compatibility=1 - torch.eye(4), class_weight=0.5)])
def test_cascade_keeps_shape_and_normalisation(field):
    for size in ((16, 24), (13, 17)):
        for m in (maps(2, 4, size, 4), one_hot(torch.randint(0, 4, (2, *size)), torch.zeros(2, 4, *size)), torch.zeros(2, 4, *size)):
            out = Cascade(4, 3, field=field)(m, torch.rand(2, 3, *size))
            assert out.shape == m.shape and out.min() >= 0
            torch.testing.assert_close(out.sum(1), torch.ones(2, *size))


def test_one_kernel_for_all_is_four_kernels():
    x, m = torch.rand(1, 3, 20, 28), maps(1, 3, (20, 28))
    shared, own = Cascade(3, 4), Cascade(3, 4, learn=True)
    torch.testing.assert_close(shared(m, x), own(m, x))


def test_no_opinion_stays_none():
    out = Cascade(3, 4)(torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(out, torch.full_like(out, 1 / 3), rtol=0, atol=1e-5)


def test_void_pixels_change_nothing():
    critic, x, y = seggan_critic(4, width=2), torch.rand(1, 3, 64, 64), torch.randint(0, 4, (1, 64, 64))
    y[:, 20:30, 20:44] = 255
    z = torch.randn(1, 4, 64, 64, requires_grad=True)
    other = torch.where((y == 255)[:, None], 9 * torch.randn_like(z), z.detach())
    first, second = (critic(x, known(t.softmax(1), y)) for t in (z, other))
    assert torch.equal(first, second)
    g, = torch.autograd.grad(verdict_loss(first, True, mask=y != 255), z)
    assert not g[:, :, 20:30, 20:44].any() and g.any()


@pytest.mark.parametrize("options", [dict(), dict(field="normalised"), dict(crf="hidden"), dict(crf=None)])
def test_gradient_against_finite_differences(options):
    critic, x = seggan_critic(3, width=2, **options).double(), torch.rand(1, 3, 6, 8).double()
    z = torch.randn(1, 3, 6, 8).double().requires_grad_()
    judge = bystander(critic)
    assert torch.autograd.gradcheck(lambda z: verdict_loss(judge(x, z.softmax(1)), True), z, atol=1e-7, rtol=1e-3)
    verdict_loss(judge(x, z.softmax(1)), True).backward()
    assert z.grad.any() and all(p.grad is None for p in critic.parameters())


def test_blind_without_a_crf():
    a, b, m = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64), maps(1, 3, (64, 64))
    for critic, blind in ((advsemiseg(3, width=2), True), (seggan_critic(3, width=2), False)):
        assert torch.equal(critic(a, m), critic(b, m)) == blind


def test_receptive_fields_and_shifts():
    class Blind(nn.Module):
        def __init__(self, critic):
            super().__init__()
            self.critic = critic
        def forward(self, m): return self.critic.verdicts(m.new_zeros(len(m), 3, *m.shape[-2:]), m)
    for critic, field in ((seggan_critic(2, width=1, crf=None), 63), (advsemiseg(2, width=1), 94)):
        assert theoretical_receptive_field(nn.Sequential(*critic.hidden, critic.last)) == (field, field)
        assert receptive_field(Blind(critic), 193, 2) == (field, field)
    critic, m = seggan_critic(2, width=2, crf=None), maps(1, 2, (256, 288))
    with torch.no_grad(): whole, cut = Blind(critic)(m), Blind(critic)(m[..., 32:, 64:])
    torch.testing.assert_close(whole[..., 2:-2, 3:-2], cut[..., 1:-2, 1:-2])


def test_one_channel_behind_a_softmax_is_constant():
    z = torch.randn(1, 1, 5, 5)
    assert torch.equal(Cascade(1, 1)(z.softmax(1), torch.rand(1, 3, 5, 5)), torch.ones(1, 1, 5, 5))


@pytest.mark.parametrize("options, says", [
    (dict(crf="output"), "input"), (dict(width=0), "whole number"), (dict(cascades=0), "at least 1"), (dict(crf="hidden", cascades=5), "4 hidden"),
    (dict(field="gentle"), "published, normalised"), (dict(field=dict(sigma=3)), "settings of a field"), (dict(field=dict(kernel_size=4)), "odd")])
def test_bad_options(options, says):
    with expect_fail(ValueError, contains=says): seggan_critic(3, **options)


def test_bad_inputs():
    critic, x = seggan_critic(3, width=2), torch.rand(2, 3, 64, 64)
    with expect_fail(ValueError, contains="kernel is 5"): ConvCritic(3, kernel=5)
    for m in (maps(2, 4, (64, 64)), maps(1, 3, (64, 64)), maps(2, 3, (64, 65)), torch.zeros(2, 3, 64, 64, dtype=torch.long), torch.zeros(2, 64, 64)):
        with expect_fail(ValueError, contains="softmax or one-hot"): critic(x, m)
    with expect_fail(ValueError, contains="channels"): critic(torch.rand(2, 1, 64, 64), maps(2, 3, (64, 64)))
    with expect_fail(ValueError, contains="at least 32x32"): advsemiseg(3)(torch.rand(1, 3, 31, 64), maps(1, 3, (31, 64)))


def test_a_critic_learns():
    "On sharp and soft maps it becomes right about both"
    torch.manual_seed(0)
    critic, x = seggan_critic(3, width=4, crf=None), torch.rand(4, 3, 64, 64)
    y = torch.randint(0, 3, (4, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    real = one_hot(y, torch.zeros(4, 3, 64, 64))
    fake = (4 * real + torch.randn_like(real)).softmax(1)
    optimiser = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(40):
        loss = verdict_loss(critic(x, real), True) + verdict_loss(critic(x, fake), False)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3 and (critic(x, real) > 0).all() and (critic(x, fake) < 0).all()


def test_paper():
    assert max(PAPER["weights"], key=PAPER["weights"].get) == 0.01 and PAPER["optimizer"]["nesterov"]


def test_a_step_at_the_papers_size():
    "ResNet-101, 21 classes, the paper's optimisers"
    from synseg.adversarial import Adversarial
    from synseg.losses import CrossEntropyLoss
    from synseg.optimizers import create_optimizer
    net, critic = seggan(21), seggan_critic(21)
    settings = dict(PAPER["optimizer"])
    engine = Adversarial(net.train(), CrossEntropyLoss(), lambda m: create_optimizer(settings.pop("name"), m, settings.pop("lr"), **settings),
                         critic=critic, critic_lr=PAPER["critic_lr"], betas=PAPER["betas"], weight=0.01)
    before = [p.detach().clone() for p in (net.branches[0].weight, critic.last.weight)]
    engine.begin()
    loss = engine.step(1.0, torch.rand(1, 3, 64, 64), torch.randint(0, 21, (1, 64, 64)))
    assert loss.isfinite() and all(not torch.equal(a, b) for a, b in zip(before, (net.branches[0].weight, critic.last.weight)))
    figures = engine.report()
    assert set(figures) == {"supervised", "adversarial", "critic_real", "critic_fake"} and all(0 < v < 10 for v in figures.values())
