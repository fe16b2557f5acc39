"""The list of papers is complete, and each paper is used where its entry says."""

from __future__ import annotations

import importlib
import inspect
import re
import unicodedata
from pathlib import Path

import pytest
from houses import FILES, ROOT, public_names

DOCS = ROOT / "docs"
PAGE = DOCS / "references.md"
ENTRIES = re.findall(r"^- (.*)$", PAGE.read_text(), re.MULTILINE)
PAGES = [page for page in sorted(DOCS.glob("**/*.md")) if page != PAGE and "_build" not in page.parts]
PUBLIC = {qualified.rpartition(".")[2]: qualified for qualified in public_names()}
# "Cohen et al. 2021", "Golub & Meurant (2010", "Li & Li 2005": the last name before a year.
CITATION = re.compile(r"([^\W\d_][\w'-]+)(?: et al\.)?,? \(?((?:19|20)\d\d)\b")


def _plain(text: str) -> str:
    """Return text on one line, without comment signs and accents."""
    bare = unicodedata.normalize("NFKD", text)
    return re.sub(r"\s+(# )?", " ", "".join(letter for letter in bare if not unicodedata.combining(letter)))


def _authors_and_year(entry: str) -> tuple[set[str], str]:
    authors, year = re.match(r"(.*?) (\d{4}),", _plain(entry)).groups()  # type: ignore[union-attr]
    return set(re.findall(r"[^\W\d_][\w'-]+", authors)), year


def _cites(text: str, entry: str) -> bool:
    authors, year = _authors_and_year(entry)
    return any(name in authors and found == year for name, found in CITATION.findall(_plain(text)))


def _text_of(use: str) -> str:
    """Return the text behind a link, a file's path or a public name."""
    if linked := re.fullmatch(r"\[[^]]+\]\(([^)#]+)(?:#[^)]+)?\)", use):
        text = (DOCS / linked[1]).read_text()
        included = re.findall(r"^```{include} (\S+)", text, re.MULTILINE)
        return "\n".join([text, *((DOCS / linked[1]).parent.joinpath(file).read_text() for file in included)])
    target = use.strip("`").removesuffix("()")
    if "/" in target:
        return (ROOT / target).read_text()
    name, _, member = target.partition(".")
    thing = getattr(importlib.import_module(PUBLIC[name].rpartition(".")[0]), name)
    return inspect.getdoc(getattr(thing, member) if member else thing) or ""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.split(", ")[0][:40])
def test_a_paper_is_used_where_its_entry_says(entry: str) -> None:
    _, _, said = entry.partition(" Used by ")
    uses = re.findall(r"\[[^]]+\]\([^)]+\)|`[^`]+`", said.partition(", for ")[0])
    assert uses, "the entry does not say what uses it"
    for use in uses:
        assert _cites(_text_of(use), entry), f"{use} does not cite it"


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_paper_that_is_cited_has_an_entry(path: Path) -> None:
    known = [_authors_and_year(entry) for entry in ENTRIES]
    for name, year in CITATION.findall(_plain(path.read_text())):
        if name[0].isupper() and name not in ("Default", "November", "Xiv"):
            assert any(name in authors and year == found for authors, found in known), f"{name} {year}"
