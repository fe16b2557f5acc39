"""The worked examples for contributors run, and pass the tests that they show."""

from __future__ import annotations

import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Tests for which the optimizer would have to stand in the library's own lists.
BATTERY = [
    *("tests/optimizers", "tests/system/test_invariants.py", "tests/system/test_calls.py"),
    *("tests/system/test_torch_interface.py", "tests/system/test_torch_battery.py"),
]


def programs(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "contributing" / f"{name}.md").read_text(), re.DOTALL)


def pytest_of(folder: Path, *arguments: str) -> str:
    """Return what pytest prints for arguments, with the programs of a folder and the helpers of the tests at hand."""
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(("name", "module"), [("new_optimizer", "subspace_newton"), ("new_measurement", "stable_rank")])
def test_the_program_of_a_page_passes_its_own_test(name: str, module: str, tmp_path: Path) -> None:
    program, test, *_ = programs(name)
    names: dict[str, object] = {"__name__": module}
    (tmp_path / f"{module}.py").write_text(program)
    sys.path.insert(0, str(tmp_path))
    try:
        exec(f"from {module} import *", names)
        made = sys.modules[module]
        runner = doctest.DocTestRunner(verbose=False)
        written = io.StringIO()
        for example in doctest.DocTestFinder(exclude_empty=True).find(made, module):
            assert runner.run(example, out=written.write).failed == 0, written.getvalue()
        assert runner.tries > 3
        (kind,) = re.findall(r"^class ([A-Z]\w+)\((?:NewtonOptimizer|Measurement)\[", program, re.MULTILINE)
        (tmp_path / "test_it.py").write_text(f"from {module} import {kind}\n{test}")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop(module, None)
    assert " passed" in pytest_of(tmp_path, str(tmp_path / "test_it.py"))


@pytest.mark.slow
def test_the_new_optimizer_passes_the_battery(tmp_path: Path) -> None:
    program, _, line = programs("new_optimizer")
    (tmp_path / "subspace_newton.py").write_text(program)
    plugin = f"from optimizer_db import OPTIMIZERS, _with\nfrom subspace_newton import SubspaceNewton\n{line}"
    (tmp_path / "new_line.py").write_text(plugin)
    printed = pytest_of(tmp_path, "-p", "new_line", "-k", "subspace_newton", *BATTERY)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 50
