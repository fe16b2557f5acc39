"""NIST's regression problems are read as NIST published them, and every method finds the certified parameters."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in (BENCHMARKS / "nist").glob("*.dat"))
# The certified parameters of Lanczos1 fit to thirteen digits, more than the eleven that they are given to.
EXACT_FIT = "Lanczos1"


@pytest.fixture(scope="module")
def programs() -> SimpleNamespace:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(
            nist=importlib.import_module("nist_problems"), regression=importlib.import_module("regression")
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_all_problems_are_there(programs: SimpleNamespace) -> None:
    assert len(NAMES) == 27
    assert sorted(problem.name for problem in programs.nist.problems()) == NAMES
    levels = [problem.level for problem in programs.nist.problems()]
    assert levels == ["Lower"] * 8 + ["Average"] * 11 + ["Higher"] * 8


@pytest.mark.parametrize("name", NAMES)
def test_the_certified_parameters_leave_the_certified_residual(programs: SimpleNamespace, name: str) -> None:
    problem = programs.nist.read(name)
    residuals = problem.model(np, problem.x, *problem.certified) - problem.y
    squares = float(residuals @ residuals)
    if name == EXACT_FIT:
        assert problem.squares == 1.4307867721e-25
        assert squares < 1e-20
    else:
        # NIST gives eleven digits; the certified parameters are rounded too.
        assert abs(squares / problem.squares - 1) < 2e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_certified_deviations_follow_from_the_jacobian(programs: SimpleNamespace, name: str) -> None:
    problem = programs.nist.read(name)
    x = torch.from_numpy(problem.x)

    def values(b: torch.Tensor) -> torch.Tensor:
        return problem.model(torch, x, *b)

    jacobian = torch.func.jacrev(values)(torch.from_numpy(problem.certified)).numpy()
    observations, parameters = jacobian.shape
    # Columns of norm one, because parameters differ by many powers of ten.
    norms = np.linalg.norm(jacobian, axis=0)
    inverse = np.linalg.inv(np.linalg.qr(jacobian / norms)[1])
    deviations = np.sqrt(problem.squares / (observations - parameters) * (inverse**2).sum(axis=1)) / norms
    np.testing.assert_allclose(deviations, problem.deviations, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_numpy_agree_at_both_starts(programs: SimpleNamespace, name: str) -> None:
    problem = programs.nist.read(name)
    assert len(problem.starts) == 2
    for start in problem.starts:
        values = problem.model(torch, torch.from_numpy(problem.x), *torch.from_numpy(start)).numpy()
        np.testing.assert_allclose(values, problem.model(np, problem.x, *start), rtol=1e-12, atol=1e-300)


def test_digits_are_those_of_the_worst_parameter(programs: SimpleNamespace) -> None:
    certified = np.array([1.0, -1e-9, 1e6])
    assert programs.nist.digits(certified * (1 + np.array([1e-8, 1e-4, 0.0])), certified) == pytest.approx(4.0)
    assert programs.nist.digits(certified, certified) == 11.0
    assert programs.nist.digits(certified * (1 + 1e-14), certified) == 11.0
    assert programs.nist.digits(certified * 30, certified) == 0.0
    assert programs.nist.digits(np.array([1.0, np.nan, 1.0]), certified) == 0.0


def test_a_file_that_lacks_observations_is_refused(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (BENCHMARKS / "nist" / "BoxBOD.dat").read_text().splitlines()
    (tmp_path / "BoxBOD.dat").write_text("\n".join(lines[:-1]) + "\n")
    monkeypatch.setattr(programs.nist, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"BoxBOD\.dat must have 2 parameters and 6 observations, got 2 and 5\."):
        programs.nist.read("BoxBOD")


def test_every_method_finds_the_certified_parameters(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "regression.json"
    monkeypatch.setattr(sys, "argv", ["regression.py", "--problems", "DanWood", "--output", str(output)])
    programs.regression.main()
    record = json.loads(output.read_text())
    assert record["torch"] == torch.__version__
    assert record["scipy"] == scipy.__version__
    found = {(fit["start"], fit["method"]): fit for fit in record["fits"]}
    assert found.keys() == {(start, method) for start in (1, 2) for method in programs.regression.METHODS}
    for fit in found.values():
        assert fit["digits"] > 6
        assert fit["squares"] == pytest.approx(1.0, abs=1e-9)
        assert 1 <= fit["steps"] < fit["evaluations"] < 1000
    printed = capsys.readouterr().out
    assert "DanWood, 2" in printed
    assert printed.count("2 of 2") == len(programs.regression.METHODS)


def test_the_best_fit_of_the_spectrum_is_a_minimum(programs: SimpleNamespace) -> None:
    problem = programs.regression.spectrum()
    assert problem.y.shape == (1000,)
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)

    def half_squares(b: torch.Tensor) -> torch.Tensor:
        return (problem.model(torch, x, *b) - y).square().sum() / 2

    best = torch.from_numpy(problem.certified)
    gradient, hessian = torch.func.grad(half_squares)(best), torch.func.hessian(half_squares)(best)
    assert torch.linalg.eigvalsh(hessian).min() > 0
    # The Newton step to the minimum is shorter than the seventh digit.
    assert (torch.linalg.solve(hessian, gradient) / best).abs().max() < 1e-7
    assert problem.squares == pytest.approx(1000 * 0.01**2, rel=0.2)
    for start in problem.starts:
        assert half_squares(torch.from_numpy(start)) > 10 * problem.squares
