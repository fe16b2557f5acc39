"""Extreme eigenvalues of a symmetric operator, each with an interval that holds it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from newtonopt.checks import check_instance, check_seed, check_share, check_whole
from newtonopt.curvature.eigenvalues.bounds import (
    GUARD,
    Knowledge,
    Range,
    Request,
    certified,
    intervals,
    is_symmetric,
    settled,
    slack,
)
from newtonopt.curvature.eigenvalues.ritz_values import RitzBlock
from newtonopt.curvature.eigenvalues.search import search, track
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.vectors.scaling import InRange, dot, lost, norm

# Vectors of length n that a measurement may hold, unless more eigenvalues are asked for.
_VECTORS = 120
# Weight of a bottom vector among those that are tracked. With 1, six products for three top ones and a bottom one
# missed the largest eigenvalue of a convolutional network, 100 steps of Adam later, by a quarter; with this by 0.3 %.
_BOTTOM_WEIGHT = 0.3


# By which part of the spectrum's width a followed eigenvalue may have moved inwards if its vector is a new one, or lie
# on the other side of zero; and how much of the old vectors is in one that is not new.
_MOVED, _ACROSS, _PART = 0.3, 0.03, 0.3
_ANYWHERE = Range(-math.inf, math.inf)
# So many may be asked for of the smallest operator too, which has fewer: the defaults do.
_FEW = 5


@dataclass(frozen=True, eq=False)
class Eigenvalue:
    """One eigenvalue with its multiplicity counted: equal eigenvalues are separate entries.

    Attributes:
        value: Ritz value.
        lower: With `upper`, an interval that holds the eigenvalue of this rank in the ordered spectrum.
        upper: See `lower`. The inner end (lower at the top, upper at the bottom) is certain up to rounding;
            the outer end holds with at least the confidence asked for, over the random start, and is infinite where
            the measurement is not certified.
        residual: `|A x - value x|`: some eigenvalue lies within it of the value.
        multiplicity: How many entries at this end, itself included, equal it within the tolerance.
        vector: Unit vector x `(n,)`, in the operator's dtype and on its device.
    """

    value: float
    lower: float
    upper: float
    residual: float
    multiplicity: int
    vector: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Both ends of a spectrum.

    Attributes:
        top: Largest eigenvalues, descending.
        bottom: Smallest eigenvalues, ascending.
        products: Products with the operator that were used.
        converged: Whether as many as were asked for are there and every interval is narrow enough; where the
            measurement is not certified, every residual small enough. False where products are not symmetric, or
            there is a doubt about them.
        confidence: Probability with which each interval holds, at least.
        certified: Whether the start was random, so that nothing larger or smaller can have been missed, and the
            operator's products are symmetric and can be vouched for. From a `start` given the values are eigenvalues
            within their residuals, but perhaps not the extreme ones; where `operator.trust` says that there is a doubt
            about the products, they are those of the products.
        asymmetry: By how much products were not those of a symmetric matrix, relative to the norm: rounding where all
            is well. From 3e-3 on nothing is certified.
    """

    top: tuple[Eigenvalue, ...]
    bottom: tuple[Eigenvalue, ...]
    products: int
    converged: bool
    confidence: float
    certified: bool
    asymmetry: float = 0.0


