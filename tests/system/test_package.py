"""One version everywhere, and a package whose description renders where it is shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import newtonopt
from newtonopt.optimizers.newton import NewtonOptimizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DESCRIPTION = (ROOT / PYPROJECT["project"]["readme"]).read_text()


def test_the_version_has_one_source() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "newtonopt.__version__"}
    # Setuptools reads it without importing the package, so it stands there as it is.
    assert f'\n__version__ = "{newtonopt.__version__}"\n' in (ROOT / "newtonopt" / "__init__.py").read_text()


def test_the_changelog_and_the_citation_are_of_this_version() -> None:
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = dict(re.findall(r"^([\w-]+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert releases[0] == (newtonopt.__version__, citation["date-released"])
    assert citation["version"] == newtonopt.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_every_folder_with_modules_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "newtonopt").rglob("__init__.py")}
    packages = {str(folder).replace("/", ".") for folder in folders}
    assert packages | {"newtonopt.callbacks", "newtonopt_tensorboard"} == set(
        PYPROJECT["tool"]["setuptools"]["packages"]
    )


def targets(text: str) -> list[tuple[str, ...]]:
    """Return where a page's links and pictures lead."""
    return re.findall(r"\]\(([^)\s]+)|\]:\s*(\S+)|(?:src|href)=\"([^\"]*)", text)


def test_the_description_has_no_link_that_leads_nowhere_on_a_package_index() -> None:
    found = ["".join(groups) for groups in targets(DESCRIPTION)]
    assert [target for target in found if not target.startswith("https://")] == []


@pytest.mark.parametrize("text", ["[a](b.md)", "![a](b.png)", '<img src="b.png">', "[a]: b.md"])
def test_a_link_is_seen(text: str) -> None:
    assert len(targets(text)) == 1


def test_the_description_names_every_optimizer_and_its_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name in newtonopt.__all__:
        thing = getattr(newtonopt, name)
        if isinstance(thing, type) and issubclass(thing, NewtonOptimizer):
            assert f"`{name}`" in DESCRIPTION
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", DESCRIPTION, re.DOTALL):
        exec(program, names)
    assert names["optimizer"].last_step.loss < 1e-3
    assert "The largest eigenvalue" in capsys.readouterr().out


def test_the_description_renders_as_on_a_package_index() -> None:
    markdown = pytest.importorskip("readme_renderer.markdown", exc_type=ImportError)
    page = markdown.render(DESCRIPTION)
    assert page is not None
    assert "<h2" in page
    assert "HessianFree" in page


def test_the_classifiers_are_those_of_the_package_index() -> None:
    known = pytest.importorskip("trove_classifiers")
    classifiers = set(PYPROJECT["project"]["classifiers"])
    assert classifiers <= known.classifiers - set(known.deprecated_classifiers)


def minor_versions() -> list[int]:
    """Return the second numbers of the Python versions that the metadata allows."""
    oldest, beyond = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PYPROJECT["project"]["requires-python"]).groups()
    return list(range(int(oldest), int(beyond)))


def test_the_classifiers_and_the_makefile_name_the_pythons_that_the_metadata_allows() -> None:
    classifiers = " ".join(PYPROJECT["project"]["classifiers"])
    minors = minor_versions()
    assert [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", classifiers)] == minors
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {minors[0]}) <= sys.version_info < (3, {minors[-1] + 1})" in makefile
    assert makefile.count(f"from 3.{minors[0]} to 3.{minors[-1]}") == 2  # a comment and an error


def test_the_badges_say_what_the_metadata_says() -> None:
    badges = ROOT / "docs" / "pictures" / "badges"
    minors = minor_versions()
    assert f"python: 3.{minors[0]} to 3.{minors[-1]}" in (badges / "python.svg").read_text()
    (torch,) = (one.partition(">=")[2] for one in PYPROJECT["project"]["dependencies"] if one.startswith("torch"))
    assert f"torch: {torch} or later" in (badges / "torch.svg").read_text()
    assert f"licence: {PYPROJECT['project']['license']}" in (badges / "licence.svg").read_text()
    assert "Typing :: Typed" in PYPROJECT["project"]["classifiers"]
