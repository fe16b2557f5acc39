"""Exact solves with a dense symmetric matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newtonopt.solvers import secular
from newtonopt.solvers.secular import Minimise
from newtonopt.solvers.solution import Solution
from newtonopt.vectors.scaling import dot, norm

Eigh = Callable[[Tensor], Any]


def solve_shifted(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'(A + c I)s / 2` with `c = damping`, or as much more as makes the matrix positive definite.

    By Cholesky factorisation if `damping` is enough; otherwise by eigenvectors, with `c` such that the lowest
    eigenvalue becomes `damping`, or the rounding of the eigenvalues if that is more.

    Args:
        A: Symmetric, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive.
        eigh: Gives eigenvalues and eigenvectors, ascending. Default `torch.linalg.eigh`; a cached one for several
            dampings.

    Returns:
        The solution; `decrease` is that of the model with `A + c I`.
    """
    damped = A.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    reason = "Cholesky"
    if bool(failed):
        values, vectors = eigh(A)
        lifted = values - values[0].clamp(max=0) + max(damping, _rounding(A))
        step = -vectors @ ((vectors.T @ gradient) / lifted)
        reason = "shifted past the lowest eigenvalue"
    else:
        step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
    return Solution(step, -dot(gradient, step) / 2, 1, reason)


def solve_absolute(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'(|A| + damping I)s / 2`: saddle-free Newton (Dauphin et al. 2014).

    By Cholesky factorisation if `A` is positive definite, some ten times as fast as by eigenvectors. Eigenvalues below
    their rounding count as that much.

    Args:
        A: Symmetric, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive.
        eigh: As for `solve_shifted`.

    Returns:
        The solution; `decrease` is that of the model with `|A| + damping I`.
    """
    if not bool(torch.linalg.cholesky_ex(A).info):
        solution = solve_shifted(A, gradient, damping)
        return Solution(solution.step, solution.decrease, 1, "positive definite")
    values, vectors = eigh(A)
    step = -vectors @ ((vectors.T @ gradient) / (values.abs().clamp(min=_rounding(A)) + damping))
    return Solution(step, -dot(gradient, step) / 2, 1, "eigenvalues replaced by their absolute value")


def solve_clamped(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'Bs / 2`: `B` is `A` with its eigenvalues below `damping` raised to it, `max(lambda, damping)`.

    Of all matrices without a lower eigenvalue it is the nearest to `A` in the Frobenius norm (Nocedal & Wright 2006,
    sec. 3.4). A damping below the rounding of the eigenvalues counts as that much. By Cholesky factorisation if `A` is
    such a matrix itself.

    Args:
        A: Symmetric, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive.
        eigh: As for `solve_shifted`.

    Returns:
        The solution; `decrease` is that of the model with `B`.
    """
    floor = max(damping, _rounding(A))
    lowered = A.clone()
    lowered.diagonal().sub_(floor)
    if bool(torch.linalg.cholesky_ex(lowered).info):
        values, vectors = eigh(A)
        step = -vectors @ ((vectors.T @ gradient) / values.clamp(min=floor))
        reason = "low eigenvalues raised to the damping"
    else:
        step = -torch.cholesky_solve(gradient.unsqueeze(1), torch.linalg.cholesky(A)).squeeze(1)
        reason = "no eigenvalue below the damping"
    return Solution(step, -dot(gradient, step) / 2, 1, reason)


def solve_ball(values: Tensor, vectors: Tensor, gradient: Tensor, radius: float) -> Solution:
    """Minimise `g's + s'As / 2` in the ball `|s| <= radius`: More & Sorensen 1983, hard case included.

    Args:
        values: Eigenvalues of `A`, `(n,)`, ascending, as `torch.linalg.eigh` gives them.
        vectors: Its eigenvectors as columns, `(n, n)`.
        gradient: `g`, `(n,)`.
        radius: Positive.

    Returns:
        The solution.
    """
    return _solve(values, vectors, gradient, functools.partial(secular.ball, radius=radius))


def solve_cubic(values: Tensor, vectors: Tensor, gradient: Tensor, sigma: float) -> Solution:
    """Minimise `g's + s'As / 2 + sigma |s|^3 / 3` (Cartis, Gould & Toint 2011).

    Args:
        values: Eigenvalues of `A`, `(n,)`, ascending, as `torch.linalg.eigh` gives them.
        vectors: Its eigenvectors as columns, `(n, n)`.
        gradient: `g`, `(n,)`.
        sigma: Positive.

    Returns:
        The solution; `decrease` is that of the model without the cubic term.
    """
    return _solve(values, vectors, gradient, functools.partial(secular.cubic, sigma=sigma))


def _rounding(A: Tensor) -> float:
    """Return `n eps |A|`, by which computed eigenvalues are uncertain."""
    return A.shape[0] * torch.finfo(A.dtype).eps * norm(A.reshape(-1))


def _solve(values: Tensor, vectors: Tensor, gradient: Tensor, minimise: Minimise) -> Solution:
    slopes = vectors.T @ gradient
    y, reason = minimise(values, slopes)
    decrease = -float(slopes.double().cpu() @ y + (values.double().cpu() * y) @ y / 2)
    return Solution(vectors @ y.to(vectors), decrease, 1, reason)