def extreme_eigenvalues(
    operator: LinearOperator,
    top: int = 5,
    bottom: int = 2,
    tolerance: float = 1e-3,
    confidence: float = 0.99,
    max_products: int = 300,
    max_vectors: int | None = None,
    seed: int = 0,
    start: Spectrum | None = None,
) -> Spectrum:
    """lambda_1 >= lambda_2 >= ... and lambda_n <= lambda_{n-1} <= ..., each with an interval.

    Products by finite differences have an error, `operator.trust.error`, by which intervals are wider.

    One Lanczos run from a random start finds the eigenvalues and bounds both ends of the spectrum (van Dorsselaer,
    Hochstenbach & van der Vorst 2001). Such a run sees each distinct eigenvalue once, so from two eigenvalues
    at one end on, another run from a fresh start on the complement of what was found looks for missed
    copies and bounds what is left, until every interval is narrow.

    Memory is `max_vectors` vectors of length n at most, whatever the budget, besides that of a product. A run that
    outgrows it goes on from its outer Ritz vectors (thick restarts, Wu & Simon 2000). That changes the basis and not
    the polynomials that the bounds are made of, so the bounds stay what they are.

    *Tracking*: with the last measurement as `start`, one run from the sum of its vectors and a little random part takes
    a fraction of the products while the operator moves slowly. It certifies nothing: `certified` is false, the outer
    bounds are infinite, and an eigenvalue whose vector the last one knew nothing of may be missed. A run sees equal
    eigenvalues once: where the last measurement has any, it is passed over and the start random.

    Not for eigenvalues inside the spectrum, and expensive where the wanted end is dense or tiny against the norm: there
    the budget ends first, and the intervals are wide but hold.

    Args:
        operator: Symmetric `(n, n)`. With `operator.psd` zero is used as a lower bound.
        top: How many of the largest, from 0 to n, or to 5 where n is below that; at most n are returned.
        bottom: How many of the smallest, as `top`, and >= 1 where `top` is 0.
        tolerance: Width of an interval relative to its value, in (0, 1), or to `tolerance` times the largest magnitude
            where the value is smaller than that: a value that is zero within `tolerance**2` of the norm, such as the
            smallest one of a Gauss-Newton matrix, does not use up the budget. Widths at the level of rounding, 64 eps
            times the norm, always suffice. 1e-3 tells a learning rate from its stability limit.
        confidence: Probability, in (0, 1), with which each interval holds, over the random starts.
        max_products: Budget, >= 1.
        max_vectors: Bound on the vectors of length n in use, at least four for each eigenvalue asked for and 24 more.
            None (default): 120, or eight for each eigenvalue where that is more.
        seed: Seed of the random starts; the global random state is neither read nor written.
        start: The last measurement of an operator nearby, to track; None (default): a certified measurement.

    Returns:
        The spectrum's ends. Where the budget ended first, `converged` is false, and fewer entries than asked for
        are possible.

    Raises:
        TypeError: `operator` is no `LinearOperator`, or `start` no `Spectrum`.
        ValueError: An argument is out of range, the operator is not square, or `start` has no vectors of its length.
        FloatingPointError: A product is not finite.
    """
    request = _request(operator, top, bottom, tolerance, confidence, max_products, max_vectors)
    check_seed(seed)
    old, matrix = _start_vector(operator, start, tolerance), InRange(operator)
    if old is None:
        known = search(matrix, request, _nothing(operator), seed)
        if operator.trust.doubt:
            unbounded = Range(-math.inf, math.inf)
            known = replace(known, whole=unbounded, rest=unbounded)
            return _spectrum(request, known, matrix, confidence, False, False)
        return _spectrum(request, known, matrix, confidence, certified(request, known), True)
    known = track(matrix, request, _nothing(operator), old, seed, functools.partial(settled, request))
    return _followed(request, known, matrix, confidence, start, old)


def follow(
    operator: LinearOperator, start: Spectrum, top: int, bottom: int, tolerance: float, least: int, most: int, seed: int
) -> Spectrum | None:
    """`extreme_eigenvalues` from a start, ended after `most` products at latest, and from `least` on as soon as the
    largest is known to the tolerance and the others to a tenth.

    None where the start has equal eigenvalues, which cannot be tracked.
    """
    request = _request(operator, top, bottom, tolerance, 0.99, most, None)
    old, matrix = _start_vector(operator, start, tolerance), InRange(operator)
    if old is None:
        return None

    def is_enough(seen: Knowledge) -> bool:
        return settled(request, seen) or (seen.products >= least and _known_roughly(request, seen))

    known = track(matrix, request, _nothing(operator), old, seed, is_enough)
    return _followed(request, known, matrix, 0.99, start, old)


def _known_roughly(request: Request, known: Knowledge) -> bool:
    (_, top), _ = request.ends
    largest = replace(request, ends=((1.0, min(top, 1)), (-1.0, 0)))
    return settled(largest, known) and settled(replace(request, tolerance=max(request.tolerance, 0.1)), known)


def _followed(
    request: Request, known: Knowledge, matrix: InRange, confidence: float, start: Spectrum | None, old: Tensor
) -> Spectrum:
    """The spectrum of a tracking run, without values that come from the other end of it."""
    kept = request if start is None else _own(request, known, start, old)
    return _spectrum(kept, known, matrix, confidence, kept == request and settled(request, known), False)


def _own(request: Request, known: Knowledge, start: Spectrum, old: Tensor) -> Request:
    """The request with as many values of each end as are those of that end.

    A run sees equal eigenvalues once, and nearly equal ones late: where several of the top are about zero, the next
    largest Ritz value is one of the bottom's. Such a value lies far further in than the one measured last, or on the
    other side of zero, and its vector has little of those that were followed. The first of each end stays.
    """
    values, total = known.block.values.tolist(), norm(old)
    parts = [abs(dot(vector, old)) / total for vector in known.block.vectors]
    before = [entry.value for entry in (*start.top, *start.bottom)]
    width, width_before = max(values) - min(values), max(before) - min(before)
    olds = ((start.top, 1.0), (start.bottom, _BOTTOM_WEIGHT))
    ends = []
    for (sign, count), (entries, weight) in zip(request.ends, olds, strict=True):
        order = sorted(range(len(values)), key=lambda index: -sign * values[index])[:count]
        rank = min(1, len(order))
        while 0 < rank < len(order) and entries:
            value, was = sign * values[order[rank]], sign * entries[min(rank, len(entries) - 1)].value
            inwards = (sign * values[order[0]] - value) * width_before - (sign * entries[0].value - was) * width
            far = inwards > _MOVED * width * width_before
            across = value < -_ACROSS * width and was > -_ACROSS * width_before
            if (far or across) and parts[order[rank]] < _PART * weight / total:
                break
            rank += 1
        ends.append((sign, rank if entries else len(order)))
    return replace(request, ends=(ends[0], ends[1]))


