"The promised names are there at top level, and importing the package is quick"
import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import synseg


@pytest.mark.parametrize("name", synseg.__all__)
def test_public_names_resolve(name):
    value = getattr(synseg, name)
    assert name in dir(synseg)
    assert callable(value) or name == "VOID"
    if callable(value):
        assert value.__doc__ and len(value.__doc__) > 15, f"{name} has no docstring"


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'segmentify'"):
        synseg.segmentify


def test_no_module_hides_a_public_name():
    modules = {p.stem for p in Path(synseg.__file__).parent.glob("*.py")}
    assert not modules & set(synseg.__all__)


def test_import_does_not_load_torch():
    subprocess.run([sys.executable, "-c", "import synseg, sys; assert 'torch' not in sys.modules"], check=True)


def test_public_functions_and_classes_are_documented():
    for path in sorted((Path(synseg.__file__).parent).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("name,promised", [
    ("KMeansSegmenter", dict(spatial_weight=1.0)),
    ("DenseCRF", dict(gaussian_xy=3, gaussian_weight=3, bilateral_xy=80, bilateral_rgb=13, bilateral_weight=10, iterations=10,
                      normalization="symmetric")),
    ("ConvCRF", dict(kernel_size=11, iterations=5)),
    ("GridCRF", {}),
])
def test_promised_signatures_of_the_classical_part(name, promised):
    found = inspect.signature(getattr(synseg, name)).parameters
    assert {k: found[k].default for k in promised} == promised
    assert list(found)[0] == ("k" if name == "KMeansSegmenter" else "num_classes")


@pytest.mark.parametrize("size", [(41, 37), (64, 80)])
def test_random_fields_are_called_alike(size):
    image, log_probs = torch.rand(2, 3, *size), torch.randn(2, 4, *size).log_softmax(1)
    for name in ("GridCRF", "DenseCRF", "ConvCRF"):
        with torch.no_grad():
            marginals = getattr(synseg, name)(4)(log_probs, image)
        assert marginals.shape == log_probs.shape and marginals.dtype == log_probs.dtype
        torch.testing.assert_close(marginals.sum(1), torch.ones(2, *size), rtol=1e-4, atol=1e-4)
    assert synseg.KMeansSegmenter(3)(image[0]).shape == size
