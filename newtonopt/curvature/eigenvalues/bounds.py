"""Bounds on the eigenvalues of a symmetric operator, from Lanczos coefficients and Ritz pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from newtonopt.curvature.eigenvalues.ritz_values import RitzBlock, RitzPairs
from newtonopt.solvers.lanczos import Tridiagonal

# Rounding, in units of eps times the norm, by which Ritz values may leave the exact spectrum. Measured on dense
# matrices: in float64 at most 2.5 up to n = 400 against Rayleigh quotients in extended precision
# (LAPACK's own eigenvalues are off by tens), at most 5 up to n = 1500 with several runs merged; in float32 at most 0.4.
GUARD = 16.0
# By how much the error of products may exceed what their asymmetry shows of it. Measured on float32 classifiers whose
# softmax has saturated, where it is all there is to see of the error: a factor of 5 at most.
_UNSEEN = 8.0
# Asymmetry, relative to the norm, from which products are those of no symmetric matrix.
ASYMMETRIC = 3e-3
# Vectors of length n in use besides those that are kept: the start, those of one Lanczos step, a product's.
_WORKSPACE = 8


def component_floor(size: int, failure: float) -> float:
    """The delta with P(|v'x| < delta) <= failure, v uniform on the sphere, x any fixed unit vector.

    Args:
        size: Dimension n >= 1 of the space.
        failure: Probability in (0, 1).

    Returns:
        delta in (0, 1]. From n = 3 on the density of v'x is largest at zero, where it is
        c_n = Gamma(n/2) / (sqrt(pi) Gamma((n-1)/2)), hence delta = failure / (2 c_n).
    """
    if size == 1:
        return 1.0
    if size == 2:
        # The density is largest at the ends; the distribution of the angle is uniform.
        return math.sin(0.5 * math.pi * failure)
    log_density = math.lgamma(0.5 * size) - 0.5 * math.log(math.pi) - math.lgamma(0.5 * (size - 1))
    return 0.5 * failure * math.exp(-log_density)


def spectrum_ceiling(tridiagonal: Tridiagonal, delta: float, largest: float) -> float:
    """Upper bound on the largest eigenvalue, valid unless the start's part along its eigenvector is below delta.

    v_{k+1} = p_k(A) v_1 has norm one, so (v_1'x)^2 p_k(lambda)^2 <= 1 for every eigenpair: lambda_max is at most
    the t above all Ritz values where p_k(t) = 1/delta (van Dorsselaer, Hochstenbach & van der Vorst 2001, sec. 3).
    The last k is used: a bound from an earlier one may lie below a Ritz value found since, which proves that the start
    was such an exception, and a bound that is known to be wrong must not be reported.

    Restarts leave that as it is, for they change the basis and not the polynomial. In the basis Q of any cycle, x'Q is
    beta x'q e' (lambda - T)^{-1}, last row of the inverse, q the vector after the cycle. The entry of the vector with
    which the cycle began ties x'q to the x'q of the cycle before: p is the product of the cycles' own ratios. The
    rounding F of a cycle enters x'v_1 as x'F (lambda - T)^{-1}, weighed down by the ratios of the cycles before.

    Args:
        tridiagonal: Coefficients of a run from a random start.
        delta: In (0, 1], from `component_floor`.
        largest: Largest Ritz value.

    Returns:
        The bound, at least `largest`; without any allowance for rounding. Equal to `largest` where
        the Krylov space is invariant.
    """
    if tridiagonal.invariant:
        return largest
    cycles = list(_cycles(tridiagonal))
    target = -math.log(delta)
    width = max(cycles[-1][3])
    while _growth(cycles, largest + width) < target:
        width *= 4.0
    low, high = 0.0, width
    # On a logarithmic scale: the distance sought may be any power of ten below the spectrum's width.
    while high - low > 0.01 * low and high > 1e-16 * width:
        middle = 0.5 * (low + high) if low > 0.0 else 0.1 * high
        if _growth(cycles, largest + middle) >= target:
            high = middle
        else:
            low = middle
    return float(largest + high)


# Kept Ritz values and squared couplings, diagonal and off-diagonal.
_Cycle = tuple[list[float], list[float], list[float], list[float]]


def _cycles(tridiagonal: Tridiagonal | None) -> Iterator[_Cycle]:
    """The coefficients between restarts, the last first."""
    while tridiagonal is not None:
        squares = tridiagonal.couplings.square().tolist()
        yield tridiagonal.values.tolist(), squares, tridiagonal.alphas.tolist(), tridiagonal.betas.tolist()
        tridiagonal = tridiagonal.before


def _growth(cycles: list[_Cycle], point: float) -> float:
    """Logarithm of p(point) by the pivots of point - T, minus infinity where that is not above all Ritz values."""
    total = 0.0
    for values, squares, alphas, betas in cycles:
        correction = 0.0
        for value, square in zip(values, squares, strict=True):
            if point <= value:
                return -math.inf
            correction += square / (point - value)
        for alpha, beta in zip(alphas, betas, strict=True):
            pivot = point - alpha - correction
            if pivot <= 0.0:
                return -math.inf
            total += math.log(pivot) - math.log(beta)
            correction = beta * beta / pivot
    return total


@dataclass(frozen=True)
class Request:
    """What was asked: `ends` holds (sign, count), first for the largest, then for the smallest of A."""

    size: int
    ends: tuple[tuple[float, int], ...]
    tolerance: float
    failure: float
    eps: float
    max_products: int
    max_vectors: int

    @property
    def single(self) -> bool:
        """Whether one run says everything, since the multiplicity of lambda_1 does not matter to lambda_1."""
        return all(count <= 1 for _, count in self.ends)

    @property
    def kept(self) -> int:
        """How many Ritz vectors are kept between runs at most."""
        return max(sum(count for _, count in self.ends), self.max_vectors // 6)

    def run_length(self, block: int) -> int:
        """How many Lanczos vectors there is room for: beside the block, the next one, and the residuals of both."""
        return self.max_vectors - _WORKSPACE - 2 * block - 2 * self.kept

    def restart_kept(self, room: int) -> int:
        """How many Ritz vectors a run keeps at a restart at most: there is room for those that outlast it."""
        return min(2 * self.kept, room // 2)


@dataclass(frozen=True)
class Range:
    """Bounds on a spectrum."""

    low: float
    high: float

    def beyond(self, sign: float) -> float:
        """Bound on the largest eigenvalue of sign times the operator."""
        return self.high if sign > 0.0 else -self.low

    def tighten(self, other: Range) -> Range:
        """What both allow."""
        return Range(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True, eq=False)
class Knowledge:
    """All that is known so far; `pairs` may run ahead of `block` while a run is being judged.

    `whole` encloses the spectrum of A, `rest` that of A on the block's complement.
    """

    block: RitzBlock
    pairs: RitzPairs
    whole: Range
    rest: Range
    norm: float = 0.0
    noise: float = 0.0
    products: int = 0


def certifiable(request: Request, known: Knowledge, held: int) -> bool:
    """Whether the intervals would be narrow if nothing beyond the wanted values, within the slack, were left over.

    Each wanted residual must be within half the slack as well: the last wanted value rises as missed copies turn up,
    and a residual that only the gap to it excuses could then never be certified. Not those of the first `held` pairs,
    which a run does not refine: merging equal eigenvalues may have turned their residuals into one, a little larger.
    """
    rest = known.rest
    for sign, count in request.ends:
        if len(known.pairs) < count:
            return False
        order = torch.argsort(sign * known.pairs.values, descending=True).tolist()[:count]
        for index in order:
            allowed = 0.5 * slack(request, known, float(known.pairs.values[index]))
            if index >= held and float(known.pairs.gram[index, index]) > allowed**2:
                return False
        if count:
            last = sign * float(known.pairs.values[order[-1]])
            reach = last + 0.25 * slack(request, known, last)
            rest = rest.tighten(Range(-math.inf, reach) if sign > 0.0 else Range(-reach, math.inf))
    return certified(request, replace(known, rest=rest))


def settled(request: Request, known: Knowledge) -> bool:
    """Whether all wanted values are there and an eigenvalue lies within the tolerance of each."""
    norms = known.pairs.gram.diagonal().clamp_min(0.0).sqrt()
    # Fewer would be counted at both ends.
    if len(known.pairs) < min(sum(count for _, count in request.ends), request.size):
        return False
    for sign, count in request.ends:
        for index in torch.argsort(sign * known.pairs.values, descending=True).tolist()[:count]:
            if float(norms[index]) > slack(request, known, float(known.pairs.values[index])):
                return False
    return True


def certified(request: Request, known: Knowledge) -> bool:
    """Whether all wanted values are there with narrow intervals."""
    for sign, count in request.ends:
        if len(known.pairs) < count:
            return False
        for value, lower, upper in intervals(request, known, sign, count):
            if upper - lower > slack(request, known, value):
                return False
    return True


def intervals(request: Request, known: Knowledge, sign: float, count: int) -> list[tuple[float, float, float]]:
    """(value, lower, upper) of the largest eigenvalues of sign * A, descending.

    The lower ends are Cauchy's interlacing: the i-th largest Ritz value never exceeds the i-th largest eigenvalue.
    """
    if count == 0:
        return []
    pairs = known.pairs if sign > 0.0 else known.pairs.mirrored()
    values = pairs.values.sort(descending=True).values.tolist()[:count]
    ceilings = pairs.ceilings(known.rest.beyond(sign), request.size, count)
    guard, limit = _guard(request, known), known.whole.beyond(sign)
    return [
        (value, value - guard, max(value, min(ceiling, limit)) + guard)
        for value, ceiling in zip(values, ceilings, strict=False)
    ]


def _guard(request: Request, known: Knowledge) -> float:
    rounding = GUARD * request.eps * known.norm
    return rounding + known.noise * (1.0 if known.noise <= rounding else _UNSEEN)


def is_symmetric(known: Knowledge) -> bool:
    """Whether the products made were those of a symmetric matrix, as far as bounds need it."""
    return known.noise <= ASYMMETRIC * known.norm


def slack(request: Request, known: Knowledge, value: float) -> float:
    """Width allowed to the interval of a value."""
    size = max(abs(value), request.tolerance * known.norm)
    return max(request.tolerance * size, 4.0 * _guard(request, known))
