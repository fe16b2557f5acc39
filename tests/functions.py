"""Functions with published minima, in float64: J. J. More, B. S. Garbow and K. E. Hillstrom, "Testing Unconstrained
Optimization Software", ACM Transactions on Mathematical Software 7 (1981). Each docstring begins with the number there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, pi, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Function:
    """A sum of squares, the collection's starting point, and the values of the known minima.

    Args:
        name: Name of the function, with its number of variables where that varies.
        start: The standard starting point.
        value: The sum of squares at a vector, differentiable twice.
        minima: Values of the known local minima and, where the function falls towards one, of its limits at infinity.
    """

    name: str
    start: tuple[float, ...]
    value: Callable[[Tensor], Tensor]
    minima: tuple[float, ...]


FUNCTIONS: dict[str, Function] = {}

Residuals = Callable[[Tensor], Tensor]


def _add(name: str, start: Iterable[float], *minima: float) -> Callable[[Residuals], Residuals]:
    """Add the sum of squares of the decorated residuals to FUNCTIONS."""

    def add(residuals: Residuals) -> Residuals:
        FUNCTIONS[name] = Function(name, tuple(start), lambda x: residuals(x).square().sum(), minima)
        return residuals

    return add


def _numbers(text: str) -> Tensor:
    return torch.tensor([float(number) for number in text.split()], dtype=torch.float64)


def _range(end: int, start: int = 1) -> Tensor:
    """Return the integers from `start` to `end`, both included."""
    return torch.arange(start, end + 1, dtype=torch.float64)


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variable before each one and the variable after it; zero beyond the ends."""
    zero = x.new_zeros(1)
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


@_add("extended_rosenbrock", (-1.2, 1) * 5, 0.0)
@_add("rosenbrock", (-1.2, 1), 0.0)
def rosenbrock(x: Tensor) -> Tensor:
    """1, and 21 with ten variables."""
    odd, even = x[::2], x[1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd])


@_add("freudenstein_roth", (0.5, -2), 0.0, 48.9842536792)
def freudenstein_roth(x: Tensor) -> Tensor:
    """2."""
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


@_add("powell_badly_scaled", (0, 1), 0.0)
def powell_badly_scaled(x: Tensor) -> Tensor:
    """3."""
    a, b = x
    return torch.stack([1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001])


@_add("brown_badly_scaled", (1, 1), 0.0)
def brown_badly_scaled(x: Tensor) -> Tensor:
    """4."""
    a, b = x
    return torch.stack([a - 1e6, b - 2e-6, a * b - 2])


@_add("beale", (1, 1), 0.0)
def beale(x: Tensor) -> Tensor:
    """5."""
    return _numbers("1.5 2.25 2.625") - x[0] * (1 - x[1] ** _range(3))


@_add("jennrich_sampson", (0.3, 0.4), 124.362182356)
def jennrich_sampson(x: Tensor) -> Tensor:
    """6, with ten residuals."""
    i = _range(10)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


@_add("helical_valley", (-1, 0, 0), 0.0)
def helical_valley(x: Tensor) -> Tensor:
    """7."""
    a, b, c = x
    angle = torch.atan(b / a) / (2 * pi) + torch.where(a < 0, 0.5, 0.0)
    return torch.stack([10 * (c - 10 * angle), 10 * (torch.sqrt(a**2 + b**2) - 1), c])


@_add("bard", (1, 1, 1), 8.21487730658e-3, 17.4286933333)
def bard(x: Tensor) -> Tensor:
    """8."""
    u, y = _range(15), _numbers(".14 .18 .22 .25 .29 .32 .35 .39 .37 .58 .73 .96 1.34 2.10 4.39")
    v = 16 - u
    return y - x[0] - u / (v * x[1] + torch.minimum(u, v) * x[2])


