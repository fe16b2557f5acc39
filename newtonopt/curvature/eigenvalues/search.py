"""Lanczos runs from random starts that find and certify the ends of a spectrum, in bounded memory.

A run sees one copy of each eigenvalue. So each run is followed by another one on the complement of what was found: it
finds missed copies, and its start bounds what is left over. Between runs the Ritz pairs stand in one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from newtonopt.curvature.eigenvalues.bounds import (
    Extension,
    Interval,
    Knowledge,
    Request,
    allowed_width,
    certifiable,
    certified,
    component_floor,
    spectrum_ceiling,
)
from newtonopt.solvers.lanczos import LanczosResult, Restarts, Tridiagonal, lanczos
from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import InRange

# Share of the budget for the first run, if a second one has to certify what it finds.
_FIRST_SHARE = 2.0 / 3.0
# Ritz vectors beyond the wanted ones that are deflated at each end: they widen the gap that the certifying run needs.
_EXTRA = 8


def search(matrix: InRange, request: Request, known: Knowledge, seed: int) -> Knowledge:
    """Run Lanczos on the complement of what is known until all is certified or the budget is spent."""
    generator = torch.Generator().manual_seed(seed)
    run = 0
    while known.products < request.max_products and not certified(request, known):
        run += 1
        known = _advance(matrix, request, known, normals(known.block.vectors, generator), run)
    return known


def _advance(matrix: InRange, request: Request, known: Knowledge, start: Tensor, run: int) -> Knowledge:
    """Run Lanczos once on the complement of the block, and merge what it finds into the block."""
    # The later intervals rely on several runs; their number depends on the data. The shares 1/(r (r + 1)) of the
    # failure probability sum to one over all runs.
    failure = request.failure if request.one_run_suffices else request.failure / (run * (run + 1))
    delta = component_floor(request.size - len(known.pairs), failure)
    budget = request.max_products - known.products
    if run == 1 and not request.one_run_suffices:
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
        restarts=restarts(request, known),
    )
    return _merge(request, known, result, delta, greedy)


def restarts(request: Request, known: Knowledge) -> Restarts:
    """Return how a run keeps within its memory: which Ritz vectors it restarts from."""
    room = request.run_length(len(known.pairs))
    return Restarts(room, lambda values: from_the_ends(request, values, request.restart_kept(room)))


def from_the_ends(request: Request, values: Tensor, most: int) -> list[int]:
    """Return the indices, ascending, of the wanted values, and of values behind them until `most` are chosen."""
    asked = [(sign, count) for sign, count in request.ends if count]
    extra = max(most - sum(count for _, count in asked), 0) // max(len(asked), 1)
    chosen: set[int] = set()
    for sign, count in asked:
        chosen.update(torch.argsort(sign * values, descending=True).tolist()[: count + extra])
    return sorted(chosen)


def observe(known: Knowledge, tridiagonal: Tridiagonal, values: Tensor, delta: float | None) -> Knowledge:
    """Return what is known after a run on the block's complement.

    Args:
        known: Knowledge before the run.
        tridiagonal: Coefficients of the run.
        values: Ritz values of the run, ascending.
        delta: Least part of the start along an eigenvector; None: the start was not random, and bounds nothing.
    """
    rest = known.rest
    if delta is not None:
        high = spectrum_ceiling(tridiagonal, delta, float(values[-1]))
        low = -spectrum_ceiling(tridiagonal.mirrored(), delta, -float(values[0]))
        rest = rest.tighten(Interval(low, high))
    return replace(
        known,
        rest=rest,
        whole=rest if len(known.pairs) == 0 else known.whole,
        norm=max(known.norm, abs(float(values[0])), abs(float(values[-1]))),
        noise=max(known.noise, tridiagonal.noise),
    )


def _stop_rule(request: Request, known: Knowledge, delta: float, greedy: bool) -> Callable[[Tridiagonal], bool]:
    """Return the rule that ends a run when all is certified, or when new pairs have converged and must be deflated."""
    # A first run of several cannot certify: the bounds of its start say nothing of multiplicity.
    bounded = request.one_run_suffices or len(known.pairs) > 0
    due = 1

    def stop(tridiagonal: Tridiagonal) -> bool:
        nonlocal due
        if tridiagonal.size < due:
            return False
        # The small eigenproblem costs k^3: judged at every 16th part, it stays below the products' cost.
        due = tridiagonal.size + 1 + tridiagonal.size // 16
        values, coordinates = tridiagonal.ritz()
        couplings = tridiagonal.betas[-1] * coordinates[-1]
        seen = observe(known, tridiagonal, values, delta if bounded else None)
        new = _wanted(request, seen, values)
        if bounded and certified(request, _joined(seen, values, couplings, new)):
            return True
        ripe = _first_of_each_end(request, new) if greedy else new
        if request.one_run_suffices or not new:
            return False
        return certifiable(request, _joined(seen, values, couplings, ripe), len(seen.pairs))

    return stop


def _merge(request: Request, known: Knowledge, result: LanczosResult, delta: float, greedy: bool) -> Knowledge:
    """Add the bounds and the Ritz vectors of a finished run."""
    tridiagonal = result.tridiagonal
    values, coordinates = tridiagonal.ritz()
    seen = observe(known, tridiagonal, values, delta)
    seen = replace(seen, products=known.products + tridiagonal.size)
    new = _wanted(request, seen, values)
    if not new:
        return seen
    couplings = tridiagonal.betas[-1] * coordinates[-1]
    if len(values) == request.size - len(known.pairs):
        # The run spans the whole complement: keeping all of it leaves nothing to certify.
        new = list(range(len(values)))
    elif not request.one_run_suffices:
        ripe = _first_of_each_end(request, new)
        if greedy and certifiable(request, _joined(seen, values, couplings, ripe), len(seen.pairs)):
            new = ripe
        new = _with_extras(request, seen, values, couplings, new)
    new = sorted({*new, *(from_the_ends(request.with_spare, values, 0) if request.spare else ())})
    extension = seen.block.extended(result, coordinates[:, new])
    keep = list(range(len(extension.pairs)))
    if len(keep) > request.kept:
        keep = from_the_ends(request, extension.pairs.values, request.kept)
    return _keep(request, seen, extension, keep)


def _keep(request: Request, known: Knowledge, extension: Extension, keep: list[int]) -> Knowledge:
    """Form the pairs that are kept, and bound what is left over once the others have gone back to the complement."""
    others = [index for index in range(len(extension.pairs)) if index not in set(keep)]
    rest = known.rest
    if others:
        dropped, size = extension.pairs.chosen(others), request.size - len(keep)
        high = dropped.ceilings(rest.high, size, 1)[0]
        rest = Interval(-dropped.mirrored().ceilings(-rest.low, size, 1)[0], high).tighten(known.whole)
    block = extension.formed(keep)
    return replace(known, block=block, pairs=block.pairs(), rest=rest)


def _wanted(request: Request, known: Knowledge, values: Tensor) -> list[int]:
    """Return the indices of the complement's Ritz values that belong among the wanted ones."""
    chosen: set[int] = set()
    for sign, count in request.ends:
        held = [(value, -1) for value in (sign * known.pairs.values).tolist()]
        fresh = [(value, index) for index, value in enumerate((sign * values).tolist())]
        if len(held) >= count > 0:
            # A value that beats the last wanted one by far less than an interval's width changes nothing in the answer.
            last = sorted(held, reverse=True)[count - 1][0]
            fresh = [pair for pair in fresh if pair[0] > last + 0.25 * allowed_width(request, known, last)]
        chosen.update(index for _, index in sorted(held + fresh, reverse=True)[:count] if index >= 0)
    return sorted(chosen)


def _joined(known: Knowledge, values: Tensor, couplings: Tensor, indices: list[int]) -> Knowledge:
    """Return what would be known if these Ritz pairs of a run were merged."""
    return replace(known, pairs=known.pairs.joined(values[indices], couplings[indices]))


def _first_of_each_end(request: Request, new: list[int]) -> list[int]:
    """Return the outermost of indices in ascending order of their values, at each end that was asked for."""
    picked = {new[-1] if sign > 0.0 else new[0] for sign, count in request.ends if count and new}
    return sorted(picked)


def _with_extras(request: Request, known: Knowledge, values: Tensor, couplings: Tensor, new: list[int]) -> list[int]:
    """Add further indices from the wanted ends inwards, while the wanted intervals can still become narrow."""
    for sign, count in request.ends:
        order = torch.argsort(sign * values, descending=True).tolist() if count else []
        for index in [i for i in order if i not in new][:_EXTRA]:
            trial = sorted([*new, index])
            if not certifiable(request, _joined(known, values, couplings, trial), len(known.pairs)):
                break
            new = trial
    return new
