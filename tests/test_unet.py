"U-Net against the paper's figure, its counts, an independent restatement, and its own other forms"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import nn

from synseg.check import check_segmenter, count_parameters, trace
from synseg.unet import (ENTRIES, TernausNet, UNet, ValidUNet, border_weight_map, crop_like, he_init, mirror_pad, overlap_tile, pad_like,
                         unet, unet_small, unet_valid)


def random_weights(net, std=0.1):
    for p in net.parameters(): nn.init.normal_(p, std=std)
    return net.double().eval().requires_grad_(False)


def restated(x, tensors, valid):
    "Figure 1 with functions only"
    t, pad = iter(tensors), 0 if valid else 1
    conv = lambda x: F.relu(F.conv2d(x, next(t), next(t), padding=pad))
    maps = [conv(conv(x))]
    for _ in range(4): maps.append(conv(conv(F.max_pool2d(maps[-1], 2))))
    x = maps.pop()
    for skip in reversed(maps):
        x = F.conv_transpose2d(x, next(t), next(t), stride=2)
        c = (skip.shape[-2] - x.shape[-2]) // 2, (skip.shape[-1] - x.shape[-1]) // 2
        x = conv(conv(torch.cat([skip[..., c[0]:c[0] + x.shape[-2], c[1]:c[1] + x.shape[-1]], x], 1)))
    return F.conv2d(x, next(t), next(t))


@pytest.mark.parametrize("channels, classes, count", [(1, 2, 31_030_658), (3, 1, 31_031_745), (3, 21, 31_033_045)])
def test_parameters_of_the_paper(channels, classes, count):
    with torch.device("meta"):
        assert count_parameters(unet(classes, channels)) == count_parameters(unet_valid(classes, channels)) == count


def test_entries_count_what_they_say():
    for name, entry in ENTRIES.items():
        with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
        assert entry.info.name == name and count_parameters(net) == entry.info.parameters


def test_sizes_of_figure_one():
    with torch.device("meta"): rows = trace(unet_valid(2, 1), torch.rand(1, 1, 572, 572, device="meta"))
    convs = [(r.output[1], r.output[-1]) for r in rows if "Conv" in r.kind]
    assert convs == [(64, 570), (64, 568), (128, 282), (128, 280), (256, 138), (256, 136), (512, 66), (512, 64), (1024, 30),
                     (1024, 28), (512, 56), (512, 54), (512, 52), (256, 104), (256, 102), (256, 100), (128, 200), (128, 198),
                     (128, 196), (64, 392), (64, 390), (64, 388), (2, 388)]


