"""Preconditioned conjugate gradients, with a radius: Steihaug's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from newtonopt.solvers.solution import Iterate, Matrix, Solution
from newtonopt.vectors.scaling import InRange, dot, norm, scale_of, shifted, times_power

# Martens 2010, sec. 4.6: iterates are kept for backtracking at indices that grow by this factor.
_PATH_FACTOR = 1.3


def conjugate_gradients(
    A: Matrix,
    gradient: Tensor,
    *,
    start: Tensor | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    radius: float = math.inf,
    max_iterations: int | None = None,
    progress_tolerance: float | None = None,
    residual_tolerance: float | None = None,
    rounding: float = 0.0,
    keep_path: bool = False,
) -> Solution:
    """Minimise `m(s) = g's + s'As / 2` by conjugate gradients, in the ball `||s|| <= radius`.

    With a radius this is Steihaug's method (Nocedal & Wright 2006, alg. 7.2). The norm is that of the preconditioner,
    `s'Ms` with `M` the matrix whose inverse the preconditioner applies, in which the iterates grow (Conn, Gould & Toint
    2000, sec. 7.5).

    Args:
        A: The symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`.
        start: The first iterate, `(n,)`; zero if None. Needs an infinite radius.
        preconditioner: Applies the inverse of a positive definite matrix near `A`.
        radius: Of the ball, positive.
        max_iterations: At most so many products; `n` if None.
        progress_tolerance: Martens' stop: end when the relative progress over the last `k = max(10, i / 10)` of `i`
            iterations is below `k` times this (Martens 2010, sec. 4.4, uses 5e-4).
        residual_tolerance: End when the residual's norm is at most this times the gradient's (see `forcing_sequence`).
        rounding: Curvature `|d'Ad| / |d|^2` of at most this times the largest `|Ad| / |d|` met counts as zero: a step
            by the rounding of products could have any length. With a radius the step along such a direction is as long
            as that much curvature would make it.
        keep_path: Keep the iterates on a growing grid, for backtracking.

    Returns:
        The solution; on curvature of zero or below the last iterate and the direction, or the boundary point along it
        if the radius is finite.

    Raises:
        ValueError: A radius that is not positive, or a start together with a finite radius.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}. Write math.inf for no bound.")
    if start is not None and math.isfinite(radius):
        raise ValueError(f"start must be None for a finite radius, with which Steihaug starts at zero, got {radius!r}.")
    limit = gradient.numel() if max_iterations is None else max_iterations
    # With g = 2^p g' and A = 2^a A' of ordinary size the minimiser is s = 2^(p - a) s'.
    matrix, power = InRange(A), scale_of(gradient)
    stop = _Stop(progress_tolerance, residual_tolerance, torch.finfo(gradient.dtype).eps, rounding)
    scaled = times_power(gradient, -power)
    return _back(_iterate(matrix, scaled, power, start, preconditioner, radius, limit, stop, keep_path), power, matrix)


def _back(solution: Solution, power: int, matrix: InRange) -> Solution:
    """Return the solution in the units of the caller's gradient and matrix."""
    far = power - matrix.exponent
    if not (power or matrix.exponent):
        return solution
    path = [Iterate(times_power(i.step, far), shifted(i.decrease, power + far)) for i in solution.path]
    return replace(
        solution,
        step=times_power(solution.step, far),
        decrease=shifted(solution.decrease, power + far),
        path=tuple(path),
        bend=matrix.back(solution.bend),
    )


