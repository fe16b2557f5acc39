"""Newton's method with the dense matrix, damped: for small models."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt._shards import is_sharded
from newtonopt.evaluation import Evaluation, Products
from newtonopt.optimizers.base import NewtonOptimizer
from newtonopt.optimizers.settings import check_choices, check_number, damping_rule
from newtonopt.optimizers.trials import Proposal
from newtonopt.solvers.dense import solve_absolute, solve_shifted


class DampedNewton(NewtonOptimizer):
    """Newton steps `-(A + damping I)^-1 g` with the whole matrix `A`, and Levenberg-Marquardt damping.

    Use it for models of some hundreds of parameters, where it converges quadratically: a step costs `n` products and
    `n^2` numbers of memory, 0.2 s at n = 500 and 15 s at n = 5000 on a processor core. Do not use it for larger ones,
    or with small noisy batches: `HessianFree` needs a fraction of the products.

    The loss times `c` gives the same steps with `c` times the `damping` and `weight_decay`.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the Newton step.
        curvature: "hessian" (default): exact, with quadratic convergence; "gauss_newton": positive semi-definite, needs
            a recognised loss or `mark_outputs`.
        damping: The first damping, above zero. Default 1, as for `HessianFree`.
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: How products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        eigenvalues: What becomes of negative eigenvalues: "absolute" (default) takes absolute values, which escapes
            saddles (Dauphin et al. 2014); "shifted" adds a multiple of the identity that lifts them all, and needs no
            eigenvectors while there are none.
        damping_factor: Of the Levenberg-Marquardt rule, above one. Default 3/2 (Martens 2010, sec. 4.1).
        min_damping: Lower bound, above zero. Default 1e-16: below the rounding of float64.
        max_damping: Upper bound. Default 1e10.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters.
    """

    control = "damping"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "hessian",
        damping: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        eigenvalues: Literal["absolute", "shifted"] = "absolute",
        damping_factor: float = 1.5,
        min_damping: float = 1e-16,
        max_damping: float = 1e10,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        check_choices(settings, curvature=("gauss_newton", "hessian"), eigenvalues=("absolute", "shifted"))
        check_number("damping_factor", damping_factor, 1, above=True)
        super().__init__(params, settings)
        if is_sharded(self._params):
            raise ValueError(
                "The parameters are sharded, and DampedNewton needs the whole curvature matrix in one place: take "
                "HessianFree, which needs its products with vectors only."
            )

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        settings, damping = self.param_groups[0], self._memory["damping"]
        A = self._curvature(evaluation)
        matrix = A.dense()
        if not bool(torch.isfinite(matrix).all()):
            raise FloatingPointError("The curvature matrix has entries that are not finite.")
        solve = solve_absolute if settings["eigenvalues"] == "absolute" else solve_shifted
        solution = solve(matrix, evaluation.gradient, damping)
        step = rates * solution.step
        decrease = -float(step @ (evaluation.gradient + 0.5 * (matrix @ step)))
        return Proposal([step], [decrease], solution.iterations, A.products, solution.reason)

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        return damping_rule(self.param_groups[0], control, ratio)
