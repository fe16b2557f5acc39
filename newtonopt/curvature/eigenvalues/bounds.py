"""Ritz pairs, that is approximate eigenpairs from a subspace, and intervals that hold the exact eigenvalues.

The intervals follow from the Lanczos coefficients and from the residuals of the Ritz pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import LanczosResult, Tridiagonal

# Rounding, in units of eps times the norm, by which Ritz values may leave the exact spectrum. Measured on dense
# matrices: in float64 at most 2.5 up to n = 400 against Rayleigh quotients in extended precision
# (LAPACK's own eigenvalues are off by tens), at most 5 up to n = 1500 with several runs merged; in float32 at most 0.4.
GUARD = 16.0
# Factor by which the error of products may exceed their asymmetry, which is all that shows of it. Measured on float32
# classifiers whose softmax has saturated: at most 5.
_UNSEEN = 8.0
# Asymmetry of products, relative to the norm, from which no symmetric matrix has such products.
ASYMMETRIC = 3e-3
# Vectors of length n in use besides those that are kept: the start, those of one Lanczos step, those of a product.
_WORKSPACE = 8


def component_floor(size: int, failure: float) -> float:
    """Return the delta with P(|v'x| < delta) <= failure, for v uniform on the sphere and a fixed unit vector x.

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
    """Return an upper bound on the largest eigenvalue, valid if the start's part along its eigenvector is >= delta.

    v_{k+1} = p_k(A) v_1 has norm one, so (v_1'x)^2 p_k(lambda)^2 <= 1 for every eigenpair: lambda_max is at most
    the t above all Ritz values where p_k(t) = 1/delta (van Dorsselaer, Hochstenbach & van der Vorst 2001, sec. 3).

    This differs from the paper in two points:

    1. Only the last k is used. A bound from an earlier one may lie below a Ritz value found since, which proves that
       the start has too small a part along the eigenvector, and a bound that is known to be wrong must not be reported.
    2. The run may have been restarted, which changes the basis and not the polynomial. In the basis Q of any cycle,
       x'Q is beta x'q e' (lambda - T)^{-1}, the last row of the inverse, with q the vector after the cycle. The entry
       that belongs to the first vector of the cycle ties x'q to the x'q of the cycle before: p is the product of
       the cycles' own ratios. The rounding F of a cycle enters x'v_1 as x'F (lambda - T)^{-1}, weighed down by the
       ratios of the cycles before.

    Args:
        tridiagonal: Coefficients of a run from a random start.
        delta: Least part in (0, 1], from `component_floor`.
        largest: Largest Ritz value.

    Returns:
        The bound, at least `largest`, without any allowance for rounding; `largest` itself if the Krylov space is
        invariant.
    """
    if tridiagonal.invariant:
        return largest
    cycles = list(_cycles(tridiagonal))
    target = -math.log(delta)
    width = max(cycles[-1][3])
    while _log_polynomial(cycles, largest + width) < target:
        width *= 4.0
    low, high = 0.0, width
    # Bisection on a logarithmic scale: the distance sought may be any power of ten below the spectrum's width.
    while high - low > 0.01 * low and high > 1e-16 * width:
        middle = 0.5 * (low + high) if low > 0.0 else 0.1 * high
        if _log_polynomial(cycles, largest + middle) >= target:
            high = middle
        else:
            low = middle
    return float(largest + high)


# Coefficients between two restarts: kept Ritz values and their squared couplings, diagonal and off-diagonal of T.
_Cycle = tuple[list[float], list[float], list[float], list[float]]


def _cycles(tridiagonal: Tridiagonal | None) -> Iterator[_Cycle]:
    """Yield the coefficients of each cycle, the last one first."""
    while tridiagonal is not None:
        squares = tridiagonal.couplings.square().tolist()
        yield tridiagonal.values.tolist(), squares, tridiagonal.alphas.tolist(), tridiagonal.betas.tolist()
        tridiagonal = tridiagonal.before


def _log_polynomial(cycles: list[_Cycle], point: float) -> float:
    """Return log p(point), minus infinity unless the point is above all Ritz values.

    p(t) = det(t - T) / (beta_1 ... beta_k); the determinant is the product of the pivots of t - T.
    """
    total = 0.0
    for values, squares, alphas, betas in cycles:
        # Eliminating the kept Ritz vectors changes the first pivot alone.
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
    """The arguments of a measurement.

    Attributes:
        size: Dimension n of the operator.
        ends: Pairs (sign, count): first the number of largest eigenvalues, then, with sign -1, that of smallest ones.
        tolerance: Relative width allowed to an interval.
        failure: Probability with which an interval may fail to hold its eigenvalue.
        eps: Relative error of a product.
        max_products: Budget.
        max_vectors: Bound on the vectors of length n in use.
        spare: Number of largest eigenvalues behind the wanted ones that are returned too, as they are by then.
    """

    size: int
    ends: tuple[tuple[float, int], ...]
    tolerance: float
    failure: float
    eps: float
    max_products: int
    max_vectors: int
    spare: int = 0

    @property
    def with_spare(self) -> Request:
        """The request for all that is returned."""
        (sign, top), bottom = self.ends
        return replace(self, ends=((sign, min(top + self.spare, self.size)), bottom), spare=0)

    @property
    def one_run_suffices(self) -> bool:
        """Whether one run says everything, since the multiplicity of lambda_1 does not matter to lambda_1."""
        return all(count <= 1 for _, count in self.ends)

    @property
    def kept(self) -> int:
        """Largest number of Ritz vectors kept between runs."""
        return max(sum(count for _, count in self.ends), self.max_vectors // 6)

    def run_length(self, block: int) -> int:
        """Return how many Lanczos vectors fit beside a block, the next block and the residuals of both."""
        return self.max_vectors - _WORKSPACE - 2 * block - 2 * self.kept

    def restart_kept(self, room: int) -> int:
        """Return how many Ritz vectors a run keeps at a restart at most, if `room` vectors fit."""
        return min(2 * self.kept, room // 2)


@dataclass(frozen=True)
class Interval:
    """An interval that holds a spectrum."""

    low: float
    high: float

    def ceiling(self, sign: float) -> float:
        """Return the bound on the largest eigenvalue of sign times the operator."""
        return self.high if sign > 0.0 else -self.low

    def tighten(self, other: Interval) -> Interval:
        """Return the intersection of two intervals."""
        return Interval(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Everything known so far of a spectrum.

    Attributes:
        block: Ritz pairs found and merged.
        pairs: Ritz pairs that count. They run ahead of `block` while a run that goes on is being judged.
        whole: Interval that holds the spectrum of A.
        rest: Interval that holds the spectrum of A on the complement of the block.
        norm: Largest magnitude of a Ritz value seen.
        noise: Largest asymmetry of the products seen, in the units of the norm.
        products: Products used.
        errors: Estimated errors of the pairs' values, after a run that tracks; None: they were not estimated.
    """

    block: RitzBlock
    pairs: RitzPairs
    whole: Interval
    rest: Interval
    norm: float = 0.0
    noise: float = 0.0
    products: int = 0
    errors: Tensor | None = None


def certifiable(request: Request, known: Knowledge, held: int) -> bool:
    """Return whether all intervals would be narrow if the complement held nothing beyond the wanted values.

    "Beyond" allows for a quarter of the width that intervals may have. Each wanted residual must also be within half of
    that width: the last wanted value rises as missed copies turn up, and a residual that is small only against the gap
    to it could then never be certified. The first `held` residuals are exempt, as a run does not refine them: merging
    equal eigenvalues may have turned their residuals into one that is a little larger.
    """
    rest = known.rest
    for sign, count in request.ends:
        if len(known.pairs) < count:
            return False
        order = torch.argsort(sign * known.pairs.values, descending=True).tolist()[:count]
        for index in order:
            allowed = 0.5 * allowed_width(request, known, float(known.pairs.values[index]))
            if index >= held and float(known.pairs.gram[index, index]) > allowed**2:
                return False
        if count:
            last = sign * float(known.pairs.values[order[-1]])
            reach = last + 0.25 * allowed_width(request, known, last)
            rest = rest.tighten(Interval(-math.inf, reach) if sign > 0.0 else Interval(-reach, math.inf))
    return certified(request, replace(known, rest=rest))


def settled(request: Request, known: Knowledge) -> bool:
    """Return whether all wanted values are there and an eigenvalue lies within the tolerance of each."""
    norms = known.pairs.gram.diagonal().clamp_min(0.0).sqrt()
    # With fewer pairs than that, one pair would count at both ends.
    if len(known.pairs) < min(sum(count for _, count in request.ends), request.size):
        return False
    for sign, count in request.ends:
        for index in torch.argsort(sign * known.pairs.values, descending=True).tolist()[:count]:
            if float(norms[index]) > allowed_width(request, known, float(known.pairs.values[index])):
                return False
    return True


def certified(request: Request, known: Knowledge) -> bool:
    """Return whether all wanted values are there with narrow intervals."""
    for sign, count in request.ends:
        if len(known.pairs) < count:
            return False
        for value, lower, upper in intervals(request, known, sign, count):
            if upper - lower > allowed_width(request, known, value):
                return False
    return True


def intervals(request: Request, known: Knowledge, sign: float, count: int) -> list[tuple[float, float, float]]:
    """Return (value, lower, upper) of the `count` largest eigenvalues of sign * A, descending.

    The lower ends are Cauchy's interlacing: the i-th largest Ritz value never exceeds the i-th largest eigenvalue.
    The upper ends are Weyl's bounds, or the bound on the whole spectrum if that is lower. Both allow for rounding.
    """
    if count == 0:
        return []
    pairs = known.pairs if sign > 0.0 else known.pairs.mirrored()
    values = pairs.values.sort(descending=True).values.tolist()[:count]
    ceilings = pairs.ceilings(known.rest.ceiling(sign), request.size, count)
    guard, limit = _guard(request, known), known.whole.ceiling(sign)
    return [
        (value, value - guard, max(value, min(ceiling, limit)) + guard)
        for value, ceiling in zip(values, ceilings, strict=False)
    ]


def _guard(request: Request, known: Knowledge) -> float:
    """Return the allowance for rounding, and for errors of the products that exceed it."""
    rounding = GUARD * request.eps * known.norm
    return rounding + known.noise * (1.0 if known.noise <= rounding else _UNSEEN)


def is_symmetric(known: Knowledge) -> bool:
    """Return whether the products seen are those of a symmetric matrix, as far as bounds need it."""
    return known.noise <= ASYMMETRIC * known.norm


def allowed_width(request: Request, known: Knowledge, value: float) -> float:
    """Return how wide the interval of a value may be."""
    size = max(abs(value), request.tolerance * known.norm)
    return max(request.tolerance * size, 4.0 * _guard(request, known))


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Orthonormal approximate eigenvectors U of A, without the vectors: as much as bounds depend on.

    Attributes:
        values: Ritz values Theta `(m,)`, float64 on the CPU.
        gram: R'R `(m, m)`, float64 on the CPU, with the residuals R = A U - U Theta, which are orthogonal to U.
    """

    values: Tensor
    gram: Tensor

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def joined(self, values: Tensor, couplings: Tensor) -> RitzPairs:
        """Return these pairs and those of one Lanczos run, whose residuals are `couplings` times one unit vector."""
        old, new = self.gram.shape[0], couplings.shape[0]
        gram = torch.zeros(old + new, old + new, dtype=torch.float64, device="cpu")
        gram[:old, :old] = self.gram
        gram[old:, old:] = couplings[:, None] * couplings
        return RitzPairs(torch.cat([self.values, values]), gram)

    def chosen(self, indices: list[int]) -> RitzPairs:
        """Return the pairs with these indices."""
        return RitzPairs(self.values[indices], self.gram[indices][:, indices])

    def ceilings(self, rest: float, size: int, count: int) -> list[float]:
        """Return upper bounds on the largest eigenvalues of A, given a bound on the part B of A that U leaves over.

        In the basis (U, its complement) A is [[Theta, R'], [R, B]]. With B <= M I, A is at most
        [[Theta, R'], [R, M I]] in the order of quadratic forms, so each of its eigenvalues is at most the eigenvalue
        of the same rank of that matrix (Weyl's monotonicity, Horn & Johnson 2013, cor. 4.3.12), which follows from R'R
        alone. The bounds by |R| and by |R|^2 / gap (Li & Li 2005) are its two regimes.

        Args:
            rest: M, at least the largest eigenvalue of B.
            size: Dimension n of A.
            count: Number of bounds wanted, 0 to n.

        Returns:
            Bounds on the `count` largest eigenvalues, descending.
        """
        block = len(self)
        if rest == math.inf:
            return [rest] * count
        if block in (0, size):
            return sorted([*self.values.tolist(), *[rest] * (count - block)], reverse=True)[:count]
        # A root of R'R stands for R': rotating the complement changes no eigenvalue.
        weights, axes = torch.linalg.eigh(self.gram)
        root = axes * weights.clamp_min(0.0).sqrt()
        corner = rest * torch.eye(block, dtype=torch.float64, device="cpu")
        bordered = torch.cat([torch.cat([self.values.diag(), root], 1), torch.cat([root.T, corner], 1)])
        # The other n - 2m directions of the complement are not coupled to U: there the matrix is M I.
        bounds = [*torch.linalg.eigvalsh(bordered).tolist(), *[rest] * (size - 2 * block)]
        return sorted(bounds, reverse=True)[:count]

    def mirrored(self) -> RitzPairs:
        """Return the same pairs as Ritz pairs of -A."""
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
        """Return the pairs without their vectors."""
        return RitzPairs(self.values, (self.residuals @ self.residuals.T).to("cpu", torch.float64))

    def extended(self, result: LanczosResult, coordinates: Tensor) -> Extension:
        """Apply the Rayleigh-Ritz method to the span of this block and of vectors from a run on its complement.

        It needs no product. With W = Q S and the coupling C = R'W, in the notation of `LanczosResult`,
        A W = W (S'TS) + q tails + U C and A U = U Theta + R, so that the projected matrix is known.

        This block's residuals are overwritten, to save a copy: the block must not be used afterwards.

        Args:
            result: Lanczos run that deflates this block.
            coordinates: S `(k, j)`, orthonormal columns that span an invariant subspace of T, or everything.
        """
        tridiagonal, inner = result.tridiagonal, result.coordinates(self.residuals)
        # The projected matrix [[Theta, C], [C', S'TS]] and its eigenpairs.
        coupling = inner @ coordinates
        corner = coordinates.T @ tridiagonal.dense() @ coordinates
        upper = torch.cat([self.values.diag(), coupling], 1)
        values, rotation = torch.linalg.eigh(torch.cat([upper, torch.cat([coupling.T, corner], 1)]))
        # The parts of the old residuals along W are no residuals any more: W is in the new span.
        if len(self.values):
            result.add_to(self.residuals, -coupling @ coordinates.T)
        old = rotation[: len(self.values)]
        new = coordinates @ rotation[len(self.values) :]
        tails = tridiagonal.betas[-1] * new[-1]
        # The residual of pair i is R old_i + tails_i q: the Gram matrix has the squares of both parts and cross terms.
        left = (self.residuals @ self.residuals.T).to("cpu", torch.float64)
        along = (self.residuals @ result.next_vector).to("cpu", torch.float64)
        cross = torch.outer(old.T @ along, tails)
        gram = old.T @ left @ old + cross + cross.T + torch.outer(tails, tails)
        return Extension(self, result, RitzPairs(values, gram), old, new, tails)


@dataclass(frozen=True, eq=False)
class Extension:
    """Ritz pairs of a block and a Lanczos run together, known by small matrices; long vectors are not formed yet.

    Attributes:
        block: The block that was extended, its residuals without their parts along the run.
        result: The run.
        pairs: All m Ritz pairs.
        old: Coordinates `(k, m)` of the Ritz vectors in the block.
        new: Coordinates `(j, m)` of the Ritz vectors in the Lanczos vectors.
        tails: Parts `(m,)` of the residuals along the next Lanczos vector.
    """

    block: RitzBlock
    result: LanczosResult
    pairs: RitzPairs
    old: Tensor
    new: Tensor
    tails: Tensor

    def formed(self, keep: list[int]) -> RitzBlock:
        """Return the Ritz pairs with these indices, with their vectors."""
        block, result, rows = self.block, self.result, self.block.vectors
        turn = self.old[:, keep].T.to(rows.dtype).to(rows.device)
        vectors = turn @ rows
        result.add_to(vectors, self.new[:, keep].T)
        residuals = turn @ block.residuals
        tails = self.tails[keep].to(rows.dtype).to(rows.device)
        residuals.addmm_(tails[:, None], result.next_vector[None])
        return RitzBlock(self.pairs.values[keep], vectors, residuals)
