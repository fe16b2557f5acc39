"""Minimisers of quadratic models by factorisations of the whole matrix.

Where the matrix is indefinite, there are five ways to a minimiser: a shift, eigenvalues by absolute value, low
eigenvalues raised (with a damping each); a ball, a cubic term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newtonopt.solvers import secular
from newtonopt.solvers.solution import Solution
from newtonopt.vectors.scaling import dot, norm

Eigh = Callable[[Tensor], Any]


def solve_shifted(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'(A + c I)s / 2` with `c = damping`, or the least larger one that makes `A + c I` definite.

    By Cholesky factorisation if `damping` is enough. Otherwise by eigenvectors: `c` raises the lowest eigenvalue to
    `damping`, or to the rounding of the eigenvalues if that is more.

    Args:
        A: Symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive number.
        eigh: Function that returns eigenvalues and eigenvectors, ascending. Default `torch.linalg.eigh`; give a cached
            one for several dampings.

    Returns:
        The solution; `decrease` is `-m(step)` of the model with `A + c I`.

    Example:
        >>> import torch
        >>> A, g = torch.diag(torch.tensor([3.0, -1.0]).double()), torch.tensor([4.0, 1.0]).double()
        >>> solve_shifted(A, g, 1.0).step.round(decimals=4).tolist()  # c = 2
        [-0.8, -1.0]
    """
    damped = A.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    reason = "Cholesky"
    if bool(failed):
        # s = -V (L + c I)^-1 V'g with c = damping - lambda_1.
        values, vectors = eigh(A)
        lifted = values - values[0].clamp(max=0) + max(damping, _rounding(A))
        step = -vectors @ ((vectors.T @ gradient) / lifted)
        reason = "shifted past the lowest eigenvalue"
    else:
        step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
    # At the minimiser g's = -s'(A + c I)s, so that the decrease is -g's / 2.
    return Solution(step, -dot(gradient, step) / 2, 1, reason)


def solve_absolute(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'(|A| + damping I)s / 2`: saddle-free Newton (Dauphin et al. 2014).

    `|A|` is `A` with its eigenvalues replaced by their absolute values. By Cholesky factorisation if `A` is positive
    definite, which is about ten times as fast as eigenvectors. Eigenvalues below their rounding are raised to it.

    Args:
        A: Symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive number.
        eigh: Function that returns eigenvalues and eigenvectors, as for `solve_shifted`.

    Returns:
        The solution; `decrease` is `-m(step)` of the model with `|A| + damping I`.

    Example:
        >>> import torch
        >>> A, g = torch.diag(torch.tensor([3.0, -1.0]).double()), torch.tensor([4.0, 1.0]).double()
        >>> solve_absolute(A, g, 1.0).step.round(decimals=4).tolist()
        [-1.0, -0.5]
    """
    if not bool(torch.linalg.cholesky_ex(A).info):
        solution = solve_shifted(A, gradient, damping)
        return Solution(solution.step, solution.decrease, 1, "positive definite")
    values, vectors = eigh(A)
    step = -vectors @ ((vectors.T @ gradient) / (values.abs().clamp(min=_rounding(A)) + damping))
    return Solution(step, -dot(gradient, step) / 2, 1, "eigenvalues replaced by their absolute value")


def solve_clamped(A: Tensor, gradient: Tensor, damping: float, eigh: Eigh = torch.linalg.eigh) -> Solution:
    """Minimise `g's + s'Bs / 2`, where `B` is `A` with eigenvalues below `damping` raised to it.

    Among all matrices without an eigenvalue below `damping`, `B` is the nearest to `A` in the Frobenius norm (Nocedal &
    Wright 2006, sec. 3.4). A damping below the rounding of the eigenvalues is raised to it. By Cholesky factorisation
    if `A` is such a matrix itself.

    Args:
        A: Symmetric matrix, `(n, n)`.
        gradient: `g`, `(n,)`.
        damping: Positive number.
        eigh: Function that returns eigenvalues and eigenvectors, as for `solve_shifted`.

    Returns:
        The solution; `decrease` is `-m(step)` of the model with `B`.

    Example:
        >>> import torch
        >>> A, g = torch.diag(torch.tensor([4.0, -1.0]).double()), torch.tensor([4.0, 1.0]).double()
        >>> solve_clamped(A, g, 0.5).step.round(decimals=4).tolist()
        [-1.0, -2.0]
    """
    floor = max(damping, _rounding(A))
    # A - floor I is positive definite if and only if no eigenvalue has to be raised.
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
    """Minimise `g's + s'As / 2` in the ball `|s| <= radius` (More & Sorensen 1983), hard case included.

    Args:
        values: Eigenvalues of `A`, `(n,)`, ascending, as `torch.linalg.eigh` gives them.
        vectors: Eigenvectors of `A` as columns, `(n, n)`.
        gradient: `g`, `(n,)`.
        radius: Positive number.

    Returns:
        The solution.

    Example:
        >>> import torch
        >>> A, g = torch.diag(torch.tensor([-1.0, 2.0]).double()), torch.tensor([0.0, 3.0]).double()
        >>> solution = solve_ball(*torch.linalg.eigh(A), g, 2.0)
        >>> solution.step.abs().round(decimals=4).tolist(), solution.reason
        ([1.7321, 1.0], 'hard case: completed along the lowest eigenvector')
    """
    slopes = vectors.T @ gradient
    return _solution(values, vectors, slopes, *secular.ball(values, slopes, radius))


def solve_cubic(values: Tensor, vectors: Tensor, gradient: Tensor, sigma: float) -> Solution:
    """Minimise `g's + s'As / 2 + sigma |s|^3 / 3` (Cartis, Gould & Toint 2011).

    Args:
        values: Eigenvalues of `A`, `(n,)`, ascending, as `torch.linalg.eigh` gives them.
        vectors: Eigenvectors of `A` as columns, `(n, n)`.
        gradient: `g`, `(n,)`.
        sigma: Positive number.

    Returns:
        The solution; `decrease` is `-m(step)` of the model without the cubic term.

    Example:
        >>> import torch
        >>> A, g = torch.diag(torch.tensor([1.0, 2.0]).double()), torch.tensor([-1.2, -2.4]).double()
        >>> solution = solve_cubic(*torch.linalg.eigh(A), g, 1.0)  # |s| = 1
        >>> solution.step.round(decimals=4).tolist()
        [0.6, 0.8]
    """
    slopes = vectors.T @ gradient
    return _solution(values, vectors, slopes, *secular.cubic(values, slopes, sigma))


def _solution(values: Tensor, vectors: Tensor, slopes: Tensor, y: Tensor, reason: str) -> Solution:
    """Return the solution of which `y` are the coordinates in the eigenvectors."""
    decrease = -float(slopes.double().cpu() @ y + (values.double().cpu() * y) @ y / 2)
    return Solution(vectors @ y.to(vectors), decrease, 1, reason)


def _rounding(A: Tensor) -> float:
    """Return `n eps |A|`, the rounding error of computed eigenvalues."""
    return A.shape[0] * torch.finfo(A.dtype).eps * norm(A.reshape(-1))
