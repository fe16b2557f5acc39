"""Adaptive cubic regularisation: Cartis, Gould & Toint 2011."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from newtonopt.solvers.cg import forcing_sequence
from newtonopt.solvers.dense import solve_cubic
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.solution import Solution

# A step is taken if the loss falls by this part of the predicted decrease (Cartis, Gould & Toint 2011, sec. 7).
_LEAST_RATIO = 0.1
# Factor of sigma after a rejection, until a first ratio is high enough.
_FIRST_FACTOR = 10.0


@dataclass(frozen=True, eq=False)
class CubicNewtonState(State):
    """The state with whether the first sigma, which is a guess, was confirmed by a step."""

    confirmed: bool = False


class CubicNewton(NewtonOptimizer[CubicNewtonState]):
    """Steps that minimise `g's + s'As / 2 + sigma |s|^3 / 3`, with `sigma` following how well the model predicts.

    The cubic term stands for how fast the Hessian changes; with it a model has a minimum whatever the signs of its
    eigenvalues, and the number of steps has the best bound known for second-order methods.

    It differs from the paper in this: the ratio that adapts `sigma` is that of the quadratic model, which promises more
    than the cubic one, a stricter test; `sigma` is raised to what a failed trial asks for; the first `sigma` is
    searched for; `sigma` falls faster after three steps in a row that the model predicted well.

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
        max_trials: Number of times a step is tried, with `sigma` raised after each rejection, one or more. Default 1: a
            rejection ends the step. Further trials take one forward pass each and no product.
        max_iterations: Iterations of the Lanczos process in a step at most, one or more. Default 1000, as for
            `HessianFree`.
        min_sigma: Lower bound, above zero. Default 1e-30: none in practice, for it is not lowered below the rounding of
            the curvature along a step.
        max_sigma: Upper bound. Default 1e100: none in practice.
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
        >>> from newtonopt import CubicNewton
        >>> p = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = CubicNewton([p], max_trials=10)
        >>> for _ in range(60):
        ...     loss = optimizer.step(lambda: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)
        >>> print([round(value, 3) for value in p.tolist()])
        [1.0, 1.0]

    See Also:
        - `TrustRegionNewton`: a ball in place of the cubic term.
        - `DampedNewton`: the whole matrix, for models with a few hundred parameters.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/cubic_newton.md`: the algorithm line by line, and when to change a setting.
    """

    control = "sigma"
    state_type = CubicNewtonState

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

    def _check_room(self, params: Sequence[Tensor], state: CubicNewtonState) -> None:
        if self._settings["subproblem"] == "exact":
            check_decomposition(params, 'Take subproblem="lanczos", which needs matrix-vector products only.')

    def _propose(self, model: QuadraticModel, state: CubicNewtonState) -> Proposal[CubicNewtonState]:
        # 2. The minimiser with the cubic term, and with a heavier one if it is rejected.
        return bounded(model, state, self._solver(model, state.control), self._length_along)

    def _solver(self, model: QuadraticModel, sigma: float) -> Callable[[float], Solution]:
        """Return the model's minimiser as a function of sigma, at least this one; all products are made here."""
        A, gradient = model.curvature, model.gradient
        if self._settings["subproblem"] == "exact":
            return functools.partial(solve_cubic, *spectrum(A), gradient)
        space = krylov_space(
            A,
            gradient,
            functools.partial(secular.cubic, sigma=sigma),
            residual_tolerance=forcing_sequence(float(gradient.norm())),
            max_products=self._settings["max_iterations"],
        )
        return lambda sigma: minimise_in(space, gradient, functools.partial(secular.cubic, sigma=sigma))

    def _try(
        self, objective: Objective, model: QuadraticModel, proposal: Proposal[CubicNewtonState], state: CubicNewtonState
    ) -> tuple[Outcome, CubicNewtonState]:
        # 4, 5. Accept by the ratio; a first sigma that no ratio has confirmed needs a higher one.
        if not self._seeks_sigma(state) or proposal.leaves:
            return threshold(objective, model, proposal, _LEAST_RATIO), state
        outcome = threshold(objective, model, proposal, rules.LOW_RATIO)
        if outcome.accepted:
            state = replace(state, confirmed=True)
        elif outcome.ratio >= _LEAST_RATIO:
            outcome = replace(outcome, refusal="the first sigma was too low")
        return outcome, state

    def _next_control(self, state: CubicNewtonState, ratio: float, length: float) -> float:
        low, high = self._settings["min_sigma"], self._settings["max_sigma"]
        if self._seeks_sigma(state) and ratio < rules.LOW_RATIO:
            return min(_FIRST_FACTOR * state.control, float(high))
        return rules.cubic_weight(state.control, ratio, minimum=low, maximum=high)

    def _decisive_control(self, model: QuadraticModel, proposal: Proposal[CubicNewtonState]) -> float:
        return model.curvature_along(proposal.steps[0]) / proposal.length if proposal.length else 0.0

    def _length_along(self, slope: float, bend: float, control: float) -> float:
        return (math.hypot(bend, 2 * math.sqrt(control) * math.sqrt(-slope)) - bend) / (2 * control)

    def _seeks_sigma(self, state: CubicNewtonState) -> bool:
        """Return whether no step has confirmed the first sigma yet."""
        return not state.confirmed and bool(state.control < self._settings["max_sigma"])
