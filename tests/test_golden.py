"""Golden numbers: what every network, field and data set answered once, so that a new version of anything cannot change it in silence

`python tests/test_golden.py --write` rewrites tests/golden.json and prints what changed. Weights and inputs come from a formula (`filled`),
not from PyTorch's generators, and networks run in double precision: the same numbers are expected of any PyTorch and any processor."""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # as a command
from test_zoo import SMALL  # noqa: E402

from synseg.conv_crf import ConvCRF  # noqa: E402
from synseg.dense_crf import DenseCRF  # noqa: E402
from synseg.discriminators import create_discriminator, list_discriminators  # noqa: E402
from synseg.grid_crf import GridCRF  # noqa: E402
from synseg.kmeans import KMeansSegmenter  # noqa: E402
from synseg.losses import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszSoftmaxLoss  # noqa: E402
from synseg.scenes import Scenes  # noqa: E402
from synseg.simgan import Refiner  # noqa: E402
from synseg.transforms import train_transforms  # noqa: E402
from synseg.zoo import create_model, list_models  # noqa: E402

FILE = Path(__file__).with_name("golden.json")
SIZE = {"unet_valid": (188, 204)}  # the one network that does not take 64x96


def uniform(key: int, shape) -> torch.Tensor:
    "Doubles in [0, 1) that depend on `key` and their place alone: a multiplicative hash of 64 bits, no library's generator"
    n = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        x = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(key * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)): x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2**53).view(shape)


@torch.no_grad()
def filled(net: torch.nn.Module) -> torch.nn.Module:
    "In double precision and eval mode, every weight and statistic from `uniform`, scaled so that signals neither die nor explode"
    net = net.double().eval()
    for key, (name, t) in enumerate(net.state_dict().items()):
        if not t.is_floating_point(): continue
        u = uniform(key, t.shape)
        if name.endswith("running_var"): t.copy_(0.5 + u)
        elif t.ndim > 1: t.copy_((2*u - 1)*(6/max(1, t[0].numel()))**0.5)
        elif name.endswith("weight"): t.copy_(0.75 + 0.5*u)  # scales of norms, slopes
        else: t.copy_(0.2*u - 0.1)
    return net


def facts(out: torch.Tensor) -> dict:
    "Shape, mean, standard deviation and eight values, of a tensor of any kind"
    flat = out.detach().double().flatten()
    return dict(shape=list(out.shape), mean=float(flat.mean()), std=float(flat.std(correction=0)), values=flat[torch.linspace(0, len(flat) - 1, 8).long()].tolist())


def of_model(name: str) -> dict:
    with torch.no_grad(): return facts(filled(create_model(name, 3, **SMALL.get(name, {})))(uniform(0, (1, 3, *SIZE.get(name, (64, 96))))))


def of_critic(name: str) -> dict:
    critic, images, maps = filled(create_discriminator(name, 3, width=4)), uniform(0, (1, 3, 64, 96)), uniform(1, (1, 3, 64, 96)).softmax(1)
    with torch.no_grad():
        try: return facts(critic(images, maps))
        except TypeError: return facts(critic(images))


def smooth(key: int, shape) -> torch.Tensor:
    "Larger patches of colour: what CRFs and clusters are for"
    return torch.nn.functional.interpolate(uniform(key, shape), scale_factor=4, mode="bilinear", align_corners=False)


def of_field(make, dtype=torch.float64) -> dict:
    with torch.no_grad(): return facts(make()(3*smooth(3, (1, 4, 8, 12)).to(dtype), smooth(4, (1, 3, 8, 12)).to(dtype)))


def of_loss(make) -> dict:
    logits, labels = (6*uniform(5, (2, 5, 16, 24))).requires_grad_(), (uniform(6, (2, 16, 24))*5).long()
    labels[:, :3] = 255
    value = make()(logits, labels)
    value.backward()
    return facts(logits.grad) | dict(loss=float(value.detach()))


def of_clusters() -> dict:
    segmenter = KMeansSegmenter(4)
    labels = segmenter(smooth(7, (1, 3, 12, 16))[0].float())
    return dict(inertia=segmenter.inertia_, sizes=sorted(labels.flatten().bincount().tolist()))


def of_scenes(domain: str) -> dict:
    "Labels to the bit; of the image, whose last bits are the processor's, its mean and spread"
    image, label = Scenes(2, (96, 128), domain=domain, seed=3).raw(1)
    return dict(label=hashlib.sha256(np.ascontiguousarray(label).tobytes()).hexdigest()[:16], mean=float(image.mean()), std=float(image.std()))


