"""Diagonal of a symmetric operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from newtonopt.checks import check_seed, check_share, check_whole
from newtonopt.curvature.probes import LEAST_SAMPLES, check_finite, check_operator, few, signs, unit_vectors
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.vectors.scaling import InRange, lost, norm, times_power


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal.

    Attributes:
        values: The entries A_ii, `(n,)`, in the operator's dtype and on its device.
        standard_errors: Of each of them, `(n,)`, over the random vectors; zero where they are exact.
        products: Products with the operator that were used.
        converged: Whether the norm of the standard errors is at most `tolerance` times that of the values.
    """

    values: Tensor = field(repr=False)
    standard_errors: Tensor = field(repr=False)
    products: int
    converged: bool


def diagonal(operator: LinearOperator, tolerance: float = 0.1, max_products: int = 300, seed: int = 0) -> Diagonal:
    """diag(A), as the mean of v * Av over random vectors v of signs (Bekas, Kokiopoulou & Saad 2007).

    The variance of an entry is the sum of the squares of the others in its row. Where the budget reaches n products the
    diagonal is exact, by unit vectors.

    Not for the smallest entries of a matrix with large entries off the diagonal: their standard errors say so.

    Args:
        operator: Symmetric `(n, n)`.
        tolerance: Norm of the standard errors, relative to that of the values, at which to stop, in (0, 1). Default
            0.1: the error falls with the root of the products only.
        max_products: Budget, >= 1.
        seed: Seed of the random vectors; the global random state is neither read nor written.

    Returns:
        The diagonal and its standard errors, from at least ten samples where the budget allows them.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.
    """
    size = check_operator(operator)
    check_share("tolerance", tolerance)
    check_whole("max_products", max_products, 1)
    check_seed(seed)
    mean = operator.like.new_zeros(size)
    squares = torch.zeros_like(mean)
    if max_products >= size:
        for index, unit in enumerate(unit_vectors(operator.like), start=1):
            mean += unit * (operator @ unit)
            check_finite(norm(mean), index)
        return Diagonal(mean, _with_underflow(squares, mean), size, True)
    matrix = InRange(operator)
    generator = torch.Generator().manual_seed(seed)
    used, error = 0, math.inf
    while used < max_products:
        v = signs(operator.like, generator)
        used += 1
        before = v * (matrix @ v) - mean
        mean += before / used
        squares.addcmul_(before, before, value=1.0 - 1.0 / used)
        level = norm(mean)
        check_finite(level, used)
        error = few(used) * math.sqrt(float(squares.sum()) / used) if used > 1 else math.inf
        if used >= LEAST_SAMPLES and error <= tolerance * level:
            break
    errors = (squares / used).sqrt() * few(used) if used > 1 else torch.full_like(mean, math.inf)
    values, errors = (times_power(x, matrix.exponent) for x in (mean, errors))
    return Diagonal(values, _with_underflow(errors, values), used, error <= tolerance * level)


def _with_underflow(errors: Tensor, values: Tensor) -> Tensor:
    """Return the errors, not below what underflow may take where all values are tiny."""
    change = lost(values.dtype, 1)
    visible = float(values.abs().max()) * torch.finfo(values.dtype).eps > change
    return errors if visible else errors.clamp_min(change)
