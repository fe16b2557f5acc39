"""The kind of a critical point, as far as bounds on the curvature can tell."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from newtonopt.checks import check_positive, check_seed, check_share, check_whole
from newtonopt.closure.evaluation import Evaluation
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, check_spectrum, extreme_eigenvalues
from newtonopt.curvature.showing import as_table, as_text, written
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import hessian
from newtonopt.vectors.scaling import dot, lost, norm

CriticalKind = Literal["minimum", "maximum", "saddle", "degenerate", "not critical"]

# Tolerances tried one after the other until both signs are known. An interval's width is relative to its value, or to
# the tolerance times the norm: the first tolerance settles the sign of a value above a tenth of the norm, which is
# enough for most points.
_TOLERANCES = (0.3, 1e-2, 1e-6)
# Power of the rounding unit that bounds the relative error of a product: 1.8e-12 in float64, 6.4e-6 in float32.
# Intervals around eigenvalues of Gaussian processes, through Cholesky factors, were up to 1.2e-12 wide at either side.
_ROUNDING = 0.75


@dataclass(frozen=True, eq=False, repr=False)
class CriticalPoint:
    """The verdict of the second-order test, with its evidence; `str()` puts it in words.

    Attributes:
        kind: "minimum" or "maximum" (strict and local), "saddle", "degenerate" (the test does not decide), or
            "not critical" (the gradient is not zero).
        gradient_norm: Norm of the gradient.
        tolerance: Gradient norm up to which the point counts as critical.
        loss: Loss at the point.
        largest: Largest eigenvalue of the Hessian, with its interval.
        smallest: Smallest eigenvalue of the Hessian, with its interval.
        rounding: Size up to which an eigenvalue has no sign, because errors of products are as large: `eps^(3/4)` of
            the largest magnitude, 1.8e-12 of it in float64.
        distance: Bound on the distance to the quadratic model's critical point; zero if the gradient is zero. A minimum
            or maximum supposes that the curvature changes little over it. Infinite for other kinds, unless zero.
        direction: Unit vector `(n,)` along which the curvature is certainly negative and the loss does not rise at
            first: the way to leave a saddle or a maximum. None if no negative curvature was found.
        products: Number of Hessian products that were used.
        converged: Whether the signs of both ends are known.
        confidence: Least probability with which both intervals hold.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> from newtonopt.curvature import critical_point
        >>> theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> found = critical_point(evaluate(lambda: theta[0] ** 2 - theta[1] ** 2, [theta]))
        >>> str(found)[:37]
        "Saddle: the gradient's norm is 0, the"
        >>> [round(abs(entry), 6) for entry in found.direction.tolist()]
        [0.0, 1.0]

    See Also:
        - `critical_point()`: computes it.
        - `Spectrum`: both ends of the spectrum.
        - `docs/read_your_curvature.md`: how a saddle looks during training.
    """

    kind: CriticalKind
    gradient_norm: float
    tolerance: float
    loss: float
    largest: Eigenvalue
    smallest: Eigenvalue
    rounding: float
    distance: float
    direction: Tensor | None = field(repr=False)
    products: int
    converged: bool
    confidence: float

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self, sentences=[str(self)])

    def __str__(self) -> str:
        """Return the verdict and its evidence in words."""
        gradient = f"the gradient's norm is {written(self.gradient_norm, 3)}"
        ends = f"the Hessian's eigenvalues lie between {_in_words(self.smallest)} and {_in_words(self.largest)}"
        return f"{_TITLES[self.kind]}: {gradient}, {ends}. {_remark(self)}"


_TITLES: dict[str, str] = {
    "minimum": "Strict local minimum",
    "maximum": "Strict local maximum",
    "saddle": "Saddle",
    "degenerate": "Degenerate critical point",
    "not critical": "Not a critical point",
}


def critical_point(
    evaluation: Evaluation,
    tolerance: float = 1e-6,
    confidence: float = 0.99,
    max_products: int = 300,
    seed: int = 0,
    spectrum: Spectrum | None = None,
) -> CriticalPoint:
    """Apply the second-order test, with intervals in place of eigenvalues.

    Both ends of the spectrum above zero make a minimum, both below a maximum, one on each side a saddle. An interval
    that reaches zero, up to `rounding`, leaves the test undecided, as a positive semi-definite Hessian always does:
    `x^3`, `x^4` and `-x^4` all have the second derivative zero at zero. With a gradient above the tolerance the point
    is not critical, whatever the eigenvalues.

    A minimum is local: nothing is said of other points. If the gradient is small and not zero, the critical point
    itself is elsewhere, `distance` away if the curvature changes little on the way, which second derivatives cannot
    tell. A saddle is certain up to rounding; a minimum or maximum holds with the confidence.

    Args:
        evaluation: Return value of `evaluate(closure, params)`.
        tolerance: Gradient norm up to which the point is critical, positive. Default 1e-6; in float32 the gradient of a
            large loss does not get there.
        confidence: Probability with which both intervals hold, in (0, 1). Default 0.99.
        max_products: Budget of Hessian products, >= 1. Default 300.
        seed: Seed of the random starts; the global random state is neither read nor written. Default 0.
        spectrum: The Hessian's spectrum if it was measured before, with one eigenvalue at least of each end. A spectrum
            that is not certified proves no minimum or maximum. None (default): measured here until both signs are
            known.

    Returns:
        The verdict and the evidence.

    Raises:
        TypeError: `evaluation` is no `Evaluation`, or `spectrum` no `Spectrum`.
        ValueError: An argument is out of range, or `spectrum` lacks an end.
        RuntimeError: The evaluation was freed.
        FloatingPointError: The loss, the gradient or a product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> from newtonopt.curvature import critical_point
        >>> theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> critical_point(evaluate(lambda: (theta**2).sum(), [theta])).kind
        'minimum'

    See Also:
        - `CriticalPoint`: the result.
        - `extreme_eigenvalues()`: the intervals that decide.
        - `docs/read_your_curvature.md`: how a saddle looks during training.
    """
    curvature = hessian(evaluation)
    check_positive("tolerance", tolerance)
    check_seed(seed)
    length = norm(evaluation.gradient)
    if not math.isfinite(length):
        raise FloatingPointError(
            f"The gradient's norm is {length}, so the point cannot be classified. Check the data and the model."
        )
    check_share("confidence", confidence)
    check_whole("max_products", max_products, 1)
    products = 0
    if spectrum is None:
        spectrum, products = _ends(evaluation, curvature, confidence, max_products, seed)
    check_spectrum("spectrum", spectrum)
    if not (spectrum.top and spectrum.bottom):
        raise ValueError(
            f"spectrum must hold at least one largest and one smallest eigenvalue, got {len(spectrum.top)} and "
            f"{len(spectrum.bottom)}. Write extreme_eigenvalues(hessian(evaluation))."
        )
    if spectrum.top[0].vector.numel() != curvature.shape[0]:
        raise ValueError(
            f"spectrum must belong to the evaluation's {curvature.shape[0]} parameters, got one of "
            f"{spectrum.top[0].vector.numel()}. Write extreme_eigenvalues(hessian(evaluation))."
        )
    largest, smallest = spectrum.top[0], spectrum.bottom[0]
    rounding = _rounding(evaluation, smallest, largest)
    signs = _sign(smallest, rounding), _sign(largest, rounding)
    kind = _kind(length <= tolerance, *signs)
    return CriticalPoint(
        kind,
        length,
        tolerance,
        float(evaluation.loss),
        largest,
        smallest,
        rounding,
        _distance(kind, length, smallest, largest),
        _downhill(smallest.vector, evaluation.gradient) if signs[0] < 0 else None,
        products,
        0 not in signs,
        1.0 - 2.0 * (1.0 - spectrum.confidence),
    )


def _ends(
    evaluation: Evaluation, curvature: LinearOperator, confidence: float, max_products: int, seed: int
) -> tuple[Spectrum, int]:
    """Return both ends of the spectrum, as sharp as their signs need, and the products used.

    All attempts have the same random start. They fail together, so the confidence is that of a single attempt.
    """
    # Each end may fail with half the failure probability of both.
    sure, used = 1.0 - 0.5 * (1.0 - confidence), 0
    for tolerance in _TOLERANCES:
        left = max_products - used
        found = extreme_eigenvalues(curvature, 1, 1, tolerance, sure, max_products=left, seed=seed)
        used += found.products
        ends = (found.top[0], found.bottom[0])
        # Intervals are never narrower than what underflow may take at both of their ends.
        room = 4.0 * lost(curvature.dtype, curvature.shape[0])
        rounding = _rounding(evaluation, *ends)
        finest = all(end.upper - end.lower <= max(rounding, room) for end in ends if _sign(end, rounding) == 0)
        if finest or used == max_products or found.products == curvature.shape[0] or not found.certified:
            break
    return found, used


def _rounding(evaluation: Evaluation, one: Eigenvalue, other: Eigenvalue) -> float:
    return float(evaluation.coarse_eps**_ROUNDING * max(abs(one.value), abs(other.value)))


def _sign(eigenvalue: Eigenvalue, rounding: float) -> int:
    """Return 1 or -1 for an eigenvalue that is certainly positive or negative, else 0."""
    return 1 if eigenvalue.lower > rounding else -1 if eigenvalue.upper < -rounding else 0


def _kind(critical: bool, smallest: int, largest: int) -> CriticalKind:
    if not critical:
        return "not critical"
    if smallest > 0:
        return "minimum"
    if largest < 0:
        return "maximum"
    return "saddle" if smallest < 0 < largest else "degenerate"


def _distance(kind: CriticalKind, length: float, smallest: Eigenvalue, largest: Eigenvalue) -> float:
    if length == 0.0:
        return 0.0
    least = {"minimum": smallest.lower, "maximum": -largest.upper}.get(kind, 0.0)
    return length / least if least > 0.0 else math.inf


def _downhill(vector: Tensor, gradient: Tensor) -> Tensor:
    return -vector if dot(gradient, vector) > 0.0 else vector


def _in_words(eigenvalue: Eigenvalue) -> str:
    width = max(eigenvalue.upper - eigenvalue.value, eigenvalue.value - eigenvalue.lower)
    return f"{written(eigenvalue.value)} (within {written(abs(width), 1)})"


def _remark(point: CriticalPoint) -> str:
    if point.kind == "not critical":
        return (
            f"The gradient is above the tolerance of {written(point.tolerance, 3)}, so the signs of the eigenvalues "
            "do not classify this point."
        )
    if point.kind in ("minimum", "maximum"):
        sign, others = ("positive", "; there may be lower minima") if point.kind == "minimum" else ("negative", "")
        near = (
            f"; the quadratic model's {point.kind} is at most {written(point.distance, 2)} away"
            if point.distance > 0.0
            else ""
        )
        return f"All eigenvalues are {sign}, with {written(point.confidence, 3)} confidence{near}{others}."
    if point.kind == "saddle":
        return "The loss falls along the direction of the smallest eigenvalue and rises along that of the largest."
    if _sign(point.smallest, point.rounding) < 0:
        return "This is not a minimum. The second-order test cannot decide between a saddle and a maximum."
    if _sign(point.largest, point.rounding) > 0:
        return (
            "This is not a maximum. The second-order test cannot decide between a minimum and a saddle, because "
            "nonnegative eigenvalues do not prove a minimum."
        )
    return (
        "The second-order test is inconclusive. Raise max_products if the intervals are wide; otherwise higher "
        "derivatives decide."
    )
