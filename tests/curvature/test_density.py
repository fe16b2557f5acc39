"""Spectral densities against dense truth, with honest errors, and their figure."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from problems import Batches
from spectra import (
    DEGENERATE,
    MATRICES,
    SPECTRA,
    check_seeds_and_operators,
    dense,
    diagonal,
    softmax_eigenvalues,
    softmax_regression,
)
from torch import Tensor

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import spectral_density


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
        found = spectral_density(dense(MATRICES[name]), steps=15, starts=6, seed=seed)
        held.append(((found.cumulative(grid) - truth).abs() <= 2.0 * found.cumulative_error(grid) + 1e-12).double())
        assert float(found.weights.sum()) == pytest.approx(1.0)
    assert float(torch.stack(held).mean()) >= 0.9


def test_density_integrates_to_one_and_its_error_is_that_of_the_starts() -> None:
    values = SPECTRA["flat"]
    grid = torch.linspace(-1.0, 3.0, 401).double()
    exact = spectral_density(dense(MATRICES["flat"]), steps=200, starts=1)
    smoothed = torch.exp(-0.5 * ((grid - values[:, None]) / 0.2).square()).mean(0) / (0.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(exact.density(grid, width=0.2), smoothed)
    assert not exact.density_error(grid).any()
    assert not exact.cumulative_error(grid).any()
    torch.testing.assert_close(exact.cumulative(grid), (values <= grid[:, None]).double().mean(1))
    held = []
    for seed in range(20):
        found = spectral_density(dense(MATRICES["flat"]), steps=20, starts=8, seed=seed)
        density = found.density(grid, width=0.2)
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, rel=1e-6)
        inside = (grid > 0.5) & (grid < 1.5)
        held.append(((density - smoothed).abs() <= 2.0 * found.density_error(grid, width=0.2))[inside].double())
    assert 0.85 <= float(torch.stack(held).mean()) <= 0.999
    one = spectral_density(dense(MATRICES["flat"]), steps=20, starts=1)
    assert bool(one.density_error(grid).isinf().all())
    assert bool(one.cumulative_error(grid).isinf().all())


def test_density_of_few_distinct_eigenvalues_ends_early() -> None:
    values = torch.cat([torch.zeros(150), torch.ones(50)]).double()
    # A rotated matrix would have these eigenvalues up to rounding only, hence many distinct ones.
    found = spectral_density(dense(torch.diag(values)), steps=30, starts=4)
    assert found.products == len(found.nodes) == 8
    torch.testing.assert_close(found.nodes, torch.tensor([0.0, 1.0]).double().repeat(4), rtol=0, atol=1e-12)
    middle = torch.tensor([0.5]).double()
    assert abs(float(found.cumulative(middle)) - 0.75) <= 2.0 * float(found.cumulative_error(middle))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_the_budget_reaches_the_size(dtype: torch.dtype) -> None:
    found = spectral_density(dense(MATRICES["slow"].to(dtype)), steps=100, starts=2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.exact
    assert found.products == 200
    torch.testing.assert_close(found.nodes, SPECTRA["slow"].flip(0), rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(found.weights, torch.full((200,), 1 / 200, dtype=torch.float64))


def test_softmax_regression_at_zero() -> None:
    evaluation, S = softmax_regression()
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        found = spectral_density(A, steps=50, starts=1)
        torch.testing.assert_close(found.nodes, softmax_eigenvalues(S).sort().values, rtol=1e-6, atol=1e-12)


def test_a_whole_data_set_equals_the_dense_truth() -> None:
    data = Batches()
    B = dense(hessian(evaluate(data.closure, data.params)).dense())
    A = hessian(evaluate(data.closure, data.params, products="streamed"))
    nodes = [spectral_density(C, steps=4, starts=1).nodes for C in (A, B)]
    torch.testing.assert_close(*nodes, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("matrix", DEGENERATE)
def test_small_and_degenerate(matrix: Tensor) -> None:
    assert spectral_density(dense(matrix.double()), steps=1, starts=2).plot().axes


def test_seeds_and_operators() -> None:
    check_seeds_and_operators(lambda A, seed: float(spectral_density(A, steps=5, starts=2, seed=seed).nodes[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: spectral_density(A, steps=0), "steps must be a whole number and at least 1, got 0"),
        (lambda A: spectral_density(A, starts=0), "starts must be a whole number and at least 1, got 0"),
        (lambda A: spectral_density(A).density(torch.zeros(3), width=0.0), "width must be positive and finite, got 0"),
    ],
)
def test_arguments_are_checked(call: Callable[[LinearOperator], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dense(MATRICES["slow"]))


def test_a_density_takes_a_list_of_points() -> None:
    found = spectral_density(diagonal(SPECTRA["flat"]))
    assert torch.equal(found.density([0.0, 0.5]), found.density(torch.tensor([0.0, 0.5])))
    assert found.cumulative([-1e3, 1e3]).tolist() == pytest.approx([0.0, 1.0])


def test_a_density_prints_without_its_nodes() -> None:
    assert len(repr(spectral_density(diagonal(SPECTRA["flat"])))) < 500


def test_the_figure_shows_the_density_and_its_band() -> None:
    axes = spectral_density(dense(MATRICES["outliers"]), steps=20, starts=3).plot().axes[0]
    assert axes.get_xlabel() == "eigenvalue"
    assert axes.get_yscale() == "log"
    assert len(axes.collections) == 1
    assert "3 starts, 60 products" in axes.get_title()
    assert "exact" in spectral_density(dense(MATRICES["outliers"]), steps=200).plot(width=0.5).axes[0].get_title()


def test_the_figures_band_is_as_wide_below_as_above_on_its_logarithmic_scale() -> None:
    measured = spectral_density(dense(MATRICES["outliers"]), steps=20, starts=2)
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
    with pytest.raises(ImportError, match=r"matplotlib, which is not installed: pip install 'newtonopt\[plots\]'"):
        spectral_density(dense(MATRICES["slow"]), steps=3, starts=2).plot()
