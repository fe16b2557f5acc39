"""Learning rates: one number, or one for each entry of the flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newtonopt.solvers.solution import Iterate
from newtonopt.vectors.flat import flatten
from newtonopt.vectors.scaling import Matrix
from newtonopt.vectors.sharded import local_part


def per_entry(values: Sequence[float], params: Sequence[Tensor]) -> float | Tensor:
    """The common value, or a vector `(n,)` with each parameter's own."""
    if len(set(values)) == 1:
        return values[0]
    return flatten([torch.full_like(local_part(p), v) for v, p in zip(values, params, strict=True)], params)


def is_everywhere(value: float | Tensor, number: float) -> bool:
    """Whether a value that is one number or one for each entry is this number throughout."""
    return not isinstance(value, Tensor) and value == number  # a vector holds two different values


def scaled(iterate: Iterate, gradient: Tensor, rates: float | Tensor, A: Matrix) -> Iterate:
    """`rates * step`, with the decrease of the model there; that takes a product where the rates differ."""
    step = iterate.step
    if isinstance(rates, Tensor):
        step = rates * step
        return Iterate(step, -float(step @ (gradient + 0.5 * (A @ step))))
    return ray(iterate, gradient, rates)


def ray(iterate: Iterate, gradient: Tensor, t: float) -> Iterate:
    """`t * step`, with the decrease of the model there."""
    slope = float(gradient @ iterate.step)
    bend = -2 * (iterate.decrease + slope)
    return Iterate(iterate.step if t == 1.0 else t * iterate.step, -(t * slope + 0.5 * t * t * bend))
