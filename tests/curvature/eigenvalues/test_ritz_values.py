"""Ritz pairs against dense matrices: the bounds that they give, and how they are merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from newtonopt.curvature.eigenvalues.ritz_values import RitzBlock
from newtonopt.solvers.lanczos import lanczos

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
