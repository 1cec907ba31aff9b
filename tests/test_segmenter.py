"The base class: any size in, the same size out, and refusals in plain words"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter
from synseg.core import IMAGENET_MEAN, IMAGENET_STD
from synseg.segmenter import Segmenter, fit_to, pad_to_stride


class Coarse(Segmenter):
    "Answers at an eighth of the size, with an auxiliary head at a quarter"
    def __init__(self, num_classes, in_channels=3, stride=8, **options):
        super().__init__(num_classes, in_channels, stride, **options)
        self.encoder = nn.Conv2d(in_channels, 6, 7, stride=4, padding=3)
        self.score = nn.Conv2d(6, num_classes, 3, stride=2, padding=1)
        self.aux = nn.Conv2d(6, num_classes, 1)

    def compute(self, x): return self.score(self.encoder(x))

    def compute_aux(self, x):
        z = self.encoder(x)
        return self.score(z), [self.aux(z)]


@pytest.mark.parametrize("size", [(1, 1), (7, 64), (65, 97), (128, 30)])
@pytest.mark.parametrize("stride", [1, 2, 8, 32])
def test_padding_moves_nothing(size, stride):
    x = torch.rand(2, 3, *size)
    y = pad_to_stride(x, stride)
    assert all(n % stride == 0 and 0 <= n - m < stride for n, m in zip(y.shape[-2:], size))
    assert torch.equal(y[..., :size[0], :size[1]], x)
    assert set(y.unique().tolist()) <= set(x.unique().tolist())


def test_padding_mirrors_without_the_edge():
    x = torch.arange(10.).view(1, 1, 1, 10).expand(1, 1, 16, 10)
    assert pad_to_stride(x, 8)[0, 0, 0].tolist() == [*range(10), 8, 7, 6, 5, 4, 3]


def test_fit_to_is_bilinear_with_centres_aligned():
    z = torch.randn(2, 3, 9, 12)
    want = F.interpolate(z, scale_factor=8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fit_to(z, (72, 96), (67, 93)), want[..., :67, :93])


def test_contract_with_auxiliary_head():
    check_segmenter(lambda: Coarse(5))
    x = torch.rand(2, 3, 67, 93)
    logits, (aux,) = Coarse(5).forward_aux(x)
    assert logits.shape == aux.shape == (2, 5, 67, 93)


def test_no_aux_by_default():
    class Plain(Segmenter):
        def compute(self, x): return x
    logits, extra = Plain(3).forward_aux(torch.rand(1, 3, 64, 64))
    assert extra == [] and logits.shape == (1, 3, 64, 64)
    with pytest.raises(NotImplementedError, match="compute"): Segmenter(3)(torch.rand(1, 3, 64, 64))


def test_normalises_inside():
    net = Coarse(5, mean=IMAGENET_MEAN, std=IMAGENET_STD).eval()
    x = torch.rand(1, 3, 64, 64)
    y = (x - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(net(x), fit_to(net.compute(y), (64, 64), (64, 64)))
    assert Coarse(5, in_channels=2, mean=IMAGENET_MEAN).mean.shape == (1, 2, 1, 1)
    assert not [k for k in net.state_dict() if k in ("mean", "std")]


def test_parameters_split():
    net = Coarse(4)
    parts = [{id(p) for p in ps} for ps in (net.encoder_parameters(), net.decoder_parameters())]
    assert parts[0] == {id(p) for p in net.encoder.parameters()}
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("bad, says", [
    (torch.rand(3, 64, 64), r"x\[None\]"), (torch.rand(64, 64), "batch"), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "divide by 255"),
    (torch.rand(1, 64, 80, 3), "permute"), (torch.rand(1, 1, 64, 64), "in_channels=1"), (torch.rand(1, 4, 64, 64), "3 channels; found 4"),
    (torch.rand(1, 3, 63, 64), "63x64"), (torch.rand(1, 3, 0, 0), "0x0")])
def test_refuses(bad, says):
    with pytest.raises(ValueError, match=says): Coarse(5)(bad)


@pytest.mark.parametrize("count", [0, -1, 2.5, "5", True, None])
def test_refuses_class_counts(count):
    with pytest.raises(ValueError, match="num_classes"): Coarse(count)
    with pytest.raises(ValueError, match="in_channels"): Coarse(5, in_channels=count)


def test_load_encoder_is_all_or_nothing():
    net = Coarse(5)
    before = net.encoder.weight.clone()
    for state, says in [({}, "missing"), ({"features.weight": torch.zeros(1), "features.bias": torch.zeros(6)}, "shape")]:
        with pytest.raises(ValueError, match=says): net.load_encoder(state, "file.pth")
        assert torch.equal(net.encoder.weight, before)
    net.load_encoder({"features.weight": before * 2, "bias": torch.zeros(6), "classifier.weight": torch.zeros(9)})
    assert torch.equal(net.encoder.weight, before * 2)


def test_bfloat16_and_channels_last_run():
    net = Coarse(5).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 70, 65).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16): assert net(x).shape == (2, 5, 70, 65)
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
