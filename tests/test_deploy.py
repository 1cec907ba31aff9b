"Files that run without this library: the same labels, any size, a card, eight bits, and plain sentences"
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import synseg
from synseg import deploy
from synseg.deploy import cell_means, export, load_exported, mirrored, quantise
from synseg.inference import predict
from synseg.labels import label_space
from synseg.scenes import Scenes
from synseg.unet import overlap_tile
from synseg.zoo import create_model

SIZES = [(96, 128), (64, 64), (101, 157), (131, 73)]
onnx = pytest.importorskip("onnx")
for needed in ("onnxscript", "onnxruntime"): pytest.importorskip(needed)

NARROW = {"unet_small": dict(width=4), "contextnet_cn14": dict(width=0.25), "segnet_basic": dict(width=4), "mssa": dict(width=2),
          "deeplabv3plus": dict(width=4), "pspnet": dict(width=4),
          "hrnet_w18": dict(width=4, modules=[1, 1, 1], blocks=1, first=[1, 4], stem=8)}


def stirred(name, classes=5, **options):
    "A network in eval mode whose norms are not the identity"
    torch.manual_seed(0)
    net = create_model(name, classes, **options).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net


def same(net, made, size, n=1):
    x = torch.rand(n, net.in_channels, *size)
    with torch.no_grad(): want = net(x)
    found = made(x)
    assert found.shape == want.shape and float((found - want).abs().max()) <= 1e-4 * float(want.abs().max().clamp_min(1))
    assert float((found.argmax(1) != want.argmax(1)).double().mean()) < 1e-4


@pytest.mark.parametrize("name", NARROW)
def test_onnx_gives_the_same_labels_at_any_size(name, tmp_path):
    net = stirred(name, **NARROW[name])
    made = load_exported(export(net, tmp_path / "net.onnx", check=False))
    for size in SIZES: same(net, made, size)
    same(net, made, (70, 90), n=3)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("name", ["unet_small", "segnet_basic", "pspnet"])
def test_torch_gives_the_same_labels_at_any_size(name, tmp_path):
    net = stirred(name, **NARROW[name])
    made = load_exported(export(net, tmp_path / "net.pt2", format="torch", check=False))
    for size in SIZES: same(net, made, size)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    net = create_model("unet_small", 11, weights="scenes").eval()
    return net, synseg.export(net, tmp_path_factory.mktemp("export") / "net.onnx")


def test_scenes_and_photographs(trained):
    net, path = trained
    made = load_exported(path)
    for image, _ in Scenes(3, (96, 128), seed=7):
        assert float((made.labels(image) != predict(net, image)).double().mean()) < 1e-4
    photo = np.random.default_rng(0).integers(0, 255, (150, 90, 3), dtype=np.uint8)
    assert float((predict(made, photo, tile=64) != predict(net, photo)).double().mean()) < 1e-3
    array = made(np.random.rand(1, 3, 64, 64).astype(np.float32))
    assert isinstance(array, np.ndarray) and array.shape == (1, 11, 64, 64)


def test_card_and_graph(trained):
    net, path = trained
    made = load_exported(path)
    assert (made.card.name, made.card.label_space, made.card.input_size) == ("unet_small", label_space("scenes"), net.card.input_size)
    facts = made.card.extra["export"]
    assert facts["normalisation"] == "inside" and facts["mean"] == [0.5] * 3 and facts["size"] is None
    graph = onnx.load(path).graph
    assert not [n for n in graph.node if n.op_type == "BatchNormalization"]
    dims = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    onnx.checker.check_model(str(path))


def test_model_is_left_as_it_is(tmp_path):
    net = create_model("unet_small", 3, width=2).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    export(net, tmp_path / "a.pt2", "torch", check=False)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and next(net.parameters()).requires_grad


def test_fixed_size_where_it_must_be(tmp_path):
    net = stirred("fcn8s", width=4)
    with pytest.raises(ValueError, match="dynamic=False.*96x128"): export(net, tmp_path / "fcn.onnx")
    assert not list(tmp_path.iterdir())
    made = load_exported(export(net, tmp_path / "fcn.onnx", size=(97, 130), dynamic=False))
    same(net, made, (97, 130))
    with pytest.raises(ValueError, match="takes one of 97x130"): made(torch.rand(1, 3, 96, 130))
    assert made.labels(torch.rand(3, 64, 80)).shape == (64, 80)


