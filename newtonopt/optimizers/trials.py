"""From a proposal to the step that is taken: trial evaluations of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from newtonopt import globalization
from newtonopt.objective import Objective

# A step that does not decrease the loss is halved, at most six times.
_SHORTEN = 0.5
_SHORTEST = 0.5**6


@dataclass(frozen=True)
class Proposal:
    """Steps to try, best first, with what the undamped model promises for each.

    Attributes:
        steps: At least one, each `(n,)`, learning rates applied.
        decreases: The undamped model's decrease for each step.
        iterations: Of the inner solver.
        products: Curvature products spent.
        reason: Why the inner solver stopped.
    """

    steps: Sequence[Tensor]
    decreases: Sequence[float]
    iterations: int
    products: int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The step to take or to reject: its model decrease, its loss, and the ratio that adapts the damping."""

    step: Tensor
    predicted: float
    loss: float
    ratio: float
    accepted: bool
    trials: int


def search(objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
    """Try the steps until one decreases the loss and the next is no better (Martens 2010, sec. 4.6); else shorten it.

    The ratio, which adapts the damping, is that of the step before it was shortened: a good short step does not excuse
    a bad long one.
    """
    step, predicted, best = proposal.steps[0], proposal.decreases[0], math.inf
    trials = 0
    for candidate, decrease in zip(proposal.steps, proposal.decreases, strict=True):
        trial = objective.loss_at(candidate)
        trials += 1
        if trial < best:
            step, predicted, best = candidate, decrease, trial
        elif best < loss:
            break
    ratio = globalization.reduction_ratio(loss, best, predicted, eps)
    slope = float(gradient @ step)
    t = 1.0
    while slope < 0.0 and t > _SHORTEST and not globalization.sufficient_decrease(loss, best, t * slope, eps):
        t *= _SHORTEN
        best, trials = objective.loss_at(t * step), trials + 1
    accepted = globalization.sufficient_decrease(loss, best, t * min(slope, 0.0), eps)
    if t < 1.0:
        bend = -2 * (predicted + slope)  # s'As, from the model's value at the whole step
        step, predicted = t * step, -(t * slope + 0.5 * t**2 * bend)
    return Outcome(step, predicted, best, ratio, accepted, trials)
