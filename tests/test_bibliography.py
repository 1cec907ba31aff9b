"Every paper is in references.bib: those of the zoo, those of the critics, those of each chapter's references"
import json
import re
from pathlib import Path

import pytest
from conftest import cells, text

from synseg import discriminator_info, list_discriminators, list_models, model_info

NBS = Path(__file__).resolve().parents[1] / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
TEXT = (NBS / "references.bib").read_text(encoding="utf-8")
NO_PAPER = re.compile(r"W3C|manual|IEEE \d|https?://|documentation|torchvision|specification|PEP \d|`man \d|pydensecrf|pooch|model_info", re.I)


@pytest.fixture(scope="module")
def page():
    "The functions of the page: its first code cell"
    names = {}
    exec(text(cells(NBS / "bibliography.ipynb", "code")[0]), names)
    return names


@pytest.fixture(scope="module")
def bib(page):
    return page["parse_bib"](TEXT)


def test_the_file_is_bibtex(bib):
    assert TEXT.count("{") == TEXT.count("}")
    keys = re.findall(r"^@\w+\{(.+),$", TEXT, re.M)
    assert len(keys) == len(set(keys)) == len(bib) > 150, "a key that comes twice, or an entry that is not read"
    for key, e in bib.items():
        assert {"title", "author", "year"} <= e.keys() and re.fullmatch(r"(19|20)\d\d", e["year"]), key
        assert e["kind"] != "article" or "journal" in e, key
        assert e["kind"] not in ("inproceedings", "incollection") or "booktitle" in e, key
        assert "eprint" not in e or re.fullmatch(r"\d{4}\.\d{4,5}", e["eprint"]), key
    ids = [e["eprint"] for e in bib.values() if "eprint" in e]
    assert len(ids) == len(set(ids))


def test_networks_and_critics(page, bib):
    ids = {e["eprint"] for e in bib.values() if "eprint" in e}
    infos = [model_info(n) for n in list_models()] + [discriminator_info(n) for n in list_discriminators()]
    for info in infos:
        titles = [key for key, e in bib.items() if page["plain"](e["title"]) in page["plain"](info.paper)]
        assert info.arxiv in ids if info.arxiv else titles, f"{info.name}: {info.paper}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_references_of_a_chapter(path, page, bib):
    for line in page["lines_of"](json.loads(path.read_text(encoding="utf-8"))):
        assert page["cited"](line, bib) or NO_PAPER.search(line), f"not in references.bib: {line}"
        known = {e.get("eprint") for e in bib.values()}
        missing = [number for number in re.findall(r"\b\d{4}\.\d{5}\b", line) if number not in known]
        assert not missing, f"arXiv {missing} of {path.name} is not in references.bib"


def test_a_title_is_found_by_author_and_words_and_nothing_else_is(page, bib):
    cited = page["cited"]
    assert cited("Yu et al., *BiSeNet*, 2018, arXiv [1808.00897](https://arxiv.org/abs/1808.00897)", bib) == ["yu2018bisenet"]
    assert cited("Chen et al. (2017), *Rethinking Atrous Convolution*: section 3.3", bib) == ["chen2017deeplabv3"]
    assert cited("S. Lazebnik, C. Schmid, J. Ponce: Beyond Bags of Features, 2006", bib) == ["lazebnik2006bags"]
    assert cited("None of these has a name", bib) == []