def test_valid_network_in_tiles(tmp_path):
    net = stirred("unet_valid", width=2)
    made = load_exported(export(net, tmp_path / "valid.pt2", "torch", dynamic=False, check=False))
    x = torch.rand(1, 3, 100, 120)
    torch.testing.assert_close(overlap_tile(made, x), overlap_tile(net, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n, bins", [(7, 3), (6, 6), (5, 1), (4, 6), (13, 2)])
def test_cells_and_mirrors(n, bins):
    x = torch.rand(1, 1, n, 1)
    torch.testing.assert_close(cell_means(n, bins, x) @ x, F.adaptive_avg_pool2d(x, (bins, 1)))
    torch.testing.assert_close(mirrored(x, 2, 2 * n - 1), F.pad(x, (0, 0, 0, n - 1), mode="reflect"))
    assert torch.equal(mirrored(x, 2, n), x)


def test_eight_bits(trained, tmp_path):
    net, path = trained
    images = [image for image, _ in Scenes(4, (64, 96), seed=3)]
    made = load_exported(quantise(path, tmp_path / "eight.onnx", iter(images)))
    assert (tmp_path / "eight.onnx").stat().st_size < 0.4 * path.stat().st_size
    assert made.card.name == "unet_small" and made.card.extra["export"]["precision"] == "int8"
    share = np.mean([float((made.labels(i) == predict(net, i)).double().mean()) for i in images])
    assert 0.9 < share < 1  # eight bits are not thirty-two
    with pytest.raises(ValueError, match="no images"): quantise(path, tmp_path / "none.onnx", [])
    with pytest.raises(ValueError, match="must end in .onnx"): quantise(path, tmp_path / "none.int8", images)


@pytest.mark.parametrize("path, options, says", [
    ("a.onnx", dict(format="tflite"), "choose one of onnx, torch"), ("a.pt2", {}, "must end in .onnx"),
    ("a.onnx", dict(format="torch"), "must end in .pt2"), ("a.onnx", dict(size=(32, 32)), "at least 64x64")])
def test_refuses(path, options, says, tmp_path):
    with pytest.raises(ValueError, match=says): export(create_model("unet_small", 2, width=2), tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


class Moody(nn.Module):
    "Answers by the mood of its input, which a graph cannot"
    in_channels = 3
    def forward(self, x): return x if x.mean() > 0 else -x


def test_refuses_what_cannot_be_traced(tmp_path):
    for dynamic in (True, False):
        with pytest.raises(ValueError, match="Moody cannot be traced"): export(Moody(), tmp_path / "a.onnx", dynamic=dynamic)
    with pytest.raises(ValueError, match="expected a network"): export("unet_small", tmp_path / "a.onnx")


def test_missing_package(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else real(name))
    with pytest.raises(ValueError, match=r'onnx and onnxscript.*pip install "synseg\[export\]"'):
        export(create_model("unet_small", 2, width=2), tmp_path / "a.onnx", check=False)


def test_damaged_and_foreign_files(trained, tmp_path):
    _, path = trained
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "cut.pt2").write_bytes(b"no zip")
    for name in ("cut.onnx", "cut.pt2"):
        with pytest.raises(ValueError, match="cannot be read"): load_exported(tmp_path / name)
    with pytest.raises(ValueError, match="expected .onnx or .pt2"): load_exported(path.parent / "net.onnx", None) and load_exported(__file__)
    with pytest.raises(FileNotFoundError, match="nowhere"): load_exported("nowhere.onnx")
    foreign = onnx.load(path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no card"): load_exported(tmp_path / "foreign.onnx")


def test_answers_are_compared_before_the_file_appears(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy.Portable, "forward", lambda self, image: self.net(image) + 0.1)
    with pytest.raises(ValueError, match="answers differently"): export(stirred("unet_small", width=2), tmp_path / "a.pt2", "torch", (96, 128), dynamic=False)
    assert not list(tmp_path.iterdir())
