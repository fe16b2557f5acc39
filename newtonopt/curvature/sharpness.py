"""How much the loss can rise near the current parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from newtonopt._checks import check_closure, check_products, check_weight, check_whole
from newtonopt._flat import trained_parameters
from newtonopt.evaluation import Products
from newtonopt.linear_operator import LinearOperator
from newtonopt.objective import Objective
from newtonopt.operators import hessian
from newtonopt.solvers import secular
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.lanczos import Tridiagonal, lanczos

Kind = Literal["ball", "adaptive_ball", "average"]

# Residual of the top eigenvector over its eigenvalue; the loss along it errs by the square over the relative gap.
_AXIS_TOLERANCE = 1e-4
# Residual of the quadratic model's maximiser over the gradient; the model errs by its square.
_MODEL_TOLERANCE = 1e-3
# Steps are damped down to 2^-10 before a point counts as a maximiser along its ascent direction.
_HALVINGS = 10


@dataclass(frozen=True, eq=False)
class Sharpness:
    """Rise of the loss around a point.

    Attributes:
        value: The rise: the largest one found, or the mean; infinite where the loss was not finite within the radius.
        kind: What was measured.
        radius: In the units of `kind`.
        loss: At the point itself.
        step: The displacement `(n,)` that attains the value; None for an average.
        gradients: Gradients and Hessian products used; losses, for an average.
        converged: Whether the search ended by itself. For an average: whether the standard error is at most
            `tolerance * |value|`.
        standard_error: Of an average, over the sample; else zero.
        prediction: The largest rise of the quadratic model in the same ball; None for an average.
    """

    value: float
    kind: Kind
    radius: float
    loss: float
    step: Tensor | None
    gradients: int
    converged: bool
    standard_error: float = 0.0
    prediction: float | None = None


@dataclass(frozen=True, eq=False)
class _Point:
    """A displacement in ball coordinates with the loss there."""

    place: Tensor
    loss: float


@dataclass(frozen=True, eq=False)
class _Search:
    """The loss over the unit-metric ball: displacement = scale * place."""

    objective: Objective
    scale: Tensor
    radius: float
    tolerance: float
    base: float

    def loss_at(self, place: Tensor) -> float:
        return self.objective.loss_at(self.scale * place)

    def gradient_at(self, place: Tensor) -> tuple[float, Tensor]:
        loss, gradient = self.objective.gradient_at(self.scale * place)
        return loss, self.scale * gradient


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
    starts: int = 0,
    start: Tensor | None = None,
) -> Sharpness:
    """The largest L(theta + d) - L(theta) over ||d|| <= radius, and two relatives.

    - "ball": as above. At a minimum it tends to radius^2 lambda_max / 2 for small radii.
    - "adaptive_ball": the ball ||d / |theta| || <= radius, invariant to rescalings of the parameters (Kwon et al. 2021,
      arXiv 2102.11600). Entries of theta that are zero stay zero.
    - "average": the mean over the sphere ||d|| = radius, in antithetic pairs; near a minimum radius^2 trace / (2 n).

    The maximum is sought by d <- radius * g(d) / |g(d)|, which never lowers a convex loss (Journee, Nesterov, Richtarik
    & Sepulchre 2010, alg. 1); where the loss falls, by a shorter way along the chord, which always ascends at first.
    Starts are the gradient, both signs of the Hessian's top eigenvector, the quadratic model's maximiser in the ball
    (Gould, Lucidi, Roma & Toint 1999) and random points. The value is a lower bound of the true maximum, never below
    the loss at these starts and never below zero.

    Not for comparing models that were trained differently: its relation to generalisation is weak (Andriushchenko et
    al. 2023). In float32 a rise below 1e-7 of the loss is lost in rounding. Parameters, random state and buffers are
    as before afterwards.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters; those without `requires_grad` are left alone.
        kind: Which neighbourhood.
        radius: Positive. 0.05 is that of sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412).
        tolerance: Relative rise per iteration below which a search ends, in (0, 1).
        max_gradients: Budget of gradients and Hessian products together, at least 4; unused for "average".
        samples: Losses for "average", an even number, at least 4.
        seed: Of the random vectors; the global random state is left alone.
        products: How Hessian products are formed, as for `evaluate`.
        weight: Of this process in the mean over several, as for `evaluate`.
        starts: How many random points on the sphere to start from beside the others, >= 0; unused for "average".
            Default zero: on networks they found nothing higher, for about five gradients each.
        start: A displacement `(n,)`, such as the last measurement's `step`, to scale to the radius and search from
            alone: the maximum is followed for three gradients or so while it moves slowly. A higher one elsewhere may
            be missed. None (default): the starts above. Unused for "average".

    Returns:
        The rise and how it was found.

    Raises:
        ValueError: An argument is out of range.
        FloatingPointError: The loss or the curvature at the parameters themselves is not finite.
    """
    _check(kind, radius, tolerance, max_gradients, samples, starts)
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    objective = Objective(closure, trained_parameters(params), products=products, weight=weight)
    if start is not None and kind != "average":
        return _followed(objective, kind, radius, tolerance, max_gradients, start)
    evaluation = objective.evaluate()
    search = _search(objective, kind, radius, tolerance, float(evaluation.loss))
    scale, base = search.scale, search.base
    if kind == "average":
        evaluation.free()
        objective.check_replay(evaluation)
        return _average(search, samples, seed)
    generator = torch.Generator().manual_seed(seed)
    places, prediction, spent = _second_order(
        hessian(evaluation), evaluation.gradient, search, max_gradients, generator
    )
    evaluation.free()
    objective.check_replay(evaluation)
    places += [radius * _sphere(scale.shape[0], generator, scale) for _ in range(starts)]
    best, used, converged = _best(search, places, max_gradients - spent)
    value, step = best.loss - base, scale * best.place
    return Sharpness(value, kind, radius, base, step, spent + used, converged, 0.0, prediction)


def _search(objective: Objective, kind: Kind, radius: float, tolerance: float, base: float) -> _Search:
    if not math.isfinite(base):
        raise FloatingPointError(
            f"the loss at the parameters is {base}, so no rise above it is defined; check the data and the model"
        )
    scale = objective.point.abs() if kind == "adaptive_ball" else torch.ones_like(objective.point)
    return _Search(objective, scale, radius, tolerance, base)


def _followed(
    objective: Objective, kind: Kind, radius: float, tolerance: float, budget: int, start: Tensor
) -> Sharpness:
    """The maximum that is reached from one start."""
    if start.shape != objective.point.shape:
        raise ValueError(
            f"start has shape {tuple(start.shape)}, and the parameters have {objective.point.shape[0]} entries: give a "
            "flat vector of that length"
        )
    search = _search(objective, kind, radius, tolerance, objective.loss_at(torch.zeros_like(objective.point)))
    place = torch.where(search.scale > 0.0, start / search.scale, torch.zeros_like(start))
    norm = float(place.norm())
    if norm == 0.0:
        raise ValueError("start is zero: give a displacement that tells a direction")
    best, used, converged = _best(search, [place * (radius / norm)], budget)
    return Sharpness(best.loss - search.base, kind, radius, search.base, search.scale * best.place, used, converged)


def _check(kind: str, radius: float, tolerance: float, max_gradients: int, samples: int, starts: int) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not isinstance(radius, (int, float)) or not 0.0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius!r}")
    if not isinstance(tolerance, (int, float)) or not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance!r}")
    if not isinstance(max_gradients, int) or max_gradients < 4:
        raise ValueError(f"max_gradients must be a whole number and at least 4, got {max_gradients!r}")
    if not isinstance(samples, int) or samples < 4 or samples % 2:
        raise ValueError(f"samples must be even and at least 4, got {samples!r}")
    check_whole("starts", starts, 0)


def _sphere(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """A random unit vector, the same on every device and every rank."""
    vector = like.new_empty(size, dtype=torch.float64, device="cpu").normal_(generator=generator)
    unit: Tensor = vector / vector.norm()
    return unit.to(like.dtype).to(like.device)


def _second_order(
    curvature: LinearOperator, gradient: Tensor, search: _Search, budget: int, generator: torch.Generator
) -> tuple[list[Tensor], float, int]:
    """Where the quadratic model rises most in the ball, its largest rise, and the products used, at most half."""
    scale, radius = search.scale, search.radius

    def product(vector: Tensor) -> Tensor:
        curved: Tensor = curvature @ (scale * vector)
        return scale * curved

    slope = scale * gradient
    size = scale.shape[0]
    start = _sphere(size, generator, scale)
    found = lanczos(LinearOperator(product, (size, size), scale), start, max(1, budget // 3), stop=_has_top)
    values, coordinates = found.tridiagonal.ritz()
    vector = found.vectors(coordinates[:, -1:])[0]
    axis = vector / vector.norm()
    norm = float(slope.norm())
    rise = radius * abs(float(slope @ axis)) + 0.5 * radius**2 * float(values[-1])
    places = [radius * axis, -radius * axis]
    spent = found.tridiagonal.size
    if norm > 0.0:
        flipped = LinearOperator(lambda v: -product(v), (size, size), scale)
        minimise = functools.partial(secular.ball, radius=radius)
        left = budget // 2 - spent
        space = krylov_space(flipped, -slope, minimise, residual_tolerance=_MODEL_TOLERANCE, max_products=max(1, left))
        top = minimise_in(space, -slope, minimise)
        places += [slope * (radius / norm), top.step]
        rise, spent = max(rise, top.decrease), spent + top.iterations
    return places, max(rise, 0.0), spent


def _has_top(tridiagonal: Tridiagonal) -> bool:
    values, coordinates = tridiagonal.ritz()
    residual = tridiagonal.betas[-1] * coordinates[-1, -1].abs()
    return bool(residual <= _AXIS_TOLERANCE * values[-1].abs())


def _best(search: _Search, starts: list[Tensor], budget: int) -> tuple[_Point, int, bool]:
    """The highest point over all starts, the gradients used, and whether its search ended by itself."""
    zero = _Point(torch.zeros_like(starts[0]), search.base)
    best, used, converged = zero, 0, True
    points = [_Point(place, search.loss_at(place)) for place in starts]
    finite = [point for point in points if math.isfinite(point.loss)]
    if len(finite) < len(points):
        lost = next(point for point in points if not math.isfinite(point.loss))
        return _Point(lost.place, math.inf), 0, True
    for index, point in enumerate(sorted(finite, key=lambda point: point.loss, reverse=True)):
        share = (budget - used) // (len(finite) - index)
        end, count, ended = _ascend(search, point, share)
        used += count
        if end.loss > best.loss:
            best, converged = end, ended
        if best.loss == math.inf:
            break
    return best, used, converged


def _ascend(search: _Search, point: _Point, budget: int) -> tuple[_Point, int, bool]:
    """The linearised maximiser from one start: highest point, gradients used, whether it ended by itself."""
    used = 0
    gradient: Tensor | None = None
    while used + 2 <= budget:
        if gradient is None:
            gradient = search.gradient_at(point.place)[1]
            used += 1
        norm = float(gradient.norm())
        if norm == 0.0:
            return point, used, True
        target = gradient * (search.radius / norm)
        loss, ahead = search.gradient_at(target)
        used += 1
        if not math.isfinite(loss):
            return _Point(target, math.inf), used, True
        moved, gradient = (_Point(target, loss), ahead) if loss > point.loss else (_damped(search, point, target), None)
        rise = moved.loss - point.loss
        point = moved
        if rise <= search.tolerance * max(point.loss - search.base, 0.0):
            return point, used, True
        if point.loss == math.inf:
            return point, used, True
    return point, used, False


def _damped(search: _Search, point: _Point, target: Tensor) -> _Point:
    """The first higher point on the chord to the target, or the point itself.

    The chord stays in the ball, and the loss rises along it at first: g'(target - place) = radius |g| - g'place >= 0.
    """
    share = 0.5
    for _ in range(_HALVINGS):
        place = torch.lerp(point.place, target, share)
        loss = search.loss_at(place)
        if not math.isfinite(loss):
            return _Point(place, math.inf)
        if loss > point.loss:
            return _Point(place, loss)
        share *= 0.5
    return point


def _average(search: _Search, samples: int, seed: int) -> Sharpness:
    """Mean rise over the sphere; the pair d, -d cancels the gradient's part exactly."""
    generator = torch.Generator().manual_seed(seed)
    rises: list[float] = []
    for _ in range(samples // 2):
        place = search.radius * _sphere(search.scale.shape[0], generator, search.scale)
        pair = 0.5 * (search.loss_at(place) + search.loss_at(-place)) - search.base
        rises.append(pair if math.isfinite(pair) else math.inf)
    if math.inf in rises:
        return Sharpness(math.inf, "average", search.radius, search.base, None, samples, True)
    mean = math.fsum(rises) / len(rises)
    variance = math.fsum((rise - mean) ** 2 for rise in rises) / (len(rises) - 1)
    error = math.sqrt(variance / len(rises))
    converged = error <= search.tolerance * abs(mean)
    return Sharpness(mean, "average", search.radius, search.base, None, samples, converged, error)
