"""Preconditioners: approximate inverses that make conjugate gradients converge in fewer products.

`sketch` makes the Nystrom preconditioner of a positive semi-definite matrix (Frangella, Tropp & Udell 2023), and one of
`|A|` for an indefinite matrix; `diagonal` divides by a diagonal. It differs from the paper in this: no weight drowns in
rounding, the shift is raised until the core is positive definite, and parameters that the loss does not use are left
alone to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import InRange, Matrix, times_power

Preconditioner = Callable[[Tensor], Tensor]


class Curvature(Matrix, Protocol):
    """A matrix that knows whether it is positive semi-definite."""

    @property
    def psd(self) -> bool:
        """Whether the matrix is positive semi-definite by construction."""
        ...


@dataclass(frozen=True, eq=False)
class Sketch:
    """A low-rank approximation `U diag(values) U'` of a matrix `A`, or of `|A|` if `A` is indefinite.

    `|A|` is `A` with its eigenvalues replaced by their absolute values.

    Attributes:
        vectors: `U`, orthonormal columns `(n, rank)`.
        values: Approximate eigenvalues, sorted downwards, `(rank,)`, none negative.
    """

    vectors: Tensor
    values: Tensor

    def preconditioner(self, damping: float) -> Preconditioner:
        """Return the inverse of the sketch plus `damping I`, scaled to be the identity outside of the sketch's range.

        With values `v_i` and damping `mu` it is `P^-1 = I + U diag((v_r + mu) / (v_i + mu) - 1) U'` (Frangella, Tropp &
        Udell 2023, sec. 1). Another damping needs no other sketch.
        """
        U = self.vectors
        # A weight (v_r + mu) / (v_i + mu) that drowns in rounding would blind conjugate gradients to the largest
        # eigenvalues, so none is below 10 eps. Without damping none is below sqrt(eps), because the sketch's least
        # values are rounding where the matrix has a lower rank.
        shifted, eps = self.values + damping, torch.finfo(U.dtype).eps
        floor = torch.maximum(shifted[-1], (10 * eps if damping > 0 else math.sqrt(eps)) * shifted[0])
        weights = floor / torch.maximum(shifted, floor) - 1
        return lambda v: v + U @ (weights * (U.T @ v))


def sketch(A: Curvature, rank: int, generator: torch.Generator, like: Tensor) -> Sketch:
    """Sketch a matrix with random vectors: `rank` products if it is positive semi-definite, twice as many if not.

    At most two matrices `(n, rank)` are alive at a time.

    Args:
        A: Symmetric matrix, `(n, n)`.
        rank: Number of vectors; `n` at most are used.
        generator: Generator on the CPU. Random numbers are drawn there, so that a seed gives the same on every device.
        like: Vector `(n,)` of the dtype and device wanted.

    Returns:
        The sketch.

    Raises:
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> dense = torch.diag(torch.tensor([100.0, 1.0, 0.0], dtype=torch.float64))
        >>> A = LinearOperator(lambda v: dense @ v, (3, 3), dense[0], psd=True)
        >>> found = sketch(A, 2, torch.Generator().manual_seed(0), dense[0])
        >>> found.values.round(decimals=4).tolist()
        [100.0, 1.0]
        >>> apply = found.preconditioner(damping=1.0)  # the inverse of diag(101 / 2, 1, 1)
        >>> apply(torch.ones(3, dtype=torch.float64)).round(decimals=4).tolist()
        [0.0198, 1.0, 1.0]
    """
    # Each draws the random vectors itself: Python 3.10 keeps a function's arguments alive until the function returns.
    return (_nystrom if A.psd else _range_finder)(A, rank, generator, like)


def _orthonormal(like: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return random orthonormal columns `(n, rank)`, at most `n` of them."""
    columns = like.unsqueeze(1).expand(-1, min(rank, like.numel()))
    random = torch.empty_like(columns, memory_format=torch.contiguous_format)
    for column in random.unbind(1):
        column.copy_(normals(like, generator))
    basis: Tensor = torch.linalg.qr(random)[0]
    return basis


