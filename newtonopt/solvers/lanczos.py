"""The Lanczos process with full re-orthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.solvers.solution import Matrix

# Rows of the basis allocated at a time: memory follows the iterations made, not the budget.
_CHUNK = 16
# A coefficient beta this many rounding units below the operator's scale is a breakdown: the Krylov
# space is invariant, and what is left of the vector is noise. Measured on dense products up to
# n = 2000, that noise is 0.2 to 3 units in float32 and in float64.
_BREAKDOWN = 8.0


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """T with A Q' = Q' T + beta_k q_{k+1} e_k', where the rows of Q are the Lanczos vectors.

    Attributes:
        alphas: Diagonal `(k,)`, float64 on the CPU.
        betas: `(k,)`, float64; `betas[:-1]` is the off-diagonal, `betas[-1]` the coupling to the next
            vector, zero where the process broke down.
        noise: Largest norm, over the products made, of what symmetry says must vanish: the part of
            `A q_k` along `q_1 ... q_{k-2}`. Rounding, or an operator that is not quite symmetric.
    """

    alphas: Tensor
    betas: Tensor
    noise: float

    @property
    def size(self) -> int:
        """Number of Lanczos vectors, which is the number of products made."""
        return int(self.alphas.shape[0])

    @property
    def invariant(self) -> bool:
        """Whether the Krylov space is invariant: its Ritz values are eigenvalues."""
        return float(self.betas[-1]) == 0.0

    def mirrored(self) -> Tridiagonal:
        """Coefficients of the same run on -A."""
        return Tridiagonal(-self.alphas, self.betas, self.noise)

    def dense(self) -> Tensor:
        """T as a `(k, k)` matrix."""
        coupling = self.betas[:-1]
        return self.alphas.diag() + coupling.diag(1) + coupling.diag(-1)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values `(k,)` ascending, and their coordinates as columns `(k, k)` in the Lanczos basis."""
        values, coordinates = torch.linalg.eigh(self.dense())
        return values, coordinates


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What a Lanczos run leaves behind.

    Attributes:
        tridiagonal: The projected operator.
        chunks: The Lanczos vectors as rows, in blocks; kept apart so that no second copy is made.
        next_vector: `q_{k+1}`, shape `(n,)`; zero where the process broke down.
    """

    tridiagonal: Tridiagonal
    chunks: tuple[Tensor, ...]
    next_vector: Tensor

    @property
    def basis(self) -> Tensor:
        """The Lanczos vectors as orthonormal rows `(k, n)`; copies them."""
        return torch.cat(self.chunks)

    def ritz_values(self) -> Tensor:
        """Ritz values `(k,)`, ascending, float64."""
        return self.tridiagonal.ritz()[0]

    def residuals(self) -> Tensor:
        """`|A x - theta x|` of each Ritz pair `(k,)`: beta_k times the last coordinate."""
        return self.tridiagonal.betas[-1] * self.tridiagonal.ritz()[1][-1].abs()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Rows of full length from coordinates in the Lanczos basis.

        Args:
            coordinates: `(k, m)`, one column a vector, such as columns of `tridiagonal.ritz()[1]`.

        Returns:
            The vectors as rows `(m, n)`, in the operator's dtype.
        """
        weights = coordinates.to(self.next_vector.dtype).to(self.next_vector.device)
        rows = self.next_vector.new_zeros(weights.shape[1], self.next_vector.shape[0])
        offset = 0
        for chunk in self.chunks:
            rows.addmm_(weights[offset : offset + chunk.shape[0]].T, chunk)
            offset += chunk.shape[0]
        return rows


