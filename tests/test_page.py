"Figures of a study by hand, the verdict whichever way they fall, and a page that any browser reads without a network"
import math
from html.parser import HTMLParser

import pytest

from synseg.page import (MEASURES, NAMES, PUBLISHED, apart, closed, curve_drawings, drawing, figures, interval, number, preserved, scores, shares,
                         tabulated, verdict, write_page)

TESTS = ("synthetic", "simgan", "ours", "real")
LOOKS = dict(distance=1.0, ssim_real=.2, ssim_own=.9)


def seed(real, more=None, net="unet"):
    "A record of one seed: {trained on: score on real pictures}"
    fits = {}
    for kind, score in real.items():
        tests = {t: dict(mean_iou=score/2, pixel_accuracy=score/2) for t in TESTS} | {"real": dict(mean_iou=score, pixel_accuracy=min(1, 2*score))}
        if kind == "synthetic": tests |= {t: dict(mean_iou=.1, pixel_accuracy=.1) for t in ("colours", "randomised")}
        fits[f"{net}-{kind}"] = dict(scores=tests, cost=dict(minutes=1.0), parameters=5)
    rows = [dict(step=s, critic_real=1.0, adversarial=.5, critic_refined=.7, **LOOKS) for s in (60, 120)]
    return dict(fits=fits, near={k: LOOKS for k in ("synthetic", "simgan", "ours", "ours pre-trained")},
                refiners={k: dict(step=120, rows=rows, seconds=60.0) for k in ("simgan", "ours")})


GOOD = dict(synthetic=.10, simgan=.12, ours=.30, real=.50, colours=.2, randomised=.15, augmented=.11, combined=.35)


def test_intervals():
    assert interval([.3]) == dict(mean=.3, half=None, low=None, high=None, n=1)
    three = interval([.1, .2, .3])
    assert three["mean"] == pytest.approx(.2) and three["half"] == pytest.approx(4.302653*.1/math.sqrt(3), rel=1e-5)
    assert number(three) == "0.200 ± 0.248" and number(None) == "–" and number(.5, 1) == "0.5"
    assert apart(dict(mean=1, half=.1), dict(mean=2, half=.1)) and not apart(dict(mean=1, half=.6), dict(mean=2, half=.6))
    assert apart(dict(mean=1, half=None), dict(mean=2, half=.1)) is None


def test_share_of_the_gap():
    assert closed(.3, .1, .5) == pytest.approx(.5) and closed(.1, .1, .5) == 0 and closed(.5, .1, .5) == 1 and math.isnan(closed(.3, .2, .2))
    found = shares([seed(GOOD), seed(GOOD)], "unet", "mean_iou")
    assert found["ours"]["mean"] == pytest.approx(.5) and found["ours"]["half"] == pytest.approx(0) and "real" not in found


def test_the_refined_column_is_a_refiners_own():
    rows = scores([seed(GOOD)], "unet", "mean_iou")
    assert rows["simgan"]["refined"] == rows["simgan"]["simgan"] and rows["real"]["refined"] == rows["real"]["ours"]
    assert preserved([seed(GOOD)], "unet")["synthetic"]["mean"] == 1


def test_published_numbers_are_those_of_tables_3_to_6():
    assert PUBLISHED["unet"]["mean_iou"]["ours"] == (.23, .43, .14) and PUBLISHED["deeplab"]["pixel_accuracy"]["real"] == (.4639, .3938, .829)
    assert PUBLISHED["unet"]["mean_iou"]["ours"][2]/PUBLISHED["unet"]["mean_iou"]["synthetic"][2] == pytest.approx(1.4)
    assert PUBLISHED["unet"]["pixel_accuracy"]["ours"][2] - PUBLISHED["unet"]["pixel_accuracy"]["synthetic"][2] == pytest.approx(.243, abs=1e-3)


def test_the_verdict_follows_the_figures():
    say = lambda *seeds: " ".join(verdict(figures(seeds), "unet"))
    good = say(seed(GOOD))
    assert "ours 50%" in good and "effect is reached" in good and "above SimGAN in both" in good and "No simple baseline" in good and "one seed" in good
    sure = say(*[seed({k: v + i/1000 for k, v in GOOD.items()}) for i in range(3)])
    assert "do not overlap" in sure
    bad = say(seed(GOOD | dict(ours=.105, simgan=.2, colours=.3)))
    assert "not reached" in bad and "not above SimGAN" in bad and NAMES["colours"] in bad
    wide = say(seed(GOOD), seed(GOOD | dict(ours=.05)))
    assert "overlap" in wide and "do not overlap" not in wide


class Checker(HTMLParser):
    "Tags that are opened are closed in order; collects attributes"
    VOID = {"meta", "img", "br"}
    def __init__(self): super().__init__(); self.open, self.tags = [], []
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag


FACTS = dict(profile="cpu", size=(96, 128), synthetic=9, real=3, tests=2, width=16, updates=480, features="some features")


@pytest.mark.parametrize("n", [1, 3])
def test_a_page_of_its_own(tmp_path, n):
    found = figures([seed(GOOD)]*n)
    path = write_page(tmp_path / "index.html", "refiner-x", "About <this> & that.", FACTS, found, "Fréchet distance, some features", {"a.png": "A row of pictures"})
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open and "&lt;this&gt; &amp; that" in text and "http" not in text.replace("http-equiv", "")
    tags = [t for t, _ in checker.tags]
    assert tags.count("table") == tags.count("caption") == 1 + len(MEASURES) + 1 + 1
    assert all(a.get("alt") for t, a in checker.tags if t == "img") and all(a.get("aria-label") for t, a in checker.tags if t == "svg")
    assert all(a.get("scope") for t, a in checker.tags if t == "th") and dict(checker.tags)["html"]["lang"] == "en"
    assert text.index("Share of the gap closed") < text.index("Table 3"), "the figure that does not depend on the baseline comes first"
    assert "0.310" in text and ("one seed" in text) == (n == 1) and f"--seeds {n + 2}" in text


def test_drawings():
    rows = [dict(step=0, distance=2.0, ssim_real=.1), dict(step=60, distance=1.0, ssim_real=.2, critic_real=.5, critic_refined=.7)]
    text = curve_drawings(dict(simgan=rows, ours=rows))
    assert text.count("<svg") == 4 and text.count("<polyline") == 8 and "nan" not in text
    assert drawing("empty", {"a": []}) == "" and "<polyline" in drawing("flat", {"a": [(0, 1), (1, 1)]})
    assert "&lt;b&gt;" in tabulated("<b>", ["x"], [["y"]])
