"""The oldest tested versions are the oldest that the metadata allows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

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
