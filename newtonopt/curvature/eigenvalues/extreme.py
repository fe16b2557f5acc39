"""Extreme eigenvalues of a symmetric operator, each with an interval that holds it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newtonopt.checks import check_instance, check_seed, check_share, check_whole
from newtonopt.curvature.drawing import figure_of, panels
from newtonopt.curvature.eigenvalues.bounds import (
    GUARD,
    Interval,
    Knowledge,
    Request,
    RitzBlock,
    allowed_width,
    certified,
    intervals,
    is_symmetric,
    settled,
)
from newtonopt.curvature.eigenvalues.search import search
from newtonopt.curvature.eigenvalues.tracking import Previous, known_roughly, of_its_own_end, part, track
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.vectors.scaling import InRange, lost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Vectors of length n that a measurement may hold, unless more eigenvalues are asked for.
_VECTORS = 120
# Fewest that it may be held to for one eigenvalue alone: four Lanczos vectors between restarts.
_LEAST = 16
# Share of a unit vector, by its square, that is called most of it.
_MOST = 0.5
# Number of eigenvalues that may be asked for even if the operator has fewer rows: the defaults ask for as many.
_FEW = 5
_ANYWHERE = Interval(-math.inf, math.inf)


@dataclass(frozen=True, eq=False, repr=False)
class Eigenvalue:
    """One eigenvalue with its multiplicity counted: equal eigenvalues are separate entries.

    Attributes:
        value: Ritz value.
        lower: Lower end of an interval that holds the eigenvalue of this rank in the ordered spectrum.
        upper: Upper end of that interval. The inner end (lower at the top, upper at the bottom) is certain up to
            rounding. The outer end holds with the confidence asked for, over the random start; it is infinite if the
            measurement is not certified.
        residual: `|A x - value x|`: some eigenvalue lies within it of the value.
        multiplicity: Number of entries at this end, this one included, that equal it within the tolerance.
        vector: Unit vector x `(n,)`, in the operator's dtype and on its device.
        error: Estimated error of a tracked value: `residual^2` over the distance to the nearest other Ritz value, and
            at most the residual. It holds if no eigenvalue nearby was missed. Default inf: not estimated, as the
            interval of a certified value says more.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import extreme_eigenvalues
        >>> A = torch.diag(torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64))
        >>> largest = extreme_eigenvalues(LinearOperator(A.mv, A.shape, A), top=1, bottom=0).top[0]
        >>> largest.lower <= 5.0 <= largest.upper
        True

    See Also:
        - `Spectrum`: all entries of both ends.
        - `loss_slice()`: the loss along `vector`.
        - `docs/reference/mathematics.md`: where the bounds come from.
    """

    value: float
    lower: float
    upper: float
    residual: float
    multiplicity: int
    vector: Tensor = field(repr=False)
    error: float = math.inf

    def __repr__(self) -> str:
        return f"{self.value:.4g} in [{self.lower:.4g}, {self.upper:.4g}]"


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Both ends of a spectrum.

    Attributes:
        top: Largest eigenvalues, descending.
        bottom: Smallest eigenvalues, ascending.
        products: Number of products with the operator that were used.
        converged: Whether all eigenvalues asked for are there and every interval is narrow enough; if the measurement
            is not certified, every residual small enough. False if products are not symmetric or are in doubt.
        confidence: Least probability with which each interval holds.
        certified: Whether the start was random, so that nothing larger or smaller can have been missed, and the
            operator's products are symmetric and beyond doubt. With a `start` the values are eigenvalues within their
            residuals, but perhaps not the extreme ones. If `operator.trust` has a doubt, they are eigenvalues of the
            matrix that the products belong to, which may not be the one wanted.
        asymmetry: Deviation of the products from those of a symmetric matrix, relative to the norm; no more than
            rounding if all is well. From 3e-3 on nothing is certified.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import extreme_eigenvalues
        >>> A = torch.diag(torch.arange(6, dtype=torch.float64))
        >>> spectrum = extreme_eigenvalues(LinearOperator(A.mv, A.shape, A), top=2, bottom=1)
        >>> [round(entry.value, 6) for entry in spectrum.top], spectrum.certified
        ([5.0, 4.0], True)

    See Also:
        - `extreme_eigenvalues()`: computes it.
        - `Eigenvalue`: one entry, with its interval.
        - `docs/read_your_curvature.md`: what eigenvalues say about a run.
    """

    top: tuple[Eigenvalue, ...]
    bottom: tuple[Eigenvalue, ...]
    products: int
    converged: bool
    confidence: float
    certified: bool
    asymmetry: float

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the eigenvalues from the smallest to the largest, with their intervals; an infinite end is left out.

        Args:
            ax: Axes of matplotlib to draw in; None (default): a new figure, which `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is not axes.
        """
        (axes,) = panels(ax, 1)
        axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
        # An empty place stands for the eigenvalues between.
        places = [*range(len(self.bottom)), *range(len(self.bottom) + 1, len(self.bottom) + 1 + len(self.top))]
        for place, entry in zip(places, (*self.bottom, *reversed(self.top)), strict=True):
            ends = [end if math.isfinite(end) else entry.value for end in (entry.lower, entry.upper)]
            axes.plot([place, place], ends, color="C0", linewidth=6, alpha=0.3, solid_capstyle="butt")
            axes.plot(place, entry.value, "o", color="C0", markerfacecolor="C0" if self.certified else "white")
        names = [f"{rank}" for rank in range(1, 1 + len(self.bottom))] + [f"{r}" for r in range(len(self.top), 0, -1)]
        axes.set_xticks(places, names)
        axes.set(xlabel="rank from the bottom, and from the top", ylabel="eigenvalue")
        how = "certified" if self.certified else "not certified"
        axes.set_title(f"{len(places)} eigenvalues ({how}, {self.products} products)", fontsize="medium")
        return figure_of(axes)


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
    """Compute `lambda_1 >= lambda_2 >= ...` and `lambda_n <= lambda_{n-1} <= ...`, each with an interval.

    One Lanczos run from a random start finds the eigenvalues and bounds both ends of the spectrum (van Dorsselaer,
    Hochstenbach & van der Vorst 2001). Such a run sees each distinct eigenvalue once. So if two or more eigenvalues are
    wanted at one end, another run from a fresh start on the complement of what was found looks for missed copies and
    bounds what is left, until every interval is narrow.

    *Memory* is `max_vectors` vectors of length n at most, whatever the budget, besides the memory of a product. A run
    that outgrows it goes on from its outer Ritz vectors (thick restarts, Wu & Simon 2000). A restart changes the basis
    and not the polynomials that the bounds are made of, so the bounds stay valid.

    *Tracking*: with the last measurement as `start`, one run from a sum of its vectors and a small random part takes a
    fraction of the products while the operator changes slowly. It certifies nothing: `certified` is false, the outer
    bounds are infinite, and an eigenvalue whose vector the last measurement does not contain may be missed. A run sees
    equal eigenvalues once, so if the last measurement has any, it is ignored and the start is random.

    Finite-difference products have an error, `operator.trust.error`; intervals are wider by it.

    Do not use this for eigenvalues inside the spectrum. It is expensive if the wanted end is dense, or tiny against the
    norm: the budget ends first, and the intervals are wide but hold.

    Args:
        operator: Symmetric operator `(n, n)`. With `operator.psd` zero is used as a lower bound.
        top: Number of largest eigenvalues, from 0 to n, or to 5 if n is below that; at most n are returned. Default 5.
        bottom: Number of smallest eigenvalues, as `top`, and >= 1 if `top` is 0. Default 2.
        tolerance: Width of an interval relative to its value, in (0, 1), or to `tolerance` times the largest magnitude
            if the value is smaller than that: a value that is zero within `tolerance**2` of the norm, such as the
            smallest one of a Gauss-Newton matrix, does not use up the budget. Widths at the level of rounding, 64 eps
            times the norm, always suffice. Default 1e-3, which tells a learning rate from its stability limit.
        confidence: Probability, in (0, 1), with which each interval holds, over the random starts. Default 0.99.
        max_products: Budget of products, >= 1. Default 300.
        max_vectors: Bound on the vectors of length n in use, at least 24 and four more for each eigenvalue asked for,
            or 16 for one alone. None (default): 120, or eight for each eigenvalue if that is more.
        seed: Seed of the random starts; the global random state is neither read nor written. Default 0.
        start: The last measurement of a nearby operator, to be tracked; None (default): a certified measurement.

    Returns:
        Both ends of the spectrum. If the budget ended first, `converged` is false, and entries may be missing.

    Raises:
        TypeError: `operator` is no `LinearOperator`, or `start` no `Spectrum`.
        ValueError: An argument is out of range, the operator is not square, or `start` has no vectors of its length.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> from newtonopt.curvature import extreme_eigenvalues
        >>> theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        >>> scales = torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64)
        >>> evaluation = evaluate(lambda: 0.5 * (scales * theta**2).sum(), [theta])
        >>> spectrum = extreme_eigenvalues(hessian(evaluation), top=1, bottom=1)
        >>> round(spectrum.top[0].value, 6), round(spectrum.bottom[0].value, 6)
        (5.0, -2.0)
        >>> spectrum.top[0].lower <= 5.0 <= spectrum.top[0].upper
        True

    See Also:
        - `Spectrum`: the result.
        - `spectral_density()`: where all eigenvalues lie, not only the outermost.
        - `critical_point()`: minimum or saddle, decided by the signs of both ends.
        - `docs/reference/mathematics.md`: where the bounds come from.
    """
    request = _request(operator, top, bottom, tolerance, confidence, max_products, max_vectors)
    check_seed(seed)
    previous = _previous(operator, start, tolerance, None)
    if previous is not None:
        return _tracked(operator, request, previous, confidence, seed, functools.partial(settled, request))
    return _searched(operator, request, confidence, seed)


def certify(
    operator: LinearOperator, top: int, bottom: int, tolerance: float, most: int, seed: int, spare: int
) -> Spectrum:
    """Measure a spectrum as `extreme_eigenvalues` does, with `spare` further eigenvalues at the top, to be tracked.

    They take no product of their own: their intervals are as wide as they are when the others are certified.
    """
    request = _request(operator, top, bottom, tolerance, 0.99, most, None)
    return _searched(operator, replace(request, spare=spare), 0.99, seed)


def track_roughly(
    operator: LinearOperator,
    start: Spectrum,
    top: int,
    bottom: int,
    tolerance: float,
    most: int,
    seed: int,
    gradient: Tensor | None,
) -> Spectrum | None:
    """Track a spectrum as `extreme_eigenvalues` does, but from the gradient too, and end earlier.

    The run ends after `most` products at latest, and as soon as estimates say that the largest eigenvalue is known to
    less than the tolerance and the others to a twentieth.

    Returns:
        The spectrum; None if the start has equal eigenvalues, which cannot be tracked.
    """
    request = _request(operator, top, bottom, tolerance, 0.99, most, None)
    previous = _previous(operator, start, tolerance, gradient)
    if previous is None:
        return None
    return _tracked(operator, request, previous, 0.99, seed, functools.partial(known_roughly, request))


def _searched(operator: LinearOperator, request: Request, confidence: float, seed: int) -> Spectrum:
    matrix = InRange(operator)
    known = search(matrix, request, _nothing(operator), seed)
    if operator.trust.doubt:
        known = replace(known, whole=_ANYWHERE, rest=_ANYWHERE)
        return _spectrum(request.with_spare, known, matrix, confidence, False, False)
    return _spectrum(request.with_spare, known, matrix, confidence, certified(request, known), True)


def _tracked(
    operator: LinearOperator,
    request: Request,
    previous: Previous,
    confidence: float,
    seed: int,
    is_enough: Callable[[Knowledge], bool],
) -> Spectrum:
    matrix = InRange(operator)
    known = track(matrix, request, _nothing(operator), previous, seed, is_enough)
    own = of_its_own_end(request, known, previous)
    return _spectrum(own, known, matrix, confidence, own == request and settled(request, known), False)


def keeps_up(tracked: Spectrum, certified: Spectrum) -> bool:
    """Return whether the vectors that were tracked contain most of the certified largest eigenvector.

    Tracking that starts from them finds it; it may miss an eigenvector that has come from elsewhere.
    """
    vector, vectors = certified.top[0].vector, [entry.vector for entry in (*tracked.top, *tracked.bottom)]
    return all(old.shape == vector.shape for old in vectors) and part(vector, vectors) ** 2 >= _MOST


def check_spectrum(name: str, spectrum: object) -> None:
    """Raise a TypeError if an argument is no `Spectrum`."""
    check_instance(name, spectrum, Spectrum, "a Spectrum, or None", "Write extreme_eigenvalues(operator).")


def check_count(name: str, count: int, rows: int) -> None:
    """Raise a ValueError if more eigenvalues are asked for than there are, and than the defaults ask for."""
    if count > max(rows, _FEW):
        raise ValueError(f"{name} must be at most the number of parameters, {rows}, got {count!r}.")


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
        raise ValueError("top + bottom must be at least 1, got 0 and 0.")
    for name, share in (("tolerance", tolerance), ("confidence", confidence)):
        check_share(name, share)
    ends = ((1.0, min(top, rows)), (-1.0, min(bottom, rows)))
    # The allowance that bounds make for rounding covers the error of products by finite differences.
    eps = max(torch.finfo(operator.dtype).eps, operator.trust.error / GUARD)
    room = _room(min(top, rows) + min(bottom, rows), max_vectors)
    return Request(rows, ends, tolerance, 1.0 - confidence, eps, max_products, room)


def _room(wanted: int, max_vectors: int | None) -> int:
    if max_vectors is None:
        return max(_VECTORS, 8 * wanted)
    least = _LEAST if wanted == 1 else 4 * wanted + 24
    check_whole("max_vectors", max_vectors, least)
    return max_vectors


def _previous(
    operator: LinearOperator, start: Spectrum | None, tolerance: float, gradient: Tensor | None
) -> Previous | None:
    """Return the measurement to track; None for a random start."""
    if start is None:
        return None
    check_spectrum("start", start)
    entries = (*start.top, *start.bottom)
    sizes = {entry.vector.shape[0] for entry in entries}
    if sizes != {operator.shape[0]}:
        raise ValueError(
            f"start must hold vectors of length {operator.shape[0]}, the operator's size, got {len(entries)} vectors "
            f"of lengths {sorted(sizes)}. Give the last measurement of this operator, or None."
        )
    # One run sees equal eigenvalues once. Eigenvalues next to zero may be taken for one.
    next_to_zero = tolerance * max(abs(entry.value) for entry in entries)
    if any(entry.multiplicity > 1 and abs(entry.value) > next_to_zero for entry in entries):
        return None
    (top, tops), (bottom, bottoms) = (
        (tuple(entry.value for entry in end), tuple(entry.vector for entry in end)) for end in (start.top, start.bottom)
    )
    return Previous(top, bottom, tops, bottoms, gradient)


def _nothing(operator: LinearOperator) -> Knowledge:
    rows = operator.like
    block = RitzBlock(torch.zeros(0, dtype=torch.float64, device="cpu"), rows, rows)
    whole = Interval(0.0 if operator.psd else -math.inf, math.inf)
    return Knowledge(block, block.pairs(), whole, whole)


def _spectrum(
    request: Request, known: Knowledge, matrix: InRange, confidence: float, converged: bool, is_certified: bool
) -> Spectrum:
    symmetric = is_symmetric(known)
    if not symmetric:
        known = replace(known, whole=_ANYWHERE, rest=_ANYWHERE)
    largest, smallest = (_entries(request, known, matrix, sign, count) for sign, count in request.ends)
    return Spectrum(
        largest,
        smallest,
        known.products,
        converged and symmetric,
        confidence,
        is_certified and symmetric,
        known.noise / known.norm if known.norm > 0.0 else 0.0,
    )


def _entries(request: Request, known: Knowledge, matrix: InRange, sign: float, count: int) -> tuple[Eigenvalue, ...]:
    """Return the eigenvalues of one end in the operator's units, with room for what underflow takes from products."""
    vectors, order = known.block.vectors, torch.argsort(sign * known.block.values, descending=True).tolist()[:count]
    norms = known.pairs.gram.diagonal().clamp_min(0.0).sqrt().tolist()
    room = lost(vectors.dtype, request.size)
    found = []
    for index, (value, lower, upper) in zip(order, intervals(request, known, sign, count), strict=False):
        low, high = (matrix.back(end) for end in sorted((sign * lower, sign * upper)))
        near = (known.block.values[order] - sign * value).abs() <= allowed_width(request, known, value)
        own, residual = matrix.back(sign * value), matrix.back(norms[index])
        error = math.inf if known.errors is None else matrix.back(float(known.errors[index])) + room
        found.append(Eigenvalue(own, low - room, high + room, residual + room, int(near.sum()), vectors[index], error))
    return tuple(found)
