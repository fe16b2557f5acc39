"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import io

import pytest
from houses import MODULES, public_names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_examples_of_a_module_give_what_they_show(module: str) -> None:
    thing = importlib.import_module(module)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    for example in doctest.DocTestFinder(exclude_empty=True).find(thing, module):
        written = io.StringIO()
        result = doctest.DocTestRunner(optionflags=flags, verbose=False).run(example, out=written.write)
        assert result.failed == 0, written.getvalue()


@pytest.mark.parametrize("qualified", public_names())
def test_every_public_name_has_an_example(qualified: str) -> None:
    module, _, name = qualified.rpartition(".")
    text = getattr(importlib.import_module(module), name).__doc__ or ""
    assert ">>> " in text, f"the docstring of {qualified} shows no example"


def test_an_example_that_is_wrong_is_seen() -> None:
    """Guards the comparison above: were it blind, it would pass."""
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=io.StringIO().write).failed == 1
