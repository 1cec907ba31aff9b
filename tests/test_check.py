"The instruments of the course: each must notice what it is there to notice"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import (check_segmenter, count_parameters, expect_fail, receptive_field, receptive_map, test_same,
                          trace)


class Tiny(nn.Module):
    def __init__(self, num_classes=5, width=8, in_channels=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.score = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x):
        fine = self.stem(x)
        return self.score(torch.cat([fine, F.interpolate(self.down(fine), fine.shape[-2:], mode="bilinear")], 1))


def test_same_does_not_broadcast_or_cast():
    x = torch.rand(3, 1)
    test_same(x, x.clone())
    for other in (x.T, x.expand(3, 3), x.double(), x + 0.1, x.numpy()):
        with pytest.raises((AssertionError, TypeError)):
            test_same(x, other)
    test_same(x, x + 1e-3, rtol=0, atol=1e-2)
    test_same(torch.tensor(float("nan")), torch.tensor(float("nan")), equal_nan=True)


def test_expect_fail():
    with expect_fail(ValueError, "two") as failure:
        raise ValueError("one two three")
    assert failure.message == "one two three"
    with pytest.raises(AssertionError, match="nothing failed"):
        with expect_fail():
            pass
    with pytest.raises(AssertionError, match="without 'four'"):
        with expect_fail(ValueError, "four"):
            raise ValueError("one two three")
    with pytest.raises(KeyError):  # another exception is not swallowed
        with expect_fail(ValueError):
            raise KeyError("x")


def test_count_parameters():
    shared = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(shared, shared)) == 16
    shared.bias.requires_grad_(False)
    assert (count_parameters(shared), count_parameters(shared, trainable=True)) == (16, 12)


def test_trace_shapes_counts_and_displays():
    model = Tiny().train()
    rows = trace(model, torch.rand(2, 3, 65, 49))
    assert [r.output for r in rows if r.module == "down.0"] == [(2, 8, 33, 25)]
    assert sum(r.parameters for r in rows) == count_parameters(model)
    assert [r.module for r in trace(model, torch.rand(1, 3, 9, 9), depth=1)] == ["stem", "down", "score"]
    assert "2×8×33×25" in str(rows) and "<table>" in rows._repr_html_() and f"{count_parameters(model):,}" in str(rows)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_trace_takes_its_hooks_off_after_a_failure():
    model = Tiny()
    with pytest.raises(RuntimeError):
        trace(model, torch.rand(1, 4, 9, 9))
    assert not any(m._forward_hooks for m in model.modules()) and model.training


def test_trace_of_modules_with_tuples_and_shared_modules():
    class Split(nn.Module):
        def forward(self, pair):
            return {"a": [pair[1]]}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.split = nn.Conv2d(2, 2, 1), Split()

        def forward(self, x):
            return self.split((None, self.conv(self.conv(x))))

    rows = trace(Outer(), torch.rand(1, 2, 5, 6))
    assert [r.parameters for r in rows] == [6, 0, 0] and rows[-1].inputs == rows[-1].output == (1, 2, 5, 6)


@pytest.mark.parametrize("dilations", [(1,), (1, 1), (1, 2, 4), (2, 2, 2), (3, 1)])
def test_receptive_field_of_dilated_stacks(dilations):
    model = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=d, dilation=d) for d in dilations])
    assert receptive_field(model, 41, in_channels=2) == (1 + 2 * sum(dilations),) * 2


def test_receptive_field_other_shapes():
    assert receptive_field(nn.Conv2d(3, 4, (5, 1), padding=(2, 0)), (31, 20)) == (5, 1)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2))
    assert receptive_field(pooled, 32, samples=16) == (4, 4)
    assert receptive_field(Tiny(), 64) == (7, 7) and receptive_field(Tiny(), 33) == (5, 5)  # between coarse pixels, and on one
    zeros = nn.Conv2d(3, 2, 3, padding=1)
    nn.init.zeros_(zeros.weight)
    assert receptive_field(zeros, 15) == (3, 3)  # zero-initialised scores are perturbed, in a copy
    assert not zeros.weight.any() and zeros.weight.grad is None


