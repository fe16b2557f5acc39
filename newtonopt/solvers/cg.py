"""Conjugate gradients (Hestenes & Stiefel 1952), also in a ball (Steihaug 1983).

`conjugate_gradients` brings matrix and gradient to ordinary size, `_iterate` is the algorithm. It differs from the
textbook (Nocedal & Wright 2006, alg. 5.3 and 7.2) in this:

1. Residuals have the other sign: `r = -(g + As)`, minus the gradient of the model, points downhill.
2. The model's decrease `-m(s) = (s'r - s'g) / 2` is tracked: it costs no product, and Martens' stop looks at it.
3. With a preconditioner the ball is round in the preconditioner's norm, which recurrences give without a product
   (Conn, Gould & Toint 2000, sec. 7.5).
4. Without a ball, a direction of negative curvature ends the iteration and is returned.
5. Curvature within the rounding of the products counts as zero.
6. Iterates are kept at growing intervals for backtracking (Martens 2010, sec. 4.6).
7. One iteration waits once for the device: step lengths stay there, and all numbers that decide come back together.
8. Powers of two keep squares within the range of the dtype (`vectors.scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newtonopt.solvers.solution import Iterate, Solution
from newtonopt.vectors.scaling import InRange, Matrix, dot, norm, scale_of, shifted, times_power

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
    """Minimise `m(s) = g's + s'As / 2` by conjugate gradients, in the ball `|s| <= radius` by Steihaug's method.

    With a preconditioner the ball is `sqrt(s'Ms) <= radius`: `M` is the matrix whose inverse the preconditioner
    applies.

    Args:
        A: Symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`.
        start: First iterate, `(n,)`; None for zero. Needs an infinite radius.
        preconditioner: Function that applies the inverse of a positive definite matrix near `A`.
        radius: Radius of the ball, positive; infinite for no ball.
        max_iterations: Largest number of products; None for `n`.
        progress_tolerance: Martens' stop: end when the relative progress over the last `k = max(10, i / 10)` of `i`
            iterations is below `k` times this (Martens 2010, sec. 4.4, uses 5e-4).
        residual_tolerance: End when the residual's norm is at most this times the gradient's (see `forcing_sequence`).
        rounding: Curvature `|d'Ad| / |d|^2` of at most this times the largest `|Ad| / |d|` met counts as zero, because
            a step divided by rounding could have any length. In a ball the step along such a direction is as long as
            that much curvature would make it.
        keep_path: Whether to keep iterates at growing intervals, for backtracking.

    Returns:
        The solution. Where curvature is zero or negative, without a ball: the last iterate, and the direction. In a
        ball: the point on its boundary along that direction.

    Raises:
        ValueError: The radius is not positive, or a start is given with a finite radius.

    Example:
        >>> import torch
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> g = torch.tensor([-1.0, -2.0], dtype=torch.float64)
        >>> solution = conjugate_gradients(A, g)
        >>> solution.step.round(decimals=4).tolist()  # 1 / 11 and 7 / 11
        [0.0909, 0.6364]
        >>> solution.iterations
        2
        >>> round(float(conjugate_gradients(A, g, radius=0.5).step.norm()), 4)
        0.5
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}. Write math.inf for no bound.")
    if start is not None and math.isfinite(radius):
        raise ValueError(
            f"start must be None for a finite radius, because Steihaug's method starts at zero, got radius={radius!r}."
        )
    limit = gradient.numel() if max_iterations is None else max_iterations
    # Let g = 2^p g' and A = 2^a A' with g' and A' of ordinary size: the minimiser is s = 2^(p - a) s'.
    matrix, power = InRange(A), scale_of(gradient)
    scaled = times_power(gradient, -power)
    # A residual below the rounding of the products, and any curvature seen from there, is noise.
    least = max(residual_tolerance or 0.0, 10 * torch.finfo(gradient.dtype).eps)
    stop = _Stop(progress_tolerance, least * float(scaled.norm()), rounding)
    return _back(_iterate(matrix, scaled, power, start, preconditioner, radius, limit, stop, keep_path), power, matrix)


