"ICNet against the authors' count, a restatement with functions only, and what each of its three branches can know"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.conv import multiply_adds
from synseg.icnet import BRANCHES, ENTRIES, CascadeFusion, ICNet, every_second, full_branch
from synseg.parity import stirred
from synseg.pspnet import on_grid
from synseg.zoo import create_model, load_model, save_model

SMALL = dict(encoder="resnet18", width=4)


def folded(net):
    "Parameters with every norm merged into the convolution before it: one bias per map is left of scale and shift"
    return count_parameters(net) - sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def ready(net): return stirred(net).double()


def test_counts():
    with torch.device("meta"): net, more, five = ICNet(19), ICNet(19, aux=True), ICNet(5, 1)
    info = ENTRIES["icnet"].info
    assert folded(net) == 6_685_715 and count_parameters(net) == info.parameters and info.classes == 19
    assert count_parameters(more) - count_parameters(net) == 19 * (256 + 1) + 19 * (128 + 1)
    assert count_parameters(net) - count_parameters(five) == 14 * 129 + 2 * 2 * 9 * 32  # two convolutions read the image
    assert net.encoder.channels == (64, 128, 256, 512, 1024) and ENTRIES["icnet"].encoders[0] == "resnet50"
    dilations = {n: {m.dilation[0] for m in getattr(net.encoder, n).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
                 for n in ("layer2", "layer3", "layer4")}
    assert dilations == dict(layer2={1}, layer3={1, 2}, layer4={2, 4})


def test_work_at_full_size():
    with torch.device("meta"): net = ICNet(19)
    costs = multiply_adds(net, (1025, 2049))
    assert multiply_adds(net, (1024, 2048)).multiply_adds == costs.multiply_adds  # 1024x2048 is mirrored up to it
    shapes = {c.module: c.output[-2:] for c in costs}
    assert shapes["full.2.0"] == (129, 257) and shapes["encoder.layer4.2.conv3"] == (33, 65) and shapes["encoder.layer2.0.conv3"] == (65, 129)


# all of it restated: tensors are taken from the state by name, layers are functions

def restated(net, image, bins=(1, 2, 3, 6), second="first fusion"):
    "The authors' released description with functions only; returns all three logits, coarsest first"
    s = net.state_dict()

    def conv(x, key, after=None, stride=1, dilation=1, act=True):
        "A convolution and its norm, which is key's neighbour unless named"
        w, n = s[f"{key}.weight"], after or f"{key[:-1]}{int(key[-1]) + 1}"
        x = F.conv2d(x, w, None, stride, dilation * (w.shape[-1] // 2), dilation)
        x = (x - s[f"{n}.running_mean"][:, None, None]) / (s[f"{n}.running_var"][:, None, None] + 1e-5).sqrt()
        x = x * s[f"{n}.weight"][:, None, None] + s[f"{n}.bias"][:, None, None]
        return x.clamp(min=0) if act else x

    def block(x, key, stride, dilation):
        key, out = f"encoder.{key}", x
        out = conv(out, f"{key}.conv1", f"{key}.bn1")
        out = conv(out, f"{key}.conv2", f"{key}.bn2", stride, dilation)
        out = conv(out, f"{key}.conv3", f"{key}.bn3", act=False)
        if f"{key}.downsample.0.weight" in s: x = conv(x, f"{key}.downsample.0", stride=stride, act=False)
        return (x + out).clamp(min=0)

    def resized(x, rows, columns): return F.interpolate(x, (rows, columns), mode="bilinear", align_corners=True)
    rows, columns = (-(-(n - 1) // 32) for n in image.shape[-2:])
    down, right = 32 * rows + 1 - image.shape[-2], 32 * columns + 1 - image.shape[-1]
    mean, std = (torch.tensor(v).double()[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = F.pad((image - mean) / std, (0, right, 0, down), mode="reflect")
    z = resized(x, 16 * rows + 1, 16 * columns + 1)
    z = conv(conv(z, "encoder.conv1.0", stride=2), "encoder.conv1.3")
    z = F.max_pool2d(conv(z, "encoder.conv1.6", "encoder.bn1"), 3, 2, 1)
    for i in range(3): z = block(z, f"layer1.{i}", 1, 1)
    half = z = block(z, "layer2.0", 2, 1)
    z = resized(z, rows + 1, columns + 1)
    for i in range(1, 4): z = block(z, f"layer2.{i}", 1, 1)
    for i in range(6): z = block(z, f"layer3.{i}", 1, 2 if i else 1)
    for i in range(3): z = block(z, f"layer4.{i}", 1, 4 if i else 2)
    z = z + sum(resized(F.adaptive_avg_pool2d(z, b), rows + 1, columns + 1) for b in bins)
    quarter = conv(z, "last.0")
    low = conv(resized(quarter, 2 * rows + 1, 2 * columns + 1), "fusions.0.low.0", dilation=2, act=False)
    first = (low + conv(half, "fusions.0.high.0", act=False)).clamp(min=0)
    full = x
    for i in range(3): full = conv(full, f"full.{i}.0", stride=2)
    low = conv(resized(first, 4 * rows + 1, 4 * columns + 1), "fusions.1.low.0", dilation=2, act=False)
    fused = (low + conv(full, "fusions.1.high.0", act=False)).clamp(min=0)

    def scores(x, key, steps):
        "Enlarged to twice the size, scored, and enlarged to the image, as released"
        x = resized(x, 2 * steps * rows + 1, 2 * steps * columns + 1)
        x = F.conv2d(x, s[f"{key}.weight"], s[f"{key}.bias"])
        return resized(x, 32 * rows + 1, 32 * columns + 1)[..., :image.shape[-2], :image.shape[-1]]
    return [scores(quarter, "aux_heads.0", 1), scores(first, "aux_heads.1", 2), scores(fused, "head", 4)]


@pytest.mark.parametrize("size", [(97, 129), (64, 64), (70, 131)])
def test_same_as_the_restatement(size):
    net, x = ready(ICNet(5, width=4, aux=True)), torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        coarse, middle, fine = restated(net, x)
        out, (a, b) = net.forward_aux(x)
        torch.testing.assert_close(out, fine)
        torch.testing.assert_close(net(x), fine)
        torch.testing.assert_close(a, coarse)
        torch.testing.assert_close(b, middle)
        assert fine.std() > 1e-2 and not torch.allclose(fine, restated(net, x, bins=(1, 2))[-1])


# the grids

@pytest.mark.parametrize("size", [(64, 64), (65, 97), (71, 130), (129, 161)])
def test_sizes_of_the_maps(size):
    net = ICNet(3, **SMALL).eval()
    x = net.prepare(torch.rand(1, 3, *size))
    rows, columns = ((n - 1) // 32 for n in x.shape[-2:])
    assert all((n - 1) % 32 == 0 and 0 <= n - m < 32 for n, m in zip(x.shape[-2:], size))
    known = net.cascade(*net.maps(x))
    assert [tuple(m.shape[1:]) for m in known] == [(c, k * rows + 1, k * columns + 1) for c, k in ((32, 1), (16, 2), (16, 4))]
    assert [m.shape[1] for m in net.maps(x)] == [32, 8, 8]


def test_every_second_is_the_authors_shrinking():
    x = torch.rand(2, 3, 33, 65)
    assert torch.equal(every_second(x), F.interpolate(x, (17, 33), mode="bilinear", align_corners=True))


@pytest.mark.parametrize("branches", [("quarter",), ("quarter", "half"), BRANCHES])
def test_a_pixel_looks_at_itself(branches):
    """Linear, positive and without pyramid: the centre of mass of what a pixel listens to is the pixel, but for the little that the
    image's border cuts off. A grid that is off by half a pixel anywhere would show"""
    net = ICNet(1, encoder="resnet18", width=1, bins=(), branches=branches).double().eval()
    for m in net.modules():
        if isinstance(m, nn.Conv2d): nn.init.constant_(m.weight, 1 / m.weight[0].numel())
    net.encoder.maxpool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    x, places = torch.ones(1, 3, 1281, 1281, dtype=torch.float64, requires_grad=True), torch.arange(1281, dtype=torch.float64)
    seen = torch.autograd.grad(net.compute(x)[0, 0, 643, 637], x)[0].sum((0, 1))
    assert abs(seen.sum(0) @ places / seen.sum() - 637) < 0.02 and abs(seen.sum(1) @ places / seen.sum() - 643) < 0.02


def test_scoring_late_is_scoring_early():
    "A 1x1 commutes with enlarging, and enlarging twice and then four times is enlarging eight times"
    z, head = torch.randn(2, 4, 5, 7, dtype=torch.float64), nn.Conv2d(4, 3, 1).double()
    torch.testing.assert_close(on_grid(head(on_grid(z, 2)), 4), on_grid(head(z), 8))


# what the branches know

def vanishing(shape):
    "Noise on all pixels but those of even row and even column"
    noise = torch.rand(shape, dtype=torch.float64)
    noise[..., ::2, ::2] = 0
    return noise


@pytest.mark.parametrize("size", [(64, 64), (97, 129), (70, 131)])
def test_without_the_full_branch_only_every_second_pixel_counts(size):
    net, x = ready(ICNet(3, aux=True, **SMALL)), torch.rand(2, 3, *size, dtype=torch.float64)
    y = net.prepare(x)
    z = y + vanishing(y.shape)
    with torch.no_grad():
        (quarter, half, full), (same, same_half, other) = net.maps(y), net.maps(z)
        assert torch.equal(quarter, same) and torch.equal(half, same_half) and not torch.allclose(full, other)
        for one, two in (((quarter, None, None), (same, None, None)), ((quarter, half, None), (same, same_half, None))):
            assert torch.equal(net.cascade(*one)[-1], net.cascade(*two)[-1])
        assert not torch.allclose(net.compute(y), net.compute(z))
        a, b = net.compute_aux(y)[1], net.compute_aux(z)[1]
        assert all(torch.equal(p, q) for p, q in zip(a, b))  # both auxiliary heads come before the full image


def test_the_quarter_branch_reads_every_second_cell():
    net = ready(ICNet(3, **SMALL))
    half = torch.rand(1, 8, 9, 13, dtype=torch.float64)
    with torch.no_grad(): assert torch.equal(net.deep(half), net.deep(half + vanishing(half.shape)))


def test_half_and_quarter_share_their_weights():
    "The gradient of a shared weight is the sum of what comes by the quarter and by the half; the rest has one source"
    net, x = ready(ICNet(3, **SMALL)), torch.rand(2, 3, 70, 90, dtype=torch.float64)
    y, names = net.prepare(x), [n for n, p in net.encoder.named_parameters()]

    def gradients(by_quarter, by_half):
        "Of the sum of squares, where only these two ways from the shared map are open"
        net.zero_grad()
        half = net.shared(every_second(y))
        quarter = net.deep(half)
        net.cascade(quarter if by_quarter else quarter.detach(), half if by_half else half.detach(), net.full(y))[-1].square().sum().backward()
        return {n: None if p.grad is None else p.grad.clone() for n, p in net.encoder.named_parameters()}
    both, one, other = gradients(True, True), gradients(True, False), gradients(False, True)
    shared = [n for n in names if n.startswith(("conv1", "bn1", "layer1", "layer2.0"))]
    assert len(shared) > 20
    for n in names:
        if n in shared:
            torch.testing.assert_close(both[n], one[n] + other[n])
            assert one[n].abs().max() > 0 and other[n].abs().max() > 0
        else:
            torch.testing.assert_close(both[n], one[n])
            assert other[n] is None


def test_the_second_fusion_reads_the_first():
    net, x = ready(ICNet(3, **SMALL)), torch.rand(1, 3, 65, 97, dtype=torch.float64)
    quarter, half, full = net.maps(net.prepare(x))
    with torch.no_grad():
        known = net.cascade(quarter, half, full)
        torch.testing.assert_close(known[2], sum(net.fusions[1].terms(known[1], full)).clamp(min=0))
        assert net.fusions[1].low[0].in_channels == net.fusions[0].out_channels == 16
        assert not torch.allclose(net.cascade(quarter + 1, half, full)[2], known[2])


@pytest.mark.parametrize("branches", [("quarter",), ("quarter", "half"), ("full", "quarter")])
def test_a_branch_left_out_is_a_term_left_out(branches):
    net = ready(ICNet(3, **SMALL))
    alone, x = ICNet(3, branches=branches, **SMALL).double().eval(), torch.rand(2, 3, 67, 93, dtype=torch.float64)
    alone.load_state_dict({k: v for k, v in net.state_dict().items() if k in alone.state_dict()})
    y = net.prepare(x)
    quarter, half, full = net.maps(y)
    with torch.no_grad():
        silent = net.cascade(quarter, half if "half" in branches else None, full if "full" in branches else None)[-1]
        torch.testing.assert_close(alone.compute(y), on_grid(net.head(silent), 8))


def test_fusion():
    unit = ready(CascadeFusion(6, 5, 4))
    low, high = torch.randn(2, 6, 4, 5, dtype=torch.float64), torch.randn(2, 5, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        a, b = unit.terms(low, high)
        torch.testing.assert_close(unit(low, high), (a + b).clamp(min=0))
        torch.testing.assert_close(unit(low), a.clamp(min=0))
        torch.testing.assert_close(unit.terms(low, 2 * high)[0], a)
    assert CascadeFusion(6, None, 4).high is None and full_branch(4, 6)(torch.rand(1, 4, 65, 97)).shape == (1, 12, 9, 13)


# the contract

@pytest.mark.parametrize("options", [dict(aux=True), dict(branches=("quarter",)), dict(encoder="resnet50", bins=(1, 6)), dict(bins=())], ids=str)
def test_contract(options): check_segmenter(lambda: ICNet(5, **SMALL | options))


def test_every_size():
    net = ICNet(2, encoder="resnet18", width=2).eval().requires_grad_(False)
    for n in range(64, 98, 3): assert net(torch.rand(1, 3, n, 175 - n)).shape == (1, 2, n, 175 - n)


def test_a_batch_of_one_trains():
    assert ICNet(2, **SMALL).train()(torch.rand(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("options, says", [(dict(branches=("half", "full")), "name 'quarter'"), (dict(branches=("quarter", "third")), "name 'quarter'"),
                                           (dict(encoder="vgg16"), "resnet101, resnet50"), (dict(width=0), "at least 1")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): ICNet(3, **options)


def test_refuses_imagenet():
    with pytest.raises(ValueError, match="torchvision has no ImageNet weights"): create_model("icnet", 3, width=4, encoder_weights="imagenet")


def test_round_trip_of_options(tmp_path):
    net = create_model("icnet", 3, 4, encoder="resnet18", width=2, branches=("quarter", "half"), aux=True).eval()
    again, x = load_model(save_model(net, tmp_path / "m.safetensors")), torch.rand(2, 4, 70, 91)
    with torch.no_grad(): assert torch.equal(again(x), net(x)) and len(again.forward_aux(x)[1]) == 2 and again.full is None


def test_overfits_one_batch():
    net = ICNet(3, encoder="resnet18", width=8, aux=True)
    x, y = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    y[:, :, 32:], y[0, 40:] = 1, 2
    x[:, 0] += 0.5 * y
    optimiser, losses = torch.optim.Adam(net.parameters(), 5e-3), []
    for _ in range(40):
        z, aux = net.forward_aux(x)
        loss = F.cross_entropy(z, y) + sum(0.4 * F.cross_entropy(a, y) for a in aux)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_exports():
    net, x = ICNet(3, encoder="resnet18", width=2).eval().requires_grad_(False), torch.rand(2, 3, 96, 72)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
