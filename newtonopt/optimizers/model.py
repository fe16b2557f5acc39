"""The quadratic model of the loss around a point, which alone computes predicted decreases, slopes and curvatures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from newtonopt.closure.evaluation import Evaluation
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.state import S
from newtonopt.solvers.solution import Iterate


@dataclass(frozen=True, eq=False)
class Line:
    """The model along a line: `m(start + t d) = m(start) + t slope + t^2 bend / 2`.

    Attributes:
        direction: `d`, `(n,)`.
        slope: Derivative at the line's start, negative where it leads downhill.
        bend: Second derivative, `d'Ad`.
        start: Start of the line with the model's decrease there; None (default) for zero.
    """

    direction: Tensor
    slope: float
    bend: float
    start: Iterate | None = None

    def at(self, t: float) -> Iterate:
        """Return the step at `t` and the model's decrease there."""
        if self.start is None:
            return Iterate(self.direction if t == 1.0 else t * self.direction, self.decrease(t))
        step, decrease = self.start.step + t * self.direction, self.start.decrease
        return Iterate(step, decrease - t * self.slope - 0.5 * t * t * self.bend)

    def decrease(self, t: float) -> float:
        """Return how much lower the model is at `t` than at the line's start."""
        return -(t * self.slope + 0.5 * t * t * self.bend)


# It refuses every vector, for none has this shape.
_NO_CURVATURE = LinearOperator(torch.neg, (0, 0), torch.empty(0))


def _no_blocks() -> Iterable[LinearOperator]:
    return ()


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """The change of the loss that a step `s` is predicted to make: `m(s) = g's + s'As / 2`.

    The decrease of a step is `-m(s)`. It costs a product with `A`, unless a solver has returned it: then the curvature
    along the step, `s'As = -2 (decrease + g's)`, costs none.

    Attributes:
        gradient: `g`, the gradient of the loss, `(n,)`.
        rates: Learning rate, one number or one for each entry `(n,)`.
        loss: Loss at the point.
        eps: Rounding unit of the dtype in which the loss was computed.
        curvature: `A`. It keeps the graph alive; the default, used during trials, is a placeholder without one.
        blocks: Makes the diagonal blocks of `A`, one for each parameter. Default: there are none.
        evaluation: The evaluation that `A` belongs to; None (default) during trials, when its graph is gone.
    """

    gradient: Tensor
    rates: float | Tensor
    loss: float
    eps: float
    curvature: LinearOperator = _NO_CURVATURE
    blocks: Callable[[], Iterable[LinearOperator]] = _no_blocks
    evaluation: Evaluation | None = None

    def decrease(self, step: Tensor) -> float:
        """Return the predicted decrease `-m(step)`, by one product."""
        return -float(step @ (self.gradient + 0.5 * (self.curvature @ step)))

    def gradient_after(self, step: Tensor) -> Tensor:
        """Return the model's gradient after a step, `g + A s`, by one product."""
        return self.gradient + self.curvature @ step

    def along(self, direction: Tensor, start: Iterate | None = None) -> Line:
        """Return the model along a direction, by one product from zero and two from another start."""
        gradient = self.gradient if start is None else self.gradient_after(start.step)
        slope = float(direction @ gradient)
        return Line(direction, slope, float(direction @ (self.curvature @ direction)), start)

    def through(self, iterate: Iterate) -> Line:
        """Return the model on the line from zero through a step whose decrease is known, without a product."""
        slope = float(self.gradient @ iterate.step)
        return Line(iterate.step, slope, -2 * (iterate.decrease + slope))

    def per_length(self, iterate: Iterate) -> tuple[float, float]:
        """Return slope and bend along the unit vector of a step whose decrease is known."""
        length = float(iterate.step.norm())
        slope = float(self.gradient @ iterate.step) / length
        return slope, -2 * (iterate.decrease / length + slope) / length

    def curvature_along(self, iterate: Iterate) -> float:
        """Return `|s'As| / |s|^2` for a step whose decrease is known."""
        bend, square = abs(self.through(iterate).bend), float(iterate.step @ iterate.step)
        return bend / square if square > 0.0 and math.isfinite(bend) else 0.0

    def scaled(self, iterate: Iterate) -> Iterate:
        """Return the step with learning rates applied; its decrease takes a product only where rates differ."""
        if isinstance(self.rates, Tensor):
            step = self.rates * iterate.step
            return Iterate(step, self.decrease(step))
        return self.through(iterate).at(self.rates)

    def damped(self, damping: float) -> QuadraticModel:
        """Return the model with `A + damping I`."""
        return replace(self, curvature=self.curvature.shift(damping))


def without_damping(iterate: Iterate, damping: float) -> Iterate:
    """Return a step of a damped model with its decrease in the undamped one, `decrease + damping |s|^2 / 2`.

    The loss is compared with the undamped model; solvers know the damped one alone.
    """
    length = float(iterate.step.norm())
    return Iterate(iterate.step, iterate.decrease + 0.5 * damping * length * length)


def with_more_damping(iterate: Iterate, damping: float) -> Iterate:
    """Return a step with its decrease in the model that has this much more damping, `decrease - damping s's / 2`."""
    return Iterate(iterate.step, iterate.decrease - damping / 2 * float(iterate.step @ iterate.step))


@dataclass(frozen=True, eq=False)
class Bend:
    """The second-order part of a step `v`: the path is `t v + t^2 a / 2`.

    Attributes:
        acceleration: `a`, `(n,)`.
        share: `|a| / |v|`, in the norm that bounds the step.
    """

    acceleration: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Proposal(Generic[S]):
    """Steps to try, best first.

    Attributes:
        steps: Each step `(n,)` with the undamped model's decrease, learning rates applied; empty if no step is to be
            taken.
        state: The optimizer's state after the proposal was made.
        reason: Why the inner solver stopped, or why there is no step, in words.
        iterations: Iterations of the inner solver, those of earlier proposals in this step included.
        products: Curvature products spent, counted in the same way.
        length: Length of the first step before learning rates were applied.
        follows_negative_curvature: Whether the first step follows negative curvature, so that going further may pay.
        leaves: Whether the first step escapes a critical point. Its length is then a guess, so more trials are allowed.
        shorter: Makes a shorter proposal if this one is rejected; None if there is none.
        rows: Number of rows of the matrix that was solved with; zero (default) where it was known by its products.
        solve: The equations that were solved, "samples" or "parameters"; empty (default) where none were.
        bend: Computes the first step's second-order part by a forward pass; None if there is none. Default None: the
            optimizer has none.
        noise: Rounding of the loss: a smaller decrease is not to be seen. Default 0.
    """

    steps: Sequence[Iterate]
    state: S
    reason: str
    iterations: int = 0
    products: int = 0
    length: float = 0.0
    follows_negative_curvature: bool = False
    leaves: bool = False
    shorter: Shorter[S] | None = None
    rows: int = 0
    solve: str = ""
    bend: Callable[[], Bend | None] | None = None
    noise: float = 0.0


class Shorter(ABC, Generic[S]):
    """Shorter versions of a proposal that was rejected."""

    @abstractmethod
    def at(self, state: S) -> Proposal[S]:
        """Return the proposal under the state's control, which the rejection has tightened."""
