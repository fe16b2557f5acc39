"""Minimisers of quadratic models, in a ball or with a cubic term, in the Krylov space of the gradient.

Gould, Lucidi, Roma & Toint 1999 (GLTR): in the Lanczos basis from the gradient the matrix is tridiagonal, `T = Q A Q'`,
and the gradient is `|g| e_1`. The small model is solved exactly, by `secular` in the eigenvectors of `T`. It differs
from the paper in this: the small model is solved each time the space has grown by a tenth, not after each product, and
the basis is kept, so that a smaller radius costs no product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import LanczosResult, Tridiagonal, lanczos
from newtonopt.solvers.secular import Minimise, above_rounding
from newtonopt.solvers.solution import Solution
from newtonopt.vectors.scaling import Matrix, norm

# The small model is solved again when the space has grown by this factor: the eigenvectors of T take k^3 operations.
_GROWTH = 1.1


def krylov_space(
    A: Matrix, gradient: Tensor, minimise: Minimise, *, residual_tolerance: float, max_products: int
) -> LanczosResult:
    """Return a Lanczos basis from the gradient that is large enough to hold a good minimiser.

    Args:
        A: Symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`, not zero.
        minimise: Function that solves the model in eigenvector coordinates, such as `secular.ball` with its radius.
        residual_tolerance: End when `|(A + m I) s + g|` is at most this times the gradient's norm, where the
            minimiser `s` in the space has the multiplier `m`.
        max_products: Largest number of products. The basis takes `max_products * n` numbers of memory at most.

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
        # The residual (A + m I) s + g = beta_k (last coordinate) q_{k+1} (eq. 5.7).
        return float(tridiagonal.betas[-1] * coordinates[-1].abs()) <= residual_tolerance * norm(gradient)

    return lanczos(A, gradient, max_products, stop=is_enough)


def minimise_in(space: LanczosResult, gradient: Tensor, minimise: Minimise) -> Solution:
    """Return the model's minimiser in a space that `krylov_space` made from the same gradient; costs no product.

    Example:
        >>> import functools, torch
        >>> from newtonopt.solvers import secular
        >>> A, g = torch.diag(torch.tensor([1.0, -1.0]).double()), torch.tensor([3.0, 1.0]).double()
        >>> minimise = functools.partial(secular.ball, radius=2.0)
        >>> space = krylov_space(A, g, minimise, residual_tolerance=1e-6, max_products=2)
        >>> solution = minimise_in(space, g, minimise)
        >>> round(float(solution.step.norm()), 4), solution.reason
        (2.0, 'on the boundary')
    """
    coordinates, decrease, reason = _solve(space.tridiagonal, gradient, minimise)
    step = space.vectors(coordinates.unsqueeze(1))[0]
    return Solution(step, decrease, space.tridiagonal.size, reason)


def _solve(tridiagonal: Tridiagonal, gradient: Tensor, minimise: Minimise) -> tuple[Tensor, float, str]:
    """Return the minimiser's coordinates in the Lanczos basis, its decrease, and the case in words."""
    values, vectors = tridiagonal.ritz()
    # The gradient is |g| e_1 in the basis, hence |g| times the first coordinates in the eigenvectors of T.
    slopes = norm(gradient) * vectors[0]
    values = above_rounding(values, vectors, tridiagonal.dense(), torch.finfo(gradient.dtype).eps)
    y, reason = minimise(values, slopes)
    return vectors @ y, -float(torch.dot(slopes, y) + torch.dot(values * y, y) / 2), reason
