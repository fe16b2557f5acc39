"""The exact spectrum of the Gauss-Newton matrix, from the rows of the Jacobian.

The matrix is `R'R + decay`, with `R` the residual rows, `(m, n)`: its eigenvalues are the squared singular values of
`R`, and `n - m` zeros if there are more parameters than rows. No iteration converges here, so that there is no bound to
ask for beyond rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newtonopt.checks import check_flag, check_positive
from newtonopt.closure.evaluation import Evaluation
from newtonopt.curvature.drawing import figure_of, panels
from newtonopt.curvature.showing import as_table, as_text, written
from newtonopt.operators.matrices import gauss_newton
from newtonopt.operators.rows import Rows, RowsError, residual_rows
from newtonopt.vectors.memory import check_room, fits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ExactSpectrum:
    """All eigenvalues of a Gauss-Newton matrix.

    Attributes:
        values: Eigenvalues `(k,)`, float64 on the CPU, the largest first; `k` is the smaller of the numbers of rows and
            of parameters.
        errors: Bounds on the rounding errors of `values`, `(k,)`.
        vectors: Orthonormal eigenvectors, a column each, `(n, k)`, in the dtype and on the device of the gradient; None
            if they were not asked for.
        rest: Value of each of the other `n - k` eigenvalues: the weight decay.
        size: Number `n` of all eigenvalues.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import ExactSpectrum
        >>> values = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> found = ExactSpectrum(values, torch.full((2,), 1e-15), None, 0.0, 5)
        >>> found.trace, found.rank, found.condition_number, found.effective_dimension(1.0)
        (4.0, 2, 3.0, 1.25)

    See Also:
        - `gauss_newton_spectrum()`: computes it.
        - `effective_dimension()`: the same sum, by products.
        - `docs/measurements.md`: errors and costs beside those of other measurements.
    """

    values: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)
    vectors: Tensor | None = field(repr=False)
    rest: float
    size: int

    def __repr__(self) -> str:
        return as_text(self, self._ends())

    def _repr_html_(self) -> str:
        return as_table(self, self._ends())

    def _ends(self) -> dict[str, float]:
        return {"largest": float(self.values.max()) if len(self.values) else self.rest, "rank": self.rank}

    @property
    def nonzero(self) -> Tensor:
        """Entries of `values` that are not zero up to rounding."""
        return self.values[self.values > self.errors]

    @property
    def trace(self) -> float:
        """Sum of all eigenvalues."""
        return float(self.values.sum()) + self._others * self.rest

    @property
    def rank(self) -> int:
        """Number of eigenvalues that are not zero up to rounding."""
        return len(self.nonzero) + (self._others if self.rest > 0.0 else 0)

    @property
    def condition_number(self) -> float:
        """Largest eigenvalue over the smallest one that is not zero up to rounding; NaN if all are zero."""
        nonzero = self.nonzero.tolist()
        if self._others and self.rest > 0.0:
            nonzero.append(self.rest)
        return max(nonzero) / min(nonzero) if nonzero else math.nan

    def effective_dimension(self, damping: float) -> float:
        """Return the sum of `lambda / (lambda + damping)` over all eigenvalues.

        Args:
            damping: Damping, positive.

        Raises:
            ValueError: `damping` is not positive.
        """
        check_positive("damping", damping)
        shares = self.values / (self.values + damping)
        return float(shares.sum()) + self._others * self.rest / (self.rest + damping)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the eigenvalues on a logarithmic scale, the largest first, above a grey area that is rounding.

        Eigenvalues that are zero up to rounding are left out, as are the other `n - k`.

        Args:
            ax: Axes of matplotlib to draw in; None (default): a new figure, which `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is not axes.
        """
        (axes,) = panels(ax, 1)
        nonzero = self.nonzero
        errors = self.errors[: len(nonzero)]
        numbers = torch.arange(1, len(nonzero) + 1, device="cpu")
        if len(nonzero):
            axes.semilogy(numbers.numpy(), nonzero.numpy(), color="C0", linewidth=1.5, marker=".", markersize=3)
            low = 0.3 * float(nonzero.min())
            axes.fill_between(numbers.numpy(), low, errors.clamp_min(low).numpy(), color="0.85", linewidth=0)
            axes.set(ylim=(low, 3.0 * float(nonzero.max())))
        axes.set(xlabel="number", ylabel="eigenvalue")
        condition = f", condition number {written(self.condition_number, 2)}" if len(nonzero) else ""
        axes.set_title(f"{self.size} eigenvalues, {self.rank} not zero{condition}", fontsize="medium")
        return figure_of(axes)

    @property
    def _others(self) -> int:
        return self.size - len(self.values)


