"""Slope and curvature along the gradient, and how the gradient lies to the top eigenvectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from newtonopt.closure.evaluation import Evaluation
from newtonopt.curvature.eigenvalues.bounds import GUARD
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, check_spectrum
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.operators.matrices import hessian
from newtonopt.vectors.scaling import InRange, dot, lost, norm, scale_of, times_power


@dataclass(frozen=True, repr=False)
class GradientCurvature:
    """Slope and curvature along the gradient g, with the Hessian H.

    Attributes:
        curvature: Rayleigh quotient `g'Hg / g'g`, exact up to rounding.
        residual: `|H g - curvature g| / |g|`: an eigenvalue of H lies within it of `curvature`.
        gradient_norm: `|g|`.
        cauchy_step: Learning rate `1 / curvature`, which minimises the quadratic model along -g (the Cauchy point);
            infinite if the curvature is not positive.
        longest_step: Learning rate `2 / curvature`, up to which the quadratic model does not rise; infinite if the
            curvature is not positive.
        stable_step: Learning rate `2 / lambda_max` below which gradient descent is stable in all directions, with the
            upper bound on lambda_max (its value, if the spectrum is not certified); infinite if that is not positive,
            None without a spectrum.
        alignments: Squared cosines between g and each of the spectrum's top eigenvectors.
        alignment_errors: Bounds on the error of each alignment, at most one: the eigenvector's residual over the
            distance to the other eigenvalues (Davis & Kahan 1970). One, nothing certain, if intervals overlap, and for
            the last eigenvector, whose distance to the next eigenvalue is not known.
        products: Number of Hessian products that were used.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> from newtonopt.curvature import gradient_curvature
        >>> theta = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        >>> found = gradient_curvature(evaluate(lambda: 2.0 * (theta**2).sum(), [theta]))
        >>> round(found.curvature, 6), round(found.cauchy_step, 6), round(found.longest_step, 6)
        (4.0, 0.25, 0.5)

    See Also:
        - `gradient_curvature()`: computes it.
        - `stability_threshold()`: the largest stable eigenvalue of any optimizer.
        - `docs/read_your_curvature.md`: what the curvature along the gradient says about a run.
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

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)

    @property
    def alignment(self) -> float:
        """Share of the squared gradient in the span of the top eigenvectors (Gur-Ari, Roberts & Dyer 2018)."""
        return math.fsum(self.alignments)


def gradient_curvature(evaluation: Evaluation, spectrum: Spectrum | None = None) -> GradientCurvature:
    """Compute the curvature along the gradient, the steps it allows, and the gradient's part along top eigenvectors.

    Args:
        evaluation: Return value of `evaluate(closure, params)`.
        spectrum: Return value of `extreme_eigenvalues(hessian(evaluation))`; None (default): no alignments.

    Returns:
        The measures, for one Hessian product. If the gradient is zero, all are zero and the steps infinite.

    Raises:
        TypeError: `evaluation` is no `Evaluation`, or `spectrum` no `Spectrum`.
        ValueError: The spectrum's vectors and the gradient differ in length.
        RuntimeError: The evaluation was freed.
        FloatingPointError: The loss, the gradient or its product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> from newtonopt.curvature import extreme_eigenvalues, gradient_curvature
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> scales = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> evaluation = evaluate(lambda: 0.5 * (scales * theta**2).sum(), [theta])
        >>> found = gradient_curvature(evaluation, extreme_eigenvalues(hessian(evaluation), top=1))
        >>> [round(share, 4) for share in found.alignments]  # the gradient is (3, 2): 9 / 13
        [0.6923]

    See Also:
        - `GradientCurvature`: the result.
        - `AlongGradient`: the same in a training run.
        - `step_margin()`: the curvature along an optimizer's own step, without a product.
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
    # Scaled by powers of two, so that squares neither underflow nor overflow.
    matrix, direction = InRange(H), times_power(g, -scale_of(g))
    curved, square = matrix @ direction, dot(direction, direction)
    quotient = dot(direction, curved) / square
    room = lost(g.dtype, g.shape[0])
    curvature = matrix.back(quotient)
    residual = matrix.back(norm(curved - quotient * direction) / math.sqrt(square)) + room
    if not math.isfinite(residual):
        raise FloatingPointError(
            f"The curvature along the gradient is {curvature}, and the gradient's norm {length}. Check that loss and "
            "gradient are finite at this point."
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
    """Return the sine of the largest angle between Ritz vector and eigenvector, which bounds a squared cosine's error.

    By Davis & Kahan's sin-theta theorem it is at most the residual over the gap to the other eigenvalues.
    """
    entry, gap = top[index], math.inf
    if index + 1 < len(top):
        gap = entry.value - top[index + 1].upper
    elif len(top) < entry.vector.shape[0]:
        return 1.0
    if index > 0:
        gap = min(gap, top[index - 1].lower - entry.value)
    rounding = GUARD * torch.finfo(entry.vector.dtype).eps * abs(top[0].value)
    return min(1.0, (entry.residual + rounding) / gap) if gap > 0.0 else 1.0
