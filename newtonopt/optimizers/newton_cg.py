"""Truncated Newton with a line search: Nocedal & Wright 2006, sec. 7.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_whole, explains_arguments
from newtonopt.closure.evaluation import Evaluation, Products
from newtonopt.closure.objective import Objective
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.preconditioning import (
    blank,
    check_preconditioner,
    check_sketch,
    prepared,
    worked,
)
from newtonopt.optimizers.rates import scaled
from newtonopt.optimizers.settings import ELSEWHERE, check_choices
from newtonopt.optimizers.trials import Outcome, Proposal, search, shortened, wolfe_search
from newtonopt.solvers.cg import conjugate_gradients, forcing_sequence
from newtonopt.solvers.solution import Iterate


class NewtonCG(NewtonOptimizer):
    """Newton steps by conjugate gradients, solved the better the smaller the gradient is, with a line search.

    Conjugate gradients end at a residual of `min(1/2, sqrt(|g|)) |g|`, which makes convergence superlinear. Where they
    meet negative curvature the step follows it, downhill, as far as a line search finds the loss to fall.

    Use it for smooth problems without noise, of any size: there is no parameter to tune.
    Do not use it with small batches, whose curvature a line search cannot tell from noise, or where the loss is badly
    scaled far from its minima: `TrustRegionNewton` is more robust there.

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
        rank: Of the sketch, one or more; it takes `rank * n` numbers of memory, and twice as many more while it
            is renewed. Default 50, as for `HessianFree`.
        refresh_every: Iterations of conjugate gradients after which the next step renews the sketch, one or more.
            Default 200, as for `HessianFree`.
        line_search: "armijo" (default): the step is halved until it decreases the loss enough (Nocedal & Wright 2006,
            alg. 3.1), after ten times shortened by interpolation (sec. 3.5), one forward pass a trial; "strong_wolfe":
            the slope must have levelled off too (alg. 3.5), one backward pass a trial more.
        max_trials: Of the line search in a step, one or more. Default 25, as `torch.optim.LBFGS` allows its own.
        max_iterations: Of conjugate gradients in a step, one or more. Default 1000, as for `HessianFree`.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).
        seed: Of the sketch's random vectors, which leave the global random state alone. Default 0.

    Raises:
        ValueError: A setting out of its range.
    """

    control = None

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

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        settings, memory = self.param_groups[0], self._memory
        A, gradient = self._curvature(evaluation), evaluation.gradient
        # Without damping the sketch lowers the eigenvalues it knows to the smallest of them, and leaves the others.
        precondition = prepared(A, gradient, settings, memory)(0.0)
        solution = conjugate_gradients(
            A,
            gradient,
            preconditioner=precondition,
            max_iterations=settings["max_iterations"],
            residual_tolerance=forcing_sequence(float(gradient.norm())),
            rounding=torch.finfo(gradient.dtype).eps,
        )
        if solution.reason == "non-finite product":
            raise FloatingPointError("A curvature product is not finite.")
        worked(memory, solution.iterations)
        best = Iterate(solution.step, solution.decrease)
        d = solution.negative_curvature
        if d is not None:
            # The conjugate direction adds its own slope and bend to the model: as far as Newton's step on its
            # absolute value, and the line search goes on from there.
            slope, bend = float(gradient @ d), solution.bend
            # Without curvature no model knows how far: as far as the step before, or the gradient.
            t = slope / bend if bend < 0.0 else float(best.step.norm() / d.norm()) or 1.0
            best = Iterate(best.step + t * d, best.decrease - t * slope - 0.5 * t * t * bend)
        step = scaled(best, gradient, rates, A)
        return Proposal(
            [step.step],
            [step.decrease],
            solution.iterations,
            A.products,
            solution.reason,
            follows_negative_curvature=d is not None,
        )

    def _check_room(self, params: Sequence[Tensor]) -> None:
        check_sketch(params, self.param_groups[0], self._memory)

    def _blank(self, like: Tensor) -> dict[str, Any]:
        never = {"refused_loss": math.inf, "refused_norm": math.inf, "longest": math.inf}
        return {**never, **blank(like, self.param_groups[0])}

    def _judge(self, objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
        settings, memory = self.param_groups[0], self._memory
        here = {"refused_loss": loss, "refused_norm": float(gradient.norm())}
        if all(memory.get(name) == value for name, value in here.items()):
            proposal = shortened(proposal, gradient, memory["longest"])
        if settings["line_search"] == "strong_wolfe" and float(gradient @ proposal.steps[0]) < 0.0:
            outcome = wolfe_search(objective, gradient, proposal, loss, eps, settings["max_trials"])
        else:
            outcome = search(objective, gradient, proposal, loss, eps, settings["max_trials"] - 1)
        if not outcome.accepted:
            # Nothing else would make the next step here another one.
            memory.update(here, longest=0.1 * float(outcome.step.norm()))
        return outcome
