"One style for all figures: set once before the first one, colours that everybody can tell apart, sizes that fit a page"
import base64
import re
import struct
from pathlib import Path

import matplotlib as mpl
import pytest
from conftest import cells, text

from synseg.show import set_style

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGES = sorted(NBS.glob("[0-9]*.ipynb"))
WIDTHS = range(200, 1001)  # pixels of a stored figure: readable on a page of 960
MAPS = {"viridis", "cividis", "magma", "plasma", "inferno", "gray", "binary", "Greys", "Blues", "Oranges", "Reds", "Purples", "PuOr", "RdBu"}
# Drawn in matplotlib's own style so far, or by functions of the package that bring theirs: an entry goes when its chapter is executed again
PLAIN = {"00_core", "01_check", "02_labels", "03_street", "04_camera", "05_scenes", "84_town", "85_things", "87_callbacks", "92_cli", "95_runs"}
# Label maps with more ids than a safe palette has, where neighbours need to differ and no id is named
LABELS = {"02_labels", "14_unet", "81_rivals"}


def pictures(cell):
    return [base64.b64decode("".join(o["data"]["image/png"])) for o in cell["outputs"] if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_style_is_set_once_before_the_first_figure(path):
    code = cells(path, "code")
    calls = [i for i, c in enumerate(code) for _ in re.findall(r"^ *(?:show\.)?set_style\(\)", text(c), re.M)]
    drawn = [i for i, c in enumerate(code) if pictures(c)]
    if path.stem in PLAIN:
        assert drawn and not calls, f"{path.stem} need not be listed in PLAIN any more"
    elif path.stem == "08_show":
        assert len(calls) == 1  # where the style is defined: the figures of the cells before show what it is for
    elif drawn:
        assert len(calls) == 1 and calls[0] <= drawn[0], f"set_style() in cells {calls}, the first figure in {drawn[0]}"
    else:
        assert len(calls) <= 1


def unsafe(text):
    "Colour maps and plain colour letters that not everybody can tell apart"
    named = re.findall(r"""cmap=["'](\w+)["']|plt\.cm\.([a-z]\w+)|colormaps\[["'](\w+)["']\]""", text)
    maps = {next(filter(None, m)).removesuffix("_r") for m in named}
    letters = set(re.findall(r"""\b(?:color|c|ec|fc|edgecolor|facecolor)=["'](r|g|red|green|lime|magenta|cyan)["']""", text))
    return (maps - MAPS) | letters | set(re.findall(r"\b(jet|rainbow|hsv|nipy_spectral|gist_\w+)\b(?=[\"'])", text))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_colours_are_safe(path):
    found = set().union(*(unsafe(text(c)) for c in cells(path, "code")))
    assert found <= ({"tab20"} if path.stem in LABELS else set()), f"{path.stem} draws in {found}"


def test_unsafe_finds_what_it_looks_for():
    assert unsafe('imshow(x, cmap="jet"); plot(x, color="r")') == {"jet", "r"} and unsafe("plt.cm.hsv(x); cmap='RdYlGn'") == {"hsv", "RdYlGn"}
    assert not unsafe('imshow(x, cmap="cividis_r"); plot(x, color="#D55E00", ec="0.3")')


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_figures_fit_the_page(path):
    for cell in cells(path, "code"):
        for png in pictures(cell):
            width, height = struct.unpack(">II", png[16:24])
            assert width in WIDTHS and 60 <= height <= 1400, f"{path.stem}: a figure of {width}x{height} pixels: {text(cell)[:80]!r}"


def test_set_style():
    with mpl.rc_context():
        mpl.rcdefaults()
        set_style()
        first = dict(mpl.rcParams)
        set_style()
        assert dict(mpl.rcParams) == first, "twice is as good as once"
        colours = [c["color"] for c in mpl.rcParams["axes.prop_cycle"]]
        assert len(set(colours)) == 7 and {"#0072B2", "#D55E00", "#009E73"} <= set(colours)
        assert mpl.rcParams["font.family"] == ["sans-serif"] and mpl.rcParams["font.sans-serif"][0] == "DejaVu Sans"
        assert mpl.rcParams["image.cmap"] in MAPS and 8 <= mpl.rcParams["font.size"] <= 10 and mpl.rcParams["figure.dpi"] == 100
