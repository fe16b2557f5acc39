"""Every public name says in its docstring what to look at next, and all of that exists."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from houses import ROOT, public_names

NAMES = sorted(public_names())


def _docstring(qualified: str) -> str:
    module, _, name = qualified.rpartition(".")
    # Python removes the indentation itself from 3.13 on.
    return inspect.cleandoc(getattr(importlib.import_module(module), name).__doc__ or "")


def _entries(docstring: str) -> list[str]:
    """Return the entries of a docstring's "See Also" section, one line each."""
    section = docstring.partition("\nSee Also:\n")[2]
    return [" ".join(entry.split()) for entry in re.split(r"^ +- ", section, flags=re.MULTILINE)[1:]]


def _exists(target: str, names: list[str]) -> bool:
    """Return whether a target is a page, a public name, or a member of one."""
    if target.startswith("docs/"):
        return (ROOT / target).is_file()
    name, _, member = target.removesuffix("()").partition(".")
    public = [qualified for qualified in names if qualified.rpartition(".")[2] == name]
    if not public:
        return False
    module = public[0].rpartition(".")[0]
    thing = getattr(importlib.import_module(module), name)
    is_called = target.endswith("()")
    return (not member or hasattr(thing, member)) and is_called == (bool(member) or not isinstance(thing, type))


@pytest.mark.parametrize("qualified", NAMES)
def test_every_public_name_points_to_its_neighbours(qualified: str) -> None:
    entries = _entries(_docstring(qualified))
    assert len(entries) >= 2, f"the docstring of {qualified} has no See Also section with two entries"
    for entry in entries:
        targets, _, said = entry.partition(": ")
        assert re.fullmatch(r".+[.]", said), f"{entry!r} must say what is there, in one sentence"
        for target in targets.split(", "):
            assert target.startswith("`"), entry
            assert _exists(target.strip("`"), NAMES), f"{target} is no page and no public name"
            assert target.strip("`").removesuffix("()") != qualified.rpartition(".")[2], f"{qualified} points to itself"


@pytest.mark.parametrize("target", ["docs/nothing.md", "Nothing", "nothing()", "Spectrum()", "trace", "Spectrum.no()"])
def test_what_does_not_exist_is_seen(target: str) -> None:
    """Guards the test above."""
    assert not _exists(target, NAMES)
