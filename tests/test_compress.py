"Folding and pruning every network of the zoo: the same answers where they must be the same, the counts, and plain refusals"
import pytest
import torch
import torch.nn.functional as F
from test_zoo import SMALL
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from synseg.check import count_parameters
from synseg.compress import ChannelMap, fold_batchnorm, fold_pair, l1_norms, prune_filters
from synseg.contextnet import ContextNet, folded_parameters
from synseg.zoo import create_model, list_models, load_model, save_model

CASES = [(n, SMALL.get(n, {})) for n in list_models() if n == "fc_densenet56" or not n.startswith(("fc_densenet", "ternaus", "dilated"))]
CASES += [("unet", dict(encoder="mobilenet_v2", encoder_width=8, width=8)), ("unet", dict(encoder="resnet18", encoder_width=8, width=8)),
          ("unet", dict(width=4, norm=True)), ("contextnet_cn14", dict(width=0.125, aux=True, asymmetric=3))]
each = pytest.mark.parametrize("name, options", CASES, ids=lambda v: v if isinstance(v, str) else v.get("encoder", ""))
STUCK = {"fcn32s": "transpose", "fcn16s": "transpose", "fcn8s": "transpose", "deeplabv2": "stack", "enet": "constant_pad_nd"}


def stirred(net):
    "In double precision and eval mode; norms with random scales, shifts and statistics, PReLUs with a slope for each channel"
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)  # scores that start at zero
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
        if isinstance(m, nn.PReLU): nn.init.uniform_(m.weight, 0, 0.5)
    return net.double().eval()


def built(name, options):
    torch.manual_seed(0)
    net = stirred(create_model(name, 3, **options))
    size = (188, 188) if name == "unet_valid" else (67, 93)
    return net, torch.rand(2, 3, *size, dtype=torch.float64)


@torch.no_grad()
def emptied(net, keep):
    "A copy in which half of every set of channels is zero, in convolutions and norms alike, and the numbers of these channels"
    net = prune_filters(net, 1.0)
    found = ChannelMap(net)
    gone = {i for g in found.groups() for i in g.channels[:len(g.channels) - max(1, round(keep * len(g.channels)))]}
    for name, ids in found.writes.items():
        layer, at = net.get_submodule(name), [k for k, i in enumerate(ids) if i in gone]
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1: layer.weight[:, at] = 0
        elif not isinstance(layer, nn.PReLU) and layer.weight is not None: layer.weight[at] = 0
        if getattr(layer, "bias", None) is not None: layer.bias[at] = 0
        if isinstance(layer, _BatchNorm): layer.running_mean[at] = 0
    return net


@each
def test_folding_changes_no_output(name, options):
    net, x = built(name, options)
    folded = fold_batchnorm(net)
    norms = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm)]
    assert {n for n, m in folded.named_modules() if isinstance(m, _BatchNorm)} == set(folded.kept_norms)
    with torch.no_grad(): torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad(): want, got = net.float()(x.float()), fold_batchnorm(net)(x.float())
    assert (want - got).abs().max() <= 1e-5 * max(1, want.abs().max())
    if not name.startswith(("fc_densenet", "gridnet", "mssa", "enet", "erfnet")): assert not folded.kept_norms
    assert sum(isinstance(m, _BatchNorm) for m in net.modules()) == len(norms), "the model itself is left alone"


@each
def test_pruning_nothing_and_zeros(name, options):
    net, x = built(name, options)
    if name in STUCK:
        with pytest.raises(ValueError, match=f"cannot be pruned: {STUCK[name]} \\(after "): prune_filters(net, 0.5)
        return
    with torch.no_grad():
        same = prune_filters(net, 1.0)
        assert same is not net and torch.equal(same(x), net(x)) and getattr(same, "card", None) == net.card
        hollow = emptied(net, 0.5).to(memory_format=torch.channels_last)
        small = prune_filters(hollow, 0.5)
        assert count_parameters(small) < 0.45 * count_parameters(net)
        torch.testing.assert_close(small(x), hollow(x), rtol=1e-9, atol=1e-9)


def test_counts_of_the_paper():
    net, counts = create_model("contextnet_cn14", 19, width=2), []
    for width in (2, 1.5, 1.25, 1):
        net = prune_filters(net, width / net.card.options["width"])
        assert net.card.options["width"] == width and count_parameters(net) == count_parameters(ContextNet(19, width=width))
        counts.append((folded_parameters(net), count_parameters(fold_batchnorm(net))))
    assert counts == [(n, n) for n in (3_270_323, 1_861_003, 1_304_279, 846_179)]


