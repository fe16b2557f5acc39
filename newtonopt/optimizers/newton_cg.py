"""Truncated Newton with a line search: Nocedal & Wright 2006, sec. 7.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_whole, explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.optimizers.model import Line, Proposal, QuadraticModel
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.preconditioning import (
    PreconditionedState,
    check_preconditioner,
    check_sketch,
    prepared,
)
from newtonopt.optimizers.settings import ELSEWHERE, check_choices
from newtonopt.optimizers.trials import Outcome, backtracking, no_longer, strong_wolfe
from newtonopt.solvers.cg import conjugate_gradients, forcing_sequence
from newtonopt.solvers.solution import Iterate


@dataclass(frozen=True, eq=False)
class NewtonCGState(PreconditionedState):
    """The state with the point where a line search failed, its loss and gradient's norm, and how long a step may be."""

    refused_loss: float = math.inf
    refused_norm: float = math.inf
    longest: float = math.inf


class NewtonCG(NewtonOptimizer[NewtonCGState]):
    """Newton steps by conjugate gradients, solved the better the smaller the gradient is, with a line search.

    Conjugate gradients end at a residual of `min(1/2, sqrt(|g|)) |g|`, which makes convergence superlinear. Where they
    meet negative curvature the step follows it, downhill, as far as a line search finds the loss to fall.

    Use it for smooth problems without noise, of any size: there is no parameter to tune.
    Do not use it with small batches, whose curvature a line search cannot tell from noise, or where the loss is badly
    scaled far from its minima: `TrustRegionNewton` is more robust there.

    It differs from the textbook (Nocedal & Wright 2006, alg. 7.1) in this: negative curvature is followed whenever it
    is met, not in the first iteration alone, and the line search may then double the step; after ten halvings the line
    search interpolates; where it fails, the next one from the same point begins closer.

    The loss times `c` gives the same steps, with `c` times the `weight_decay`, while both gradients are longer than
    1/4; shorter ones set a tighter tolerance, as the formula above says.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the line search begins with the Newton step.
        curvature: "hessian" (default): exact; "gauss_newton": positive semi-definite, needs a recognised loss or
            `mark_outputs`.
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        preconditioner: None (default); "nystrom": a low-rank sketch of the curvature, by absolute value where that is
            negative (Frangella, Tropp & Udell 2023; Rathore et al. 2024, who use it with a damping that there is none
            of here), for larger ill-conditioned problems: a sketch takes `rank` products, twice as many with the
            Hessian.
        rank: Columns of the sketch, one or more; it takes `rank * n` numbers of memory, and twice as many more while it
            is renewed. Default 50, as for `HessianFree`.
        refresh_every: Iterations of conjugate gradients after which the next step renews the sketch, one or more.
            Default 200, as for `HessianFree`.
        line_search: "armijo" (default): the step is halved until it decreases the loss enough (Nocedal & Wright 2006,
            alg. 3.1), after ten times shortened by interpolation (sec. 3.5), one forward pass a trial; "strong_wolfe":
            the slope must have levelled off too (alg. 3.5), one backward pass a trial more.
        max_trials: Trials of the line search in a step at most, one or more. Default 25, as `torch.optim.LBFGS` allows
            its own.
        max_iterations: Iterations of conjugate gradients in a step at most, one or more. Default 1000, as for
            `HessianFree`.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: No step is taken that has no larger entry. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).
        seed: Seed of the sketch's random vectors, which leave the global random state alone. Default 0.

    Raises:
        ValueError: A setting out of its range.

    Example:
        >>> import torch
        >>> from newtonopt import NewtonCG
        >>> p = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = NewtonCG([p])
        >>> for _ in range(40):
        ...     loss = optimizer.step(lambda: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)
        >>> print([round(value, 3) for value in p.tolist()])
        [1.0, 1.0]

    See Also:
        - `TrustRegionNewton`: more robust where the loss is badly scaled far from its minima.
        - `HessianFree`: damped Gauss-Newton steps, for large ill-conditioned losses.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/newton_cg.md`: the algorithm line by line, and when to change a setting.
    """

    control = None
    state_type = NewtonCGState

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "hessian",
        weight_decay: float = 0.0,
        products: Products = "auto",
        preconditioner: Literal["nystrom"] | None = None,
        rank: int = 50,
        refresh_every: int = 200,
        line_search: Literal["armijo", "strong_wolfe"] = "armijo",
        max_trials: int = 25,
        max_iterations: int = 1000,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
        seed: int = 0,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_choices(settings, line_search=("armijo", "strong_wolfe"))
        check_preconditioner(settings, "nystrom", None)
        for name in ("max_trials", "max_iterations"):
            check_whole(name, settings[name], 1)

    def _check_room(self, params: Sequence[Tensor], state: NewtonCGState) -> None:
        check_sketch(params, self._settings, state, "preconditioner=None")

    def _propose(self, model: QuadraticModel, state: NewtonCGState) -> Proposal[NewtonCGState]:
        gradient = model.gradient
        # Without damping the sketch lowers the eigenvalues it knows to the smallest of them, and leaves the others.
        precondition, state = prepared(model, state, self._settings)
        # 2a. Conjugate gradients, the more exactly the smaller the gradient is.
        solution = conjugate_gradients(
            model.curvature,
            gradient,
            preconditioner=precondition(0.0),
            max_iterations=self._settings["max_iterations"],
            residual_tolerance=forcing_sequence(float(gradient.norm())),
            rounding=torch.finfo(gradient.dtype).eps,
        )
        if not solution.is_finite:
            raise FloatingPointError("A curvature product is not finite.")
        state = replace(state, sketch_age=state.sketch_age + solution.iterations)
        best = Iterate(solution.step, solution.decrease)
        d = solution.negative_curvature
        if d is not None:
            # 2b. The conjugate direction adds its own slope and bend to the model: as far as Newton's step on its
            # absolute value, and the line search goes on from there.
            line = Line(d, float(gradient @ d), solution.bend, best)
            # Without curvature no model knows how far: as far as the step before, or the gradient.
            t = line.slope / line.bend if line.bend < 0.0 else float(best.step.norm() / d.norm()) or 1.0
            best = line.at(t)
        step = model.scaled(best)
        return Proposal(
            [step],
            state,
            solution.reason,
            solution.iterations,
            model.curvature.products,
            follows_negative_curvature=d is not None,
        )

    def _try(
        self, objective: Objective, model: QuadraticModel, proposal: Proposal[NewtonCGState], state: NewtonCGState
    ) -> tuple[Outcome, NewtonCGState]:
        norm, most = float(model.gradient.norm()), self._settings["max_trials"]
        # 5. Where the last line search failed, this one begins closer: nothing else would make it end otherwise.
        if (state.refused_loss, state.refused_norm) == (model.loss, norm):
            proposal = no_longer(proposal, model, state.longest)
        # 3. The line search; the strong Wolfe conditions need a descent direction.
        if self._settings["line_search"] == "strong_wolfe" and float(model.gradient @ proposal.steps[0].step) < 0.0:
            outcome = strong_wolfe(objective, model, proposal, most)
        else:
            outcome = backtracking(objective, model, proposal, most - 1)
        if not outcome.accepted:
            longest = 0.1 * float(outcome.step.norm())
            state = replace(state, refused_loss=model.loss, refused_norm=norm, longest=longest)
        return outcome, state