def _spectrum(
    request: Request, known: Knowledge, matrix: InRange, confidence: float, converged: bool, is_certified: bool
) -> Spectrum:
    symmetric = is_symmetric(known)
    if not symmetric:
        known = replace(known, whole=_ANYWHERE, rest=_ANYWHERE)
    largest, smallest = (_report(request, known, matrix, sign, count) for sign, count in request.ends)
    return Spectrum(
        largest,
        smallest,
        known.products,
        converged and symmetric,
        confidence,
        is_certified and symmetric,
        known.noise / known.norm if known.norm > 0.0 else 0.0,
    )


def check_spectrum(name: str, spectrum: object) -> None:
    """Refuse what is no `Spectrum` with a TypeError."""
    check_instance(name, spectrum, Spectrum, "a Spectrum, or None", "Write extreme_eigenvalues(operator).")


def check_count(name: str, count: int, rows: int) -> None:
    """Refuse more eigenvalues than there are with a ValueError, but for as few as the defaults ask for."""
    if count > max(rows, _FEW):
        raise ValueError(f"{name} must be at most {rows}, for there are as many parameters, got {count!r}.")


def _start_vector(operator: LinearOperator, start: Spectrum | None, tolerance: float) -> Tensor | None:
    """Where to track the last measurement's vectors from; None for a random start."""
    if start is None:
        return None
    check_spectrum("start", start)
    entries = (*start.top, *start.bottom)
    sizes = {entry.vector.shape[0] for entry in entries}
    if sizes != {operator.shape[0]}:
        raise ValueError(
            f"start must hold vectors of length {operator.shape[0]}, as the operator has, got {len(entries)} vectors "
            f"of lengths {sorted(sizes)}. Give the last measurement of this operator, or None."
        )
    # One run sees equal eigenvalues once. Those that are next to zero may be taken for one.
    next_to_zero = tolerance * max(abs(entry.value) for entry in entries)
    if any(entry.multiplicity > 1 and abs(entry.value) > next_to_zero for entry in entries):
        return None
    total = torch.zeros_like(entries[0].vector)
    for weight, end in ((1.0, start.top), (_BOTTOM_WEIGHT, start.bottom)):
        for entry in end:
            total = torch.add(total, entry.vector, alpha=weight)
    return total.to(operator.dtype).to(operator.device)


def _request(
    operator: LinearOperator,
    top: int,
    bottom: int,
    tolerance: float,
    confidence: float,
    max_products: int,
    max_vectors: int | None,
) -> Request:
    rows = check_operator(operator)
    for name, count, least in (("top", top, 0), ("bottom", bottom, 0), ("max_products", max_products, 1)):
        check_whole(name, count, least)
    for name, count in (("top", top), ("bottom", bottom)):
        check_count(name, count, rows)
    if top == bottom == 0:
        raise ValueError("top and bottom must ask for one eigenvalue at least, got 0 and 0.")
    for name, share in (("tolerance", tolerance), ("confidence", confidence)):
        check_share(name, share)
    ends = ((1.0, min(top, rows)), (-1.0, min(bottom, rows)))
    # What bounds allow to rounding covers the error of products by finite differences.
    eps = max(torch.finfo(operator.dtype).eps, operator.trust.error / GUARD)
    room = _room(min(top, rows) + min(bottom, rows), max_vectors)
    return Request(rows, ends, tolerance, 1.0 - confidence, eps, max_products, room)


def _room(wanted: int, max_vectors: int | None) -> int:
    if max_vectors is None:
        return max(_VECTORS, 8 * wanted)
    least = 4 * wanted + 24
    check_whole("max_vectors", max_vectors, least)
    return max_vectors


def _nothing(operator: LinearOperator) -> Knowledge:
    rows = operator.like
    block = RitzBlock(torch.zeros(0, dtype=torch.float64, device="cpu"), rows, rows)
    whole = Range(0.0 if operator.psd else -math.inf, math.inf)
    return Knowledge(block, block.pairs(), whole, whole)


def _report(request: Request, known: Knowledge, matrix: InRange, sign: float, count: int) -> tuple[Eigenvalue, ...]:
    """The eigenvalues of one end, in the operator's units, and with room for what underflow takes from its products."""
    vectors, order = known.block.vectors, torch.argsort(sign * known.block.values, descending=True).tolist()[:count]
    norms = known.pairs.gram.diagonal().clamp_min(0.0).sqrt().tolist()
    room = lost(vectors.dtype, request.size)
    found = []
    for index, (value, lower, upper) in zip(order, intervals(request, known, sign, count), strict=False):
        low, high = (matrix.back(end) for end in sorted((sign * lower, sign * upper)))
        near = (known.block.values[order] - sign * value).abs() <= slack(request, known, value)
        own, residual = matrix.back(sign * value), matrix.back(norms[index])
        found.append(Eigenvalue(own, low - room, high + room, residual + room, int(near.sum()), vectors[index]))
    return tuple(found)
