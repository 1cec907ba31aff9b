"Imports run downward only: a module may import from lower floors and from nowhere else in the package"
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "synseg"
FLOOR = dict(
    core=0,
    check=1, labels=1, runstate=1, things=1, stopwatch=1, frames=1,
    street=2, show=2, metrics=2, losses=2, transforms=2, schedules=2, files=2, kmeans=2, cuts=2, lattice=2, conv=2,
    town=3, camera=3, layouts=3, compiled=2, scoring=3, segmenter=3, grid_crf=3, filters=3, window=3, upsample=3, dilate=3,
    scenes=4, datasets=4, callbacks=4, dense_crf=4, conv_crf=4, blocks=4,
    engine=5, backbone=5, rivals=5,
    unet=6,
    fcn=7, segnet=7, tiramisu=7, gridnet=7, pretrained=7,
    dilated_vgg=7.5, deeplab=7, pspnet=6.5, hrnet=7, spinenet=7, mssa=7,
    contextnet=7, enet=7, icnet=7, bisenet=7, frrn=7,
    adversarial=6, luc=7, seggan=7.5, realism=6, simgan=5, unpaired=7, refiner=7, cyclegan=7, discriminators=8,
    zoo=8,
    train=9, inference=9, crf_fit=9, compress=9,
    stream=10, deploy=10, realtime=9.5,
    optimizers=6,
    runs=10, doctor=10, notebooks=10, console=10.2, benchmark=10.5,
    speed=10.2, scaling=10.2, shards=5, wiring=4.5, diagram=5, microscope=5, labelme=4,
    authors=11, plans=11, browse=11, parity=11, oracles=12, papers=12, pairs=11, page=11.5, translate=11.5, downstream=12, duels=12, recipes=13, experiments=14, leaderboard=14,
    cli=15,
)
NETWORKS = {"segmenter", "conv", "upsample", "dilate", "blocks", "backbone", "unet", "fcn", "segnet", "tiramisu", "gridnet",
            "pretrained", "dilated_vgg", "deeplab", "pspnet", "hrnet", "spinenet", "mssa",
            "contextnet", "enet", "icnet", "bisenet", "frrn", "luc", "seggan", "simgan", "refiner", "cyclegan", "zoo"}
CLASSICAL = {"kmeans", "cuts", "lattice", "grid_crf", "filters", "compiled", "window", "dense_crf", "conv_crf"}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))


def package_imports(name):
    "Modules of this package that a module imports, at any depth of its code"
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "synseg"):
            path = (node.module or "").removeprefix("synseg").strip(".")
            found |= {path.split(".")[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("synseg.")}
    return {f for f in found if (PACKAGE / f"{f}.py").exists()}


def third_party(name):
    "Top-level names of everything else that is imported"
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    plain = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return plain | {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level and n.module}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name):
    assert name in FLOOR, f"give {name} a floor in tests/test_floors.py"
    for other in package_imports(name):
        assert FLOOR[other] < FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"


@pytest.mark.parametrize("name", MODULES)
def test_no_star_imports_and_no_notebook_tools(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    stars = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]
    assert not stars, f"{name} imports everything from {stars}"
    assert not third_party(name) & {"nbdev", "fastcore", "execnb"}
    assert name == "rivals" or not third_party(name) & {"skimage", "pydensecrf", "torchmetrics"}, "a rival is only timed, never needed"


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name):
    lines = (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= 275, f"{name} has {lines} lines: split it by what it is responsible for"


@pytest.mark.parametrize("name", sorted((NETWORKS | CLASSICAL) & set(MODULES)))
def test_networks_and_fields_know_nothing_of_data_or_training(name):
    assert not package_imports(name) & {"scenes", "street", "town", "camera", "datasets", "transforms", "engine", "train", "metrics", "losses"}


def test_one_notebook_one_module():
    notebooks = {p.stem.split("_", 1)[1] for p in (PACKAGE.parent / "nbs").glob("[0-9]*.ipynb")}
    assert notebooks == set(MODULES)
    numbers = [p.stem.split("_", 1)[0] for p in (PACKAGE.parent / "nbs").glob("[0-9]*.ipynb")]
    assert len(numbers) == len(set(numbers))
