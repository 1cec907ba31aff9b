"The glossary: in order, plain, and each word is in the chapter that it leads to"
import re
import unicodedata
from pathlib import Path

import pytest
from conftest import cells, text as source

NBS = Path(__file__).resolve().parents[1] / "nbs"
TEXT = "\n".join(map(source, cells(NBS / "glossary.ipynb")))
ENTRIES = re.findall(r"^\*\*([^*]+)\*\*: (.+) \[(\d+) ([^\]]+)\]\((\d\d_\w+)\.ipynb\)$", TEXT, re.M)


def plain(text):
    text = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in text if c.isalnum() or c == " ")


def test_entries_are_many_alphabetical_and_short():
    assert len(ENTRIES) == TEXT.count("\n**") and 70 <= len(ENTRIES) <= 110, "an entry is **word**: sentences [number title](link)"
    terms = [plain(e[0]) for e in ENTRIES]
    assert terms == sorted(set(terms))
    for term, text, *_ in ENTRIES:
        assert len(text.split()) <= 45 and text.endswith("."), term
    heads = re.findall(r"^## (\w)$", TEXT, re.M)
    assert heads == sorted({t[0].upper() for t in terms}), "one heading for each letter"


@pytest.mark.parametrize("term,text,number,title,stem", ENTRIES, ids=[e[0] for e in ENTRIES])
def test_the_chapter_of_a_word_knows_it(term, text, number, title, stem):
    found = list(map(source, cells(NBS / f"{stem}.ipynb")))
    assert found[0].startswith(f"# {title}\n") and int(stem[:2]) == int(number)
    body = plain(" ".join(found))
    missing = [word for word in plain(term).split() if word[:5] not in body]
    assert not missing, f"{stem} says nothing of {missing}"