def lanczos(
    operator: Matrix,
    start: Tensor,
    max_products: int,
    *,
    deflate: Tensor | None = None,
    scale: float = 0.0,
    stop: Callable[[Tridiagonal], bool] | None = None,
) -> LanczosResult:
    """Lanczos process on A, or on P A P with P = I - U'U, from a given start.

    Every new vector is orthogonalised against all earlier ones and against U twice ("twice is enough": Giraud,
    Langou, Rozloznik & van den Eshof 2005), so no ghost copies of an eigenvalue appear. Coefficients are
    float64; the basis stays in the dtype of `start`.

    Args:
        operator: The symmetric operator A, used only as `A @ v`.
        start: Start vector `(n,)`; projected and normalised here. Its dtype and device are the basis's.
        max_products: Largest number of products, at least 1.
        deflate: Orthonormal rows `(m, n)`, m < n, projected out of every vector.
        scale: What is known of the norm of A, >= 0; matters with `deflate`, where products carry the rounding of
            A though P A P may be much smaller.
        stop: Called with the coefficients after each product; the run ends when it returns true.

    Returns:
        The coefficients and the basis. Fewer than `max_products` vectors where `stop` said so or where
        the Krylov space became invariant.

    Raises:
        ValueError: `max_products` is below 1, or nothing is left of `start` after projection.
        FloatingPointError: A product is not finite.
    """
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}")
    size = start.shape[0] - (0 if deflate is None else deflate.shape[0])
    fixed = [] if deflate is None or deflate.shape[0] == 0 else [deflate]
    chunks: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    vector = _first(start, fixed)
    previous = torch.zeros_like(vector)
    noise = 0.0
    while True:
        _append(chunks, len(alphas), vector, max_products)
        rest = operator @ vector
        alphas.append(_dot(vector, rest))
        _check_finite(alphas[-1], len(alphas))
        rest = torch.sub(rest, vector, alpha=alphas[-1])
        if betas:
            rest.sub_(previous, alpha=betas[-1])
        noise = max(noise, _project(rest, [*fixed, *_filled(chunks, len(alphas))], len(fixed)))
        betas.append(math.sqrt(_dot(rest, rest)))
        scale = max(scale, abs(alphas[-1]) + betas[-1])
        small = betas[-1] <= _BREAKDOWN * torch.finfo(start.dtype).eps * scale
        if small or len(alphas) == size:
            betas[-1] = 0.0
        previous, vector = vector, rest / betas[-1] if betas[-1] > 0.0 else torch.zeros_like(rest)
        tridiagonal = Tridiagonal(_float64(alphas), _float64(betas), noise)
        if betas[-1] == 0.0 or len(alphas) == max_products or (stop is not None and stop(tridiagonal)):
            return LanczosResult(tridiagonal, tuple(_filled(chunks, len(alphas))), vector)


def _first(start: Tensor, fixed: list[Tensor]) -> Tensor:
    """The start vector projected and normalised."""
    vector = start.clone()
    before = math.sqrt(_dot(vector, vector))
    if fixed:
        _project(vector, fixed, 0)
    after = math.sqrt(_dot(vector, vector))
    # Projection leaves rounding of the size of the vector it started from: below that nothing is left.
    if not after > 100.0 * torch.finfo(vector.dtype).eps * before:
        raise ValueError(f"start must be finite and have a part outside the deflated space, norms {before}, {after}")
    vector /= after
    return vector


def _project(vector: Tensor, blocks: list[Tensor], skip: int) -> float:
    """Removes the blocks' rows from the vector in place, twice; returns the norm removed first by blocks[skip:]."""
    removed = 0.0
    for sweep in range(2):
        for index, block in enumerate(blocks):
            coefficients = block @ vector
            vector.addmv_(block.T, coefficients, alpha=-1.0)
            if sweep == 0 and index >= skip:
                removed += _dot(coefficients, coefficients)
    return math.sqrt(removed)


def _append(chunks: list[Tensor], count: int, vector: Tensor, most: int) -> None:
    """Writes row number `count` of at most `most`, with a further chunk where the last one is full."""
    if count % _CHUNK == 0:
        chunks.append(vector.new_empty(min(_CHUNK, most - count), vector.shape[0]))
    chunks[-1][count % _CHUNK] = vector


def _filled(chunks: list[Tensor], count: int) -> list[Tensor]:
    """The chunks without the rows that are not written yet."""
    return [*chunks[:-1], chunks[-1][: count - _CHUNK * (len(chunks) - 1)]]


def _dot(left: Tensor, right: Tensor) -> float:
    """Inner product, accumulated in float64 where the device has it (Apple's does not)."""
    accumulator = left.dtype if left.device.type == "mps" else torch.float64
    return float((left * right).sum(dtype=accumulator))


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _check_finite(alpha: float, products: int) -> None:
    if not math.isfinite(alpha):
        raise FloatingPointError(
            f"product number {products} with the operator is not finite, so nothing can be said of its eigenvalues; "
            "check that loss and gradient are finite at this point, and compute products in float32 or float64 rather "
            "than under autocast"
        )
