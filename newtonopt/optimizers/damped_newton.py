"""Newton's method with the dense matrix or its diagonal blocks, damped: for small models."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_above_one, check_whole, explains_arguments
from newtonopt.closure.evaluation import Evaluation, Products
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import diagonal_blocks
from newtonopt.optimizers.matrices import blocks_fit, check_decomposition, finite_dense
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.settings import ELSEWHERE, check_choices, damping_rule
from newtonopt.optimizers.trials import Proposal, curvature_along
from newtonopt.solvers.dense import solve_absolute, solve_clamped, solve_shifted
from newtonopt.vectors.sharded import is_sharded

_SOLVERS = {"absolute": solve_absolute, "shifted": solve_shifted, "clamped": solve_clamped}


class DampedNewton(NewtonOptimizer):
    """Newton steps `-(A + damping I)^-1 g` with the whole matrix `A`, and Levenberg-Marquardt damping.

    Use it for models of some hundreds of parameters, where it converges quadratically: a step costs `n` products, a few
    more that check those formed at once, and `n^2` numbers of memory, 0.2 s at n = 500 and 15 s at n = 5000 on a
    processor core. Do not use it for larger ones, or with small noisy batches: `HessianFree` needs a fraction of the
    products.

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
            saddles (Dauphin et al. 2014); "shifted" adds a multiple of the identity that lifts them all; "clamped"
            takes `max(lambda, damping)` in place of `lambda + damping`, the least change that leaves no lower one
            (Nocedal & Wright 2006, sec. 3.4). None needs eigenvectors where there is nothing to change.
        blocks: "whole" (default): the whole matrix; "parameter": the diagonal block of each parameter tensor, for
            larger models: as many products, but cheaper ones, `m^2` numbers of memory for a tensor of `m` entries, and
            linear convergence, for it leaves out how tensors act together.
        max_trials: How often a step is tried, with the damping raised after each rejection, one or more. Default 1: a
            rejection ends the step. Further trials take a few forward passes each and no product, but for one each
            with blocks="parameter".
        damping_factor: Of the Levenberg-Marquardt rule, above one. Default 3 (Nielsen 1999 lowers by as much): it took
            a sixth fewer steps than Martens' 3/2 on the classical test functions, see benchmarks/NOTES.md.
        min_damping: Lower bound, above zero. Default 1e-30: none in practice, for the damping is not lowered below the
            rounding of the curvature along a step.
        max_damping: Upper bound. Default 1e30: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: A step without a larger entry is not taken. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters.
        MemoryError: In `step`, before anything is evaluated: the matrix would not fit in the memory available.
    """

    control = "damping"

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton", "hessian"] = "hessian",
        damping: float = 1.0,
        weight_decay: float = 0.0,
        products: Products = "auto",
        eigenvalues: Literal["absolute", "shifted", "clamped"] = "absolute",
        blocks: Literal["whole", "parameter"] = "whole",
        max_trials: int = 1,
        damping_factor: float = 3.0,
        min_damping: float = 1e-30,
        max_damping: float = 1e30,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)
        if is_sharded(self._params):
            raise ValueError(
                "params must be whole tensors for DampedNewton, which needs the curvature matrix in one place, got "
                "sharded ones. Take HessianFree, which needs its products with vectors only."
            )

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_choices(settings, eigenvalues=tuple(_SOLVERS), blocks=("whole", "parameter"))
        check_whole("max_trials", settings["max_trials"], 1)
        check_above_one("damping_factor", settings["damping_factor"])

    def _check_room(self, params: Sequence[Tensor]) -> None:
        blocks = self.param_groups[0]["blocks"] == "parameter"
        less = 'Take blocks="parameter", or' if not blocks and blocks_fit(params) else "Take"
        check_decomposition(params, f"{less} HessianFree, which needs products with vectors only.", blocks=blocks)

    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        settings, gradient = self.param_groups[0], evaluation.gradient
        A = self._curvature(evaluation)
        whole = settings["blocks"] == "whole"
        matrices = [finite_dense(A)] if whole else []
        spent = 0
        for block in () if whole else diagonal_blocks(evaluation, settings["curvature"]):
            matrices.append(finite_dense(block))
            spent += block.products
        pieces = gradient.split([len(matrix) for matrix in matrices])
        solve = functools.partial(_SOLVERS[settings["eigenvalues"]], eigh=functools.cache(torch.linalg.eigh))

        def at(damping: float, curvature: Tensor | LinearOperator) -> tuple[Tensor, float, str]:
            """The step, the decrease of the undamped model, and how it was solved."""
            solutions = [solve(matrix, g, damping) for matrix, g in zip(matrices, pieces, strict=True)]
            step = rates * torch.cat([solution.step for solution in solutions])
            reason = ", ".join(dict.fromkeys(solution.reason for solution in solutions))
            return step, -float(step @ (gradient + 0.5 * (curvature @ step))), reason

        # Of blocks the whole matrix is not held, and its graph is gone when a rejected step is solved again.
        ahead = {} if whole else {damping: at(damping, A) for damping in self._dampings()}
        products = A.products + spent

        def propose(damping: float) -> Proposal:
            there = ahead[min(ahead, key=lambda other: abs(other - damping))] if ahead else at(damping, matrices[0])
            step, decrease, reason = there
            return Proposal([step], [decrease], 1, products, reason, shrink=propose)

        return propose(self._memory["damping"])

    def _dampings(self) -> list[float]:
        """The present one, and those that follow on rejections within this step."""
        dampings = [float(self._memory["damping"])]
        for _ in range(self.param_groups[0]["max_trials"] - 1):
            dampings.append(self._next_control(dampings[-1], -math.inf, 0.0))
        return dampings

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        return damping_rule(self.param_groups[0], control, ratio)

    def _matters(self, proposal: Proposal, gradient: Tensor) -> float:
        return curvature_along(proposal, gradient)
