"""Extreme eigenvalues of a symmetric operator, each with an interval that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newtonopt.curvature.bounds import (
    Knowledge,
    Range,
    Request,
    RitzBlock,
    certifiable,
    certified,
    component_floor,
    intervals,
    slack,
    spectrum_ceiling,
)
from newtonopt.linear_operator import LinearOperator
from newtonopt.solvers.lanczos import LanczosResult, Tridiagonal, lanczos

# Share of the budget for the first run, where a second one has to certify what it finds.
_FIRST_SHARE = 2.0 / 3.0
# Ritz vectors beyond the wanted ones that are deflated at each end: they widen the gap that the certifying run needs.
_EXTRA = 8


@dataclass(frozen=True, eq=False)
class Eigenvalue:
    """One eigenvalue with its multiplicity counted: equal eigenvalues are separate entries.

    Attributes:
        value: Ritz value.
        lower: With `upper`, an interval that holds the eigenvalue of this rank in the ordered spectrum.
        upper: See `lower`. The inner end (lower at the top, upper at the bottom) is certain up to rounding;
            the outer end holds with at least the confidence asked for, over the random start.
        residual: `|A x - value x|`.
        vector: Unit vector x `(n,)`, in the operator's dtype and on its device.
    """

    value: float
    lower: float
    upper: float
    residual: float
    vector: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Both ends of a spectrum.

    Attributes:
        top: Largest eigenvalues, descending.
        bottom: Smallest eigenvalues, ascending.
        products: Products with the operator that were used.
        converged: Whether as many as were asked for are there and every interval is narrow enough.
        confidence: Probability with which each interval holds, at least.
    """

    top: tuple[Eigenvalue, ...]
    bottom: tuple[Eigenvalue, ...]
    products: int
    converged: bool
    confidence: float


def extreme_eigenvalues(
    operator: LinearOperator,
    top: int = 5,
    bottom: int = 2,
    tolerance: float = 1e-3,
    confidence: float = 0.99,
    max_products: int = 300,
    seed: int = 0,
) -> Spectrum:
    """lambda_1 >= lambda_2 >= ... and lambda_n <= lambda_{n-1} <= ..., each with an interval.

    One Lanczos run from a random start finds the eigenvalues and bounds both ends of the spectrum (van Dorsselaer,
    Hochstenbach & van der Vorst 2001). Such a run sees each distinct eigenvalue once, so from two eigenvalues
    at one end on, another run from a fresh start on the complement of what was found looks for missed
    copies and bounds what is left, until every interval is narrow.

    Memory is that of the Lanczos vectors of one run, up to `max_products` of length n, and of twice the Ritz vectors
    kept, `top + bottom` and up to 16 more.

    Not for eigenvalues inside the spectrum, and expensive where the wanted end is dense or tiny
    against the norm (the smallest eigenvalues of a Gauss-Newton matrix): there the budget ends first, and the
    intervals are wide but hold.

    Args:
        operator: Symmetric `(n, n)`. With `operator.psd` zero is used as a lower bound.
        top: How many of the largest, >= 0; at most n are returned.
        bottom: How many of the smallest, >= 0; at most n are returned.
        tolerance: Width of an interval relative to its value, in (0, 1). Widths at the level of rounding, 64 eps times
            the norm, always suffice. 1e-3 tells a learning rate from its stability limit.
        confidence: Probability, in (0, 1), with which each interval holds, over the random starts.
        max_products: Budget, >= 1.
        seed: Seed of the random starts; the global random state is neither read nor written.

    Returns:
        The spectrum's ends. Where the budget ended first, `converged` is false, and fewer entries than asked for
        are possible.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.
    """
    request = _request(operator, top, bottom, tolerance, confidence, max_products)
    generator = torch.Generator().manual_seed(seed)
    knowledge = _nothing(operator)
    run = 0
    while knowledge.products < max_products and not certified(request, knowledge):
        run += 1
        start = operator.like.new_empty(request.size, dtype=torch.float64, device="cpu").normal_(generator=generator)
        start = start.to(operator.dtype).to(operator.device)
        knowledge = _advance(operator, request, knowledge, start, run, max_products)
    largest, smallest = (_report(request, knowledge, sign, count) for sign, count in request.ends)
    return Spectrum(largest, smallest, knowledge.products, certified(request, knowledge), confidence)


