"""Trace, Frobenius norm, diagonal, effective dimension and density against dense truth: values, and honest errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Batches, build, error
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import diagonal, effective_dimension, frobenius_norm, spectral_density, trace


def _uniform(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SPECTRA = {
    "outliers": torch.cat([torch.tensor([50.0, 20.0, 10.0, 8.0, -2.0]).double(), 0.3 * _uniform(195) ** 6]),
    "slow": torch.arange(1, 201).double() ** -0.5,
    "flat": 0.5 + _uniform(200),
    "fast": torch.arange(1, 201).double() ** -2.0,
    "nine-fold": torch.cat([torch.full((9,), 4.0).double(), 0.1 * _uniform(191)]),
}


def _matrix(values: Tensor) -> Tensor:
    n = values.shape[0]
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Q = torch.linalg.qr(noise).Q
    return (Q * values) @ Q.T


MATRICES = {name: _matrix(values) for name, values in SPECTRA.items()}


def _operator(matrix: Tensor, psd: bool = False) -> LinearOperator:
    return LinearOperator(lambda v: matrix @ v, (matrix.shape[0], matrix.shape[0]), matrix, psd=psd)


def _coverage(measure: Callable[[int], tuple[float, float]], truth: float, runs: int) -> float:
    """How often the truth is within two standard errors."""
    found = [measure(seed) for seed in range(runs)]
    return sum(abs(value - truth) <= 2.0 * doubt for value, doubt in found) / runs


# Of 95 % for normal errors: those here are skewed, and to stop on an estimated error is to prefer small estimates.
LEAST_COVERAGE = 0.83


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "hutch++") for name in SPECTRA), ("outliers", "hutchinson"), ("flat", "hutchinson")]
)
def test_trace_is_within_two_standard_errors(name: str, method: Any) -> None:
    truth, products = float(SPECTRA[name].sum()), []

    def measure(seed: int) -> tuple[float, float]:
        found = trace(_operator(MATRICES[name]), method, tolerance=2e-2, max_products=60, seed=seed)
        assert found.converged == (found.standard_error <= 2e-2 * abs(found.value))
        assert found.converged or found.products == 60
        products.append(found.products)
        return found.value, found.standard_error

    assert _coverage(measure, truth, 30) >= LEAST_COVERAGE
    if method == "hutch++":
        assert sum(products) / 30 < 50


def test_hutch_plus_plus_needs_few_products_where_the_spectrum_has_outliers() -> None:
    A = _operator(MATRICES["outliers"])
    sketched, plain = (trace(A, method, max_products=199) for method in ("hutch++", "hutchinson"))
    assert sketched.converged
    assert sketched.products <= 40
    assert not plain.converged
    assert A.products == sketched.products + plain.products


@pytest.mark.parametrize("name", SPECTRA)
def test_frobenius_norm_is_within_two_standard_errors(name: str) -> None:
    def measure(seed: int) -> tuple[float, float]:
        found = frobenius_norm(_operator(MATRICES[name]), tolerance=3e-2, max_products=60, seed=seed)
        assert found.converged == (found.standard_error <= 3e-2 * found.value)
        return found.value, found.standard_error

    assert _coverage(measure, float(SPECTRA[name].norm()), 30) >= LEAST_COVERAGE


@pytest.mark.parametrize("name", ["outliers", "slow"])
def test_diagonal_entries_are_within_their_standard_errors(name: str) -> None:
    A, truth = MATRICES[name], MATRICES[name].diagonal()
    held = []
    for seed in range(10):
        found = diagonal(_operator(A), tolerance=0.3, max_products=150, seed=seed)
        held.append(((found.values - truth).abs() <= 2.0 * found.standard_errors).double().mean())
        assert found.converged == bool(found.standard_errors.norm() <= 0.3 * found.values.norm())
        assert found.converged or found.products == 150
    assert 0.85 <= float(torch.stack(held).mean()) <= 0.99


@pytest.mark.parametrize("name", ["slow", "fast"])
def test_effective_dimension_is_within_its_errors(name: str) -> None:
    values, damping = SPECTRA[name], 0.1
    truth = float((values / (values + damping)).sum())

    def measure(seed: int) -> tuple[float, float]:
        found = effective_dimension(_operator(MATRICES[name]), damping, tolerance=0.1, max_products=190, seed=seed)
        assert found.converged == (found.standard_error + found.truncation <= 0.1 * found.value)
        assert found.damping == damping
        assert found.truncation <= 0.02 * found.value
        return found.value, found.standard_error + 0.5 * found.truncation

    assert _coverage(measure, truth, 16) >= LEAST_COVERAGE


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
    A = MATRICES["slow"].to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    t, f, d = trace(_operator(A), max_products=200), frobenius_norm(_operator(A)), diagonal(_operator(A))
    e, s = effective_dimension(_operator(A), 0.1), spectral_density(_operator(A), steps=100, starts=2)
    assert (t.products, f.products, d.products, e.products, s.products) == (200,) * 5
    assert (t.standard_error, f.standard_error, e.standard_error, e.truncation) == (0.0,) * 4
    assert not d.standard_errors.any()
    assert all(found.converged for found in (t, f, d, e))
    assert t.value == pytest.approx(float(values.sum()), rel=tolerance)
    assert f.value == pytest.approx(float(values.norm()), rel=tolerance)
    assert e.value == pytest.approx(float((values / (values + 0.1)).sum()), rel=tolerance)
    assert torch.equal(d.values, A.diagonal())
    assert s.exact
    torch.testing.assert_close(s.nodes, values.flip(0), rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(s.weights, torch.full((200,), 1 / 200, dtype=torch.float64))


def test_density_matches_the_moments_of_its_starts() -> None:
    A, starts, steps = MATRICES["flat"], [], 4

    def product(v: Tensor) -> Tensor:
        starts.append(v)
        return A @ v

    found = spectral_density(LinearOperator(product, (200, 200), A), steps=steps, starts=3)
    assert (found.products, len(found.nodes), found.exact) == (12, 12, False)
    for run in range(3):
        mine = found.runs == run
        v = starts[run * steps]
        for power in range(2 * steps):
            moment = 3.0 * float((found.weights[mine] * found.nodes[mine] ** power).sum())
            exact = float(v @ torch.linalg.matrix_power(A, power) @ v)
            assert moment == pytest.approx(exact, rel=1e-10, abs=1e-14), power
    wrong = 3.0 * float((found.weights[mine] * found.nodes[mine] ** (2 * steps)).sum())
    assert wrong != pytest.approx(float(v @ torch.linalg.matrix_power(A, 2 * steps) @ v), rel=1e-10)


@pytest.mark.parametrize("name", ["outliers", "slow", "flat"])
def test_cumulative_density_is_within_its_error(name: str) -> None:
    values = SPECTRA[name]
    grid = torch.linspace(float(values.min()), float(values.max()), 25).double()
    truth = (values <= grid[:, None]).double().mean(1)
    held = []
    for seed in range(10):
        found = spectral_density(_operator(MATRICES[name]), steps=15, starts=6, seed=seed)
        held.append(((found.cumulative(grid) - truth).abs() <= 2.0 * found.cumulative_error(grid) + 1e-12).double())
        assert float(found.weights.sum()) == pytest.approx(1.0)
    assert float(torch.stack(held).mean()) >= 0.9


def test_density_integrates_to_one_and_its_error_is_that_of_the_starts() -> None:
    values = SPECTRA["flat"]
    grid = torch.linspace(-1.0, 3.0, 401).double()
    exact = spectral_density(_operator(MATRICES["flat"]), steps=200, starts=1)
    smoothed = torch.exp(-0.5 * ((grid - values[:, None]) / 0.2).square()).mean(0) / (0.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(exact.density(grid, width=0.2), smoothed)
    assert not exact.density_error(grid).any()
    assert not exact.cumulative_error(grid).any()
    torch.testing.assert_close(exact.cumulative(grid), (values <= grid[:, None]).double().mean(1))
    held = []
    for seed in range(20):
        found = spectral_density(_operator(MATRICES["flat"]), steps=20, starts=8, seed=seed)
        density = found.density(grid, width=0.2)
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, rel=1e-6)
        inside = (grid > 0.5) & (grid < 1.5)
        held.append(((density - smoothed).abs() <= 2.0 * found.density_error(grid, width=0.2))[inside].double())
    assert 0.85 <= float(torch.stack(held).mean()) <= 0.999
    one = spectral_density(_operator(MATRICES["flat"]), steps=20, starts=1)
    assert bool(one.density_error(grid).isinf().all())
    assert bool(one.cumulative_error(grid).isinf().all())


def test_density_of_few_distinct_eigenvalues_ends_early() -> None:
    values = torch.cat([torch.zeros(150), torch.ones(50)]).double()
    # Diagonal: a rotated matrix has these eigenvalues up to rounding only, and those that differ by it are not few.
    found = spectral_density(_operator(torch.diag(values)), steps=30, starts=4)
    assert found.products == len(found.nodes) == 8
    torch.testing.assert_close(found.nodes, torch.tensor([0.0, 1.0]).double().repeat(4), rtol=0, atol=1e-12)
    middle = torch.tensor([0.5]).double()
    assert abs(float(found.cumulative(middle)) - 0.75) <= 2.0 * float(found.cumulative_error(middle))


def test_softmax_regression_at_zero() -> None:
    """There the Hessian is S (x) (I - 11'/C) / C: the eigenvalues of S / C, C - 1 times each, and zeros."""
    torch.manual_seed(0)
    x = torch.randn(60, 4).double() * torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    layer = nn.Linear(4, 10).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    evaluation = evaluate(lambda: F.cross_entropy(layer(x), torch.arange(60) % 10), layer.parameters())
    inputs = torch.cat([x, torch.ones(60, 1).double()], 1)
    S = inputs.T @ inputs / 60
    exact = torch.cat([torch.linalg.eigvalsh(S) / 10, torch.zeros(1).double()]).repeat_interleave(
        torch.tensor([9, 9, 9, 9, 9, 5])
    )
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        assert trace(A).value == pytest.approx(0.9 * float(S.trace()), rel=1e-6)
        assert frobenius_norm(A).value == pytest.approx(0.3 * float(S.norm()), rel=1e-6)
        expected = torch.cat([S.diagonal()[:4].repeat(10), S[4:, 4].repeat(10)]) * 0.09
        torch.testing.assert_close(diagonal(A).values, expected, rtol=1e-6, atol=0)
        found = spectral_density(A, steps=50, starts=1)
        torch.testing.assert_close(found.nodes, exact.sort().values, rtol=1e-6, atol=1e-12)
    G = gauss_newton(evaluation)
    dimension = float((exact / (exact + 0.01)).sum())
    assert effective_dimension(G, 0.01).value == pytest.approx(dimension, rel=1e-6)
    # Five distinct eigenvalues and zero: six products make a run exact, whatever the multiplicities.
    few = effective_dimension(G, 0.01, tolerance=1e-6, max_products=49)
    assert few.truncation <= 1e-9 < few.standard_error
    assert abs(few.value - dimension) <= 3.0 * few.standard_error


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
    dense = hessian(evaluate(data.closure, data.params)).dense()
    A, B = hessian(evaluate(data.closure, data.params, products="streamed")), _operator(dense)
    assert trace(A, max_products=14).value == pytest.approx(trace(B, max_products=14).value, rel=1e-8)
    assert frobenius_norm(A, max_products=4).value == pytest.approx(frobenius_norm(B, max_products=4).value, rel=1e-8)
    assert error(diagonal(A, max_products=4).values, diagonal(B, max_products=4).values) < 1e-8
    nodes = [spectral_density(C, steps=4, starts=1).nodes for C in (A, B)]
    torch.testing.assert_close(*nodes, rtol=1e-8, atol=1e-10)


def test_effective_dimension_of_a_network_equals_the_dense_truth() -> None:
    case = build("mlp", "cross_entropy")
    G = gauss_newton(evaluate(case.closure, case.params))
    values = torch.linalg.eigvalsh(case.dense_gauss_newton()).clamp_min(0)
    assert effective_dimension(G, 0.1).value == pytest.approx(float((values / (values + 0.1)).sum()), rel=1e-9)


@pytest.mark.parametrize("matrix", [torch.zeros(1, 1), torch.zeros(5, 5), torch.ones(40, 40), torch.eye(40)])
def test_small_and_degenerate(matrix: Tensor) -> None:
    A = _operator(matrix.double())
    for budget in (12, 100):
        t, f = trace(A, max_products=budget), frobenius_norm(A, max_products=budget)
        assert abs(t.value - float(matrix.double().trace())) <= 3.0 * t.standard_error + 1e-12
        assert abs(f.value - float(matrix.double().norm())) <= 3.0 * f.standard_error + 1e-12
        assert effective_dimension(A, 1.0, max_products=budget).products <= budget
    assert spectral_density(A, steps=1, starts=2).plot().axes


@pytest.mark.parametrize(
    "measure",
    [
        lambda A, seed: trace(A, max_products=20, seed=seed).value,
        lambda A, seed: frobenius_norm(A, max_products=20, seed=seed).value,
        lambda A, seed: float(diagonal(A, max_products=20, seed=seed).values[0]),
        lambda A, seed: effective_dimension(A, 0.1, max_products=40, seed=seed).value,
        lambda A, seed: float(spectral_density(A, steps=5, starts=2, seed=seed).nodes[0]),
    ],
    ids=["trace", "frobenius_norm", "diagonal", "effective_dimension", "spectral_density"],
)
def test_seed_decides_and_global_random_state_stays(measure: Callable[[LinearOperator, int], float]) -> None:
    A = _operator(MATRICES["slow"])
    before = torch.get_rng_state()
    first = measure(A, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == measure(A, 3)
    assert first != measure(A, 4)
    with pytest.raises(FloatingPointError, match="is not finite"):
        measure(_operator(torch.full((50, 50), math.nan)), 0)
    with pytest.raises(TypeError, match=r"operator must be a LinearOperator, got .*Write hessian\(evaluation\)"):
        measure(torch.eye(3), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operator must be square"):
        measure(LinearOperator(lambda v: v, (3, 4), torch.zeros(0)), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: trace(A, "exact"), r"method must be 'hutch\+\+' or 'hutchinson', got 'exact'"),
        (lambda A: trace(A, tolerance=0.0), r"tolerance must be in \(0, 1\), got 0.0"),
        (lambda A: trace(A, max_products=0), "max_products must be a whole number and at least 1, got 0"),
        (lambda A: frobenius_norm(A, tolerance=1.0), r"tolerance must be in \(0, 1\), got 1.0"),
        (lambda A: diagonal(A, max_products=2.5), "max_products must be a whole number and at least 1, got 2.5"),
        (lambda A: effective_dimension(A, 0.0), "damping must be positive and finite, got 0.0"),
        (lambda A: effective_dimension(A, 1e-15), "damping must be above the rounding of the eigenvalues"),
        (lambda A: spectral_density(A, steps=0), "steps must be a whole number and at least 1, got 0"),
        (lambda A: spectral_density(A, starts=0), "starts must be a whole number and at least 1, got 0"),
        (lambda A: spectral_density(A).density(torch.zeros(3), width=0.0), "width must be positive and finite, got 0"),
    ],
)
def test_arguments_are_checked(call: Callable[[LinearOperator], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(_operator(MATRICES["slow"]))


@pytest.mark.parametrize("budget", [30, 300])
def test_effective_dimension_refuses_negative_eigenvalues(budget: int) -> None:
    with pytest.raises(ValueError, match=r"an eigenvalue at or below -.*Write gauss_newton"):
        effective_dimension(_operator(MATRICES["outliers"]), 0.1, max_products=budget)


def test_the_figure_shows_the_density_and_its_band() -> None:
    axes = spectral_density(_operator(MATRICES["outliers"]), steps=20, starts=3).plot().axes[0]
    assert axes.get_xlabel() == "eigenvalue"
    assert axes.get_yscale() == "log"
    assert len(axes.collections) == 1
    assert "3 starts, 60 products" in axes.get_title()
    assert "exact" in spectral_density(_operator(MATRICES["outliers"]), steps=200).plot(width=0.5).axes[0].get_title()


def test_the_figures_band_is_as_wide_below_as_above_on_its_logarithmic_scale() -> None:
    measured = spectral_density(_operator(MATRICES["outliers"]), steps=20, starts=2)
    axes = measured.plot().axes[0]
    line, floor = torch.tensor(axes.lines[0].get_ydata()), axes.get_ylim()[0]
    edge = torch.tensor(axes.collections[0].get_paths()[0].vertices[:, 1])
    count = len(line)
    lower, upper = edge[1 : count + 1], edge[count + 2 : -1].flip(0)
    error = measured.density_error(torch.tensor(axes.lines[0].get_xdata()))
    assert bool((error > line).any())  # a plain difference would be negative there
    torch.testing.assert_close(upper, line + error)
    torch.testing.assert_close(lower, (line.square() / upper).clamp_min(floor))


def test_a_figure_without_matplotlib_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match="needs matplotlib, which is not installed: pip install matplotlib"):
        spectral_density(_operator(MATRICES["slow"]), steps=3, starts=2).plot()