def forcing_sequence(gradient_norm: float) -> float:
    """Return the residual tolerance `min(1/2, sqrt(|g|))` of an inexact Newton step (Nocedal & Wright 2006, alg. 7.1).

    With this tolerance Newton's method converges superlinearly.
    """
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
    """Minimise the scaled model. `start` and `radius` are in the caller's units, `2^(power - A.exponent)` times ours.

    `A` finds its exponent in the first product.
    """
    apply = preconditioner if preconditioner is not None else _identity
    # The first residual, r = -(g + As).
    if start is None:
        s, r = torch.zeros_like(g), -g
    else:
        image = A @ start
        A.settle()
        s, r = times_power(start, A.exponent - power), -g - times_power(image, A.exponent - power)
    # The first direction is the preconditioned residual y = M^-1 r; rho = r'y is minus the model's slope along it.
    y = apply(r)
    d = y.clone()
    rho = r @ y
    decrease, slope, r_norm = torch.stack([(s @ r - s @ g) / 2, rho, r.norm()]).tolist()
    norms = _Norms(0.0, 0.0, slope)  # d'Md = y'My = r'y
    decreases = [decrease]
    path = [Iterate(s, decrease)] if keep_path and start is not None else []
    mark, floor = 1.0, 0.0
    iteration = 0
    reason = "zero residual" if r_norm == 0.0 else "iteration limit"
    while iteration < limit and r_norm > 0.0:
        Ad = A @ d
        reach = shifted(radius, A.exponent - power)
        # The minimiser along d, at alpha = r'y / d'Ad, and the residual there, r - alpha Ad.
        curvature = d @ Ad
        alpha = rho / curvature
        lengths = [d.norm(), Ad.norm()] if stop.rounding else []
        # Without temporaries, because memory is what limits with many parameters.
        s_new, r_new = torch.addcmul(s, alpha, d), torch.addcmul(r, alpha, Ad, value=-1)
        del Ad
        y = apply(r_new)
        rho_new = r_new @ y
        # The one wait for the device in an iteration.
        values = [curvature, alpha, (s_new @ r_new - s_new @ g) / 2, rho_new, r_new.norm(), *lengths]
        bend, step_size, decrease_new, slope_new, r_norm, *sizes = torch.stack(values).tolist()
        iteration += 1
        if not math.isfinite(bend):
            return Solution(s, decrease, iteration, "non-finite product", tuple(path), is_finite=False)

        # Curvature within rounding: at most `rounding` times the largest |Ad| / |d| met. Squares that overflow tell
        # nothing.
        if sizes and math.isfinite(sizes[1]):
            floor = max(floor, stop.rounding * sizes[1] / sizes[0])
            if abs(bend) / sizes[0] <= floor * sizes[0]:
                if math.isfinite(reach) and floor > 0.0:
                    # The minimiser with that much curvature, at r'y / (floor |d|^2), but not past the boundary.
                    tau = min(norms.to_boundary(reach), slope / (floor * sizes[0] ** 2))
                    path += [Iterate(s, decrease)] * keep_path
                    return Solution(s + tau * d, decrease + tau * slope, iteration, "no curvature", tuple(path))
                bend = 0.0

        # Negative curvature: the model falls without end both ways along d.
        if bend <= 0.0:
            path += [Iterate(s, decrease)] * keep_path
            if math.isfinite(reach):
                # The lower one of the two points on the boundary: -m(s + t d) = -m(s) + t r'y - t^2 d'Ad / 2.
                gain, tau = max((t * slope - t * t * bend / 2, t) for t in norms.both_boundaries(reach))
                s, decrease = s + tau * d, decrease + gain
            if float(g @ d) > 0.0:  # possible after a start of the caller's
                d = -d
            reason = "negative curvature" if bend < 0.0 else "no curvature"
            return Solution(s, decrease, iteration, reason, tuple(path), negative_curvature=d, bend=bend)

        # The minimiser along d lies outside of the ball: end where d leaves it (Steihaug).
        if math.isfinite(reach) and norms.at(step_size) >= reach:
            tau = norms.to_boundary(reach)
            gain = tau * slope - tau * tau * bend / 2
            path += [Iterate(s, decrease)] * keep_path
            return Solution(s + tau * d, decrease + gain, iteration, "reached the radius", tuple(path))

        s, r, decrease = s_new, r_new, decrease_new
        if keep_path and iteration >= mark:
            path.append(Iterate(s, decrease))
            mark = max(iteration + 1, mark * _PATH_FACTOR)
        decreases.append(decrease)
        ended = stop.reason(decreases, r_norm)
        if ended or slope_new <= 0.0:
            reason = ended or "rounding: the residual is as small as the products are exact"
            break

        # The next direction is conjugate to all before it: d = y + beta d with beta = r_new'y_new / r'y.
        norms = norms.turned(step_size, slope_new, slope_new / slope)
        d = y + (rho_new / rho) * d
        rho, slope = rho_new, slope_new
    return Solution(s, decrease, iteration, reason, tuple(path))


