"""Residual rows `R` of an evaluation: the Gauss-Newton matrix of its losses is `R'R`. STAND-IN, replaced soon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.closure.evaluation import Evaluation
from newtonopt.operators import products
from newtonopt.operators.matrices import jacobian
from newtonopt.vectors.flat import unflatten


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of `R = S'J`: `J` the outputs' Jacobian, `S S'` the loss's Hessian by the outputs.

    Attributes:
        residuals: `r`, `(m,)`: `R'r` is the gradient of the losses (without decay), less the remainder.
        remainder: `g - R'r`, `(n,)`; None if it is rounding.
        count: Number of rows of the whole loss; more than `m` where rows were chosen at random.
        sizes: Number of entries of each parameter.
    """

    residuals: Tensor
    remainder: Tensor | None
    count: int
    sizes: tuple[int, ...]
    matrix: Tensor
    root: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def push(self, v: Tensor) -> Tensor:
        """Return `R v`, `(m,)`."""
        return self.matrix @ v

    def pull(self, u: Tensor) -> Tensor:
        """Return `R'u`, `(n,)`."""
        return self.matrix.T @ u

    def gram(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return `R W R'`, `(m, m)`, `W` a number for each parameter tensor (None: one)."""
        if weights is None:
            return self.matrix @ self.matrix.T
        w = torch.cat([self.matrix.new_full((s,), x) for s, x in zip(self.sizes, weights, strict=True)])
        return (self.matrix * w) @ self.matrix.T

    def parameter_gram(self) -> Tensor:
        """Return `R'R`, `(n, n)`."""
        return self.matrix.T @ self.matrix

    def dense(self) -> Tensor:
        """Return `R`, `(m, n)`."""
        return self.matrix

    def weigh(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Return `S't`, `(m,)`, for tangents of the outputs by their numbers."""
        return self.root.T @ torch.cat([t.reshape(-1) for t in tangents.values()])


def residual_rows(evaluation: Evaluation, most: int | None = None, seed: int = 0) -> Rows:
    """Return the residual rows of an evaluation; at most about `most` of them, chosen at random (None: all)."""
    loss, outputs = evaluation.graph
    tensors = [z.tensor for z in outputs]
    J = jacobian(evaluation)
    m, n = J.shape
    eye = torch.eye(m, dtype=evaluation.gradient.dtype)
    matrix = torch.stack([J.T @ e for e in eye])
    curve = products.curve_of(loss, outputs)
    H = torch.stack([torch.cat([c.reshape(-1) for c in curve(unflatten(e, tensors))]) for e in eye])
    values, vectors = torch.linalg.eigh(0.5 * (H + H.T))
    keep = values > values.max() * m * torch.finfo(values.dtype).eps
    root = vectors[:, keep] * values[keep].sqrt()
    slopes = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    slope = torch.cat([s.reshape(-1) for s in slopes])
    residuals = vectors[:, keep].T @ slope / values[keep].sqrt()
    R = root.T @ matrix
    rest = evaluation.data_gradient - R.T @ residuals
    small = float(rest.norm()) <= 1e-8 * float(evaluation.data_gradient.norm())
    sizes = tuple(p.numel() for p in evaluation.params)
    return Rows(residuals, None if small else rest, m, sizes, R, root)
