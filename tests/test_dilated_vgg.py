"Dilated VGG against the paper's counts, a restatement with plain functions, torchvision's VGG16, and the strided network it came from"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.backbone import create_encoder
from synseg.check import check_segmenter, count_parameters
from synseg.core import IMAGENET_MEAN, IMAGENET_STD
from synseg.dilate import context_identity_, from_subgrids
from synseg.inference import predict
from synseg.dilated_vgg import CONTEXTS, ENTRIES, DilatedVGG, front_head, front_trunk, reflect_margin
from synseg.fcn import FCN

LAYERS = "64 64 M 128 128 M 256 256 256 M 512 512 512 - 512 512 512".split()  # M: pool; -: where pool 4 was


def lively(net, seed=0):
    "Float64, eval mode, scores and contexts that say something"
    g = torch.Generator().manual_seed(seed)
    net = net.double().eval().requires_grad_(False)
    nn.init.normal_(net.score.weight, std=0.5, generator=g)
    for m in net.context or ():
        if isinstance(m, nn.Conv2d): m.weight.add_(0.05 * torch.randn(m.weight.shape, generator=g)); m.bias.normal_(0, 0.1, generator=g)
    return net


def mirrored(x, margin):
    "numpy's words for the margin: reflection as far as it goes, then the edge"
    h, w = x.shape[-2:]
    pads = [(margin, margin + -n % 8) for n in (h, w)]
    near = [(min(a, n - 1), min(b, n - 1)) for (a, b), n in zip(pads, (h, w))]
    far = [(a - c, b - d) for (a, b), (c, d) in zip(pads, near)]
    none = [(0, 0), (0, 0)]
    return torch.from_numpy(np.pad(np.pad(x.numpy(), none + near, mode="reflect"), none + far, mode="edge"))


def restated(net, x, context, valid):
    "The network again, layer by layer, from its weights in order"
    w = iter(net.state_dict().values())
    h, wide = x.shape[-2:]
    x = (x - torch.tensor(IMAGENET_MEAN).double().view(3, 1, 1)) / torch.tensor(IMAGENET_STD).double().view(3, 1, 1)
    x = mirrored(x, 186) if valid else torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * 2 + [(0, -n % 8) for n in (h, wide)], mode="reflect"))
    pools = 0
    for layer in LAYERS:
        if layer == "-": pools += 1
        elif layer == "M": x, pools = F.max_pool2d(x, 2), pools + 1
        else:
            rate = 2 if pools == 4 else 1
            x = F.conv2d(x, next(w), next(w), padding=0 if valid else rate, dilation=rate).relu()
    x = F.conv2d(x, next(w), next(w), padding=0 if valid else 12, dilation=4).relu()
    x = F.conv2d(x, next(w), next(w)).relu()
    x = F.conv2d(x, next(w), next(w))
    if context == "large": x = F.pad(x, (33,) * 4)
    for i, rate in enumerate((1, 1, 2, 4, 8, 16, 1) if context else ()):
        x = F.conv2d(x, next(w), next(w), padding=rate if context == "basic" else 0, dilation=rate).relu()
    if context: x = F.conv2d(x, next(w), next(w))
    assert next(w, None) is None
    return F.interpolate(x, scale_factor=8, mode="bilinear")[..., :h, :wide]


@pytest.mark.parametrize("context, paper", [(None, 134_346_581), ("basic", 134_346_581 + 28_392), ("large", 134_346_581 + 6_803_139)])
def test_parameters_of_the_paper(context, paper):
    with torch.device("meta"): net = DilatedVGG(21, context=context)
    assert count_parameters(net) == paper and net.border == 186


def test_entry():
    entry = ENTRIES["dilated_vgg"]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters and entry.encoders[0] == "vgg16" and entry.info.deviations


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("size", [(64, 64), (67, 93), (211, 88)])
def test_restated(context, padding, size):
    net = lively(DilatedVGG(4, context=context, padding=padding, width=2))
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    want = restated(net, x, context, padding == "reflect")
    assert want.std() > 0.02
    torch.testing.assert_close(net(x), want)


def test_trunk_is_torchvisions_without_two_pools():
    from torchvision import models
    with torch.device("meta"): theirs = models.vgg16().features
    ours = front_trunk("vgg16").eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = want = torch.rand(1, 3, 204, 196)
    for i, layer in enumerate(theirs):
        if isinstance(layer, nn.Conv2d): want = F.conv2d(want, layer.weight, layer.bias, dilation=2 if i > 23 else 1)
        elif i not in (23, 30): want = layer(want)
    torch.testing.assert_close(ours(x)[-1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(188, 204), (381, 420)])
