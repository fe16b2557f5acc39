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