def test_gridding_shows_in_the_map():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=2, dilation=2) for _ in range(3)])
    seen = receptive_map(model, 31, in_channels=1)
    assert seen.shape == (31, 31) and int((seen > 0).sum()) == 49


def test_a_sound_network_passes():
    report = check_segmenter(Tiny)
    assert report == dict(parameters=count_parameters(Tiny()))
    check_segmenter(lambda: Tiny(1, in_channels=4), 1, in_channels=4, sizes=[(64, 71)])
    noise = torch.rand(6, 3, 64, 64)
    labels = noise.max(1).indices.masked_fill(torch.rand(6, 64, 64) < 0.1, 255)
    report = check_segmenter(Tiny, images=noise, labels=labels, lr=1e-2)
    assert report["accuracy"] > 0.8 > report["majority"] and report["loss_after"] < report["loss_before"]


def test_checks_leave_the_random_state_alone():
    state = torch.get_rng_state()
    check_segmenter(Tiny, sizes=[(64, 65)])
    receptive_field(Tiny(), 15)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    Tiny()  # the argument itself was built outside
    assert torch.equal(torch.get_rng_state(), after)


def broken(change):
    "Tiny with another forward, `change(model, x, forward)`"
    class Broken(Tiny):
        def forward(self, x):
            return change(self, x, super().forward)
    return Broken


class Unused(Tiny):
    def __init__(self):
        super().__init__()
        self.refine = nn.Conv2d(5, 5, 1)


class Muted(Unused):
    def forward(self, x):
        scores = super().forward(x)
        return scores + 0 * self.refine(scores)


class Pooled(Tiny):
    def __init__(self):
        super().__init__()
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(5))

    def forward(self, x):
        scores = super().forward(x)
        return scores + self.context(scores)


class PooledAndSaysSo(Pooled):
    def forward(self, x):
        if self.training and len(x) == 1:
            raise ValueError("batches of two or more, please")
        return super().forward(x)


class Forgetful(Tiny):
    def __init__(self):
        super().__init__()
        self.mixing = torch.randn(5, 5)

    def forward(self, x):
        return torch.einsum("kj,njhw->nkhw", self.mixing, super().forward(x))


class Aux(Tiny):
    "An auxiliary head, which learns through forward_aux only"
    def __init__(self):
        super().__init__()
        self.aux = nn.Conv2d(8, 5, 1)

    def forward_aux(self, x):
        return self.forward(x), [self.aux(self.stem(x))]


class AuxDiffers(Aux):
    def forward_aux(self, x):
        return 2 * self.forward(x), [self.aux(self.stem(x))]


class Uncounted(Tiny):
    "The state_dict of one does not fit the next"
    made = 0

    def __init__(self):
        Uncounted.made += 1
        super().__init__(width=8 + Uncounted.made)


def test_networks_that_are_lawful_in_unusual_ways():
    class ZeroStart(Tiny):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    class Frozen(Unused):
        def __init__(self):
            super().__init__()
            self.refine.requires_grad_(False)

    for build in (ZeroStart, Frozen, PooledAndSaysSo, Aux):
        check_segmenter(build, sizes=[(64, 64), (67, 93)])