def _request(
    operator: LinearOperator, top: int, bottom: int, tolerance: float, confidence: float, max_products: int
) -> Request:
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"operator is a {type(operator).__name__}: give a LinearOperator, such as hessian(evaluation) or "
            "gauss_newton(evaluation)."
        )
    rows, columns = operator.shape
    if rows != columns or rows < 1:
        raise ValueError(f"operator must be square with at least one row, got shape {tuple(operator.shape)}")
    for name, count, least in (("top", top, 0), ("bottom", bottom, 0), ("max_products", max_products, 1)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be a whole number and at least {least}, got {count!r}")
    for name, share in (("tolerance", tolerance), ("confidence", confidence)):
        if not isinstance(share, (int, float)) or not 0.0 < share < 1.0:
            raise ValueError(f"{name} must be in (0, 1), got {share!r}")
    ends = ((1.0, min(top, rows)), (-1.0, min(bottom, rows)))
    return Request(rows, ends, tolerance, 1.0 - confidence, torch.finfo(operator.dtype).eps)


def _nothing(operator: LinearOperator) -> Knowledge:
    rows = operator.like
    block = RitzBlock(torch.zeros(0, dtype=torch.float64), rows, rows)
    whole = Range(0.0 if operator.psd else -math.inf, math.inf)
    return Knowledge(block, block.pairs(), whole, whole)


def _advance(
    operator: LinearOperator, request: Request, known: Knowledge, start: Tensor, run: int, max_products: int
) -> Knowledge:
    """One Lanczos run on the complement of the block, and what it finds merged into the block."""
    # Later intervals rely on several runs, how many depends on the data: the shares 1/(r (r + 1)) sum to one.
    failure = request.failure if request.single else request.failure / (run * (run + 1))
    delta = component_floor(request.size - len(known.pairs), failure)
    budget = max_products - known.products
    if run == 1 and not request.single:
        budget = math.ceil(_FIRST_SHARE * max_products)
    # A third run means repeated eigenvalues, of which each run finds one copy: then it is cheaper to deflate a copy as
    # soon as it has converged than to wait for the eigenvalues behind it.
    greedy = run > 2
    stop = _stop_rule(request, known, delta, greedy)
    result = lanczos(operator, start, budget, deflate=known.block.vectors, scale=known.norm, stop=stop)
    return _absorb(request, known, result, delta, greedy)


def _stop_rule(request: Request, known: Knowledge, delta: float, greedy: bool) -> Callable[[Tridiagonal], bool]:
    """Stop when all is certified, or when what is new has converged and must be deflated in turn."""
    # A first run of several cannot certify: the bounds of its start say nothing of multiplicity.
    bounded = request.single or len(known.pairs) > 0
    due = 1

    def stop(tridiagonal: Tridiagonal) -> bool:
        nonlocal due
        if tridiagonal.size < due:
            return False
        # The small eigenproblem costs k^3: judged at every 16th part, it stays below the products' cost.
        due = tridiagonal.size + 1 + tridiagonal.size // 16
        values, coordinates = tridiagonal.ritz()
        couplings = tridiagonal.betas[-1] * coordinates[-1]
        seen = _observe(known, tridiagonal, values, delta if bounded else None)
        new = _new(request, seen, values)
        if bounded and certified(request, _joined(seen, values, couplings, new)):
            return True
        ripe = _outermost(request, new) if greedy else new
        return bool(new) and not request.single and certifiable(request, _joined(seen, values, couplings, ripe))

    return stop


def _joined(known: Knowledge, values: Tensor, couplings: Tensor, indices: list[int]) -> Knowledge:
    """With these Ritz pairs of a run taken as if they were merged."""
    return replace(known, pairs=known.pairs.joined(values[indices], couplings[indices]))


def _outermost(request: Request, new: list[int]) -> list[int]:
    """Of indices in ascending order of their values, the last and the first at the ends that were asked for."""
    picked = {new[-1] if sign > 0.0 else new[0] for sign, count in request.ends if count and new}
    return sorted(picked)


def _observe(known: Knowledge, tridiagonal: Tridiagonal, values: Tensor, delta: float | None) -> Knowledge:
    """Adds what a run on the block's complement tells of the spectrum; without bounds where delta is None."""
    rest = known.rest
    if delta is not None:
        high = spectrum_ceiling(tridiagonal, delta, float(values[-1]))
        low = -spectrum_ceiling(tridiagonal.mirrored(), delta, -float(values[0]))
        rest = rest.tighten(Range(low, high))
    return replace(
        known,
        rest=rest,
        whole=rest if len(known.pairs) == 0 else known.whole,
        norm=max(known.norm, abs(float(values[0])), abs(float(values[-1]))),
        noise=max(known.noise, tridiagonal.noise),
    )


def _new(request: Request, known: Knowledge, values: Tensor) -> list[int]:
    """Indices of the complement's Ritz values that belong among the wanted ones."""
    chosen: set[int] = set()
    for sign, count in request.ends:
        held = [(value, -1) for value in (sign * known.pairs.values).tolist()]
        fresh = [(value, index) for index, value in enumerate((sign * values).tolist())]
        if len(held) >= count > 0:
            # A value that beats the last wanted one by less than the slack changes nothing in the answer.
            last = sorted(held, reverse=True)[count - 1][0]
            fresh = [pair for pair in fresh if pair[0] > last + 0.25 * slack(request, known, last)]
        chosen.update(index for _, index in sorted(held + fresh, reverse=True)[:count] if index >= 0)
    return sorted(chosen)


def _absorb(request: Request, known: Knowledge, result: LanczosResult, delta: float, greedy: bool) -> Knowledge:
    """Bounds and Ritz vectors of a finished run."""
    tridiagonal = result.tridiagonal
    values, coordinates = tridiagonal.ritz()
    seen = _observe(known, tridiagonal, values, delta)
    seen = replace(seen, products=known.products + tridiagonal.size)
    new = _new(request, seen, values)
    if not new:
        return seen
    couplings = tridiagonal.betas[-1] * coordinates[-1]
    if tridiagonal.size == request.size - len(known.pairs):
        # The run spans the whole complement: keeping all of it leaves nothing to certify.
        new = list(range(tridiagonal.size))
    elif not request.single:
        ripe = _outermost(request, new)
        if greedy and certifiable(request, _joined(seen, values, couplings, ripe)):
            new = ripe
        new = _with_extras(request, seen, values, couplings, new)
    vectors = result.vectors(coordinates[:, new])
    tails = couplings[new].to(vectors.dtype).to(vectors.device)
    block = seen.block.merge(values[new], vectors, tails[:, None] * result.next_vector)
    return replace(seen, block=block, pairs=block.pairs())


def _with_extras(request: Request, known: Knowledge, values: Tensor, couplings: Tensor, new: list[int]) -> list[int]:
    """The indices and further ones from the wanted ends inwards, while the wanted intervals can still be narrow."""
    for sign, count in request.ends:
        order = torch.argsort(sign * values, descending=True).tolist() if count else []
        for index in [i for i in order if i not in new][:_EXTRA]:
            trial = sorted([*new, index])
            if not certifiable(request, _joined(known, values, couplings, trial)):
                break
            new = trial
    return new


def _report(request: Request, known: Knowledge, sign: float, count: int) -> tuple[Eigenvalue, ...]:
    order = torch.argsort(sign * known.block.values, descending=True).tolist()
    norms = known.pairs.gram.diagonal().clamp_min(0.0).sqrt().tolist()
    found = []
    for index, (value, lower, upper) in zip(order, intervals(request, known, sign, count), strict=False):
        low, high = sorted((sign * lower, sign * upper))
        found.append(Eigenvalue(sign * value, low, high, norms[index], known.block.vectors[index]))
    return tuple(found)
