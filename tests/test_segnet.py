"SegNet and DeconvNet against a restatement, torchvision's VGG16, the authors' sizes, and their own memory"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters, trace
from synseg.core import IMAGENET_MEAN, IMAGENET_STD
from synseg.segnet import (ENTRIES, DeconvNet, IndexPool, SegNet, SegNetBasic, Unpool, UnpoolStage, encode, pack_indices, unpack_indices,
                           vgg16_bn_features)
from synseg.zoo import create_model, load_model, save_model

NETS = (SegNet, SegNetBasic, DeconvNet)
PLAIN = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # convolutions in torchvision's VGG16 without batch norm


def stirred(net, gain=1.0):
    "Random everything, running statistics too, in double"
    for name, t in net.state_dict().items():
        if t.is_floating_point(): t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t) * (gain if t.ndim == 4 else 1) * 0.1)
    return net.double().eval().requires_grad_(False)


def cursor(net):
    "The tensors in the order in which the papers' figures use them"
    return iter([t for n, t in net.state_dict().items() if "num_batches" not in n])


def brick(x, t, transposed=False, relu=True, padding=None):
    w, b, gamma, beta, mean, var = (next(t) for _ in range(6))
    pad = w.shape[-1] // 2 if padding is None else padding
    x = (F.conv_transpose2d if transposed else F.conv2d)(x, w, b, padding=pad)
    x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt() * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
    return x.relu() if relu else x


def restated(x, net, down, up, transposed=False, relu=True, bottom=None):
    "Counts of convolutions per level, PyTorch's own max_unpool2d"
    t, memory = cursor(net), []
    for n in down:
        for _ in range(n): x = brick(x, t)
        size = x.shape
        x, at = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        memory.append((at, size))
    if bottom: x = bottom(x, t)
    for n in up:
        at, size = memory.pop()
        x = F.max_unpool2d(x, at, 2, output_size=size)
        for _ in range(n): x = brick(x, t, transposed, relu)
    w, b = next(t), next(t)
    assert next(t, None) is None
    return F.conv2d(x, w, b, padding=w.shape[-1] // 2)


def normalised(x):
    return (x - torch.tensor(IMAGENET_MEAN).view(-1, 1, 1)) / torch.tensor(IMAGENET_STD).view(-1, 1, 1)


@pytest.mark.parametrize("size", [(64, 96), (75, 101)])
def test_segnet_is_its_restatement(size):
    net = stirred(SegNet(3, width=3), 2)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(net(x), restated(normalised(x), net, (2, 2, 3, 3, 3), (3, 3, 3, 2, 1)))


def test_segnet_basic_is_its_restatement():
    net = stirred(SegNetBasic(3, width=4))
    x = torch.rand(2, 3, 75, 101, dtype=torch.float64)
    y = 255 * x * (1 + 2e-5 * (255 * x).square().sum(1, keepdim=True)) ** -0.75
    torch.testing.assert_close(net(x), restated(y, net, (1,) * 4, (1,) * 4, relu=False))


def test_deconvnet_is_its_restatement():
    def bottom(x, t):
        assert x.shape[-2:] == (7, 7)
        x = brick(brick(x, t, padding=0), t)
        assert x.shape[-2:] == (1, 1)
        return brick(x, t, transposed=True, padding=0)
    net = stirred(DeconvNet(3, width=2), 2)
    assert [n for n, _ in net.named_children()] == ["encoder", "fc6", "fc7", "unfold", "decoder", "score"]  # the order of use
    x = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    want = restated(normalised(x), net, (2, 2, 3, 3, 3), (3, 3, 3, 2, 2), True, bottom=bottom)
    torch.testing.assert_close(net(x), want)
    small = torch.rand(1, 3, 67, 93, dtype=torch.float64)  # other sizes: bilinear there and back
    there = F.interpolate(small, (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(small), F.interpolate(net(there), (67, 93), mode="bilinear", align_corners=False))


@pytest.mark.parametrize("build, classes, count", [(SegNet, 11, 29_449_355), (SegNet, 21, 29_455_125), (SegNetBasic, 11, 1_416_587),
                                                   (DeconvNet, 21, 251_772_245 + 33_408)])
def test_parameters_of_the_papers(build, classes, count):
    with torch.device("meta"): assert count_parameters(build(classes)) == count


def test_entries_count_what_they_say():
    for name, entry in ENTRIES.items():
        with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
        assert entry.info.name == name and count_parameters(net) == entry.info.parameters and entry.info.deviations


def test_sizes_of_the_authors_files():
    "segnet_train.prototxt writes 23x30 and 45x60 down; DeconvNet's unpool_size 14 to 224 around a 1x1 map"
    with torch.device("meta"):
        rows = trace(SegNet(11), torch.rand(1, 3, 360, 480, device="meta"))
        deep = trace(DeconvNet(21), torch.rand(1, 3, 224, 224, device="meta"))
    assert [r.output[1:] for r in rows if r.kind == "Unpool"] == [(512, 23, 30), (512, 45, 60), (256, 90, 120), (128, 180, 240), (64, 360, 480)]
    assert [r.output[1] for r in rows if r.kind == "Conv2d"][13:] == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 11]
    assert [r.output[1:] for r in deep if r.kind == "Unpool"] == [(512, 14, 14), (512, 28, 28), (256, 56, 56), (128, 112, 112), (64, 224, 224)]
    assert [r.output[1:] for r in deep if r.kind == "Conv2d"][13:15] == [(4096, 1, 1)] * 2
    assert [r.output[1] for r in deep if r.kind == "ConvTranspose2d"] == [512, 512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 64]


def test_encoder_is_torchvisions():
    "Maps before and after every pooling, with carried random weights under torchvision's own names"
    vgg = pytest.importorskip("torchvision").models.vgg
    theirs = vgg.make_layers(vgg.cfgs["D"], batch_norm=True).eval()
    for m in theirs:
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    net = SegNet(11).eval()
    state = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    net.load_encoder({**state, "classifier.0.weight": torch.zeros(3)})
    x, before, after = torch.rand(1, 3, 64, 96), [], []
    for layer in net.encoder:
        if isinstance(layer, IndexPool):
            layer.register_forward_hook(lambda m, i, o: before.append(i[0]) or after.append(o[0]))
    with torch.no_grad():
        encode(net.encoder, x)
        for layer in theirs:
            if isinstance(layer, nn.MaxPool2d): torch.testing.assert_close(before.pop(0), x)
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d): torch.testing.assert_close(after.pop(0), x)
    assert not before and not after


