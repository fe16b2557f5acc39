"""Hessian-free optimization: Martens 2010; Martens & Sutskever 2012."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_above_one, check_below_one, check_whole, explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.optimizers.model import Proposal, QuadraticModel, Shorter, with_more_damping, without_damping
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.preconditioning import (
    Precondition,
    PreconditionedState,
    check_preconditioner,
    check_sketch,
    prepared,
)
from newtonopt.optimizers.rules import LOW_RATIO, damping_rule
from newtonopt.optimizers.settings import ELSEWHERE
from newtonopt.optimizers.state import tensor
from newtonopt.optimizers.trials import Outcome
from newtonopt.solvers.cg import conjugate_gradients
from newtonopt.solvers.solution import Iterate, Solution

# The first damping is a guess. Until a first ratio reaches LOW_RATIO, `_try` rejects every step and `_next_control`
# raises the damping by this factor; `confirmed` in the state ends the search.
_FIRST_FACTOR = 10.0


@dataclass(frozen=True, eq=False)
class HessianFreeState(PreconditionedState):
    """The state with the last solution, and whether the first damping, which is a guess, was confirmed by a step."""

    solution: Tensor | None = field(default=None, metadata=tensor("n"))
    confirmed: bool = False


class HessianFree(NewtonOptimizer[HessianFreeState]):
    """Truncated Gauss-Newton steps by preconditioned conjugate gradients, with Levenberg-Marquardt damping.

    Each step minimises `g's + s'(A + damping I)s / 2` approximately, tries the result and earlier iterates of conjugate
    gradients, shortens the step until it decreases the loss, and adapts the damping to how well the model predicted the
    decrease.

    Use it with the whole data set or large batches, where the loss is ill-conditioned: physics-informed networks,
    regression, autoencoders. With up to a few thousand residuals `LevenbergMarquardt` goes further. Do not use it with
    small batches or a loss dominated by noise: a step costs tens of gradients, and first-order methods need only one.

    It differs from Martens (2010) in this: conjugate gradients are preconditioned by a low-rank sketch of the
    curvature; the first damping is searched for; the damping falls faster after three
    steps in a row that the model predicted well; with the Hessian a step along negative curvature is tried.

    The loss times `c` gives the same steps with `c` times the `damping` and `weight_decay`, except with
    `preconditioner="empirical_fisher"`, which grows by another power of `c`.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the whole step.
        curvature: "gauss_newton" (default; Martens 2010, sec. 4.2): positive semi-definite, needs a recognised loss or
            `mark_outputs`; "hessian": exact, follows negative curvature where conjugate gradients meet it.
        damping: The first damping, above zero. Default 1 (Martens & Sutskever 2012). Until a ratio
            first reaches 1/4, steps are rejected and the damping is multiplied by ten: too long a first step ends on a
            plateau (benchmarks/NOTES.md).
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        preconditioner: "nystrom" (default): a low-rank sketch of the curvature (Frangella, Tropp & Udell 2023);
            "empirical_fisher": the running mean of squared gradients (Martens 2010, sec. 4.7); None.
        rank: Columns of the sketch, one or more; it takes `rank * n` numbers of memory, and twice as many more while it
            is renewed. Default 50, see benchmarks/NOTES.md.
        refresh_every: Iterations of conjugate gradients after which the next step renews the sketch, one or more.
            Default 200, four times the rank: sketching adds at most 25 % to the products, 50 % with the Hessian
            (benchmarks/NOTES.md).
        max_trials: Number of times a step is tried: after each rejection conjugate gradients go on, with the raised
            damping, from the best of their iterates. One or more. Default 1: a rejection ends the step. With
            more than one the graph is kept during the trials, so that peak memory grows by one forward pass.
        max_iterations: Iterations of conjugate gradients in a step at most, one or more. Default 1000, see
            benchmarks/NOTES.md.
        progress_tolerance: Martens' stop (2010, sec. 4.4): relative progress per iteration, from 0 to below 1. Default
            1e-2, see benchmarks/NOTES.md; Martens used 5e-4 without a sketch.
        warm_start: Conjugate gradients start from the last solution times this factor, from 0 to below 1. They start
            again from zero if they meet negative curvature. Default 0.95 (Martens & Sutskever 2012).
        damping_factor: Factor of the Levenberg-Marquardt rule, above one. Default 3/2 (Martens 2010, sec. 4.1).
        min_damping: Lower bound, above zero. Default 1e-30: none in practice, for the damping is not lowered below the
            rounding of the curvature along a step.
        max_damping: Upper bound. Default 1e30: none in practice.
        tolerance_gradient: No step is taken where `max |g_i|` is at most this, unless negative curvature is found.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step with `max |s_i|` at most this is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).
        seed: Seed of the random vectors for the sketch, which leave the global random state alone. Default 0.

    Raises:
        ValueError: A setting out of its range.

    Example:
        >>> import torch
        >>> from newtonopt import HessianFree
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> model = torch.nn.Linear(1, 1).double()
        >>> optimizer = HessianFree(model.parameters(), damping=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), 2 * x + 1)
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(15):
        ...     loss = optimizer.step(closure)
        >>> print(f"{model.weight.item():.3f} {model.bias.item():.3f}")
        2.000 1.000

    See Also:
        - `LevenbergMarquardt`: exact steps, for up to a few thousand residuals or parameters.
        - `NewtonCG`: a line search in place of the damping, for smooth problems without noise.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/hessian_free.md`: the algorithm line by line, and when to change a setting.
    """

    control = "damping"
    state_type = HessianFreeState

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        damping: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        preconditioner: Literal["nystrom", "empirical_fisher"] | None = "nystrom",
        rank: int = 50,
        refresh_every: int = 200,
        max_trials: int = 1,
        max_iterations: int = 1000,
        progress_tolerance: float = 1e-2,
        warm_start: float = 0.95,
        damping_factor: float = 1.5,
        min_damping: float = 1e-30,
        max_damping: float = 1e30,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
        seed: int = 0,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_preconditioner(settings, "nystrom", "empirical_fisher", None)
        check_above_one("damping_factor", settings["damping_factor"])
        for name in ("max_trials", "max_iterations"):
            check_whole(name, settings[name], 1)
        for name in ("progress_tolerance", "warm_start"):
            check_below_one(name, settings[name])

    def _check_room(self, params: Sequence[Tensor], state: HessianFreeState) -> None:
        check_sketch(params, self._settings, state, 'preconditioner="empirical_fisher", which takes one vector')

    def _propose(self, model: QuadraticModel, state: HessianFreeState) -> Proposal[HessianFreeState]:
        # 2a, 2b. The preconditioner, from a sketch that is renewed if it is due.
        precondition, state = prepared(model, state, self._settings)
        # 2c. Conjugate gradients start near the last solution (Martens & Sutskever 2012).
        start = None if state.solution is None else self._settings["warm_start"] * state.solution
        return _solved(model, state, self._settings, precondition, start, 0)

    def _try(
        self, objective: Objective, model: QuadraticModel, proposal: Proposal[HessianFreeState], state: HessianFreeState
    ) -> tuple[Outcome, HessianFreeState]:
        outcome, state = super()._try(objective, model, proposal, state)
        # 4. A first damping that is too low leads to plateaus: no step until a first ratio has confirmed it.
        if not self._seeks_damping(state) or proposal.follows_negative_curvature:
            return outcome, state
        if outcome.first_ratio >= LOW_RATIO:
            state = replace(state, confirmed=True)
        elif outcome.accepted:
            outcome = replace(outcome, accepted=False, refusal="the first damping was too low")
        return outcome, state

    def _next_control(self, state: HessianFreeState, ratio: float, length: float) -> float:
        if self._seeks_damping(state) and ratio < LOW_RATIO:
            return min(_FIRST_FACTOR * state.control, float(self._settings["max_damping"]))
        return damping_rule(self._settings, state.control, ratio)

    def _decisive_control(self, model: QuadraticModel, proposal: Proposal[HessianFreeState]) -> float:
        return model.curvature_along(proposal.steps[0])

    def _seeks_damping(self, state: HessianFreeState) -> bool:
        """Return whether no step has confirmed the first damping yet."""
        return not state.confirmed and bool(state.control < self._settings["max_damping"])


def _solved(
    model: QuadraticModel,
    state: HessianFreeState,
    settings: dict[str, Any],
    precondition: Precondition,
    start: Tensor | None,
    iterations: int,
) -> Proposal[HessianFreeState]:
    """Propose the minimiser of the damped model, and the iterates before it.

    Args:
        model: The undamped model.
        state: The optimizer's state, with the damping.
        settings: The optimizer's settings.
        precondition: From the damping to the preconditioner.
        start: First iterate; None for zero.
        iterations: Iterations already made in this step.
    """
    damping = state.control
    damped = model.damped(damping)

    def solve(start: Tensor | None) -> Solution:
        return conjugate_gradients(
            damped.curvature,
            model.gradient,
            start=start,
            preconditioner=precondition(damping),
            max_iterations=settings["max_iterations"],
            progress_tolerance=settings["progress_tolerance"],
            keep_path=True,
        )

    # 2c. Conjugate gradients on the damped model.
    solution = solve(start)
    if start is not None and solution.negative_curvature is not None:
        # A model without a minimum cannot correct a bad start: carried from step to step, the start would lead to a
        # point that is not stationary.
        iterations += solution.iterations
        solution = solve(None)
    if not solution.is_finite:
        raise FloatingPointError("A curvature product is not finite.")
    # 2d. The next step starts from this solution.
    state = replace(state, solution=solution.step, sketch_age=state.sketch_age + solution.iterations)
    # The ratio compares the loss with the undamped model, so predict its decrease.
    undamped = [without_damping(iterate, damping) for iterate in _candidates(solution, damped, damping)]
    steps = [model.scaled(iterate) for iterate in undamped]
    iterations += solution.iterations
    # Shorter proposals need products, so the graph stays in memory during the trials.
    again = settings["max_trials"] > 1
    shorter = _Continued(model, settings, precondition, solution, damping, iterations) if again else None
    return Proposal(steps, state, solution.reason, iterations, model.curvature.products, shorter=shorter)


@dataclass(frozen=True, eq=False)
class _Continued(Shorter[HessianFreeState]):
    """Conjugate gradients that go on with a higher damping, from the best of their iterates."""

    model: QuadraticModel
    settings: dict[str, Any]
    precondition: Precondition
    solution: Solution
    damping: float
    iterations: int

    def at(self, state: HessianFreeState) -> Proposal[HessianFreeState]:
        """Return the proposal under the state's damping."""
        start = best_start(self.solution, state.control - self.damping)
        return _solved(self.model, state, self.settings, self.precondition, start, self.iterations)


def best_start(solution: Solution, raised_by: float) -> Tensor | None:
    """Return the iterate with the lowest value of the model with `raised_by` more damping; None if that is zero."""
    best, most = None, 0.0
    for iterate in (*solution.path, Iterate(solution.step, solution.decrease)):
        decrease = with_more_damping(iterate, raised_by).decrease
        if decrease > most:
            best, most = iterate.step, decrease
    return best


def _candidates(solution: Solution, damped: QuadraticModel, damping: float) -> list[Iterate]:
    """Return the solution, then the iterates before it, last first.

    In front of them is a step along negative curvature if that was met, or along the gradient if all else fails.
    """
    last = Iterate(solution.step, solution.decrease)
    # Skip iterates that equal the solution up to rounding: trying one would end the search for a better one.
    rounding = 10 * torch.finfo(damped.gradient.dtype).eps * abs(last.decrease)
    earlier = [i for i in reversed(solution.path) if i.decrease > 0 and abs(i.decrease - last.decrease) > rounding]
    candidates = [last, *earlier] if solution.decrease > 0 else earlier
    d = solution.negative_curvature
    if d is not None or not candidates:
        candidates.insert(0, _beyond(last, -damped.gradient if d is None else d, damped, damping))
    return candidates


def _beyond(start: Iterate, d: Tensor, damped: QuadraticModel, damping: float) -> Iterate:
    """Step from `start` along `d` by |slope| / |curvature|, at most as far as the damping allows."""
    line = damped.along(d, start)
    length = float(d.norm())
    if length == 0.0:  # its square underflows
        return start
    longest = max(float(start.step.norm()), float(damped.gradient.norm()) / damping) / length
    return line.at(
        math.copysign(min(abs(line.slope) / abs(line.bend) if line.bend else math.inf, longest), -line.slope)
    )
