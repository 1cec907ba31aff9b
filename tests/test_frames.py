"Frames under a slider: pixels kept, rare colours kept, words for every frame, one visible, small, the same block each time"
import io
import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np
import pytest
from PIL import Image

from synseg.frames import as_frame, palette_png, shared_palette, slider


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbers(k):
    "A typical frame: a grid with numbers in the cells, 400 pixels wide"
    figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
    axis.imshow(np.random.default_rng(k).random((6, 8)), cmap="viridis")
    for i, j in np.ndindex(6, 8):
        axis.text(j, i, f"{i * j + k}", ha="center", va="center", color="white")
    return figure


def test_figures_are_rendered_at_their_size_and_closed():
    figure, _ = plt.subplots(figsize=(2.5, 1.5), dpi=80)
    frame = as_frame(figure)
    assert frame.shape == (120, 200, 3) and frame.dtype == np.uint8
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("array", [noise(5, 7), noise(5, 7, 3), noise(5, 7) / 255, noise(5, 7, 3).astype(np.float32) / np.float32(255)])
def test_arrays_keep_their_values(array):
    want = np.round(array * 255) if array.dtype.kind == "f" else array
    frame = as_frame(array, scale=3)
    assert frame.shape == (15, 21, 3)
    for block in np.ndindex(3, 3):
        got = frame[block[0]::3, block[1]::3]
        assert (got == (want if want.ndim == 3 else want[..., None])).all()


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 2, 4)), np.zeros((3, 3), int), np.zeros((0, 4)), np.array([["a"]])])
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match="expected a figure"):
        as_frame(bad)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="rescale"):
        as_frame(np.array([[0.5, value]]))


@pytest.mark.parametrize("n,limit", [(1, 2), (2, 2), (16, 16), (64, 64), (256, 256), (40, 256)])
def test_few_colours_are_kept_exactly(n, limit):
    few = np.unique(noise(n * 2, 3, seed=n), axis=0)[:n]
    frames = [few[np.random.default_rng(s).integers(0, len(few), (13, 29))] for s in range(3)]
    palette, indices = shared_palette(frames, limit)
    assert len(palette) <= limit
    for frame, index in zip(frames, indices):
        assert (palette[index] == frame).all()
        assert (np.asarray(Image.open(io.BytesIO(palette_png(index, palette))).convert("RGB")) == frame).all()


def test_one_palette_for_all_and_rare_colours_survive():
    frames = [as_frame(np.linspace(0, 1, 256)[None].repeat(60, 0)) for _ in range(4)]
    frames[2] = frames[2].copy()
    frames[2][5, 9] = 213, 94, 0
    palette, indices = shared_palette(frames, 16)
    assert len(palette) == 16 and (indices[0] == indices[3]).all()
    assert np.abs(palette[indices[2][5, 9]].astype(int) - [213, 94, 0]).max() < 10
    assert np.abs(palette[indices[0]].astype(int) - frames[0]).max() < 30


def test_noise_comes_close():
    palette, indices = shared_palette([noise(40, 50, 3)], 256)
    assert len(palette) <= 256 and np.abs(palette[indices[0]].astype(int) - noise(40, 50, 3)).mean() < 25


def test_twelve_drawings_stay_under_the_limit():
    made = slider((numbers(k) for k in range(12)), alt="numbers in a grid")
    assert made.size == (300, 400) and len(made) == 12
    assert len(made._repr_html_()) < 150 * 1024
    assert not plt.get_fignums()


def test_the_block_has_words_one_visible_frame_and_no_state():
    frames = [noise(4, 6, seed=s) for s in range(5)]
    made = slider(frames, list("abcde"), 'a "noisy" <grid> & more', label="draw", start=-2, scale=10, seconds=0.25)
    page = made._repr_html_()
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) == 5 and all(re.search(r'alt="a &quot;noisy&quot; &lt;grid&gt; &amp; more \(', i) for i in images)
    assert [i for i, tag in enumerate(images) if "display:block" in tag] == [3] and 'value="3"' in page and 'max="4"' in page
    assert page == slider(frames, list("abcde"), 'a "noisy" <grid> & more', label="draw", start=3, scale=10, seconds=0.25)._repr_html_()
    assert "<script" not in page and "\n" not in page and not re.search(r'\bid="', page) and ",250)" in page
    assert '<button type="button"' in page and 'type="range"' in page and 'aria-valuetext="d"' in page
    assert all('height="40" width="60"' in tag for tag in images)
    assert repr(made).startswith("5 frames of 40x60") and repr(made).endswith("a; b; c; d; e")


def test_alt_and_captions_for_each_frame():
    made = slider([noise(3, 3, seed=s) for s in range(2)], alt=["first", "second"], label="turn")
    assert made.alts == ("first", "second") and made.captions == ("turn 1 of 2", "turn 2 of 2")
    assert len(slider([noise(3, 3)], alt="alone")) == 1


@pytest.mark.parametrize("change,says", [
    (dict(frames=[]), "sizes"), (dict(frames=[noise(3, 4), noise(4, 3)]), "one figsize"),
    (dict(captions=["one"]), "2 frames and 1 captions"), (dict(captions=["one", " "]), "empty text"),
    (dict(alt=""), "no alt text"), (dict(alt=["x"]), "2 frames and 1 alt texts"), (dict(alt=["x", ""]), "empty text"),
    (dict(start=2), "start 2"), (dict(start=-3), "start -3"), (dict(colours=1), "colours 1"), (dict(colours=257), "colours 257"),
    (dict(scale=0), "scale 0"), (dict(seconds=0), "seconds 0"), (dict(limit_kb=0.5), "raise limit_kb")])
def test_bad_pages_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        slider(**(dict(frames=[noise(3, 4), noise(3, 4, seed=1)], alt="noise") | change))
