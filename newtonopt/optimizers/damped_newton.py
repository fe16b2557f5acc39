"""Newton's method with the dense matrix or its diagonal blocks, damped: for small models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_above_one, check_whole, explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.model import Proposal, QuadraticModel, Shorter
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.rules import damping_rule
from newtonopt.optimizers.settings import ELSEWHERE, check_choices
from newtonopt.optimizers.state import State
from newtonopt.optimizers.subproblems import blocks_fit, check_decomposition, finite_dense
from newtonopt.solvers.dense import solve_absolute, solve_clamped, solve_shifted
from newtonopt.solvers.solution import Iterate
from newtonopt.vectors.sharded import is_sharded

_SOLVERS = {"absolute": solve_absolute, "shifted": solve_shifted, "clamped": solve_clamped}


class DampedNewton(NewtonOptimizer[State]):
    """Newton steps `-(A + damping I)^-1 g` with the whole matrix `A`, and Levenberg-Marquardt damping.

    Use it for models with a few hundred parameters, where it converges quadratically: a step costs `n` products, a few
    more that check those formed at once, and `n^2` numbers of memory, 0.2 s at n = 500 and 15 s at n = 5000 on a
    processor core. The Gauss-Newton matrix of a loss that is a sum over samples is formed from their gradients, without
    products: 0.04 and 2 s with 1000 samples. Do not use it for larger ones, or with small noisy batches: `HessianFree`
    needs a fraction of the products.

    It differs from the textbook (Nocedal & Wright 2006, sec. 3.4) in this: negative eigenvalues are replaced by their
    absolute values, which turns away from saddles; the damping adapts as in the Levenberg-Marquardt method, and a step
    that raises the loss is halved too; the damping falls faster after three steps in a row that the model predicted
    well.

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
        eigenvalues: Treatment of negative eigenvalues: "absolute" (default) takes absolute values, which escapes
            saddles (Dauphin et al. 2014); "shifted" adds a multiple of the identity that lifts them all; "clamped"
            takes `max(lambda, damping)` in place of `lambda + damping`, the least change that leaves no lower one
            (Nocedal & Wright 2006, sec. 3.4). None needs eigenvectors where there is nothing to change.
        blocks: "whole" (default): the whole matrix; "parameter": the diagonal block of each parameter tensor, for
            larger models: as many products, but cheaper ones, `m^2` numbers of memory for a tensor of `m` entries, and
            linear convergence, for it leaves out how tensors act together.
        max_trials: Number of times a step is tried, with the damping raised after each rejection, one or more. Default
            1: a rejection ends the step. Further trials take a few forward passes each and no product, but for one each
            with blocks="parameter".
        damping_factor: Factor of the Levenberg-Marquardt rule, above one. Default 3 (Nielsen 1999 lowers by as much):
            it took a sixth fewer steps than Martens' 3/2 on the classical test functions, see benchmarks/NOTES.md.
        min_damping: Lower bound, above zero. Default 1e-30: none in practice, for the damping is not lowered below the
            rounding of the curvature along a step.
        max_damping: Upper bound. Default 1e30: none in practice.
        tolerance_gradient: No step is taken where no entry of the gradient is larger, unless along negative curvature.
            Default 0: only a gradient of zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: No step is taken that has no larger entry. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).

    Raises:
        ValueError: A setting out of its range, or sharded parameters.
        MemoryError: In `step`, before anything is evaluated: the matrix would not fit in the memory available.

    Example:
        >>> import torch
        >>> from newtonopt import DampedNewton
        >>> p = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = DampedNewton([p], damping=0.1)
        >>> for _ in range(40):
        ...     loss = optimizer.step(lambda: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)
        >>> print([round(value, 3) for value in p.tolist()])
        [1.0, 1.0]

    See Also:
        - `HessianFree`: the same damping without the matrix, for larger models.
        - `LevenbergMarquardt`: exact steps from the rows of the Jacobian.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/damped_newton.md`: the algorithm line by line, and when to change a setting.
    """

    control = "damping"
    state_type = State

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
                "sharded ones. Take HessianFree, which needs matrix-vector products only."
            )

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_choices(settings, eigenvalues=tuple(_SOLVERS), blocks=("whole", "parameter"))
        check_whole("max_trials", settings["max_trials"], 1)
        check_above_one("damping_factor", settings["damping_factor"])

    def _check_room(self, params: Sequence[Tensor], state: State) -> None:
        blocks = self._settings["blocks"] == "parameter"
        less = 'Take blocks="parameter", or' if not blocks and blocks_fit(params) else "Take"
        check_decomposition(params, f"{less} HessianFree, which needs matrix-vector products only.", blocks=blocks)

    def _propose(self, model: QuadraticModel, state: State) -> Proposal[State]:
        A, eigenvalues = model.curvature, self._settings["eigenvalues"]
        # Where no eigenvalue is negative but by rounding, absolute values are the eigenvalues themselves.
        as_it_is = eigenvalues == "absolute" and A.psd
        solver = functools.partial(
            _SOLVERS["shifted" if as_it_is else eigenvalues], eigh=functools.cache(torch.linalg.eigh)
        )
        # 2. The whole matrix, which judges the step too, and is at hand for further dampings without a product.
        if self._settings["blocks"] == "whole":
            matrix = finite_dense(A)
            whole = replace(model, curvature=LinearOperator(lambda v: matrix @ v, A.shape, model.gradient))
            solve = functools.partial(_solved, whole, [matrix], solver)
            return _Again(solve, A.products).at(state)
        # 2. The blocks. The whole matrix judges their steps, and its graph is gone when a rejected one is solved again:
        # all dampings that may follow are solved for now.
        matrices, spent = [], 0
        for block in model.blocks():
            matrices.append(finite_dense(block))
            spent += block.products
        ahead = {damping: _solved(model, matrices, solver, damping) for damping in self._dampings(state)}
        return _Again(functools.partial(_nearest, ahead), A.products + spent).at(state)

    def _dampings(self, state: State) -> list[float]:
        """Return the present damping, and those that follow on rejections within this step."""
        dampings = [state.control]
        for _ in range(self._settings["max_trials"] - 1):
            dampings.append(self._next_control(replace(state, control=dampings[-1]), -math.inf, 0.0))
        return dampings

    def _next_control(self, state: State, ratio: float, length: float) -> float:
        return damping_rule(self._settings, state.control, ratio)

    def _decisive_control(self, model: QuadraticModel, proposal: Proposal[State]) -> float:
        return model.curvature_along(proposal.steps[0])


Solved = tuple[Iterate, str]
"""A step, and how it was solved for, in words."""


def _solved(model: QuadraticModel, matrices: Sequence[Tensor], solver: Callable[..., Any], damping: float) -> Solved:
    """Solve for the step, block by block, and judge it by the undamped model."""
    pieces = model.gradient.split([len(matrix) for matrix in matrices])
    solutions = [solver(matrix, g, damping) for matrix, g in zip(matrices, pieces, strict=True)]
    step = model.rates * torch.cat([solution.step for solution in solutions])
    return Iterate(step, model.decrease(step)), ", ".join(dict.fromkeys(solution.reason for solution in solutions))


def _nearest(ahead: dict[float, Solved], damping: float) -> Solved:
    return ahead[min(ahead, key=lambda other: abs(other - damping))]


@dataclass(frozen=True)
class _Again(Shorter[State]):
    """Steps with other dampings, from the same matrices."""

    solve: Callable[[float], Solved]
    products: int

    def at(self, state: State) -> Proposal[State]:
        """Return the step with the state's damping."""
        step, reason = self.solve(state.control)
        return Proposal([step], state, reason, 1, self.products, shorter=self)
