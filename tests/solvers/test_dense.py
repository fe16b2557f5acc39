"""Dense solves against NumPy's and SciPy's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from newtonopt.solvers.dense import solve_absolute, solve_clamped, solve_shifted
from newtonopt.solvers.solution import Solution

Solve = Callable[[Tensor, Tensor, float], Solution]

SPECTRA = {
    "definite": [0.5, 1.0, 2.0, 5.0, 9.0],
    "indefinite": [-3.0, -0.2, 0.1, 1.0, 4.0],
    "negative": [-5.0, -2.0, -1.0, -0.5, -0.1],
    "singular": [0.0, 0.0, 0.0, 1.0, 2.0],
}


def problem(spectrum: str) -> tuple[Tensor, Tensor]:
    Q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    A = (Q * torch.tensor(SPECTRA[spectrum], dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2, torch.randn(5, dtype=torch.float64)


def model_decrease(A: Tensor, g: Tensor, s: Tensor) -> float:
    return float(-(g @ s + s @ A @ s / 2))


@pytest.mark.parametrize("spectrum", ["definite", "singular"])
@pytest.mark.parametrize("damping", [0.1, 7.0])
def test_shifted_solve_is_the_damped_one_where_that_is_definite(spectrum: str, damping: float) -> None:
    A, g = problem(spectrum)
    solution = solve_shifted(A, g, damping)
    damped = A + damping * torch.eye(5, dtype=torch.float64)
    np.testing.assert_allclose(solution.step, scipy.linalg.solve(damped, -g, assume_a="pos"), rtol=1e-10)
    assert solution.decrease == pytest.approx(model_decrease(damped, g, solution.step), rel=1e-10)
    assert solution.reason == "Cholesky"


@pytest.mark.parametrize("spectrum", ["indefinite", "negative"])
def test_shifted_matrix_has_the_damping_for_its_lowest_eigenvalue(spectrum: str) -> None:
    A, g = problem(spectrum)
    solution = solve_shifted(A, g, 0.05)
    shifted = A + (0.05 - SPECTRA[spectrum][0]) * torch.eye(5, dtype=torch.float64)
    assert scipy.linalg.eigvalsh(shifted)[0] == pytest.approx(0.05)
    np.testing.assert_allclose(solution.step, np.linalg.solve(shifted, -g), rtol=1e-10)
    assert solution.decrease == pytest.approx(model_decrease(shifted, g, solution.step), rel=1e-10)
    assert solution.decrease > 0
    assert solution.reason == "shifted past the lowest eigenvalue"


def test_damping_that_lifts_the_lowest_eigenvalue_is_not_raised() -> None:
    A, g = problem("indefinite")
    damped = A + 3.5 * torch.eye(5, dtype=torch.float64)
    np.testing.assert_allclose(solve_shifted(A, g, 3.5).step, np.linalg.solve(damped, -g), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solve", [solve_shifted, solve_absolute, solve_clamped])
def test_damping_below_rounding_survives_a_singular_matrix(solve: Solve, dtype: torch.dtype) -> None:
    """No factorisation fails if the damping is below the rounding of the eigenvalues."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        J = torch.randn(5, 30, generator=generator, dtype=torch.float64)
        gradient = J.T @ torch.randn(5, generator=generator, dtype=torch.float64)
        solution = solve((J.T @ J).to(dtype), gradient.to(dtype), 1e-16)
        assert bool(torch.isfinite(solution.step).all())
        assert solution.decrease > 0
        # Rounding along directions without curvature is not divided by the damping.
        assert float(solution.step.norm()) < 1e5 * float((torch.linalg.pinv(J.T @ J, rtol=1e-8) @ gradient).norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [0.01, 2.0])
def test_absolute_solve_takes_the_matrix_by_absolute_value(spectrum: str, damping: float) -> None:
    A, g = problem(spectrum)
    solution = solve_absolute(A, g, damping)
    absolute = torch.tensor(scipy.linalg.sqrtm((A @ A).numpy()).real) + damping * torch.eye(5, dtype=torch.float64)
    np.testing.assert_allclose(solution.step, np.linalg.solve(absolute, -g), rtol=1e-5)
    assert solution.decrease == pytest.approx(model_decrease(absolute, g, solution.step), rel=1e-5)
    assert float(g @ solution.step) < 0
    assert solution.iterations == 1


@pytest.mark.parametrize(("spectrum", "reason"), [("definite", "positive definite"), ("indefinite", "absolute value")])
def test_absolute_solve_says_what_it_met(spectrum: str, reason: str) -> None:
    assert reason in solve_absolute(*problem(spectrum), 0.1).reason
    A, g = problem("definite")
    np.testing.assert_allclose(solve_absolute(A, g, 0.1).step, solve_shifted(A, g, 0.1).step, rtol=1e-10)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [0.01, 0.7, 20.0])
def test_clamped_solve_raises_low_eigenvalues_to_the_damping(spectrum: str, damping: float) -> None:
    A, g = problem(spectrum)
    values, vectors = np.linalg.eigh(A.numpy())
    clamped = torch.tensor((vectors * np.maximum(values, damping)) @ vectors.T)
    solution = solve_clamped(A, g, damping)
    np.testing.assert_allclose(solution.step, np.linalg.solve(clamped, -g), rtol=1e-8)
    assert solution.decrease == pytest.approx(model_decrease(clamped, g, solution.step), rel=1e-8)
    none_is_lower = min(SPECTRA[spectrum]) > damping
    assert solution.reason.startswith("no eigenvalue" if none_is_lower else "low eigenvalues")


@pytest.mark.parametrize("solve", [solve_shifted, solve_absolute, solve_clamped])
def test_no_eigenvectors_where_there_is_nothing_to_change_and_one_set_for_all_dampings(solve: Any) -> None:
    calls = []

    def eigh(A: Tensor) -> Any:
        calls.append(A)
        return torch.linalg.eigh(A)

    A, g = problem("definite")
    solve(A, g, 0.1, eigh=eigh)
    assert calls == []
    A, g = problem("indefinite")
    cached = functools.cache(eigh)
    for damping in (0.1, 0.15, 0.2):
        solve(A, g, damping, eigh=cached)
    assert len(calls) == 1


@pytest.mark.parametrize("solve", [solve_shifted, solve_absolute, solve_clamped])
def test_saddle_is_left_along_its_negative_direction(solve: Solve) -> None:
    A, g = torch.diag(torch.tensor([2.0, -1.0]).double()), torch.tensor([1.0, 0.01]).double()
    step = solve(A, g, 0.5).step
    assert step[1] < 0
    assert float(g @ step) < 0
