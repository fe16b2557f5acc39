"""Approximate inverses that make conjugate gradients converge in fewer products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from newtonopt.solvers.solution import Matrix

Preconditioner = Callable[[Tensor], Tensor]


class Curvature(Matrix, Protocol):
    """A matrix that knows whether it is positive semi-definite."""

    @property
    def psd(self) -> bool:
        """Whether it is, by construction."""
        ...


@dataclass(frozen=True)
class Sketch:
    """A low-rank approximation `U diag(values) U'` of a matrix, or of the matrix with its eigenvalues' absolute values.

    Attributes:
        vectors: `U`, orthonormal columns, `(n, rank)`.
        values: Approximate eigenvalues, sorted downwards, `(rank,)`, none negative.
    """

    vectors: Tensor
    values: Tensor

    def preconditioner(self, damping: float) -> Preconditioner:
        """The inverse of the sketch plus `damping I`, scaled so that it is the identity outside the sketch's range.

        It follows the damping without a new sketch: only the `rank` weights change. A weight that drowned in rounding
        would blind conjugate gradients to the largest eigenvalues, so none is below 10 eps.
        """
        U = self.vectors
        shifted = self.values + damping
        floor = torch.maximum(shifted[-1], 10 * torch.finfo(U.dtype).eps * shifted[0])
        weights = floor / torch.maximum(shifted, floor) - 1
        return lambda v: v + U @ (weights * (U.T @ v))


def sketch(A: Curvature, rank: int, generator: torch.Generator, like: Tensor) -> Sketch:
    """Sketch a matrix with random vectors: `rank` products if it is positive semi-definite, twice as many if not.

    Args:
        A: The matrix, `(n, n)`.
        rank: Of the sketch; at most `n`.
        generator: On the CPU. Random numbers are drawn there so that a seed means the same on every device.
        like: A vector `(n,)` of the dtype and device wanted.

    Returns:
        The sketch.

    Raises:
        FloatingPointError: A product was not finite.
    """
    n = like.numel()
    columns = like.unsqueeze(1).expand(-1, min(rank, n))
    noise = torch.empty_like(columns, dtype=torch.float64, device="cpu", memory_format=torch.contiguous_format)
    noise = noise.normal_(generator=generator).to(like)
    test, _ = torch.linalg.qr(noise)
    return _nystrom(A, test) if A.psd else _range_finder(A, test)


def _nystrom(A: Matrix, test: Tensor) -> Sketch:
    """Algorithm 2.1 of Frangella, Tropp & Udell 2023. The shift `sqrt(n) eps |Y|` keeps the Cholesky factorisation
    stable, and is taken off again; it is raised where rounding in the products makes the small core indefinite.
    """
    n, rank = test.shape
    Y = _products(A, test)
    norm = float(Y.norm())
    shift = max(math.sqrt(n) * torch.finfo(Y.dtype).eps * norm, torch.finfo(Y.dtype).tiny)
    while True:
        core = test.T @ Y
        factor, failed = torch.linalg.cholesky_ex(
            (core + core.T) / 2 + shift * torch.eye(rank, dtype=Y.dtype, device=Y.device)
        )
        if not failed:
            break
        shift *= 10
    B = torch.linalg.solve_triangular(factor, (Y + shift * test).T, upper=False).T
    vectors, singular, _ = torch.linalg.svd(B, full_matrices=False)
    return Sketch(vectors, (singular.square() - shift).clamp(min=0))


def _range_finder(A: Matrix, test: Tensor) -> Sketch:
    """For an indefinite matrix: eigenvalues on the range of `A test` (Halko, Martinsson & Tropp 2011, sec. 5.3)."""
    basis, _ = torch.linalg.qr(_products(A, test))
    core = basis.T @ _products(A, basis)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    order = values.abs().argsort(descending=True)
    return Sketch(basis @ vectors[:, order], values.abs()[order])


def _products(A: Matrix, columns: Tensor) -> Tensor:
    products = torch.stack([A @ column for column in columns.unbind(1)], dim=1)
    # The norm overflows before the entries do, and the factorisations need it.
    if not bool(torch.isfinite(products.norm())):
        raise FloatingPointError(
            "A curvature product is not finite: the loss or its derivatives overflow at the current parameters."
        )
    return products


def diagonal(weights: Tensor, damping: float, exponent: float = 0.75) -> Preconditioner:
    """Division by `(weights + damping)^exponent`, for an empirical Fisher diagonal `(n,)` (Martens 2010, sec. 4.7)."""
    inverse = (weights + damping).pow(-exponent)
    return lambda v: inverse * v