@_add("gaussian", (0.4, 1, 0), 1.12793276962e-8)
def gaussian(x: Tensor) -> Tensor:
    """9."""
    half = _numbers(".0009 .0044 .0175 .0540 .1295 .2420 .3521")
    y = torch.cat([half, _numbers(".3989"), half.flip(0)])
    return x[0] * torch.exp(-x[1] * ((8 - _range(15)) / 2 - x[2]) ** 2 / 2) - y


@_add("meyer", (0.02, 4000, 250), 87.945855171)
def meyer(x: Tensor) -> Tensor:
    """10."""
    y = _numbers("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")
    return x[0] * torch.exp(x[1] / (45 + 5 * _range(16) + x[2])) - y


@_add("gulf", (5, 2.5, 0.15), 0.0)
def gulf(x: Tensor) -> Tensor:
    """11, with 99 residuals."""
    t = _range(99) / 100
    return torch.exp(-((25 + (-50 * torch.log(t)) ** (2 / 3) - x[1]).abs() ** x[2]) / x[0]) - t


@_add("box", (0, 10, 20), 0.0)
def box(x: Tensor) -> Tensor:
    """12, with ten residuals."""
    t = _range(10) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


@_add("extended_powell_singular", (3, -1, 0, 1) * 3, 0.0)
@_add("powell_singular", (3, -1, 0, 1), 0.0)
def powell_singular(x: Tensor) -> Tensor:
    """13, and 22 with twelve variables."""
    a, b, c, d = x.view(-1, 4).T
    return torch.cat([a + 10 * b, sqrt(5) * (c - d), (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2])


@_add("wood", (-3, -1, -3, -1), 0.0)
def wood(x: Tensor) -> Tensor:
    """14."""
    a, b, c, d = x
    first = [10 * (b - a**2), 1 - a, sqrt(90) * (d - c**2), 1 - c]
    return torch.stack([*first, sqrt(10) * (b + d - 2), (b - d) / sqrt(10)])


@_add("kowalik_osborne", (0.25, 0.39, 0.415, 0.39), 3.07505603849e-4, 1.02734304870e-3)
def kowalik_osborne(x: Tensor) -> Tensor:
    """15."""
    y = _numbers(".1957 .1947 .1735 .1600 .0844 .0627 .0456 .0342 .0323 .0235 .0246")
    u = _numbers("4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625")
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


@_add("brown_dennis", (25, 5, -5, -1), 85822.2016264)
def brown_dennis(x: Tensor) -> Tensor:
    """16, with twenty residuals."""
    t = _range(20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


@_add("osborne_1", (0.5, 1.5, -1, 0.01, 0.02), 5.46489469748e-5)
def osborne_1(x: Tensor) -> Tensor:
    """17."""
    y = _numbers(
        """.844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580
        .558 .538 .522 .506 .490 .478 .467 .457 .448 .438 .431 .424 .420 .414 .411 .406"""
    )
    t = 10 * _range(32, start=0)
    return y - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


@_add("biggs_exp6", (1, 2, 1, 1, 1, 1), 0.0, 5.65564992550e-3)
def biggs_exp6(x: Tensor) -> Tensor:
    """18, with thirteen residuals."""
    t = _range(13) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


@_add("osborne_2", (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), 4.01377362935e-2)
def osborne_2(x: Tensor) -> Tensor:
    """19."""
    y = _numbers(
        """1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606 .602 .626 .651 .724 .649
        .649 .694 .644 .624 .661 .612 .558 .533 .495 .500 .423 .395 .375 .372 .391 .396 .405 .428 .429 .523 .562 .607
        .653 .672 .708 .633 .668 .645 .632 .591 .559 .597 .625 .739 .710 .729 .720 .636 .581 .428 .292 .162 .098 .054"""
    )
    t = _range(64, start=0) / 10
    peaks = x[1:4] * torch.exp(-((t[:, None] - x[8:]) ** 2) * x[5:8])
    return y - x[0] * torch.exp(-t * x[4]) - peaks.sum(dim=1)


@_add("watson_9", (0,) * 9, 1.39976013804e-6)
@_add("watson_6", (0,) * 6, 2.28767005355e-3)
def watson(x: Tensor) -> Tensor:
    """20, with six variables and with nine."""
    powers = (_range(29) / 29)[:, None] ** _range(len(x) - 1, start=0)
    slope = powers[:, :-1] @ (_range(len(x) - 1) * x[1:])
    return torch.cat([slope - (powers @ x) ** 2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


@_add("penalty_1", range(1, 5), 2.24997750090e-5)
def penalty_1(x: Tensor) -> Tensor:
    """23, with four variables."""
    return torch.cat([sqrt(1e-5) * (x - 1), x.dot(x)[None] - 0.25])


@_add("penalty_2", (0.5,) * 4, 9.37629300736e-6)
def penalty_2(x: Tensor) -> Tensor:
    """24, with four variables."""
    i, powers = _range(len(x)), torch.exp(x / 10)
    y = torch.exp(i[1:] / 10) + torch.exp(i[:-1] / 10)
    sums, ends = powers[1:] + powers[:-1] - y, powers[1:] - exp(-0.1)
    return torch.cat([x[:1] - 0.2, sqrt(1e-5) * sums, sqrt(1e-5) * ends, i.flip(0).dot(x**2)[None] - 1])


@_add("variably_dimensioned", (1 - j / 10 for j in range(1, 11)), 0.0)
def variably_dimensioned(x: Tensor) -> Tensor:
    """25, with ten variables."""
    total = _range(len(x)).dot(x - 1)[None]
    return torch.cat([x - 1, total, total**2])


@_add("trigonometric", (0.1,) * 10, 0.0, 4.473565813e-7, 2.795056122e-5, 4.218633888e-5, 8.788225218e-4)
def trigonometric(x: Tensor) -> Tensor:
    """26, with ten variables; the collection lists the first and the third of the minima."""
    cosines = torch.cos(x)
    return len(x) - cosines.sum() + _range(len(x)) * (1 - cosines) - torch.sin(x)


@_add("brown_almost_linear", (0.5,) * 10, 0.0, 1.0)
def brown_almost_linear(x: Tensor) -> Tensor:
    """27, with ten variables."""
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), x.prod()[None] - 1])


@_add("discrete_boundary_value", (j / 11 * (j / 11 - 1) for j in range(1, 11)), 0.0)
def discrete_boundary_value(x: Tensor) -> Tensor:
    """28, with ten variables."""
    before, after = _neighbours(x)
    h = 1 / (len(x) + 1)
    return 2 * x - before - after + h**2 * (x + h * _range(len(x)) + 1) ** 3 / 2


@_add("discrete_integral_equation", (j / 11 * (j / 11 - 1) for j in range(1, 11)), 0.0)
def discrete_integral_equation(x: Tensor) -> Tensor:
    """29, with ten variables."""
    h = 1 / (len(x) + 1)
    t = h * _range(len(x))
    kernel = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t))
    return x + h / 2 * kernel @ (x + t + 1) ** 3


@_add("broyden_tridiagonal", (-1,) * 10, 0.0)
def broyden_tridiagonal(x: Tensor) -> Tensor:
    """30, with ten variables."""
    before, after = _neighbours(x)
    return (3 - 2 * x) * x - before - 2 * after + 1


@_add("broyden_banded", (-1,) * 10, 0.0)
def broyden_banded(x: Tensor) -> Tensor:
    """31, with ten variables."""
    band = torch.ones(len(x), len(x), dtype=x.dtype).tril(1).triu(-5).fill_diagonal_(0)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


@_add("chebyquad", (j / 9 for j in range(1, 9)), 3.51687372568e-3)
def chebyquad(x: Tensor) -> Tensor:
    """35, with eight variables: means of the shifted Chebyshev polynomials less their integrals."""
    before, now, means = torch.ones_like(x), 2 * x - 1, []
    for i in range(1, len(x) + 1):
        means.append(now.mean() + (1 / (i**2 - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * (2 * x - 1) * now - before
    return torch.stack(means)