def _identity(v: Tensor) -> Tensor:
    return v


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


@dataclass(frozen=True)
class _Norms:
    """Squares in the preconditioner's norm on the line `s + t d`, known by recurrence.

    Attributes:
        square: `s'Ms`.
        along: `s'Md`.
        length: `d'Md`.
    """

    square: float
    along: float
    length: float

    def at(self, t: float) -> float:
        """Return the norm of `s + t d`."""
        return math.sqrt(max(self._square_at(t), 0.0))

    def turned(self, t: float, slope: float, ratio: float) -> _Norms:
        """Return the norms on the next line, `s + t d` and the direction `y + ratio d` with `y'My = slope`.

        `y` is `M`-orthogonal to the iterates and directions before it, for `My` is the residual there.
        """
        along = ratio * (self.along + t * self.length)
        return _Norms(self._square_at(t), along, slope + ratio * ratio * self.length)

    def _square_at(self, t: float) -> float:
        return self.square + 2 * t * self.along + t * t * self.length

    def to_boundary(self, radius: float) -> float:
        """Return the positive root t of |s + t d| = radius."""
        # By square roots: the squares may overflow.
        inside, norm = math.sqrt(max(self.square, 0.0)), math.sqrt(self.length)
        reach = math.sqrt(max(radius - inside, 0.0)) * math.sqrt(radius + inside)
        root = math.hypot(self.along, norm * reach)
        # There are two forms of the root; this is the one without cancellation.
        return reach * (reach / (self.along + root)) if self.along > 0 else (root - self.along) / self.length

    def both_boundaries(self, radius: float) -> tuple[float, float]:
        """Return the positive and the negative root t of |s + t d| = radius."""
        ahead = self.to_boundary(radius)
        return ahead, -ahead - 2 * self.along / self.length


@dataclass(frozen=True)
class _Stop:
    """When to end.

    Attributes:
        progress: Martens' tolerance on relative progress per iteration; None for no such stop.
        residual: Largest norm of the residual that is small enough.
        rounding: Curvature relative to the products' size that counts as zero.
    """

    progress: float | None
    residual: float
    rounding: float

    def reason(self, decreases: list[float], residual_norm: float) -> str | None:
        """Return why to end after an iteration, None to go on; `decreases` holds one number for each iterate."""
        if residual_norm <= self.residual:
            return "residual tolerance reached"
        # Martens 2010, sec. 4.4: progress over the last k = max(10, i / 10) iterations.
        iteration, decrease = len(decreases) - 1, decreases[-1]
        back = max(10, iteration // 10)
        if self.progress and iteration > back and decrease > 0:
            gained = decrease - decreases[iteration - back]
            if gained < back * self.progress * decrease:
                return "progress below tolerance"
        return None


def shortened(solution: Solution, gradient: Tensor, radius: float) -> Solution:
    """Return Steihaug's point for a smaller radius; costs no product.

    It lies at `radius` on the polygon through the iterates that were kept. An iterate minimises the model over its
    Krylov space, and later search directions are conjugate to that space: with `p` an iterate and `d` the way to the
    next one, `p'Ad = 0`. So the decreases alone tell `d'Ad`.

    Args:
        solution: Result of `conjugate_gradients` without preconditioner and start, with its path kept.
        gradient: `g`, `(n,)`.
        radius: Positive radius.

    Returns:
        The point and the model's decrease there; `solution` itself if its step is no longer than `radius`.
    """
    before, far = Iterate(torch.zeros_like(gradient), 0.0), math.frexp(radius)[1]
    for node in (*solution.path, Iterate(solution.step, solution.decrease)):
        if norm(node.step) > radius:
            # The model on this side, -m(p + t d) = -m(p) - t g'd - t^2 d'Ad / 2, ends in the node's decrease at t = 1.
            d = node.step - before.step
            slope = dot(gradient, d)
            bend = 2 * (before.decrease - node.decrease - slope)
            # The side leaves the ball at t; lengths in units of the radius.
            place, way = times_power(before.step, -far), times_power(d, -far)
            t = _Norms(dot(place, place), dot(place, way), dot(way, way)).to_boundary(shifted(radius, -far))
            point = Iterate(before.step + t * d, before.decrease - t * slope - t * t * bend / 2)
            # Negative curvature may have been followed backwards, at first uphill.
            best = max(point, before, key=lambda iterate: iterate.decrease)
            return Solution(best.step, best.decrease, solution.iterations, f"{solution.reason}, shortened")
        before = node
    return solution
