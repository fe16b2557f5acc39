"""The exact Levenberg-Marquardt step with geodesic acceleration: Transtrum & Sethna 2012."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_below_one, check_flag, check_seed, check_up_to_one, check_whole, explains_arguments
from newtonopt.closure.evaluation import Evaluation, Products, decays
from newtonopt.closure.objective import Objective
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.products import displaced_outputs
from newtonopt.operators.rows import Rows, residual_rows
from newtonopt.optimizers.model import Bend, Proposal, QuadraticModel, Shorter
from newtonopt.optimizers.newton import NewtonOptimizer, unrounded
from newtonopt.optimizers.rules import LOW_RATIO, reduction_ratio
from newtonopt.optimizers.settings import ELSEWHERE, check_choices
from newtonopt.optimizers.state import State, tensor
from newtonopt.optimizers.subproblems import check_decomposition
from newtonopt.optimizers.trials import TOO_HIGH, Outcome
from newtonopt.solvers.least_squares import Equations, Solve, in_parameters, in_samples, metric, orthogonal
from newtonopt.solvers.solution import Iterate
from newtonopt.vectors.flat import flatten
from newtonopt.vectors.random import signs
from newtonopt.vectors.sharded import is_sharded

# Distance along the step at which the second directional derivative is taken (Transtrum & Sethna 2012, sec. 4).
_H = 0.1
# The path ends where twice its second-order part is this multiple of the first, but not before a tenth of it.
_LONGEST, _SHORTEST = 1.5, 0.1
# By how much, and how often, a step is shortened along the path.
_SHORTENING, _SHORTENINGS = 0.4, 2
# Part of the predicted decrease by which the loss must fall.
_LEAST = 1e-4
# A second-order part up to this share of the first, and a ratio from this one on, show that a damping is far too high.
_SMALL, _HIGH_RATIO = 0.1, 0.9
# Number of parameters up to which the least-squares problem is solved by orthogonal factors.
_FEW = 256
# Decreases below this multiple of the rounding of the loss are not to be seen.
_SEEN = 4.0


@dataclass(frozen=True, eq=False)
class LevenbergMarquardtState(State):
    """The state with the last direction, and what trials say about the damping.

    Attributes:
        last: The last direction, `(n,)`, before learning rates; zeros after a rejection, None without momentum.
        smooth: Whether all steps so far had a ratio above 0.9 and a small second-order part.
        shortened: Whether the second-order part shortened the last step.
    """

    last: Tensor | None = field(
        default=None, metadata=tensor("n", only_with=lambda settings: bool(settings["momentum"]))
    )
    smooth: bool = True
    shortened: bool = False


class LevenbergMarquardt(NewtonOptimizer[LevenbergMarquardtState]):
    """Exact Levenberg-Marquardt steps with geodesic acceleration, for losses that are sums over samples.

    Each step minimises `g's + s'(A + damping C)s / 2` exactly, with the Gauss-Newton matrix `A = R'R` known by its
    rows, one or a few for each sample, which a handful of backward passes give. The equations are solved in the smaller
    of the numbers of rows and parameters.

    Use it with the whole data set or large batches where an error of 1e-4 is not the end: physics-informed networks,
    curve fitting, regression with up to a few thousand rows or parameters. Do not use it for
    classification, where `HessianFree` is faster, with models that couple samples, such as BatchNorm in training mode,
    or where both numbers are large.

    It differs from Transtrum & Sethna (2012) in this: the damping is in units of the parameters' own curvatures, to the
    power `scaling`; the step is shortened along the geodesic before the damping is raised; the damping falls faster
    until a step meets resistance.

    The loss times `c` gives the same steps with `c` times the `weight_decay`.

    Args:
        params: Parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: Scales the step, zero or more. Default 1: the whole step.
        curvature: "gauss_newton" (default): the one matrix that has rows. Needs a recognised loss or `mark_outputs`.
        damping: The first damping, above zero, in units of `C`, whose mean entry is about `A`'s. Default 1e-3 (Nielsen
            1999).
        weight_decay: Coefficient of `|theta|^2 / 2` in the objective, zero or more. Default 0.
        products: "auto" (default) or "cached": rows need the graph that cached products keep.
        solve: "samples": equations `(m, m)` in the rows; "parameters": `(n, n)`, by orthogonal factors up to 256
            parameters; "auto" (default): "samples" if there are no more rows than parameters, and more than 256
            parameters.
        scaling: Power of `A`'s diagonal in `C`, from 0 to 1: 0 is Levenberg's damping by the identity, 1 is
            Marquardt's, which parameters with units need. The diagonal of a weight matrix is replaced by the outer
            product of its row and column means; with weight decay by its mean. Default None: 1/2, or 1 if
            every parameter is a number or a vector, as in a formula to be fitted; see benchmarks/NOTES.md.
        acceleration: Whether to follow the geodesic to second order, for one forward pass more. Default True.
        momentum: Part of the last direction that the step begins with, from 0 to below 1 (SPRING: Goldshlager,
            Abrahamsen & Lin 2024), for batches that change from step to step. Default 0, which did better with points
            drawn anew in the league of benchmarks/pinn.py.
        rows: Size of the matrix at most, where there are more parameters: of more rows, so many are chosen at random in
            each step, while gradient and trials take all. Default 4096: a matrix of 0.13 gigabytes in double precision,
            whose factor takes about a second. No more parameters than that take all rows, up to one gigabyte of them.
        max_trials: Number of dampings tried in a step, on one matrix, one or more. Default 10: another damping takes
            a factorisation, another step the rows too.
        min_damping: Lower bound, above zero. Default 1e-30: none in practice, for the damping is not lowered below four
            times the rounding of the matrix.
        max_damping: Upper bound. Default 1e12.
        tolerance_gradient: No step is taken where no entry of the gradient is larger. Default 0: only a gradient of
            zero ends it (`torch.optim.LBFGS` has 1e-7).
        tolerance_step: No step is taken that has no larger entry. Default 0 (`torch.optim.LBFGS` has 1e-9).
        steps_per_call: Newton steps that one `step(closure)` takes at most, on one function (the same data and random
            numbers), one or more. Default 1 (`torch.optim.LBFGS` has 20, as `max_iter`).
        seed: Seed of the choice of rows, which leaves the global random state alone. Default 0.

    Raises:
        ValueError: A setting out of its range, or sharded parameters.
        MemoryError: In `step`: the matrix would not fit in the memory available.
        RuntimeError: In `step`: samples are coupled, or the loss is not convex in the outputs, so that there are no
            rows.

    Example:
        >>> import torch
        >>> from newtonopt import LevenbergMarquardt
        >>> t = torch.linspace(0, 4, 50, dtype=torch.float64)
        >>> y = 3 * torch.exp(-0.7 * t)
        >>> p = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = LevenbergMarquardt([p])
        >>> for _ in range(10):
        ...     loss = optimizer.step(lambda: torch.nn.functional.mse_loss(p[0] * torch.exp(-p[1] * t), y))
        >>> print([round(value, 6) for value in p.tolist()])
        [3.0, 0.7]

    See Also:
        - `HessianFree`: for classification, and where rows and parameters are both many.
        - `gauss_newton_spectrum()`: the eigenvalues of the same matrix, from the same rows.
        - `StepReport`: what `last_step` tells of a step.
        - `docs/optimizers/levenberg_marquardt.md`: the algorithm line by line, with standard errors of fitted
          parameters.
    """

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
        scaling: float | None = None,
        acceleration: bool = True,
        momentum: float = 0.0,
        rows: int = 4096,
        max_trials: int = 10,
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
        _check_only(settings, "curvature", ("gauss_newton",), "Take HessianFree, NewtonCG or DampedNewton")
        _check_only(settings, "products", ("auto", "cached"), "Take HessianFree, which needs products only")
        check_choices(settings, solve=("auto", "samples", "parameters"))
        if settings["scaling"] is not None:
            check_up_to_one("scaling", settings["scaling"])
        check_flag("acceleration", settings["acceleration"])
        check_below_one("momentum", settings["momentum"])
        for name in ("rows", "max_trials"):
            check_whole(name, settings[name], 1)
        check_seed(settings["seed"])

    def _check_room(self, params: Sequence[Tensor], state: LevenbergMarquardtState) -> None:
        if self._settings["solve"] == "parameters":
            check_decomposition(params, 'Take solve="samples", or HessianFree, which needs products only.')

    def _propose(self, model: QuadraticModel, state: LevenbergMarquardtState) -> Proposal[LevenbergMarquardtState]:
        evaluation, settings = model.evaluation, self._settings
        assert evaluation is not None
        # 2a. The rows R, with R'R = A but for the decay. In other samples in each step, if not all are taken.
        most = most_rows(model.gradient.numel(), settings["solve"], settings["rows"])
        # Equations square the rows' condition number, which the digits of float32 would not stand.
        rows = residual_rows(evaluation, most, settings["seed"] + state.steps).double()
        if not bool(rows.residuals.isfinite().all()):
            raise FloatingPointError("A residual is not finite.")
        # 2b. The equations, which serve all dampings of this step.
        equations, name = equations_of(rows, evaluation.decay, settings["solve"], settings["scaling"])
        r, outside = _right_sides(rows, model, evaluation)
        noise = _rounding(rows, evaluation)
        displaced = displaced_outputs(evaluation) if settings["acceleration"] else None
        judge = replace(model, curvature=_known_by(rows, evaluation, model), evaluation=None)
        again = _Again(judge, rows, equations, name, r, outside, displaced, settings["momentum"], noise)
        return again.at(state)

    def _try(
        self,
        objective: Objective,
        model: QuadraticModel,
        proposal: Proposal[LevenbergMarquardtState],
        state: LevenbergMarquardtState,
    ) -> tuple[Outcome, LevenbergMarquardtState]:
        bend = None if proposal.bend is None else proposal.bend()
        outcome, shortened = along_geodesic(objective, model, proposal, bend)
        smooth = state.smooth and outcome.first_ratio >= _HIGH_RATIO and not outcome.acceleration > _SMALL
        last = state.last if outcome.accepted or state.last is None else torch.zeros_like(state.last)
        return outcome, replace(state, smooth=smooth, shortened=shortened, last=last)

    def _next_control(self, state: LevenbergMarquardtState, ratio: float, length: float) -> float:
        # 4. Where the path was cut short, the damping is not the only thing that bounds the step.
        if ratio < LOW_RATIO:
            return state.control * (1.5 if state.shortened else 2.0)
        if ratio > 0.75:
            return state.control / (10.0 if state.smooth else 3.0)
        return state.control


def _check_only(settings: dict[str, Any], name: str, allowed: Sequence[str], remedy: str) -> None:
    """Raise a ValueError for a value that other optimizers take."""
    if settings[name] not in allowed:
        values = " or ".join(f'"{value}"' for value in allowed)
        raise ValueError(
            f"{name} must be {values} for LevenbergMarquardt, which takes the rows of the Gauss-Newton matrix from the "
            f"graph, got {settings[name]!r}. {remedy}."
        )


def most_rows(n: int, solve: Literal["auto", "samples", "parameters"], limit: int) -> int:
    """Return the number of rows to take at most: a matrix in the parameters is no larger for more of them."""
    return limit if solve == "samples" or n > limit else max(limit, _NUMBERS // n)


# Numbers that the rows may have where equations are solved in the parameters.
_NUMBERS = 2**27


def equations_of(
    rows: Rows, decay: float | Tensor, solve: Literal["auto", "samples", "parameters"], scaling: float | None
) -> tuple[Equations, Literal["samples", "parameters"]]:
    """Return the equations of the damped step in the smaller of their forms, with its name.

    Args:
        rows: The rows.
        decay: Weight decay, one number or its diagonal `(n,)`.
        solve: The form that the user wants.
        scaling: Power of the columns' mean squares in the damping's units; None: 1 without a matrix of parameters, else
            1/2.
    """
    m, n = rows.shape
    if scaling is None:
        scaling = 0.5 if any(len(shape) > 1 for shape in rows.shapes) else 1.0
    M = metric(rows, decay, scaling)
    if solve == "samples" or (solve == "auto" and m <= n and n > _FEW):
        return in_samples(rows, M), "samples"
    return (orthogonal if n <= _FEW else in_parameters)(rows, M), "parameters"


def _right_sides(rows: Rows, model: QuadraticModel, evaluation: Evaluation) -> tuple[Tensor, Tensor | None]:
    """Return `r` and `u` with the gradient `R'r + u`: as much of it as possible in the range of `R'`."""
    if model.gradient is not evaluation.gradient:
        # The rows are those of a curvature_closure.
        return torch.zeros_like(rows.residuals), model.gradient.to(rows.residuals.dtype)
    if not decays(evaluation.decay):
        return rows.residuals, rows.remainder
    pull = (evaluation.gradient - evaluation.data_gradient).to(rows.residuals.dtype)
    return rows.residuals, pull if rows.remainder is None else pull + rows.remainder


def _known_by(rows: Rows, evaluation: Evaluation, model: QuadraticModel) -> LinearOperator:
    """Return `A = R'R + D` by products with the rows, which need no graph."""
    n, dtype = rows.shape[1], rows.residuals.dtype

    def product(v: Tensor) -> Tensor:
        return rows.pull(rows.push(v.to(dtype))).to(v.dtype) + evaluation.decay * v

    return LinearOperator(product, (n, n), model.gradient, psd=True)


def _rounding(rows: Rows, evaluation: Evaluation) -> float:
    """Return how much the loss usually changes where the parameters are rounded in their last digit."""
    point = flatten(evaluation.params, evaluation.params).detach().to(rows.residuals.dtype)
    moved = evaluation.coarse_eps * rows.push(point * signs(point, torch.Generator().manual_seed(0)))
    # The residuals change in one direction or the other.
    return float((rows.residuals * moved).norm()) + float(moved.square().sum())


def along_geodesic(
    objective: Objective, model: QuadraticModel, proposal: Proposal[Any], bend: Bend | None
) -> tuple[Outcome, bool]:
    """Try points of the path `t v + t^2 a / 2`; return the outcome, and whether the first one was cut short.

    The predicted decrease is that of `t v` alone: `a` makes up for what the model does not know along `v`, and would be
    an error if the model judged it.

    Args:
        objective: The loss.
        model: The model at the path's start.
        proposal: The proposal of `v`.
        bend: `a`; None: there is none.
    """
    line, share = model.through(proposal.steps[0]), 0.0 if bend is None else bend.share
    # 3b. As far as 2 t |a| <= 1.5 |v|.
    t = 1.0 if bend is None else max(min(1.0, _LONGEST / max(2 * share, _LONGEST)), _SHORTEST)
    shortened = t < 1.0
    ratios: list[float] = []
    while True:
        # 3c. The ratio there; if the loss did not fall enough, t is shortened, on the same factor.
        step = t * line.direction if bend is None else t * line.direction + (0.5 * t * t) * bend.acceleration
        predicted, loss = line.decrease(t), objective.loss_at(step)
        # A model that predicts a rise, by rounding or from some of the rows, tells nothing: the step is rejected.
        ratios.append(reduction_ratio(model.loss, loss, predicted, model.eps) if predicted > 0.0 else -math.inf)
        accepted = ratios[-1] >= _LEAST
        drowned = not accepted and 0.0 < predicted <= _SEEN * proposal.noise and math.isfinite(loss)
        if accepted or drowned or len(ratios) > _SHORTENINGS:
            break
        t *= _SHORTENING
    refusal = "the predicted decrease is below the rounding of the loss" if drowned else TOO_HIGH
    return Outcome(
        step, predicted, loss, ratios[-1], ratios[0], accepted, len(ratios), refusal, share, drowned
    ), shortened


@dataclass(frozen=True, eq=False)
class _Again(Shorter[LevenbergMarquardtState]):
    """Steps with other dampings, from the same rows and equations.

    Attributes:
        model: The model, whose curvature is known by the rows.
        rows: `R`.
        equations: The equations.
        name: Their name.
        r: The gradient's part in the rows, `(m,)`.
        outside: The rest of the gradient, `(n,)`; None: there is none.
        displaced: Computes how the outputs change after a step; None without acceleration.
        momentum: Part of the last direction that the step begins with.
        noise: Rounding of the loss.
        tried: Number of dampings tried before in this step. Default 0.
    """

    model: QuadraticModel
    rows: Rows
    equations: Equations
    name: Literal["samples", "parameters"]
    r: Tensor
    outside: Tensor | None
    displaced: Callable[[Tensor], dict[int, Tensor] | None] | None
    momentum: float
    noise: float
    tried: int = 0

    def at(self, state: LevenbergMarquardtState) -> Proposal[LevenbergMarquardtState]:
        """Return the step with the state's damping."""
        # 2c. The factor.
        solve, damping = self._factored(state.control)
        # 2d. The direction, from mu d on, d the last one: with R d in place of a residual, and D d of a slope.
        r, outside, start = self.r, self.outside, None
        if self.momentum and state.last is not None:
            start = self.momentum * state.last.to(r.dtype)
            r = r + self.rows.push(start)
            if self.equations.metric.decays:
                more = self.equations.metric.at(0.0) * start
                outside = more if outside is None else outside + more
        v = solve(r, outside)
        v = v if start is None else v + start
        if not bool(v.isfinite().all()):
            raise FloatingPointError("The step is not finite.")
        v = v.to(self.model.gradient.dtype)
        state = replace(state, control=damping, last=v if self.momentum else None)
        step, (m, _), count = self.model.rates * v, self.rows.shape, self.rows.count
        return Proposal(
            [Iterate(step, self.model.decrease(step))],
            state,
            "the linear equations were solved exactly"
            if m == count
            else f"the linear equations were solved exactly, for {m} of {count} rows, chosen at random",
            iterations=self.tried + 1,
            length=float(v.norm()),
            shorter=replace(self, tried=self.tried + 1),
            rows=m,
            solve=self.name,
            bend=None if self.displaced is None else lambda: self._bend(solve, step),
            noise=self.noise,
        )

    def _factored(self, damping: float) -> tuple[Solve, float]:
        """Return the solver, and its damping: raised where the matrix, as it is rounded, would not be definite."""
        largest = self.equations.largest
        damping = max(damping, self.equations.floor)
        while True:
            solve = self.equations.factored(damping)
            if solve is not None:
                return solve, damping
            if not damping < largest:
                raise FloatingPointError("The matrix has entries that are not finite.")
            damping *= 10

    def _bend(self, solve: Solve, v: Tensor) -> Bend | None:
        """Return the geodesic acceleration along `v` (Transtrum & Sethna 2012, sec. 4), or None if there is none."""
        assert self.displaced is not None
        change = self.displaced(_H * v)
        if change is None:
            return None
        with unrounded(v):
            # 3a. r_vv = 2 / h ((r(x + h v) - r(x)) / h - R v), and a by the same factor.
            wide = v.to(self.r.dtype)
            second = (2 / _H) * (self.rows.weigh(change).to(wide.dtype) / _H - self.rows.push(wide))
            a = solve(second, None)
            if isinstance(self.model.rates, Tensor):
                a = a * (self.model.rates > 0)  # a group with the rate zero stays where it is
            size = self.equations.metric.norm(wide)
            share = self.equations.metric.norm(a) / size if size else math.nan
        return Bend(a.to(v.dtype), share) if math.isfinite(share) else None
