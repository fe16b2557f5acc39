"""How much the loss rises near the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from newtonopt.checks import check_choice, check_flag, check_positive
from newtonopt.curvature.ascent import Kind, SharpnessEstimate, ascent, average, ball_around
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, View
from newtonopt.curvature.showing import written

# Gradients for the search of the sharpest point: so many at most, and no search where there is time for fewer than the
# second. Losses for the average sharpness.
_GRADIENTS, _LEAST_GRADIENTS, _SAMPLES = 20, 8, 64


@dataclass(frozen=True)
class Sharpness(Measurement[SharpnessEstimate]):
    """How much the loss rises within a radius.

    The largest rise is sought by one ascent, from where gradient and top eigenvalues say that the loss rises most, or
    from the last measurement's point where the loss is higher. On four networks for digits that stays below a whole
    `newtonopt.curvature.sharpness` by 0.7 % at most at radius 0.05, for a tenth of the work (by a fifth at radius 0.5);
    without the mirror image along the top eigenvector it would be by a fifth at 0.05.

    Args:
        kind: "ball" (default): the worst loss increase at Euclidean distance up to `radius`; "adaptive_ball": the same
            with each step relative to its parameter's size (Kwon et al. 2021); "average": the mean increase at that
            distance.
        radius: Radius, above zero. Default 0.05 (Foret et al. 2021).
        always: Whether to measure it where eigenvalues are tracked too. Default False: it costs as much as the
            tracking, 4 to 6 training steps, and moves as slowly as the eigenvalues, so it is left to the measurements
            that start at random.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Sharpness, measure
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], sharpness=Sharpness(radius=0.1))
        >>> round(found["curvature/sharpness"], 6)
        0.03

    See Also:
        - `sharpness()`: a whole search, for one point.
        - `RelativeSharpness`: how long a step may be until it raises another loss.
        - `docs/read_your_curvature.md`: what sharpness says about a run, and what it does not.
    """

    kind: Kind = "ball"
    radius: float = 0.05
    always: bool = False

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag(
            "sharpness",
            "L",
            'the largest rise of the loss found within the radius, a lower bound on the true one; with "average", the '
            "mean rise at the radius",
        ),
        Tag("sharpness_error", "L", "the standard error of that mean"),
    )
    charts: ClassVar[tuple[Chart, ...]] = (Chart("Sharpness", ("sharpness",)),)
    uses_matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_positive("radius", self.radius)
        check_flag("always", self.always)

    def measure(self, view: View) -> SharpnessEstimate | None:
        """Return the largest rise found, or the mean rise; None where eigenvalues are tracked, unless `always`."""
        spectrum = view.of(ExtremeEigenvalues)
        # A measurement after another is certified too where the eigenvalues could not be tracked, as equal ones.
        if not self.always and view.last is not None and not (spectrum is not None and spectrum.certified):
            return None
        budget = view.affordable(_GRADIENTS)
        if budget < _LEAST_GRADIENTS:
            return None
        ball = ball_around(view.objective, self.kind, self.radius, view.plan.tolerance, view.loss)
        if self.kind == "average":
            return average(ball, _SAMPLES, view.plan.seed)
        last = view.before(Sharpness)
        places = ball.summits(ball.scale * view.gradient, spectrum.top if spectrum is not None else ())
        if last is not None and last.step is not None:
            places += ball.towards(last.step)
        # Without a place to start the gradient is zero, and there was no time for eigenvalues.
        return ascent(ball, self.kind, places, budget, ascents=1) if places else None

    def values(self, result: SharpnessEstimate) -> dict[str, float]:
        """Return the rise, and its standard error where it is a mean."""
        error = {"sharpness_error": result.standard_error} if result.kind == "average" else {}
        return {"sharpness": result.value, **error}

    def sentences(self, result: SharpnessEstimate, measured: Measured) -> list[str]:
        """Return the rise in words."""
        if not math.isfinite(result.value):
            return []
        value, radius = result.value, f"{result.radius:g}"
        if result.kind == "average":
            known = f", with a standard error of {written(result.standard_error, 2)}"
            return [f"Sharpness: at distance {radius} the loss rises by {written(value, 3)} on average{known}."]
        where = f"distance {radius}" if result.kind == "ball" else f"{radius}, relative to each parameter's size,"
        return [f"Sharpness: within {where} the loss rises by at least {written(value, 3)}, the largest rise found."]
