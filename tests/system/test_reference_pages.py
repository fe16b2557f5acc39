"""The reference has every public name once, and its mathematics points to files that exist."""

from __future__ import annotations

import re

from houses import ROOT, public_names

FOLDER = ROOT / "docs" / "reference"
NAMES = {name for name in public_names() if not name.startswith("newtonopt.optimizers.")}


def _summarised(text: str) -> list[str]:
    """Return the dotted names in a page's summary tables."""
    found = []
    for block in re.findall(r"```{eval-rst}\n(.*?)```", text, re.DOTALL):
        module = re.findall(r"currentmodule:: (\S+)", block)[0]
        found += [f"{module}.{name}" for name in re.findall(r"^   (\w+)$", block, re.MULTILINE)]
    return found


def test_every_public_name_has_one_page() -> None:
    found = [name for page in sorted(FOLDER.glob("*.md")) for name in _summarised(page.read_text())]
    assert sorted(found) == sorted(NAMES)


def test_the_first_page_lists_every_name_beside_its_group() -> None:
    rows = re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| (.*) \|$", (FOLDER / "index.md").read_text(), re.MULTILINE)
    listed = {page: re.findall(r"`(\w+)(?:\(\))?`", names) for page, names in rows}
    groups = {page: _summarised((FOLDER / page).read_text()) for page in listed}
    assert listed == {page: [name.rpartition(".")[2] for name in names] for page, names in groups.items()}
    assert sum(map(len, groups.values())) == len(NAMES)


def test_each_section_of_the_mathematics_names_its_code_and_its_sources() -> None:
    sections = (FOLDER / "mathematics.md").read_text().split("\n## ")[1:]
    assert len(sections) >= 11
    for section in sections:
        title = section.splitlines()[0]
        code = re.findall(r"`(newtonopt/[\w/]+\.py)`", section)
        assert code, f"{title}: no file"
        assert [file for file in code if not (ROOT / file).is_file()] == []
        assert "$$" in section, f"{title}: no formula"
        assert re.search(r"^- Sources?: .*\d{4}", section, re.MULTILINE), f"{title}: no source"
