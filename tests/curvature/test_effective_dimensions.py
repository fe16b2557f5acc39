"""Effective dimensions against dense truth: values, and honest errors."""

from __future__ import annotations

import math

import pytest
import torch
from problems import build
from spectra import (
    DEGENERATE,
    LEAST_COVERAGE,
    MATRICES,
    SPECTRA,
    check_seeds_and_operators,
    coverage,
    dense,
    softmax_eigenvalues,
    softmax_regression,
)
from torch import Tensor

from newtonopt import LinearOperator, evaluate, gauss_newton
from newtonopt.curvature import effective_dimension


@pytest.mark.parametrize("name", ["slow", "fast"])
def test_effective_dimension_is_within_its_errors(name: str) -> None:
    values, damping = SPECTRA[name], 0.1
    truth = float((values / (values + damping)).sum())

    def measure(seed: int) -> tuple[float, float]:
        found = effective_dimension(dense(MATRICES[name]), damping, tolerance=0.1, max_products=190, seed=seed)
        assert found.converged == (found.standard_error + found.truncation <= 0.1 * found.value)
        assert found.damping == damping
        assert found.truncation <= 0.02 * found.value
        return found.value, found.standard_error + 0.5 * found.truncation

    assert coverage(measure, truth, 16) >= LEAST_COVERAGE


def test_effective_dimension_of_a_cut_run_is_bounded() -> None:
    """One run of a few steps: its quadrature bounds hold the value for its own start vector."""
    A, starts = MATRICES["slow"], []

    def product(v: Tensor) -> Tensor:
        starts.append(v)
        return A @ v

    for budget in range(1, 12):
        starts.clear()
        found = effective_dimension(LinearOperator(product, (200, 200), A), 1e-3, 1e-3, max_products=budget)
        v = starts[0]
        exact = 200.0 * float(v @ torch.linalg.solve(A + 1e-3 * torch.eye(200).double(), A @ v))
        assert abs(found.value - exact) <= found.truncation
        assert not found.converged
        assert found.standard_error == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_the_budget_reaches_the_size(dtype: torch.dtype) -> None:
    values = SPECTRA["slow"]
    found = effective_dimension(dense(MATRICES["slow"].to(dtype)), 0.1)
    assert (found.products, found.standard_error, found.truncation, found.converged) == (200, 0.0, 0.0, True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.value == pytest.approx(float((values / (values + 0.1)).sum()), rel=tolerance)


def test_softmax_regression_at_zero() -> None:
    evaluation, S = softmax_regression()
    exact = softmax_eigenvalues(S)
    G = gauss_newton(evaluation)
    dimension = float((exact / (exact + 0.01)).sum())
    assert effective_dimension(G, 0.01).value == pytest.approx(dimension, rel=1e-6)
    # Five distinct eigenvalues and zero: six products make a run exact, whatever the multiplicities.
    few = effective_dimension(G, 0.01, tolerance=1e-6, max_products=49)
    assert few.truncation <= 1e-9 < few.standard_error
    assert abs(few.value - dimension) <= 3.0 * few.standard_error


def test_effective_dimension_of_a_network_equals_the_dense_truth() -> None:
    case = build("mlp", "cross_entropy")
    G = gauss_newton(evaluate(case.closure, case.params))
    values = torch.linalg.eigvalsh(case.dense_gauss_newton()).clamp_min(0)
    assert effective_dimension(G, 0.1).value == pytest.approx(float((values / (values + 0.1)).sum()), rel=1e-9)


@pytest.mark.parametrize("matrix", DEGENERATE)
def test_small_and_degenerate(matrix: Tensor) -> None:
    for budget in (12, 100):
        assert effective_dimension(dense(matrix.double()), 1.0, max_products=budget).products <= budget


def test_seeds_and_operators() -> None:
    check_seeds_and_operators(lambda A, seed: effective_dimension(A, 0.1, max_products=40, seed=seed).value)


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (0.0, "damping must be positive and finite, got 0.0"),
        (1e-15, "damping must be above the rounding error of the eigenvalues"),
    ],
)
def test_the_damping_is_checked(damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effective_dimension(dense(MATRICES["slow"]), damping)


@pytest.mark.parametrize("budget", [30, 300])
def test_effective_dimension_refuses_negative_eigenvalues(budget: int) -> None:
    with pytest.raises(ValueError, match=r"an eigenvalue at or below -.*Write gauss_newton"):
        effective_dimension(dense(MATRICES["outliers"]), 0.1, max_products=budget)
