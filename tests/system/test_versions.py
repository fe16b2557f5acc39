"""The oldest tested versions are the oldest that the metadata allows, and the pins suit every supported Python."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def lower_bounds(project: dict[str, Any]) -> dict[str, str]:
    """Return the version after `>=` of each package that the project requires, extras included."""
    found = {}
    for requirements in [project["dependencies"], *project["optional-dependencies"].values()]:
        for requirement in map(Requirement, requirements):
            if requirement.name != project["name"]:
                [specifier] = requirement.specifier
                assert specifier.operator == ">=", requirement
                found[requirement.name] = specifier.version
    return found


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert dict(pins) == lower_bounds(project)


def test_the_extras_for_plots_and_the_command_line_are_those_of_the_examples() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (plots,), (cli,) = extras["plots"], extras["cli"]
    assert Requirement(plots).name == "matplotlib"
    assert (Requirement(cli).name, Requirement(cli).extras) == ("jsonargparse", {"signatures"})
    assert Requirement(extras["examples"][0]).extras == {"lightning", "plots", "cli"}


def pins_for_others(pins: Iterable[str], supported: Iterable[str], needs: Callable[[Requirement], str]) -> list[str]:
    """Return the pins that apply to a supported Python on which the pinned version cannot be installed.

    Args:
        pins: Lines of a file of constraints.
        supported: Python versions such as "3.10".
        needs: Returns the Python versions that a pinned version needs, as in ">=3.11".
    """
    return [
        f"{pin}: {needs(pinned)}"
        for pin, pinned in ((pin, Requirement(pin)) for pin in pins)
        for python in supported
        if (pinned.marker is None or pinned.marker.evaluate({"python_version": python}))
        and f"{python}.99" not in SpecifierSet(needs(pinned))  # the last patch
    ]


def installed_needs(pinned: Requirement) -> str:
    """Return the Python versions that a pinned version needs, if that version is installed here; else none."""
    try:
        found = importlib.metadata.distribution(pinned.name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return found.metadata.get("Requires-Python", "") if found.version in pinned.specifier else ""


def test_every_supported_python_can_install_the_pins() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    supported = re.findall(r"Python :: (3\.\d+)", " ".join(classifiers))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    if not any(installed_needs(Requirement(pin)) for pin in pins):
        pytest.skip("no pinned version is installed, and only installed ones tell which Pythons they need")
    assert pins_for_others(pins, supported, installed_needs) == []


def test_a_pin_that_a_supported_python_cannot_install_is_seen() -> None:
    pins = ["a==2", 'b==2; python_version >= "3.11"', 'c==1; python_version < "3.11"']
    needs = {"a": ">=3.11", "b": ">=3.11.5", "c": ">=3.9"}
    assert pins_for_others(pins, ["3.10", "3.11"], lambda pinned: needs[pinned.name]) == ["a==2: >=3.11"]
