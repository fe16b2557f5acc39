"""Curvature matrices that are held whole, and decomposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.solvers.secular import above_rounding
from newtonopt.vectors.flat import flat_dtype
from newtonopt.vectors.memory import check_room, fits

# A matrix, its eigenvectors, and twice as much for LAPACK's divide and conquer to work in (syevd).
_COPIES = 4


def check_decomposition(params: Sequence[Tensor], remedy: str, *, blocks: bool = False) -> None:
    """Refuse to decompose a curvature matrix that would not fit in the memory that is available.

    Args:
        params: The parameters.
        remedy: What to do instead, for the message.
        blocks: Whether only the diagonal block of each parameter is held, all of them at once.

    Raises:
        MemoryError: It would not fit; nothing was allocated.
    """
    if blocks:
        largest = max(params, key=Tensor.numel)
        what = f"The curvature's blocks, the largest of a parameter of shape {tuple(largest.shape)},"
    else:
        what = f"The curvature matrix of {sum(p.numel() for p in params):,} parameters, with its eigenvectors,"
    check_room(_entries(params, blocks), flat_dtype(params), params[0].device, what, remedy)


def blocks_fit(params: Sequence[Tensor]) -> bool:
    """Whether `check_decomposition` lets the diagonal blocks of these parameters pass."""
    return fits(_entries(params, blocks=True), flat_dtype(params), params[0].device)


def _entries(params: Sequence[Tensor], blocks: bool) -> int:
    sizes = [p.numel() for p in params] if blocks else [sum(p.numel() for p in params)]
    return sum(size**2 for size in sizes) + (_COPIES - 1) * max(sizes) ** 2


def finite_dense(A: LinearOperator) -> Tensor:
    """The whole matrix; a FloatingPointError if it has entries that are not finite."""
    matrix = A.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise FloatingPointError("The curvature matrix has entries that are not finite.")
    return matrix


def spectrum(A: LinearOperator) -> tuple[Tensor, Tensor]:
    """Return eigenvalues above their rounding and eigenvectors of the whole matrix.

    Raises:
        FloatingPointError: The matrix has entries that are not finite.
    """
    matrix = finite_dense(A)
    values, vectors = torch.linalg.eigh(matrix)
    return above_rounding(values, vectors, matrix, torch.finfo(matrix.dtype).eps), vectors
