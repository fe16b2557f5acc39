"""Adaptive cubic regularisation: Cartis, Gould & Toint 2011."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import explains_arguments
from newtonopt.closure.evaluation import Evaluation, Products
from newtonopt.closure.objective import Objective
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers import rules
from newtonopt.optimizers.matrices import check_decomposition, spectrum
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.regions import bounded, check_subproblem, judge, refuse_exact
from newtonopt.optimizers.settings import ELSEWHERE
from newtonopt.optimizers.trials import Outcome, Proposal, curvature_along
from newtonopt.solvers import secular
from newtonopt.solvers.cg import forcing_sequence
from newtonopt.solvers.dense import solve_cubic
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.solution import Solution

# A step is taken if it keeps this part of the promise (Cartis, Gould & Toint 2011, sec. 7).
_LEAST_RATIO = 0.1
# Of the weight, until a first ratio is high enough.
_FIRST_FACTOR = 10.0


class CubicNewton(NewtonOptimizer):
    """Steps that minimise `g's + s'As / 2 + sigma |s|^3 / 3`, with `sigma` following how well the model predicts.

    The cubic term stands for how fast the Hessian changes; with it a model has a minimum whatever the signs of its
    eigenvalues, and the number of steps has the best bound known for second-order methods. The ratio that adapts
    `sigma` is that of the quadratic model, which promises more than the cubic one: stricter than the paper.

    Use it for smooth problems without noise, of any size, with saddles. Do not use it with small noisy batches: `sigma`
    grows with the noise.

    The loss times `c` gives the same steps with `c` times the `sigma` and `weight_decay`; but for `subproblem="exact"`,
    gradients shorter than 1/4 are solved more tightly: to `min(1/2, sqrt(|g|)) |g|`.

    There is no preconditioner, because the cubic term would be one of its norm, another one after each renewal.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the model's minimiser.
        curvature: "hessian" (default): exact; "gauss_newton": positive semi-definite, needs a recognised loss or
            `mark_outputs`.
        sigma: The first weight of the cubic term, above zero. Default 1 (Cartis, Gould & Toint 2011, sec. 7). Until a
            first ratio reaches 1/4 steps are refused and it is multiplied by ten, as `HessianFree` does: too long a
            first step ends on plateaus.
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        subproblem: "lanczos" (default): the minimiser in the Krylov space (Cartis, Gould & Toint 2011, sec. 6.2),
            whose vectors are kept in memory; "exact": the minimiser, from `n` products and the eigenvectors of the
            whole matrix.
        max_trials: How often a step is tried, with `sigma` raised after each rejection, one or more. Default 1: a
            rejection ends the step. Further trials take one forward pass each and no product.
        max_iterations: Of the Lanczos process in a step, one or more. Default 1000, as for `HessianFree`.
        min_sigma: Lower bound, above zero. Default 1e-30: none in practice, for it is not lowered below the rounding of
            the curvature along a step.
        max_sigma: Upper bound. Default 1e100: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters with `subproblem="exact"`.
        MemoryError: In `step`, before anything is evaluated: the matrix of `subproblem="exact"` would not fit.
    """

    control = "sigma"

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "hessian",
        sigma: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        subproblem: Literal["lanczos", "exact"] = "lanczos",
        max_trials: int = 1,
        max_iterations: int = 1000,
        min_sigma: float = 1e-30,
        max_sigma: float = 1e100,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)
        refuse_exact(self._params, subproblem, instead="lanczos")

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_subproblem(settings, "lanczos", "exact")

    def _check_room(self, params: Sequence[Tensor]) -> None:
        if self.param_groups[0]["subproblem"] == "exact":
            check_decomposition(params, 'Take subproblem="lanczos", which needs products with vectors only.')

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        A, gradient = self._curvature(evaluation), evaluation.gradient
        solve = self._solver(A, gradient)
        return bounded(solve, self._memory["sigma"], gradient, rates, A, self._length_along)

    def _solver(self, A: LinearOperator, gradient: Tensor) -> Callable[[float], Solution]:
        """From a weight to the model's minimiser: all products are made here."""
        settings = self.param_groups[0]
        if settings["subproblem"] == "exact":
            return functools.partial(solve_cubic, *spectrum(A), gradient)
        space = krylov_space(
            A,
            gradient,
            functools.partial(secular.cubic, sigma=self._memory["sigma"]),
            residual_tolerance=forcing_sequence(float(gradient.norm())),
            max_products=settings["max_iterations"],
        )
        return lambda sigma: minimise_in(space, gradient, functools.partial(secular.cubic, sigma=sigma))

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        settings = self.param_groups[0]
        low, high = settings["min_sigma"], settings["max_sigma"]
        if self._seeks_sigma and ratio < rules.LOW_RATIO:
            return min(_FIRST_FACTOR * control, float(high))
        return rules.cubic_weight(control, ratio, minimum=low, maximum=high)

    def _matters(self, proposal: Proposal, gradient: Tensor) -> float:
        return curvature_along(proposal, gradient) / proposal.length if proposal.length else 0.0

    def _length_along(self, slope: float, bend: float) -> float:
        sigma: float = self._memory["sigma"]
        return (math.hypot(bend, 2 * math.sqrt(sigma) * math.sqrt(-slope)) - bend) / (2 * sigma)

    def _judge(self, objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
        if not self._seeks_sigma or proposal.leaves:
            return judge(objective, proposal, loss, eps, _LEAST_RATIO)
        outcome = judge(objective, proposal, loss, eps, rules.LOW_RATIO)
        if outcome.accepted:
            self._memory["found_sigma"] = True
        elif outcome.ratio >= _LEAST_RATIO:
            return replace(outcome, refusal="the first sigma was too low")
        return outcome

    @property
    def _seeks_sigma(self) -> bool:
        """Whether no step has confirmed the first weight, which is a guess."""
        memory = self._memory
        found = memory.get("found_sigma", False)
        return not found and memory["sigma"] < self.param_groups[0]["max_sigma"]

    def _blank(self, like: Tensor) -> dict[str, Any]:
        return {"found_sigma": False}
