"""Bounds from Lanczos coefficients and Ritz pairs against the run itself, dense matrices and closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from newtonopt.curvature.eigenvalues.bounds import (
    RitzBlock,
    _cycles,
    _log_polynomial,
    component_floor,
    spectrum_ceiling,
)
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


N = 40


def _matrix() -> Tensor:
    root = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root + root.T


def _block(A: Tensor, rows: Tensor) -> RitzBlock:
    """The Ritz pairs of a subspace with these rows, by their definition."""
    basis = torch.linalg.qr(rows.T).Q
    values, turn = torch.linalg.eigh(basis.T @ A @ basis)
    vectors = (basis @ turn).T
    return RitzBlock(values, vectors, vectors @ A - values[:, None] * vectors)


@pytest.mark.parametrize("count", [1, 4, 12, 39])
def test_ceilings_are_above_the_eigenvalues_and_tight_where_residuals_vanish(count: int) -> None:
    A = _matrix()
    exact = torch.linalg.eigh(A)
    noise = torch.randn(count, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for size in (0.0, 1e-3, 0.3):
        block = _block(A, exact.eigenvectors.T[-count:] + size * noise)
        left = torch.linalg.svd(block.vectors).Vh[count:]
        rest = float(torch.linalg.eigvalsh(left @ A @ left.T)[-1])
        bounds = torch.tensor(block.pairs().ceilings(rest, N, N), dtype=torch.float64)
        truth = exact.eigenvalues.flip(0)
        assert bool((bounds >= truth - 1e-9).all())
        if size == 0.0:
            torch.testing.assert_close(bounds[:count], truth[:count])
    assert block.pairs().ceilings(math.inf, N, 2) == [math.inf, math.inf]
    mirrored = block.pairs().mirrored()
    assert torch.equal(mirrored.values, -block.values)


def test_a_block_and_a_run_together_have_the_ritz_pairs_of_their_span() -> None:
    A, generator = _matrix(), torch.Generator().manual_seed(5)
    old = _block(A, torch.randn(3, N, generator=generator, dtype=torch.float64))
    result = lanczos(A, torch.randn(N, generator=generator, dtype=torch.float64), 7, deflate=old.vectors)
    expected = _block(A, torch.cat([old.vectors, result.basis]))
    extension = old.extended(result, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(extension.pairs.values, expected.values)
    found = extension.formed([0, 4, 9])
    torch.testing.assert_close(found.values, expected.values[[0, 4, 9]])
    cosines = (found.vectors * expected.vectors[[0, 4, 9]]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.residuals, found.vectors @ A - found.values[:, None] * found.vectors)
    torch.testing.assert_close(extension.pairs.chosen([0, 4, 9]).gram, found.pairs().gram)