@pytest.mark.parametrize("build, words", [
    (broken(lambda m, x, f: f(x)[..., ::2, ::2]), "expected (2, 5, 64, 64)"),
    (broken(lambda m, x, f: F.interpolate(f(x)[..., ::2, ::2], scale_factor=2)), "an input of 67x93 gave logits (2, 5, 68, 94)"),
    (broken(lambda m, x, f: f(x).repeat(1, 2, 1, 1)), "gave logits (2, 10, 64, 64)"),
    (broken(lambda m, x, f: (f(x), x)), "forward returned tuple"),
    (broken(lambda m, x, f: f(x) / 0), "NaN or infinity"),
    (broken(lambda m, x, f: f(x) if m.training else f(x)[:, :4]), "eval mode, 64x64"),
    (broken(lambda m, x, f: f(x - x.mean((0, 2, 3), keepdim=True))), "change with the other images"),
    (broken(lambda m, x, f: f(F.dropout(x, 0.3))), "is dropout still on"),
    (broken(lambda m, x, f: m.score(torch.cat([m.stem(x), F.interpolate(m.down(m.stem(x)).detach(), x.shape[-2:])], 1))),
     "4 parameters never get a gradient: down.0.weight"),
    (Unused, "refine.weight, refine.bias"),
    (Muted, "gradient of zero throughout: refine.weight"),
    (Pooled, "PyTorch's batch-norm error came through"),
    (Forgetful, "not in the state_dict"),
    (AuxDiffers, "forward_aux(x)[0] and forward(x) differ"),
    (Uncounted, "does not accept the state_dict"),
    (lambda: "a network", "build() gave a str"),
])
def test_broken_networks_are_caught(build, words):
    with pytest.raises(AssertionError) as error:
        check_segmenter(build)
    assert words in str(error.value)


def test_one_network_handed_out_twice():
    model = Tiny()
    with pytest.raises(AssertionError, match="same network twice"):
        check_segmenter(lambda: model)


def test_a_blind_network_is_caught():
    blind = broken(lambda m, x, f: f(x.mean((2, 3), keepdim=True).expand_as(x)))
    noise = torch.rand(6, 3, 64, 64)
    with pytest.raises(AssertionError, match="Does the network see its input at all"):
        check_segmenter(blind, images=noise, labels=noise.max(1).indices, lr=1e-2)


def test_a_network_that_cannot_descend_is_caught():
    noise = torch.rand(6, 3, 64, 64)
    with pytest.raises(AssertionError, match="it does not learn|the loss is"):
        check_segmenter(Tiny, images=noise, labels=noise.max(1).indices, lr=-0.0, steps=3)


def said(mine, *args, **options):
    from contextlib import redirect_stdout
    from io import StringIO

    from synseg.check import check_answer
    with redirect_stdout(StringIO()) as out:
        assert check_answer(mine, *args, **options) is None
    return out.getvalue().strip()


@pytest.mark.parametrize("right, same, other", [
    (42, [42.0, torch.tensor(42), "42", np.int64(42)], [41, -42, "forty", float("nan"), [42, 1]]),
    ((65, 96), [[65, 96], "65, 96", torch.tensor([65, 96]), "(65, 96)"], [(96, 65), 65]),
    ("mean IoU", ["Mean-IoU", "mean_iou", " mean iou. "], ["meaniou", "iou mean", ""]),
    (True, ["yes", "Yes!", True], ["no", False, 1]),
    (-3, [-3.0, "-3"], [3]),
])
def test_answers_are_judged_without_being_shown(right, same, other):
    from synseg.check import answer_key
    key = answer_key("7.1", right)
    assert str(right) not in key and key != answer_key("7.2", right).replace("7.2", "7.1"), "salted"
    assert said(None, key) == "exercise 7.1: not tried yet"
    for mine in same:
        assert said(mine, key) == "exercise 7.1: right", mine
    for mine in other:
        assert said(mine, key).startswith("exercise 7.1: not yet"), mine


def test_answers_within_a_step():
    from synseg.check import answer_key
    key = answer_key("7.1", 0.6703, step=0.01)
    for mine in (0.67, 0.665, 0.678, np.float32(0.67), torch.tensor(0.67)):
        assert said(mine, key, step=0.01).endswith(": right"), mine
    for mine in (0.65, 0.69, 67, 0, -0.67):
        assert said(mine, key, step=0.01).endswith("then try again"), mine
    for mine in ("two thirds", float("nan"), float("inf"), [0.67]):
        assert "a number is wanted" in said(mine, key, step=0.01)


def test_answers_judged_by_a_function():
    assert said(3, lambda m: m % 2 == 1) == "exercise: right"
    assert said(4, lambda m: m % 2 == 1).startswith("exercise: not yet: 4")
    assert said(None, lambda m: 1 / 0) == "exercise: not tried yet"
