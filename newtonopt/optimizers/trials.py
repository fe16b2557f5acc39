"""From a proposal to the step that is taken: trial evaluations of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from newtonopt.closure.objective import Objective
from newtonopt.optimizers import rules
from newtonopt.optimizers.rates import ray
from newtonopt.solvers.solution import Iterate

# Of a step, before it is shortened faster.
_HALVINGS = 10
# Of a step whose length is a guess.
_MOST_CHANGES = 25


@dataclass(frozen=True)
class Proposal:
    """Steps to try, best first, with what the undamped model promises for each.

    Attributes:
        steps: Each `(n,)`, learning rates applied; none where no step is to be taken.
        decreases: The undamped model's decrease for each step.
        iterations: Of the inner solver.
        products: Curvature products spent.
        reason: Why the inner solver stopped.
        length: Of the first step before learning rates were applied.
        follows_negative_curvature: Whether the first step does, so that it may be worth going further.
        leaves: Whether it leaves a point where the gradient says nothing, by a length that is a guess: more trials.
        shrink: From a tighter control to a shorter proposal, whose iterations and products count those before; None if
            there is none.
    """

    steps: Sequence[Tensor]
    decreases: Sequence[float]
    iterations: int
    products: int
    reason: str
    length: float = 0.0
    follows_negative_curvature: bool = False
    leaves: bool = False
    shrink: Callable[[float], Proposal] | None = None


@dataclass(frozen=True)
class Outcome:
    """The step to take or to reject, and why.

    Attributes:
        step: The step taken, or the last one tried.
        predicted: The undamped model's decrease at that step.
        loss: The loss there.
        ratio: The actual decrease at that step over the predicted one.
        first_ratio: The ratio of the proposed step, before it was shortened or doubled: it adapts the control.
        accepted: Whether the step is to be taken.
        trials: Evaluations of the loss.
        refusal: Why the step is rejected, in words.
    """

    step: Tensor
    predicted: float
    loss: float
    ratio: float
    first_ratio: float
    accepted: bool
    trials: int
    refusal: str = "no trial decreased the loss"


def curvature_along(proposal: Proposal, gradient: Tensor) -> float:
    """Return `|s'As| / |s|^2` for the first step, from its slope and decrease."""
    step, square = proposal.steps[0], float(proposal.steps[0] @ proposal.steps[0])
    bend = 2 * abs(proposal.decreases[0] + float(gradient @ step))
    return bend / square if square > 0.0 and math.isfinite(bend) else 0.0


def shortened(proposal: Proposal, gradient: Tensor, longest: float) -> Proposal:
    """The proposal of one step, with that at most so long."""
    length = float(proposal.steps[0].norm())
    if not length > longest:
        return proposal
    step = ray(Iterate(proposal.steps[0], proposal.decreases[0]), gradient, longest / length)
    return replace(proposal, steps=[step.step], decreases=[step.decrease])


def search(
    objective: Objective,
    gradient: Tensor,
    proposal: Proposal,
    loss: float,
    eps: float,
    max_changes: int = 6,
) -> Outcome:
    """Try the steps until one decreases the loss and the next is no better (Martens 2010, sec. 4.6); else shorten it.

    It is shortened, or doubled, `max_changes` times at most (25 times where its length is a guess): halved at first,
    then by interpolation, for a step may be too long by any factor where the curvature is nearly zero.

    The first ratio, which adapts the control, is that of the step before it was shortened: a good short step does not
    excuse a bad long one. A step along negative curvature must decrease the loss by a part of what its curvature
    promises too (McCormick 1977), and is doubled as often while that helps.
    """
    step, predicted, best = proposal.steps[0], proposal.decreases[0], math.inf
    trials = 0
    max_changes = max(max_changes, _MOST_CHANGES) if proposal.leaves else max_changes
    for candidate, decrease in zip(proposal.steps, proposal.decreases, strict=True):
        trial = objective.loss_at(candidate)
        trials += 1
        if trial < best:
            step, predicted, best = candidate, decrease, trial
        elif best < loss:
            break
    first_ratio = ratio = rules.reduction_ratio(loss, best, predicted, eps)
    slope = float(gradient @ step)
    bend = -2 * (predicted + slope)  # s'As, from the model's value at the whole step
    follows = proposal.follows_negative_curvature

    def suffices(t: float, trial: float) -> bool:
        promise = t * min(slope, 0.0) + 0.5 * t * t * (min(bend, 0.0) if follows else 0.0)
        return rules.sufficient_decrease(loss, trial, promise, eps)

    t, changes = 1.0, 0
    while (slope < 0.0 or follows) and changes < max_changes and not suffices(t, best):
        t *= 0.5 if changes < _HALVINGS else rules.shortening(best - loss, t * slope)
        best, trials, changes = objective.loss_at(t * step), trials + 1, changes + 1
    accepted = suffices(t, best)
    while follows and accepted and 1.0 <= t < 2.0**max_changes:
        further, trials = objective.loss_at(2 * t * step), trials + 1
        if not (further < best and suffices(2 * t, further)):
            break
        t, best = 2 * t, further
    if t != 1.0:
        step, predicted = t * step, -(t * slope + 0.5 * t * t * bend)
        ratio = rules.reduction_ratio(loss, best, predicted, eps)
    return Outcome(step, predicted, best, ratio, first_ratio, accepted, trials)


def wolfe_search(
    objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float, max_trials: int
) -> Outcome:
    """Go along the first step, a descent direction, to a point that satisfies the strong Wolfe conditions."""
    step, predicted = proposal.steps[0], proposal.decreases[0]
    slope = float(gradient @ step)

    def along(t: float) -> tuple[float, float]:
        trial, there = objective.gradient_at(t * step)
        return trial, float(there @ step)

    found = rules.strong_wolfe(along, loss, slope, eps, max_trials)
    first_ratio = rules.reduction_ratio(loss, found.first, predicted, eps)
    bend = -2 * (predicted + slope)
    accepted = found.t > 0.0
    t, value = (found.t, found.value) if accepted else (found.last, found.last_value)
    predicted = -(t * slope + 0.5 * t * t * bend)
    ratio = rules.reduction_ratio(loss, value, predicted, eps)
    return Outcome(step if t == 1.0 else t * step, predicted, value, ratio, first_ratio, accepted, found.trials)
