"FCN against the paper's counts and offsets, the classifier it came from, its own coarser self, and torchvision's form"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import accuracy_by_heart
from synseg.backbone import create_encoder
from synseg.check import check_segmenter, count_parameters
from synseg.fcn import (ENTRIES, FCN, FCNResNet, as_convolution, convolutionalised, crop_offsets, enlarge, fc_head, fcn8s, fcn16s, fcn32s,
                        fcn_resnet50, fcn_resnet101, fuse, load_classifier, start_from)
from synseg.upsample import bilinear_kernel
from synseg.zoo import create_model, load_model, save_model

STRIDES = (32, 16, 8)
NARROW = [dict(width=2), dict(width=2, padding=1), dict(width=2, encoder="vgg16_bn"), dict(width=2, encoder="vgg11"),
          dict(width=4, encoder="resnet18"), dict(width=2, encoder="mobilenet_v2")]


def scored(net, std=1.0):
    "Scores that are not zero, so that outputs say something"
    for s in net.scores.values(): nn.init.normal_(s.weight, std=std)
    return net.eval().requires_grad_(False)


def narrow_vgg(width=4):
    net = nn.Module()
    net.features = nn.Sequential(*create_encoder("vgg16", width=width).children())
    c = 8 * width
    net.classifier = nn.Sequential(nn.Linear(c * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return net.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name, paper", [("fcn32s", 134_346_581), ("fcn16s", 134_357_354), ("fcn8s", 134_362_751)])
def test_parameters_of_the_paper(name, paper):
    with torch.device("meta"): net = ENTRIES[name].build(21)
    assert count_parameters(net) - count_parameters(net.up) == paper
    assert count_parameters(net.up) == len(net.skips) * 21 * 21 * 16


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_count_what_they_say(name):
    entry = ENTRIES[name]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert entry.info.name == name and count_parameters(net) == entry.info.parameters and entry.info.deviations


def test_offsets():
    assert crop_offsets() == {32: (0, 19), 16: (5, 27), 8: (9, 31)}
    assert crop_offsets(1) == {32: (0, 16), 16: (-1, 8), 8: (-1, 4)}


@pytest.mark.parametrize("options", NARROW, ids=str)
@pytest.mark.parametrize("finest", STRIDES)
def test_output_size_is_input_size(options, finest):
    net = FCN(2, finest=finest, **options).eval().requires_grad_(False)
    for n in range(64, 98):  # a whole period of the coarsest stride
        size = n, 161 - n
        assert net(torch.rand(1, 3, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("padding", [1, 100])
def test_maps_reach_far_enough_for_every_size(padding):
    "The arithmetic of sizes, without data, up to 2000 pixels"
    offsets = crop_offsets(padding)
    for n in range(64, 2001):
        sizes, m = {}, n + 2 * padding - 2
        for s in (2, 4, 8, 16, 32): m = sizes[s] = -(-m // 2)
        z = sizes[32] if padding == 1 else sizes[32] - 6
        for s in (32, 16, 8):
            join, final = offsets[s]
            if s < 32:
                up, skip = 2 * z + 2, sizes[s]
                assert join < 0 or skip - join >= up, (n, s)
                assert join >= 0 or up + join >= skip, (n, s)
                z = up if join >= 0 else skip
            assert s * (z + 1) - final >= n, (n, s)


@pytest.mark.parametrize("factor, offset, size", [(32, 19, (90, 70)), (16, 27, (64, 100)), (8, 31, (24, 30)), (2, 0, (16, 20))])
def test_enlarge_is_the_deconvolution(factor, offset, size):
    z = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    kernel = bilinear_kernel(factor).double().expand(3, 1, -1, -1)
    want = F.conv_transpose2d(z, kernel, stride=factor, groups=3)[..., offset:offset + size[0], offset:offset + size[1]]
    torch.testing.assert_close(enlarge(z, factor, offset, want.shape[-2:]), want)
    a = factor // 2
    inside = enlarge(z, factor, a, (7 * factor, 9 * factor))[..., a:-a, a:-a]
    torch.testing.assert_close(inside, F.interpolate(z, scale_factor=factor, mode="bilinear")[..., a:-a, a:-a])


def test_enlarge_keeps_single_precision_under_autocast():
    z = torch.randn(1, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16): low = enlarge(z, 16, 8, (64, 80))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, enlarge(z, 16, 8, (64, 80)))


def test_enlarge_in_half_precision():
    z = torch.ones(1, 2, 20, 30, dtype=torch.bfloat16)
    up = enlarge(z, 32, 16, (640, 960))
    assert up.dtype == torch.bfloat16 and torch.equal(up[..., 16:-16, 16:-16], torch.ones(1, 2, 608, 928, dtype=torch.bfloat16))


def test_fuse():
    up, skip = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(fuse(up, skip, 9), up + skip[..., 9:15, 9:17])
    torch.testing.assert_close(fuse(skip, up, -1), skip[..., 1:7, 1:9] + up)


@pytest.mark.parametrize("padding", [1, 100])
@pytest.mark.parametrize("finest", STRIDES)
def test_a_pixel_looks_at_itself(finest, padding):
    "With a linear, positive network the centre of mass of what a pixel listens to is the pixel"
    net = FCN(1, finest=finest, width=1, padding=padding).double().eval()
    for name, m in [*net.named_modules()]:
        if isinstance(m, nn.Conv2d): nn.init.constant_(m.weight, 1 / m.weight[0].numel()), nn.init.zeros_(m.bias)
    for name, m in [*net.encoder.named_children()]:
        if isinstance(m, nn.MaxPool2d): setattr(net.encoder, name, nn.AvgPool2d(2, ceil_mode=True))
    x, places = torch.ones(1, 3, 600, 640, dtype=torch.float64, requires_grad=True), torch.arange(640, dtype=torch.float64)
    z = net.compute(x)
    for row, column in ((290, 311), (305, 320)):
        seen = torch.autograd.grad(z[0, 0, row, column], x, retain_graph=True)[0].sum((0, 1))
        assert abs(seen.sum(1) @ places[:600] / seen.sum() - row) < 1e-6 and abs(seen.sum(0) @ places / seen.sum() - column) < 1e-6


def test_as_convolution():
    layer = nn.Linear(5 * 9, 4)
    x = torch.rand(2, 5, 3, 3)
    torch.testing.assert_close(as_convolution(layer, 5)(x).flatten(1), layer(x.flatten(1)))
    assert as_convolution(nn.Linear(20, 3, bias=False), 5).bias is None
    for channels in (4, 7):
        with pytest.raises(ValueError, match="square"): as_convolution(layer, channels)


def test_vgg_slid_over_a_larger_image():
    "224x224: the classifier. Larger, without padding: the classifier on each 404x404 crop. With padding: only nearly"
    net = narrow_vgg(2)
    slid = convolutionalised(net)
    x = torch.randn(1, 3, 436, 470, dtype=torch.float64)
    torch.testing.assert_close(slid(x[..., :224, :224]).flatten(1), net.classifier(net.features(x[..., :224, :224]).flatten(1)))
    crop = slid(x[..., 32:256, 64:288])[..., 0, 0]
    assert (slid(x)[..., 1, 2] - crop).abs().max() > 1e-6
    for m in slid:
        if isinstance(m, nn.Conv2d): m.padding = (0, 0)
    z = slid(x)
    assert z.shape[-2:] == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(z[..., i, j], slid(x[..., 32*i:32*i + 404, 32*j:32*j + 404])[..., 0, 0])


def test_full_vgg16_and_one_step_at_the_papers_size():
    "torchvision's whole state fills the convolutions, fc6 and fc7; the middle of the fc7 map is the classifier's; then SGD"
    from torchvision.models import vgg16
    torch.manual_seed(0)
    with torch.device("meta"): vgg = vgg16(weights=None)
    vgg.to_empty(device="cpu").eval().requires_grad_(False)
    for p in vgg.parameters(): p.uniform_(-1, 1).mul_((6 / p[0].numel())**0.5 if p.ndim > 1 else 0.1)
    x = torch.rand(1, 3, 224, 224)
    seven = vgg.classifier[:6](vgg.features(x).flatten(1))
    torch.testing.assert_close(convolutionalised(vgg)(x)[..., 0, 0], vgg.classifier[6](seven), rtol=1e-4, atol=1e-4)
    with torch.device("meta"): net = fcn32s(21, padding=1)
    net.to_empty(device="cpu").eval()
    net.load_encoder(vgg.state_dict(), "torchvision")
    with torch.no_grad():
        fc7 = net.head(net.encoder(x)[-1])
        torch.testing.assert_close(fc7[..., 3, 3], seven, rtol=1e-4, atol=1e-4)
    del vgg
    with torch.device("meta"): paper = fcn8s(21)
    state, paper = net.state_dict(), paper.to_empty(device="cpu").eval()
    paper.load_state_dict({**paper.state_dict(), **state}, assign=True)
    del net, state
    paper.reset(32, 16, 8)
    paper.mean.fill_(0.45), paper.std.fill_(0.22)
    x, y = x[..., :64, :72], torch.randint(0, 21, (1, 64, 72))
    optimiser = torch.optim.SGD(paper.parameters(), lr=1e-3)
    before = F.cross_entropy(paper(x), y)
    before.backward()
    optimiser.step()
    with torch.no_grad(): after = F.cross_entropy(paper(x), y)
    assert after < before


def test_load_encoder(tmp_path):
    net = fcn16s(3, width=2)
    state = {f"features.{k}": v for k, v in create_encoder("vgg16", width=2).state_dict().items()}
    net.load_encoder(state)
    assert all(torch.equal(v, state[f"features.{k}"]) for k, v in net.encoder.state_dict().items())
    state |= {"classifier.0.weight": torch.rand(128, 16 * 49), "classifier.0.bias": torch.rand(128),
              "classifier.3.weight": torch.rand(128, 128), "classifier.3.bias": torch.rand(128)}
    torch.save(state, tmp_path / "vgg.pth")
    made = create_model("fcn8s", 3, encoder_weights=tmp_path / "vgg.pth", width=2)
    assert torch.equal(made.head.fc6.weight, state["classifier.0.weight"].view(128, 16, 7, 7))
    torch.testing.assert_close(made.head.fc7.weight.flatten(1), state["classifier.3.weight"])
    with pytest.raises(ValueError, match="classifier.3.bias holds nothing"):
        net.load_encoder({k: v for k, v in state.items() if k != "classifier.3.bias"})
    with pytest.raises(ValueError, match="VGG16"): net.load_encoder({})
    assert not load_classifier(fc_head(8, 1, 0.5), {"fc.weight": torch.rand(2)})


@pytest.mark.parametrize("encoder, has_head", [("vgg16", True), ("vgg16_bn", True), ("resnet18", False), ("mobilenet_v2", False)])
def test_encoders_take_torchvision_weights(encoder, has_head):
    from torchvision import models
    net = create_model("fcn8s", 2, encoder=encoder, width=4 if has_head else None)
    assert net.imagenet.endswith("IMAGENET1K_V1") and hasattr(net.head, "fc6") == has_head
    split = count_parameters(net.encoder) + count_parameters(net.head)
    assert sum(p.numel() for p in net.encoder_parameters()) == split
    assert sum(p.numel() for p in net.decoder_parameters()) == count_parameters(net) - split
    if has_head: return
    theirs = getattr(models, encoder)(weights=None)
    net.load_encoder(theirs.state_dict(), encoder)
    theirs = theirs.eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = theirs.features(x) if hasattr(theirs, "features") else nn.Sequential(*[*theirs.children()][:-2])(x)
        torch.testing.assert_close(net.eval().encoder(x)[-1], want)


@pytest.mark.parametrize("coarse, fine", [(32, 16), (16, 8), (32, 8)])
@pytest.mark.parametrize("options", [dict(width=2), dict(width=2, padding=1), dict(width=4, encoder="resnet18")], ids=str)
def test_finer_starts_as_coarser_up_to_interpolation(coarse, fine, options):
    """Exactly the same where both interpolations draw one straight line: the middle half between two cells in each axis.

    For 32 -> 8 the corner is cut twice, and what is left of the line is a quarter."""
    torch.manual_seed(0)
    old = scored(FCN(3, finest=coarse, **options)).double()
    new = start_from(FCN(3, finest=fine, **options).double().eval(), old)
    x = torch.rand(1, 3, 256, 320, dtype=torch.float64)
    with torch.no_grad(): a, b = old(x), new(x)
    offset = old.offsets[coarse][1]
    free = 3 / 8 if coarse // fine == 4 else 1 / 4
    def straight(n):
        phase = ((torch.arange(n) + offset - coarse + 0.5) / coarse) % 1
        return (phase > free) & (phase < 1 - free) & (torch.arange(n) > 2 * coarse) & (torch.arange(n) < n - 2 * coarse)
    keep = straight(256)[:, None] & straight(320)
    assert keep.any()
    torch.testing.assert_close(b[..., keep], a[..., keep])
    assert (a - b).abs().max() > 1e-6  # not equal elsewhere: the corners on the cells' middles are cut
    with torch.no_grad(): old.scores["32"].weight.zero_(), old.scores["32"].bias.copy_(torch.tensor([1., -2, 3]))
    if coarse == 32:  # a constant map has no corners
        with torch.no_grad(): flat, again = old(x), start_from(FCN(3, finest=fine, **options).double().eval(), old)(x)
        torch.testing.assert_close(again[..., 64:-64, 64:-64], flat[..., 64:-64, 64:-64])


def test_start_from_refuses():
    for fine, coarse in ((fcn32s(3, width=2), fcn16s(3, width=2)), (fcn16s(3, width=2), fcn16s(3, width=2)),
                         (fcn16s(3, width=2), fcn32s(4, width=2)), (fcn16s(3, width=4), fcn32s(3, width=2))):
        with pytest.raises(ValueError, match="coarser"): start_from(fine, coarse)


def test_at_once_damps_the_skips():
    torch.manual_seed(0)
    plain, damped = scored(fcn8s(3, width=2)), scored(fcn8s(3, width=2, at_once=True))
    damped.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 70, 81)
    assert (plain(x) - damped(x)).abs().max() > 1e-3
    plain.scores["16"].weight *= 1e-2
    plain.scores["8"].weight *= 1e-4
    torch.testing.assert_close(plain(x), damped(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("name", ["fcn_resnet50", "fcn_resnet101"])
def test_same_as_torchvision(name, aux):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(1)
    theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21, aux_loss=aux)
    for m in theirs.modules():  # running statistics that are not 0 and 1
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.7, 1.3)
    theirs.eval()
    ours = {"fcn_resnet50": fcn_resnet50, "fcn_resnet101": fcn_resnet101}[name](21, aux=aux).eval()
    assert count_parameters(ours) == count_parameters(theirs)
    names = {"backbone.": "encoder.", "aux_classifier.": "aux_head.", "classifier.": "head."}
    ours.load_state_dict({next(new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)): v
                          for k, v in theirs.state_dict().items()})
    for size in ((64, 72), (104, 64)):
        x = torch.rand(1, 3, *size)
        with torch.no_grad(): want, (z, more) = theirs((x - ours.mean) / ours.std), ours.forward_aux(x)
        assert len(more) == aux
        pairs = [(z, want["out"]), *([(more[0], want["aux"])] if aux else [])]
        for a, b in pairs: torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1, b.abs().max().item()))
    with torch.no_grad(): assert torch.equal(ours(x), z)


