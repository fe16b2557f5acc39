"""Exact solves with a dense symmetric matrix."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from newtonopt.solvers import secular
from newtonopt.solvers.secular import Minimise
from newtonopt.solvers.solution import Solution


def solve_shifted(A: Tensor, gradient: Tensor, damping: float) -> Solution:
    """Minimise `g's + s'(A + c I)s / 2` with `c = damping`, or as much more as makes the matrix positive definite.

    By Cholesky factorisation if `damping` is enough; otherwise by eigenvectors, with `c` such that the lowest
    eigenvalue becomes `damping`, or the rounding of the eigenvalues if that is more.

    Args:
        A: Symmetric, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive.

    Returns:
        The solution; `decrease` is that of the model with `A + c I`.
    """
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    factor, failed = torch.linalg.cholesky_ex(A + damping * identity)
    reason = "Cholesky"
    if bool(failed):
        # A damping below the rounding of the eigenvalues could fail again, and would scale up noise.
        values, vectors = torch.linalg.eigh(A)
        rounding = A.shape[0] * torch.finfo(A.dtype).eps * values.abs().max()
        lifted = values - values[0].clamp(max=0) + rounding.clamp(min=damping)
        step = -vectors @ ((vectors.T @ gradient) / lifted)
        reason = "shifted past the lowest eigenvalue"
    else:
        step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
    return Solution(step, float(-(gradient @ step) / 2), 1, reason)


def solve_absolute(A: Tensor, gradient: Tensor, damping: float) -> Solution:
    """Minimise `g's + s'(|A| + damping I)s / 2`: saddle-free Newton (Dauphin et al. 2014).

    Args:
        A: Symmetric, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive.

    Returns:
        The solution; `decrease` is that of the model with `|A| + damping I`.
    """
    values, vectors = torch.linalg.eigh(A)
    step = -vectors @ ((vectors.T @ gradient) / (values.abs() + damping))
    reason = "eigenvalues replaced by their absolute value" if bool(values[0] < 0) else "positive definite"
    return Solution(step, float(-(gradient @ step) / 2), 1, reason)


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


def _solve(values: Tensor, vectors: Tensor, gradient: Tensor, minimise: Minimise) -> Solution:
    slopes = vectors.T @ gradient
    y, reason = minimise(values, slopes)
    decrease = -float(slopes.double().cpu() @ y + values.double().cpu() @ y.square() / 2)
    return Solution(vectors @ y.to(vectors), decrease, 1, reason)
