"U-Net with a borrowed way down: the same logits as segmentation_models_pytorch, and what may not change without an encoder"
import pytest
import torch
from torch import nn

from synseg.backbone import create_encoder, encoder_names
from synseg.check import check_segmenter, count_parameters
from synseg.pretrained import BridgeStep, EncoderUNet, decoder_channels, parameter_groups, unet
from synseg.unet import UNet, unet as paper_unet
from synseg.zoo import create_model, load_model, model_info, save_model

NARROW = dict(encoder_width=8, width=4)


def narrow(encoder="mobilenet_v2", classes=5, in_channels=3, **options):
    return unet(classes, in_channels, encoder=encoder, **{**NARROW, **options})


def randomise(net):
    "Every number different from its start, so that nothing agrees by accident; statistics of norms positive"
    for name, v in net.state_dict().items():
        if v.is_floating_point(): v.copy_(torch.rand_like(v) * 0.5 + 0.5 if "running_var" in name else v + 0.02 * torch.randn_like(v))
    return net.eval().requires_grad_(False)


def carried(theirs, ours):
    "Their decoder's tensors under our names. Their bridge comes behind the map, ours before it"
    found = {}
    for i, block in enumerate(theirs.decoder.blocks):
        step = ours.decoder[i].conv
        for mine, part in ((0, block.conv1), (3, block.conv2)):
            for k, v in part[0].state_dict().items(): found[f"decoder.{i}.conv.{mine}.{k}"] = v
            for k, v in part[1].state_dict().items(): found[f"decoder.{i}.conv.{mine + 1}.{k}"] = v
        weight = found[f"decoder.{i}.conv.0.weight"]
        behind = (ours.encoder.channels[-1], *decoder_channels())[i]
        found[f"decoder.{i}.conv.0.weight"] = torch.cat([weight[:, behind:], weight[:, :behind]], 1)
        assert step[0].weight.shape == weight.shape
    return found | {f"score.{k}": v for k, v in theirs.segmentation_head[0].state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_same_logits_as_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = randomise(smp.Unet(name, encoder_weights=None, classes=5)).double()
    ours = create_model("unet", 5, encoder=name).double().eval()
    assert count_parameters(ours) == count_parameters(theirs)
    ours.load_encoder(theirs.encoder.state_dict())
    missing, unexpected = ours.load_state_dict(carried(theirs, ours), strict=False)
    assert not unexpected and all(k.startswith("encoder.") for k in missing)
    for size in ((64, 96), (128, 160)):
        x = torch.rand(2, 3, *size, dtype=torch.float64)
        with torch.no_grad(): want, got = theirs((x - ours.mean) / ours.std), ours(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_without_encoder_it_is_the_papers():
    for options in ({}, dict(width=4, norm=True, up="nearest", join="pad", skips=False, dropout=0.2), dict(width=4, depth=3)):
        torch.manual_seed(3); ours = create_model("unet", 3, 1, **{"width": 4, **options})
        torch.manual_seed(3); paper = paper_unet(3, 1, **{"width": 4, **options})
        assert type(ours) is UNet and list(ours.state_dict()) == list(paper.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), paper.state_dict().values()))
        x = torch.rand(2, 1, 70, 81)
        torch.manual_seed(4); a = ours.train()(x)
        torch.manual_seed(4); b = paper.train()(x)
        assert torch.equal(a, b)
    with torch.device("meta"): assert count_parameters(unet(2, 1)) == model_info("unet").parameters == 31_030_658


@pytest.mark.parametrize("name", encoder_names())
def test_every_encoder(name):
    net = narrow(name).eval()
    for size in ((64, 64), (65, 97)):
        assert net(torch.rand(1, 3, *size)).shape == (1, 5, *size)
    parts = list(net.encoder_parameters()), list(net.decoder_parameters())
    assert len(parts[0]) == len(list(net.encoder.parameters())) and sum(map(len, parts)) == len(list(net.parameters()))
    assert net.imagenet == net.encoder.imagenet


@pytest.mark.parametrize("options", [{}, dict(decoder_width=(12, 8, 6)), dict(skips=False), dict(stem_skip=False, up="bilinear"),
                                     dict(up="transposed", dropout=0.1, padding_mode="reflect"), dict(encoder="vgg11_bn", encoder_width=4)])
