"""Bounds on the eigenvalues of a symmetric operator, from Lanczos coefficients and Ritz pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import Tridiagonal

# Rounding, in units of eps times the norm, by which Ritz values may leave the exact spectrum. Measured on dense
# matrices: in float64 at most 2.5 up to n = 400 against Rayleigh quotients in extended precision
# (LAPACK's own eigenvalues are off by tens), at most 5 up to n = 1500 with several runs merged; in float32 at most 0.4.
_GUARD = 16.0


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
    alphas, betas = tridiagonal.alphas.tolist(), tridiagonal.betas.tolist()
    target = -math.log(delta)
    width = max(betas)
    while not _exceeds(alphas, betas, largest + width, target):
        width *= 4.0
    low, high = 0.0, width
    # On a logarithmic scale: the distance sought may be any power of ten below the spectrum's width.
    while high - low > 0.01 * low and high > 1e-16 * width:
        middle = 0.5 * (low + high) if low > 0.0 else 0.1 * high
        if _exceeds(alphas, betas, largest + middle, target):
            high = middle
        else:
            low = middle
    return float(largest + high)


def _exceeds(alphas: list[float], betas: list[float], point: float, target: float) -> bool:
    """Whether log p_k(point) >= target for the last k, by the pivots of point - T."""
    total, correction = 0.0, 0.0
    for alpha, beta in zip(alphas, betas, strict=True):
        pivot = point - alpha - correction
        # Not above the largest Ritz value, within rounding.
        if pivot <= 0.0:
            return False
        total += math.log(pivot) - math.log(beta)
        correction = beta * beta / pivot
    return total >= target


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Orthonormal approximate eigenvectors U of A, as far as bounds depend on them.

    Attributes:
        values: Ritz values Theta `(m,)`, float64 on the CPU.
        gram: R'R `(m, m)`, float64 on the CPU, with R = A U - U Theta orthogonal to U.
    """

    values: Tensor
    gram: Tensor

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def joined(self, values: Tensor, couplings: Tensor) -> RitzPairs:
        """With the Ritz pairs of one Lanczos run added, whose residuals are `couplings` times one unit vector."""
        old, new = self.gram.shape[0], couplings.shape[0]
        gram = torch.zeros(old + new, old + new, dtype=torch.float64)
        gram[:old, :old] = self.gram
        gram[old:, old:] = couplings[:, None] * couplings
        return RitzPairs(torch.cat([self.values, values]), gram)

    def ceilings(self, rest: float, size: int, count: int) -> list[float]:
        """Upper bounds on the largest eigenvalues of A, from a bound on the part B that U leaves over.

        In the basis (U, its complement) A is [[Theta, R'], [R, B]]. With B <= M I, A is at most
        [[Theta, R'], [R, M I]] in the order of quadratic forms, so each of its eigenvalues is at most that matrix's
        (Weyl's monotonicity, Horn & Johnson 2013, cor. 4.3.12), and those follow from R'R alone. The bounds
        by |R| and by |R|^2 / gap (Li & Li 2005) are its two regimes.

        Args:
            rest: M, at least the largest eigenvalue of B.
            size: Dimension n of A.
            count: How many bounds are wanted, 0 to n.

        Returns:
            Bounds, descending, on the `count` largest eigenvalues.
        """
        block = len(self)
        if block in (0, size):
            return sorted([*self.values.tolist(), *[rest] * (count - block)], reverse=True)[:count]
        weights, axes = torch.linalg.eigh(self.gram)
        root = axes * weights.clamp_min(0.0).sqrt()
        corner = rest * torch.eye(block, dtype=torch.float64)
        bordered = torch.cat([torch.cat([self.values.diag(), root], 1), torch.cat([root.T, corner], 1)])
        bounds = [*torch.linalg.eigvalsh(bordered).tolist(), *[rest] * (size - 2 * block)]
        return sorted(bounds, reverse=True)[:count]

    def mirrored(self) -> RitzPairs:
        """The same pairs of -A."""
        return RitzPairs(-self.values, self.gram)


@dataclass(frozen=True, eq=False)
class RitzBlock:
    """Ritz pairs with their vectors.

    Attributes:
        values: Ritz values `(m,)`, float64 on the CPU, ascending.
        vectors: U as orthonormal rows `(m, n)`, in the operator's dtype.
        residuals: R = A U - U Theta as rows `(m, n)`, orthogonal to U.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def pairs(self) -> RitzPairs:
        """What bounds need of the block."""
        return RitzPairs(self.values, (self.residuals @ self.residuals.T).to("cpu", torch.float64))

    def merge(self, values: Tensor, vectors: Tensor, residuals: Tensor) -> RitzBlock:
        """Rayleigh-Ritz on this block and on Ritz pairs W of P A P, P = I - U'U; needs no product.

        A W = Theta_W W + R_W + U (R'W), so all blocks of the projected matrix are known.

        Args:
            values: `(j,)`, float64.
            vectors: W as rows `(j, n)`, orthonormal and orthogonal to U.
            residuals: R_W as rows `(j, n)`, of P A P: orthogonal to U and W.
        """
        coupling = self.residuals @ vectors.T
        rows = torch.cat([self.residuals - coupling @ vectors, residuals])
        corner = coupling.to("cpu", torch.float64)
        upper = torch.cat([self.values.diag(), corner], 1)
        lower = torch.cat([corner.T, values.diag()], 1)
        merged, rotation = torch.linalg.eigh(torch.cat([upper, lower]))
        turn = rotation.T.to(vectors.dtype).to(vectors.device)
        return RitzBlock(merged, turn @ torch.cat([self.vectors, vectors]), turn @ rows)


@dataclass(frozen=True)
class Request:
    """What was asked: `ends` holds (sign, count), first for the largest, then for the smallest of A."""

    size: int
    ends: tuple[tuple[float, int], ...]
    tolerance: float
    failure: float
    eps: float

    @property
    def single(self) -> bool:
        """Whether one run says everything, since the multiplicity of lambda_1 does not matter to lambda_1."""
        return all(count <= 1 for _, count in self.ends)


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


def certifiable(request: Request, known: Knowledge) -> bool:
    """Whether the intervals would be narrow if nothing beyond the wanted values, within the slack, were left over.

    Each wanted residual must be within half the slack as well: the last wanted value rises as missed copies turn up,
    and a residual that only the gap to it excuses could then never be certified.
    """
    rest = known.rest
    for sign, count in request.ends:
        if len(known.pairs) < count:
            return False
        order = torch.argsort(sign * known.pairs.values, descending=True).tolist()[:count]
        for index in order:
            allowed = 0.5 * slack(request, known, float(known.pairs.values[index]))
            if float(known.pairs.gram[index, index]) > allowed**2:
                return False
        if count:
            last = sign * float(known.pairs.values[order[-1]])
            reach = last + 0.25 * slack(request, known, last)
            rest = rest.tighten(Range(-math.inf, reach) if sign > 0.0 else Range(-reach, math.inf))
    return certified(request, replace(known, rest=rest))


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
    return _GUARD * request.eps * known.norm + known.noise


def slack(request: Request, known: Knowledge, value: float) -> float:
    """Width allowed to the interval of a value."""
    return max(request.tolerance * abs(value), 4.0 * _guard(request, known))