def _nystrom(A: Matrix, rank: int, generator: torch.Generator, like: Tensor) -> Sketch:
    """Sketch a positive semi-definite matrix (Frangella, Tropp & Udell 2023, alg. 2.1).

    The sketch is `Y (Q'Y)^-1 Y'` with `Y = A Q`, `Q` the random columns.
    """
    test, matrix = _orthonormal(like, rank, generator), InRange(A)
    n, rank = test.shape
    Y = _products(matrix, test)
    norm = float(Y.norm())
    # Sketch A + shift I, for a stable Cholesky factorisation: Y + shift Q, and the core Q'Y + shift I. Raise the shift
    # where rounding in the products makes the core indefinite.
    shift = max(math.sqrt(n) * torch.finfo(Y.dtype).eps * norm, torch.finfo(Y.dtype).tiny)
    core = test.T @ Y
    core = (core + core.T) / 2
    while True:
        factor, failed = torch.linalg.cholesky_ex(core + shift * torch.eye(rank, dtype=Y.dtype, device=Y.device))
        if not failed:
            break
        shift *= 10
    used = _used(Y)
    # B = Y C^-1 with C'C the core, so that the sketch is B B' = U S^2 U'. Y, Q and B are freed as soon as possible:
    # only two matrices of this size are alive at a time.
    Y.add_(test, alpha=shift)
    del test
    B = torch.linalg.solve_triangular(factor, Y.T, upper=False).T
    del Y
    basis, triangle = torch.linalg.qr(B)
    del B
    vectors, singular, _ = torch.linalg.svd(triangle)
    # Take the shift off again.
    values = times_power((singular.square() - shift).clamp(min=0), matrix.exponent)
    return Sketch((basis @ vectors).mul_(used), values)


def _range_finder(A: Matrix, rank: int, generator: torch.Generator, like: Tensor) -> Sketch:
    """Sketch an indefinite matrix by its eigenvalues on the range of `A Q` (Halko, Martinsson & Tropp 2011, sec. 5.3).

    `Q` are the random columns.
    """
    matrix = InRange(A)
    image = _products(matrix, _orthonormal(like, rank, generator))
    used = _used(image)
    basis, _ = torch.linalg.qr(image)
    del image
    core = basis.T @ _products(matrix, basis)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    order = values.abs().argsort(descending=True)
    return Sketch((basis @ vectors[:, order]).mul_(used), times_power(values.abs()[order], matrix.exponent))


def _used(image: Tensor) -> Tensor:
    """Return which rows of the matrix are not zero, `(n, 1)`.

    Other rows belong to parameters that the loss does not use: rounding must not move these by one bit.
    """
    return (image.unbind(1)[0] != 0).unsqueeze(1)


def _products(A: Matrix, columns: Tensor) -> Tensor:
    products = torch.empty_like(columns)
    for column, product in zip(columns.unbind(1), products.unbind(1), strict=True):
        product.copy_(A @ column)
    return _finite(products)


def _finite(products: Tensor) -> Tensor:
    # The norm overflows before the entries do, and the factorisations need a finite one.
    if not bool(torch.isfinite(products.norm())):
        raise FloatingPointError(
            "A curvature product is not finite: the loss or its derivatives overflow at the current parameters."
        )
    return products


def diagonal(weights: Tensor, damping: float, exponent: float) -> Preconditioner:
    """Return division by `(weights + damping)^exponent`: a diagonal preconditioner (Martens 2010, sec. 4.7).

    Args:
        weights: Sizes of the matrix's diagonal entries, `(n,)`, none negative.
        damping: Number added to each.
        exponent: Power; 0.75 damps the differences between the weights.
    """
    inverse = (weights + damping).pow(-exponent)
    return lambda v: inverse * v
