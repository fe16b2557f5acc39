"""What keeps a Newton step safe: pure rules from the outcome of a trial to the next trial."""

from __future__ import annotations

import math


def undamped_decrease(decrease: float, damping: float, step_norm: float) -> float:
    """The undamped model's decrease from the damped one's, `decrease + damping |s|^2 / 2`: the one place for it."""
    return decrease + 0.5 * damping * step_norm**2


def reduction_ratio(loss: float, trial_loss: float, predicted: float, eps: float) -> float:
    """The actual decrease over the predicted one, insensitive to rounding.

    Near a minimum both decreases drown in the rounding of the loss; both get `10 eps |loss|` added, so that their ratio
    tends to one there (Conn, Gould & Toint 2000, sec. 17.4.2).

    Args:
        loss: At the start of the step.
        trial_loss: At its end; any non-finite value counts as infinitely bad.
        predicted: The model's decrease, positive.
        eps: Of the dtype in which the loss was computed.

    Returns:
        The ratio; minus infinity for a non-finite trial loss.
    """
    if not math.isfinite(trial_loss):
        return -math.inf
    rounding = 10 * eps * abs(loss)
    if predicted + rounding <= 0:
        return -math.inf if trial_loss > loss else 1.0
    return (loss - trial_loss + rounding) / (predicted + rounding)


def sufficient_decrease(loss: float, trial_loss: float, slope: float, eps: float) -> bool:
    """Armijo's condition `trial <= loss + 1e-4 slope` (Nocedal & Wright 2006, sec. 3.1), insensitive to rounding."""
    return math.isfinite(trial_loss) and trial_loss <= loss + 1e-4 * slope + 10 * eps * abs(loss)


def levenberg_marquardt(damping: float, ratio: float, *, factor: float, minimum: float, maximum: float) -> float:
    """The next damping: times `factor` below a ratio of 1/4, divided by it above 3/4 (Martens 2010, sec. 4.1: 3/2)."""
    if ratio < 0.25:
        damping *= factor
    elif ratio > 0.75:
        damping /= factor
    return min(max(damping, minimum), maximum)
