"""Hessian-free optimization: Martens 2010; Martens & Sutskever 2012."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_above_one, check_below_one, check_whole, explains_arguments
from newtonopt.closure.evaluation import Evaluation, Products
from newtonopt.closure.objective import Objective
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.preconditioning import (
    blank,
    check_preconditioner,
    check_sketch,
    prepared,
    worked,
)
from newtonopt.optimizers.rates import scaled
from newtonopt.optimizers.rules import LOW_RATIO, undamped_decrease
from newtonopt.optimizers.settings import ELSEWHERE, damping_rule
from newtonopt.optimizers.trials import Outcome, Proposal, curvature_along
from newtonopt.solvers.cg import conjugate_gradients
from newtonopt.solvers.preconditioners import Preconditioner
from newtonopt.solvers.solution import Iterate, Solution


class HessianFree(NewtonOptimizer):
    """Truncated Gauss-Newton steps by preconditioned conjugate gradients, with Levenberg-Marquardt damping.

    Each step minimises `g's + s'(A + damping I)s / 2` approximately, tries the result and earlier iterates of conjugate
    gradients, shortens the step until it decreases the loss, and adapts the damping to how well the model predicted the
    decrease.

    Use it with the whole data set or large batches, where the loss is ill-conditioned: physics-informed networks,
    regression, autoencoders. Do not use it with small batches or a loss dominated by noise: a step costs tens of
    gradients, and first-order methods need only one.

    The loss times `c` gives the same steps with `c` times the `damping` and `weight_decay`, except with
    `preconditioner="empirical_fisher"`, which grows by another power of `c`.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the whole step.
        curvature: "gauss_newton" (default; Martens 2010, sec. 4.2): positive semi-definite, needs a recognised loss or
            `mark_outputs`; "hessian": exact, follows negative curvature where conjugate gradients meet it.
        damping: The first damping, above zero. Default 1 (Martens & Sutskever 2012). Until a first ratio reaches 1/4
            steps are refused and it is multiplied by ten: too long a first step ends on plateaus (benchmarks/NOTES.md).
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        preconditioner: "nystrom" (default): a low-rank sketch of the curvature (Frangella, Tropp & Udell 2023);
            "hutchinson": estimated sizes of the curvature's diagonal (Bekas, Kokiopoulou & Saad 2007; Yao et al. 2021),
            for parameters or inputs of very different scales, and of no use for most networks, see
            benchmarks/NOTES.md; "empirical_fisher": the running mean of squared gradients (Martens 2010, sec. 4.7);
            None.
        rank: Of the sketch, one or more; it takes `rank * n` numbers of memory, and twice as many more while it
            is renewed. Default 50, see benchmarks/NOTES.md.
        probes: Products for Hutchinson's estimate, one or more. Default 10, see benchmarks/NOTES.md.
        refresh_every: Iterations of conjugate gradients after which the next step renews the sketch or the estimate,
            one or more. Default 200, four times the rank: sketching costs a quarter more products at most
            (benchmarks/NOTES.md).
        max_trials: How often a step is tried: after each rejection conjugate gradients go on, with the raised damping,
            from the best of their iterates. One or more. Default 1: a rejection ends the step. With more the graph
            stays in memory during the trials, which take that of another forward pass.
        max_iterations: Of conjugate gradients in a step, one or more. Default 1000, see benchmarks/NOTES.md.
        progress_tolerance: Martens' stop (2010, sec. 4.4): relative progress per iteration, from 0 to below 1. Default
            1e-2, see benchmarks/NOTES.md; Martens used 5e-4 without a sketch.
        warm_start: Conjugate gradients start from the last solution times this, from 0 to below 1, but from zero where
            they meet negative curvature. Default 0.95 (Martens & Sutskever 2012).
        damping_factor: Of the Levenberg-Marquardt rule, above one. Default 3/2 (Martens 2010, sec. 4.1).
        min_damping: Lower bound, above zero. Default 1e-30: none in practice, for the damping is not lowered below the
            rounding of the curvature along a step.
        max_damping: Upper bound. Default 1e30: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).
        seed: Of the random vectors for the preconditioner, which leave the global random state alone. Default 0.

    Raises:
        ValueError: A setting out of its range.
    """

    control = "damping"

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        damping: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        preconditioner: Literal["nystrom", "hutchinson", "empirical_fisher"] | None = "nystrom",
        rank: int = 50,
        probes: int = 10,
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
        check_preconditioner(settings, "nystrom", "hutchinson", "empirical_fisher", None)
        check_above_one("damping_factor", settings["damping_factor"])
        for name in ("max_trials", "max_iterations"):
            check_whole(name, settings[name], 1)
        for name in ("progress_tolerance", "warm_start"):
            check_below_one(name, settings[name])

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        settings, memory = self.param_groups[0], self._memory
        A, gradient = self._curvature(evaluation), evaluation.gradient
        precondition = prepared(A, gradient, settings, memory)
        start = settings["warm_start"] * memory["direction"] if "direction" in memory else None
        return self._solve(A, gradient, rates, precondition, start, 0, memory["damping"])

    def _solve(
        self,
        A: LinearOperator,
        gradient: Tensor,
        rates: float | Tensor,
        precondition: Callable[[float], Preconditioner | None],
        start: Tensor | None,
        iterations: int,
        damping: float,
    ) -> Proposal:
        settings, memory = self.param_groups[0], self._memory
        damped = A.shift(damping)
        solve = functools.partial(
            conjugate_gradients,
            damped,
            gradient,
            preconditioner=precondition(damping),
            max_iterations=settings["max_iterations"],
            progress_tolerance=settings["progress_tolerance"],
            keep_path=True,
        )
        solution = solve(start=start)
        if start is not None and solution.negative_curvature is not None:
            # A model without a minimum says nothing of a start's use: taken from step to step, each a part of the last,
            # it would lead to a point that is not stationary.
            iterations += solution.iterations
            solution = solve()
        if solution.reason == "non-finite product":
            raise FloatingPointError("A curvature product is not finite.")
        memory["direction"] = solution.step
        worked(memory, solution.iterations)
        candidates = _candidates(solution, damped, gradient, damping)
        tries = [
            scaled(Iterate(c.step, undamped_decrease(c.decrease, damping, float(c.step.norm()))), gradient, rates, A)
            for c in candidates
        ]
        iterations += solution.iterations

        def shrink(higher: float) -> Proposal:
            nearest = _best_start(solution, damping, higher)
            return self._solve(A, gradient, rates, precondition, nearest, iterations, higher)

        return Proposal(
            [i.step for i in tries],
            [i.decrease for i in tries],
            iterations,
            A.products,
            solution.reason,
            # It keeps the graph.
            shrink=shrink if settings["max_trials"] > 1 else None,
        )

    def _judge(self, objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
        outcome = super()._judge(objective, gradient, proposal, loss, eps)
        if not self._seeks_damping or proposal.follows_negative_curvature:
            return outcome
        if outcome.first_ratio >= LOW_RATIO:
            self._memory["found_damping"] = True
        elif outcome.accepted:
            return replace(outcome, accepted=False, refusal="the first damping was too low")
        return outcome

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        settings = self.param_groups[0]
        if self._seeks_damping and ratio < LOW_RATIO:
            return min(_FIRST_FACTOR * control, float(settings["max_damping"]))
        return damping_rule(settings, control, ratio)

    def _matters(self, proposal: Proposal, gradient: Tensor) -> float:
        return curvature_along(proposal, gradient)

    @property
    def _seeks_damping(self) -> bool:
        """Whether no step has confirmed the first damping, which is a guess."""
        memory = self._memory
        return not memory.get("found_damping", False) and memory["damping"] < self.param_groups[0]["max_damping"]

    def _check_room(self, params: Sequence[Tensor]) -> None:
        check_sketch(params, self.param_groups[0], self._memory)

    def _blank(self, like: Tensor) -> dict[str, Any]:
        return {"direction": like, "found_damping": False, **blank(like, self.param_groups[0])}


# Of the damping, until a first ratio is high enough.
_FIRST_FACTOR = 10.0


def _best_start(solution: Solution, damping: float, higher: float) -> Tensor | None:
    """Of the iterates that conjugate gradients passed, the one where the model of a higher damping is lowest; None for
    zero.
    """
    best, most = None, 0.0
    for iterate in (*solution.path, Iterate(solution.step, solution.decrease)):
        decrease = iterate.decrease - (higher - damping) / 2 * float(iterate.step @ iterate.step)
        if decrease > most:
            best, most = iterate.step, decrease
    return best


def _candidates(solution: Solution, damped: LinearOperator, gradient: Tensor, damping: float) -> list[Iterate]:
    """The solution, then the iterates before it; in front of them a step along negative curvature if it was met."""
    last = Iterate(solution.step, solution.decrease)
    # What differs from the solution by rounding alone would end the search for a better one.
    rounding = 10 * torch.finfo(gradient.dtype).eps * abs(last.decrease)
    earlier = [i for i in reversed(solution.path) if i.decrease > 0 and abs(i.decrease - last.decrease) > rounding]
    candidates = [last, *earlier] if solution.decrease > 0 else earlier
    d = solution.negative_curvature
    if d is not None or not candidates:
        candidates.insert(0, _along(-gradient if d is None else d, last, damped, gradient, damping))
    return candidates


def _along(d: Tensor, start: Iterate, damped: LinearOperator, gradient: Tensor, damping: float) -> Iterate:
    """From `start` along `d`, as far as slope and size of curvature say, at most as far as the damping alone allows."""
    slope = float(d @ (gradient + damped @ start.step))
    bend = float(d @ (damped @ d))
    length = float(d.norm())
    if length == 0.0:  # its square underflows
        return start
    longest = max(float(start.step.norm()), float(gradient.norm()) / damping) / length
    t = math.copysign(min(abs(slope) / abs(bend) if bend else math.inf, longest), -slope)
    return Iterate(start.step + t * d, start.decrease - t * slope - 0.5 * t * t * bend)