@pytest.mark.parametrize("build", [lambda: fcn32s(5, width=3), lambda: fcn8s(5, width=2, encoder="vgg16_bn", padding=1),
                                   lambda: fcn16s(5, encoder="resnet18", width=4), lambda: fcn8s(5, encoder="resnet50", width=4),
                                   lambda: fcn_resnet50(5, width=8), lambda: FCNResNet(5, encoder="resnet18", width=4, aux=True)])
def test_contract(build): check_segmenter(build, sizes=((64, 64), (67, 93)))


def test_learns_two_stripes_by_heart():
    assert accuracy_by_heart(fcn8s(2, encoder="resnet18", width=8), 30) > 0.9


@pytest.mark.parametrize("options, says", [(dict(finest=4), "8, 16, 32"), (dict(padding=0), "1, 100"), (dict(encoder="vgg99"), "Known"),
                                           (dict(width=0), "width is 0")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): FCN(3, **options)


def test_one_channel_one_class_and_round_trip(tmp_path):
    net = create_model("fcn16s", 1, 1, encoder="vgg16_bn", width=2, padding=1, at_once=True).eval()
    scored(net)
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(1, 1, 65, 90)
    assert torch.equal(again(x), net(x)) and again.scale == {16: 1e-2, 8: 1e-4}


def test_exports():
    net = scored(fcn8s(3, width=2, padding=1))
    x = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
