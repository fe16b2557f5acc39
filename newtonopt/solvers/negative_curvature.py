"""A direction of negative curvature where the gradient gives none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import Tridiagonal, lanczos
from newtonopt.solvers.solution import Matrix
from newtonopt.vectors.random import normals


def negative_curvature(
    A: Matrix, like: Tensor, *, seed: int = 0, max_products: int = 100
) -> tuple[Tensor, float] | None:
    """A unit vector `d` with `d'Ad < 0`, by the Lanczos process from a random start.

    A Ritz value is a curvature that was seen, so a negative one proves what it says. That none is found is certain up
    to rounding with `n` products; with fewer it is likely (Kuczynski & Wozniakowski 1992).

    Args:
        A: The symmetric matrix, `(n, n)`.
        like: A vector `(n,)` of the dtype, device and kind that the start shall have.
        seed: Of the start, drawn on the CPU, which leaves the global random state alone.
        max_products: At most so many products.

    Returns:
        `d`, `(n,)`, and `d'Ad`; None if no curvature below rounding was met.

    Raises:
        FloatingPointError: A product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    start = normals(like, generator)
    rounding = 10 * math.sqrt(like.shape[0]) * torch.finfo(like.dtype).eps

    def is_negative(tridiagonal: Tridiagonal, values: Tensor) -> bool:
        # Products by differences are not quite symmetric: what that shows of their error counts as rounding.
        return float(values[0]) < -max(rounding * float(values.abs().max()), 10 * tridiagonal.noise)

    def is_found(tridiagonal: Tridiagonal) -> bool:
        values, coordinates = tridiagonal.ritz()
        residual = float(tridiagonal.betas[-1] * coordinates[-1, 0].abs())
        return is_negative(tridiagonal, values) and residual <= 0.1 * abs(float(values[0]))

    space = lanczos(A, start, min(max_products, like.shape[0]), stop=is_found)
    values, coordinates = space.tridiagonal.ritz()
    if not is_negative(space.tridiagonal, values):
        return None
    return space.vectors(coordinates[:, :1])[0], float(values[0])
