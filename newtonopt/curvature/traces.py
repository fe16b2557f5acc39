"""Trace, Frobenius norm and diagonal of a symmetric operator, from products with random vectors.

`_find_range` and `_sample` below are the two halves of Hutch++, which trace and Frobenius norm share. `Samples`,
`student_factor` and `check_finite` serve the other estimates by random vectors too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from newtonopt.checks import check_choice, check_seed, check_share, check_whole
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.vectors.random import normals, signs, unit_vectors
from newtonopt.vectors.scaling import InRange, dot, lost, norm, times_power

Method = Literal["hutch++", "hutchinson"]

# A standard deviation from fewer samples is off by a quarter and more, and a test that stops on it stops too soon.
LEAST_SAMPLES = 10
# Number of last vectors of the range finder over which its forecasts are means.
_WINDOW = 3


@dataclass(frozen=True, repr=False)
class TraceEstimate:
    """An estimate of a trace.

    Attributes:
        value: Estimate of the sum of the eigenvalues.
        standard_error: Standard error of `value` over the random vectors; zero if the trace is exact. It includes
            what underflow may take from the value.
        products: Number of products with the operator that were used.
        converged: Whether the standard error is at most `tolerance * |value|`, or what underflow may take.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import trace
        >>> A = torch.diag(torch.arange(6, dtype=torch.float64))
        >>> found = trace(LinearOperator(A.mv, A.shape, A))
        >>> found.value, found.standard_error, found.products
        (15.0, 0.0, 6)

    See Also:
        - `trace()`: computes it.
        - `docs/measurements.md`: how far a standard error can be trusted.
    """

    value: float
    standard_error: float
    products: int
    converged: bool

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


@dataclass(frozen=True, repr=False)
class FrobeniusNorm:
    """An estimate of a Frobenius norm.

    Attributes:
        value: Estimate of the root of the sum of squares of the entries, or of the eigenvalues.
        standard_error: Standard error of `value` over the random vectors; zero if the norm is exact. It includes what
            underflow may take from the value.
        products: Number of products with the operator that were used.
        converged: Whether the standard error is at most `tolerance * value`, or what underflow may take.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import frobenius_norm
        >>> A = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> frobenius_norm(LinearOperator(A.mv, A.shape, A)).value
        5.0

    See Also:
        - `frobenius_norm()`: computes it.
        - `docs/measurements.md`: how far a standard error can be trusted.
    """

    value: float
    standard_error: float
    products: int
    converged: bool

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal:
    """An estimate of a diagonal.

    Attributes:
        values: Estimates of the entries A_ii, `(n,)`, in the operator's dtype and on its device.
        standard_errors: Standard error of each of them over the random vectors, `(n,)`; zero if they are exact.
        products: Number of products with the operator that were used.
        converged: Whether the norm of the standard errors is at most `tolerance` times the norm of the values.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import diagonal
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> diagonal(LinearOperator(A.mv, A.shape, A)).values.tolist()
        [2.0, 3.0]

    See Also:
        - `diagonal()`: computes it.
        - `docs/measurements.md`: how far a standard error can be trusted.
    """

    values: Tensor = field(repr=False)
    standard_errors: Tensor = field(repr=False)
    products: int
    converged: bool

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


def trace(
    operator: LinearOperator,
    method: Method = "hutch++",
    tolerance: float = 1e-2,
    max_products: int = 300,
    seed: int = 0,
) -> TraceEstimate:
    """Estimate `tr(A)` by products with random vectors.

    - "hutchinson": the mean of `v'Av` over vectors v of random signs (Hutchinson 1990), whose variance is twice
      the sum of `A_ij^2` over `i != j`.
    - "hutch++": the exact trace on the range Q of a sketch, plus the mean of `v'Av` on its complement (Meyer, Musco,
      Musco & Woodruff 2021). This differs from the paper in three points: Q is not a third of the budget, but grows
      while two products spent on it save more than two samples (as in Persson, Cortinovis & Kressner 2022), so that
      outliers cost a product or two each and a flat spectrum is hardly sketched; the sketch has normal vectors, which
      also estimate what is left over; and sampling stops on the observed standard error.

    If the budget reaches n products, unit vectors give the exact trace. Otherwise memory is that of Q, up to
    `max_products / 2` vectors of length n, and twice as much while a vector is added; two vectors for "hutchinson".

    Args:
        operator: Symmetric operator `(n, n)`.
        method: "hutch++" (default) or "hutchinson".
        tolerance: Standard error, relative to the value, at which to stop, in (0, 1). Default 1e-2. The budget ends
            first for an indefinite operator whose eigenvalues cancel.
        max_products: Budget of products, >= 1. Default 300.
        seed: Seed of the random vectors; the global random state is neither read nor written. Default 0.

    Returns:
        The trace and its standard error, from at least ten samples if the budget allows them.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import trace
        >>> scales = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64)
        >>> found = trace(LinearOperator(lambda v: scales * v, (1000, 1000), scales))
        >>> round(found.value, -1), found.converged
        (1500.0, True)

    See Also:
        - `TraceEstimate`: the result.
        - `frobenius_norm()`, `diagonal()`: further estimates by random vectors.
        - `Trace`: the same in a training run.
        - `docs/reference/mathematics.md`: Hutch++.
    """
    size = _check(operator, tolerance, max_products, seed)
    check_choice("method", method, get_args(Method))
    if max_products >= size:
        entries = [dot(unit, operator @ unit) for unit in unit_vectors(operator.like)]
        value = math.fsum(entries)
        check_finite(value, size)
        return TraceEstimate(value, _underflow(operator, value), size, True)
    matrix = InRange(operator)
    generator = torch.Generator().manual_seed(seed)

    def samples(found: _Range, left: int) -> tuple[float, float]:
        # v'Bv has the variance 2 |B|^2, less its diagonal's part; m samples reach the tolerance if the variance over m
        # is its square. |B|^2 enters once.
        return 2.0, min(left, 2.0 * found.rest / max((tolerance * found.level) ** 2, 1e-300))

    found = _find_range(matrix, operator.like, max_products if method == "hutch++" else 0, generator, samples)
    value, error, used = _sample(matrix, found, found.trace, dot, max_products, tolerance, generator)
    # The part on the range has the rounding of its products.
    error = math.hypot(error, torch.finfo(operator.dtype).eps * math.sqrt(found.square))
    value, error = matrix.back(value), matrix.back(error)
    least = _underflow(operator, value)
    error = math.hypot(error, least)
    return TraceEstimate(value, error, used, error <= max(tolerance * abs(value), least))


def frobenius_norm(
    operator: LinearOperator, tolerance: float = 1e-2, max_products: int = 300, seed: int = 0
) -> FrobeniusNorm:
    """Estimate `|A|_F` by the sketch of `trace` with "hutch++", and the mean of `|Av|^2` on what that leaves.

    If the budget reaches n products, unit vectors give the exact norm. Memory is as for `trace`.

    Args:
        operator: Symmetric operator `(n, n)`.
        tolerance: Standard error, relative to the value, at which to stop, in (0, 1). Default 1e-2.
        max_products: Budget of products, >= 1. Default 300.
        seed: Seed of the random vectors; the global random state is neither read nor written. Default 0.

    Returns:
        The norm and its standard error, from at least ten samples if the budget allows them.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import frobenius_norm
        >>> scales = torch.full((10_000,), 0.5, dtype=torch.float64)
        >>> found = frobenius_norm(LinearOperator(lambda v: scales * v, (10_000, 10_000), scales))
        >>> round(found.value), found.converged
        (50, True)

    See Also:
        - `FrobeniusNorm`: the result.
        - `trace()`: the sum of the eigenvalues, instead of that of their squares.
        - `docs/measurements.md`: errors and costs beside those of other measurements.
    """
    size = _check(operator, tolerance, max_products, seed)
    if max_products >= size:
        value = math.hypot(*(norm(operator @ unit) for unit in unit_vectors(operator.like)))
        check_finite(value, size)
        return FrobeniusNorm(value, _underflow(operator, value), size, True)
    matrix = InRange(operator)
    generator = torch.Generator().manual_seed(seed)

    def samples(found: _Range, left: int) -> tuple[float, float]:
        # |Bv|^2 has at most the variance 2 |B|^4, and the norm half the relative error of its square. |B|^2 enters
        # squared, so that a drop in it is worth twice as much.
        share = found.rest / (found.square + found.rest) if found.rest > 0.0 else 0.0
        return 1.0, min(left, share**2 / (2.0 * tolerance**2))

    found = _find_range(matrix, operator.like, max_products, generator, samples)

    def sample(v: Tensor, Av: Tensor) -> float:
        outside = _outside(Av, found.rows)
        return dot(outside, outside)

    square, error, used = _sample(matrix, found, found.square, sample, max_products, 2.0 * tolerance, generator)
    value = math.sqrt(square)
    # d|A| = d(|A|^2) / (2 |A|)
    error = math.hypot(0.5 * error / value if value > 0.0 else 0.0, torch.finfo(operator.dtype).eps * value)
    value, error = matrix.back(value), matrix.back(error)
    least = _underflow(operator, value)
    error = math.hypot(error, least)
    return FrobeniusNorm(value, error, used, error <= max(tolerance * value, least))


def diagonal(operator: LinearOperator, tolerance: float = 0.1, max_products: int = 300, seed: int = 0) -> Diagonal:
    """Estimate `diag(A)` by the mean of `v * Av` over vectors v of random signs (Bekas, Kokiopoulou & Saad 2007).

    The variance of an entry is the sum of the squares of the others in its row. If the budget reaches n products, unit
    vectors give the exact diagonal.

    Do not use this for the smallest entries of a matrix with large entries off the diagonal: it cannot resolve them,
    as their standard errors show.

    Args:
        operator: Symmetric operator `(n, n)`.
        tolerance: Norm of the standard errors, relative to the norm of the values, at which to stop, in (0, 1). Default
            0.1: the error falls with the root of the products only.
        max_products: Budget of products, >= 1. Default 300.
        seed: Seed of the random vectors; the global random state is neither read nor written. Default 0.

    Returns:
        The diagonal and its standard errors, from at least ten samples if the budget allows them.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> from newtonopt.curvature import diagonal
        >>> theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> H = hessian(evaluate(lambda: (theta**3).sum() + theta.prod(), [theta]))
        >>> [round(entry, 6) for entry in diagonal(H).values.tolist()]
        [6.0, 6.0, 6.0]

    See Also:
        - `Diagonal`: the result.
        - `trace()`: the sum of the entries, for far fewer products.
        - `LinearOperator.dense()`: the whole matrix, for small models.
    """
    size = _check(operator, tolerance, max_products, seed)
    mean = operator.like.new_zeros(size)
    squares = torch.zeros_like(mean)
    if max_products >= size:
        for index, unit in enumerate(unit_vectors(operator.like), start=1):
            mean += unit * (operator @ unit)
            check_finite(norm(mean), index)
        return Diagonal(mean, _at_least_underflow(squares, mean), size, True)
    matrix = InRange(operator)
    generator = torch.Generator().manual_seed(seed)
    used, error = 0, math.inf
    while used < max_products:
        v = signs(operator.like, generator)
        used += 1
        # Welford's recursion, for all entries at once.
        before = v * (matrix @ v) - mean
        mean += before / used
        squares.addcmul_(before, before, value=1.0 - 1.0 / used)
        level = norm(mean)
        check_finite(level, used)
        error = student_factor(used) * math.sqrt(float(squares.sum()) / used) if used > 1 else math.inf
        if used >= LEAST_SAMPLES and error <= tolerance * level:
            break
    errors = (squares / used).sqrt() * student_factor(used) if used > 1 else torch.full_like(mean, math.inf)
    values, errors = (times_power(x, matrix.exponent) for x in (mean, errors))
    return Diagonal(values, _at_least_underflow(errors, values), used, error <= tolerance * level)


def _at_least_underflow(errors: Tensor, values: Tensor) -> Tensor:
    """Return the errors, raised to what underflow may take if all values are tiny."""
    change = lost(values.dtype, 1)
    visible = float(values.abs().max()) * torch.finfo(values.dtype).eps > change
    return errors if visible else errors.clamp_min(change)


def _check(operator: LinearOperator, tolerance: float, max_products: int, seed: int) -> int:
    size = check_operator(operator)
    check_share("tolerance", tolerance)
    check_whole("max_products", max_products, 1)
    check_seed(seed)
    return size


def _underflow(operator: LinearOperator, value: float) -> float:
    """Return by how much underflow may change a trace or a norm; zero if that is below its rounding."""
    size = operator.shape[0]
    change = math.sqrt(size) * lost(operator.dtype, size)
    return change if change > torch.finfo(operator.dtype).eps * abs(value) else 0.0


@dataclass(frozen=True, eq=False)
class _Range:
    """Orthonormal rows Q and what is known of A there. B = (I - Q'Q) A (I - Q'Q) is the part that Q leaves over.

    Attributes:
        rows: Q, `(k, n)`.
        core: Q A Q', `(k, k)`, float64 on the CPU.
        square: |A|^2 - |B|^2, Frobenius norms.
        products: Number of products used.
        level: Estimate of the trace of A.
        rest: Estimate of |B|^2, from above.
    """

    rows: Tensor
    core: Tensor
    square: float = 0.0
    products: int = 0
    level: float = 0.0
    rest: float = 0.0

    @property
    def trace(self) -> float:
        return float(self.core.trace())


def _find_range(
    matrix: InRange,
    like: Tensor,
    max_products: int,
    generator: torch.Generator,
    samples: Callable[[_Range, int], tuple[float, float]],
) -> _Range:
    """Grow Q by orthonormalised vectors A g, g normal, while that pays.

    With m samples to come, a vector that takes `drop` off |B|^2 takes m drop / |B|^2 off their number (twice that, if
    the variance goes with |B|^4), and costs two products.

    Args:
        matrix: A.
        like: The operator's `like`, no rows `(0, n)`.
        max_products: Number of products that may be spent, samples included; zero for no range at all.
        generator: Generator of the vectors g.
        samples: Function from what is known and the products left to the number of products that m drop / |B|^2 must
            exceed to pay, and to the number m of samples to come.
    """
    found = _Range(like, torch.zeros(0, 0, dtype=torch.float64, device="cpu"))
    history: list[tuple[float, float, float]] = []
    while found.products + 2 + LEAST_SAMPLES <= max_products:
        grown, seen = _grow(matrix, found, generator)
        if grown is None:
            return found
        # One vector's estimates are noisy: forecasts are means over the last few.
        history = [*history, seen][-_WINDOW:]
        level, rest, drop = (math.fsum(column) / len(history) for column in zip(*history, strict=True))
        found = _Range(grown.rows, grown.core, grown.square, grown.products, level, rest)
        worth, count = samples(found, max_products - found.products)
        if len(history) == _WINDOW and drop * count <= worth * rest:
            return found
    return found


def _grow(
    matrix: InRange, found: _Range, generator: torch.Generator
) -> tuple[_Range | None, tuple[float, float, float]]:
    """Return the range with one more row, None if A g brings nothing new; and (level, rest, drop) of this vector.

    As g is independent of Q, it also gives unbiased estimates of tr(A) and of |(I - Q'Q) A|^2, free of charge.
    """
    g = normals(found.rows, generator)
    y = matrix @ g
    check_finite(dot(y, y), found.products + 1)
    # tr(A) = tr(Q A Q') + tr(B), and g'Bg has the mean tr(B).
    inside, image = _float64(found.rows @ g), _float64(found.rows @ y)
    level = found.trace + dot(g, y) - float(2.0 * inside @ image - inside @ (found.core @ inside))
    new = _outside(y, found.rows)
    rest = dot(new, new)
    # Projection leaves nothing but rounding of a vector inside the range.
    if rest <= (100.0 * torch.finfo(y.dtype).eps) ** 2 * dot(y, y):
        return None, (level, rest, 0.0)
    q = new / math.sqrt(rest)
    a = matrix @ q
    check_finite(dot(a, a), found.products + 2)
    # |B|^2 loses the row and the column of q: twice |Bq|^2, less the corner that both contain.
    border, corner = _float64(found.rows @ a), dot(q, a)
    drop = 2.0 * dot(a, a) - 2.0 * float(border @ border) - corner**2
    column = torch.cat([border, torch.tensor([corner], dtype=torch.float64, device="cpu")])
    core = torch.cat([torch.cat([found.core, border[None]]), column[:, None]], 1)
    rows = torch.cat([found.rows, q.unsqueeze(0)])
    return _Range(rows, core, found.square + drop, found.products + 2), (level, rest, drop)


def _sample(
    matrix: InRange,
    found: _Range,
    known: float,
    sample: Callable[[Tensor, Tensor], float],
    max_products: int,
    tolerance: float,
    generator: torch.Generator,
) -> tuple[float, float, int]:
    """Return the mean of samples on the complement plus what is known, its standard error, and all products used."""
    drawn, used = Samples(), found.products
    while used < max_products:
        v = _outside(signs(found.rows, generator), found.rows)
        drawn.add(sample(v, matrix @ v))
        used += 1
        check_finite(drawn.mean, used)
        if drawn.count >= LEAST_SAMPLES and drawn.standard_error <= tolerance * abs(known + drawn.mean):
            break
    return known + drawn.mean, drawn.standard_error, used


def _outside(vector: Tensor, rows: Tensor) -> Tensor:
    """Return the part of a vector that is orthogonal to all rows, projected twice against rounding."""
    outside = vector.clone()
    for _ in range(2 if rows.shape[0] else 0):
        outside.addmv_(rows.T, rows @ outside, alpha=-1.0)
    return outside


def _float64(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float64)


def check_finite(value: float, products: int) -> None:
    """Raise a FloatingPointError if a value that was computed from a product is not finite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"Product number {products} with the operator is not finite, so nothing is known about its spectrum. Check "
            "that loss and gradient are finite at this point, and compute products in float32 or float64 rather than "
            'under autocast. If a norm is zero, write products="finite_difference".'
        )


class Samples:
    """Mean and standard error of numbers that arrive one by one (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Add a number."""
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, widened by `student_factor`; infinite for a single number."""
        if self.count < 2:
            return math.inf
        return student_factor(self.count) * math.sqrt(self._squares / self.count)


def student_factor(count: int) -> float:
    """Return the factor from the root of the mean square deviation of `count` samples to a standard error of the mean.

    The standard error is widened so that the truth lies within two of them as often (95 %) as with many samples, by
    the quantile of Student's distribution over the normal one's z = 1.96, which is
    1 + (z^2 + 1) / (4 f) + (5 z^4 + 16 z^2 + 3) / (96 f^2) + ... for f = count - 1 (Abramowitz & Stegun 1964, 26.7.5).
    """
    free = count - 1
    return (1.0 + 1.21 / free + 1.44 / free**2) / math.sqrt(free)
