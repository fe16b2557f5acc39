"""Newton's method in a trust region: Nocedal & Wright 2006, ch. 4."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.optimizers import rules
from newtonopt.optimizers.model import Proposal, QuadraticModel
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.settings import ELSEWHERE
from newtonopt.optimizers.state import State
from newtonopt.optimizers.subproblems import bounded, check_decomposition, check_subproblem, refuse_exact, spectrum
from newtonopt.optimizers.trials import Outcome, threshold
from newtonopt.solvers import secular
from newtonopt.solvers.cg import conjugate_gradients, forcing_sequence, shortened
from newtonopt.solvers.dense import solve_ball
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.solution import Solution

# A step is taken if the loss falls by this part of the predicted decrease (Conn, Gould & Toint 2000, sec. 6.1.2).
_LEAST_RATIO = 0.01


class TrustRegionNewton(NewtonOptimizer[State]):
    """Steps that minimise `g's + s'As / 2` in a ball, whose radius follows how well that predicts the loss.

    Use it for smooth problems without noise, of any size, where the loss is far from quadratic: saddles, long curved
    valleys, badly scaled starts. Do not use it with small noisy batches: it does not diverge there, but a
    first-order method reaches a lower loss.

    It differs from the textbook (Nocedal & Wright 2006, alg. 4.1 and 7.2) in this: along negative curvature a step goes
    to the lower of the two points on the boundary; a rejected step is tried again in a smaller ball without a product,
    from what was computed for the first; decreases within the rounding of the loss do not shrink the radius.

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
        max_trials: Number of times a step is tried, with a smaller radius after each rejection, one or more. Default 1:
            a rejection ends the step. Further trials take one forward pass each and no product.
        max_iterations: Iterations of the inner solver in a step at most, one or more. Default 1000, as for
            `HessianFree`.
        min_radius: Lower bound, above zero. Default 1e-16: below the rounding of float64.
        max_radius: Upper bound. Default 1e10: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: No step is taken that has no larger entry. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters with `subproblem="exact"`.
        MemoryError: In `step`, before anything is evaluated: the matrix of `subproblem="exact"` would not fit.

    Example:
        >>> import torch
        >>> from newtonopt import TrustRegionNewton
        >>> p = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = TrustRegionNewton([p], max_trials=10)
        >>> for _ in range(40):
        ...     loss = optimizer.step(lambda: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)
        >>> print([round(value, 3) for value in p.tolist()])
        [1.0, 1.0]

    See Also:
        - `NewtonCG`: a line search, with no parameter to tune.
        - `CubicNewton`: a cubic term in place of the ball.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/trust_region_newton.md`: the algorithm line by line, and when to change a setting.
    """

    control = "radius"
    state_type = State

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

    def _check_room(self, params: Sequence[Tensor], state: State) -> None:
        if self._settings["subproblem"] == "exact":
            check_decomposition(params, 'Take subproblem="steihaug", which needs matrix-vector products only.')

    def _propose(self, model: QuadraticModel, state: State) -> Proposal[State]:
        # 2. The minimiser in the ball, and in smaller ones if it is rejected.
        return bounded(model, state, self._solver(model, state.control), self._length_along)

    def _solver(self, model: QuadraticModel, radius: float) -> Callable[[float], Solution]:
        """Return the model's minimiser as a function of the radius, at most this one; all products are made here."""
        A, gradient, most = model.curvature, model.gradient, self._settings["max_iterations"]
        if self._settings["subproblem"] == "exact":
            return functools.partial(solve_ball, *spectrum(A), gradient)
        tolerance = forcing_sequence(float(gradient.norm()))
        if self._settings["subproblem"] == "lanczos":
            first = functools.partial(secular.ball, radius=radius)
            space = krylov_space(A, gradient, first, residual_tolerance=tolerance, max_products=most)
            return lambda radius: minimise_in(space, gradient, functools.partial(secular.ball, radius=radius))
        solution = conjugate_gradients(
            A,
            gradient,
            radius=radius,
            max_iterations=most,
            residual_tolerance=tolerance,
            rounding=gradient.numel() * torch.finfo(gradient.dtype).eps,
            keep_path=self._settings["max_trials"] > 1,
        )
        if not solution.is_finite:
            raise FloatingPointError("A curvature product is not finite.")
        return lambda smaller: solution if smaller == radius else shortened(solution, gradient, smaller)

    def _try(
        self, objective: Objective, model: QuadraticModel, proposal: Proposal[State], state: State
    ) -> tuple[Outcome, State]:
        return threshold(objective, model, proposal, _LEAST_RATIO), state

    def _next_control(self, state: State, ratio: float, length: float) -> float:
        low, high = self._settings["min_radius"], self._settings["max_radius"]
        return rules.trust_radius(state.control, ratio, length, minimum=low, maximum=high)

    def _length_along(self, slope: float, bend: float, control: float) -> float:
        return min(control, -slope / bend) if bend > 0 else control
