"""Minimisers in a ball and with a cubic term, in the coordinates of the eigenvectors: the secular equations.

In both cases the minimiser has `(L + m I) y = -c` with `L + m I` positive semi-definite, and the multiplier `m` solves
one scalar equation: `|y(m)| = radius` (More & Sorensen 1983) or `|y(m)| = m / sigma` (Cartis, Gould & Toint 2011).
`_on_the_boundary` solves it as `1 / |y(m)| = w(m)`, which is nearly linear. It differs from the paper's algorithm in
this: eigenvalues are known, so that `|y(m)|` costs `k` divisions and no factorisation; Newton's method starts left of
the root, from where it is monotone and needs no safeguard; the hard case is recognised at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from newtonopt.vectors.scaling import exponent, shifted, times_power

Minimise = Callable[[Tensor, Tensor], tuple[Tensor, str]]

_MAX_ITERATIONS = 100
# No float64 has a larger exponent.
_RANGE = 1100


def above_rounding(values: Tensor, vectors: Tensor, matrix: Tensor, eps: float) -> Tensor:
    """Return the eigenvalues, those that may be rounding raised to their rounding error.

    Entries of the matrix are uncertain by `eps |A_ij|`, and the eigenvalue of `u` by about `k eps |u|'|A||u|`. Computed
    eigenvalues of a singular matrix are tiny and of either sign: that is no negative curvature, and a step along them
    could have any length. Small eigenvalues of a badly scaled matrix may be exact to many digits; these stay.

    Args:
        values: Eigenvalues `(k,)`, ascending.
        vectors: Eigenvectors as columns, `(k, k)`.
        matrix: Symmetric matrix `A`, `(k, k)`.
        eps: Machine epsilon of the dtype in which the matrix or its products were computed.
    """
    sizes = vectors.abs()
    rounding = values.shape[0] * eps * (sizes * (matrix.abs() @ sizes)).sum(0)
    return torch.where(values.abs() <= rounding, rounding, values)


def ball(values: Tensor, slopes: Tensor, radius: float) -> tuple[Tensor, str]:
    """Minimise `c'y + y'Ly / 2` in `|y| <= radius`, `L` diagonal (More & Sorensen 1983), hard case included.

    The minimiser has `(L + m I) y = -c` with `L + m I` positive semi-definite, `m >= 0` and `m (radius - |y|) = 0`.

    Args:
        values: Eigenvalues `(k,)`, ascending, the diagonal of `L`.
        slopes: `c`, `(k,)`, the gradient in the eigenvectors' coordinates.
        radius: Positive number.

    Returns:
        `y`, `(k,)`, float64 on the CPU, and the case in words.

    Example:
        >>> import torch
        >>> y, case = ball(torch.tensor([1.0, 2.0]), torch.tensor([1.2, 2.4]), 1.0)  # m = 1
        >>> y.round(decimals=4).tolist(), case
        ([-0.6, -0.8], 'on the boundary')
    """
    values, slopes = values.double().cpu(), slopes.double().cpu()
    # Powers of two make eigenvalues, slopes and radius at most one.
    far = math.frexp(radius)[1]
    size = max(_power(values), _power(slopes) - far)
    y, reason = _ball(times_power(values, -size), times_power(slopes, -size - far), shifted(radius, -far))
    return times_power(y, far), reason


def _ball(values: Tensor, slopes: Tensor, radius: float) -> tuple[Tensor, str]:
    # m = lift + t with t >= 0: `lift` makes the matrix positive semi-definite, and `gaps` are its eigenvalues then.
    lift = max(0.0, -float(values[0]))
    gaps = values + lift  # the lowest is exactly zero where the matrix is not positive definite
    # Left of the root: where one entry alone has |y_i| = radius, |y| is at least the radius.
    least = max(0.0, float((slopes.abs() / radius - gaps).max()))
    # A definite matrix may have its minimiser inside, with m = 0.
    if lift == 0.0:
        inside = _coordinates(gaps, slopes, 0.0)
        if bool(torch.isfinite(inside).all()) and _length(inside) <= radius:
            return inside, "inside the ball"
    return _on_the_boundary(gaps, slopes, lift, least, lambda shift: (1 / radius, 0.0), "on the boundary")


def cubic(values: Tensor, slopes: Tensor, sigma: float) -> tuple[Tensor, str]:
    """Minimise `c'y + y'Ly / 2 + sigma |y|^3 / 3`, `L` diagonal (Cartis, Gould & Toint 2011, sec. 6.1).

    The minimiser has `(L + m I) y = -c` with `L + m I` positive semi-definite and `m = sigma |y|`.

    Args:
        values: Eigenvalues `(k,)`, ascending, the diagonal of `L`.
        slopes: `c`, `(k,)`, the gradient in the eigenvectors' coordinates.
        sigma: Positive number.

    Returns:
        `y`, `(k,)`, float64 on the CPU, and the case in words.

    Example:
        >>> import torch
        >>> y, case = cubic(torch.tensor([1.0, 2.0]), torch.tensor([1.2, 2.4]), 1.0)  # m = |y| = 1
        >>> y.round(decimals=4).tolist(), case
        ([-0.6, -0.8], 'held by the cubic term')
    """
    values, slopes = values.double().cpu(), slopes.double().cpu()
    # Powers of two make eigenvalues, slopes and sigma at most one. The minimiser's m has the size of the eigenvalues or
    # of the root of sigma |c|, and |y| = m / sigma.
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
    # Left of the root: where one entry alone has |y_i| = m / sigma, |y| is at least that. A quadratic equation in t.
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
    """Solve `1 / |y(m)| = w(m)` for `m = lift + t` by Newton's method from `t = least`, left of the root.

    `1 / |y| - w` is concave and increasing, so Newton's iterates from the left grow monotonically to the root.

    Args:
        gaps: Eigenvalues plus `lift`, `(k,)`.
        slopes: Gradient `c`, `(k,)`.
        lift: Least multiplier that makes the matrix positive semi-definite.
        least: A lower bound on the root `t`.
        inverse_length: Function that returns `w(m)` and its derivative.
        reason: The case in words.
    """
    t = least
    y = _coordinates(gaps, slopes, t)
    wanted = inverse_length(lift + t)[0]
    if t == 0.0 and _length(y) * wanted < 1.0:
        # The hard case: the gradient has no part along the lowest eigenvector, and even the least multiplier gives too
        # short a step. A part along that eigenvector, which changes neither equation, completes the length.
        y[0] = math.sqrt(max(1 / wanted - _length(y), 0.0)) * math.sqrt(1 / wanted + _length(y))
        return y, "hard case: completed along the lowest eigenvector"
    for _ in range(_MAX_ITERATIONS):
        norm = _length(y)
        if norm == 0.0:
            return y, "the step is rounding"
        wanted, change = inverse_length(lift + t)
        # d(1 / |y|)/dt = y'(L + m I)^-1 y / |y|^3.
        slope = float(((y / norm).square() / (gaps + t)).nansum()) / norm - change  # 0 / 0 in the hard case
        update = (wanted - 1 / norm) / slope
        if not update > 1e-15 * t:
            break
        t += update
        y = _coordinates(gaps, slopes, t)
    # The length to the last digit.
    return y / _length(y) / inverse_length(lift + t)[0], reason


def _coordinates(gaps: Tensor, slopes: Tensor, t: float) -> Tensor:
    """Return `y(m) = -c / (gaps + t)`, with zeros where the gradient has them."""
    return torch.where(slopes == 0, torch.zeros_like(slopes), -slopes / (gaps + t))


def _power(x: Tensor) -> int:
    """Return the exponent of the largest entry, or `-_RANGE` for zeros."""
    power = exponent(x)
    return -_RANGE if power is None else power


def _length(y: Tensor) -> float:
    """Return `|y|`, also where its square leaves the range of numbers."""
    largest = float(y.abs().max())
    return largest * float((y / largest).norm()) if 0.0 < largest < math.inf else largest