@torch.inference_mode(False)
@torch.no_grad()
def gauss_newton_spectrum(evaluation: Evaluation, vectors: bool = False) -> ExactSpectrum:
    """Compute all eigenvalues of the Gauss-Newton matrix, exact to rounding, from the residual rows `R`, `(m, n)`.

    Let `k` be the smaller of `m` and `n`. The rows are brought to a triangle `T`, `(k, k)`, with the same singular
    values `s`, by orthogonal transformations, a layer or a block of rows after the other. The eigenvalues are `s^2`:
    each is exact to `2 s e + e^2`, `e = max(m, n) eps s_max`, far below `eps` times the largest eigenvalue, which is
    what the eigenvalues of `R R'` or of `R'R` would be exact to. That costs about `max(m, n) k^2 + 4 k^3`
    multiplications. Where the loss couples the outputs of a sample, as cross-entropy does, its Hessian is known to
    `eps` times its size only, and so are the eigenvalues.

    Where there are so many more parameters than rows that this takes about ten times as long as `R R'`, or where it
    does not fit in memory, the eigenvalues are those of `R R'`, formed from the factors of the layers: eigenvalues
    below `m eps` times the largest are rounding then. So they are for more parameters than rows in float32, of which
    `R R'` in float64 loses nothing. Vectors need `R` itself. All is computed in float64, and `errors` says what holds.

    Weight decay is added. If it differs between parameters, all `n` eigenvalues are returned, from a triangle `(n, n)`.

    Do not use this for a few eigenvalues, for large `k`, or where samples are coupled: `extreme_eigenvalues` and
    `spectral_density` of `gauss_newton(evaluation)` take products alone.

    Args:
        evaluation: Return value of `evaluate(closure, params)`, with cached products.
        vectors: Whether to return the eigenvectors too, `n k` numbers. Default False.

    Returns:
        The eigenvalues.

    Raises:
        TypeError: `evaluation` is no `Evaluation`, or `vectors` no bool.
        RuntimeError: Samples are coupled, a loss is not convex in its outputs, no output was recorded, or the
            evaluation was freed.
        MemoryError: The triangle or the vectors would not fit.
        FloatingPointError: The loss or a row is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> from newtonopt.curvature import gauss_newton_spectrum
        >>> theta = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        >>> target = torch.zeros(2, dtype=torch.float64)
        >>> def closure():
        ...     return torch.nn.functional.mse_loss(theta[:2] ** 2, target)
        >>> found = gauss_newton_spectrum(evaluate(closure, [theta]))
        >>> [round(value, 9) for value in found.values.tolist()], found.size, found.rank
        ([16.0, 4.0], 3, 2)

    See Also:
        - `ExactSpectrum`: the result.
        - `neural_tangent_kernel()`: a matrix with the same nonzero eigenvalues, for a loss of half the squares' sum.
        - `extreme_eigenvalues()`: a few eigenvalues, by products.
        - `GaussNewtonSpectrum`: the same in a training run.
    """
    check_flag("vectors", vectors)
    gauss_newton(evaluation)  # checks the evaluation, and warns of terms that the matrix leaves out
    try:
        rows = residual_rows(evaluation)
    except RowsError as error:
        raise error if evaluation.form != "cached" else RowsError(error.reason, _BY_PRODUCTS) from error
    decay = evaluation.decay
    if isinstance(decay, Tensor) and bool((decay == decay[0]).all()):
        decay = float(decay[0])
    m, n = rows.shape
    k = n if isinstance(decay, Tensor) else min(m, n)
    _check_memory(rows, k, vectors)
    from_products = not vectors and k < n and _takes_products(rows)
    if from_products:
        # Eigenvalues of R R' below rounding may come out negative.
        squares = torch.linalg.eigvalsh(_finite(rows.double().gram())).flip(0).clamp_min(0.0).cpu()
        found = None
    else:
        s, found = _decomposed(rows, decay, k, vectors)
        squares = s.square().cpu()
    rest = 0.0 if isinstance(decay, Tensor) else float(decay)
    if found is not None:
        found = found.to(rows.residuals.dtype)
    return ExactSpectrum(squares + rest, _errors(rows, squares, from_products), found, rest, n)


def _errors(rows: Rows, squares: Tensor, from_products: bool) -> Tensor:
    """Return the rounding errors of the squared singular values, `(k,)`."""
    eps = torch.finfo(rows.residuals.dtype).eps
    # The usual bound on the error of a singular value (Golub & Van Loan 2013, sec. 5.4.1).
    e = max(rows.shape) * eps * squares[:1].sqrt()
    errors = (2.0 * squares.sqrt() + e) * e
    if from_products:
        errors += len(squares) * torch.finfo(torch.float64).eps * squares[:1]
    # The root of a sample's output Hessian makes an error of eps in the Hessian one of sqrt(eps) in a row.
    columns = max((root.blocks.shape[1] for root in rows.roots), default=1)
    if columns > 1:
        errors += _HESSIAN * columns * eps * squares[:1]
    return errors


