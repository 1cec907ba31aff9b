"The promised names are there at top level, and importing the package is quick"
import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