def test_margin_is_numpys(size):
    x = torch.rand(2, 3, *size)
    assert torch.equal(reflect_margin(x, 186), mirrored(x, 186))
    assert reflect_margin(x, 186).shape[-2:] == tuple(8 * -(-n // 8) + 372 for n in size)


def test_a_small_image_repeats_its_edge():
    x = torch.rand(1, 1, 64, 70)
    y = reflect_margin(x, 186)
    assert torch.equal(y, mirrored(x, 186)) and torch.equal(y[..., 0, 186:256], x[..., 63, :])


@pytest.mark.parametrize("size", [(390, 411), (412, 388)])
def test_inside_the_image_padding_does_not_count(size):
    net, other = (lively(DilatedVGG(3, context=None, padding=p, width=2)) for p in ("reflect", "zeros"))
    other.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    a, b = net.front_end(x), other.front_end(x)
    low = -(-186 // 8)
    high = [(n - 380 + 186) // 8 for n in size]  # the last cell whose window ends within the image
    inner = (..., slice(low, high[0] + 1), slice(low, high[1] + 1))
    assert a[inner].numel() > 3
    torch.testing.assert_close(a[inner], b[inner])
    assert not torch.allclose(a[..., :low, :low], b[..., :low, :low])


def test_a_cell_is_its_window_cut_out():
    net = lively(DilatedVGG(3, context=None, width=2))
    x = torch.rand(1, 3, 83, 101, dtype=torch.float64)
    z, wide = net.front_end(x), reflect_margin(x, 186)
    for i, j in ((0, 0), (3, 7), (10, 12)):
        window = wide[..., 8 * i:8 * i + 380, 8 * j:8 * j + 380]
        torch.testing.assert_close(net.score(net.head(net.encoder(window)[-1])), z[..., i:i + 1, j:j + 1])


def test_a_cell_looks_out_from_the_middle_of_its_pixels():
    net = lively(DilatedVGG(2, context=None, width=2)).requires_grad_(True)
    for p in net.parameters(): p.data.abs_()  # all paths open
    net.score.bias.data.fill_(0)
    x = (torch.rand(1, 3, 448, 448, dtype=torch.float64) + 5).requires_grad_()
    live = torch.autograd.grad(net.front_end(x)[..., 28, 25].sum(), x)[0].abs().sum((0, 1)) > 0
    for axis, cell in ((1, 28), (0, 25)):
        at = live.any(axis).nonzero()
        assert (at[0] + at[-1]) / 2 == 8 * cell + 3.5 and at[-1] - at[0] + 1 > 370


def strided_scores(net, x, pool):
    "VGG as trained: five pools, no dilation, fc6 7x7, from the weights of `net`; pools 4 and 5 as `pool` says"
    halved = 0
    for m in net.encoder.children():
        if isinstance(m, nn.Conv2d): x = F.conv2d(x, m.weight, m.bias)
        elif isinstance(m, nn.ReLU): x = x.relu()
        else: x, halved = (F.max_pool2d(x, 2) if halved < 3 else pool(x)), halved + 1
    x = F.conv2d(x, net.head.fc6.weight, net.head.fc6.bias).relu()
    return net.score(net.head.fc7(x).relu())


def test_without_maxima_it_is_a_classifier_that_subsamples_seen_from_16_places():
    net = lively(DilatedVGG(3, context=None, width=2))
    x = torch.rand(1, 3, 380 + 7 * 8, 380 + 9 * 8, dtype=torch.float64)
    dense = net.score(net.head(net.encoder(x)[-1]))
    assert dense.shape[-2:] == (8, 10)
    apart = lambda m: m[..., ::2, ::2]
    shots = [strided_scores(net, x[..., 8 * i:8 * i + 380 + 32, 8 * j:8 * j + 380 + 32], apart) for i in range(4) for j in range(4)]
    torch.testing.assert_close(from_subgrids(torch.cat(shots), 4), dense[..., :8, :8])


@pytest.mark.parametrize("size", [(96, 128), (192, 160)])
def test_with_maxima_kept_the_classifiers_own_scores_return(size):
    coarse = FCN(3, encoder="vgg16_bn", padding=1, width=2).double().eval().requires_grad_(False)
    for m in coarse.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.2, .2); m.running_var.uniform_(.5, 2)
    nn.init.normal_(coarse.scores["32"].weight)
    trunk, head = create_encoder("vgg16_bn", 3, 8, 2), front_head(16, valid=False)
    trunk.load_state_dict(coarse.encoder.state_dict())
    head.load_state_dict(coarse.head.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    score = coarse.scores["32"]
    want = score(coarse.head(coarse.encoder(x)[-1]))
    dense = score(head.double().eval()(trunk.double().eval()(x)[-1]))
    torch.testing.assert_close(dense[..., ::4, ::4], want)
    bare = front_trunk("vgg16_bn", 3, 2, valid=False).double().eval()
    bare.load_state_dict(coarse.encoder.state_dict())
    assert not torch.allclose(score(head(bare(x)[-1]))[..., ::4, ::4], want, rtol=1e-2)


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("context, noise", [("basic", 0), ("large", 0)])
def test_context_begins_as_the_non_negative_part(context, noise, padding):
    net = DilatedVGG(3, context=context, padding=padding, width=2).double().eval().requires_grad_(False)
    nn.init.normal_(net.score.weight)
    for m in net.context:
        if isinstance(m, nn.Conv2d): context_identity_(m, 3, noise)
    z = net.front_end(torch.randn(1, 3, 75, 90, dtype=torch.float64))
    assert (z < 0).any() and (z > 0).any()
    torch.testing.assert_close(net.context(F.pad(z, (net.ring,) * 4)), z.relu())


def test_weights_of_a_classifier():
    net = DilatedVGG(5, width=2)
    state = {f"features.{k}": torch.randn_like(v) for k, v in net.encoder.state_dict().items()}
    state |= {"classifier.0.weight": torch.randn(128, 16 * 49), "classifier.0.bias": torch.randn(128),
              "classifier.3.weight": torch.randn(128, 128), "classifier.3.bias": torch.randn(128)}
    net.load_encoder(state)
    assert torch.equal(net.encoder.get_submodule("0").weight, state["features.0.weight"])
    assert torch.equal(net.head.fc6.weight.flatten(1), state["classifier.0.weight"])
    assert torch.equal(net.head.fc7.bias, state["classifier.3.bias"])
    assert {id(p) for p in net.encoder_parameters()} == {id(p) for m in (net.encoder, net.head) for p in m.parameters()}
    with pytest.raises(ValueError, match="classifier.0.weight"): net.load_encoder(state | {"classifier.0.weight": torch.randn(128, 9)})
    net.load_encoder({k: v for k, v in state.items() if "features" in k})


@pytest.mark.parametrize("options", [dict(context=None), dict(context="large", padding="zeros"), dict(encoder="vgg16_bn"),
                                     dict(encoder="vgg11", levels=6)], ids=str)
def test_contract(options):
    check_segmenter(lambda: DilatedVGG(5, width=2, **options))


@pytest.mark.parametrize("name, margin", [("vgg16", 186), ("vgg16_bn", 186), ("vgg11", 155), ("vgg13", 158)])
def test_other_vggs_fit_their_margin(name, margin):
    net = DilatedVGG(2, encoder=name, width=1, context=None).eval().requires_grad_(False)
    assert net.border == margin and net.front_end(torch.rand(1, 3, 67, 100)).shape == (1, 2, 9, 13)


@pytest.mark.parametrize("options, says", [(dict(context="huge"), "basic, large"), (dict(padding="mirror"), "reflect, zeros"),
    (dict(encoder="resnet18"), "vgg16"), (dict(levels=3), "levels"), (dict(width=0), "width"), (dict(num_classes=0), "num_classes")])
def test_bad_wishes(options, says):
    with pytest.raises(ValueError, match=says): DilatedVGG(**(dict(num_classes=3, width=1) | options))


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = DilatedVGG(4, encoder="vgg16_bn", width=4, padding="zeros", dropout=0.0)
    x, y = torch.rand(2, 3, 64, 64), torch.randint(0, 4, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(40):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_it_is_no_valid_network_to_others():
    "`margin` and `valid` are the marks of the valid U-Net, by which the engine crops labels and `predict` tiles"
    net = DilatedVGG(3, width=2)
    assert net.border == 186 and not hasattr(net, "margin") and not getattr(net, "valid", False)
    image = torch.rand(3, 64, 71)
    assert predict(net.eval(), image).shape == (64, 71)