def shortened(solution: Solution, gradient: Tensor, radius: float) -> Solution:
    """The point at `radius` on the polygon through the iterates kept from zero on: Steihaug's again, for no product.

    An iterate is the minimiser over its Krylov space, and each later search direction is conjugate to that space: with
    `p` the iterate before and `d` the way to the next one kept, `p'Ad = 0`, so that decreases alone tell `d'Ad`.

    Args:
        solution: From `conjugate_gradients` without preconditioner and start, with its path kept.
        gradient: `g`, `(n,)`.
        radius: Positive; the solution itself if that is no longer.

    Returns:
        The point and the model's decrease there.
    """
    before, far = Iterate(torch.zeros_like(gradient), 0.0), math.frexp(radius)[1]
    for node in (*solution.path, Iterate(solution.step, solution.decrease)):
        if norm(node.step) > radius:
            d = node.step - before.step
            slope = dot(gradient, d)
            bend = 2 * (before.decrease - node.decrease - slope)
            # In units of the radius.
            place, way = times_power(before.step, -far), times_power(d, -far)
            t = _to_boundary(dot(place, place), dot(place, way), dot(way, way), shifted(radius, -far))
            point = Iterate(before.step + t * d, before.decrease - t * slope - t * t * bend / 2)
            # Negative curvature may have been followed backwards, at first uphill.
            best = max(point, before, key=lambda iterate: iterate.decrease)
            return Solution(best.step, best.decrease, solution.iterations, f"{solution.reason}, shortened")
        before = node
    return solution


def forcing_sequence(gradient_norm: float) -> float:
    """The residual tolerance `min(1/2, sqrt(|g|))` of an inexact Newton step (Nocedal & Wright 2006, alg. 7.1)."""
    return min(0.5, math.sqrt(gradient_norm))


def _iterate(
    A: InRange,
    g: Tensor,
    power: int,
    start: Tensor | None,
    preconditioner: Callable[[Tensor], Tensor] | None,
    radius: float,
    limit: int,
    stop: _Stop,
    keep_path: bool,
) -> Solution:
    apply = preconditioner if preconditioner is not None else _identity
    if start is None:
        s, r = torch.zeros_like(g), -g
    else:
        image = A @ start
        A.settle()
        s, r = times_power(start, A.exponent - power), -g - times_power(image, A.exponent - power)
    y = apply(r)
    d = y.clone()
    rho = r @ y
    decrease, rho_now, r_norm = torch.stack([(s @ r - s @ g) / 2, rho, r.norm()]).tolist()
    stop.begin(decrease, float(g.norm()))
    path = [Iterate(s, decrease)] if keep_path and start is not None else []
    size, along, length = 0.0, 0.0, rho_now  # |s|^2, (s, d) and |d|^2 in the preconditioner's norm, by recurrence
    mark = 1.0
    iteration = 0
    reason = "zero residual" if r_norm == 0.0 else "iteration limit"
    while iteration < limit and r_norm > 0.0:
        Ad = A @ d
        reach = shifted(radius, A.exponent - power)
        curvature = d @ Ad
        alpha = rho / curvature
        lengths = [d.norm(), Ad.norm()] if stop.rounding else []
        # Without temporaries: with many parameters memory is what limits.
        s_new, r_new = torch.addcmul(s, alpha, d), torch.addcmul(r, alpha, Ad, value=-1)
        del Ad
        y = apply(r_new)
        rho_new = r_new @ y
        # The one wait for the device in an iteration.
        values = [curvature, alpha, (s_new @ r_new - s_new @ g) / 2, rho_new, r_new.norm(), *lengths]
        bend, alpha_now, decrease_new, rho_next, r_norm, *sizes = torch.stack(values).tolist()
        iteration += 1
        if not math.isfinite(bend):
            return Solution(s, decrease, iteration, "non-finite product", tuple(path), is_finite=False)
        if sizes and stop.is_rounding(bend, *sizes):
            path += [Iterate(s, decrease)] * keep_path
            if math.isfinite(reach) and stop.floor > 0.0:
                tau = min(_to_boundary(size, along, length, reach), rho_now / (stop.floor * sizes[0] ** 2))
                return Solution(s + tau * d, decrease + tau * rho_now, iteration, "no curvature", tuple(path))
            bend = 0.0
        elif bend <= 0.0:
            path += [Iterate(s, decrease)] * keep_path
        if bend <= 0.0:
            return _negative_curvature(g, s, d, decrease, rho_now, bend, reach, (size, along, length), iteration, path)
        size_new = size + 2 * alpha_now * along + alpha_now * alpha_now * length
        if math.isfinite(reach) and math.sqrt(max(size_new, 0.0)) >= reach:
            tau = _to_boundary(size, along, length, reach)
            gain = tau * rho_now - tau * tau * bend / 2
            path += [Iterate(s, decrease)] * keep_path
            return Solution(s + tau * d, decrease + gain, iteration, "reached the radius", tuple(path))
        s, r, decrease, size = s_new, r_new, decrease_new, size_new
        if keep_path and iteration >= mark:
            path.append(Iterate(s, decrease))
            mark = max(iteration + 1, mark * _PATH_FACTOR)
        ended = stop.check(iteration, decrease, r_norm)
        if ended or rho_next <= 0.0:
            reason = ended or "rounding: the residual is as small as the products are exact"
            break
        ratio = rho_next / rho_now
        along, length = ratio * (along + alpha_now * length), rho_next + ratio * ratio * length
        d = y + (rho_new / rho) * d
        rho, rho_now = rho_new, rho_next
    return Solution(s, decrease, iteration, reason, tuple(path))