def test_contract(options): check_segmenter(lambda: narrow(**options), sizes=((64, 64), (67, 93)))


def test_contract_with_other_channels(): check_segmenter(lambda: narrow("resnet18", in_channels=4), in_channels=4, sizes=((64, 64), (65, 90)))


@pytest.mark.parametrize("name, options, bridges", [
    ("resnet18", {}, [16, 8, 4, 2, None]), ("vgg11", {}, [16, 8, 4, 2, 1]), ("resnet18", dict(skips=False), [None] * 5),
    ("mobilenet_v2", dict(stem_skip=False), [16, 8, 4, None, None]), ("vgg11", dict(decoder_width=(8, 4)), [16, 8])])
def test_bridges(name, options, bridges): assert narrow(name, **options).bridges == bridges


def test_a_cut_bridge_is_not_read():
    net = narrow(skips=False).eval()
    maps = [m.detach().requires_grad_() for m in net.encoder(torch.rand(1, 3, 64, 64))]
    net.encoder.forward = lambda x: maps
    used = torch.autograd.grad(net(torch.rand(1, 3, 64, 64)).sum(), maps, allow_unused=True)
    assert [g is not None for g in used] == [False] * 4 + [True]


def test_an_encoder_of_ones_own():
    class Ladder(nn.Module):
        channels, strides = (4, 6), (2, 8)
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 5, 4, 2)
        def forward(self, x):
            a = self.a(x)
            return [a, self.b(a)]
    net = EncoderUNet(2, 3, Ladder(), decoder_width=(8, 8, 4))
    assert net.bridges == [None, 2, None] and net.imagenet is None and net(torch.rand(2, 3, 65, 77)).shape == (2, 2, 65, 77)


def test_weights_from_a_file(tmp_path):
    from torchvision.models import mobilenet_v2
    torch.save(mobilenet_v2().state_dict(), tmp_path / "m.pth")
    net = create_model("unet", 4, encoder="mobilenet_v2", encoder_weights=tmp_path / "m.pth", width=4)
    other = create_model("unet", 4, encoder="mobilenet_v2", width=4)
    assert torch.equal(net.encoder.state_dict()["0.0.weight"], torch.load(tmp_path / "m.pth")["features.0.0.weight"])
    other.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="3 channels, and this network was built for 1"):
        create_model("unet", 4, 1, encoder="mobilenet_v2", encoder_weights=tmp_path / "m.pth")
    for encoder, says in (("resnet18", "does not fit"), (None, "encoder_weights=None")):
        with pytest.raises(ValueError, match=says): create_model("unet", 4, encoder=encoder, encoder_weights=tmp_path / "m.pth")
    with pytest.raises(ValueError, match="does not fit"):
        create_model("unet", 4, encoder="mobilenet_v2", encoder_width=8, encoder_weights=tmp_path / "m.pth")


def test_real_weights_give_the_published_features(data_root):
    "The trunk inside our network, normalised by it, then torchvision's classifier: the photographs keep their classes"
    import json
    from PIL import Image
    from torchvision.models import mobilenet_v2
    from torchvision.transforms.v2 import functional as tvf
    folder = data_root("weights")
    net = create_model("unet", 2, encoder="mobilenet_v2", encoder_weights=folder / "mobilenet_v2_imagenet.pth").eval()
    whole = mobilenet_v2()
    whole.load_state_dict(torch.load(folder / "mobilenet_v2_imagenet.pth", weights_only=True))
    whole.eval()
    for photo in sorted((folder / "photos").glob("*.png")):
        x = tvf.to_dtype(tvf.pil_to_tensor(Image.open(photo).convert("RGB")), torch.float32, scale=True)
        x = tvf.center_crop(tvf.resize(x, [256], antialias=True), [224, 224])[None]
        with torch.no_grad():
            z = whole.classifier(net.encoder(net.prepare(x))[-1].mean((2, 3)))[0]
            torch.testing.assert_close(z, whole((x - net.mean) / net.std)[0], rtol=1e-4, atol=1e-4)
        text = json.dumps(json.loads((folder / "expected.json").read_text()))
        assert photo.stem in text and z.argmax() in ((281, 282, 285) if photo.stem == "chelsea" else (967, 504, 505, 969))


