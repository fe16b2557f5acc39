"""Intervals of extreme eigenvalues: coverage, multiplicity, convergence; matrices and networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import build
from spectra import dense, diagonal, softmax_regression, uniform

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues
from newtonopt.curvature.eigenvalues import search
from newtonopt.curvature.eigenvalues.extreme import certify


def _spectra() -> dict[str, torch.Tensor]:
    outliers = torch.tensor([10.0, 7.0, 6.0, 4.4, 3.0, 2.5, -0.3, -0.2], dtype=torch.float64)
    return {
        "outliers": torch.cat([outliers, 0.3 * uniform(192) ** 4 - 0.02]),
        "negative": torch.cat([torch.tensor([-20.0, -5.0, 3.0, 2.9], dtype=torch.float64), uniform(150) - 0.5]),
        "clustered": torch.cat([5.0 - 1e-3 * uniform(6), uniform(150, 1), -1.0 - 1e-2 * uniform(4, 2)]),
        "slow": torch.arange(1, 200, dtype=torch.float64) ** -0.5,
        "uniform": torch.linspace(-1.0, 1.0, 150, dtype=torch.float64),
        "ninefold": torch.cat([torch.full((9,), 4.0, dtype=torch.float64), uniform(150, 3)]),
    }


SPECTRA = _spectra()


def _held(spectrum: Spectrum, truth: Sequence[float], doubt: float = 0.0) -> list[bool]:
    """Return whether each interval holds the eigenvalue of its rank, which is known up to the doubt."""
    ends = [*zip(spectrum.top, truth[::-1], strict=False), *zip(spectrum.bottom, truth, strict=False)]
    return [entry.lower - doubt <= exact <= entry.upper + doubt for entry, exact in ends]


def _coverage(values: torch.Tensor, runs: int, **arguments: float) -> np.ndarray:
    truth = values.sort().values.tolist()
    held = [_held(extreme_eigenvalues(diagonal(values), seed=seed, **arguments), truth) for seed in range(runs)]
    return np.mean(held, axis=0)


def _least(confidence: float, runs: int) -> float:
    """Return the confidence less three standard deviations of the binomial distribution."""
    return confidence - 3.0 * (confidence * (1.0 - confidence) / runs) ** 0.5


@pytest.mark.parametrize("confidence", [0.8, pytest.param(0.99, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "budget", [3, pytest.param(9, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SPECTRA)
def test_coverage_of_both_ends(name: str, budget: int, confidence: float) -> None:
    coverage = _coverage(SPECTRA[name], 200, top=1, bottom=1, confidence=confidence, max_products=budget)
    assert coverage.min() >= _least(confidence, 200)


@pytest.mark.parametrize("budget", [4, 25])
@pytest.mark.parametrize("name", SPECTRA)
def test_coverage_of_several(name: str, budget: int) -> None:
    runs = 40
    coverage = _coverage(SPECTRA[name], runs, top=3, bottom=2, confidence=0.8, max_products=budget, tolerance=1e-2)
    assert coverage.min() >= _least(0.8, runs)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [12, 60])
@pytest.mark.parametrize("name", SPECTRA)
def test_coverage_of_several_at_length(name: str, budget: int) -> None:
    coverage = _coverage(SPECTRA[name], 200, top=4, bottom=2, confidence=0.8, max_products=budget)
    assert coverage.min() >= _least(0.8, 200)


def test_coverage_fails_where_the_bound_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "component_floor", lambda size, failure: 0.5)
    coverage = _coverage(SPECTRA["slow"], 60, top=1, bottom=1, confidence=0.8, max_products=3)
    assert coverage.min() < _least(0.8, 60)


def test_small_failure_probability_is_not_paid_for_with_vacuous_bounds() -> None:
    values = SPECTRA["uniform"]
    spectrum = extreme_eigenvalues(diagonal(values), 1, 1, max_products=40)
    assert spectrum.top[0].upper < 1.1
    assert spectrum.bottom[0].lower > -1.1


@pytest.mark.parametrize("name", SPECTRA)
def test_converged_values_are_within_tolerance(name: str) -> None:
    values = SPECTRA[name]
    truth = values.sort().values.tolist()
    spectrum = extreme_eigenvalues(diagonal(values), top=5, bottom=2, max_products=1000)
    assert spectrum.converged
    assert all(_held(spectrum, truth))
    found = [e.value for e in (*spectrum.top, *spectrum.bottom)]
    np.testing.assert_allclose(found, [*truth[:-6:-1], *truth[:2]], rtol=1e-3)
    for entry in (*spectrum.top, *spectrum.bottom):
        assert entry.upper - entry.lower <= 1e-3 * abs(entry.value) + 1e-12
        assert entry.lower <= entry.value <= entry.upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_matrix_against_scipy(dtype: torch.dtype) -> None:
    matrix = torch.randn(120, 120, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    A = ((matrix + matrix.T) / 2).to(dtype)
    operator = dense(A)
    spectrum = extreme_eigenvalues(operator, top=4, bottom=3, max_products=600)
    truth = scipy.linalg.eigvalsh(A.double().numpy()).tolist()
    assert spectrum.converged
    # LAPACK's eigenvalues err by tens of rounding units, more than the narrowest of these intervals.
    assert all(_held(spectrum, truth, doubt=100.0 * 2.2e-16 * max(map(abs, truth))))
    assert operator.products == spectrum.products
    for entry in (*spectrum.top, *spectrum.bottom):
        assert entry.vector.dtype == dtype
        residual = float((A @ entry.vector - entry.value * entry.vector).norm())
        assert float(entry.vector.norm()) == pytest.approx(1.0, rel=1e-5)
        assert residual == pytest.approx(entry.residual, rel=1e-2, abs=2e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize(("top", "copies"), [(12, 9), (5, 5), (9, 9)])
def test_multiplicity_is_counted(top: int, copies: int) -> None:
    values = SPECTRA["ninefold"]
    spectrum = extreme_eigenvalues(diagonal(values), top=top, bottom=0, max_products=400)
    found = [entry.value for entry in spectrum.top]
    assert spectrum.converged
    assert sum(abs(value - 4.0) < 4e-3 for value in found) == copies
    np.testing.assert_allclose(found, values.sort(descending=True).values[:top], rtol=1e-3)
    basis = torch.stack([entry.vector for entry in spectrum.top])
    torch.testing.assert_close(basis @ basis.T, torch.eye(top, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_many_copies_of_every_eigenvalue_within_the_default_budget() -> None:
    # Softmax regression at zero weights: each eigenvalue of the second moment nine times, with a decay as on images.
    values = (0.73 * torch.arange(1, 66, dtype=torch.float64) ** -0.8).repeat_interleave(9).to(torch.float32)
    spectrum = extreme_eigenvalues(diagonal(values), top=12, bottom=0)
    assert spectrum.converged
    np.testing.assert_allclose([e.value for e in spectrum.top], values[:12], rtol=1e-3)
    assert spectrum.products <= 200


def test_residuals_that_merged_copies_have_raised_do_not_keep_a_run_from_ending() -> None:
    values = torch.cat([(10.0 * uniform(12, 3) ** 3).repeat_interleave(9), torch.zeros(12)])
    for seed in (1, 2, 7, 8):
        spectrum = extreme_eigenvalues(diagonal(values), top=11, bottom=0, tolerance=1e-2, seed=seed)
        assert spectrum.converged
        assert spectrum.products <= 120


def test_certification_costs_less_than_another_run() -> None:
    values = torch.cat([SPECTRA["outliers"], 0.3 * uniform(3000, 7) ** 4 - 0.02])
    assert extreme_eigenvalues(diagonal(values), top=3, bottom=0).products <= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(1, 1),
        torch.tensor([[-3.0]]),
        torch.tensor([[1.0, 2.0], [2.0, -1.0]]),
        torch.eye(2),
        torch.zeros(7, 7),
        torch.eye(7),
        torch.ones(7, 7),
        torch.diag(torch.tensor([1e6, 1.0, 1.0, 0.0, 0.0])),
        torch.diag(torch.tensor([2.0, 2.0, -3.0, -3.0, -3.0])),
    ],
    ids=["zero1", "one", "two", "eye2", "zero", "eye", "rank-one", "wide", "two-fold"],
)
def test_small_and_degenerate(matrix: torch.Tensor, dtype: torch.dtype) -> None:
    A = matrix.to(dtype)
    truth = scipy.linalg.eigvalsh(A.double().numpy()).tolist()
    for top, bottom in ((5, 2), (1, 1), (0, 1), (1, 0)):
        spectrum = extreme_eigenvalues(dense(A), top=top, bottom=bottom)
        assert spectrum.converged
        assert (len(spectrum.top), len(spectrum.bottom)) == (min(top, len(truth)), min(bottom, len(truth)))
        assert all(_held(spectrum, truth))


def test_whole_small_spectrum_needs_one_product_each() -> None:
    spectrum = extreme_eigenvalues(diagonal(torch.linspace(-1.0, 2.0, 9, dtype=torch.float64)), top=5, bottom=4)
    assert spectrum.converged
    assert spectrum.products == 9


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_budget_is_kept_and_admitted(budget: int) -> None:
    spectrum = extreme_eigenvalues(diagonal(SPECTRA["slow"]), max_products=budget)
    assert spectrum.products <= budget
    assert not spectrum.converged
    assert all(np.isfinite([e.lower, e.upper]).all() for e in (*spectrum.top, *spectrum.bottom))


def test_semi_definite_operator_bounds_below_at_zero() -> None:
    values = SPECTRA["slow"]
    assert extreme_eigenvalues(diagonal(values, psd=True), 1, 1, max_products=5).bottom[0].lower >= -1e-12
    assert extreme_eigenvalues(diagonal(values), 1, 1, max_products=5).bottom[0].lower < -1e-3


def test_seed_decides_and_global_random_state_stays() -> None:
    operator = diagonal(SPECTRA["outliers"])
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = extreme_eigenvalues(operator, seed=3, max_products=10)
    second = extreme_eigenvalues(operator, seed=3, max_products=10)
    other = extreme_eigenvalues(operator, seed=4, max_products=10)
    assert torch.equal(before, torch.get_rng_state())
    assert [e.upper for e in first.top] == [e.upper for e in second.top]
    assert torch.equal(first.top[0].vector, second.top[0].vector)
    assert first.top[0].upper != other.top[0].upper


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": -1}, "top must be a whole number and at least 0, got -1"),
        ({"bottom": -2}, "bottom must be a whole number and at least 0, got -2"),
        ({"max_products": 0}, "max_products must be a whole number and at least 1, got 0"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"seed": "a"}, "seed must be a whole number from 0 to 2\\*\\*64 - 1, got 'a'"),
        ({"max_products": True}, "max_products must be a whole number and at least 1, got True"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extreme_eigenvalues(diagonal(SPECTRA["slow"]), **arguments)


def test_an_evaluation_is_no_operator() -> None:
    with pytest.raises(TypeError, match=r"operator must be a LinearOperator, got .*Write hessian\(evaluation\)"):
        extreme_eigenvalues(torch.eye(3))  # type: ignore[arg-type]


def test_rectangular_and_infinite_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="must be square"):
        extreme_eigenvalues(LinearOperator(lambda v: v, (3, 4), torch.zeros(0)))
    with pytest.raises(FloatingPointError, match="loss and gradient are finite"):
        extreme_eigenvalues(diagonal(torch.tensor([1.0, float("nan"), 2.0])))


def test_a_tiny_end_does_not_use_up_the_budget() -> None:
    values = torch.cat([torch.arange(1, 301).double() ** -1.5, torch.zeros(2000).double()])
    spectrum = extreme_eigenvalues(diagonal(values, psd=True), top=3, bottom=1, tolerance=1e-2)
    assert spectrum.converged
    assert spectrum.products <= 40
    assert spectrum.bottom[0].lower == pytest.approx(0.0, abs=1e-12)
    assert 0.0 <= spectrum.bottom[0].upper <= 1e-4
    # Above the tolerance times the norm widths stay relative.
    assert all(e.upper - e.lower <= 1e-2 * e.value for e in spectrum.top)


def test_multiplicity_is_what_was_seen() -> None:
    spectrum = extreme_eigenvalues(diagonal(SPECTRA["ninefold"]), top=10, bottom=1)
    assert [e.multiplicity for e in spectrum.top] == [9] * 9 + [1]
    assert spectrum.bottom[0].multiplicity == 1
    assert [e.multiplicity for e in extreme_eigenvalues(diagonal(SPECTRA["slow"]), top=3, bottom=0).top] == [1, 1, 1]


@pytest.mark.parametrize("budget", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", [("mlp", "cross_entropy"), ("conv", "mse"), ("words", "cross_entropy")], ids="-".join)
def test_intervals_contain_the_truth_as_often_as_they_say(pair: tuple[str, str], budget: int) -> None:
    case = build(*pair)
    matrix = hessian(evaluate(case.closure, case.params)).dense()
    values = torch.linalg.eigvalsh(matrix)
    hits, exact = [], []
    for seed in range(200):
        spectrum = extreme_eigenvalues(dense(matrix), top=1, bottom=1, confidence=0.9, max_products=budget, seed=seed)
        for found, truth in ((spectrum.top[0], float(values[-1])), (spectrum.bottom[0], float(values[0]))):
            hits.append(found.lower <= truth <= found.upper)
            if spectrum.converged:
                exact.append(abs(found.value - truth) <= 1e-3 * abs(truth))
    assert sum(hits) / len(hits) >= 0.9
    assert budget == 8 or sum(exact) / len(exact) >= 0.9


def test_signs_are_right_where_the_most_negative_is_the_larger() -> None:
    theta = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0, 1.0, -9.0], dtype=torch.float64)
    spectrum = extreme_eigenvalues(hessian(evaluate(lambda: (scale * theta**2).sum() / 2, [theta])), top=1, bottom=1)
    assert spectrum.top[0].value == pytest.approx(2.0, rel=1e-9)
    assert spectrum.bottom[0].value == pytest.approx(-9.0, rel=1e-9)


def test_softmax_regression_at_zero_has_every_eigenvalue_nine_times() -> None:
    evaluation, S = softmax_regression()
    exact = torch.linalg.eigvalsh(S).flip(0) / 10
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        spectrum = extreme_eigenvalues(A, top=12, bottom=0, max_products=300)
        found = torch.tensor([e.value for e in spectrum.top]).double()
        torch.testing.assert_close(found, torch.cat([exact[0].repeat(9), exact[1].repeat(3)]), rtol=1e-3, atol=0)
        assert spectrum.converged


@pytest.mark.parametrize(("vectors", "words"), [(51, "and at least 52, got 51"), (60.0, "a whole number")])
def test_the_bound_on_vectors_is_checked(vectors: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"max_vectors must be .*{words}"):
        extreme_eigenvalues(diagonal(SPECTRA["slow"]), max_vectors=vectors)


def test_a_spectrum_prints_without_its_vectors() -> None:
    spectrum = extreme_eigenvalues(diagonal(SPECTRA["slow"]), top=1, bottom=1)
    assert len(repr(spectrum)) < 500
    assert repr(spectrum).startswith(f"Spectrum(top=({spectrum.top[0].value:.4g} in [")


def test_spare_eigenvalues_come_with_the_products_of_the_wanted_ones() -> None:
    values = torch.cat([torch.tensor([9.0, 8.0, -4.0]).double(), uniform(200)])
    alone = extreme_eigenvalues(diagonal(values), top=1, bottom=0, tolerance=1e-2)
    found = certify(diagonal(values), 1, 0, 1e-2, 300, 0, spare=1)
    assert found.certified and found.converged
    assert found.products == alone.products
    assert found.top[0].value == alone.top[0].value
    assert all(entry.lower <= exact <= entry.upper for entry, exact in zip(found.top, (9.0, 8.0), strict=True))
    assert len(certify(diagonal(values[:1]), 1, 0, 1e-2, 300, 0, spare=1).top) == 1
