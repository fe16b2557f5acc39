"""`LinearOperator`: a matrix known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from newtonopt.checks import check_instance
from newtonopt.progress import progress
from newtonopt.vectors.memory import check_room
from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import norm
from newtonopt.vectors.sharded import Sharded

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

Array = NDArray[Any]
# `v -> A v`, or row by row for rows `(k, n)`.
Product = Callable[[Tensor], Tensor]

# Products with a larger relative error may be a matrix's that is not positive semi-definite.
_CLOSE = 0.05
# How many products `dense` asks for at a time.
_ROWS = 128
# How much further products formed at once may be from single ones than rounding alone puts them.
_COARSER = 4.0


@dataclass(frozen=True)
class Trust:
    """Trust in the products of an operator.

    Attributes:
        doubt: Why the products cannot be vouched for; empty if they can.
        error: Estimated relative error of a product; zero for exact ones.
    """

    doubt: str = ""
    error: float = 0.0


@dataclass
class Count:
    """A count of products, shared by an operator and those derived from it."""

    products: int = 0


class LinearOperator:
    """A matrix known by its products, over flat vectors in the order of the parameters.

    Args:
        product: Computes `A v` for `v` of shape `(columns,)`.
        shape: `(rows, columns)`.
        like: A tensor of the operator's dtype and device.
        psd: Whether the matrix is positive semi-definite by construction. Default False.
        transpose: Computes `A' u`; None (default) for a symmetric matrix.
        rows: Computes `A v` for each row `v` of `(k, columns)`; None (default): they are computed one by one.
        whole: Forms the whole matrix where that is cheaper than by products, else returns None; None (default): it is
            formed by products.
        trust: Returns how far the products can be trusted; None (default): they are exact.
        count: Counts the products; None (default): they are counted from zero.

    Attributes:
        like: No rows `(0, columns)`, from which vectors of the operator's kind can be made.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> A = LinearOperator(lambda v: matrix @ v, (2, 2), matrix)
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> A.shift(10.0).dense()
        tensor([[12.,  1.],
                [ 1., 13.]])
        >>> A.products
        3

    See Also:
        - `hessian()`, `gauss_newton()`, `jacobian()`: the operators of a loss.
        - `extreme_eigenvalues()`: takes any symmetric operator.
        - `blocks()`: operators for parts of a model.
    """

    def __init__(
        self,
        product: Product,
        shape: tuple[int, int],
        like: Tensor,
        *,
        psd: bool = False,
        transpose: Product | None = None,
        rows: Product | None = None,
        whole: Callable[[], Tensor | None] | None = None,
        trust: Callable[[], Trust] | None = None,
        count: Count | None = None,
    ) -> None:
        self._product = product
        self._rows = rows
        self._whole = whole
        self._transpose = transpose
        self._psd = psd
        self._trust = trust
        self._count = Count() if count is None else count
        self.shape = shape
        self.dtype = like.dtype
        self.device = like.device
        self.like = like.new_empty(0, shape[1])

    @property
    def products(self) -> int:
        """Number of products formed, by this operator and by operators derived from it."""
        return self._count.products

    @property
    @torch.inference_mode(False)
    @torch.no_grad()
    def trust(self) -> Trust:
        """Trust in the products. Finding it out before the first product takes some products."""
        return Trust() if self._trust is None else self._trust()

    @property
    def psd(self) -> bool:
        """Whether the matrix is positive semi-definite by construction, and the products can be vouched for."""
        return self._psd and not self.trust.doubt and self.trust.error < _CLOSE

    @property
    def T(self) -> LinearOperator:
        """The transpose; a symmetric operator is its own."""
        if self._transpose is None:
            return self
        rows, columns = self.shape
        transposed, own, like, whole = self._transpose, self._product, self.like, self._whole
        turned = None if whole is None else lambda: None if (found := whole()) is None else found.T
        return LinearOperator(
            transposed, (columns, rows), like, transpose=own, whole=turned, trust=self._trust, count=self._count
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def __matmul__(self, v: Tensor) -> Tensor:
        """Return `A v` for `v` of shape `(columns,)`, or column by column for `(columns, k)`.

        Raises:
            TypeError: `v` is no tensor.
            ValueError: `v` has another length, or only one of `v` and the operator is sharded.
        """
        if not isinstance(v, Tensor):
            raise TypeError(f"v must be a tensor of shape ({self.shape[1]},), got a value of type {type(v).__name__}.")
        if v.dim() not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"v must be of shape ({self.shape[1]},) or ({self.shape[1]}, k) for this {self.shape[0]} x "
                f"{self.shape[1]} operator, got shape {tuple(v.shape)}."
            )
        self._check_kind(v)
        if v.dim() == 2:
            return torch.stack([self @ column for column in v.unbind(1)], dim=1)
        self._count.products += 1
        return self._product(v.to(self.dtype))

    def shift(self, c: float | Tensor) -> LinearOperator:
        """Return `A + c I`, or `A + diag(c)` for `c` of shape `(n,)`; it shares this operator's count of products."""
        psd = self._psd and bool((c.min() if isinstance(c, Tensor) else c) >= 0)
        product, rows, whole = self._product, self._rows, self._whole
        shifted = None if rows is None else lambda V: _plus(rows(V), c, V)
        moved = None if whole is None else lambda: _shifted(whole(), c)
        return self._derived(lambda v: _plus(product(v), c, v), self.shape[0], psd, shifted, moved)

    def scale(self, d: Tensor) -> LinearOperator:
        """Return `D A D` with `D = diag(d)`, `d` of shape `(n,)`; it shares this operator's count of products."""
        product = self._product
        return self._derived(lambda v: d * product(d * v), self.shape[0], self._psd)

    def block(self, spans: Sequence[tuple[int, int]]) -> LinearOperator:
        """Return a diagonal block, sharing this operator's count of products.

        Args:
            spans: The block's entries, as ascending ranges `[start, stop)`.
        """
        pieces = [slice(*span) for span in spans]
        sizes = [stop - start for start, stop in spans]

        def product(v: Tensor) -> Tensor:
            whole = v.new_zeros(self.shape[1])
            for piece, part in zip(pieces, v.split(sizes), strict=True):
                whole[piece] = part
            image = self._product(whole)
            return torch.cat([image[piece] for piece in pieces])

        return self._derived(product, sum(sizes), self._psd)

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the whole matrix, for one product a column (a row if there are fewer), symmetrised if it is symmetric.

        A Gauss-Newton matrix and a Jacobian are formed from the rows of all samples, where that takes less.

        Several products are formed at once where operations allow that, and a bar shows the progress of a long run.
        One product more compares each number of rows formed at once with a single one: where they differ, because an
        operation mixes the rows, all are formed one by one.

        Raises:
            MemoryError: The matrix would not fit in the memory that is available: nothing was allocated.
            ValueError: The operator is sharded.
        """
        rows, columns = self.shape
        self._check_kind(torch.empty(0))
        remedy = "Use products A @ v, which need only vectors."
        check_room(rows * columns, self.dtype, self.device, f"A {rows} x {columns} matrix", remedy)
        if self._whole is not None and (whole := self._whole()) is not None:
            return whole
        if self._transpose is not None and rows < columns:
            return self.T.dense().T
        transposed = torch.empty(columns, rows, dtype=self.dtype, device=self.device)
        at_once, checked = self._rows, {1}
        with progress(columns, "curvature matrix") as tick:
            for first, piece in zip(range(0, columns, _ROWS), transposed.split(_ROWS), strict=True):
                units = torch.zeros(len(piece), columns, dtype=self.dtype, device=self.device)
                units.diagonal(first).fill_(1)
                if at_once is not None:
                    piece.copy_(at_once(units))
                    self._count.products += len(piece)
                    if not (len(piece) in checked or self._agrees(units, piece)):
                        at_once = None
                    checked.add(len(piece))
                if at_once is None:
                    for row, unit in zip(piece, units, strict=True):
                        row.copy_(self @ unit)
                tick(len(piece))
        return transposed.T if self._transpose is not None else _symmetrised(transposed)

    def to_scipy(self) -> ScipyOperator:
        """Return the operator for SciPy's solvers, such as `scipy.sparse.linalg.eigsh`; its products are counted here.

        Vectors are NumPy's on the CPU, in the operator's dtype; float64 where NumPy has none for it (bfloat16).

        Returns:
            A `scipy.sparse.linalg.LinearOperator`.

        Raises:
            ImportError: SciPy is missing.
            ValueError: The operator is sharded.

        Example:
            >>> import torch
            >>> from scipy.sparse.linalg import eigsh
            >>> from newtonopt import LinearOperator
            >>> weights = torch.arange(10, dtype=torch.float64)
            >>> A = LinearOperator(lambda v: weights * v, (10, 10), weights)
            >>> values = eigsh(A.to_scipy(), k=2, which="LA", return_eigenvectors=False)
            >>> [round(value, 6) for value in values.tolist()]
            [8.0, 9.0]
        """
        try:
            from scipy.sparse.linalg import LinearOperator as Operator
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy, which is not installed: pip install scipy") from error
        self._check_kind(torch.empty(0))
        dtype = _as_numpy(self.like[:0].reshape(-1)).dtype
        forward, backward = _on_arrays(self), _on_arrays(self.T)
        return Operator(
            shape=self.shape, dtype=dtype, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward
        )

    def _agrees(self, V: Tensor, images: Tensor) -> bool:
        """Whether a random combination of products formed at once, row by row, is the product with the combination."""
        generator = torch.Generator().manual_seed(0)
        weights = normals(V[:, 0], generator)
        v, expected = weights @ V, weights @ images
        image, size = self @ v, norm((weights.unsqueeze(1) * images).reshape(-1))
        error = norm(image - expected)
        if not math.isfinite(error):
            return False
        if error <= math.sqrt(torch.finfo(self.dtype).eps) * size:
            return True
        # Coarser rounding, by autocast or TensorFloat-32, shows where a multiple of the vector is rounded otherwise.
        return error <= _COARSER * norm((self @ (3 * v)) / 3 - image)

    def _check_kind(self, v: Tensor) -> None:
        if isinstance(v, Sharded) != isinstance(self.like, Sharded):
            own, given = ("sharded", "whole") if isinstance(self.like, Sharded) else ("whole", "sharded")
            raise ValueError(
                f"v must be {own}, like the operator's parameters, got a {given} vector. Derive it from a vector of "
                "the evaluation, such as evaluation.gradient."
            )

    def _derived(
        self,
        product: Product,
        n: int,
        psd: bool,
        rows: Product | None = None,
        whole: Callable[[], Tensor | None] | None = None,
    ) -> LinearOperator:
        return LinearOperator(
            product, (n, n), self.like, psd=psd, rows=rows, whole=whole, trust=self._trust, count=self._count
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"LinearOperator({rows} x {columns}, {self.dtype}, {self.device}, products={self.products})"


def _on_arrays(A: LinearOperator) -> Callable[[Array], Array]:
    """Return the product of arrays `(n,)` or `(n, k)`."""

    def product(v: Array) -> Array:
        if np.iscomplexobj(v):
            raise TypeError(
                f"v must be real, as the operator is, got an array of {np.asarray(v).dtype}. Multiply its real and its "
                "imaginary part one after the other."
            )
        # A copy in the machine's format: arrays may be read-only or of negative strides, which tensors cannot share.
        own = torch.tensor(np.array(v, dtype=np.float64, order="C"), dtype=A.dtype, device=A.device)
        return _as_numpy(A @ own if own.numel() else own.new_zeros(A.shape[0], *own.shape[1:]))

    return product


def _as_numpy(t: Tensor) -> Array:
    """Return a tensor as an array; NumPy has no bfloat16."""
    array: Array = (t.double() if t.dtype == torch.bfloat16 else t).cpu().numpy()
    return array


def _symmetrised(matrix: Tensor) -> Tensor:
    """Make the matrix `(A + A') / 2` in place, a strip at a time, and return it."""
    for first in range(0, len(matrix), _ROWS):
        last = first + _ROWS
        row, column = matrix[first:last, first:], matrix[first:, first:last]
        row.copy_((row + column.T) / 2)
        column.copy_(row.T.clone())
    return matrix


def _shifted(matrix: Tensor | None, c: float | Tensor) -> Tensor | None:
    """Add `c`, or the entries of `c`, to the diagonal in place."""
    if matrix is not None:
        matrix.diagonal().add_(c)
    return matrix


def _plus(product: Tensor, c: float | Tensor, v: Tensor) -> Tensor:
    """Return `product + c v`."""
    return torch.addcmul(product, c, v) if isinstance(c, Tensor) else torch.add(product, v, alpha=c)


def check_operator(operator: LinearOperator) -> int:
    """Return the size n of a square operator.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: `operator` is not square, or has no row.
    """
    check_instance("operator", operator, LinearOperator, "a LinearOperator", "Write hessian(evaluation), for example.")
    rows, columns = operator.shape
    if rows != columns or rows < 1:
        raise ValueError(f"operator must be square with at least one row, got shape {tuple(operator.shape)}.")
    return rows
