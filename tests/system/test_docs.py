"""Pages name things that exist, and each optimizer has one."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import newtonopt
from newtonopt.callbacks import CurvatureMonitor
from newtonopt.optimizers.newton import NewtonOptimizer

ROOT = Path(__file__).parents[2]
SETUPS = (ROOT / "docs" / "setups.md").read_text().split("## Three ways")[0].split("## Models")[1]
# One entry of the list of set-ups each, from its bold title to the names of its tests.
ENTRIES = [entry.split("\n\n")[0] for entry in re.split(r"^- ", SETUPS, flags=re.MULTILINE)[1:]]
PAGES = [ROOT / "README.md", *sorted(page for page in ROOT.glob("docs/**/*.md") if "drawn" not in page.parts)]
# Each optimizer by the name of its page: `newton_cg` for `NewtonCG`.
MEMBERS = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): thing
    for name, thing in vars(newtonopt).items()
    if name in newtonopt.__all__ and isinstance(thing, type) and issubclass(thing, NewtonOptimizer)
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.split("**")[1][:40])
def test_each_set_up_is_held_up_by_a_test(entry: str) -> None:
    text, *tests = re.split(r"\n  Tests?: ", entry)
    assert text.startswith("**"), "the entry has no title"
    names = " ".join(tests).split()
    assert names, "the entry names no test"
    for name in names:
        file, test = re.fullmatch(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", name).groups()  # type: ignore[union-attr]
        assert test in functions_in(file), f"{file} has no {test}"


@cache
def functions_in(file: str) -> set[str]:
    """The names of the functions at the top level of a file of tests."""
    return {n.name for n in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(n, ast.FunctionDef)}


def test_all_set_ups_are_entries() -> None:
    assert len(ENTRIES) >= 88
    assert "|---" not in SETUPS, "a table's rows would not be checked"
    assert len(re.findall(r"`[\w/]+\.py::\w+`", SETUPS)) == sum(entry.count(".py::") for entry in ENTRIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            file, _, heading = target.partition("#")
            there = page.parent / file if file else page
            assert there.exists(), target
            assert not heading or heading in _headings(there), target


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/how_to/*.md")), ids=lambda path: path.name)
def test_a_program_that_a_page_shows_can_be_downloaded(page: Path) -> None:
    text = page.read_text()
    shown = re.findall(r"^```{literalinclude} (\S+)", text, re.MULTILINE)
    assert shown == re.findall(r"{download}`[^<`]+ <(\S+)>`", text)


def _headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, those of the files that it includes among them."""
    text = page.read_text()
    included = re.findall(r"^```{include} (\S+)", text, re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    own = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return own.union(*(_headings(page.parent / file) for file in included if "drawn" not in file))


@pytest.mark.parametrize("name", MEMBERS)
def test_every_optimizer_has_a_page_linked_from_the_choice_table(name: str) -> None:
    member = MEMBERS[name].__name__
    assert f"| [`{member}`](docs/optimizers/{name}.md) |" in (ROOT / "README.md").read_text()
    assert f"[`{member}`](optimizers/{name}.md)" in (ROOT / "docs" / "choosing.md").read_text()
    assert f"| `{member}` |" in (ROOT / "docs" / "what_it_costs.md").read_text()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_page_names_every_setting_with_its_default(name: str) -> None:
    text = (ROOT / "docs" / "optimizers" / f"{name}.md").read_text()
    shared = (ROOT / "docs" / "optimizers" / "index.md").read_text()
    settings = {p.name: p.default for p in inspect.signature(MEMBERS[name]).parameters.values()}
    del settings["params"]
    assert [setting for setting in settings if f"`{setting}`" not in text] == []
    defaults = _defaults(shared) | _defaults(text)
    assert {setting: defaults[setting] for setting in settings} == settings


def test_the_monitors_table_names_every_argument_with_its_default() -> None:
    table = (ROOT / "docs" / "monitor.md").read_text().split("## Tags")[0]
    assert _defaults(table) == {p.name: p.default for p in inspect.signature(CurvatureMonitor).parameters.values()}


def _defaults(text: str) -> dict[str, object]:
    """Read defaults from the rows of tables whose first column names settings and whose second gives defaults."""
    found: dict[str, object] = {}
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", text, re.MULTILINE):
        settings, given = re.findall(r"`(\w+)`", names), values.strip().replace("`", "").split(", ")
        if given == [""]:  # the default depends on the optimizer
            continue
        for setting, value in zip(settings, given, strict=True):
            numerator, _, denominator = value.partition("/")
            found[setting] = float(numerator) / float(denominator) if denominator else ast.literal_eval(value)
    return found


@pytest.mark.parametrize("name", MEMBERS)
def test_the_program_of_a_page_asserts_that_it_converges(name: str) -> None:
    """The test of pages runs both."""
    text = (ROOT / "docs" / "optimizers" / f"{name}.md").read_text()
    program, assertion = re.search(
        r"```python\n(.*?)```\n+<!--- invisible-code-block: python\n(.*?)--->", text, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert f"optimizer = {MEMBERS[name].__name__}(" in program
    assert re.match(r"assert (optimizer\.last_step\.gradient_norm < 1e-6|error < 1e-2)$", assertion, re.MULTILINE)
