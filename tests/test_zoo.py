"Names, checkpoints, and every way in which they can fail to fit"
import errno
import resource
import signal
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from synseg.core import load_result
from synseg.labels import label_space
from synseg.runs import VALID_SEED, Run, scenes
from synseg.scoring import evaluate
from synseg.zoo import (ModelCard, create_model, list_models, load_model, model_info, model_options, read_card, save_model, shipped_weights)

SMALL = {"unet": dict(width=4), "unet_small": dict(width=4), "unet_valid": dict(width=2),
         "segnet": dict(width=4), "segnet_basic": dict(width=4), "deconvnet": dict(width=2),
         "fcn32s": dict(width=4), "fcn16s": dict(width=4), "fcn8s": dict(width=4), "fcn_resnet50": dict(width=8),
         "fcn_resnet101": dict(width=8),
         "dilated_vgg": dict(width=2),
         "deeplabv1": dict(width=4), "deeplabv2": dict(width=4), "deeplabv3": dict(width=4), "deeplabv3plus": dict(width=4),
         "deeplabv3plus_xception": dict(width=2),
         "pspnet": dict(width=4), "seggan": dict(width=4),
         **{f"hrnet_{n}": dict(width=4, modules=[1, 1, 1], blocks=1, first=[1, 4], stem=8)
            for n in ("w18", "w32", "w48", "w18_small_v1", "w18_small_v2")},
         "spinenet49": dict(width=4),
         "mssa": dict(width=2),
         "enet": dict(width=4), "erfnet": dict(width=4),
         "bisenet": dict(width=8), "dfanet": dict(width=2),
         "icnet": dict(width=4),
         "frrn_a": dict(width=4), "frrn_b": dict(width=4),
         **{f"contextnet_{v}": dict(width=0.125) for v in ("cn14", "cn12", "cn18", "cn124", "cn14_500", "cn14_160")}}


@pytest.fixture
def saved(tmp_path):
    model = create_model("unet_small", 11, width=4).eval()
    return model, save_model(model, tmp_path / "runs" / "model.safetensors", label_space("scenes"), (96, 128), {"epoch": 3})


@pytest.mark.parametrize("name", list_models())
def test_round_trip(name, tmp_path):
    model = create_model(name, 3, **SMALL.get(name, {})).train()
    x = torch.rand(2, 3, 188, 204)
    with torch.no_grad(): model(x)  # moves the running statistics, which must be saved too
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert not again.training and again.card == model.card
    with torch.no_grad(): assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("name", list_models())
def test_info_and_options(name):
    info = model_info(name)
    assert info.name == name and info.year > 2000 and info.parameters > 0 and info.deviations
    options = model_options(name)
    assert not {"num_classes", "in_channels", "self", "encoder"} & set(options)
    if options:
        model = create_model(name, 2, **{**options, **SMALL.get(name, {})})
        assert model.num_classes == 2


def test_card(saved):
    model, path = saved
    card = load_model(path).card
    assert card == read_card(path)
    assert (card.name, card.num_classes, card.options) == ("unet_small", 11, {"width": 4})
    assert card.label_space == label_space("scenes") and card.input_size == (96, 128) and card.extra == {"epoch": 3}
    again = save_model(load_model(path), path.with_name("again.safetensors"))
    assert read_card(again) == card and again.read_bytes() == path.read_bytes()


def test_two_bytes_for_each_weight(saved, tmp_path):
    model, path = saved
    half = save_model(model, tmp_path / "half.safetensors", half=True)
    assert half.stat().st_size < 0.7 * path.stat().st_size
    again = load_model(half)
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values()):
        assert a.dtype == b.dtype, name
        assert_close(a, b, rtol=1e-3, atol=1e-7)
    model.state_dict()["score.bias"].fill_(1e6)
    before = half.read_bytes()
    with pytest.raises(ValueError, match="float16 cannot hold"): save_model(model, half, half=True)
    assert half.read_bytes() == before


@pytest.mark.parametrize("name", shipped_weights())
def test_what_ships_is_small_and_as_good_as_recorded(name):
    files = shipped_weights()
    assert len(files) >= 2 and sum(p.stat().st_size for p in files.values()) <= 8e6
    assert {v.dtype for v in load_file(files[name]).values()} <= {torch.float16, torch.int64}
    model, record = create_model(name, 11, weights="scenes").eval(), load_result(f"scenes_{name}")["metrics"]
    assert model.card.label_space == label_space("scenes")
    for domain in ("camera", "synthetic"):
        found = evaluate(model, scenes(Run(domain=domain, size=model.card.input_size), 200, VALID_SEED), model.card.input_size)
        assert abs(found["mean_iou"] - record[domain]["mean_iou"]) < 0.002, domain


