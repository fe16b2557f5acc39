"""Newton's method in a trust region: Nocedal & Wright 2006, ch. 4."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
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
from newtonopt.optimizers.trials import Outcome, Proposal
from newtonopt.solvers import secular
from newtonopt.solvers.cg import conjugate_gradients, forcing_sequence, shortened
from newtonopt.solvers.dense import solve_ball
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.solution import Solution

# A step is taken if it keeps this part of the promise (Conn, Gould & Toint 2000, sec. 6.1.2).
_LEAST_RATIO = 0.01


class TrustRegionNewton(NewtonOptimizer):
    """Steps that minimise `g's + s'As / 2` in a ball, whose radius follows how well that predicts the loss.

    Use it for smooth problems without noise, of any size, where the loss is far from quadratic: saddles, long curved
    valleys, badly scaled starts. Do not use it with small noisy batches: it holds there, and a
    first-order method gets further.

    The loss times `c` gives the same steps, with `c` times the `weight_decay` and the same `radius`; but for
    `subproblem="exact"`, gradients shorter than 1/4 are solved more tightly: to `min(1/2, sqrt(|g|)) |g|`.

    There is no preconditioner, because the region would be a ball in its norm, another one after each renewal.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the model's minimiser.
        curvature: "hessian" (default): exact; "gauss_newton": positive semi-definite, needs a recognised loss or
            `mark_outputs`.
        radius: The first radius, above zero. Default 1 (SciPy's trust-region methods).
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        subproblem: "steihaug" (default): conjugate gradients as far as the ball (Steihaug 1983); "lanczos": the
            minimiser in the Krylov space (Gould, Lucidi, Roma & Toint 1999), whose vectors are kept in memory;
            "exact": the minimiser, from `n` products and the eigenvectors of the whole matrix (More & Sorensen 1983).
        max_trials: How often a step is tried, with a smaller radius after each rejection, one or more. Default 1: a
            rejection ends the step. Further trials take one forward pass each and no product.
        max_iterations: Of the inner solver in a step, one or more. Default 1000, as for `HessianFree`.
        min_radius: Lower bound, above zero. Default 1e-16: below the rounding of float64.
        max_radius: Upper bound. Default 1e10: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters with `subproblem="exact"`.
        MemoryError: In `step`, before anything is evaluated: the matrix of `subproblem="exact"` would not fit.
    """

    control = "radius"

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "hessian",
        radius: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        subproblem: Literal["steihaug", "lanczos", "exact"] = "steihaug",
        max_trials: int = 1,
        max_iterations: int = 1000,
        min_radius: float = 1e-16,
        max_radius: float = 1e10,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)
        refuse_exact(self._params, subproblem, instead="steihaug")

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_subproblem(settings, "steihaug", "lanczos", "exact")

    def _check_room(self, params: Sequence[Tensor]) -> None:
        if self.param_groups[0]["subproblem"] == "exact":
            check_decomposition(params, 'Take subproblem="steihaug", which needs products with vectors only.')

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        A, gradient = self._curvature(evaluation), evaluation.gradient
        solve = self._solver(A, gradient)
        return bounded(solve, self._memory["radius"], gradient, rates, A, self._length_along)

    def _solver(self, A: LinearOperator, gradient: Tensor) -> Callable[[float], Solution]:
        """From a radius, at most the present one, to the model's minimiser: all products are made here."""
        settings, radius = self.param_groups[0], self._memory["radius"]
        if settings["subproblem"] == "exact":
            return functools.partial(solve_ball, *spectrum(A), gradient)
        tolerance = forcing_sequence(float(gradient.norm()))
        if settings["subproblem"] == "lanczos":
            first = functools.partial(secular.ball, radius=radius)
            most = settings["max_iterations"]
            space = krylov_space(A, gradient, first, residual_tolerance=tolerance, max_products=most)
            return lambda radius: minimise_in(space, gradient, functools.partial(secular.ball, radius=radius))
        solution = conjugate_gradients(
            A,
            gradient,
            radius=radius,
            max_iterations=settings["max_iterations"],
            residual_tolerance=tolerance,
            rounding=gradient.numel() * torch.finfo(gradient.dtype).eps,
            keep_path=settings["max_trials"] > 1,
        )
        if solution.reason == "non-finite product":
            raise FloatingPointError("A curvature product is not finite.")
        return lambda smaller: solution if smaller == radius else shortened(solution, gradient, smaller)

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        settings = self.param_groups[0]
        low, high = settings["min_radius"], settings["max_radius"]
        return rules.trust_radius(control, ratio, length, minimum=low, maximum=high)

    def _length_along(self, slope: float, bend: float) -> float:
        radius: float = self._memory["radius"]
        return min(radius, -slope / bend) if bend > 0 else radius

    def _judge(self, objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
        return judge(objective, proposal, loss, eps, _LEAST_RATIO)
