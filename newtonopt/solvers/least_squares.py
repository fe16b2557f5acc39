"""Damped least squares, solved exactly: one matrix, several dampings, several right-hand sides.

The minimiser of `|R s + r|^2 / 2 + u's + s'(D + damping C)s / 2`, `C` and `D` diagonal, by one of three factorisations:

- `in_samples`: Cholesky of `R (D + damping C)^-1 R' + I`, `(m, m)`, for fewer rows than columns.
- `in_parameters`: Cholesky of `R'R + D + damping C`, `(n, n)`, for fewer columns than rows.
- `orthogonal`: QR of `R` above the root of `D + damping C`, for few columns: it squares no condition number.
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
# Weights of a parameter tensor's entries: a number, or the factors `(p,)` and `(q,)` of an outer product; None: ones.
Weight = float | tuple[Tensor, Tensor | None]


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

    def gram(self, weights: Sequence[Weight] | None = None, out: Tensor | None = None) -> Tensor:
        """Return `R W R'`, `W` the weights of each parameter tensor (None: ones), in `out` if it is given."""
        ...

    def column_squares(self) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Return the columns' squared norms: of each tensor the sums over its rows and its columns, or themselves."""
        ...

    def parameter_gram(self) -> Tensor:
        """Return `R'R`."""
        ...

    def dense(self) -> Tensor:
        """Return `R`."""
        ...


@dataclass(frozen=True, eq=False)
class Metric:
    """The diagonal `M = D + damping C`.

    Attributes:
        decay: `D`, a number for each parameter tensor.
        scale: `C`, the weights of each tensor's entries.
        sizes: Number of entries of each tensor.
        like: A vector of the matrix's dtype and device.
    """

    decay: tuple[float, ...]
    scale: tuple[Weight, ...]
    sizes: tuple[int, ...]
    like: Tensor

    @property
    def spread(self) -> Tensor:
        """`C`, `(n,)`."""
        return torch.cat([_entries(c, size, self.like) for c, size in zip(self.scale, self.sizes, strict=True)])

    def at(self, damping: float) -> Tensor:
        """Return `M`, `(n,)`."""
        pieces = [self.like.new_full((size,), d) for d, size in zip(self.decay, self.sizes, strict=True)]
        return torch.cat(pieces) + damping * self.spread

    def inverse(self, damping: float) -> list[Weight]:
        """Return `damping M^-1` as weights; tensors with a decay have one number in `C`."""
        return [_inverse(d, c, damping) for d, c in zip(self.decay, self.scale, strict=True)]

    def norm(self, v: Tensor) -> float:
        """Return the root of `v'Cv`."""
        return float((self.spread * v * v).sum().sqrt())

    @property
    def decays(self) -> bool:
        """Whether there is decay; without it `damping M^-1` is the same for all dampings."""
        return any(self.decay)


def metric(matrix: Matrix, decay: float | Tensor, power: float) -> Metric:
    """Return the diagonal to be added, with `C` the columns' mean squares to a power, in units of their mean.

    A matrix of parameters has the outer product of the means over its rows and columns, whose inverse weighs the
    factors of `R R'` at no cost; where there is decay, its mean alone.

    Args:
        matrix: `R`.
        decay: `D`, one number or its diagonal `(n,)`, constant for each parameter tensor.
        power: Zero for `C` in proportion to the identity, one for Marquardt's.
    """
    sizes, squares = tuple(matrix.sizes), matrix.column_squares()
    total = sum(float(left.sum()) for left, _ in squares)
    usual = total / sum(sizes) or 1.0
    if isinstance(decay, Tensor):
        decays = tuple(float(piece[0]) for piece in decay.split(list(sizes)))
    else:
        decays = (decay,) * len(sizes)
    scale = tuple(_scale(*one, d, usual, power) for one, d in zip(squares, decays, strict=True))
    return Metric(decays, scale, sizes, squares[0][0])


def _scale(left: Tensor, right: Tensor | None, decay: float, usual: float, power: float) -> Weight:
    """Return `C` for one tensor from the sums of its columns' squares."""
    count = left.numel() * (1 if right is None else right.numel())
    mean, least = float(left.sum()) / count, torch.finfo(left.dtype).eps ** 2
    if decay or power == 0.0 or mean <= least * usual:
        return float(usual * max(mean / usual, least) ** power)
    rows = usual * (left / (usual * (1 if right is None else right.numel()))).clamp(min=least) ** power
    return rows, None if right is None else (right / (mean * left.numel())).clamp(min=least) ** power


def _entries(weight: Weight, size: int, like: Tensor) -> Tensor:
    if not isinstance(weight, tuple):
        return like.new_full((size,), weight)
    left, right = weight
    return left if right is None else torch.outer(left, right).reshape(-1)


def _inverse(decay: float, scale: Weight, damping: float) -> Weight:
    if not isinstance(scale, tuple):
        return damping / (decay + damping * scale)
    left, right = scale
    return 1 / left, None if right is None else 1 / right