def _negative_curvature(
    g: Tensor,
    s: Tensor,
    d: Tensor,
    decrease: float,
    rho: float,
    bend: float,
    radius: float,
    norms: tuple[float, float, float],
    iteration: int,
    path: list[Iterate],
) -> Solution:
    if math.isfinite(radius):
        # The model falls without end both ways along d: go to the lower of the two points on the boundary.
        _, along, length = norms
        ahead = _to_boundary(*norms, radius)
        gain, tau = max((t * rho - t * t * bend / 2, t) for t in (ahead, -ahead - 2 * along / length))
        s, decrease = s + tau * d, decrease + gain
    if float(g @ d) > 0.0:  # possible after a start of the caller's
        d = -d
    reason = "negative curvature" if bend < 0.0 else "no curvature"
    return Solution(s, decrease, iteration, reason, tuple(path), negative_curvature=d, bend=bend)


def _to_boundary(size: float, along: float, length: float, radius: float) -> float:
    """The positive root t of |s + t d| = radius."""
    # By square roots: the squares may overflow.
    inside, norm = math.sqrt(max(size, 0.0)), math.sqrt(length)
    reach = math.sqrt(max(radius - inside, 0.0)) * math.sqrt(radius + inside)
    root = math.hypot(along, norm * reach)
    # Of the two forms of the root, the one without cancellation.
    return reach * (reach / (along + root)) if along > 0 else (root - along) / length


def _identity(v: Tensor) -> Tensor:
    return v


class _Stop:
    """The tests for ending, with the history that they need."""

    def __init__(self, progress: float | None, residual: float | None, eps: float, rounding: float) -> None:
        self._progress = progress
        # Below this the residual, and with it any curvature seen, is rounding.
        self._floor = 10 * eps
        self._residual = residual
        self._decreases: list[float] = []
        self._target = 0.0
        self.rounding = rounding
        self.floor = 0.0  # curvature below this is rounding

    def begin(self, decrease: float, gradient_norm: float) -> None:
        self._decreases = [decrease]
        self._target = max(self._residual or 0.0, self._floor) * gradient_norm

    def is_rounding(self, bend: float, length: float, product: float) -> bool:
        if not math.isfinite(product):
            return False  # squares that overflow say nothing
        self.floor = max(self.floor, self.rounding * product / length)
        return abs(bend) / length <= self.floor * length

    def check(self, iteration: int, decrease: float, residual_norm: float) -> str | None:
        self._decreases.append(decrease)
        if residual_norm <= self._target:
            return "residual tolerance reached"
        back = max(10, iteration // 10)
        if self._progress and iteration > back and decrease > 0:
            gained = decrease - self._decreases[iteration - back]
            if gained < back * self._progress * decrease:
                return "progress below tolerance"
        return None
