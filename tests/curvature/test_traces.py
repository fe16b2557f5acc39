"""Trace, Frobenius norm and diagonal against dense truth: values, and honest errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from problems import Batches, error
from spectra import (
    DEGENERATE,
    LEAST_COVERAGE,
    MATRICES,
    SPECTRA,
    check_seeds_and_operators,
    coverage,
    dense,
    softmax_regression,
)
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import diagonal, frobenius_norm, trace
from newtonopt.curvature.traces import Samples, student_factor


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "hutch++") for name in SPECTRA), ("outliers", "hutchinson"), ("flat", "hutchinson")]
)
def test_trace_is_within_two_standard_errors(name: str, method: Any) -> None:
    truth, products = float(SPECTRA[name].sum()), []

    def measure(seed: int) -> tuple[float, float]:
        found = trace(dense(MATRICES[name]), method, tolerance=2e-2, max_products=60, seed=seed)
        assert found.converged == (found.standard_error <= 2e-2 * abs(found.value))
        assert found.converged or found.products == 60
        products.append(found.products)
        return found.value, found.standard_error

    assert coverage(measure, truth, 30) >= LEAST_COVERAGE
    if method == "hutch++":
        assert sum(products) / 30 < 50


def test_hutch_plus_plus_needs_few_products_where_the_spectrum_has_outliers() -> None:
    A = dense(MATRICES["outliers"])
    sketched, plain = (trace(A, method, max_products=199) for method in ("hutch++", "hutchinson"))
    assert sketched.converged
    assert sketched.products <= 40
    assert not plain.converged
    assert A.products == sketched.products + plain.products


@pytest.mark.parametrize("name", SPECTRA)
def test_frobenius_norm_is_within_two_standard_errors(name: str) -> None:
    def measure(seed: int) -> tuple[float, float]:
        found = frobenius_norm(dense(MATRICES[name]), tolerance=3e-2, max_products=60, seed=seed)
        assert found.converged == (found.standard_error <= 3e-2 * found.value)
        return found.value, found.standard_error

    assert coverage(measure, float(SPECTRA[name].norm()), 30) >= LEAST_COVERAGE


@pytest.mark.parametrize("name", ["outliers", "slow"])
def test_diagonal_entries_are_within_their_standard_errors(name: str) -> None:
    A, truth = MATRICES[name], MATRICES[name].diagonal()
    held = []
    for seed in range(10):
        found = diagonal(dense(A), tolerance=0.3, max_products=150, seed=seed)
        held.append(((found.values - truth).abs() <= 2.0 * found.standard_errors).double().mean())
        assert found.converged == bool(found.standard_errors.norm() <= 0.3 * found.values.norm())
        assert found.converged or found.products == 150
    assert 0.85 <= float(torch.stack(held).mean()) <= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_the_budget_reaches_the_size(dtype: torch.dtype) -> None:
    values = SPECTRA["slow"]
    A = MATRICES["slow"].to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    t, f, d = trace(dense(A), max_products=200), frobenius_norm(dense(A)), diagonal(dense(A))
    assert (t.products, f.products, d.products) == (200,) * 3
    assert (t.standard_error, f.standard_error) == (0.0,) * 2
    assert not d.standard_errors.any()
    assert all(found.converged for found in (t, f, d))
    assert t.value == pytest.approx(float(values.sum()), rel=tolerance)
    assert f.value == pytest.approx(float(values.norm()), rel=tolerance)
    assert torch.equal(d.values, A.diagonal())


def test_softmax_regression_at_zero() -> None:
    """The Hessian is S (x) (I - 11'/C) / C, with the second moment S of the inputs [x; 1]."""
    evaluation, S = softmax_regression()
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        assert trace(A).value == pytest.approx(0.9 * float(S.trace()), rel=1e-6)
        assert frobenius_norm(A).value == pytest.approx(0.3 * float(S.norm()), rel=1e-6)
        expected = torch.cat([S.diagonal()[:4].repeat(10), S[4:, 4].repeat(10)]) * 0.09
        torch.testing.assert_close(diagonal(A).values, expected, rtol=1e-6, atol=0)


def test_linear_regression() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(30, 7).double(), torch.randn(30, 1).double()
    layer = nn.Linear(7, 1, bias=False).double()
    A = hessian(evaluate(lambda: F.mse_loss(layer(x), y), layer.parameters()))
    exact = 2.0 * x.T @ x / 30
    assert trace(A).value == pytest.approx(float(exact.trace()), rel=1e-6)
    torch.testing.assert_close(diagonal(A).values, exact.diagonal(), rtol=1e-6, atol=0)


def test_a_whole_data_set_equals_the_dense_truth() -> None:
    data = Batches()
    B = dense(hessian(evaluate(data.closure, data.params)).dense())
    A = hessian(evaluate(data.closure, data.params, products="streamed"))
    assert trace(A, max_products=14).value == pytest.approx(trace(B, max_products=14).value, rel=1e-8)
    assert frobenius_norm(A, max_products=4).value == pytest.approx(frobenius_norm(B, max_products=4).value, rel=1e-8)
    assert error(diagonal(A, max_products=4).values, diagonal(B, max_products=4).values) < 1e-8


@pytest.mark.parametrize("matrix", DEGENERATE)
def test_small_and_degenerate(matrix: Tensor) -> None:
    A = dense(matrix.double())
    for budget in (12, 100):
        t, f = trace(A, max_products=budget), frobenius_norm(A, max_products=budget)
        assert abs(t.value - float(matrix.double().trace())) <= 3.0 * t.standard_error + 1e-12
        assert abs(f.value - float(matrix.double().norm())) <= 3.0 * f.standard_error + 1e-12


@pytest.mark.parametrize(
    "measure",
    [
        lambda A, seed: trace(A, max_products=20, seed=seed).value,
        lambda A, seed: frobenius_norm(A, max_products=20, seed=seed).value,
        lambda A, seed: float(diagonal(A, max_products=20, seed=seed).values[0]),
    ],
    ids=["trace", "frobenius_norm", "diagonal"],
)
def test_seeds_and_operators(measure: Callable[[LinearOperator, int], float]) -> None:
    check_seeds_and_operators(measure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: trace(A, "exact"), r"method must be 'hutch\+\+' or 'hutchinson', got 'exact'"),
        (lambda A: trace(A, tolerance=0.0), r"tolerance must be in \(0, 1\), got 0.0"),
        (lambda A: trace(A, max_products=0), "max_products must be a whole number and at least 1, got 0"),
        (lambda A: frobenius_norm(A, tolerance=1.0), r"tolerance must be in \(0, 1\), got 1.0"),
        (lambda A: diagonal(A, max_products=2.5), "max_products must be a whole number and at least 1, got 2.5"),
    ],
)
def test_arguments_are_checked(call: Callable[[LinearOperator], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dense(MATRICES["slow"]))


def test_a_diagonal_prints_without_its_entries() -> None:
    assert len(repr(diagonal(dense(MATRICES["slow"])))) < 500


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_standard_errors_from_few_samples_are_widened_as_by_student(count: int) -> None:
    """The factor is the ratio of Student's quantile and the normal one, to the accuracy of its expansion."""
    expected = scipy.stats.t.ppf(0.975, count - 1) / 1.96 / math.sqrt(count - 1)
    assert student_factor(count) == pytest.approx(float(expected), rel={2: 0.7, 3: 0.15}.get(count, 0.02))
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Samples()
    for value in values.tolist():
        drawn.add(value)
    assert drawn.mean == pytest.approx(float(values.mean()))
    assert drawn.standard_error == pytest.approx(student_factor(count) * float(values.std(correction=0)))
