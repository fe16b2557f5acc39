"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Matrix(Protocol):
    """Anything that multiplies a vector: a `LinearOperator`, a dense tensor."""

    def __matmul__(self, v: Any, /) -> Any: ...


@dataclass(frozen=True)
class Iterate:
    """A step that a solver passed on its way, `(n,)`, and the model's decrease there."""

    step: Tensor
    decrease: float


@dataclass(frozen=True)
class Solution:
    """An approximate minimiser of the model `m(s) = g's + s'As / 2`.

    Attributes:
        step: The minimiser, `(n,)`.
        decrease: `-m(step)`, of the matrix that the solver was given (damping included).
        iterations: How many iterations were taken, each one product.
        reason: Why the solver stopped, in words.
        path: Iterates kept on request, first to last; the step itself is the last of them where it falls on the grid.
        negative_curvature: A direction `d` with `d'Ad <= 0` and `g'd <= 0` if one was met, else None.
        bend: `d'Ad` of that direction, zero where it is rounding; else zero.
        is_finite: False if a product was not finite: the step is then the last one before.
    """

    step: Tensor
    decrease: float
    iterations: int
    reason: str
    path: tuple[Iterate, ...] = ()
    negative_curvature: Tensor | None = None
    bend: float = 0.0
    is_finite: bool = True
