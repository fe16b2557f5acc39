"""The extreme eigenvalues, and how the eigenvalues of any matrix under view are found and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from newtonopt.checks import check_whole
from newtonopt.curvature.eigenvalues.bounds import ASYMMETRIC
from newtonopt.curvature.eigenvalues.extreme import (
    Eigenvalue,
    Spectrum,
    certify,
    check_count,
    track_roughly,
)
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, View
from newtonopt.curvature.showing import written
from newtonopt.operators.linear_operator import LinearOperator

# Products for tracking, at most: a quarter of what a measurement from a random start may have, or four and two for each
# eigenvalue if that is more. Without a bound a GPT's tiny smallest eigenvalue took a hundred.
_TRACKED_PART, _TRACKED_BASE, _TRACKED_EACH = 4, 4, 2
# Where the largest eigenvalue seems to have fallen below this share of what it was, the search starts again at random:
# a GPT at far too high a learning rate once had 0.39 tracked for 7046, its vector being lost.
_FALLEN = 0.3
# Bounds this close to a value of zero are those of underflow.
_NOTHING = 1e-30
# Negative curvature below the first share of the largest eigenvalue is called slight, and from the second on it stands
# in the verdict: nearly all networks in training have some. A condition number above the last is called ill.
_SLIGHT, _LARGE, _ILL = 0.05, 0.5, 1000.0
# An interval narrower than this share of its value is told by its width, a wider one by its ends.
_NARROW = 0.02


@dataclass(frozen=True)
class ExtremeEigenvalues(Measurement[Spectrum]):
    """The largest and smallest eigenvalues of the curvature matrix, the outermost ones with the interval they lie in.

    `CurvatureMonitor(top=..., bottom=...)` and `measure` measure them always.

    Args:
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import ExtremeEigenvalues, measure
        >>> w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> weights = torch.tensor([-1.0, 2.0, 3.0])
        >>> found = measure(lambda: 0.5 * (weights * w**2).sum(), [w], top=2, bottom=1)
        >>> spectrum = found.of(ExtremeEigenvalues)
        >>> [round(entry.value, 6) for entry in (*spectrum.top, *spectrum.bottom)]
        [3.0, 2.0, -1.0]

    See Also:
        - `extreme_eigenvalues()`: the function behind it.
        - `Stability`: the largest eigenvalue over the optimizer's threshold.
        - `docs/read_your_curvature.md`: what eigenvalues say about a run.
    """

    top: int = 3
    bottom: int = 1

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("lambda_max", "L / θ²", "the largest eigenvalue"),
        Tag("lambda_max_lower", "L / θ²", "the lower end of its interval (see `certified`)"),
        Tag("lambda_max_upper", "L / θ²", "the upper end"),
        Tag(
            "lambda_RANK",
            "L / θ²",
            "the next largest, up to `top`; left out where its interval, or the estimated error of a tracked one, "
            "exceeds 10 % of it",
        ),
        Tag("lambda_min", "L / θ²", "the smallest eigenvalue"),
        Tag("lambda_min_lower", "L / θ²", "the lower end of the interval that it lies in"),
        Tag("lambda_min_upper", "L / θ²", "the upper end"),
        Tag(
            "lambda_min_RANK",
            "L / θ²",
            "the next smallest, up to `bottom`; left out by the same rule",
        ),
        Tag(
            "certified",
            "",
            "1: the measurement started at random, and the intervals contain the extreme eigenvalues with 99 % "
            "confidence; 0: it tracked earlier eigenvectors, or the products are in doubt (the text says why), and "
            "the intervals contain some eigenvalue",
            "bookkeeping",
        ),
        Tag(
            "asymmetry",
            "",
            "written only if the products do not belong to a symmetric matrix: the size of the asymmetry relative to "
            "the norm; nothing is certified then",
            "bookkeeping",
        ),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart("Largest eigenvalues", (r"lambda_(max|\d+)",)),
        Chart("Smallest eigenvalue and its interval", ("lambda_min", "lambda_min_lower", "lambda_min_upper"), True),
        # A margin that is mostly too narrow to be seen.
        Chart(
            "Largest eigenvalue and its interval",
            ("lambda_max", "lambda_max_lower", "lambda_max_upper"),
            margin=True,
            more=True,
        ),
        Chart("Smallest eigenvalues", ("lambda_min", r"lambda_min_\d+"), more=True),
    )

    def __post_init__(self) -> None:
        check_whole("top", self.top, 1)
        check_whole("bottom", self.bottom, 0)

    def check_model(self, names: Sequence[str], size: int | None) -> None:
        """Raise ValueError if more eigenvalues are asked for than there are."""
        if size is not None:
            check_count("top", self.top, size)
            check_count("bottom", self.bottom, size)

    def measure(self, view: View) -> Spectrum | None:
        """Return the eigenvalues, tracked from the last ones unless those are seen to have been lost."""
        found = spectrum(view, view.matrix, self.top, self.bottom, view.before(ExtremeEigenvalues), view.gradient)
        # The quotient of any vector is a lower bound on the largest eigenvalue. If the tracked value lies below that of
        # the gradient, tracking has lost the top eigenvector, and the search starts again at random.
        bound = view.quotient
        if found is None or found.certified or not found.top or bound is None:
            return found
        lost = found.top[0].value < bound - view.plan.tolerance * abs(bound)
        return spectrum(view, view.matrix, self.top, self.bottom, None, None) if lost else found

    def differenced_along(self, result: Spectrum | None, view: View) -> Sequence[Tensor]:
        """Return the top eigenvector."""
        return [] if result is None else [entry.vector for entry in result.top[:1]]

    def values(self, result: Spectrum) -> dict[str, float]:
        """Return the outermost eigenvalue of each end with its interval, and those next to it without."""
        found = {"certified": float(result.certified)}
        if result.asymmetry > ASYMMETRIC:
            found["asymmetry"] = result.asymmetry
        for first, others, end in (("lambda_max", "lambda", result.top), ("lambda_min", "lambda_min", result.bottom)):
            for eigenvalue in end[:1]:
                found |= with_interval(first, eigenvalue)
            for rank, eigenvalue in enumerate(end[1:], start=2):
                if is_known(eigenvalue):
                    found[f"{others}_{rank}"] = eigenvalue.value
        return found

    def verdict(self, result: Spectrum, measured: Measured) -> str:
        """Return what the sign of the smallest eigenvalue shows; nothing where it is negative and not large."""
        for entry in result.bottom[:1] if measured.plan.curvature == "hessian" else ():
            lower, upper = interval(entry)
            if upper < 0.0:
                return "not at a minimum" if -entry.value >= _LARGE * _largest(result) else ""
            if lower > 0.0 and result.certified:
                return "convex here"
        return ""

    def sentences(self, result: Spectrum, measured: Measured) -> list[str]:
        """Return what the largest and the smallest eigenvalue say about the loss, and what to do about it."""
        largest = [f"The largest eigenvalue is {in_words(result, entry)}." for entry in result.top[:1]]
        # The smallest eigenvalue of a Gauss-Newton matrix is never negative and says nothing about the loss.
        smallest = result.bottom[:1] if measured.plan.curvature == "hessian" else ()
        return [*largest, *(_smallest(result, entry, measured.troubled) for entry in smallest)]

    def spectra(self, result: Spectrum) -> tuple[Spectrum, ...]:
        """Return the eigenvalues."""
        return (result,)


def spectrum(
    view: View,
    A: LinearOperator,
    top: int,
    bottom: int,
    last: Spectrum | None,
    gradient: Tensor | None,
    spare: int = 0,
) -> Spectrum | None:
    """Return the extreme eigenvalues of a matrix within the budget of the view.

    Args:
        view: The point under view.
        A: The matrix.
        top: How many of the largest.
        bottom: How many of the smallest.
        last: Eigenvalues to track; None: start at random.
        gradient: The gradient in the matrix's coordinates, from which tracking starts too, `(n,)`; None: not known.
        spare: How many further ones of the largest are tracked, and never certified. Default 0.

    Returns:
        The eigenvalues; None where there is no time for a product.
    """
    plan = view.plan
    budget = view.affordable(plan.max_products)
    if budget < 1:
        return None
    # Vectors of another length belong to other parameters, which were trained then.
    if last is not None and all(entry.vector.shape[0] == A.shape[0] for entry in (*last.top, *last.bottom)):
        count = top + spare
        most = max(plan.max_products // _TRACKED_PART, _TRACKED_BASE + _TRACKED_EACH * (count + bottom))
        tracked = track_roughly(A, last, count, bottom, plan.tolerance, min(budget, most), plan.seed, gradient)
        rough = tracked is not None and view.differenced and tracked.asymmetry > ASYMMETRIC
        if tracked is not None and not rough and not _has_fallen(tracked, last):
            return tracked
    if view.differenced:
        raise RuntimeError("A random start needs exact products.")
    return certify(A, top, bottom, plan.tolerance, budget, plan.seed, spare)


def _has_fallen(tracked: Spectrum, last: Spectrum) -> bool:
    """Return whether the largest eigenvalue seems to have fallen so far that its vector was probably lost instead."""
    if not tracked.top or not last.top:
        return False
    was = last.top[0].value
    return was > 0.0 and tracked.top[0].value < _FALLEN * was


def interval(eigenvalue: Eigenvalue) -> tuple[float, float]:
    """Return the interval of the extreme eigenvalue; where nothing bounds that one, an interval that holds some one."""
    lower, upper, residual = eigenvalue.lower, eigenvalue.upper, eigenvalue.residual
    return (
        lower if math.isfinite(lower) else eigenvalue.value - residual,
        upper if math.isfinite(upper) else eigenvalue.value + residual,
    )


def with_interval(name: str, eigenvalue: Eigenvalue) -> dict[str, float]:
    """Return the values to log of an eigenvalue with its interval."""
    lower, upper = interval(eigenvalue)
    return {name: eigenvalue.value, f"{name}_lower": lower, f"{name}_upper": upper}


def is_known(eigenvalue: Eigenvalue) -> bool:
    """Return whether an eigenvalue is known to a tenth, so that it can be shown without its interval."""
    width = eigenvalue.upper - eigenvalue.lower
    error = width if math.isfinite(width) else min(eigenvalue.residual, eigenvalue.error)
    return error <= 0.1 * abs(eigenvalue.value)


def in_words(found: Spectrum, eigenvalue: Eigenvalue, missed: str = "larger") -> str:
    """Return an outermost eigenvalue with its interval in words.

    Args:
        found: The spectrum.
        eigenvalue: One of its eigenvalues.
        missed: Where the extreme eigenvalue may lie if it was missed: "larger" or "smaller".
    """
    lower, upper = interval(eigenvalue)
    value, width = eigenvalue.value, max(upper - eigenvalue.value, eigenvalue.value - lower)
    # A wide interval lies to one side of the value as a rule, and "within" would put half of it on the other side.
    narrow = width <= _NARROW * abs(value)
    between = f"between {written(lower)} and {written(upper)}"
    if found.asymmetry > ASYMMETRIC:
        return (
            f"{written(value)} (not certified: the asymmetry of the products is {written(found.asymmetry, 2)} of the "
            "norm; measure in float64)"
        )
    if not found.certified:
        return (
            f"{written(value)} (not certified: some eigenvalue lies "
            f"{f'within {written(width, 2)} of it' if narrow else between}, but a {missed} one may have been missed)"
        )
    return f"{written(value)} within {written(width, 2)}" if narrow else f"{written(value)}, {between}"


def _largest(found: Spectrum) -> float:
    """Return the largest eigenvalue; zero where none was measured."""
    return found.top[0].value if found.top else 0.0


def _smallest(found: Spectrum, eigenvalue: Eigenvalue, troubled: bool) -> str:
    lower, upper = interval(eigenvalue)
    if eigenvalue.value == 0.0 and max(-lower, upper) < _NOTHING:
        return "The smallest eigenvalue is zero: the loss is flat along its eigenvector."
    said = f"The smallest eigenvalue is {in_words(found, eigenvalue, 'smaller')}"
    largest = _largest(found)
    if upper < 0.0:
        return f"{said}, which shows that this is not a minimum{_negative(found, eigenvalue, largest, troubled)}"
    if lower > 0.0 and found.certified:
        return f"{said}, which shows that the loss is convex here{_conditioned(eigenvalue.value, largest)}"
    remedy = "" if found.asymmetry > ASYMMETRIC else " Raise max_products to learn it."
    return f"{said}, so its sign is not known.{remedy}"


def _negative(found: Spectrum, eigenvalue: Eigenvalue, largest: float, troubled: bool) -> str:
    if largest <= 0.0:
        said = ": the loss is concave along all directions that were measured."
        return said if troubled else f"{said} Train on."
    lower, _ = interval(eigenvalue)
    share = f", and its size is {written(-eigenvalue.value / largest, 2)} times the largest"
    if -lower < _SLIGHT * largest and found.certified:
        return f"{share}: as is usual while a network trains.{'' if troubled else ' Nothing needs to be done.'}"
    if -eigenvalue.value < _SLIGHT * largest:
        return f"{share}. A certified measurement with more products tells whether that is all."
    if troubled:  # by steps that are too long, and not by a saddle
        return f"{share}."
    return (
        f"{share}. While the loss falls, train on. Where it stalls, this may be a saddle: smaller batches, or "
        "TrustRegionNewton and CubicNewton, which step along negative curvature, leave it."
    )


def _conditioned(value: float, largest: float) -> str:
    if largest <= 0.0:
        return "."
    number = largest / value
    said = f", with a condition number of {written(number, 3)}"
    if number < _ILL:
        return f"{said}."
    return (
        f"{said}: gradient descent needs about that many steps to reduce the error by a factor of e. A second-order "
        "optimizer, such as HessianFree, needs few."
    )
