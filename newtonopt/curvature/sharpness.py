"""How much the loss can rise near the current parameters."""

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
from newtonopt.curvature.ascent import Ball, scaled_to
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import hessian
from newtonopt.solvers import secular
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.lanczos import Tridiagonal, lanczos
from newtonopt.vectors.flat import trained_parameters
from newtonopt.vectors.random import direction
from newtonopt.vectors.scaling import dot, norm

Kind = Literal["ball", "adaptive_ball", "average"]

# Residual of the top eigenvector over its eigenvalue; the loss along it errs by the square over the relative gap.
_AXIS_TOLERANCE = 1e-4
# Residual of the quadratic model's maximiser over the gradient; the model errs by its square.
_MODEL_TOLERANCE = 1e-3


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
    step: Tensor | None = field(repr=False)
    gradients: int
    converged: bool
    standard_error: float = 0.0
    prediction: float | None = None


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
    starts: int = 0,
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

    Returns:
        The rise and how it was found.

    Raises:
        TypeError: `closure` or `params` is of another kind.
        ValueError: An argument is out of range.
        FloatingPointError: The loss or the curvature at the parameters themselves is not finite.
    """
    _check(kind, radius, tolerance, max_gradients, samples, seed, starts)
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    objective = Objective(closure, trained_parameters(params), products=products, weight=weight)
    evaluation = objective.evaluate()
    objective.check_replay(evaluation)
    ball = ball_around(objective, kind, radius, tolerance, float(evaluation.loss))
    generator = torch.Generator().manual_seed(seed)
    if kind != "average":
        places, prediction, spent = _second_order(
            hessian(evaluation), evaluation.gradient, ball, max_gradients, generator
        )
        places += [radius * direction(objective.point, generator) for _ in range(starts)]
    evaluation.free()
    if kind == "average":
        return average(ball, samples, seed)
    found = ascent(ball, kind, places, max_gradients - spent)
    return replace(found, gradients=spent + found.gradients, prediction=prediction)


def ball_around(objective: Objective, kind: Kind, radius: float, tolerance: float, base: float) -> Ball:
    """The neighbourhood of that kind.

    Raises:
        FloatingPointError: The loss at the point itself is not finite.
    """
    if not math.isfinite(base):
        raise FloatingPointError(
            f"the loss at the parameters is {base}, so no rise above it is defined; check the data and the model."
        )
    scale = objective.point.abs() if kind == "adaptive_ball" else torch.ones_like(objective.point)
    return Ball(objective, scale, radius, tolerance, base)


def ascent(ball: Ball, kind: Kind, places: Sequence[Tensor], budget: int, ascents: int | None = None) -> Sharpness:
    """The highest point that ascents from the highest places lead to: from all of them if `ascents` is None."""
    best, used, converged = ball.highest(places, budget, ascents)
    return Sharpness(best.loss - ball.base, kind, ball.radius, ball.base, ball.scale * best.place, used, converged)


def _check(
    kind: str, radius: float, tolerance: float, max_gradients: int, samples: int, seed: int, starts: int
) -> None:
    check_choice("kind", kind, get_args(Kind))
    check_positive("radius", radius)
    check_share("tolerance", tolerance)
    for name, count, least in (
        ("max_gradients", max_gradients, 4),
        ("samples", samples, 4),
        ("starts", starts, 0),
    ):
        check_whole(name, count, least)
    check_seed(seed)
    if samples % 2:
        raise ValueError(f"samples must be even and at least 4, got {samples!r}.")


def _second_order(
    curvature: LinearOperator, gradient: Tensor, ball: Ball, budget: int, generator: torch.Generator
) -> tuple[list[Tensor], float, int]:
    """Where the quadratic model rises most in the ball, its largest rise, and the products used, at most half."""
    scale, radius = ball.scale, ball.radius

    def product(vector: Tensor) -> Tensor:
        curved: Tensor = curvature @ (scale * vector)
        return scale * curved

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


def average(ball: Ball, samples: int, seed: int) -> Sharpness:
    """Mean rise over the sphere; the pair d, -d cancels the gradient's part exactly."""
    generator = torch.Generator().manual_seed(seed)
    rises: list[float] = []
    for _ in range(samples // 2):
        place = ball.radius * direction(ball.scale, generator)
        pair = 0.5 * (ball.loss_at(place) + ball.loss_at(-place)) - ball.base
        rises.append(pair if math.isfinite(pair) else math.inf)
    if math.inf in rises:
        return Sharpness(math.inf, "average", ball.radius, ball.base, None, samples, True)
    mean = math.fsum(rises) / len(rises)
    error = math.hypot(*(rise - mean for rise in rises)) / math.sqrt((len(rises) - 1) * len(rises))
    converged = error <= ball.tolerance * abs(mean)
    return Sharpness(mean, "average", ball.radius, ball.base, None, samples, converged, error)