# Rounding of a loss's Hessian by the outputs, in units of eps for each entry of a sample's outputs.
_HESSIAN = 16
_BY_PRODUCTS = "Use spectral_density(gauss_newton(evaluation)), which needs products alone."
# Multiplications beyond those of sixteen triangles' for which the rows are still brought to a triangle: about a second.
_CHEAP = 1e10
# Rows, in units of the triangle's, that are added to it at once.
_BLOCK = 4


def _takes_products(rows: Rows) -> bool:
    """Return whether `R R'` is taken rather than the rows, of which there are fewer than parameters."""
    m, n = rows.shape
    dtype, device = rows.residuals.dtype, rows.residuals.device
    # In float64 R R' loses nothing that rows in float32 know.
    exact = dtype != torch.float64
    takes_long = n * m**2 > 16 * m**3 + _CHEAP
    return exact or takes_long or not fits(2 * m * max(rows.sizes), torch.float64, device)


def _decomposed(rows: Rows, decay: float | Tensor, k: int, vectors: bool) -> tuple[Tensor, Tensor | None]:
    """Return the singular values of the rows, `(k,)`, descending, and the right singular vectors, `(n, k)`, if asked.

    Decay that differs between parameters is `n` further rows, for `R'R + D` is the matrix of `[R; sqrt(D)]`.
    """
    n = rows.shape[1]
    below = [torch.diag(decay.double().sqrt())] if isinstance(decay, Tensor) else []
    if vectors:
        matrix = _finite(torch.cat([rows.dense().double(), *below]))
        # R' = Q T or R = Q T, whichever is tall; the singular values of T are those of R.
        if len(matrix) < n:
            Q, T = torch.linalg.qr(matrix.T)
            left, s, _ = torch.linalg.svd(T)
            return s, Q @ left
        _, T = torch.linalg.qr(matrix, mode="r")
        _, s, right = torch.linalg.svd(T)
        return s, right.T
    if k < n:
        T = _triangle((part.dense().double().T for part in rows.parts), k, rows.residuals)
    else:
        T = _triangle(itertools.chain(_spans(rows, _BLOCK * k), below), k, rows.residuals)
    return torch.linalg.svdvals(_finite(T)), None


def _triangle(blocks: Iterable[Tensor], k: int, like: Tensor) -> Tensor:
    """Return `T`, `(k, k)`, with `T'T` the sum of `B'B` over these blocks `B` of `k` columns, `k` rows at least."""
    T = torch.zeros(0, k, dtype=torch.float64, device=like.device)
    waiting: list[Tensor] = []
    for piece in (piece for block in blocks for piece in block.split(_BLOCK * k)):
        waiting.append(piece)
        # A step costs as much for a bias as for k rows, so that small blocks wait for each other.
        if sum(map(len, waiting)) >= _BLOCK * k:
            T, waiting = _folded(T, waiting), []
    return _folded(T, waiting) if waiting else T


def _folded(T: Tensor, blocks: list[Tensor]) -> Tensor:
    triangle: Tensor = torch.linalg.qr(torch.cat([T, *blocks]), mode="r").R
    return triangle


def _spans(rows: Rows, length: int) -> Iterator[Tensor]:
    """Yield the rows in blocks `(length, n)`."""
    for span in torch.arange(rows.shape[0], device=rows.residuals.device).split(length):
        yield torch.cat([part.ordered(span).dense() for part in rows.parts], 1).double()


def _finite(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise FloatingPointError(
            "A row of the Jacobian is not finite, so there is no curvature. Look for a norm, a root or a logarithm at "
            "zero."
        )
    return matrix


def _check_memory(rows: Rows, k: int, vectors: bool) -> None:
    """Raise a MemoryError if the triangle, or the rows for vectors, would not fit."""
    m, n = rows.shape
    device = rows.residuals.device
    if vectors:
        entries = 3 * n * max(m, k)
        check_room(entries, torch.float64, device, f"Eigenvectors from {m} rows of {n} entries", _BY_PRODUCTS)
    else:
        # The triangle with a block of rows, their copy, and the singular values' workspace.
        entries = (2 * _BLOCK + 3) * k * k
        check_room(entries, torch.float64, device, f"The spectrum of a {k} x {k} matrix", _BY_PRODUCTS)
