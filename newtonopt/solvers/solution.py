"""The result of a solver: its step, the decrease that the model promises, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Iterate:
    """A step on a solver's way, `(n,)`, and the model's decrease there."""

    step: Tensor
    decrease: float


@dataclass(frozen=True, eq=False)
class Solution:
    """An approximate minimiser of the model `m(s) = g's + s'As / 2`.

    Attributes:
        step: Minimiser, `(n,)`.
        decrease: `-m(step)` with the matrix that the solver was given, damping included.
        iterations: Number of iterations taken, each of one product.
        reason: Why the solver stopped, in words, for people.
        path: Iterates kept on request, first to last. The step itself is the last one if it falls on the grid.
        negative_curvature: A direction `d` with `d'Ad <= 0` and `g'd <= 0` if one was met, else None.
        bend: `d'Ad` of that direction, or zero if it is rounding; zero without a direction.
        is_finite: Whether all products were finite. The step is the last one before the first that was not.
    """

    step: Tensor
    decrease: float
    iterations: int
    reason: str
    path: tuple[Iterate, ...] = ()
    negative_curvature: Tensor | None = None
    bend: float = 0.0
    is_finite: bool = True
