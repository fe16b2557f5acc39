"""Trials of a proposal's steps: evaluations of the loss, until a step is taken or rejected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from newtonopt.closure.objective import Objective
from newtonopt.optimizers import rules
from newtonopt.optimizers.model import Proposal, QuadraticModel
from newtonopt.optimizers.report import StepReport
from newtonopt.optimizers.state import S

# Why backtracking and a Wolfe search reject a step.
TOO_HIGH = "no trial decreased the loss enough"
# How often a step is halved before it is shortened faster.
_HALVINGS = 10
# How often a step whose length is a guess is changed at most.
_MOST_CHANGES = 25


@dataclass(frozen=True, eq=False)
class Outcome:
    """The step to take or to reject, and why.

    Attributes:
        step: The step taken, or the last one tried.
        predicted: The undamped model's decrease at that step.
        loss: Loss after that step.
        ratio: The actual decrease at that step over the predicted one.
        first_ratio: The ratio of the proposed step, before it was shortened or doubled: it adapts the control.
        accepted: Whether the step is to be taken.
        trials: Number of evaluations of the loss.
        refusal: Why the step is rejected, in words.
        acceleration: Length of the step's second-order part over that of its first; zero (default) without one.
        ends: Whether no shorter step is worth a trial. Default False.
    """

    step: Tensor
    predicted: float
    loss: float
    ratio: float
    first_ratio: float
    accepted: bool
    trials: int
    refusal: str
    acceleration: float = 0.0
    ends: bool = False


def reported(report: StepReport, proposal: Proposal[Any], outcome: Outcome, trials: int) -> StepReport:
    """Return the report with the outcome of a proposal that took so many trials, those of longer ones included."""
    return replace(
        report,
        trial_loss=outcome.loss,
        predicted_decrease=outcome.predicted,
        ratio=outcome.ratio,
        first_ratio=outcome.first_ratio,
        iterations=proposal.iterations,
        products=proposal.products,
        rows=proposal.rows,
        solve=proposal.solve,
        acceleration=outcome.acceleration,
        trials=trials,
        step_norm=float(outcome.step.norm()) if outcome.accepted else 0.0,
        accepted=outcome.accepted,
        reason=proposal.reason if outcome.accepted else f"rejected, {outcome.refusal}; {proposal.reason}",
    )


def no_longer(proposal: Proposal[S], model: QuadraticModel, longest: float) -> Proposal[S]:
    """Return the proposal of a single step, shortened to at most `longest`."""
    step = proposal.steps[0]
    length = float(step.step.norm())
    if not length > longest:
        return proposal
    return replace(proposal, steps=[model.through(step).at(longest / length)])


def threshold(objective: Objective, model: QuadraticModel, proposal: Proposal[Any], least: float) -> Outcome:
    """Try the first step alone, and accept it if the ratio is at least `least`: the loss falls by that part of it."""
    step, predicted = proposal.steps[0].step, proposal.steps[0].decrease
    trial = objective.loss_at(step)
    ratio = rules.reduction_ratio(model.loss, trial, predicted, model.eps)
    fell = f"the loss fell by less than {least:g} of the predicted decrease"
    refusal = fell if trial < model.loss else "the loss did not fall"
    return Outcome(step, predicted, trial, ratio, ratio, ratio >= least, 1, refusal)


def backtracking(objective: Objective, model: QuadraticModel, proposal: Proposal[Any], max_changes: int = 6) -> Outcome:
    """Try the steps until one decreases the loss and the next is no better (Martens 2010, sec. 4.6); else shorten it.

    It is shortened, or doubled, `max_changes` times at most (25 times where its length is a guess): halved at first,
    then by interpolation, for a step may be too long by any factor where the curvature is nearly zero.

    The first ratio, which adapts the control, is that of the step before it was shortened: a good short step does not
    excuse a bad long one. A step along negative curvature must decrease the loss by a part of what its curvature
    promises too (McCormick 1977), and is doubled as often while that helps.
    """
    loss, eps, follows = model.loss, model.eps, proposal.follows_negative_curvature
    max_changes = max(max_changes, _MOST_CHANGES) if proposal.leaves else max_changes
    # The best of the steps proposed.
    chosen, best, trials = proposal.steps[0], math.inf, 0
    for candidate in proposal.steps:
        trial = objective.loss_at(candidate.step)
        trials += 1
        if trial < best:
            chosen, best = candidate, trial
        elif best < loss:
            break
    first_ratio = ratio = rules.reduction_ratio(loss, best, chosen.decrease, eps)
    line = model.through(chosen)

    def suffices(t: float, trial: float) -> bool:
        # Armijo's condition; of a bend only a negative one, which is followed, promises more than the slope.
        promise = t * min(line.slope, 0.0) + 0.5 * t * t * (min(line.bend, 0.0) if follows else 0.0)
        return rules.sufficient_decrease(loss, trial, promise, eps)

    t, changes = 1.0, 0
    while (line.slope < 0.0 or follows) and changes < max_changes and not suffices(t, best):
        t *= 0.5 if changes < _HALVINGS else rules.shortening(best - loss, t * line.slope)
        best, trials, changes = objective.loss_at(t * line.direction), trials + 1, changes + 1
    accepted = suffices(t, best)
    while follows and accepted and 1.0 <= t < 2.0**max_changes:
        further, trials = objective.loss_at(2 * t * line.direction), trials + 1
        if not (further < best and suffices(2 * t, further)):
            break
        t, best = 2 * t, further
    if t != 1.0:
        chosen = line.at(t)
        ratio = rules.reduction_ratio(loss, best, chosen.decrease, eps)
    return Outcome(chosen.step, chosen.decrease, best, ratio, first_ratio, accepted, trials, TOO_HIGH)


def strong_wolfe(objective: Objective, model: QuadraticModel, proposal: Proposal[Any], max_trials: int) -> Outcome:
    """Go along the first step, a descent direction, to a point that satisfies the strong Wolfe conditions."""
    line = model.through(proposal.steps[0])

    def along(t: float) -> tuple[float, float]:
        trial, there = objective.gradient_at(t * line.direction)
        return trial, float(there @ line.direction)

    found = rules.strong_wolfe(along, model.loss, line.slope, model.eps, max_trials)
    first_ratio = rules.reduction_ratio(model.loss, found.first, proposal.steps[0].decrease, model.eps)
    accepted = found.t > 0.0
    t, value = (found.t, found.value) if accepted else (found.last, found.last_value)
    end = line.at(t)
    ratio = rules.reduction_ratio(model.loss, value, end.decrease, model.eps)
    return Outcome(end.step, end.decrease, value, ratio, first_ratio, accepted, found.trials, TOO_HIGH)