def of_transforms() -> dict:
    image, label = (255*smooth(8, (1, 3, 24, 32))[0]).byte(), (uniform(9, (96, 128))*11).long()
    torch.manual_seed(0)
    image, label = train_transforms((64, 80), rotation=10, elastic=4.0)(image, label)
    return dict(image=facts(image), label=label.flatten().bincount(minlength=256)[[*range(11), 255]].tolist())


CASES = {**{f"model {n}": lambda n=n: of_model(n) for n in list_models()}, **{f"critic {n}": lambda n=n: of_critic(n) for n in list_discriminators()},
         "refiner": lambda: facts(filled(Refiner(3, 8, 2))(uniform(0, (1, 3, 20, 24)))),
         "DenseCRF": lambda: of_field(lambda: DenseCRF(4, iterations=3, compiled=False)), "DenseCRF float32": lambda: of_field(lambda: DenseCRF(4, iterations=3, compiled=False), torch.float32), "DenseCRF exact": lambda: of_field(lambda: DenseCRF(4, iterations=3, exact=True)),
         "ConvCRF": lambda: of_field(lambda: ConvCRF(4, iterations=3)), "GridCRF": lambda: of_field(lambda: GridCRF(4)),
         **{loss.__name__: lambda loss=loss: of_loss(loss) for loss in (CrossEntropyLoss, FocalLoss, DiceLoss, LovaszSoftmaxLoss)},
         "KMeansSegmenter": of_clusters, "Scenes synthetic": lambda: of_scenes("synthetic"), "Scenes camera": lambda: of_scenes("camera"),
         "train_transforms": of_transforms}
LOOSE = {"DenseCRF float32": 1e-3, "KMeansSegmenter": 1e-4, "Scenes camera": 2e-3, "Scenes synthetic": 2e-3, "train_transforms": 2e-3}  # what is done in float32 or bytes


def differences(name: str, want, found, path: str = "", spread: float = 0.0) -> list[str]:
    "Where `found` is not what was stored: numbers to 1e-6 of the spread or of themselves, or as LOOSE says"
    if isinstance(want, dict) and isinstance(found, dict):
        return [d for k in sorted({*want, *found}) for d in differences(name, want.get(k), found.get(k), f"{path}.{k}", want.get("std", 0.0))]
    if isinstance(want, list) and isinstance(found, list) and len(want) == len(found) and not path.endswith((".shape", ".sizes", ".label")):
        return [d for i, (a, b) in enumerate(zip(want, found)) for d in differences(name, a, b, f"{path}[{i}]", spread)]
    near = isinstance(want, float) and isinstance(found, (int, float)) and abs(want - found) <= LOOSE.get(name, 1e-6)*max(spread, abs(want))
    if path.endswith((".sizes", ".label")) and isinstance(want, list): near = np.abs(np.subtract(want, found)).sum() <= 0.01*sum(want)
    return [] if near or want == found else [f"{name}{path}: {want} is now {found}"]


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    assert name in stored, "a new name: python tests/test_golden.py --write"
    assert not (found := differences(name, stored[name], CASES[name]())), "\n".join(found)


def test_nothing_is_stored_that_is_not_checked():
    assert set(json.loads(FILE.read_text(encoding="utf-8"))) == set(CASES)


def test_a_changed_weight_is_noticed():
    net, x = filled(create_model("unet_small", 3, width=4)), uniform(0, (1, 3, 64, 96))
    with torch.no_grad():
        before = facts(net(x))
        next(net.parameters())[0, 0, 0, 0] += 1e-3
        assert differences("unet", before, facts(net(x)))


def write() -> None:
    "Rewrite the file; print what changed"
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    new = {name: make() for name, make in CASES.items()}
    for name in sorted({*old, *new}):
        if name not in new: print("gone:", name)
        elif name not in old: print("new:", name)
        else: print(*differences(name, old[name], new[name]), sep="\n", end="\n" if differences(name, old[name], new[name]) else "")
    rounded = lambda v: float(f"{v:.9g}") if isinstance(v, float) else {k: rounded(x) for k, x in v.items()} if isinstance(v, dict) else [rounded(x) for x in v] if isinstance(v, list) else v
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(rounded(v))}" for k, v in new.items()) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv: write()
    else: sys.exit(pytest.main([__file__]))
