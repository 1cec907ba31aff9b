"BiSeNet and DFANet against their counts, torchvision's trunk, and restatements with functions only"
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from synseg.bisenet import (ENTRIES, AttentionRefinement, BiSeNet, ContextPath, DFANet, FCAttention, FeatureFusion, Xception39, XceptionUnit,
                            pooled, spatial_path)
from synseg.check import check_segmenter, count_parameters, receptive_field
from synseg.parity import stirred


def norm(x, t, n): return F.batch_norm(x, t[n + ".running_mean"], t[n + ".running_var"], t[n + ".weight"], t[n + ".bias"])
def resize(x, like): return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
def cna(x, t, n, stride=1, act=F.relu):
    w = t[n + ".0.weight"]
    return act(norm(F.conv2d(x, w, None, stride, w.shape[-1] // 2), t, n + ".1"))


def resnet18(x, t, n="encoder."):
    "Maps at 1/8, 1/16 and 1/32, from a state dict with torchvision's names"
    x = F.max_pool2d(F.relu(norm(F.conv2d(x, t[n + "conv1.weight"], None, 2, 3), t, n + "bn1")), 3, 2, 1)
    maps = []
    for layer in range(1, 5):
        for block in range(2):
            b, stride = f"{n}layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, t[b + "conv1.weight"], None, stride, 1), t, b + "bn1"))
            y = norm(F.conv2d(y, t[b + "conv2.weight"], None, 1, 1), t, b + "bn2")
            if b + "downsample.0.weight" in t:
                x = norm(F.conv2d(x, t[b + "downsample.0.weight"], None, stride), t, b + "downsample.1")
            x = F.relu(x + y)
        maps.append(x)
    return maps[1:]


def thin(x, t, n, stride=1, act=lambda x: x):
    return cna(F.conv2d(x, t[n + ".0.weight"], None, stride, 1, groups=x.shape[1]), t, n + ".1", act=act)


def stage(x, t, n):
    i = 0
    while f"{n}.{i}.convs.0.0.weight" in t:
        u, stride = f"{n}.{i}", 1 if i else 2
        y = thin(thin(thin(x, t, u + ".convs.0", stride, F.relu), t, u + ".convs.1", 1, F.relu), t, u + ".convs.2")
        x = F.relu(y + (x if i else thin(x, t, u + ".shortcut", stride)))
        i += 1
    return x


def xception39(x, t):
    x, maps = F.max_pool2d(cna(x, t, "encoder.stem.0", 2), 3, 2, 1), []
    for i in range(3):
        x = stage(x, t, f"encoder.stages.{i}")
        maps.append(x)
    return maps


def bisenet(x, t, trunk):
    "Logits at 1/8 and auxiliary logits at 1/16 and 1/8"
    mean = lambda x: x.mean((2, 3), keepdim=True)
    arm = lambda x, n: (lambda z: z * cna(mean(z), t, n + ".score", act=torch.sigmoid))(cna(x, t, n + ".conv"))
    head = lambda x, n: F.conv2d(cna(x, t, n + ".0"), t[n + ".1.weight"], t[n + ".1.bias"])
    s = x
    for i in range(4): s = cna(s, t, f"spatial.{i}", 2 if i < 3 else 1)
    m8, m16, m32 = trunk(x, t)
    top = arm(m32, "context.refine.0") + cna(mean(m32), t, "context.whole")
    coarse = cna(resize(top, m16), t, "context.smooth.0")
    fine = cna(resize(arm(m16, "context.refine.1") + coarse, m8), t, "context.smooth.1")
    y = cna(torch.cat([s, fine], 1), t, "fuse.mix")
    gate = F.conv2d(F.relu(F.conv2d(mean(y), t["fuse.squeeze.weight"])), t["fuse.expand.weight"]).sigmoid()
    return head(y * (1 + gate), "head"), [head(coarse, "aux.0"), head(fine, "aux.1")]


def dfanet(x, t):
    "Logits at 1/4"
    x, walks = cna(x, t, "stem", 2), []
    for w in range(3):
        maps = []
        for i in range(3):
            x = stage(torch.cat([walks[-1][i], x], 1) if w else x, t, f"walks.{w}.stages.{i}")
            maps.append(x)
        n = f"walks.{w}.attend"
        score = F.conv2d(x.mean((2, 3), keepdim=True), t[n + ".fc.weight"], t[n + ".fc.bias"])
        maps.append(x * cna(score, t, n + ".back"))
        walks.append(maps)
        x = resize(maps[3], maps[0])
    like = walks[0][0]
    low = sum(resize(cna(m[0], t, f"low.{i}"), like) for i, m in enumerate(walks))
    high = sum(resize(cna(m[3], t, f"high.{i}"), like) for i, m in enumerate(walks))
    return F.conv2d(cna(low, t, "mix") + high, t["score.weight"], t["score.bias"])


@pytest.mark.parametrize("build, options, count", [
    (BiSeNet, dict(aux=False), 12_894_163), (BiSeNet, dict(aux=True), 13_494_777), (BiSeNet, dict(encoder="xception39", aux=False), 1_541_963), (DFANet, {}, 1_829_715)])
def test_counts(build, options, count):
    with torch.device("meta"): assert count_parameters(build(19, **options)) == count


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name):
    entry = ENTRIES[name]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters and entry.info.name == name and entry.info.deviations


@pytest.mark.parametrize("encoder, trunk", [("resnet18", resnet18), ("xception39", xception39)])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_bisenet_as_restated(encoder, trunk, size):
    net = stirred(BiSeNet(5, width=8, encoder=encoder, aux=True)).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    z = net.prepare(x)
    with torch.no_grad(): got, want = net.compute_aux(z), bisenet(z, net.state_dict(), trunk)
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]]): torch.testing.assert_close(a, b)
    assert got[0].shape == (2, 5, size[0] // 8, size[1] // 8)


def test_trunk_of_torchvision():
    theirs = stirred(models.resnet18(weights=None)).double()
    net = BiSeNet(2).double().eval()
    net.load_encoder({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        y = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
        want = [y := layer(y) for layer in (theirs.layer2, theirs.layer3, theirs.layer4)]
        for a, b in zip(net.encoder(x)[-3:], want): torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert net.imagenet == "ResNet18_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
def test_dfanet_as_restated(size):
    net = stirred(DFANet(3, width=2)).double()
    z = net.prepare(torch.rand(2, 3, *size, dtype=torch.float64))
    with torch.no_grad(): torch.testing.assert_close(net.compute(z), dfanet(z, net.state_dict()))


def test_what_dfanets_stages_read_and_give():
    with torch.device("meta"):
        net = DFANet(19)
        shapes = [[tuple(m.shape[1:]) for m in maps] for maps in net.eval().passes(torch.rand(1, 3, 1024, 1024, device="meta"))]
    assert [s[0].convs[0][0].in_channels for s in net.walks[1].stages] == [240, 144, 288]
    assert [s[0].convs[0][0].in_channels for s in net.walks[2].stages] == [240, 144, 288]
    side = lambda s: [(48, s, s), (96, s // 2, s // 2), (192, s // 4, s // 4), (192, s // 4, s // 4)]
    assert shapes == [side(256), side(128), side(64)]


@pytest.mark.parametrize("seed", range(4))
def test_gates(seed):
    torch.manual_seed(seed)
    x = torch.randn(3, 6, 7, 5) * 10
    for brick, z in ((AttentionRefinement(6, 4), torch.randn(3, 4, 7, 5)), (FeatureFusion(6, 4), torch.rand(3, 4, 7, 5))):
        gate = brick.gate(z)
        assert gate.shape == (3, 4, 1, 1) and (gate > 0).all() and (gate < 1).all() and brick(x).shape == (3, 4, 7, 5)
    gate = FCAttention(6, 10).gate(x)
    assert gate.shape == (3, 6, 1, 1) and (gate >= 0).all() and (gate == 0).any()


def test_fusion_without_a_gate_is_the_mix():
    fuse, a, b = FeatureFusion(5, 4).double().eval(), torch.rand(2, 2, 9, 7).double(), torch.rand(2, 3, 9, 7).double()
    y = fuse.mix(torch.cat([a, b], 1))
    assert not torch.allclose(fuse(a, b), y)
    torch.testing.assert_close(fuse(a, b), y * (1 + fuse.gate(y)))
    fuse.gate = lambda y: torch.zeros(len(y), y.shape[1], 1, 1, dtype=y.dtype)
    assert torch.equal(fuse(a, b), y)


def test_two_images_are_told_apart_and_no_more():
    "In training, a gate normed over two images is sigmoid(+1) for one and sigmoid(-1) for the other"
    torch.manual_seed(0)
    gate = AttentionRefinement(3, 8).double().gate(torch.randn(2, 8, 9, 9).double() * 100)
    torch.testing.assert_close(gate.sum(0), torch.ones(8, 1, 1).double())
    torch.testing.assert_close(gate.amax(0).flatten(), torch.tensor(1.0).double().sigmoid().expand(8), atol=1e-3, rtol=0)


def test_fields():
    assert receptive_field(spatial_path(3, 8), 97, samples=4) == (19, 19)
    net = stirred(BiSeNet(2, width=4, aux=False))
    class Context(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net.features(x)["context"]
    assert receptive_field(Context(), 128, samples=2) == (128, 128)


@pytest.mark.parametrize("build", [
    lambda: BiSeNet(5, width=8, aux=True), lambda: BiSeNet(5, width=8, encoder="xception39", aux=True), lambda: BiSeNet(5, width=8, aux=False, paths="context"),
    lambda: BiSeNet(5, width=8, paths="spatial"), lambda: DFANet(5, width=2)])
def test_contract(build): check_segmenter(build)


@pytest.mark.parametrize("net", [BiSeNet(2, width=4), DFANet(2, width=1)])
def test_odd_sizes_and_mirror(net):
    net, x = stirred(net), torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        pad = F.pad(x, (0, -90 % net.stride, 0, -70 % net.stride), mode="reflect")
        torch.testing.assert_close(net(x), net(pad)[..., :70, :90])


@pytest.mark.parametrize("build", [lambda: BiSeNet(2, width=4), lambda: DFANet(2, width=1)])
def test_batch_of_one(build):
    net, x = build(), torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="batches of two or more"): net(x)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    assert net(x).shape == (1, 2, 64, 64)
    assert BiSeNet(2, width=4, paths="spatial")(x).shape == (1, 2, 64, 64)


def test_pooled():
    x, layer = torch.rand(1, 2, 3, 4), nn.Conv2d(2, 2, 1)
    torch.testing.assert_close(pooled(x, layer)[..., 0, 0], x.flatten(2).mean(2))
    with pytest.raises(ValueError, match="single value"): pooled(x, nn.BatchNorm2d(2))
    assert pooled(x, nn.BatchNorm2d(2).eval()).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("build, options, says", [
    (BiSeNet, dict(width=0), "width is 0"), (BiSeNet, dict(width=2.0), "width is 2.0"), (BiSeNet, dict(width=True), "width is True"),
    (BiSeNet, dict(encoder="vgg16"), "resnet18 or xception39"), (BiSeNet, dict(paths="none"), "both, spatial, context"), (DFANet, dict(width=-1), "width is -1")])
def test_refuses(build, options, says):
    with pytest.raises(ValueError, match=says): build(3, **options)


def test_one_path():
    alone = BiSeNet(3, width=4, paths="spatial")
    assert alone.stride == 8 and not hasattr(alone, "encoder") and len(alone.aux) == 0
    with pytest.raises(ValueError, match="no pretrained encoder"): alone.load_encoder({})
    assert BiSeNet(3, width=4, paths="context").spatial is None and len(BiSeNet(3, width=4, aux=False).aux) == 0


def test_maps_of_xception39():
    with torch.device("meta"):
        net, x = Xception39(3), torch.rand(1, 3, 640, 320, device="meta")
        maps = net(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 640 // s, 320 // s) for c, s in zip(net.channels, net.strides)]
    convs = sum(isinstance(m, XceptionUnit) for m in net.modules())
    assert convs == 16 and count_parameters(net) == 299_448


def test_context_path_sees_the_1_8_map_by_its_size_only():
    path = stirred(ContextPath((6, 8), 4))
    maps = [torch.rand(2, c, s, s + 2) for c, s in ((3, 16), (6, 8), (8, 4))]
    coarse, fine = path(maps)
    assert coarse.shape == (2, 4, 8, 10) and fine.shape == (2, 4, 16, 18)
    maps[0] = maps[0] * 7
    assert torch.equal(path(maps)[1], fine)


@pytest.mark.parametrize("build", [lambda: BiSeNet(3, width=8), lambda: DFANet(3, width=2)])
def test_overfits_one_batch(build):
    torch.manual_seed(0)
    net, x = build(), torch.rand(4, 3, 64, 64)
    y = F.interpolate(x, scale_factor=0.125, mode="area").repeat_interleave(8, 2).repeat_interleave(8, 3).argmax(1)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