def test_plain_vgg16_fits_too():
    vgg = pytest.importorskip("torchvision").models.vgg
    theirs, net = vgg.make_layers(vgg.cfgs["D"]).eval(), SegNet(11).eval()
    net.load_encoder({f"features.{k}": v for k, v in theirs.state_dict().items()})
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(encode(net.encoder, x)[0], theirs(x), rtol=1e-3, atol=1e-5)
    some = {f"features.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("14.")}
    with pytest.raises(ValueError, match="is missing"): net.load_encoder(some)


def test_refuses_other_encoders():
    net, state = SegNet(5, width=4), vgg16_bn_features(3, 8).state_dict()
    with pytest.raises(ValueError, match="has shape"): net.load_encoder(state)
    with pytest.raises(ValueError, match="VGG16_BN"): net.load_encoder({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no pretrained encoder"): SegNetBasic(5, width=4).load_encoder(state)


def test_deconvnet_takes_the_fully_connected_layers():
    net = DeconvNet(5, width=2).eval()
    state = {f"features.{k}": v for k, v in vgg16_bn_features(3, 2).state_dict().items()}
    random = net.fc6[0].weight.clone()
    net.load_encoder(state)
    assert torch.equal(net.fc6[0].weight, random)  # a file without them leaves them
    fc6, fc7 = nn.Linear(16 * 49, 128), nn.Linear(128, 128)
    for i, m in ((0, fc6), (3, fc7)): state |= {f"classifier.{i}.weight": m.weight, f"classifier.{i}.bias": m.bias}
    net.load_encoder(state)
    x = torch.rand(2, 16, 7, 7)
    with torch.no_grad(): torch.testing.assert_close(net.fc7[0](net.fc6[0](x)).flatten(1), fc7(fc6(x.flatten(1))))
    names = {n for n, p in net.named_parameters() if any(p is q for q in net.encoder_parameters())}
    assert {"fc6.0.weight", "fc7.0.bias", "encoder.0.weight"} <= names and not any(n.startswith(("unfold", "decoder", "fc6.1")) for n in names)


@pytest.mark.parametrize("size", [(2, 3), (8, 8), (45, 60), (23, 31), (1, 1), (1, 5)])
def test_two_bits_are_enough(size):
    x = torch.randn(2, 3, *size)
    pooled, at = IndexPool()(x)
    packed = pack_indices(at, size[1])
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-at[0, 0].numel() // 4))
    assert torch.equal(unpack_indices(packed, pooled.shape[-2:], size[1]), at)


@pytest.mark.parametrize("build", NETS)
def test_packed_is_the_same_network(build):
    wide, tight = build(4, width=3), build(4, width=3, packed=True)
    tight.load_state_dict(wide.state_dict())
    x = torch.rand(2, 3, 71, 90)
    a, b = wide.train()(x), tight.train()(x)
    assert torch.equal(a, b)
    a.square().mean().backward(), b.square().mean().backward()
    for p, q in zip(wide.parameters(), tight.parameters()): assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("build", NETS)
def test_places_come_from_the_pooling_of_their_level(build):
    "And every number of an unpooled map stands where the maximum stood"
    net, pools, unpools = build(4, width=4).eval(), [], []
    for m in net.modules():
        if isinstance(m, IndexPool): m.register_forward_hook(lambda m, i, o: pools.append((i[0], *o)))
        if isinstance(m, Unpool): m.register_forward_hook(lambda m, i, o: unpools.append((*i, o)))
    with torch.no_grad(): net(torch.rand(2, 3, 93, 70))
    assert len(pools) == len(unpools) == len(net.up if build is SegNetBasic else net.decoder)
    for (before, pooled, at), (x, used, size, out) in zip(pools, reversed(unpools)):
        assert used is at and tuple(size) == tuple(before.shape[-2:]) and x.shape == pooled.shape and out.shape == before.shape
        assert torch.equal(out.flatten(2).gather(2, at.flatten(2)), x.flatten(2))
        assert torch.equal(before.flatten(2).gather(2, at.flatten(2)), pooled.flatten(2))
        assert (out != 0).sum() == (x != 0).sum()


@pytest.mark.parametrize("size", [(45, 60), (7, 9), (64, 33)])
def test_pool_after_unpool_is_the_identity(size):
    x = torch.rand(2, 3, *size) + 0.01
    pooled, at = IndexPool()(x)
    up = Unpool()(pooled, at, size)
    again, where = IndexPool()(up)
    assert torch.equal(again, pooled) and torch.equal(where, at) and (up != 0).sum() == pooled.numel()


def test_deconvolution_of_stride_one_is_a_convolution():
    deconv, conv = UnpoolStage((4, 6, 5), conv=nn.ConvTranspose2d).eval(), UnpoolStage((4, 6, 5)).eval()
    state = {k: v.transpose(0, 1).flip(2, 3) if v.ndim == 4 else v for k, v in deconv.state_dict().items()}
    conv.load_state_dict(state)
    x, at = IndexPool()(torch.randn(2, 4, 11, 8))
    torch.testing.assert_close(deconv(x, at, (11, 8)), conv(x, at, (11, 8)))


@pytest.mark.parametrize("build", [lambda: SegNet(5, width=4), lambda: SegNet(5, width=3, packed=True), lambda: SegNetBasic(5, width=6),
                                   lambda: DeconvNet(5, width=2)])
def test_contract(build): check_segmenter(build, sizes=((64, 64), (67, 93)))


def test_other_channels_and_one_class():
    for build in NETS:
        with torch.no_grad(): assert build(1, 4, width=2).eval()(torch.rand(1, 4, 65, 130)).shape == (1, 1, 65, 130)


def test_a_black_image_and_a_dead_encoder_leave_finite_logits():
    net = SegNet(3, width=2).eval()
    with torch.no_grad():
        for p in net.encoder.parameters(): p.zero_()
        assert net(torch.zeros(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("build", NETS)
def test_refuses(build):
    for width in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="width"): build(5, width=width)
    with pytest.raises(ValueError, match="at least 64x64"): build(5, width=2)(torch.rand(1, 3, 60, 90))


def test_deconvnet_needs_two_images_to_train():
    net = DeconvNet(5, width=2)
    with pytest.raises(ValueError, match="two or more"): net(torch.rand(1, 3, 64, 64))
    with torch.no_grad(): assert net.eval()(torch.rand(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("build, steps", [(SegNet, 60), (SegNetBasic, 40), (DeconvNet, 25)])
def test_overfits_one_batch(build, steps):
    x = torch.rand(2, 3, 64, 64)
    y = (F.avg_pool2d(x, 9, 1, 4)[:, 0] > F.avg_pool2d(x, 9, 1, 4)[:, 1]).long()
    x[:, 0] += y  # the class is to be seen
    net = build(2, width=4)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(x.clamp(0, 1)), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * losses[0], losses[::5]


@pytest.mark.parametrize("name", list(ENTRIES))
def test_papers_size_takes_a_step(name):
    net = create_model(name, 5)
    x, y = torch.rand(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    opt = torch.optim.SGD(net.parameters(), 1e-3)
    first = net.score.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16): loss = F.cross_entropy(net(x).float(), y)
    loss.backward(); opt.step()
    assert loss.isfinite() and not torch.equal(net.score.weight, first)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_through_the_zoo(name, tmp_path):
    net = create_model(name, 5, encoder="vgg16_bn" if name != "segnet_basic" else None, width=2, packed=True).eval()
    again = load_model(save_model(net, tmp_path / "m.safetensors"))
    x = torch.rand(1, 3, 64, 80)
    with torch.no_grad(): assert torch.equal(again(x), net(x))
    if name != "segnet_basic":
        torch.save({f"features.{k}": v for k, v in vgg16_bn_features(3, 2).state_dict().items()}, tmp_path / "vgg.pth")
        create_model(name, 5, encoder_weights=tmp_path / "vgg.pth", width=2)
