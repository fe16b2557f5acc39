"""Norms, inner products and matrices, also where squares would leave the range of floating-point numbers.

The square of a float32 number below 1e-19 loses digits, below 1e-23 it is zero, above 2e19 infinite. Curvature of such
size is ordinary: a classifier that fits its data, a loss in large units. Powers of two, which do not round, scale
everything here.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

# A matrix of a size between 2^-16 and 2^16 is not scaled: squares of its products, and of their rounding, are in range.
_BAND = 16


class Matrix(Protocol):
    """Anything that multiplies a vector: a `LinearOperator`, a dense tensor."""

    def __matmul__(self, v: Any, /) -> Any: ...


def norm(v: Tensor) -> float:
    """Return the Euclidean norm of a vector `(n,)`, accumulated as in `dot`, also if its square is out of range."""
    square = _dot(v, v)
    if _least(v) < square < math.inf:
        return math.sqrt(square)
    power = exponent(v)
    if power is None:
        return math.sqrt(square)
    scaled = times_power(v, -power)
    return shifted(math.sqrt(_dot(scaled, scaled)), power)


def dot(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two vectors `(n,)`, also if products of their entries are out of range.

    It is accumulated in float64, except on Apple's devices, which have none.
    """
    plain = _dot(left, right)
    if _least(left) < abs(plain) < math.inf:
        return plain
    powers = exponent(left), exponent(right)
    if powers[0] is None or powers[1] is None:
        return plain
    return shifted(_dot(times_power(left, -powers[0]), times_power(right, -powers[1])), powers[0] + powers[1])


def _dot(left: Tensor, right: Tensor) -> float:
    accumulator = left.dtype if left.device.type == "mps" else torch.float64
    return float((left * right).sum(dtype=accumulator))


def _least(v: Tensor) -> float:
    """Return the smallest sum of `n` products that has lost no digit to underflow."""
    of = torch.finfo(v.dtype)
    return v.shape[0] * of.tiny / of.eps


def exponent(v: Tensor) -> int | None:
    """Return the exponent of the power of two just above the largest entry; None for zeros and non-finite vectors."""
    largest = float(v.abs().max()) if v.numel() else 0.0
    return math.frexp(largest)[1] if 0.0 < largest < math.inf else None


def scale_of(v: Tensor) -> int:
    """Return the exponent of a vector, or zero if it is of ordinary size and needs no scaling."""
    power = exponent(v) or 0
    return power if abs(power) > _BAND else 0


def times_power(v: Tensor, power: int) -> Tensor:
    """Return `2^power v`."""
    # Two steps, because the factor itself may be out of range.
    half = power // 2
    return v * 2.0**half * 2.0 ** (power - half) if power else v


def shifted(x: float, power: int) -> float:
    """Return `2^power x`; infinite if that overflows."""
    try:
        return math.ldexp(x, power)
    except OverflowError:
        return math.copysign(math.inf, x)


def lost(dtype: torch.dtype, size: int) -> float:
    """Return the largest change that underflow can make to the norm of a product `(size,)` of that dtype.

    Numbers below the least normal one, `tiny`, have fewer digits, or none. An entry computed from them errs by
    `eps * tiny` times a factor from the rest of the computation; this allows for factors up to `1 / eps`.
    """
    return torch.finfo(dtype).tiny * math.sqrt(size)


class InRange:
    """The matrix `A / 2^exponent`: its products with unit vectors, and their squares, are of ordinary size.

    The first product that is not zero determines the exponent; products before it are zero in any units.

    Args:
        matrix: `A`.

    Attributes:
        exponent: Zero if the matrix is of ordinary size itself.
    """

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._known = False
        self.exponent = 0

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return `A v / 2^exponent`."""
        product: Tensor = self._matrix @ v
        if not self._known:
            self._find(product, v)
        return times_power(product, -self.exponent)

    def settle(self) -> None:
        """Keep the present exponent from now on."""
        self._known = True

    def _find(self, product: Tensor, v: Tensor) -> None:
        powers = exponent(product), exponent(v)
        if powers[0] is None or powers[1] is None:
            return
        self._known = True
        if abs(powers[0] - powers[1]) > _BAND:
            self.exponent = powers[0] - powers[1]

    def back(self, x: float, degree: int = 1) -> float:
        """Return `x`, computed from these products, in the units of `A`; of `A^degree` for another degree."""
        return shifted(x, degree * self.exponent)
