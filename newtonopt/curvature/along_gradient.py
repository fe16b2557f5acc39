"""The curvature that the gradient sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from newtonopt.closure.evaluation import Evaluation
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, check_spectrum
from newtonopt.operators.matrices import hessian
from newtonopt.vectors.scaling import InRange, dot, lost, norm, scale_of, times_power

# Of a residual, in units of eps times the largest eigenvalue.
_ROUNDING = 16.0


@dataclass(frozen=True)
class GradientCurvature:
    """Slope and curvature along the gradient g, with the Hessian H.

    Attributes:
        curvature: The Rayleigh quotient g'Hg / g'g, exact up to rounding.
        residual: `|H g - curvature g| / |g|`: an eigenvalue of H lies within it of `curvature`.
        gradient_norm: `|g|`.
        cauchy_step: Learning rate 1 / curvature, which minimises the quadratic model along -g (the Cauchy point);
            infinite where the curvature is not positive.
        longest_step: Learning rate 2 / curvature, up to which the quadratic model does not rise; infinite where the
            curvature is not positive.
        stable_step: Learning rate 2 / lambda_max below which gradient descent is stable in all directions, with the
            upper bound of lambda_max (its value, where the spectrum is not certified); infinite where that is not
            positive, None without a spectrum.
        alignments: Squared cosines of g with each of the spectrum's top eigenvectors.
        alignment_errors: By how much each of them may be off for the error of its eigenvector, at most one: the
            residual over the distance to the other eigenvalues (Davis & Kahan 1970). One, nothing certain, where
            intervals overlap, and for the last, whose distance to the next is not known.
        products: Hessian products that were used.
    """

    curvature: float
    residual: float
    gradient_norm: float
    cauchy_step: float
    longest_step: float
    stable_step: float | None
    alignments: tuple[float, ...]
    alignment_errors: tuple[float, ...]
    products: int

    @property
    def alignment(self) -> float:
        """The share of the squared gradient in the span of the top eigenvectors (Gur-Ari, Roberts & Dyer 2018)."""
        return math.fsum(self.alignments)


def gradient_curvature(evaluation: Evaluation, spectrum: Spectrum | None = None) -> GradientCurvature:
    """Curvature along the gradient, the steps it allows, and how the gradient lies to the top eigenvectors.

    Args:
        evaluation: From `evaluate(closure, params)`.
        spectrum: From `extreme_eigenvalues(hessian(evaluation))`; None (default): no alignments.

    Returns:
        The measures, for one Hessian product. All are zero, and the steps infinite, where the gradient is zero.

    Raises:
        TypeError: `evaluation` is no `Evaluation`, or `spectrum` no `Spectrum`.
        ValueError: The spectrum's vectors are of another length than the gradient.
        RuntimeError: The evaluation was freed.
        FloatingPointError: The loss, the gradient or its product is not finite.
    """
    H, g = hessian(evaluation), evaluation.gradient
    if spectrum is not None:
        check_spectrum("spectrum", spectrum)
    top = spectrum.top if spectrum is not None else ()
    if any(entry.vector.shape != g.shape for entry in top):
        raise ValueError(
            f"spectrum must hold vectors of the gradient's shape, {tuple(g.shape)}, got "
            f"{tuple(top[0].vector.shape)}. Measure it with the same parameters."
        )
    stable = None
    if top:
        stable = _step(2.0, top[0].upper if math.isfinite(top[0].upper) else top[0].value)
    length = norm(g)
    if length == 0.0:
        nothing = (0.0,) * len(top)
        return GradientCurvature(0.0, 0.0, 0.0, math.inf, math.inf, stable, nothing, nothing, 0)
    matrix, direction = InRange(H), times_power(g, -scale_of(g))
    curved, square = matrix @ direction, dot(direction, direction)
    quotient = dot(direction, curved) / square
    room = lost(g.dtype, g.shape[0])
    curvature = matrix.back(quotient)
    residual = matrix.back(norm(curved - quotient * direction) / math.sqrt(square)) + room
    if not math.isfinite(residual):
        raise FloatingPointError(
            f"g'Hg/g'g is {curvature}, with |g| = {length}: loss and gradient must be finite at this point."
        )
    return GradientCurvature(
        curvature,
        residual,
        length,
        _step(1.0, curvature),
        _step(2.0, curvature),
        stable,
        tuple(dot(entry.vector, direction) ** 2 / square for entry in top),
        tuple(min(1.0, _alignment_error(top, index) + room / length) for index in range(len(top))),
        1,
    )


def _step(numerator: float, curvature: float) -> float:
    return numerator / curvature if curvature > 0.0 else math.inf


def _alignment_error(top: tuple[Eigenvalue, ...], index: int) -> float:
    """Sine of the largest angle between Ritz vector and eigenvector, which bounds the change of a squared cosine."""
    entry, gap = top[index], math.inf
    if index + 1 < len(top):
        gap = entry.value - top[index + 1].upper
    elif len(top) < entry.vector.shape[0]:
        return 1.0
    if index > 0:
        gap = min(gap, top[index - 1].lower - entry.value)
    rounding = _ROUNDING * torch.finfo(entry.vector.dtype).eps * abs(top[0].value)
    return min(1.0, (entry.residual + rounding) / gap) if gap > 0.0 else 1.0