def test_card_round_trip(tmp_path):
    model = create_model("unet", 4, encoder="resnet18", encoder_width=8, decoder_width=(12, 8, 6), up="bilinear").eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(again(x), model(x))
    assert again.card == model.card and again.card.options["encoder"] == "resnet18"
    third = create_model("unet", 4, weights=tmp_path / "m.safetensors", encoder="resnet18", encoder_width=8, decoder_width=(12, 8, 6), up="bilinear")
    with torch.no_grad(): assert torch.equal(third.eval()(x), model(x))
    with pytest.raises(ValueError, match="options"): create_model("unet", 4, weights=tmp_path / "m.safetensors")


@pytest.mark.parametrize("options, says", [
    (dict(encoder="resnet19"), "resnet18"), (dict(decoder_width=(8, 4)), "with an encoder"), (dict(encoder_width=8), "with an encoder"),
    (dict(stem_skip=False), "with an encoder"), (dict(encoder="resnet18", depth=3), "depth is 3"),
    (dict(encoder="resnet18", decoder_width=()), "one to 5"), (dict(encoder="resnet18", decoder_width=(8,) * 6), "one to 5"),
    (dict(encoder="resnet18", decoder_width=(8, 0)), "one to 5"), (dict(encoder="resnet18", up="deconv"), "transposed, nearest, bilinear")])
def test_refuses(options, says):
    with pytest.raises(ValueError, match=says): create_model("unet", 5, **options)


def test_freezing_holds_weights_and_statistics():
    net = narrow().freeze_encoder().train()
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    opt = torch.optim.AdamW(parameter_groups(net, 1e-2, 1e-2))
    assert sum(p.numel() for g in opt.param_groups for p in g["params"]) == sum(p.numel() for p in net.decoder_parameters())
    for _ in range(2):
        net(torch.rand(2, 3, 64, 64)).square().mean().backward(); opt.step(); opt.zero_grad()
    assert all(torch.equal(before[k], v) for k, v in net.encoder.state_dict().items())
    assert net.decoder.training and not net.encoder.training
    net.freeze_encoder(False)
    assert net.encoder.training and all(p.requires_grad for p in net.parameters())
    net.eval().freeze_encoder(False)
    assert not net.encoder.training


def test_groups_cover_each_parameter_once():
    net = narrow("resnet18")
    groups = parameter_groups(net, 1e-3, 1e-4, 0.05)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, net.parameters()))
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1e-3, 0.05), (1e-3, 0.0), (1e-4, 0.05), (1e-4, 0.0)}
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])
    assert all(g["lr"] == 1e-3 for g in parameter_groups(paper_unet(2, width=2), 1e-3, 1e-4))


def test_encoder_keeps_its_own_start():
    torch.manual_seed(5); alone = create_encoder("resnet18", width=8)
    torch.manual_seed(5); net = narrow("resnet18")
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), net.encoder.state_dict().values()))
    weight = net.decoder[0].conv[0].weight
    assert abs(weight.std() / (2 / weight[0].numel())**0.5 - 1) < 0.1


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = narrow(classes=3, encoder_width=8, width=8).train()
    x = torch.rand(2, 3, 64, 64)
    y = (x.mean(1) * 3).long().clamp(max=2)
    opt = torch.optim.AdamW(parameter_groups(net, 1e-2, 1e-2))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_one_step_at_full_size():
    net = create_model("unet", 11, encoder="mobilenet_v2").train()
    loss = nn.functional.cross_entropy(net(torch.rand(2, 3, 120, 160)), torch.randint(11, (2, 120, 160)))
    loss.backward()
    torch.optim.AdamW(parameter_groups(net, 1e-3, 1e-3)).step()
    assert loss.isfinite() and all(p.grad is not None for p in net.parameters())


def test_bridge_step_without_a_bridge():
    step = BridgeStep(6, 0, 4)
    assert step(torch.rand(1, 6, 5, 7)).shape == (1, 4, 10, 14)
    with torch.device("meta"): assert BridgeStep(6, 3, 4, "transposed")(torch.rand(1, 6, 5, 7), torch.rand(1, 3, 10, 14)).shape == (1, 4, 10, 14)
