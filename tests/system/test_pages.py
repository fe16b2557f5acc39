"""Every program on a page runs, and every command on a page names files and modules that exist.

The blocks of a page run in order and share their names, those in comments too, which a reader does not see:
`<!--- invisible-code-block: python ... --->` makes what a block needs, or asserts what it has computed. Blocks with
`>>>` must print what they show. A page with the line `<!-- slow -->` is a slow test.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in ROOT.glob("docs/**/*.md") if "drawn" not in page.parts),
]
PARSER = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
# Blocks in these languages, and MyST's directives, are not run. Any other word may be a program that nobody runs.
NOT_RUN = {"sh", "text", "yaml", "toml"}
READERS = "train.py"  # a reader's own program
UNSEEN = (
    r"(?m)^(?:[ >]*(?:`{3,}|~{3,}|:{3,})[ ]*\{|\.\. )(code|code-block|code-cell|sourcecode|testcode|doctest)(\}|::)"
)


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_programs() -> list[Any]:
    """Return the pages that have a program, as parameters of a test."""
    texts = {page: page.read_text() for page in PAGES}
    return [
        pytest.param(page, id=relative(page), marks=[pytest.mark.slow] if "<!-- slow -->" in text else [])
        for page, text in texts.items()
        if re.search(r"^[ >]*```python$", text, re.MULTILINE)
    ]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a page in an empty folder, and leave the environment and the settings of torch as they were."""
    monkeypatch.chdir(tmp_path)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    os.environ["MPLBACKEND"] = "Agg"
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(dtype)


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page and return their names."""
    document = Sybil([PARSER]).parse(page)
    for example in document.examples():
        example.evaluate()
    return document.namespace


@pytest.mark.parametrize("page", with_programs())
def test_the_programs_of_a_page_run(page: Path) -> None:
    names = run(page)
    if page.name == "README.md":
        assert float(names["loss"]) < 1e-3


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_program_of_a_page_goes_unseen(page: Path) -> None:
    text = page.read_text()
    fences = re.findall(r"^[ >]*(?:`{3,}|~{3,}|:{3,})[ ]*(\S*)", text, re.MULTILINE)
    for language in filter(None, fences):
        assert language == "python" or language in NOT_RUN or language.startswith("{"), f"not run: {language}"
    assert not re.search(UNSEEN, text)
    shown = len(re.findall(r"^[ >]*```python$", text, re.MULTILINE))
    hidden = len(re.findall(r"(?<!`)<!-.*invisible", text))
    blocks = list(PARSER.codeblock_parser(Sybil([]).parse(page)))
    assert len(blocks) == shown + hidden, "a block is not closed, or a comment is not of the form that is run"


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of the commands in blocks for a shell and in code within the text."""
    text = page.read_text()
    for block in re.findall(r"^[ ]*```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&& ", line.split(" #")[0]):
                yield shlex.split(part, comments=True)
    prose = re.sub(r"^[ ]*```.*?^[ ]*```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`((?:\S+=\S* )*(?:\S*/)?(?:python3?|pytest|make|pip|torchrun) [^`]+)`", prose):
        yield shlex.split(code)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_name_what_exists(page: Path) -> None:
    for words in commands(page):
        missing = "; ".join(_missing(words))
        assert not missing, f"{shlex.join(words)}: {missing}"


def _missing(words: list[str]) -> Iterator[str]:
    """Yield what a command names and this repository does not have."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, arguments = Path(words[0]).name if words else "", words[1:]
    if program.startswith("python") and arguments[:1] == ["-c"]:
        ast.parse(arguments[1])
    elif program.startswith("python") and arguments[:1] == ["-m"]:
        found = importlib.util.find_spec(arguments[1])
        if found is not None and found.submodule_search_locations is not None:  # a package is run by its __main__
            found = importlib.util.find_spec(f"{arguments[1]}.__main__")
        if found is None:
            yield f"no module {arguments[1]}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (f"no target {word}" for word in arguments if "=" not in word and word not in targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"(?:newtonopt|\.)\[([^]]+)\]", " ".join(arguments)):
            yield from (f"no extra {extra}" for extra in asked.split(",") if extra not in extras)
    if program.startswith("python") or program in ("pip", "pytest", "torchrun"):
        for file, _, test in (word.partition("::") for word in arguments):
            if re.fullmatch(r"[\w./-]+\.(py|yaml|txt|toml)", file) or file.startswith("tests/"):
                if not (ROOT / file).exists() and file != READERS:
                    yield f"no file {file}"
                elif test and f"def {test}(" not in (ROOT / file).read_text():
                    yield f"no test {test}"


def test_a_program_that_is_wrong_is_seen(tmp_path: Path) -> None:
    """Guards the runs above: each of these pages is wrong in another way."""
    page = tmp_path / "page.md"
    for text in (
        "```python\nraise AssertionError\n```\n",
        "<!--- invisible-code-block: python\nassert False\n--->\n",
        "```python\n>>> 1 + 1\n3\n\n```\n",
    ):
        page.write_text(text)
        with pytest.raises(AssertionError):
            run(page)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("python no_file.py", "no file"),
        (".venv/bin/python -m no_module", "no module"),
        ("python -m newtonopt.solvers", "no module"),
        ("make no-target", "no target"),
        ("pip install '.[plots,nothing]'", "no extra nothing"),
        ("pytest tests/system/test_pages.py::test_nothing", "no test"),
        ("python examples/digits.py fit --config configs/none.yaml", "no file configs/none.yaml"),
        ("OMP_NUM_THREADS=1 python examples/digits.py fit", None),
    ],
)
def test_what_a_command_lacks_is_seen(command: str, missing: str | None) -> None:
    found = list(_missing(shlex.split(command)))
    assert found == [] if missing is None else found[0].startswith(missing)


def test_the_extras_of_the_install_page_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/start/install.md").read_text(), re.MULTILINE)
    assert {"lightning", "plots", "cli", "examples"} <= {*shown} <= {*extras}
