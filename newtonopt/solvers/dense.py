"""Exact solves with a dense symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from newtonopt.solvers.solution import Solution


def solve_shifted(A: Tensor, gradient: Tensor, damping: float) -> Solution:
    """Minimise `g's + s'(A + c I)s / 2` with the smallest `c >= damping` that makes the matrix positive definite.

    By Cholesky factorisation if `c = damping` is enough; otherwise the lowest eigenvalue says how far to shift, so that the lowest shifted one is
    `damping`.

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
    if failed:
        lowest = float(torch.linalg.eigvalsh(A)[0])
        factor = torch.linalg.cholesky(A + (2 * damping - min(lowest, 0.0)) * identity)
        reason = "shifted past the lowest eigenvalue"
    step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
    return Solution(step, float(-(gradient @ step) / 2), 1, reason)


def solve_absolute(A: Tensor, gradient: Tensor, damping: float) -> Solution:
    """Minimise `g's + s'(|A| + damping I)s / 2`, `|A|` with the eigenvalues' absolute values: saddle-free Newton (Dauphin et al. 2014).

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
