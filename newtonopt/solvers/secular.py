"""Quadratic models in the coordinates of their eigenvectors: minima in a ball, and with a cubic term."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from newtonopt.vectors.scaling import exponent, shifted, times_power

Minimise = Callable[[Tensor, Tensor], tuple[Tensor, str]]

_MAX_ITERATIONS = 100
# No number has a larger power of two, nor a square that is one a smaller.
_RANGE = 1100


def above_rounding(values: Tensor, vectors: Tensor, matrix: Tensor, eps: float) -> Tensor:
    """Return the eigenvalues with those that rounding may have made raised to their rounding.

    Entries of the matrix are uncertain by `eps |A_ij|`, and the eigenvalue of `u` by about `k eps |u|'|A||u|`: a
    singular matrix has small eigenvalues of either sign, which are no negative curvature, and along which a step would
    have any length. A badly scaled matrix may have small eigenvalues to many digits; these stay.

    Args:
        values: Eigenvalues `(k,)`, ascending.
        vectors: Eigenvectors as columns, `(k, k)`.
        matrix: The symmetric matrix `A`, `(k, k)`.
        eps: The eps of the dtype in which the matrix or its products were computed.
    """
    sizes = vectors.abs()
    rounding = values.shape[0] * eps * (sizes * (matrix.abs() @ sizes)).sum(0)
    return torch.where(values.abs() <= rounding, rounding, values)


def ball(values: Tensor, slopes: Tensor, radius: float) -> tuple[Tensor, str]:
    """Minimise `c'y + y'Ly / 2` in `|y| <= radius`, `L` diagonal: More & Sorensen 1983, hard case included.

    The minimiser has `(L + m I) y = -c` with `L + m I` positive semi-definite, `m >= 0` and `m (radius - |y|) = 0`.

    Args:
        values: Eigenvalues `(k,)`, ascending, the diagonal of `L`.
        slopes: `c`, `(k,)`, the gradient in the eigenvectors' coordinates.
        radius: Positive.

    Returns:
        `y`, `(k,)`, float64 on the CPU, and in words which case it was.
    """
    values, slopes = values.double().cpu(), slopes.double().cpu()
    # In units of powers of two in which eigenvalues, slopes and radius are at most one.
    far = math.frexp(radius)[1]
    size = max(_power(values), _power(slopes) - far)
    y, reason = _ball(times_power(values, -size), times_power(slopes, -size - far), shifted(radius, -far))
    return times_power(y, far), reason


def _ball(values: Tensor, slopes: Tensor, radius: float) -> tuple[Tensor, str]:
    lift = max(0.0, -float(values[0]))
    gaps = values + lift  # the lowest is exactly zero where the matrix is not positive definite
    least = max(0.0, float((slopes.abs() / radius - gaps).max()))
    if lift == 0.0:
        inside = _coordinates(gaps, slopes, 0.0)
        if bool(torch.isfinite(inside).all()) and _length(inside) <= radius:
            return inside, "inside the ball"
    return _on_the_boundary(gaps, slopes, lift, least, lambda shift: (1 / radius, 0.0), "on the boundary")


def cubic(values: Tensor, slopes: Tensor, sigma: float) -> tuple[Tensor, str]:
    """Minimise `c'y + y'Ly / 2 + sigma |y|^3 / 3`, `L` diagonal: Cartis, Gould & Toint 2011, sec. 6.1.

    The minimiser has `(L + m I) y = -c` with `L + m I` positive semi-definite and `m = sigma |y|`.

    Args:
        values: Eigenvalues `(k,)`, ascending, the diagonal of `L`.
        slopes: `c`, `(k,)`, the gradient in the eigenvectors' coordinates.
        sigma: Positive.

    Returns:
        `y`, `(k,)`, float64 on the CPU, and in words which case it was.
    """
    values, slopes = values.double().cpu(), slopes.double().cpu()
    # In units of powers of two in which eigenvalues, slopes and weight are at most one: the minimiser's m is of the
    # size of the eigenvalues or of the root of sigma |c|, and |y| is m / sigma.
    weight = math.frexp(sigma)[1]
    size = max(_power(values), (_power(slopes) + weight + 1) // 2)
    far = size - weight
    y, reason = _cubic(times_power(values, -size), times_power(slopes, -size - far), shifted(sigma, -weight))
    return times_power(y, far), reason


def _cubic(values: Tensor, slopes: Tensor, sigma: float) -> tuple[Tensor, str]:
    lift = max(0.0, -float(values[0]))
    gaps = values + lift
    if lift == 0.0 and not bool(slopes.any()):
        return torch.zeros_like(slopes), "zero gradient"
    # Where one entry alone has |y_i| = m / sigma: left of the root, for |y| is larger than any entry.
    half, product = (gaps + lift) / 2, gaps * lift - sigma * slopes.abs()
    roots = -product / (half + (half.square() - product).clamp(min=0).sqrt())
    least = max(0.0, float(roots.nan_to_num(0.0).max()))
    if lift + least == 0.0:
        return _coordinates(gaps, slopes, 0.0), "the cubic term is rounding"
    inverse = lambda shift: (sigma / shift, -sigma / shift / shift)  # noqa: E731
    return _on_the_boundary(gaps, slopes, lift, least, inverse, "held by the cubic term")


def _on_the_boundary(
    gaps: Tensor,
    slopes: Tensor,
    lift: float,
    least: float,
    inverse_length: Callable[[float], tuple[float, float]],
    reason: str,
) -> tuple[Tensor, str]:
    """Solve `1 / |y| = w(m)`: Newton's method on a concave increasing function, from the left: monotone, no bracket.

    `m = lift + t`, with `t >= least`; `inverse_length` gives `w(m)` and its derivative.
    """
    t = least
    y = _coordinates(gaps, slopes, t)
    wanted = inverse_length(lift + t)[0]
    if t == 0.0 and _length(y) * wanted < 1.0:
        # The hard case: no gradient along the lowest eigenvector, which makes up the length.
        y[0] = math.sqrt(max(1 / wanted - _length(y), 0.0)) * math.sqrt(1 / wanted + _length(y))
        return y, "hard case: completed along the lowest eigenvector"
    for _ in range(_MAX_ITERATIONS):
        norm = _length(y)
        if norm == 0.0:
            return y, "the step is rounding"
        wanted, change = inverse_length(lift + t)
        slope = float(((y / norm).square() / (gaps + t)).nansum()) / norm - change  # 0 / 0 in the hard case
        update = (wanted - 1 / norm) / slope
        if not update > 1e-15 * t:
            break
        t += update
        y = _coordinates(gaps, slopes, t)
    return y / _length(y) / inverse_length(lift + t)[0], reason


def _coordinates(gaps: Tensor, slopes: Tensor, t: float) -> Tensor:
    """`-c / (gaps + t)`, zero where the gradient is."""
    return torch.where(slopes == 0, torch.zeros_like(slopes), -slopes / (gaps + t))


def _power(x: Tensor) -> int:
    """Return the exponent of the largest entry; the least there is for zeros."""
    power = exponent(x)
    return -_RANGE if power is None else power


def _length(y: Tensor) -> float:
    """`|y|`, whose square may leave the range of numbers."""
    largest = float(y.abs().max())
    return largest * float((y / largest).norm()) if 0.0 < largest < math.inf else largest