def test_smallest_filters_go_and_the_rest_is_kept():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    stirred(net).float()
    with torch.no_grad(): net[0].weight.copy_(torch.tensor([3., 1., 4., 2.]).view(4, 1, 1, 1).expand(4, 3, 3, 3))
    small = prune_filters(net, 0.5)
    for a, b in zip((small[0].weight, small[1].running_var, small[2].weight), (net[0].weight, net[1].running_var, net[2].weight)):
        assert torch.equal(a, b[[0, 2]])
    assert torch.equal(small[3].weight, net[3].weight[:, [0, 2]]) and small[3].out_channels == 2 and small[2].num_parameters == 2
    x = torch.rand(1, 3, 5, 7)
    want = F.prelu(F.batch_norm(F.conv2d(x, net[0].weight, net[0].bias, padding=1), net[1].running_mean, net[1].running_var, net[1].weight,
                                net[1].bias), net[2].weight)
    torch.testing.assert_close(small(x), F.conv2d(want[:, [0, 2]], net[3].weight[:, [0, 2]], net[3].bias))
    assert torch.equal(prune_filters(net, 0.5, score=lambda w: -l1_norms(w))[0].weight, net[0].weight[[1, 3]])
    assert prune_filters(net, {"0": 0.75})[0].out_channels == 3 and prune_filters(net, 1e-9)[0].out_channels == 1


class Odd(nn.Module):
    "A sum, a stack, a sliced tail or a grouped convolution after a first layer"
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2 if kind == "groups" else 1), nn.Conv2d(8, 2, 1)
        self.kind = kind

    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        if self.kind == "slice": return self.c(torch.cat([y[:, :4], z[:, 4:]], 1))
        if self.kind == "zeros": return self.c(z + torch.zeros(1, 8, 1, 1))
        if self.kind == "softmax": return self.c(z.softmax(1))
        if self.kind == "mean": return self.c(z * y.mean(1, keepdim=True))
        return self.c(y + z)


@pytest.mark.parametrize("kind, says", [("slice", "slice \\(after b\\)"), ("zeros", "counts on its widths"), ("softmax", "_softmax"),
                                        ("mean", "mean \\(after b\\)"), ("groups", "b convolves in 2 groups")])
def test_refusals_name_what_stands_in_the_way(kind, says):
    with pytest.raises(ValueError, match=says): prune_filters(Odd(kind), 0.5)


@pytest.mark.parametrize("keep, says", [(0, "keep is 0"), (1.5, "keep is 1.5"), (True, "keep is True"), ("half", "keep is 'half'"), (float("nan"), "nan"),
                                        ({"a": 0.5, "b": 0.25}, "a, b share their channels"), ({"c": 0.5}, "'c' is no convolution"),
                                        ({"a": 2}, "keep is 2")])
def test_bad_fractions(keep, says):
    with pytest.raises(ValueError, match=says): prune_filters(Odd("sum"), keep)


def test_a_sum_shares_its_channels():
    found = ChannelMap(Odd("sum"))
    (group,) = found.groups()
    assert group.layers == ("a", "b") and found.writes["a"] == found.writes["b"] == found.reads["c"] and len(group.channels) == 8
    assert prune_filters(Odd("sum"), {"a": 0.5}).b.out_channels == 4


def test_what_stays_unfolded_is_said():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 4, 1),
                        nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    folded = fold_batchnorm(net)
    assert {k: v.split(":")[0] for k, v in folded.kept_norms.items()} == {
        "0": "what it reads does not come straight from a convolution", "2": "it has no running statistics",
        "8": "what it reads does not come straight from a convolution"}
    assert isinstance(folded[5], nn.Identity) and isinstance(net[5], nn.BatchNorm2d)
    one = nn.BatchNorm2d(4)
    shared = nn.Sequential(nn.Conv2d(4, 4, 1), one, nn.Conv2d(4, 4, 1), one)
    assert fold_batchnorm(shared).kept_norms == {"1": "it serves several convolutions"}
    twice = Odd("sum")
    twice.b, twice.c = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    assert fold_batchnorm(twice).kept_norms == {"b": "a is read by others too: add"}
    with pytest.raises(ValueError, match="no convolution"): fold_batchnorm(nn.ReLU())


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, (1, 3), groups=2, bias=False), nn.ConvTranspose2d(6, 4, 3, 2),
                                  nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")],
                         ids=["depthwise", "grouped", "transposed", "transposed, grouped", "reflect"])
def test_every_kind_of_convolution_folds(conv):
    net = stirred(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        want = net(x)
        fold_pair(*net)
        torch.testing.assert_close(net[0](x), want)


def test_saving(tmp_path):
    net = create_model("contextnet_cn14", 3, width=0.5).train()
    half = prune_filters(net, 0.5)
    assert half.training and half.card.options == {"width": 0.25} and net.card.options == {"width": 0.5}
    x = torch.rand(1, 3, 64, 64)
    again = load_model(save_model(half, tmp_path / "half.safetensors"))
    with torch.no_grad(): assert torch.equal(again(x), half.eval()(x))
    for changed, says in ((fold_batchnorm(net), "fold after loading"), (prune_filters(net, {"context.last.0": 0.5}), "pruned to widths")):
        with pytest.raises(ValueError, match=says): save_model(changed, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_pruned_network_learns_on():
    torch.manual_seed(0)
    net = prune_filters(create_model("unet_small", 3, width=8).train(), 0.5)
    x, y = torch.rand(4, 3, 64, 64), torch.randint(0, 3, (4, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        losses.append(loss := F.cross_entropy(net(x), y))
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[-1] < 0.8 * losses[0]


def test_no_random_number_is_used_and_the_mode_is_kept():
    net = create_model("contextnet_cn14", 3, width=0.5).train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    small = prune_filters(net, 0.5)
    fold_batchnorm(net)
    assert torch.equal(torch.get_rng_state(), before) and net.training and small.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
