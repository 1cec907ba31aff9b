"Dilated convolution: sub-grids, receptive fields, the context module, gridding and its cures"
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from synseg.check import count_parameters, receptive_field, receptive_map, test_same as same
from synseg.dilate import (ContextModule, GroupInteraction, SharedSmoothing, SmoothedDilation, WideConv2d, context_identity_, context_plan,
                           from_subgrids, gridding_energy, hdc_distances, hdc_rule, hybrid_rates, tap_paths, to_subgrids)

CASES = [(5, 7, 2, 3), (8, 8, 2, 3), (7, 11, 3, 5), (13, 9, 4, 3), (3, 2, 5, 3), (1, 1, 3, 3), (12, 10, 1, 3), (17, 16, 6, 7), (9, 14, 2, 1)]
close = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stack(rates, channels=1, kernel_size=3):
    return nn.Sequential(*(nn.Conv2d(channels, channels, kernel_size, padding=r * (kernel_size // 2), dilation=r) for r in rates))


def dilated_by_definition(x, weight, rate):
    "Sum over the kernel of weight times the input `rate` pixels further per tap, zeros outside; loops only"
    (n, _, h, w), (c_out, _, k, _) = x.shape, weight.shape
    out = x.new_zeros(n, c_out, h, w)
    for i, j, s, t in itertools.product(range(h), range(w), range(k), range(k)):
        a, b = i + rate * (s - k // 2), j + rate * (t - k // 2)
        if 0 <= a < h and 0 <= b < w: out[:, :, i, j] += x[:, :, a, b] @ weight[:, :, s, t].T
    return out


@pytest.mark.parametrize("h,w,rate,k", CASES)
def test_subgrids_equal_dilation_and_definition(h, w, rate, k):
    x, weight, bias = torch.randn(2, 3, h, w), torch.randn(4, 3, k, k), torch.randn(4)
    dilated = F.conv2d(x, weight, bias, padding=rate * (k // 2), dilation=rate)
    phases = F.conv2d(to_subgrids(x, rate), weight, bias, padding=k // 2)
    same(from_subgrids(phases, rate, (h, w)), dilated, **close)
    same(dilated_by_definition(x, weight, rate) + bias[:, None, None], dilated, **close)


def test_subgrids_without_padding_groups_and_random_sizes():
    g = torch.Generator().manual_seed(1)
    for _ in range(40):
        h, w, rate = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((9, 30), (9, 30), (1, 5)))
        x, weight = torch.randn(1, 4, h, w, dtype=torch.float64), torch.randn(6, 2, 3, 3, dtype=torch.float64)
        want = F.conv2d(x, weight, dilation=rate, groups=2)
        got = from_subgrids(F.conv2d(to_subgrids(x, rate), weight, groups=2), rate, want.shape[-2:])
        same(got, want)


def test_subgrids_round_trip_order_and_dtype():
    for h, w, rate in [(5, 7, 2), (6, 6, 3), (2, 9, 4)]:
        x = torch.randint(0, 99, (3, 2, h, w))
        phases = to_subgrids(x, rate)
        assert phases.shape == (3 * rate**2, 2, -(-h // rate), -(-w // rate)) and phases.dtype == torch.int64
        same(from_subgrids(phases, rate, (h, w)), x)
        one, i, j = 1, min(1, h - 1), rate - 1
        part = x[one, :, i::rate, j::rate]
        same(phases[one * rate**2 + i * rate + j][:, :part.shape[1], :part.shape[2]], part)
    x = torch.randn(2, 3, 8, 12)
    shuffled = F.pixel_unshuffle(x, 4).unflatten(1, (3, 16)).transpose(1, 2).flatten(0, 1)
    same(to_subgrids(x, 4), shuffled)


def test_subgrids_pass_gradients():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: from_subgrids(to_subgrids(t, 3).square(), 3, (5, 4)), x)
    y = torch.randn(9, 2, 2, 2, dtype=torch.float64)
    same((to_subgrids(x, 3) * y).sum(), (x * from_subgrids(y, 3, (5, 4))).sum())  # each is the other's adjoint


@pytest.mark.parametrize("call,words", [
    (lambda: to_subgrids(torch.zeros(1, 1, 4, 4), 0), "rate 0"), (lambda: to_subgrids(torch.zeros(4, 4), 2), "(N, C, H, W)"),
    (lambda: to_subgrids(torch.zeros(1, 1, 4, 4), 1.5), "rate 1.5"), (lambda: from_subgrids(torch.zeros(6, 1, 2, 2), 2), "4 phases"),
    (lambda: from_subgrids(torch.zeros(4, 1, 2, 2), 2, (5, 4)), "5x4"), (lambda: tap_paths([2], 4), "odd"),
    (lambda: tap_paths([2, 0]), "rate 0"), (lambda: hdc_distances([]), "no rates"), (lambda: hybrid_rates(1, 3), "at least 2"),
    (lambda: hybrid_rates(2, 0), "layers 0"), (lambda: context_plan(21, levels=4), "levels 4"), (lambda: ContextModule(0), "channels 0"),
    (lambda: SmoothedDilation(3, 3, 2, kernel_size=4), "odd"), (lambda: SmoothedDilation(3, 3, 2, "blur"), "'blur'"),
    (lambda: GroupInteraction(0), "rate 0"), (lambda: SharedSmoothing(-1), "rate -1"),
    (lambda: gridding_energy(torch.zeros(1, 1, 9, 7), 2), "at least 8"), (lambda: gridding_energy(torch.zeros(1, 1, 9, 9), 1), "at least 2")])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as error: call()
    assert words in str(error.value)


@pytest.mark.parametrize("rates,kernel_size", [((1, 2, 4), 3), ((2, 2, 2), 3), ((1, 2, 5), 3), ((3,), 5), ((2, 1), 5), ((), 3)])
def test_tap_paths_count_what_gradients_measure(rates, kernel_size):
    paths = tap_paths(rates, kernel_size)
    assert len(paths) == 1 + (kernel_size - 1) * sum(rates) and paths.sum() == kernel_size ** len(rates)
    same(paths, paths.flip(0))
    if not rates: return
    net = stack(rates, kernel_size=kernel_size)
    for layer in net: nn.init.ones_(layer.weight)
    size = len(paths) + 2
    measured = receptive_map(net, size, in_channels=1, samples=1)[1:-1, 1:-1]
    same(measured, torch.outer(paths, paths).double())


def test_receptive_field_growth():
    for n in range(1, 6):
        assert len(tap_paths([1] * n)) == 2 * n + 1 and len(tap_paths([2**i for i in range(n)])) == 2 ** (n + 1) - 1
    assert tap_paths([1, 2, 4, 8]).all() and (tap_paths([1, 3, 9, 27]) == 1).all()


def test_context_module_counts():
    assert count_parameters(ContextModule(21)) == 28_392 == 64 * 21**2 + 8 * 21
    assert count_parameters(ContextModule(21, large=True)) == 6_803_139
    assert [w for _, _, w in context_plan(21, True)] == [c * 21 for c in (2, 2, 4, 8, 16, 32, 32, 1)]
    assert [r for _, r, _ in context_plan(19, levels=10)] == [1, 1, 2, 4, 8, 16, 32, 64, 1, 1]
    fields = [1 + sum((k - 1) * r for k, r, _ in context_plan(1)[:i]) for i in range(1, 9)]
    assert fields == [3, 5, 9, 17, 33, 65, 67, 67]
    assert ContextModule(2).margin == 33 and ContextModule(2, levels=10).margin == 1 + 1 + 2 + 4 + 8 + 16 + 32 + 64 + 1


def test_context_module_sees_67():
    net = ContextModule(2)
    for layer in net:
        if isinstance(layer, nn.Conv2d): nn.init.constant_(layer.weight, 0.1)
    assert receptive_field(net, (71, 73), in_channels=2, samples=1) == (67, 67)


@pytest.mark.parametrize("channels,large,levels,size", [(21, False, 8, (1, 1)), (11, False, 10, (23, 40)), (3, True, 8, (33, 20)), (5, True, 6, (9, 70)),
                                                         (1, True, 7, (12, 12))])
def test_context_module_begins_as_the_identity(channels, large, levels, size):
    net = ContextModule(channels, large, levels, noise=0.0)
    x = torch.randint(0, 100, (2, channels, *size)).float()
    same(net(x), x, rtol=0, atol=0)
    y = torch.randn(2, channels, *size)  # the large module sums copies: equal up to the rounding of those sums
    same(net(y), y.relu(), **(close if large else dict(rtol=0, atol=0)))
    valid, m = ContextModule(channels, large, levels, noise=0.0, valid=True), net.margin
    same(valid(F.pad(x, (m, m, m, m))), x, rtol=0, atol=0)


def test_context_noise_breaks_ties_only_where_there_are_copies():
    assert all((m.weight == context_identity_(nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size), 4).weight).all()
               for m in ContextModule(4) if isinstance(m, nn.Conv2d))
    exact, noisy = ContextModule(3, True, 6, noise=0.0), ContextModule(3, True, 6)
    x = torch.rand(1, 3, 20, 20)
    exact(x).square().sum().backward()
    noisy(x).square().sum().backward()
    twins = lambda net: (net[0].weight.grad[0] - net[0].weight.grad[1]).abs().max()  # two copies of channel 0
    assert twins(exact) == 0 < twins(noisy)
    assert (noisy(x) - x).abs().mean() < 0.1 * x.mean()


def test_one_rate_is_r_squared_networks():
    net, x = stack([3, 3, 3], 2).double(), torch.randn(1, 2, 13, 14, dtype=torch.float64)
    moved = x.clone()
    moved[0, :, 4, 8] += 1
    changed = (net(moved) != net(x)).any(1)[0]
    assert changed.any() and (to_subgrids(changed[None, None].float(), 3).flatten(1).any(1).nonzero().flatten() == 1 * 3 + 2).all()


def test_interaction_and_smoothing_begin_as_the_identity_and_count():
    for rate in (1, 2, 3, 4):
        for size in ((8, 12), (7, 5), (1, 3)):
            x = torch.randn(2, 3, *size)
            same(GroupInteraction(rate)(x), x, rtol=0, atol=0)
            same(SharedSmoothing(rate)(x), x, rtol=0, atol=0)
            torch.manual_seed(3); a = SmoothedDilation(3, 5, rate, "interaction")
            torch.manual_seed(3); b = SmoothedDilation(3, 5, rate, "shared")
            same(a(x), b(x), rtol=0, atol=0)
        assert count_parameters(GroupInteraction(rate)) == rate**4 and count_parameters(SharedSmoothing(rate)) == (2 * rate - 1) ** 2
    extra = {cure: 23 * f(2) + 3 * f(4) for cure, f in {"gi": lambda r: r**4, "ss": lambda r: (2 * r - 1) ** 2}.items()}
    assert extra == {"gi": 1136, "ss": 354}


@pytest.mark.parametrize("size,rate", [((8, 8), 2), ((7, 10), 3), ((5, 9), 4)])
def test_group_interaction_is_one_matrix_on_every_block(size, rate):
    layer, x = GroupInteraction(rate), torch.randn(2, 3, *size)
    nn.init.normal_(layer.weight)
    h, w = (-(-n // rate) * rate for n in size)
    padded, want = F.pad(x, (0, w - size[1], 0, h - size[0])), torch.zeros(2, 3, h, w)
    for i, j in itertools.product(range(0, h, rate), range(0, w, rate)):
        block = padded[..., i:i + rate, j:j + rate].flatten(2)
        want[..., i:i + rate, j:j + rate] = torch.stack([(block * row).sum(-1) for row in layer.weight], -1).unflatten(2, (rate, rate))
    same(layer(x).detach(), want[..., :size[0], :size[1]].detach(), **close)
    interleaved = to_subgrids(F.conv2d(x, torch.randn(3, 3, 3, 3), padding=rate, dilation=rate), rate)  # between convolution and interlacing: the same
    mixed = torch.einsum("ij,njc->nic", layer.weight, interleaved.unflatten(0, (2, rate**2)).flatten(2)).reshape(interleaved.shape)
    same(layer(from_subgrids(interleaved, rate)).detach(), from_subgrids(mixed, rate).detach(), **close)


def test_shared_smoothing_is_one_kernel_for_every_channel():
    layer, x = SharedSmoothing(3), torch.randn(2, 4, 9, 6)
    nn.init.normal_(layer.weight)
    same(layer(x), torch.cat([F.conv2d(x[:, c:c + 1], layer.weight, padding=2) for c in range(4)], 1), **close)
    weight = torch.randn(5, 4, 3, 3)  # a kernel shared by all channels commutes with any convolution, but for the border
    before, after = F.conv2d(layer(x), weight), layer(F.conv2d(x, weight))
    same(before[..., 2:-2, 2:-2], after[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cure", ["interaction", "shared"])
def test_smoothed_dilation_gradients(cure):
    layer = SmoothedDilation(2, 2, 2, cure).double()
    with torch.no_grad(): layer[-1 if cure == "interaction" else 0].weight.normal_()
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_cures_let_phases_talk():
    x = torch.randn(1, 1, 16, 16)
    moved = x.clone()
    moved[..., 7, 7] += 1
    phases = lambda net: int(to_subgrids(((net(moved) - net(x)).abs() > 1e-6).float(), 2).flatten(1).any(1).sum())
    assert phases(stack([2, 2])) == 1 and phases(stack([1, 2])) == 4
    for cure in ("interaction", "shared"):
        net = SmoothedDilation(1, 1, 2, cure)
        assert phases(net) == 1
        with torch.no_grad(): net[-1 if cure == "interaction" else 0].weight.add_(0.1)
        assert phases(net) == 4


def test_shift_equivariance():
    "Smoothing knows no grid; interaction moves with the image only by whole periods"
    x = torch.randn(1, 1, 24, 24)
    for rate in (2, 3):
        ss, gi = SharedSmoothing(rate), GroupInteraction(rate)
        nn.init.normal_(ss.weight), nn.init.normal_(gi.weight)
        gap = lambda net, s: (net(x.roll(s, -1)) - net(x).roll(s, -1))[..., 6:-6, 6:-6].abs().max()
        assert gap(ss, 1) < 1e-4 and gap(gi, rate) < 1e-4 < gap(gi, 1)


def test_hdc_rule():
    assert hdc_distances([1, 2, 5]) == [1, 2, 5] and hdc_distances([3, 4, 5]) == [3, 4, 5]
    assert hdc_distances([1, 2, 9])[1] == 5 and hdc_distances([2, 2, 2]) == [2, 2, 2]
    assert hdc_rule([1, 2, 5]) and not hdc_rule([1, 2, 9]) and not hdc_rule([2, 2, 2]) and not hdc_rule([2, 4, 8]) and not hdc_rule([2])
    for n in (2, 3, 4):  # ascending from 1, the rule says exactly whether a tap is dead
        for rest in itertools.combinations_with_replacement(range(1, 10), n - 1):
            assert hdc_rule([1, *rest]) == bool(tap_paths([1, *rest]).all()), rest
    assert hdc_rule([2, 3]) and not tap_paths([2, 3]).all()  # a first rate above 1 is beyond it
    assert not hdc_rule([1, 3, 1]) and tap_paths([1, 3, 1]).all()  # and out of order it is too strict


def test_hybrid_rates():
    assert hybrid_rates(2, 23) == [1, 2, 3] * 7 + [2, 2] and hybrid_rates(4, 3) == [3, 4, 5] and hybrid_rates(5, 2) == [5, 5]
    for rate, layers in itertools.product((2, 3, 6), (1, 3, 4, 9)):
        rates = hybrid_rates(rate, layers)
        assert len(rates) == layers and len(tap_paths(rates)) == len(tap_paths([rate] * layers))
        assert layers < 3 or math.gcd(*rates) == 1


def test_gridding_energy_known_values():
    for rate in (2, 3, 4):
        noise = gridding_energy(torch.randn(8, 4, 96, 120), rate)
        assert abs(float(noise) - (rate**2 - 1) / (4 * rate**2)) < 0.02
        smooth = F.interpolate(torch.randn(8 * rate**2, 1, 4, 5), (30, 40), mode="bicubic")
        assert abs(float(gridding_energy(from_subgrids(smooth, rate), rate)) - (rate**2 - 1) / rate**2) < 0.1
        ramp = F.interpolate(torch.randn(8, 1, 4, 5), (96, 120), mode="bicubic")
        assert gridding_energy(ramp, rate) < 0.01
        board = (torch.arange(40)[:, None] + torch.arange(36)) % rate
        assert gridding_energy(board[None, None].float(), rate) > 0.95


def test_gridding_energy_is_a_share():
    x = torch.randn(2, 3, 17, 23)
    e = gridding_energy(x, 2)
    assert e.shape == () and 0 <= e <= 1
    same(gridding_energy(5 * x + 7, 2), e, rtol=1e-3, atol=1e-4)
    same(gridding_energy(x.transpose(2, 3), 2), e, **close)
    assert gridding_energy(torch.ones(1, 1, 16, 16), 2) < 1
    assert abs(float(gridding_energy(x.bfloat16(), 2) - e)) < 0.01
    tiny = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: gridding_energy(t, 2), tiny)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("c_out, piece", [(7, 60), (7, 1), (1, 5), (8, 27 * 4), (5, 1 << 25)])
def test_a_wide_layer_in_pieces_is_the_same_layer(c_out, piece, bias):
    plain = nn.Conv2d(3, c_out, 3, stride=2, padding=4, dilation=4, bias=bias)
    wide = WideConv2d(3, c_out, 3, stride=2, padding=4, dilation=4, bias=bias)
    wide.load_state_dict(plain.state_dict())
    wide.piece, calls, forward = piece, [], wide._conv_forward
    wide._conv_forward = lambda x, w, b: calls.append(len(w)) or forward(x, w, b)
    x = torch.randn(2, 3, 9, 13)
    answers = [net(x) for net in (plain, wide)]
    for y in answers:
        y.square().sum().backward()
    assert sum(calls) == c_out and len(calls) == min(-(-27 * c_out // piece), c_out)
    same(*answers, **close)
    for a, b in zip(plain.parameters(), wide.parameters()):
        same(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    calls.clear()
    same(plain.eval()(x), wide.eval()(x), **close)
    assert len(calls) == 1, "nothing is cut up when nothing is learned"


@pytest.mark.parametrize("rate, kernel, margin", [(4, 7, 3), (4, 7, 0), (12, 3, 1), (2, 5, 5), (1, 3, 1), (3, 1, 0)])
@pytest.mark.parametrize("size", [(29, 31), (48, 37), (26, 26)])
def test_a_wide_layer_by_phases_is_the_same_layer(rate, kernel, margin, size):
    "Which is how it runs on a GPU"
    wide = WideConv2d(3, 5, kernel, padding=rate * margin, dilation=rate)
    x = torch.randn(2, 3, *size)
    found = []
    for answer in (wide, wide.by_phases):
        wide.zero_grad()
        leaf = x.clone().requires_grad_()
        y = answer(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, wide.weight.grad.clone(), wide.bias.grad.clone()])
    for a, b in zip(*found):
        same(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [dict(stride=2), dict(padding="same"), dict(padding=3), dict(padding_mode="reflect", padding=4),
                                     dict(dilation=(4, 2))])
def test_a_layer_that_has_no_phases_is_left_whole(options):
    assert WideConv2d(3, 5, 3, **dict(dict(dilation=4, padding=4)))._has_phases()
    assert not WideConv2d(3, 5, 3, **dict(dict(dilation=4, padding=4), **options))._has_phases()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_wide_layer_on_a_gpu_goes_by_phases(monkeypatch):
    wide, seen, by_phases = WideConv2d(3, 5, 3, padding=4, dilation=4).cuda(), [], WideConv2d.by_phases
    monkeypatch.setattr(WideConv2d, "by_phases", lambda self, x: seen.append(x.shape) or by_phases(self, x))
    x = torch.randn(2, 3, 19, 23, device="cuda")
    plain = wide(x)
    assert not seen
    wide.piece = 60
    same(wide(x), plain, rtol=1e-3, atol=1e-3)
    assert len(seen) == 1


def test_the_widest_dilated_layers_of_the_course_are_trained_in_pieces():
    from synseg.zoo import create_model

    with torch.device("meta"):
        nets = create_model("dilated_vgg", 11), create_model("deeplabv1", 11, field="7x7")
    for net in nets:
        for layer in net.modules():
            dear = isinstance(layer, nn.Conv2d) and max(layer.dilation) > 1 and layer.weight.numel() > WideConv2d.piece
            assert not dear or isinstance(layer, WideConv2d)
        assert any(isinstance(layer, WideConv2d) for layer in net.modules())
