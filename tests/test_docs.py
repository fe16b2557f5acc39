"""Pages name things that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPS = (ROOT / "docs" / "setups.md").read_text()
ROWS = [line for line in SETUPS.split("## Three ways")[0].splitlines() if re.match(r"\| (?!set-up)", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_set_up_is_held_up_by_a_test(row: str) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
    assert named, "the row names no test"
    for file, name in named:
        functions = [
            n.name for n in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(n, ast.FunctionDef)
        ]
        assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target
