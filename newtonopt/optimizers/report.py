"""What an optimizer's last step did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """The record of one `step(closure)`.

    Attributes:
        loss: The objective at the start, weight decay included.
        trial_loss: The objective at the best trial; equal to `loss` if none was made.
        predicted_decrease: What the undamped quadratic model promised for that trial.
        ratio: Actual over predicted decrease; near one where the model is right.
        damping: Used in this step.
        iterations: Of the inner solver.
        products: Curvature products, those for the preconditioner included.
        trials: Evaluations of the loss at trial points, one forward pass each.
        gradient_norm: Euclidean, of the objective's gradient.
        step_norm: Euclidean length of the step taken; zero if it was rejected.
        accepted: Whether the parameters moved.
        reason: Why the inner solver stopped, or why there was no step, in words.
    """

    loss: float
    trial_loss: float
    predicted_decrease: float
    ratio: float
    damping: float
    iterations: int
    products: int
    trials: int
    gradient_norm: float
    step_norm: float
    accepted: bool
    reason: str