@pytest.mark.parametrize("arguments, options, says", [
    (("unet_smal", 5), {}, "did you mean 'unet_small'"), (("resnet", 5), {}, "Known: unet"), (("", 5), {}, "Known"), ((None, 5), {}, "Known"),
    (("unet", 0), {}, "at least 1"), (("unet", -3), {}, "at least 1"), (("unet", 2.0), {}, "whole number"), (("unet", "21"), {}, "whole number"),
    (("unet", 5, 0), {}, "in_channels"), (("unet", 5), dict(widht=8), "width=64"), (("ternausnet", 5), dict(width=8), "none"),
    (("unet_small", 5), dict(encoder="resnet18"), "no choice of encoder"), (("ternausnet", 5), dict(encoder="vgg16"), "vgg11"),
    (("unet", 5), dict(encoder_weights="imagenet"), "encoder_weights=None"), (("unet_small", 5), dict(weights="camvid"), "'scenes'"),
    (("hrnet_w18", 5), dict(encoder_weights="imagenet"), "torchvision has no ImageNet weights.*path of a file"),
    (("unet", 5), dict(up="deconv"), "transposed, nearest, bilinear")])
def test_refuses_to_build(arguments, options, says):
    with pytest.raises(ValueError, match=says): create_model(*arguments, **options)


def test_weights_of_the_whole_network(saved):
    model, path = saved
    again = create_model("unet_small", 11, weights=path, width=4, skips=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    for arguments, options, says in [(("unet", 11), {}, "holds unet_small, not unet"), (("unet_small", 5), dict(width=4), "11 classes \\(Sky"),
                                     (("unet_small", 11), {}, "options"), (("unet_small", 11, 1), dict(width=4), "in_channels")]:
        with pytest.raises(ValueError, match=says): create_model(*arguments, weights=path, **options)


def test_missing_files(tmp_path):
    for call in (lambda p: load_model(p), lambda p: create_model("unet_small", 5, weights=p), lambda p: create_model("ternausnet", 5, encoder_weights=p)):
        with pytest.raises(FileNotFoundError, match="nowhere"): call(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError): load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="ship"): create_model("ternausnet", 11, weights="scenes")


def test_truncated_anywhere(saved, tmp_path):
    _, path = saved
    content, cut = path.read_bytes(), tmp_path / "cut.safetensors"
    for n in [0, 1, 7, 8, 9, 100, 1000, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:n])
        for call in (lambda: load_model(cut), lambda: create_model("unet_small", 11, weights=cut, width=4)):
            with pytest.raises(ValueError, match="cut short or damaged"): call()


def test_header_damaged(saved, tmp_path):
    _, path = saved
    content, bad = path.read_bytes(), tmp_path / "bad.safetensors"
    for old, new in [(b'\\"name\\"', b'\\"nome\\"'), (b"unet_small", b"unet_smoll"), (b'\\"width\\": 4', b'\\"width\\": 5'),
                     (b'\\"num_classes\\": 11', b'\\"num_classes\\": 12'), (b'\\"width\\"', b'\\"wodth\\"')]:
        assert old in content and len(old) == len(new)
        bad.write_bytes(content.replace(old, new, 1))
        with pytest.raises(ValueError, match="bad.safetensors"): load_model(bad)


def test_foreign_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by save_model"): load_model(path)
    for zipped in (True, False):
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="pickle"): load_model(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="damaged"): load_model(path)


class Bomb:
    def __reduce__(self): return exec, ("raise SystemExit('code ran')",)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save(Bomb(), path)
    with pytest.raises(ValueError, match="runs code"): create_model("ternausnet", 2, encoder_weights=path)
    path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(ValueError): load_model(path.with_suffix(".safetensors"))