@pytest.mark.parametrize("valid, size", [(True, (188, 236)), (False, (80, 112))])
def test_same_as_the_restatement(valid, size):
    net = random_weights((ValidUNet if valid else UNet)(3, 2, width=3))
    x = torch.rand(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(net(x), restated((x - 0.5) / 0.25, net.parameters(), valid))


@pytest.mark.parametrize("size", [(188, 188), (204, 252)])
def test_padded_and_valid_are_one_network(size):
    valid, same = random_weights(unet_valid(3, 1, width=3)), unet(3, 1, width=3).double().eval()
    same.load_state_dict(valid.state_dict())
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    inside = same(F.pad(x, (2, 2, 2, 2)))[..., 94:-94, 94:-94]
    assert inside.shape[-2:] == tuple(n - 184 for n in size)
    torch.testing.assert_close(inside, valid(x))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_valid_sizes_at_every_depth(depth):
    "Legal exactly where every pool meets an even size; the loss is twice the margin"
    net, legal = ValidUNet(2, 1, width=2, depth=depth).eval(), 0
    for n in range(92, 92 + 2 * 2**depth):
        x = torch.rand(1, 1, n, n + 2**depth)
        try: z = net(x)
        except ValueError: continue
        legal += 1
        assert z.shape[-2:] == (n - 2 * net.margin, x.shape[-1] - 2 * net.margin)
    assert legal == 2


@pytest.mark.parametrize("size", [(100, 188), (572, 570), (187, 188), (172, 172)])
def test_valid_refuses_other_sizes(size):
    with pytest.raises(ValueError, match="12 mod 16"): unet_valid(2, 1, width=2)(torch.rand(1, 1, *size))


@pytest.mark.parametrize("size, tile", [((97, 131), 20), ((64, 230), 100), ((7, 9), 61), ((120, 120), 388)])
def test_tiled_is_whole(size, tile):
    net = random_weights(unet_valid(2, 3, width=2))
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    out = overlap_tile(net, x, tile)
    big = mirror_pad(x, 92, 92 + (4 - size[0]) % 16, 92, 92 + (4 - size[1]) % 16)
    assert out.shape == (2, 2, *size)
    torch.testing.assert_close(out, net(big)[..., :size[0], :size[1]])


def test_overlap_tile_refuses():
    with pytest.raises(ValueError, match="valid"): overlap_tile(unet(2, width=2), torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least 20"): overlap_tile(unet_valid(2, width=2), torch.rand(1, 3, 64, 64), 19)


def test_mirror_pad():
    x = torch.rand(2, 3, 9, 12)
    assert torch.equal(mirror_pad(x, 8, 3, 0, 11), F.pad(x, (0, 11, 8, 3), mode="reflect"))
    assert torch.equal(mirror_pad(x[..., :1, :1], 3, 0, 0, 5), x[..., :1, :1].expand(2, 3, 4, 6))
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (40, 3), (0, 50)), mode="reflect")
    assert np.array_equal(mirror_pad(x, 40, 3, 0, 50).numpy(), wide)


def test_crop_and_pad_agree_in_the_middle():
    crop, pad = random_weights(unet_valid(2, 1, width=3)), random_weights(unet_valid(2, 1, width=3, join="pad"))
    pad.load_state_dict(crop.state_dict())
    x = torch.rand(1, 1, 236, 204, dtype=torch.float64)
    a, b = crop(x), pad(x)
    assert b.shape[-2:] == (228, 196)
    torch.testing.assert_close(b[..., 88:-88, 88:-88], a)
    assert (b[..., 80:-80, 80:-80][..., 0, :] != 0).any()
    skip, small = torch.rand(1, 2, 13, 12), torch.rand(1, 2, 8, 8)
    assert crop_like(skip, small)[0].shape == small.shape and pad_like(skip, small)[1].shape == skip.shape


def test_circular_padding_is_shift_equivariant_for_multiples_of_16_only():
    net = random_weights(unet(3, width=3, padding_mode="circular"), std=0.2)
    x = torch.rand(1, 3, 64, 80, dtype=torch.float64)
    z = net(x)
    for shift in [(16, 0), (0, 32), (48, 16)]:
        torch.testing.assert_close(net(x.roll(shift, (-2, -1))), z.roll(shift, (-2, -1)))
    for shift in [(1, 0), (0, 8), (8, 8), (4, 16)]:
        assert (net(x.roll(shift, (-2, -1))) - z.roll(shift, (-2, -1))).abs().max() > 1e-6


def test_he_init_standard_deviations():
    net = UNet(2, 1, width=32, depth=2)
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.weight.numel() > 5000:
            fan = m.in_channels * (9 if m.kernel_size == (3, 3) else 1)
            assert abs(m.weight.std().item() / (2 / fan)**0.5 - 1) < 0.1
            assert not m.bias.any()
    m = nn.ConvTranspose2d(256, 64, 2, stride=2)
    he_init(m)
    assert abs(m.weight.std().item() / (2 / 256)**0.5 - 1) < 0.05


@pytest.mark.parametrize("build", [lambda: unet(5, width=4), lambda: unet_small(5), lambda: unet_small(5, width=8, up="bilinear"),
                                   lambda: unet(5, width=4, norm=True, up="nearest", join="pad", skips=False),
                                   lambda: unet_small(5, width=4, depth=5, padding_mode="reflect")])
def test_contract(build): check_segmenter(build)


