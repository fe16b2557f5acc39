"""The highest loss in a ball around a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.closure.objective import Objective
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue
from newtonopt.solvers.dense import solve_ball
from newtonopt.vectors.scaling import norm, scale_of, shifted, times_power

# Steps are damped down to 2^-10 before a point counts as a maximiser along its ascent direction.
_HALVINGS = 10


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
        scale: `(n,)`.
        radius: Positive.
        tolerance: Relative rise per iteration below which a search ends.
        base: The loss at the centre.
    """

    objective: Objective
    scale: Tensor
    radius: float
    tolerance: float
    base: float

    def loss_at(self, place: Tensor) -> float:
        """The loss at a place."""
        return self.objective.loss_at(self.scale * place)

    def gradient_at(self, place: Tensor) -> tuple[float, Tensor]:
        """The loss at a place, and its gradient in the ball's coordinates."""
        loss, gradient = self.objective.gradient_at(self.scale * place)
        return loss, self.scale * gradient

    def towards(self, displacement: Tensor) -> list[Tensor]:
        """The place on the sphere in that direction; none where it is zero or of other parameters."""
        if displacement.shape != self.scale.shape:
            return []
        place = torch.where(self.scale > 0.0, displacement / self.scale, torch.zeros_like(displacement))
        return [scaled_to(place, self.radius)] if norm(place) > 0.0 else []

    def summits(self, slope: Tensor, eigenvalues: Sequence[Eigenvalue]) -> list[Tensor]:
        """Where the loss rises most as far as its gradient and some eigenvalues of its Hessian tell, and the mirror
        image of that along the first eigenvector: the valley has another wall.

        Args:
            slope: The gradient `(n,)` in the ball's coordinates.
            eigenvalues: With their vectors, the largest first; what is orthogonal to these counts as flat.
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
        """The highest point that ascents from the highest starts lead to, the gradients used, and whether the search
        for it ended by itself.

        Args:
            starts: Places in the ball.
            budget: Of gradients, shared by the ascents.
            ascents: How many; None (default): one from each start.
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
        """The linearised maximiser from one start: highest point, gradients used, whether it ended by itself."""
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
        """The first higher point on the chord to the target, or the point itself.

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
