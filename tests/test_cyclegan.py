"CycleGAN's networks: counts, an independent restatement in plain torch, any size, the field of 70"
import pytest
import torch
import torch.nn.functional as F

from synseg.check import count_parameters, receptive_field
from synseg.cyclegan import CRITICS, GENERATORS, Generator, PatchGAN, normal_init_


def instance_norm(z):
    mean, var = z.mean((2, 3), keepdim=True), z.var((2, 3), correction=0, keepdim=True)
    return (z - mean)/(var + 1e-5).sqrt()


def restated_generator(p, x, blocks):
    "Layer by layer from the paper's appendix; `p`: the parameters in their order"
    p = iter(p)
    take = lambda: (next(p), next(p))
    mirror = lambda z, n: F.pad(z, (n, n, n, n), mode="reflect")
    z = instance_norm(F.conv2d(mirror(2*x - 1, 3), *take())).relu()
    for _ in range(2):
        z = instance_norm(F.conv2d(z, *take(), stride=2, padding=1)).relu()
    for _ in range(blocks):
        y = instance_norm(F.conv2d(mirror(z, 1), *take())).relu()
        z = z + instance_norm(F.conv2d(mirror(y, 1), *take()))
    for _ in range(2):
        z = instance_norm(F.conv_transpose2d(z, *take(), stride=2, padding=1, output_padding=1)).relu()
    return (torch.tanh(F.conv2d(mirror(z, 3), *take())) + 1)/2


def restated_patchgan(p, x):
    p = iter(p)
    take = lambda: (next(p), next(p))
    z = F.leaky_relu(F.conv2d(2*x - 1, *take(), stride=2, padding=1), 0.2)
    for stride in (2, 2, 1):
        z = F.leaky_relu(instance_norm(F.conv2d(z, *take(), stride=stride, padding=1)), 0.2)
    return F.conv2d(z, *take(), padding=1)


def stirred(net, std=0.3):
    for q in net.parameters():
        torch.nn.init.normal_(q, std=std)
    return net.double()


def test_counts():
    with torch.device("meta"):
        for entry in (*GENERATORS.values(), *CRITICS.values()):
            built = entry.build(entry.info.classes, entry.info.in_channels)
            assert count_parameters(built) == entry.info.parameters
        assert count_parameters(Generator(up="resize")) == 11_378_179
        assert count_parameters(Generator(blocks=6)) == 11_378_179 - 3*2*(256*256*9 + 256)


@pytest.mark.parametrize("size", [(8, 8), (24, 36), (40, 28)])
def test_generator_restated(size):
    net, x = stirred(Generator(width=6, blocks=3)), torch.rand(2, 3, *size, dtype=torch.double)
    torch.testing.assert_close(net(x), restated_generator(net.parameters(), x, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(24, 24), (37, 50), (64, 41)])
def test_patchgan_restated(size):
    net, x = stirred(PatchGAN(width=6)), torch.rand(2, 3, *size, dtype=torch.double)
    torch.testing.assert_close(net(x), restated_patchgan(net.parameters(), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("up", ["transposed", "resize"])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (30, 41), (50, 8)])
def test_any_size_comes_back(up, size):
    net = Generator(width=3, blocks=1, up=up)
    for mode in (True, False):
        y = net.train(mode)(torch.rand(1, 3, *size))
        assert y.shape == (1, 3, *size) and y.min() >= 0 and y.max() <= 1
    padded = torch.rand(1, 3, 9, 11)
    whole = F.pad(padded, (0, 1, 0, 3), mode="reflect")
    torch.testing.assert_close(net(padded), net(whole)[..., :9, :11])


def test_images_do_not_hear_of_each_other():
    x = torch.rand(3, 3, 28, 33)
    for net in (Generator(width=4, blocks=2), PatchGAN(width=4)):
        torch.testing.assert_close(net.train()(x)[1:2], net.eval()(x[1:2]))


def test_patchgan_size_and_field():
    net = PatchGAN(width=2)
    assert net(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    for m in net.model:
        if isinstance(m, torch.nn.InstanceNorm2d): m.forward = lambda z: z  # a mean over the picture sees all of it
    assert receptive_field(net, 129, samples=2) == (70, 70)


def test_initialisation():
    net = Generator(width=16, blocks=2)
    w = torch.cat([q.flatten() for n, q in net.named_parameters() if n.endswith("weight")])
    assert abs(w.std().item() - 0.02) < 1e-3 and abs(w.mean().item()) < 1e-3
    assert all(not q.any() for n, q in net.named_parameters() if n.endswith("bias"))
    assert abs(next(normal_init_(net, 0.5).parameters()).std().item() - 0.5) < 0.05


def test_names_of_the_authors_code():
    names = set(dict(Generator(width=2).named_parameters()))
    assert {"model.1.weight", "model.4.weight", "model.7.weight", "model.10.conv_block.1.weight", "model.18.conv_block.5.bias",
            "model.19.weight", "model.22.weight", "model.26.bias"} <= names
    assert {n for n, _ in PatchGAN(width=2).named_parameters()} == {f"model.{i}.{k}" for i in (0, 2, 5, 8, 11) for k in ("weight", "bias")}


@pytest.mark.parametrize("make,x", [
    (lambda: Generator(width=2), torch.rand(1, 3, 7, 20)), (lambda: Generator(width=2), torch.rand(3, 20, 20)),
    (lambda: Generator(width=2), torch.rand(1, 4, 20, 20)), (lambda: PatchGAN(width=2), torch.rand(1, 3, 23, 40)),
    (lambda: PatchGAN(width=2), torch.zeros(1, 3, 40, 40, dtype=torch.uint8))])
def test_bad_pictures(make, x):
    with pytest.raises(ValueError):
        make()(x)


@pytest.mark.parametrize("wrong", [dict(width=0), dict(blocks=-1), dict(up="bilinear"), dict(in_channels=True)])
def test_bad_options(wrong):
    with pytest.raises(ValueError):
        Generator(**wrong)


def test_patchgan_layers():
    assert PatchGAN(width=2, layers=1)(torch.rand(1, 3, 6, 6)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError):
        PatchGAN(layers=0)


@pytest.mark.parametrize("up", ["transposed", "resize"])
def test_by_heart(up):
    torch.manual_seed(0)
    net, x = Generator(width=8, blocks=1, up=up), torch.rand(1, 3, 16, 20)
    y = torch.zeros(1, 3, 16, 20)
    y[:, 0, 4:, 6:] = 0.8
    optimiser, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(60):
        loss = F.l1_loss(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]/4
