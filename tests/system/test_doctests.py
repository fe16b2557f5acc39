"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import io

import pytest
from houses import MODULES, public_names

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_examples_of_a_module_give_what_they_show(module: str) -> None:
    thing = importlib.import_module(module)
    for example in doctest.DocTestFinder(exclude_empty=True).find(thing, module):
        assert _complaints(example) == ""


@pytest.mark.parametrize("qualified", public_names())
def test_every_public_name_has_an_example_that_runs_by_itself(qualified: str) -> None:
    """An example that is pasted into a new session knows the names that it imports and no others."""
    module, _, name = qualified.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    assert ">>> " in (thing.__doc__ or ""), f"the docstring of {qualified} shows no example"
    for example in doctest.DocTestFinder(exclude_empty=True).find(thing, name, module=False, globs={}):
        assert _complaints(example) == ""


def _complaints(example: doctest.DocTest) -> str:
    written = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(example, out=written.write)
    return written.getvalue()


def test_an_example_that_is_wrong_is_seen() -> None:
    """Guards the comparison above: were it blind, it would pass."""
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=io.StringIO().write).failed == 1
