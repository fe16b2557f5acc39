"""Lanczos runs that find, refine and certify the ends of a spectrum, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from newtonopt.curvature.eigenvalues.bounds import (
    Knowledge,
    Range,
    Request,
    certifiable,
    certified,
    component_floor,
    slack,
    spectrum_ceiling,
)
from newtonopt.curvature.eigenvalues.ritz_values import Extension, RitzPairs
from newtonopt.solvers.lanczos import LanczosResult, Restarts, Tridiagonal, lanczos
from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import InRange

# Share of the budget for the first run, where a second one has to certify what it finds.
_FIRST_SHARE = 2.0 / 3.0
# Ritz vectors beyond the wanted ones that are deflated at each end: they widen the gap that the certifying run needs.
_EXTRA = 8
# Norm of the random part of a tracking run's start, relative to the part along the old vectors.
_RANDOM_PART = 0.1


def search(matrix: InRange, request: Request, known: Knowledge, seed: int) -> Knowledge:
    """Runs from random starts on the complement of what is known, until all is certified or the budget spent."""
    generator = torch.Generator().manual_seed(seed)
    run = 0
    while known.products < request.max_products and not certified(request, known):
        run += 1
        known = _advance(matrix, request, known, normals(known.block.vectors, generator), run)
    return known


def track(
    matrix: InRange,
    request: Request,
    known: Knowledge,
    old: Tensor,
    seed: int,
    is_enough: Callable[[Knowledge], bool],
) -> Knowledge:
    """One run from a sum of old eigenvectors, until its residuals are small enough; it bounds nothing.

    The random part lets through eigenvectors that the old ones know nothing of.
    """
    generator = torch.Generator().manual_seed(seed)
    start = normals(known.block.vectors, generator)
    start *= _RANDOM_PART * float(old.norm()) / float(start.norm())
    start += old

    def judged(tridiagonal: Tridiagonal) -> Knowledge:
        values, coordinates = tridiagonal.ritz()
        tails = tridiagonal.betas[-1] * coordinates[-1]
        pairs = RitzPairs(values, torch.outer(tails, tails))
        return replace(_observe(known, tridiagonal, values, None), pairs=pairs, products=tridiagonal.size)

    def stop(tridiagonal: Tridiagonal) -> bool:
        return is_enough(judged(tridiagonal))

    result = lanczos(matrix, start, request.max_products, stop=stop, restarts=_restarts(request, known))
    seen = judged(result.tridiagonal)
    keep = _outer(request, seen.pairs.values, 0)
    block = known.block.extended(result, result.tridiagonal.ritz()[1][:, keep])
    formed = block.formed(list(range(len(keep))))
    return replace(seen, block=formed, pairs=formed.pairs())


def _advance(matrix: InRange, request: Request, known: Knowledge, start: Tensor, run: int) -> Knowledge:
    """One Lanczos run on the complement of the block, and what it finds merged into the block."""
    # Later intervals rely on several runs, how many depends on the data: the shares 1/(r (r + 1)) sum to one.
    failure = request.failure if request.single else request.failure / (run * (run + 1))
    delta = component_floor(request.size - len(known.pairs), failure)
    budget = request.max_products - known.products
    if run == 1 and not request.single:
        budget = math.ceil(_FIRST_SHARE * request.max_products)
    # A third run means repeated eigenvalues, of which each run finds one copy: then it is cheaper to deflate a copy as
    # soon as it has converged than to wait for the eigenvalues behind it.
    greedy = run > 2
    result = lanczos(
        matrix,
        start,
        budget,
        deflate=known.block.vectors,
        scale=known.norm,
        stop=_stop_rule(request, known, delta, greedy),
        restarts=_restarts(request, known),
    )
    return _absorb(request, known, result, delta, greedy)


def _restarts(request: Request, known: Knowledge) -> Restarts:
    room = request.run_length(len(known.pairs))
    return Restarts(room, lambda values: _outer(request, values, request.restart_kept(room)))


def _outer(request: Request, values: Tensor, most: int) -> list[int]:
    """Indices, ascending, of the wanted values and of those behind them, `most` in all at most."""
    asked = [(sign, count) for sign, count in request.ends if count]
    extra = max(most - sum(count for _, count in asked), 0) // max(len(asked), 1)
    chosen: set[int] = set()
    for sign, count in asked:
        chosen.update(torch.argsort(sign * values, descending=True).tolist()[: count + extra])
    return sorted(chosen)


def _kept(request: Request, known: Knowledge, extension: Extension, keep: list[int]) -> Knowledge:
    """The block of the pairs that are kept, and a bound on what is left when the others have gone back to it."""
    others = [index for index in range(len(extension.pairs)) if index not in set(keep)]
    rest = known.rest
    if others:
        dropped, size = extension.pairs.chosen(others), request.size - len(keep)
        high = dropped.ceilings(rest.high, size, 1)[0]
        rest = Range(-dropped.mirrored().ceilings(-rest.low, size, 1)[0], high).tighten(known.whole)
    block = extension.formed(keep)
    return replace(known, block=block, pairs=block.pairs(), rest=rest)


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
        if request.single or not new:
            return False
        return certifiable(request, _joined(seen, values, couplings, ripe), len(seen.pairs))

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
    if len(values) == request.size - len(known.pairs):
        # The run spans the whole complement: keeping all of it leaves nothing to certify.
        new = list(range(len(values)))
    elif not request.single:
        ripe = _outermost(request, new)
        if greedy and certifiable(request, _joined(seen, values, couplings, ripe), len(seen.pairs)):
            new = ripe
        new = _with_extras(request, seen, values, couplings, new)
    extension = seen.block.extended(result, coordinates[:, new])
    keep = list(range(len(extension.pairs)))
    if len(keep) > request.kept:
        keep = _outer(request, extension.pairs.values, request.kept)
    return _kept(request, seen, extension, keep)


def _with_extras(request: Request, known: Knowledge, values: Tensor, couplings: Tensor, new: list[int]) -> list[int]:
    """The indices and further ones from the wanted ends inwards, while the wanted intervals can still be narrow."""
    for sign, count in request.ends:
        order = torch.argsort(sign * values, descending=True).tolist() if count else []
        for index in [i for i in order if i not in new][:_EXTRA]:
            trial = sorted([*new, index])
            if not certifiable(request, _joined(known, values, couplings, trial), len(known.pairs)):
                break
            new = trial
    return new