def test_ternausnet():
    from torchvision.models import vgg11
    net, vgg = TernausNet(1), vgg11()
    assert count_parameters(net) == 22_927_393 and sum(p.numel() for p in net.encoder_parameters()) == 9_220_480
    net.load_encoder(vgg.state_dict())
    x = torch.rand(1, 3, 64, 96)
    assert torch.equal(net.encoder(x), vgg.features(x))
    check_segmenter(lambda: TernausNet(2), num_classes=2, sizes=((64, 64), (65, 97)))


def test_ternausnet_takes_skips_before_pooling():
    net = TernausNet(2).eval()
    shapes = []
    for block in [net.center, *net.decoder, net.last]: block.register_forward_hook(lambda m, i, o: shapes.append((i[0].shape[1:], o.shape[1:])))
    net(torch.rand(1, 3, 96, 64))
    assert [(tuple(i), tuple(o)) for i, o in shapes] == [
        ((512, 3, 2), (256, 6, 4)), ((768, 6, 4), (256, 12, 8)), ((768, 12, 8), (128, 24, 16)), ((384, 24, 16), (64, 48, 32)),
        ((192, 48, 32), (32, 96, 64)), ((96, 96, 64), (32, 96, 64))]


@pytest.mark.parametrize("options, says", [(dict(up="deconv"), "transposed, nearest, bilinear"), (dict(join="add"), "crop, pad"),
                                           (dict(padding_mode="mirror"), "circular"), (dict(width=0), "width 0"), (dict(depth=0), "depth 0")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): unet(5, **options)


def slow_weights(cells, w0, sigma, class_weights):
    "Full-size distance transforms, one per cell, borders by erosion-free comparison"
    h, w = cells.shape
    distances = []
    for i in np.unique(cells[cells > 0]):
        inside = cells == i
        around = np.pad(inside, 1, mode="edge")
        border = inside & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])
        distances.append(distance_transform_edt(~border) if border.any() else np.full((h, w), np.inf))
    d = np.sort(np.stack(distances + [np.full((h, w), np.inf)] * 2), 0)[:2].sum(0)
    return np.where(cells > 0, class_weights[1], class_weights[0]) + w0 * np.exp(-d**2 / (2 * sigma**2))


@pytest.mark.parametrize("seed", range(4))
def test_weight_map_against_the_slow_one(seed):
    rng = np.random.default_rng(seed)
    cells = np.kron(rng.integers(0, 7, (6, 9)), np.ones((11, 8), int))
    w0, sigma, classes = rng.uniform(1, 20), rng.uniform(1, 6), tuple(rng.uniform(.2, 3, 2))
    fast = border_weight_map(torch.from_numpy(cells), w0, sigma, classes)
    assert fast.dtype == torch.float32 and fast.shape == cells.shape
    np.testing.assert_allclose(fast, slow_weights(cells, w0, sigma, classes), rtol=1e-5, atol=1e-5)


def test_weight_map_values():
    two = np.zeros((30, 31), int)
    two[:, :11], two[:, 20:] = 1, 2  # borders in columns 10 and 20
    np.testing.assert_allclose(border_weight_map(two)[:, 11:20], 1 + 1.353353, rtol=1e-5)
    two[:, 20] = 0
    np.testing.assert_allclose(border_weight_map(two)[:, 11:21], 1 + 10 * np.exp(-121 / 50), rtol=1e-5)
    for lonely in (np.zeros((9, 9), int), np.ones((9, 9), int)):
        assert torch.equal(border_weight_map(lonely, class_weights=(2., 3.)), torch.full((9, 9), 3. if lonely.any() else 2.))


def test_weight_map_ignores_the_order_of_ids():
    rng = np.random.default_rng(1)
    cells = np.kron(rng.integers(0, 5, (5, 5)), np.ones((6, 7), int))
    renamed = np.array([0, 40, 3, 17, 9])[cells]
    assert torch.equal(border_weight_map(cells), border_weight_map(renamed))


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 4), int), np.zeros((5, 5))])
def test_weight_map_refuses(bad):
    with pytest.raises(ValueError, match="whole numbers"): border_weight_map(bad)
