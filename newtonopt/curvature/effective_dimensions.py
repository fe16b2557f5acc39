"""The effective dimension: how many directions of a positive semi-definite operator stand out of a damping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.checks import check_positive, check_seed, check_share, check_whole
from newtonopt.curvature.density import all_eigenvalues
from newtonopt.curvature.eigenvalues.bounds import GUARD
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.curvature.traces import LEAST_SAMPLES, Samples
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.solvers.lanczos import Tridiagonal, lanczos
from newtonopt.vectors.random import signs
from newtonopt.vectors.scaling import shifted, times_power

# Share of the tolerance that a Lanczos run may leave over; random vectors get the rest.
_SHARE = 0.1


@dataclass(frozen=True, repr=False)
class EffectiveDimension:
    """An estimate of an effective dimension.

    Attributes:
        value: Estimate of the sum of `lambda / (lambda + damping)` over the eigenvalues.
        standard_error: Standard error of `value` over the random vectors; zero if it is exact.
        truncation: Bound on what Lanczos runs of finitely many steps add to the error of `value`.
        damping: Damping that the value refers to.
        products: Number of products with the operator that were used.
        converged: Whether standard error and truncation together are at most `tolerance * value`.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import effective_dimension
        >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
        >>> found = effective_dimension(LinearOperator(A.mv, A.shape, A), damping=1.0)
        >>> found.value, found.converged
        (1.25, True)

    See Also:
        - `effective_dimension()`: computes it.
        - `docs/measurements.md`: how far a standard error can be trusted.
    """

    value: float
    standard_error: float
    truncation: float
    damping: float
    products: int
    converged: bool

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


def effective_dimension(
    operator: LinearOperator, damping: float, tolerance: float = 5e-2, max_products: int = 300, seed: int = 0
) -> EffectiveDimension:
    """Estimate `tr(A (A + damping I)^-1)` by stochastic Lanczos quadrature.

    For a vector v of random signs, one Lanczos run encloses `v'A (A + damping I)^-1 v` between two bounds, the Gauss
    rule and the Gauss-Radau rule with a node at zero (Golub & Meurant 2010, ch. 6). The run ends when the bounds are
    close. The mean over v estimates the trace (Ubaru, Chen & Saad 2017). If the budget reaches n products, unit vectors
    and the dense eigenvalues give the exact value.

    Do not use this for an indefinite operator: give the Gauss-Newton matrix, or a Hessian that is known to have no
    negative eigenvalue. Memory is the Lanczos vectors of one run.

    Args:
        operator: Symmetric and positive semi-definite operator `(n, n)`.
        damping: Damping, positive and above the rounding of the eigenvalues, 16 eps times the norm.
        tolerance: Error, relative to the value, at which to stop, in (0, 1). Default 5e-2.
        max_products: Budget of products, >= 1. Default 300.
        seed: Seed of the random vectors; the global random state is neither read nor written. Default 0.

    Returns:
        The effective dimension and its error.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, the operator is not square, or an eigenvalue is negative.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import effective_dimension
        >>> scales = torch.cat([torch.full((500,), 3.0), torch.zeros(500)]).double()
        >>> G = LinearOperator(lambda v: scales * v, (1000, 1000), scales, psd=True)
        >>> round(effective_dimension(G, damping=1.0).value)
        375

    See Also:
        - `EffectiveDimension`: the result.
        - `gauss_newton_spectrum()`: gives the sum exactly for small models or few samples.
        - `docs/reference/mathematics.md`: stochastic Lanczos quadrature.
    """
    size = check_operator(operator)
    check_positive("damping", damping)
    check_share("tolerance", tolerance)
    check_whole("max_products", max_products, 1)
    check_seed(seed)
    info = torch.finfo(operator.dtype)
    if max_products >= size:
        values = all_eigenvalues(operator)
        _check_semidefinite(float(values[0]), float(values.abs().max()), damping, info)
        values = values.clamp_min(0.0)
        return EffectiveDimension(float((values / (values + damping)).sum()), 0.0, 0.0, damping, size, True)
    generator = torch.Generator().manual_seed(seed)
    drawn, used, width = Samples(), 0, 0.0
    while used < max_products:
        start = signs(operator.like, generator)
        stop = _stop_rule(damping, info, _SHARE * tolerance)
        tridiagonal = lanczos(operator, start, max_products - used, stop=stop).tridiagonal
        used += tridiagonal.size
        low, high = _bounds(tridiagonal, damping, info)
        if drawn.count and used == max_products and not _is_narrow(low, high, _SHARE * tolerance):
            break  # a run that the budget cut short would only widen the bounds of the others
        # The bounds are for a unit vector; a vector of signs has the squared norm n.
        drawn.add(0.5 * size * (low + high))
        width += 0.5 * size * (high - low)
        allowed = tolerance * drawn.mean - width / drawn.count
        if drawn.count >= LEAST_SAMPLES and drawn.standard_error <= allowed:
            break
    truncation = width / drawn.count
    converged = drawn.standard_error + truncation <= tolerance * drawn.mean
    return EffectiveDimension(drawn.mean, drawn.standard_error, truncation, damping, used, converged)


def _stop_rule(damping: float, info: torch.finfo, tolerance: float) -> Callable[[Tridiagonal], bool]:
    due = 1

    def stop(tridiagonal: Tridiagonal) -> bool:
        nonlocal due
        if tridiagonal.size < due:
            return False
        # The small eigenproblem costs k^3: judged at every 16th part, it stays below the products' cost.
        due = tridiagonal.size + 1 + tridiagonal.size // 16
        return _is_narrow(*_bounds(tridiagonal, damping, info), tolerance)

    return stop


def _is_narrow(low: float, high: float, tolerance: float) -> bool:
    return high - low <= tolerance * low


def _bounds(tridiagonal: Tridiagonal, damping: float, info: torch.finfo) -> tuple[float, float]:
    """Return bounds on v'A (A + damping I)^-1 v for the unit start vector v.

    That is 1 - v'f(A)v with f = damping / (x + damping). As f's even derivatives are positive and its odd ones
    negative, Gauss's rule is below v'f(A)v, and the Gauss-Radau rule with a node at or below the spectrum is above it.
    """
    values, coordinates = tridiagonal.ritz()
    norm = float(values.abs().max())
    _check_semidefinite(float(values[0]), norm, damping, info)
    # Scaled by a power of two, so that squares neither underflow nor overflow.
    power = math.frexp(norm)[1]
    alphas, betas, values = (times_power(x, -power) for x in (tridiagonal.alphas, tridiagonal.betas, values))
    guard, damping = shifted(_guard(norm, info), -power), shifted(damping, -power)
    high = _quadrature(values, coordinates[0], damping)
    if tridiagonal.invariant:
        return high, high
    # The Radau rule extends T by a last coefficient that puts a node at a chosen place (Golub & Meurant 2010, sec.
    # 6.2): a little below zero, because rounding may leave the other nodes a little below zero.
    node = -guard
    coupling = 0.0
    for alpha, beta in zip(alphas.tolist(), betas.tolist(), strict=True):
        pivot = alpha - node - coupling
        coupling = beta**2 / pivot if pivot > 0.0 else math.inf
    if not math.isfinite(coupling):
        return 0.0, high
    last = torch.tensor([node + coupling], dtype=torch.float64, device="cpu")
    radau = Tridiagonal(torch.cat([alphas, last]), torch.cat([betas, last * 0.0]), 0.0)
    values, coordinates = radau.ritz()
    return max(0.0, _quadrature(values, coordinates[0], damping)), high


def _quadrature(values: Tensor, first: Tensor, damping: float) -> float:
    """Return v'A (A + damping I)^-1 v by a rule's nodes, and the first entries of its eigenvectors."""
    return float((first.square() * values / (values + damping)).sum())


def _guard(norm: float, info: torch.finfo) -> float:
    """Return the rounding of the eigenvalues, and what underflow takes from small ones."""
    return GUARD * (info.eps * norm + info.tiny)


def _check_semidefinite(smallest: float, norm: float, damping: float, info: torch.finfo) -> None:
    guard = _guard(norm, info)
    if smallest < -guard:
        raise ValueError(
            "operator must be positive semi-definite to have an effective dimension, got one with an eigenvalue at or "
            f"below {smallest:.3g}. Write gauss_newton(evaluation)."
        )
    if damping <= guard:
        raise ValueError(
            f"damping must be above the rounding error of the eigenvalues, {guard:.3g}, got {damping!r}. Raise it, or "
            "compute in float64."
        )
