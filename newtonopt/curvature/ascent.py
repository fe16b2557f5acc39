"""How much the loss rises near a point: the highest loss in a ball, sought by ascents, or the mean on a sphere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from newtonopt.checks import (
    check_choice,
    check_closure,
    check_positive,
    check_seed,
    check_share,
    check_weight,
    check_whole,
)
from newtonopt.closure.evaluation import Products, check_products
from newtonopt.closure.objective import Objective
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import hessian
from newtonopt.solvers import secular
from newtonopt.solvers.dense import solve_ball
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.lanczos import Tridiagonal, lanczos
from newtonopt.vectors.flat import trained_parameters
from newtonopt.vectors.random import direction
from newtonopt.vectors.scaling import dot, norm, scale_of, shifted, times_power

Kind = Literal["ball", "adaptive_ball", "average"]

# Residual of the top eigenvector over its eigenvalue; the loss along it errs by the square over the relative gap.
_AXIS_TOLERANCE = 1e-4
# Residual of the quadratic model's maximiser over the gradient; the model errs by its square.
_MODEL_TOLERANCE = 1e-3
# Steps are shortened down to 2^-10 before a point counts as a maximiser along its ascent direction.
_HALVINGS = 10


@dataclass(frozen=True, eq=False, repr=False)
class SharpnessEstimate:
    """How much the loss rises around a point.

    Attributes:
        value: The largest rise found, or the mean rise; infinite where the loss was not finite within the radius.
        kind: Neighbourhood: "ball", "adaptive_ball" or "average".
        radius: Radius of the neighbourhood.
        loss: Loss at the point itself.
        step: Displacement `(n,)` that attains the value; None for an average.
        gradients: Gradients and Hessian products used; losses, for an average.
        converged: Whether the search ended by itself. For an average: whether the standard error is at most
            `tolerance * |value|`.
        standard_error: Standard error of an average, over the sample; else zero.
        prediction: Largest rise of the quadratic model in the same ball; None for an average, and in `measure`.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import sharpness
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> found = sharpness(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], radius=0.1)
        >>> round(found.value, 6), round(found.prediction, 6), found.converged
        (0.03, 0.03, True)

    See Also:
        - `sharpness()`: computes it.
        - `docs/read_your_curvature.md`: what sharpness says about a run, and what it does not.
    """

    value: float
    kind: Kind
    radius: float
    loss: float
    step: Tensor | None = field(repr=False)
    gradients: int
    converged: bool
    standard_error: float = 0.0
    prediction: float | None = None

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


@torch.inference_mode(False)
def sharpness(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    kind: Kind = "ball",
    radius: float = 0.05,
    tolerance: float = 1e-4,
    max_gradients: int = 100,
    samples: int = 64,
    seed: int = 0,
    products: Products = "auto",
    weight: float | None = None,
) -> SharpnessEstimate:
    """Return the largest `L(theta + d) - L(theta)` over `|d| <= radius`, or one of two relatives of it.

    - "ball": the largest rise in the Euclidean ball. At a minimum it tends to `radius^2 lambda_max / 2` for small
      radii.
    - "adaptive_ball": the ball `|d / |theta|| <= radius`, invariant to rescalings of the parameters (Kwon et al. 2021,
      arXiv 2102.11600). Entries of theta that are zero stay zero.
    - "average": the mean over the sphere `|d| = radius`, in antithetic pairs; near a minimum `radius^2 trace / (2 n)`.

    The maximum is sought by `d <- radius * g(d) / |g(d)|`, which never lowers a convex loss (Journee, Nesterov,
    Richtarik & Sepulchre 2010, alg. 1); where the loss falls, by a shorter way along the chord, which always ascends at
    first. Starts are the gradient, both signs of the Hessian's top eigenvector and the quadratic model's maximiser in
    the ball (Gould, Lucidi, Roma & Toint 1999). The value is a lower bound of the true maximum, never below the loss at
    these starts and never below zero.

    Not for comparing models that were trained differently: its relation to generalisation is weak (Andriushchenko et
    al. 2023). In float32 a rise below 1e-7 of the loss is lost in rounding. Parameters, random state and buffers are
    as before afterwards.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters; those without `requires_grad` are left alone.
        kind: Neighbourhood: "ball" (default), "adaptive_ball" or "average".
        radius: Radius, above zero. Default 0.05, as in sharpness-aware minimisation (Foret et al. 2021, arXiv
            2010.01412).
        tolerance: Relative rise per iteration below which a search ends, in (0, 1). Default 1e-4.
        max_gradients: Budget of gradients and Hessian products together, at least 4; unused for "average". Default 100.
        samples: Losses for "average", an even number, at least 4. Default 64.
        seed: Seed of the random vectors; the global random state is left alone. Default 0.
        products: How Hessian products are formed, as for `evaluate`.
        weight: Weight of this process in the mean over several, as for `evaluate`.

    Returns:
        The rise and how it was found.

    Raises:
        TypeError: `closure` or `params` is of another kind.
        ValueError: An argument is out of range.
        FloatingPointError: The loss or the curvature at the parameters themselves is not finite.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import sharpness
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> round(sharpness(lambda: w[0] + 2 * w[1], [w], radius=0.1).value, 6)
        0.223607

    See Also:
        - `SharpnessEstimate`: the result.
        - `Sharpness`: the same in a training run.
        - `extreme_eigenvalues()`: the limit for small radii, with bounds.
        - `docs/reference/mathematics.md`: how the largest rise is found.
    """
    check_choice("kind", kind, get_args(Kind))
    check_positive("radius", radius)
    check_share("tolerance", tolerance)
    check_whole("max_gradients", max_gradients, 4)
    check_whole("samples", samples, 4)
    if samples % 2:
        raise ValueError(f"samples must be even and at least 4, got {samples!r}.")
    check_seed(seed)
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    objective = Objective(closure, trained_parameters(params), products=products, weight=weight)
    evaluation = objective.evaluate()
    objective.check_replay(evaluation)
    ball = ball_around(objective, kind, radius, tolerance, float(evaluation.loss))
    if kind == "average":
        evaluation.free()
        return average(ball, samples, seed)
    generator = torch.Generator().manual_seed(seed)
    places, prediction, spent = _second_order(hessian(evaluation), evaluation.gradient, ball, max_gradients, generator)
    evaluation.free()
    found = ascent(ball, kind, places, max_gradients - spent)
    return replace(found, gradients=spent + found.gradients, prediction=prediction)


def ball_around(objective: Objective, kind: Kind, radius: float, tolerance: float, base: float) -> Ball:
    """Return the neighbourhood of a kind.

    Raises:
        FloatingPointError: The loss at the point itself is not finite.
    """
    if not math.isfinite(base):
        raise FloatingPointError(
            f"The loss is {base} at the parameters, so no rise above it is defined. Check the data and the model."
        )
    scale = objective.point.abs() if kind == "adaptive_ball" else torch.ones_like(objective.point)
    return Ball(objective, scale, radius, tolerance, base)


def ascent(
    ball: Ball, kind: Kind, places: Sequence[Tensor], budget: int, ascents: int | None = None
) -> SharpnessEstimate:
    """Return the highest point that ascents from the `ascents` highest places lead to; None: from all places."""
    best, used, converged = ball.highest(places, budget, ascents)
    return SharpnessEstimate(
        best.loss - ball.base, kind, ball.radius, ball.base, ball.scale * best.place, used, converged
    )


def _second_order(
    curvature: LinearOperator, gradient: Tensor, ball: Ball, budget: int, generator: torch.Generator
) -> tuple[list[Tensor], float, int]:
    """Return places where the quadratic model rises most in the ball, its largest rise, and the products used: at most
    half of the budget.
    """
    scale, radius = ball.scale, ball.radius

    def product(vector: Tensor) -> Tensor:
        curved: Tensor = curvature @ (scale * vector)
        return scale * curved

    # The model's top eigenvector in the ball's coordinates, in both directions.
    slope = scale * gradient
    size = scale.shape[0]
    start = direction(scale, generator)
    found = lanczos(LinearOperator(product, (size, size), scale), start, max(1, budget // 3), stop=_has_top)
    values, coordinates = found.tridiagonal.ritz()
    vector = found.vectors(coordinates[:, -1:])[0]
    axis = vector / vector.norm()
    steepest = norm(slope)
    rise = radius * abs(dot(slope, axis)) + 0.5 * radius**2 * float(values[-1])
    places = [radius * axis, -radius * axis]
    spent = found.tridiagonal.size
    if steepest > 0.0:
        # The model's maximiser is the minimiser of the model turned upside down.
        flipped = LinearOperator(lambda v: -product(v), (size, size), scale)
        minimise = functools.partial(secular.ball, radius=radius)
        left = budget // 2 - spent
        space = krylov_space(flipped, -slope, minimise, residual_tolerance=_MODEL_TOLERANCE, max_products=max(1, left))
        top = minimise_in(space, -slope, minimise)
        places += [scaled_to(slope, radius), top.step]
        rise, spent = max(rise, top.decrease), spent + top.iterations
    return places, max(rise, 0.0), spent


def _has_top(tridiagonal: Tridiagonal) -> bool:
    values, coordinates = tridiagonal.ritz()
    residual = tridiagonal.betas[-1] * coordinates[-1, -1].abs()
    return bool(residual <= _AXIS_TOLERANCE * values[-1].abs())


def average(ball: Ball, samples: int, seed: int) -> SharpnessEstimate:
    """Return the mean rise over the sphere. The pair d, -d cancels the gradient's part exactly."""
    generator = torch.Generator().manual_seed(seed)
    rises: list[float] = []
    for _ in range(samples // 2):
        place = ball.radius * direction(ball.scale, generator)
        pair = 0.5 * (ball.loss_at(place) + ball.loss_at(-place)) - ball.base
        rises.append(pair if math.isfinite(pair) else math.inf)
    if math.inf in rises:
        return SharpnessEstimate(math.inf, "average", ball.radius, ball.base, None, samples, True)
    mean = math.fsum(rises) / len(rises)
    error = math.hypot(*(rise - mean for rise in rises)) / math.sqrt((len(rises) - 1) * len(rises))
    converged = error <= ball.tolerance * abs(mean)
    return SharpnessEstimate(mean, "average", ball.radius, ball.base, None, samples, converged, error)


@dataclass(frozen=True, eq=False)
class Point:
    """A displacement in the ball's coordinates with the loss there."""

    place: Tensor
    loss: float


@dataclass(frozen=True, eq=False)
class Ball:
    """The loss over the unit-metric ball: displacement = scale * place, |place| <= radius.

    Attributes:
        objective: The loss.
        scale: Size of each coordinate `(n,)`.
        radius: Radius, above zero.
        tolerance: Relative rise per iteration below which a search ends.
        base: Loss at the centre.
    """

    objective: Objective
    scale: Tensor
    radius: float
    tolerance: float
    base: float

    def loss_at(self, place: Tensor) -> float:
        """Return the loss at a place."""
        return self.objective.loss_at(self.scale * place)

    def gradient_at(self, place: Tensor) -> tuple[float, Tensor]:
        """Return the loss at a place, and its gradient in the ball's coordinates."""
        loss, gradient = self.objective.gradient_at(self.scale * place)
        return loss, self.scale * gradient

    def towards(self, displacement: Tensor) -> list[Tensor]:
        """Return the place on the sphere in a direction; none where that is zero or has another length."""
        if displacement.shape != self.scale.shape:
            return []
        place = torch.where(self.scale > 0.0, displacement / self.scale, torch.zeros_like(displacement))
        return [scaled_to(place, self.radius)] if norm(place) > 0.0 else []

    def summits(self, slope: Tensor, eigenvalues: Sequence[Eigenvalue]) -> list[Tensor]:
        """Return where the loss rises most as far as its gradient and some eigenvalues of its Hessian tell, and the
        mirror image of that place along the first eigenvector: the valley has another wall.

        Args:
            slope: Gradient `(n,)` in the ball's coordinates.
            eigenvalues: Eigenvalues with their vectors, the largest first. Directions orthogonal to these count as
                flat.
        """
        vectors = [slope, *(self.scale * e.vector for e in eigenvalues)]
        powers = [scale_of(v) for v in vectors]
        rows = torch.stack([times_power(v, -power) for v, power in zip(vectors, powers, strict=True)])
        gram = (rows @ rows.T).to("cpu", torch.float64)
        lengths = gram.diagonal().sqrt()
        kept = (lengths > 0.0).nonzero().flatten()
        if len(kept) == 0:
            return []
        # Orthonormal coordinates: the rows of `turn @ rows`.
        sizes, axes = torch.linalg.eigh((gram / lengths / lengths[:, None])[kept][:, kept])
        full = sizes > len(kept) * torch.finfo(rows.dtype).eps
        turn = torch.zeros(int(full.sum()), len(rows), dtype=torch.float64, device="cpu")
        turn[:, kept] = (axes[:, full] / sizes[full].sqrt()).T / lengths[kept]
        parts = turn @ gram
        # The maximum stays where it is if the eigenvalues are in the units that the gradient was brought to.
        own = [shifted(e.value, 2 * power - powers[0]) for e, power in zip(eigenvalues, powers[1:], strict=True)]
        values = torch.tensor(own, dtype=torch.float64, device="cpu")
        spread, frame = torch.linalg.eigh(-(parts[:, 1:] * values) @ parts[:, 1:].T)
        best = solve_ball(spread, frame, -parts[:, 0], self.radius).step
        coordinates = [best @ turn]
        if eigenvalues and float(lengths[1]) > 0.0:
            axis = parts[:, 1] / lengths[1]
            coordinates.append((best - 2.0 * (best @ axis) * axis) @ turn)
        return [rows.T @ c.to(rows.dtype).to(rows.device) for c in coordinates]

    def highest(self, starts: Sequence[Tensor], budget: int, ascents: int | None = None) -> tuple[Point, int, bool]:
        """Return the highest point that ascents from the highest starts lead to, the gradients used, and whether the
        search for it ended by itself.

        Args:
            starts: Places in the ball.
            budget: Gradients to use, shared by the ascents.
            ascents: How many ascents; None (default): one from each start.
        """
        best, used, converged = Point(torch.zeros_like(starts[0]), self.base), 0, True
        points = [Point(place, self.loss_at(place)) for place in starts]
        for point in points:
            if not math.isfinite(point.loss):
                return Point(point.place, math.inf), 0, True
        points = sorted(points, key=lambda point: point.loss, reverse=True)[:ascents]
        for index, point in enumerate(points):
            share = (budget - used) // (len(points) - index)
            end, count, ended = self._ascend(point, share)
            used += count
            if end.loss > best.loss:
                best, converged = end, ended
            if best.loss == math.inf:
                break
        return best, used, converged

    def _ascend(self, point: Point, budget: int) -> tuple[Point, int, bool]:
        """Iterate d <- radius * g(d) / |g(d)| from one start, shortened where the loss falls.

        Returns:
            The highest point, the gradients used, and whether the iteration ended by itself.
        """
        used = 0
        gradient: Tensor | None = None
        while used + 2 <= budget:
            if gradient is None:
                gradient = self.gradient_at(point.place)[1]
                used += 1
            if norm(gradient) == 0.0:
                return point, used, True
            target = scaled_to(gradient, self.radius)
            loss, ahead = self.gradient_at(target)
            used += 1
            if not math.isfinite(loss):
                return Point(target, math.inf), used, True
            moved, gradient = (Point(target, loss), ahead) if loss > point.loss else (self._damped(point, target), None)
            rise = moved.loss - point.loss
            point = moved
            if rise <= self.tolerance * max(point.loss - self.base, 0.0):
                return point, used, True
            if point.loss == math.inf:
                return point, used, True
        return point, used, False

    def _damped(self, point: Point, target: Tensor) -> Point:
        """Return the first higher point on the chord to the target, or the point itself.

        The chord stays in the ball, and the loss rises along it at first: g'(target - place) = radius |g| - g'place is
        not negative.
        """
        share = 0.5
        for _ in range(_HALVINGS):
            place = torch.lerp(point.place, target, share)
            loss = self.loss_at(place)
            if not math.isfinite(loss):
                return Point(place, math.inf)
            if loss > point.loss:
                return Point(place, loss)
            share *= 0.5
        return point


def scaled_to(v: Tensor, length: float) -> Tensor:
    """Return the vector of that length in the direction of `v`, which is not zero."""
    v = times_power(v, -scale_of(v))
    return v * (length / norm(v))
