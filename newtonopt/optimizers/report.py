"""The report of an optimizer's last step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepReport:
    """The record of one Newton step: the last one of a `step(closure)`.

    Attributes:
        loss: Objective at the step's start, weight decay included.
        gradient_norm: Euclidean norm of the objective's gradient.
        reason: Why the inner solver stopped, or why there was no step, in words.
        trial_loss: Objective at the step taken, or at the last one tried; equal to `loss` if none was tried.
        damping: Damping used in this step; None (default) for an optimizer without.
        radius: Radius of the trust region used in this step; None (default) for an optimizer without.
        sigma: Weight of the cubic term used in this step; None (default) for an optimizer without.
        predicted_decrease: Decrease that the undamped quadratic model predicts for that step.
        ratio: Actual over predicted decrease of that step; near one where the model is right.
        first_ratio: Ratio of the step as it was proposed, before a line search shortened or doubled it. This ratio
            adapts the damping, radius or sigma; minus infinity where a loss was not finite.
        iterations: Iterations of the inner solver, over all steps of the call.
        products: Curvature products of the call, those for the preconditioner included.
        checks: Products and gradients of the call by which these products were checked: none after the first step.
        form: How products were formed: "cached", "streamed" or "finite_difference".
        rows: Rows of the matrix that the step was solved with; zero (default) for an optimizer without.
        solve: The equations that were solved, "samples" or "parameters"; an empty string for an
            optimizer without.
        acceleration: Length of the step's second-order part over that of its first; zero (default) without one.
        trials: Evaluations of the loss at trial points in the call, one forward pass each.
        step_norm: Euclidean length of the step taken; zero if it was rejected.
        accepted: Whether the parameters moved in this step.
        steps: Newton steps of the call: one (default), or more with `steps_per_call`.

    Example:
        >>> import torch
        >>> from newtonopt import NewtonCG
        >>> p = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = NewtonCG([p])
        >>> loss = optimizer.step(lambda: (p**2).sum())
        >>> report = optimizer.last_step
        >>> report.loss, report.trial_loss, report.accepted, report.reason
        (13.0, 0.0, True, 'residual tolerance reached')

    See Also:
        - `StepMonitor`: a Lightning callback that logs these reports.
        - `step_margin()`: how near a step of any optimizer came to raising the loss.
        - `docs/optimizers/index.md`: what the optimizers share, and how to read a report.
    """

    loss: float
    gradient_norm: float
    reason: str
    trial_loss: float
    damping: float | None = None
    radius: float | None = None
    sigma: float | None = None
    predicted_decrease: float = 0.0
    ratio: float = math.nan
    first_ratio: float = math.nan
    iterations: int = 0
    products: int = 0
    checks: int = 0
    form: str = "cached"
    rows: int = 0
    solve: str = ""
    acceleration: float = 0.0
    trials: int = 0
    step_norm: float = 0.0
    accepted: bool = False
    steps: int = 1

    def by_tag(self) -> dict[str, float]:
        """Return the values that `StepMonitor` logs, such as `newton/damping`; written as scalars they show in the
        Curvature tab.
        """
        values = {
            "damping": self.damping,
            "radius": self.radius,
            "sigma": self.sigma,
            "ratio": self.ratio,
            "first_ratio": self.first_ratio,
            "iterations": float(self.iterations),
            "products": float(self.products),
            "accepted": float(self.accepted),
            "gradient_norm": self.gradient_norm,
            "step_norm": self.step_norm,
        }
        # A step that was not tried has no ratio, and a chart has no place for an infinite one.
        return {f"newton/{name}": v for name, v in values.items() if v is not None and math.isfinite(v)}


def following(earlier: StepReport, last: StepReport) -> StepReport:
    """Return the report of a call's last step, with the counts of the steps before it added."""
    return replace(
        last,
        iterations=earlier.iterations + last.iterations,
        products=earlier.products + last.products,
        checks=earlier.checks + last.checks,
        trials=earlier.trials + last.trials,
        steps=earlier.steps + last.steps,
    )
