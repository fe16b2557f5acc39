"""Steps of models that the control bounds: a trust region, or a cubic term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from newtonopt.checks import check_whole
from newtonopt.closure.objective import Objective
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers import rules
from newtonopt.optimizers.rates import ray, scaled
from newtonopt.optimizers.settings import check_choices
from newtonopt.optimizers.trials import Outcome, Proposal
from newtonopt.solvers.solution import Iterate, Solution
from newtonopt.vectors.sharded import is_sharded


def bounded(
    solve: Callable[[float], Solution],
    control: float,
    gradient: Tensor,
    rates: float | Tensor,
    A: LinearOperator,
    length_along: Callable[[float, float], float],
) -> Proposal:
    """The proposal of a model's minimiser, with shorter ones for tighter controls that take no products.

    Args:
        solve: From the control to the minimiser; products only in the first call.
        control: The present one.
        gradient: `(n,)`.
        rates: The learning rate, one number or one for each entry.
        A: The curvature.
        length_along: From slope and curvature along a unit vector to how far to go, under the present control.
    """

    def propose(solution: Solution, iterate: Iterate) -> Proposal:
        length = float(solution.step.norm())

        def shrink(control: float) -> Proposal:
            if isinstance(rates, Tensor):
                # The model's value elsewhere than along this step would take a product.
                slope = float(gradient @ solution.step) / length
                bend = -2 * (solution.decrease / length + slope) / length
                t = min(1.0, length_along(slope, bend) / length)
                shorter = ray(Iterate(solution.step, solution.decrease), gradient, t)
                nearer = Solution(shorter.step, shorter.decrease, solution.iterations, solution.reason)
                return propose(nearer, ray(iterate, gradient, t))
            nearer = solve(control)
            return propose(nearer, ray(Iterate(nearer.step, nearer.decrease), gradient, rates))

        return Proposal(
            [iterate.step],
            [iterate.decrease],
            solution.iterations,
            products,
            solution.reason,
            length=length,
            shrink=shrink,
        )

    solution = solve(control)
    first = scaled(Iterate(solution.step, solution.decrease), gradient, rates, A)
    products = A.products
    return propose(solution, first)


def judge(objective: Objective, proposal: Proposal, loss: float, eps: float, least: float) -> Outcome:
    """Accept the step if the actual decrease is at least this part of the predicted one."""
    step, predicted = proposal.steps[0], proposal.decreases[0]
    trial = objective.loss_at(step)
    ratio = rules.reduction_ratio(loss, trial, predicted, eps)
    fell = f"the loss fell by less than {least:g} of the promise"
    refusal = fell if trial < loss else "the loss did not fall"
    return Outcome(step, predicted, trial, ratio, ratio, ratio >= least, 1, refusal)


def check_subproblem(settings: dict[str, Any], *choices: str) -> None:
    """Refuse settings that these optimizers share and that are out of their range with a ValueError."""
    check_choices(settings, subproblem=choices)
    for name in ("max_trials", "max_iterations"):
        check_whole(name, settings[name], 1)


def refuse_exact(params: Sequence[Tensor], subproblem: str, instead: str) -> None:
    """Refuse an exact solve for sharded parameters with a ValueError."""
    if subproblem == "exact" and is_sharded(params):
        raise ValueError(
            'params must be whole tensors for subproblem="exact", which needs the curvature matrix in one place, got '
            f'sharded ones. Write subproblem="{instead}".'
        )