@dataclass(frozen=True, eq=False)
class Equations(ABC):
    """The normal equations `(R'R + M) s = -(R'r + u)`, `M = D + damping C`, in one of their forms.

    Attributes:
        metric: `M`.
    """

    metric: Metric

    @property
    @abstractmethod
    def largest(self) -> float:
        """Size of the largest entry of the matrix, in units of `C`."""

    @property
    def floor(self) -> float:
        """Damping below which only rounding changes."""
        return 4 * torch.finfo(self.metric.like.dtype).eps * self.largest

    @abstractmethod
    def factored(self, damping: float) -> Solve | None:
        """Return the solver for this damping, or None where rounding leaves the matrix indefinite."""


@dataclass(frozen=True, eq=False)
class SampleEquations(Equations):
    """The equations in the rows: `s = -M^-1 (u + R'y)`, `(R M^-1 R' + I) y = r - R M^-1 u`.

    The part of the step that `r` asks for lies in the range of `M^-1 R'`, and no small damping divides it, so that it
    loses no digits. The part for `u` is Woodbury's.

    Attributes:
        matrix: `R`.
        gram: `R C^-1 R'`, which serves all dampings; None where there is decay. Each damping writes the diagonal anew,
            in place: a copy of the matrix would take a twentieth of a step.
        diagonal: Its diagonal without damping.
    """

    matrix: Matrix
    gram: Tensor | None
    diagonal: Tensor | None

    @property
    def largest(self) -> float:
        """Largest diagonal entry of `R C^-1 R'`."""
        return 1.0 if self.diagonal is None else float(self.diagonal.max())

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the Cholesky factor of `damping (R M^-1 R' + I)`."""
        if self.gram is None or self.diagonal is None:
            K = self.matrix.gram(self.metric.inverse(damping))
            K.diagonal().add_(damping)
        else:
            K = self.gram
            K.diagonal().copy_(self.diagonal + damping)
        factor, failed = torch.linalg.cholesky_ex(K)
        if bool(failed):
            return None
        M, matrix = self.metric.at(damping), self.matrix

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            right = r if u is None else r - matrix.push(u / M)
            y = matrix.pull(torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)) * damping
            return -(y if u is None else y + u) / M

        return solve


@dataclass(frozen=True, eq=False)
class ParameterEquations(Equations):
    """The equations in the columns.

    Attributes:
        matrix: `R`.
        gram: `R'R`.
    """

    matrix: Matrix
    gram: Tensor

    @property
    def largest(self) -> float:
        """Largest diagonal entry of `C^-1 R'R`."""
        return float((self.gram.diagonal() / self.metric.spread).max())

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the Cholesky factor of `c (R'R + M) c`, whose diagonal is one."""
        G = self.gram.clone()
        G.diagonal().add_(self.metric.at(damping))
        c = G.diagonal().rsqrt()
        factor, failed = torch.linalg.cholesky_ex(G.mul_(c[:, None]).mul_(c))
        if bool(failed):
            return None
        matrix = self.matrix

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            right = matrix.pull(r) if u is None else matrix.pull(r) + u
            return -c * torch.cholesky_solve((c * right).unsqueeze(1), factor).squeeze(1)

        return solve


@dataclass(frozen=True, eq=False)
class OrthogonalEquations(Equations):
    """The least-squares problem itself: `R` above the root of `M`, `r` above `M^-1/2 u`.

    Attributes:
        basis: `Q` of `R = Q T`, with orthonormal columns.
        triangle: `T`.
    """

    basis: Tensor
    triangle: Tensor

    @property
    def largest(self) -> float:
        """Largest diagonal entry of `C^-1 R'R`."""
        return float((self.triangle.square().sum(0) / self.metric.spread).max())

    @property
    def floor(self) -> float:
        """Damping below which only rounding changes: the root of the damping is rounded, not the damping."""
        return 4 * torch.finfo(self.metric.like.dtype).eps * super().floor

    def factored(self, damping: float) -> Solve | None:
        """Return the solver by the QR factors of `T` above the root of `M`."""
        roots = self.metric.at(damping).sqrt()
        T, n = self.triangle / roots, len(roots)
        Q, upper = torch.linalg.qr(torch.cat([T, torch.eye(n, dtype=T.dtype, device=T.device)]))

        def solve(r: Tensor, u: Tensor | None) -> Tensor:
            below = torch.zeros_like(roots) if u is None else u / roots
            right = Q.T @ torch.cat([self.basis.T @ r, below])
            solution: Tensor = torch.linalg.solve_triangular(upper, right.unsqueeze(1), upper=True).squeeze(1)
            return -solution / roots

        return solve


def in_samples(matrix: Matrix, metric: Metric) -> SampleEquations:
    """Return the equations in the rows."""
    gram = None if metric.decays else matrix.gram(metric.inverse(1.0))
    return SampleEquations(metric, matrix, gram, None if gram is None else gram.diagonal().clone())


def in_parameters(matrix: Matrix, metric: Metric) -> ParameterEquations:
    """Return the equations in the columns."""
    return ParameterEquations(metric, matrix, matrix.parameter_gram())


def orthogonal(matrix: Matrix, metric: Metric) -> OrthogonalEquations:
    """Return the least-squares problem, with `R` reduced to its triangular factor."""
    basis, triangle = torch.linalg.qr(matrix.dense())
    return OrthogonalEquations(metric, basis, triangle)
