"""The exact Levenberg-Marquardt step with geodesic acceleration (Transtrum & Sethna 2012)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_below_one, check_flag, check_seed, check_whole, explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.products import displaced_outputs
from newtonopt.operators.rows import Rows, residual_rows
from newtonopt.optimizers.model import Bend, Proposal, QuadraticModel, Shorter
from newtonopt.optimizers.newton import NewtonOptimizer, unrounded
from newtonopt.optimizers.rules import reduction_ratio
from newtonopt.optimizers.settings import ELSEWHERE, check_choices
from newtonopt.optimizers.state import State, tensor
from newtonopt.optimizers.trials import TOO_HIGH, Outcome
from newtonopt.solvers.least_squares import Equations, Metric, Solve, in_parameters, in_samples, metric, orthogonal
from newtonopt.solvers.solution import Iterate
from newtonopt.vectors.sharded import is_sharded

# Distance, in steps, at which the second directional derivative is taken (Transtrum & Sethna 2012, sec. 4).
_H = 0.1
# The step ends where its second-order part would be longer than 3/4 of its first, but not before a tenth of it.
_LONGEST, _SHORTEST = 1.5, 0.1
# How a step is shortened along the geodesic, and how often.
_SHORTENING, _SHORTENINGS = 0.4, 2
# Least part of the predicted decrease by which the loss must fall.
_LEAST = 1e-4
# A second-order part up to this share of the first is small.
_SMALL = 0.1
# Columns up to which the least-squares problem is solved by orthogonal factors.
_FEW = 256


@dataclass(frozen=True)
class LevenbergMarquardtState(State):
    """The state with the last step, for momentum, and what the last trial says about the damping.

    Attributes:
        last: The last step taken, `(n,)`; None without momentum.
        smooth: Whether all steps had a ratio above 0.9 and a small second-order part.
        shortened: Whether the last step was shortened along the geodesic.
    """

    last: Tensor | None = field(default=None, metadata=tensor("n"))
    smooth: bool = True
    shortened: bool = False


class LevenbergMarquardt(NewtonOptimizer[LevenbergMarquardtState]):
    """The exact Levenberg-Marquardt step with geodesic acceleration, for losses that are sums over samples."""

    control = "damping"
    state_type = LevenbergMarquardtState

    @explains_arguments(ELSEWHERE)
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        curvature: Literal["gauss_newton"] = "gauss_newton",
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        products: Products = "auto",
        solve: Literal["auto", "samples", "parameters"] = "auto",
        scaling: float = 0.5,
        acceleration: bool = True,
        momentum: float = 0.0,
        rows: int = 10_000,
        max_trials: int = 5,
        min_damping: float = 1e-30,
        max_damping: float = 1e12,
        tolerance_gradient: float = 0.0,
        tolerance_step: float = 0.0,
        steps_per_call: int = 1,
        seed: int = 0,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)
        if is_sharded(self._params):
            raise ValueError(
                "params must be whole tensors for LevenbergMarquardt, which factorises a matrix in one place, got "
                "sharded ones. Take HessianFree, which needs matrix-vector products only."
            )

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        check_choices(settings, curvature=("gauss_newton",), solve=("auto", "samples", "parameters"))
        check_choices(settings, products=("auto", "cached"))
        check_flag("acceleration", settings["acceleration"])
        check_below_one("momentum", settings["momentum"])
        check_whole("rows", settings["rows"], 1)
        check_whole("max_trials", settings["max_trials"], 1)
        check_seed(settings["seed"])

    def _propose(self, model: QuadraticModel, state: LevenbergMarquardtState) -> Proposal[LevenbergMarquardtState]:
        evaluation, settings = model.evaluation, self._settings
        assert evaluation is not None
        # 2a. The rows R, with R'R = A less the decay.
        rows = residual_rows(evaluation, settings["rows"], settings["seed"] + state.steps)
        if not bool(rows.residuals.isfinite().all()):
            raise FloatingPointError("A residual is not finite.")
        decay = evaluation.decay

        def product(v: Tensor) -> Tensor:
            return rows.pull(rows.push(v)) + decay * v

        A = LinearOperator(product, model.curvature.shape, model.gradient, psd=True)
        exact = replace(model, curvature=A, evaluation=None)
        # 2b. The matrix, which serves all dampings of this step.
        M = metric(rows, decay, settings["scaling"])
        equations, solve = self._equations(rows, M)
        # The gradient's part in the range of R', and the rest of it.
        r, outside = rows.residuals, rows.remainder
        if model.gradient is not evaluation.gradient:
            r, outside = torch.zeros_like(r), model.gradient
        elif isinstance(decay, Tensor) or decay != 0.0:
            pull = evaluation.gradient - evaluation.data_gradient
            outside = pull if outside is None else outside + pull
        displaced = displaced_outputs(evaluation) if settings["acceleration"] else None
        again = _Again(exact, rows, equations, M, solve, r, outside, displaced, settings["momentum"])
        return again.at(state)

    def _equations(self, rows: Rows, M: Metric) -> tuple[Equations, str]:
        (m, n), solve = rows.shape, self._settings["solve"]
        if solve == "samples" or (solve == "auto" and m <= n and n > _FEW):
            return in_samples(rows, M), "samples"
        if n <= _FEW:
            return orthogonal(rows, M), "parameters"
        return in_parameters(rows, M), "parameters"

    def _try(
        self,
        objective: Objective,
        model: QuadraticModel,
        proposal: Proposal[LevenbergMarquardtState],
        state: LevenbergMarquardtState,
    ) -> tuple[Outcome, LevenbergMarquardtState]:
        # 3. Along the geodesic.
        bend = None if proposal.bend is None else proposal.bend()
        outcome, t = along_geodesic(objective, model, proposal.steps[0], bend)
        state = replace(
            state,
            shortened=t < 1.0,
            smooth=state.smooth and outcome.first_ratio > 0.9 and not outcome.acceleration > _SMALL,
        )
        return outcome, replace(state, last=outcome.step if outcome.accepted and self._settings["momentum"] else None)

    def _next_control(self, state: LevenbergMarquardtState, ratio: float, length: float) -> float:
        if ratio < 0.25:
            return state.control * (1.5 if state.shortened else 2.0)
        if ratio > 0.75:
            return state.control / (10.0 if state.smooth else 3.0)
        return state.control


def along_geodesic(
    objective: Objective, model: QuadraticModel, proposed: Iterate, bend: Bend | None
) -> tuple[Outcome, float]:
    """Try `t v + t^2 a / 2`, with a shorter `t` where the loss does not fall; return the outcome and the first `t`.

    The decrease predicted is that of `t v`: the second-order part makes up for the model's error there, and would be
    taken for an error of its own (Transtrum & Sethna 2012).
    """
    v, line = proposed.step, model.through(proposed)
    # 3a. As far as the second-order part is at most 3/4 of the first.
    first = t = 1.0 if bend is None else max(min(1.0, _LONGEST / max(2 * bend.share, _LONGEST)), _SHORTEST)
    ratios: list[float] = []
    while True:
        # 3b. The loss there.
        step = t * v if bend is None else t * v + (0.5 * t * t) * bend.acceleration
        predicted, loss = line.decrease(t), objective.loss_at(step)
        ratios.append(reduction_ratio(model.loss, loss, predicted, model.eps) if predicted > 0.0 else -math.inf)
        accepted = ratios[-1] >= _LEAST
        if accepted or len(ratios) > _SHORTENINGS:
            break
        # 3c. Shorter, on the same factor.
        t *= _SHORTENING
    share = math.nan if bend is None else bend.share
    return Outcome(step, predicted, loss, ratios[-1], ratios[0], accepted, len(ratios), TOO_HIGH, share), first


@dataclass(frozen=True)
class _Again(Shorter[LevenbergMarquardtState]):
    """Steps with other dampings, from the same matrix."""

    model: QuadraticModel
    rows: Rows
    equations: Equations
    metric: Metric
    name: str
    r: Tensor
    outside: Tensor | None
    displaced: Callable[[Tensor], dict[int, Tensor] | None] | None
    momentum: float

    def at(self, state: LevenbergMarquardtState) -> Proposal[LevenbergMarquardtState]:
        """Return the step with the state's damping."""
        rows, model = self.rows, self.model
        # The damping is not lowered below the rounding of the matrix.
        largest = self.equations.largest
        relative = max(state.control, 4 * torch.finfo(model.gradient.dtype).eps * largest)
        solve = self.equations.factored(relative)
        while solve is None and relative < largest:
            relative *= 10
            solve = self.equations.factored(relative)
        if solve is None:
            raise FloatingPointError("The matrix is not finite.")
        state = replace(state, control=relative)
        r, outside, start = self.r, self.outside, None
        if self.momentum and state.last is not None:
            start = self.momentum * state.last
            r = r + rows.push(start)
        v = solve(r, outside)
        if start is not None:
            v = v + start
        if not bool(v.isfinite().all()):
            raise FloatingPointError("The step is not finite.")
        step = model.rates * v
        bend = functools.partial(self._bend, solve, step) if self.displaced is not None else None
        return Proposal(
            [Iterate(step, model.decrease(step))],
            state,
            "solved exactly",
            1,
            0,
            shorter=self,
            rows=rows.shape[0],
            solve=self.name,
            bend=bend,
        )

    def _bend(self, solve: Solve, v: Tensor) -> Bend | None:
        """Return the geodesic acceleration along `v` (Transtrum & Sethna 2012, eq. 16)."""
        assert self.displaced is not None
        change = self.displaced(_H * v)
        if change is None:
            return None
        with unrounded(v):
            # The second directional derivative of the residuals, 2 / h ((r(theta + h v) - r(theta)) / h - R v).
            bent = (2 / _H) * (self.rows.weigh(change).to(v.dtype) / _H - self.rows.push(v))
            a = solve(bent, None)
            if isinstance(self.model.rates, Tensor):
                a = a * (self.model.rates > 0)
            C = self.metric.spread
            share = float((C * a * a).sum().sqrt()) / (float((C * v * v).sum().sqrt()) or 1.0)
        return Bend(a, share) if math.isfinite(share) else None
