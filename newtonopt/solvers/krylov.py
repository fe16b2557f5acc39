"""Models minimised in the Krylov space of the gradient: Gould, Lucidi, Roma & Toint 1999."""

from __future__ import annotations

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import LanczosResult, Tridiagonal, lanczos
from newtonopt.solvers.secular import Minimise, above_rounding
from newtonopt.solvers.solution import Matrix, Solution
from newtonopt.vectors.scaling import norm

# The tridiagonal problem is solved again when the space has grown by this factor: its eigenvectors take k^3.
_GROWTH = 1.1


def krylov_space(
    A: Matrix, gradient: Tensor, minimise: Minimise, *, residual_tolerance: float, max_products: int
) -> LanczosResult:
    """The Lanczos basis from the gradient, large enough to hold a good minimiser.

    Args:
        A: The symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`, not zero.
        minimise: Solves the model in eigenvector coordinates, such as `secular.ball` with its radius.
        residual_tolerance: End when `|(A + m I) s + g|` is at most this times the gradient's norm, where the
            minimiser `s` in the space has the multiplier `m`.
        max_products: At most so many; `max_products * n` numbers of memory.

    Returns:
        The basis and the tridiagonal matrix, to give to `minimise_in`.

    Raises:
        FloatingPointError: A product is not finite.
    """
    due = 1

    def is_enough(tridiagonal: Tridiagonal) -> bool:
        nonlocal due
        if tridiagonal.size < due:
            return False
        due = max(tridiagonal.size + 1, int(_GROWTH * tridiagonal.size))
        coordinates, _, _ = _solve(tridiagonal, gradient, minimise)
        # What is left of A s + m s + g is along the next Lanczos vector (their eq. 5.7).
        return float(tridiagonal.betas[-1] * coordinates[-1].abs()) <= residual_tolerance * norm(gradient)

    return lanczos(A, gradient, max_products, stop=is_enough)


def minimise_in(space: LanczosResult, gradient: Tensor, minimise: Minimise) -> Solution:
    """The model's minimiser in a space that `krylov_space` made of the same gradient: no product more."""
    coordinates, decrease, reason = _solve(space.tridiagonal, gradient, minimise)
    step = space.vectors(coordinates.unsqueeze(1))[0]
    return Solution(step, decrease, space.tridiagonal.size, reason)


def _solve(tridiagonal: Tridiagonal, gradient: Tensor, minimise: Minimise) -> tuple[Tensor, float, str]:
    """The minimiser's coordinates in the Lanczos basis, its decrease, and which case it was."""
    values, vectors = tridiagonal.ritz()
    slopes = norm(gradient) * vectors[0]
    values = above_rounding(values, vectors, tridiagonal.dense(), torch.finfo(gradient.dtype).eps)
    y, reason = minimise(values, slopes)
    return vectors @ y, -float(torch.dot(slopes, y) + torch.dot(values * y, y) / 2), reason
