"""Damped least squares, solved exactly: one matrix, several dampings, several right-hand sides.

The minimiser of `|R s + r|^2 / 2 + u's + s'(D + damping I)s / 2` with a diagonal `D`, by one of three factorisations:

- `SampleEquations`: Cholesky of `R (D + damping I)^-1 R' + I`, `(m, m)`, for fewer rows than columns.
- `ParameterEquations`: Cholesky of `R'R + D + damping I`, `(n, n)`, for fewer columns than rows.
- `OrthogonalEquations`: QR of `R` with the roots of `D + damping I` below it, for few columns: it squares no condition
  number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# From `r`, `(m,)`, and `u`, `(n,)` or None for zero, to the minimiser, `(n,)`.
Solve = Callable[[Tensor, Tensor | None], Tensor]


class Matrix(Protocol):
    """A matrix `R`, `(m, n)`, whose columns belong to parameter tensors of these sizes."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """Number of columns of each parameter tensor."""
        ...

    def push(self, v: Tensor) -> Tensor:
        """Return `R v`."""
        ...

    def pull(self, u: Tensor) -> Tensor:
        """Return `R'u`."""
        ...

    def gram(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return `R W R'`, `W` a number for each parameter tensor (None: one)."""
        ...

    def parameter_gram(self) -> Tensor:
        """Return `R'R`."""
        ...

    def dense(self) -> Tensor:
        """Return `R`."""
        ...


class Equations(ABC):
    """The normal equations `(R'R + D + damping I) s = -(R'r + u)` in one of their forms."""

    @property
    @abstractmethod
    def size(self) -> float:
        """Trace of `R'R`, which is that of `R R'`: the sum of the eigenvalues."""

    @abstractmethod
    def factored(self, damping: float) -> Solve | None:
        """Return the solver for this damping, or None where rounding leaves the matrix indefinite."""


@dataclass(frozen=True, eq=False)
class SampleEquations(Equations):
    """The equations in the rows: `s = -M^-1 (u + R'y)`, `(R M^-1 R' + I) y = r - R M^-1 u`, `M = D + damping I`.

    The part of the step that `r` asks for lies in the range of `R'` and needs no division by a small damping, so that
    it loses no digits. The part for `u` is Woodbury's.

    Attributes:
        matrix: `R`.
        decay: `D`, one number or its diagonal `(n,)`.
        grams: `R_k R_k'` for each distinct number in `D`, `R_k` the columns with that number, with that number.
    """

    matrix: Matrix
    decay: float | Tensor
    grams: tuple[tuple[float, Tensor], ...]

    @property
    def size(self) -> float:
        """Trace of `R R'`."""
        return sum(float(gram.diagonal().sum()) for _, gram in self.grams)

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the Cholesky factor of `c (R M^-1 R' + I)`, `c` the least entry of `M`."""
        least = min(number for number, _ in self.grams) + damping
        (number, gram), *others = self.grams
        K = gram.clone() if not others else gram * (least / (number + damping))
        for number, gram in others:
            K += gram * (least / (number + damping))
        K.diagonal().add_(least)
        factor, failed = torch.linalg.cholesky_ex(K)
        if bool(failed) or not bool(factor.isfinite().all()):
            return None
        M, matrix = self.decay + damping, self.matrix

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            outside = None if u is None else u / M
            right = r if outside is None else r - matrix.push(outside)
            inside = matrix.pull(torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1))
            inside = inside * (least / M) if others else inside
            return -inside if outside is None else -inside - outside

        return solve


@dataclass(frozen=True, eq=False)
class ParameterEquations(Equations):
    """The equations in the columns.

    Attributes:
        matrix: `R`.
        decay: `D`, one number or its diagonal `(n,)`.
        gram: `R'R`.
    """

    matrix: Matrix
    decay: float | Tensor
    gram: Tensor

    @property
    def size(self) -> float:
        """Trace of `R'R`."""
        return float(self.gram.diagonal().sum())

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the Cholesky factor of `R'R + D + damping I`."""
        G = self.gram.clone()
        G.diagonal().add_(self.decay + damping)
        factor, failed = torch.linalg.cholesky_ex(G)
        if bool(failed) or not bool(factor.isfinite().all()):
            return None
        matrix = self.matrix

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            right = matrix.pull(r) if u is None else matrix.pull(r) + u
            return -torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)

        return solve


@dataclass(frozen=True, eq=False)
class OrthogonalEquations(Equations):
    """The least-squares problem itself: `R` above the root of `M = D + damping I`, `r` above `M^-1/2 u`.

    Attributes:
        basis: `Q` of `R = Q T`, with orthonormal columns.
        triangle: `T`.
        decay: `D`, one number or its diagonal `(n,)`.
    """

    basis: Tensor
    triangle: Tensor
    decay: float | Tensor

    @property
    def size(self) -> float:
        """Trace of `R'R`."""
        return float(self.triangle.square().sum())

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the QR factors of `T` above the root of `M`."""
        T = self.triangle
        roots = (T.new_zeros(T.shape[1]) + self.decay + damping).sqrt()
        Q, upper = torch.linalg.qr(torch.cat([T, roots.diag()]))
        if not bool(upper.isfinite().all()):
            return None

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            below = torch.zeros_like(roots) if u is None else u / roots
            right = Q.T @ torch.cat([self.basis.T @ r, below])
            return -torch.linalg.solve_triangular(upper, right.unsqueeze(1), upper=True).squeeze(1)

        return solve


def in_samples(matrix: Matrix, decay: float | Tensor) -> SampleEquations:
    """Return the equations in the rows: one Gram matrix for each distinct number in the decay."""
    if not isinstance(decay, Tensor):
        return SampleEquations(matrix, decay, ((decay, matrix.gram()),))
    numbers = [float(piece[0]) for piece in decay.split(list(matrix.sizes))]
    grams = [(d, matrix.gram([float(d == own) for own in numbers])) for d in dict.fromkeys(numbers)]
    return SampleEquations(matrix, decay, tuple(grams))


def in_parameters(matrix: Matrix, decay: float | Tensor) -> ParameterEquations:
    """Return the equations in the columns."""
    return ParameterEquations(matrix, decay, matrix.parameter_gram())


def orthogonal(matrix: Matrix, decay: float | Tensor) -> OrthogonalEquations:
    """Return the least-squares problem, with `R` reduced to its triangular factor."""
    return OrthogonalEquations(*torch.linalg.qr(matrix.dense()), decay)
