"""Tracking: one Lanczos run from the last measurement's eigenvectors, a fraction of the products of a search.

It certifies nothing, as its start is not random: an eigenvalue whose vector the last measurement does not contain
may be missed, and an eigenvalue that the last measurement counted several times is seen once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newtonopt.curvature.eigenvalues.bounds import Knowledge, Request, RitzPairs
from newtonopt.curvature.eigenvalues.search import from_the_ends, observe, restarts
from newtonopt.solvers.lanczos import Tridiagonal, lanczos
from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import InRange, dot, norm

# Norm of the random part of the start, relative to the part along the old vectors.
_RANDOM_PART = 0.1
# Weight of a bottom vector in the start, if a top one has the weight 1. With 1 for both, six products for three top
# ones and a bottom one missed the largest eigenvalue of a convolutional network, 100 steps of Adam later, by a quarter;
# with this weight by 0.3 %.
_BOTTOM_WEIGHT = 0.3
# A tracked value is dropped if its vector is a new one and it has moved inwards by the first share of the spectrum's
# width, or has crossed zero and is the second share of the width away from it. A vector is a new one if it has less
# than the third share of an old vector in it.
_MOVED, _ACROSS, _PART = 0.3, 0.03, 0.3


@dataclass(frozen=True, eq=False)
class Previous:
    """The last measurement, as far as tracking needs it.

    Attributes:
        top: Its largest eigenvalues, descending.
        bottom: Its smallest eigenvalues, ascending.
        vector: Weighted sum `(n,)` of its eigenvectors.
    """

    top: tuple[float, ...]
    bottom: tuple[float, ...]
    vector: Tensor


def weighted_sum(top: Sequence[Tensor], bottom: Sequence[Tensor]) -> Tensor:
    """Return the sum of the eigenvectors from which to start, the top ones with more weight."""
    total = torch.zeros_like([*top, *bottom][0])
    for weight, vectors in ((1.0, top), (_BOTTOM_WEIGHT, bottom)):
        for vector in vectors:
            total = torch.add(total, vector, alpha=weight)
    return total


def track(
    matrix: InRange,
    request: Request,
    known: Knowledge,
    previous: Previous,
    seed: int,
    is_enough: Callable[[Knowledge], bool],
) -> Knowledge:
    """Run Lanczos from the old eigenvectors until `is_enough` says so or the budget is spent; it bounds nothing."""
    generator = torch.Generator().manual_seed(seed)
    # The random part lets through eigenvectors that the old ones do not contain.
    start = normals(known.block.vectors, generator)
    start *= _RANDOM_PART * float(previous.vector.norm()) / float(start.norm())
    start += previous.vector

    def judged(tridiagonal: Tridiagonal) -> Knowledge:
        values, coordinates = tridiagonal.ritz()
        tails = tridiagonal.betas[-1] * coordinates[-1]
        pairs = RitzPairs(values, torch.outer(tails, tails))
        return replace(observe(known, tridiagonal, values, None), pairs=pairs, products=tridiagonal.size)

    def stop(tridiagonal: Tridiagonal) -> bool:
        return is_enough(judged(tridiagonal))

    result = lanczos(matrix, start, request.max_products, stop=stop, restarts=restarts(request, known))
    seen = judged(result.tridiagonal)
    keep = from_the_ends(request, seen.pairs.values, 0)
    block = known.block.extended(result, result.tridiagonal.ritz()[1][:, keep])
    formed = block.formed(list(range(len(keep))))
    return replace(seen, block=formed, pairs=formed.pairs())


def of_its_own_end(request: Request, known: Knowledge, previous: Previous) -> Request:
    """Return the request without the values of each end that come from the other end of the spectrum.

    A run sees equal eigenvalues once, and nearly equal ones late: if several of the top ones are about zero, the next
    largest Ritz value is one of the bottom's. Such a value lies far further in than the one measured last, or on the
    other side of zero, and its vector contains little of the old ones. The first value of each end stays.
    """
    values, total = known.block.values.tolist(), norm(previous.vector)
    parts = [abs(dot(vector, previous.vector)) / total for vector in known.block.vectors]
    before = (*previous.top, *previous.bottom)
    width, width_before = max(values) - min(values), max(before) - min(before)
    olds = ((previous.top, 1.0), (previous.bottom, _BOTTOM_WEIGHT))
    ends = []
    for (sign, count), (old, weight) in zip(request.ends, olds, strict=True):
        order = sorted(range(len(values)), key=lambda index: -sign * values[index])[:count]
        rank = min(1, len(order))
        while 0 < rank < len(order) and old:
            value, was = sign * values[order[rank]], sign * old[min(rank, len(old) - 1)]
            # Distance from the outermost value, now and then, each relative to the width of its spectrum.
            inwards = (sign * values[order[0]] - value) * width_before - (sign * old[0] - was) * width
            far = inwards > _MOVED * width * width_before
            across = value < -_ACROSS * width and was > -_ACROSS * width_before
            if (far or across) and parts[order[rank]] < _PART * weight / total:
                break
            rank += 1
        ends.append((sign, rank if old else len(order)))
    return replace(request, ends=(ends[0], ends[1]))
