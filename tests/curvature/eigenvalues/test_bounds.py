"""Bounds from Lanczos coefficients against the run itself and closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from newtonopt.curvature.eigenvalues.bounds import _cycles, _log_polynomial, component_floor, spectrum_ceiling
from newtonopt.solvers.lanczos import Restarts, lanczos

SLOW = torch.arange(1, 200, dtype=torch.float64) ** -0.5


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_the_polynomial_of_the_bound_is_that_of_the_run(keep: int) -> None:
    # v_{k+1} = p(A) v_1: along an eigenvector the components' ratio is p at its eigenvalue.
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(199, generator=generator, dtype=torch.float64)
    restarts = Restarts(12, lambda values: list(range(len(values) - keep, len(values))))
    for products in (11, 12, 13, 20, 37):
        result = lanczos(torch.diag(-SLOW), start, products, restarts=restarts)
        ratio = float((result.next_vector[-1] / (start[-1] / start.norm())).abs())
        assert math.exp(_log_polynomial(list(_cycles(result.tridiagonal)), float(-SLOW[-1]))) == pytest.approx(
            ratio, rel=1e-6
        )


@pytest.mark.parametrize("size", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("failure", [0.01, 0.3])
def test_a_random_vector_has_less_than_the_floor_along_an_axis_as_rarely_as_stated(size: int, failure: float) -> None:
    floor = component_floor(size, failure)
    if size == 1:
        assert floor == 1.0
        return
    # (v'x)^2 has the distribution Beta(1/2, (n - 1)/2).
    exact = float(scipy.stats.beta.cdf(floor**2, 0.5, 0.5 * (size - 1)))
    assert 0.9 * failure <= exact <= failure * (1.0 + 1e-12)


def test_the_ceiling_is_where_the_polynomial_reaches_the_inverse_floor() -> None:
    A = torch.diag(SLOW)
    start = torch.randn(199, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tridiagonal = lanczos(A, start, 8).tridiagonal
    largest = float(tridiagonal.ritz()[0][-1])
    for delta in (1e-1, 1e-3, 1e-9):
        ceiling = spectrum_ceiling(tridiagonal, delta, largest)
        reached = _log_polynomial(list(_cycles(tridiagonal)), ceiling)
        assert -math.log(delta) <= reached <= -math.log(delta) + 0.2
    # Valid: the start has that part along the top eigenvector.
    part = float(start[0].abs() / start.norm())
    assert spectrum_ceiling(tridiagonal, part, largest) >= 1.0
    assert spectrum_ceiling(lanczos(A, A[0], 8).tridiagonal, 1e-9, 1.0) == 1.0  # invariant
