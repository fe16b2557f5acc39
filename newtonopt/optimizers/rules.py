"""Pure rules that keep a Newton step safe: ratios, controls, line searches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def reduction_ratio(loss: float, trial_loss: float, predicted: float, eps: float) -> float:
    """Return the actual decrease over the predicted one, insensitive to rounding.

    Near a minimum both decreases drown in the rounding of the loss; both get `10 eps |loss|` added, so that their ratio
    tends to one there (Conn, Gould & Toint 2000, sec. 17.4.2). A loss that is the same to the last bit, where little
    more than that was promised, says nothing against the model: the step was lost in the rounding of the parameters.

    Args:
        loss: Loss at the start of the step.
        trial_loss: Loss at its end; any non-finite value counts as infinitely bad.
        predicted: The model's decrease, positive.
        eps: Rounding unit of the dtype in which the loss was computed.

    Returns:
        The ratio; minus infinity for a non-finite trial loss.
    """
    if not math.isfinite(trial_loss):
        return -math.inf
    rounding = 10 * eps * abs(loss)
    if trial_loss == loss and abs(predicted) <= 10 * rounding:
        return 1.0
    if predicted + rounding <= 0:
        return -math.inf if trial_loss > loss else 1.0
    return (loss - trial_loss + rounding) / (predicted + rounding)


def sufficient_decrease(loss: float, trial_loss: float, slope: float, eps: float) -> bool:
    """Return whether `trial <= loss + 1e-4 slope` but for rounding: Armijo's condition (Nocedal & Wright, sec. 3.1)."""
    return math.isfinite(trial_loss) and trial_loss <= loss + 1e-4 * slope + 10 * eps * abs(loss)


def shortening(rise: float, slope: float) -> float:
    """Return the factor by which to shorten a step, between 1/10 and 1/2.

    It leads to the minimiser of the parabola through value and slope at the step's start and the value at its end
    (Dennis & Schnabel 1983, alg. A6.3.1; Nocedal & Wright 2006, sec. 3.5).

    Args:
        rise: Loss at the end minus loss at the start; a value that is not finite counts as infinite.
        slope: Slope along the whole step, at its start.
    """
    above = rise - slope
    if not math.isfinite(above):
        return 0.1
    return min(max(-0.5 * slope / above, 0.1), 0.5) if above > 0.0 else 0.5


LOW_RATIO = 0.25
"""Below it a model is trusted less from then on (Martens 2010, sec. 4.1; Nocedal & Wright 2006, alg. 4.1)."""


def levenberg_marquardt(damping: float, ratio: float, *, factor: float, minimum: float, maximum: float) -> float:
    """Return the next damping: times `factor` below a ratio of 1/4, divided by it above 3/4.

    Martens (2010, sec. 4.1) has the factor 3/2.
    """
    if ratio < LOW_RATIO:
        damping *= factor
    elif ratio > 0.75:
        damping /= factor
    return min(max(damping, minimum), maximum)


def damping_rule(settings: dict[str, Any], damping: float, ratio: float) -> float:
    """Return the next damping by the Levenberg-Marquardt rule of these settings."""
    return levenberg_marquardt(
        damping,
        ratio,
        factor=settings["damping_factor"],
        minimum=settings["min_damping"],
        maximum=settings["max_damping"],
    )


def run_of(run: int, ratio: float) -> int:
    """Count ratios in a row within a tenth of one."""
    return run + 1 if abs(ratio - 1) <= 0.1 else 0


def hastened(control: float, usual: float, run: int, matters: float, eps: float) -> float:
    """Return the next damping or weight, lowered faster where the present one is of another scale than the problem.

    A first control may be any number of orders above what the loss asks for, and the usual factor takes as many steps.
    From the third ratio near one in a row on the factor is squared each time, until the control is of the curvature's
    size. The control is not lowered below the rounding of the curvature, where it has no effect.

    Args:
        control: The present control.
        usual: The next control by the usual rule.
        run: Number of ratios in a row that were near one.
        matters: The control whose effect on the step is as large as the curvature's.
        eps: Rounding unit of the gradient's dtype.
    """
    if usual >= control:
        return usual
    fast: float = control * (usual / control) ** min(2 ** max(run - 2, 0), 64)
    return max(fast, min(usual, matters), min(control, eps * matters))