def test_encoder_weights(tmp_path):
    from torchvision.models import vgg11
    state = vgg11().features.state_dict()  # the classifier is large and not needed
    state = {f"features.{k}": v for k, v in state.items()}
    for path, write in [(tmp_path / "v.pth", torch.save), (tmp_path / "v.safetensors", save_file)]:
        write(state, path)
        model = create_model("ternausnet", 2, encoder="vgg11", encoder_weights=str(path))
        assert torch.equal(model.encoder[18].weight, state["features.18.weight"])
    with pytest.raises(ValueError, match="shape"): create_model("ternausnet", 2, in_channels=1, encoder_weights=path)
    (tmp_path / "half.pth").write_bytes((tmp_path / "v.pth").read_bytes()[:9999])
    with pytest.raises(ValueError, match="cut short"): create_model("ternausnet", 2, encoder_weights=tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list"): create_model("ternausnet", 2, encoder_weights=tmp_path / "list.pth")


def test_offline(monkeypatch):
    from torchvision.models import WeightsEnum
    def offline(*args, **kwargs): raise URLError("no route to host")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(FileNotFoundError, match=r"vgg11-8a719046\.pth.*no route.*put it at .*checkpoints") as error:
        create_model("ternausnet", 2, encoder_weights="imagenet")
    assert "encoder_weights=" in str(error.value)


def test_real_weights_of_another_network(data_root):
    path = data_root("weights") / "mobilenet_v2_imagenet.pth"
    with pytest.raises(ValueError, match="does not fit the encoder of TernausNet"): create_model("ternausnet", 2, encoder_weights=path)


def test_disk_full_keeps_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(self, content):
        with open(self, "wb") as file: file.write(content[:5000])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left.*untouched") as error: save_model(model, path)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="nothing was left behind"): save_model(model, path.with_name("new.safetensors"))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_file_size_limit_of_the_system(saved):
    "No simulation: the kernel refuses to write more than 50 kB"
    model, path = saved
    before, limits, handler = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="untouched"): save_model(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="card"): save_model(torch.nn.Conv2d(1, 1, 1), tmp_path / "m.safetensors")
    model = create_model("unet_small", 2, width=4)
    with pytest.raises(ValueError, match=".safetensors"): save_model(model, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="JSON"): save_model(model, tmp_path / "m.safetensors", extra={"x": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_card_from_json_is_strict():
    for text in ("{}", "[]", "null", '{"name": "unet"}'):
        with pytest.raises((KeyError, TypeError, ValueError)): ModelCard.from_json(text)


@pytest.mark.parametrize("name", list_models())
def test_only_the_valid_unet_is_marked_as_valid(name):
    "`valid` and `margin` tell the engine to crop labels and `predict` to tile: no other network may use these names for itself"
    with torch.device("meta"): model = create_model(name, 3, **SMALL.get(name, {}))
    assert bool(getattr(model, "valid", False)) == bool(getattr(model, "margin", 0)) == (name == "unet_valid")


WHOLE = {"dilated_vgg": dict(padding="zeros")}  # the mirrored margin would make 436x436 of the picture
STEPPED = ("unet", "unet_small", "unet_valid", "ternausnet", "segnet", "segnet_basic", "deconvnet", "gridnet",
           *(f"fc_densenet{n}" for n in (56, 67, 103)))  # in the tests and chapters of their own


@pytest.mark.parametrize("name", [n for n in list_models() if n not in STEPPED and not n.startswith("fcn")])
def test_the_papers_size_takes_a_step(name):
    "At the paper's width, encoder and classes: every gradient is finite, and a step of SGD moves the answer"
    torch.manual_seed(0)
    info = model_info(name)
    model = create_model(name, info.classes, **WHOLE.get(name, {})).train()
    for m in model.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)): m.p = 0.0
    x, y = torch.rand(2, 3, 64, 64), torch.randint(info.classes, (2, 64, 64))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and len(gradients) > 0.9 * len(list(model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None: p -= 1e-3 * p.grad
        again = torch.nn.functional.cross_entropy(model(x), y)
    assert again.isfinite() and again != loss  # lower it need not be: some norms see two values, and small steps are not small to them


def test_an_option_of_the_wrong_kind_is_named():
    with pytest.raises(ValueError, match="unet_small cannot be built with width='many'"): create_model("unet_small", 3, width="many")


def test_weights_of_a_run_by_its_folder(tmp_path):
    model = create_model("unet_small", 3, width=4)
    save_model(model, tmp_path / "model.safetensors")
    assert_close(create_model("unet_small", 3, width=4, weights=tmp_path).state_dict(), model.state_dict())


def test_what_is_no_weights_does_not_advise_to_unpickle(tmp_path):
    (tmp_path / "photo.pth").write_bytes(b"\xff\xd8" + bytes(99))
    with pytest.raises(ValueError, match="cannot be read as weights") as error: create_model("unet", 3, encoder="mobilenet_v2", encoder_weights=tmp_path / "photo.pth")
    assert "weights_only" not in str(error.value)
