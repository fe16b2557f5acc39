"""How sharp the loss of other data is along a training step, against the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from newtonopt.checks import check_closure
from newtonopt.closure.evaluation import eps_of
from newtonopt.closure.objective import Objective
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, View
from newtonopt.curvature.measurements.preconditioned import Preconditioned
from newtonopt.curvature.showing import written
from newtonopt.curvature.stability import adapts, preconditioner
from newtonopt.vectors.scaling import dot

# Losses for one crossing at most, and as many of both losses as there must be time for.
_LOSSES, _LEAST = 20, 10
# Relative width of the bracket at which a crossing is found. A step that still falls is followed by one that is longer
# by this share first, then by 8 times as much each time.
_WIDTH, _GROWTH = 0.02, 8.0
# A change of the loss by fewer rounding units says nothing.
_ROUNDING = 64.0
# Between these ratios the two losses are called equally sharp.
_FLATTER, _SHARPER = 0.8, 1.25


@dataclass(frozen=True)
class CriticalRates:
    """Critical learning rates of two losses along one direction.

    Attributes:
        training: Learning rate from which on a step along the direction no longer lowers the training loss; infinite
            where no such one was found, NaN where rounding hides it.
        other: The same for the loss of the other data; zero where that rises from the start.
    """

    training: float
    other: float

    @property
    def relative(self) -> float:
        """The critical sharpness (two over the critical rate) of the other loss, over that of the training loss."""
        return self.training / self.other if self.other > 0.0 else math.inf


@dataclass(frozen=True)
class RelativeSharpness(Measurement[CriticalRates]):
    """The relative critical sharpness (Kalra et al. 2026, arXiv 2601.16979): how large a training step may be until it
    raises the loss of other data, against how large it may be until it raises the training loss.

    The step is along the negative gradient of the training loss, divided as Adam and its kin divide it where one of
    them trains; momentum and weight decay have no part in it. Each crossing is bracketed by 3 to 8 losses as a rule,
    and the other loss takes one gradient besides. A loss may have crossed before the crossing that is found.

    Args:
        closure: Computes the loss of the other data, as the training closure does its own: without an argument, with
            the same data each time. For `CurvatureMonitor` a method of the module, for example, that does not log.

    Raises:
        TypeError: `closure` cannot be called.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import RelativeSharpness, measure
        >>> w = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> other = RelativeSharpness(lambda: (w[0] - 0.5) ** 2 + (w[1] - 0.5) ** 2)
        >>> found = measure(lambda: w[0] ** 2 + w[1] ** 2, [w], measurements=[other])
        >>> round(found["curvature/relative_critical_sharpness"], 6), round(found["curvature/critical_rate"], 6)
        (2.0, 1.0)

    See Also:
        - `step_margin()`: the critical step of one loss.
        - `Sharpness`: the largest rise within a radius.
        - `docs/reference/mathematics.md`: critical sharpness.
    """

    closure: Callable[[], Any]

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag(
            "relative_critical_sharpness",
            "1",
            "how many times sooner a step along the training loss's gradient raises the loss of other data",
        ),
        Tag("critical_rate", "learning rate", "the learning rate from which on that step raises the training loss"),
        Tag(
            "other_critical_rate",
            "learning rate",
            "the learning rate from which on it raises the loss of the other data; 0: at once",
        ),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart("Relative critical sharpness of the other data's loss", ("relative_critical_sharpness",), more=True),
        Chart("Critical learning rates", ("(other_)?critical_rate",), more=True),
    )
    uses_matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_closure(self.closure)

    def measure(self, view: View) -> CriticalRates | None:
        """Return the two crossings; None where there is no time for them, no eigenvalue to start from, or no slope."""
        optimizers = view.training[:1]
        divided = bool(optimizers) and adapts(optimizers[0], view.params)
        found = view.of(Preconditioned) if divided else view.of(ExtremeEigenvalues)
        if found is None or view.affordable(_LEAST) < _LEAST:
            return None
        direction = -view.gradient
        if divided:
            direction = direction * preconditioner(optimizers[0], view.params)[0].square()
        slope, scale = dot(view.gradient, direction), abs(found.top[0].value)
        if slope == 0.0 or scale == 0.0:
            return None
        # A quadratic loss crosses no earlier than here.
        start = 2.0 / scale
        training = _crossing(view.objective, view.loss, slope, direction, start)
        other = Objective(self.closure, view.params, products=view.form)
        evaluation = other.evaluate()
        loss, steepness = float(evaluation.loss), dot(evaluation.gradient, direction)
        evaluation.free()
        rates = CriticalRates(
            training,
            _crossing(other, loss, steepness, direction, training if 0.0 < training < math.inf else start),
        )
        other.settle()
        other.check_restored()
        return rates

    def values(self, result: CriticalRates) -> dict[str, float]:
        """Return the ratio and the two rates."""
        return {
            "relative_critical_sharpness": result.relative,
            "critical_rate": result.training,
            "other_critical_rate": result.other,
        }

    def sentences(self, result: CriticalRates, measured: Measured) -> list[str]:
        """Return which of the two losses limits the learning rate."""
        training, other, relative = result.training, result.other, result.relative
        if math.isnan(training) or math.isnan(other):
            return []
        if other == 0.0:
            return [
                "A step along the training loss's gradient raises the loss of the other data at once: train on some "
                "of these data too, or stop."
            ]
        if math.isinf(training) or math.isinf(other):
            return []
        alone, beside = written(training, 3), written(other, 3)
        rises = f"a step raises it from a learning rate of {beside} on, the training loss from {alone} on"
        if relative > _SHARPER:
            return [
                f"The loss of the other data is {written(relative, 3)} times as sharp along a training step: {rises}. "
                "Keep the learning rate below the first of these, or train on some of these data too."
            ]
        if relative < _FLATTER:
            return [f"The loss of the other data is flatter along a training step than the training loss: {rises}."]
        return [f"The loss of the other data is as sharp along a training step as the training loss: {rises}."]


def _crossing(objective: Objective, base: float, slope: float, direction: Tensor, start: float) -> float:
    """Return the step along a direction at which an objective is back at its value.

    Args:
        objective: The objective.
        base: Its value at the point.
        slope: Its derivative along the direction.
        direction: The direction `(n,)`.
        start: The step to try first.

    Returns:
        The step; zero where the objective rises from the start, infinite where it is lower at all steps tried, NaN
        where the slope is not finite, or where rounding hides the change of the objective.
    """
    if not slope < 0.0:
        return math.nan if math.isnan(slope) else 0.0
    # The mean slope up to a step, (f(step) - f(0)) / step, is linear for a quadratic f: `slope` at zero, and zero at
    # the crossing.
    low, below = 0.0, slope
    high, above = math.inf, math.inf
    step, longer = start, _WIDTH
    for count in range(_LOSSES):
        mean = (objective.loss_at(step * direction) - base) / step
        if mean < 0.0:
            before, low, below = (low, below), step, mean
            if math.isinf(high):
                step = min(max(_zero(*before, low, below), (1.0 + longer) * low), 10.0 * low)
                longer *= _GROWTH
                continue
        else:  # also where the loss is not finite
            high, above = step, mean
        if high - low <= _WIDTH * high:
            break
        # By the line through both ends, kept inside; every third time by halves, where the line is far from straight.
        step = 0.5 * (low + high) if count % 3 == 2 or not math.isfinite(above) else _zero(low, below, high, above)
        step = min(max(step, low + 0.5 * _WIDTH * high), high - 0.5 * _WIDTH * high)
    if math.isinf(high):
        return math.inf
    crossing = _zero(low, below, high, above) if math.isfinite(above) else high
    noise = _ROUNDING * eps_of(objective.params) * abs(base)
    return math.nan if abs(slope) * crossing < noise else crossing


def _zero(first: float, at_first: float, second: float, at_second: float) -> float:
    """Return where the line through two values is zero; infinite where it falls or is level."""
    if at_second <= at_first:
        return math.inf
    return first - at_first * (second - first) / (at_second - at_first)