def trust_radius(radius: float, ratio: float, length: float, *, minimum: float, maximum: float) -> float:
    """Return the next radius (Nocedal & Wright 2006, alg. 4.1).

    A quarter of the step's length below a ratio of 1/4; twice the radius above 3/4 if the step went to the boundary. A
    length of zero says that no step was tried.
    """
    if ratio < LOW_RATIO:
        radius = 0.25 * (min(length, radius) or radius)
    elif ratio > 0.75 and length > 0.999 * radius:
        radius *= 2
    return min(max(radius, minimum), maximum)


def cubic_weight(sigma: float, ratio: float, *, minimum: float, maximum: float) -> float:
    """Return the next weight of the cubic term: raised below a ratio of 0.1, halved above 0.9 (Cartis et al. 2011).

    It is raised to what the trial asks for, in the manner of Gould, Porcelli & Toint 2012. The loss lay
    `(1 - ratio) predicted` above the quadratic model, and a cubic model's minimiser has `predicted >= sigma |s|^3 / 2`:
    a term `|s|^3 / 3` that makes up the difference has a weight of `1.5 (1 - ratio) sigma` or more. At least twice,
    at most a hundred times the weight; ten times where the loss was not finite.
    """
    if ratio < 0.1:
        sigma *= min(max(2.0, 1.5 * (1 - ratio)), 100.0) if math.isfinite(ratio) else 10.0
    elif ratio > 0.9:
        sigma /= 2
    return min(max(sigma, minimum), maximum)


@dataclass(frozen=True)
class LinePoint:
    """The end of a line search.

    Attributes:
        t: The point found; zero if there is none.
        value: Loss there.
        first: Loss at `t = 1`.
        trials: Number of evaluations.
        last: The last `t` tried.
        last_value: Loss there.
    """

    t: float
    value: float
    first: float
    trials: int
    last: float
    last_value: float


def strong_wolfe(
    along: Callable[[float], tuple[float, float]], loss: float, slope: float, eps: float, max_trials: int
) -> LinePoint:
    """Find `t` with `f(t) <= f(0) + 1e-4 t f'(0)` and `|f'(t)| <= 0.9 |f'(0)|` (Nocedal & Wright 2006, alg. 3.5, 3.6).

    Args:
        along: `f(t)` and `f'(t)`; `t = 1` is tried first.
        loss: `f(0)`.
        slope: `f'(0)`, below zero.
        eps: Rounding unit of the dtype in which the loss was computed: changes of `10 eps |loss|` are rounding.
        max_trials: Evaluations at most.

    Returns:
        The point, or after `max_trials` the best one that satisfies the first condition.
    """
    low: tuple[float, float, float] = (0.0, loss, slope)  # the best point yet: t, f, f'
    high: tuple[float, float, float] | None = None  # a minimum lies between the two
    t, first = 1.0, math.inf
    for trial in range(1, max_trials + 1):
        value, slope_there = along(t)
        first = value if trial == 1 else first
        here = (t, value, slope_there)
        if not sufficient_decrease(loss, value, t * slope, eps) or value > low[1] + 10 * eps * abs(loss):
            high = here
        elif abs(slope_there) <= 0.9 * abs(slope):
            return LinePoint(t, value, first, trial, t, value)
        else:
            if slope_there * ((math.inf if high is None else high[0]) - low[0]) >= 0:
                high = low
            low = here
        t = 2 * t if high is None else _between(low, high)
    return LinePoint(low[0], low[1], first, max_trials, here[0], here[1])


def _between(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Return the minimiser of the cubic through values and slopes (Nocedal & Wright, eq. 3.59), inside the interval."""
    (a, f_a, slope_a), (b, f_b, slope_b) = one, other
    d1 = slope_a + slope_b - 3 * (f_a - f_b) / (a - b)
    square = d1 * d1 - slope_a * slope_b  # not d1**2, which raises where it overflows
    d2 = math.copysign(math.sqrt(square), b - a) if square >= 0 else math.nan
    divisor = slope_b - slope_a + 2 * d2
    part = (slope_b + d2 - d1) / divisor if divisor else math.nan
    if not math.isfinite(part):
        # The middle where the cubic has no minimum, close to the first where the loss overflowed.
        part = 0.5 if math.isfinite(square) else 0.9
    return b - min(max(part, 0.1), 0.9) * (b - a)
