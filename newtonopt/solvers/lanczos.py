"""The Lanczos process (Lanczos 1950), and directions of negative curvature found by it.

With the rows of `Q` orthonormal and `T` tridiagonal, `k` products give `A Q' = Q' T + beta_k q_{k+1} e_k'`. The loop is
`lanczos`; `_Basis` holds the vectors while they are made, `Tridiagonal` and `LanczosResult` are the outcome. It differs
from the textbook (Golub & Van Loan 2013, alg. 10.1.1) in this:

1. Every new vector is orthogonalised against all earlier ones, twice ("twice is enough": Giraud, Langou, Rozloznik &
   van den Eshof 2005), so no ghost copies of an eigenvalue appear.
2. Thick restarts (Wu & Simon 2000) keep the basis within a number of vectors: Ritz vectors replace it.
3. Known eigenvectors can be deflated: the process then runs on `P A P`.
4. `Tridiagonal.noise` measures on the way how far products are from symmetric.
5. Coefficients are float64 on the CPU; vectors keep their dtype and device.
6. Powers of two keep squares within the range of the dtype (`vectors.scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import InRange, Matrix, dot, norm, scale_of, shifted, times_power

# Number of rows of the basis allocated at a time: memory follows the products made, not their largest number.
_CHUNK = 16
# A coefficient beta this many rounding units below the operator's scale is a breakdown: the Krylov
# space is invariant, and the rest of the vector is noise. Measured on dense products up to
# n = 2000, that noise is 0.2 to 3 units in float32 and in float64.
_BREAKDOWN = 8.0


def lanczos(
    operator: Matrix,
    start: Tensor,
    max_products: int,
    *,
    deflate: Tensor | None = None,
    scale: float = 0.0,
    stop: Callable[[Tridiagonal], bool] | None = None,
    restarts: Restarts | None = None,
) -> LanczosResult:
    """Run the Lanczos process on `A`, or on `P A P` with `P = I - U'U`, from a given start.

    Args:
        operator: Symmetric operator `A` of any size, used only as `A @ v`.
        start: Start vector `(n,)`, projected and normalised here. The basis has its dtype and device.
        max_products: Largest number of products, at least 1.
        deflate: `U`, orthonormal rows `(m, n)`, m < n, projected out of every vector.
        scale: A known norm of `A`, at least 0. It matters with `deflate`: products carry the rounding of `A` even where
            `P A P` is much smaller.
        stop: Function that is called with the coefficients after each product; the run ends when it returns true.
        restarts: Bound on the number of basis vectors; None keeps them all.

    Returns:
        The coefficients and the basis. There are fewer than `max_products` products where `stop` returned true or the
        Krylov space became invariant.

    Raises:
        ValueError: `max_products` is below 1, or nothing is left of `start` after projection.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64))
        >>> result = lanczos(A, torch.ones(4, dtype=torch.float64), 3)
        >>> result.basis.shape
        torch.Size([3, 4])
        >>> result.ritz_values()[-1] > 9.99  # the extreme eigenvalues come first
        tensor(True)
        >>> lanczos(A, torch.ones(4, dtype=torch.float64), 4).ritz_values().round(decimals=4).tolist()
        [1.0, 2.0, 3.0, 10.0]
    """
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products!r}.")
    size = start.shape[0] - (0 if deflate is None else deflate.shape[0])
    room = max_products if restarts is None else min(restarts.room, max_products)
    fixed = [] if deflate is None or deflate.shape[0] == 0 else [deflate]
    matrix = InRange(operator)
    basis = _Basis(_first(start, fixed), room, matrix)
    noise = largest = 0.0
    while True:
        if restarts is not None and basis.length == room:
            basis.restart(restarts.keep)
        vector = basis.append()
        # alpha_k = q_k'A q_k.
        rest = matrix @ vector
        alpha = dot(vector, rest)
        _check_finite(alpha, basis.products)
        # beta_k q_{k+1} = A q_k - alpha_k q_k - beta_{k-1} q_{k-1}.
        rest = torch.sub(rest, vector, alpha=alpha)
        basis.subtract_known(rest)
        # A symmetric A leaves nothing along the other vectors in exact arithmetic. The rest is rounding or asymmetry.
        noise = max(noise, _project(rest, [*fixed, *basis.blocks()], len(fixed)))
        beta = norm(rest)
        # A beta within rounding is zero: the space is invariant, and the process ends.
        largest = max(largest, abs(alpha) + beta)
        small = beta <= _BREAKDOWN * torch.finfo(start.dtype).eps * max(largest, shifted(scale, -matrix.exponent))
        if small or basis.length == size:
            beta = 0.0
        basis.close(alpha, beta, rest)
        tridiagonal = basis.tridiagonal(noise)
        if beta == 0.0 or basis.products == max_products or (stop is not None and stop(tridiagonal)):
            return basis.result(tridiagonal)


def negative_curvature(
    A: Matrix, like: Tensor, *, seed: int = 0, max_products: int = 100
) -> tuple[Tensor, float] | None:
    """Find a unit vector `d` with `d'Ad < 0`, by the Lanczos process from a random start.

    A direction that is found proves negative curvature: its Ritz value is a curvature that was measured. That none is
    found proves, up to rounding, that there is none after `n` products; after fewer it makes it likely (Kuczynski &
    Wozniakowski 1992).

    Args:
        A: Symmetric matrix, `(n, n)`.
        like: Vector `(n,)` of the dtype, device and kind wanted for the start.
        seed: Seed of the start, drawn on the CPU. The global random state stays as it is.
        max_products: Largest number of products.

    Returns:
        `d`, `(n,)`, and `d'Ad`; None if no curvature below rounding was met.

    Raises:
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
        >>> direction, curvature = negative_curvature(A, torch.zeros(3, dtype=torch.float64))
        >>> curvature < 0.0
        True
    """
    generator = torch.Generator().manual_seed(seed)
    start = normals(like, generator)
    rounding = 10 * math.sqrt(like.shape[0]) * torch.finfo(like.dtype).eps

    def is_negative(tridiagonal: Tridiagonal, values: Tensor) -> bool:
        # Products by differences are not quite symmetric: the error that this shows counts as rounding.
        return float(values[0]) < -max(rounding * float(values.abs().max()), 10 * tridiagonal.noise)

    def is_found(tridiagonal: Tridiagonal) -> bool:
        values, coordinates = tridiagonal.ritz()
        residual = float(tridiagonal.betas[-1] * coordinates[-1, 0].abs())
        return is_negative(tridiagonal, values) and residual <= 0.1 * abs(float(values[0]))

    space = lanczos(A, start, min(max_products, like.shape[0]), stop=is_found)
    values, coordinates = space.tridiagonal.ritz()
    if not is_negative(space.tridiagonal, values):
        return None
    return space.vectors(coordinates[:, :1])[0], float(values[0])


@dataclass(frozen=True)
class Restarts:
    """Thick restarts (Wu & Simon 2000), which keep a run within a number of basis vectors.

    Attributes:
        room: Largest number of basis vectors, at least 2.
        keep: Function from Ritz values `(room,)`, ascending, to the indices of those whose vectors are kept: fewer than
            `room`.
    """

    room: int
    keep: Callable[[Tensor], list[int]]


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """`T` of `A Q' = Q' T + beta_k q_{k+1} e_k'`, where the rows of `Q` are the Lanczos vectors.

    After a thick restart (Wu & Simon 2000) `Q` begins with the Ritz vectors that were kept, and `T` is
    `[[diag(values), couplings e_1'], [e_1 couplings', tridiagonal]]`.

    Attributes:
        alphas: Diagonal `(k,)`, float64 on the CPU.
        betas: `(k,)`, float64; `betas[:-1]` is the off-diagonal, `betas[-1]` the coupling to the next
            vector, zero where the process broke down.
        noise: Largest norm, over the products made, of the part of `A q_k` along `q_1 ... q_{k-2}`, which would be zero
            for a symmetric operator in exact arithmetic.
        values: Ritz values that were kept at the last restart, float64.
        couplings: Couplings of their vectors to the first Lanczos vector after the restart.
        before: Coefficients up to the last restart.
    """

    alphas: Tensor
    betas: Tensor
    noise: float
    values: Tensor = field(default_factory=lambda: _float64([]))
    couplings: Tensor = field(default_factory=lambda: _float64([]))
    before: Tridiagonal | None = None

    @property
    def size(self) -> int:
        """Number of products made; without restarts also the number of Lanczos vectors."""
        return int(self.alphas.shape[0]) + (0 if self.before is None else self.before.size)

    @property
    def invariant(self) -> bool:
        """Whether the Krylov space is invariant: its Ritz values are eigenvalues."""
        return float(self.betas[-1]) == 0.0

    def mirrored(self) -> Tridiagonal:
        """Return the coefficients of the same run on `-A`."""
        before = None if self.before is None else self.before.mirrored()
        return Tridiagonal(-self.alphas, self.betas, self.noise, -self.values, self.couplings, before)

    def dense(self) -> Tensor:
        """Return `T` as a matrix."""
        coupling, kept = self.betas[:-1], self.values.shape[0]
        matrix = torch.cat([self.values, self.alphas]).diag()
        matrix[kept:, kept:] += coupling.diag(1) + coupling.diag(-1)
        matrix[kept, :kept] = matrix[:kept, kept] = self.couplings
        return matrix

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values `(m,)`, ascending, and their vectors' coordinates in the basis, columns `(m, m)`."""
        values, coordinates = torch.linalg.eigh(self.dense())
        return values, coordinates


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """Coefficients and vectors of a Lanczos run.

    Attributes:
        tridiagonal: Projected operator.
        chunks: Lanczos vectors as rows, in blocks; kept apart so that no second copy is made.
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
        """Return the Ritz values `(k,)`, ascending, float64."""
        return self.tridiagonal.ritz()[0]

    def residuals(self) -> Tensor:
        """Return `|A x - theta x|` of each Ritz pair, `(k,)`: beta_k times the last coordinate."""
        return self.tridiagonal.betas[-1] * self.tridiagonal.ritz()[1][-1].abs()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return vectors of full length from their coordinates in the Lanczos basis.

        Args:
            coordinates: `(k, m)`, one column a vector, such as columns of `tridiagonal.ritz()[1]`.

        Returns:
            The vectors as rows `(m, n)`, in the operator's dtype.
        """
        rows = self.next_vector.new_zeros(coordinates.shape[1], self.next_vector.shape[0])
        self.add_to(rows, coordinates.T)
        return rows

    def add_to(self, rows: Tensor, weights: Tensor) -> None:
        """Add `weights` `(m, k)` times the Lanczos vectors to `rows` `(m, n)`, in place and without a copy."""
        weights = weights.to(rows.dtype).to(rows.device)
        offset = 0
        for chunk in self.chunks:
            rows.addmm_(weights[:, offset : offset + chunk.shape[0]], chunk)
            offset += chunk.shape[0]

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return the inner products of `rows` `(m, n)` with the Lanczos vectors: `(m, k)`, float64 on the CPU."""
        return torch.cat([(rows @ chunk.T).to("cpu", torch.float64) for chunk in self.chunks], 1)


class _Basis:
    """The Lanczos vectors, and the coefficients of the scaled matrix, while they are made."""

    def __init__(self, first: Tensor, room: int, matrix: InRange) -> None:
        self._matrix = matrix
        self._next, self._previous, self._room = first, torch.zeros_like(first), room
        self._kept: list[Tensor] = []
        self._chunks: list[Tensor] = []
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._values, self._couplings = _float64([]), _float64([])
        self._before: Tridiagonal | None = None
        self.products = 0

    @property
    def length(self) -> int:
        return len(self._values) + len(self._alphas)

    def blocks(self) -> list[Tensor]:
        """Return the vectors as rows, without the rows that are not written yet."""
        written = self.products - (0 if self._before is None else self._before.size)
        return [*self._kept, *self._chunks[:-1], self._chunks[-1][: written - _CHUNK * (len(self._chunks) - 1)]]

    def append(self) -> Tensor:
        """Write the next vector and return it; allocate a further chunk if the last one is full."""
        count, most = len(self._alphas), self._room - len(self._values)
        if count % _CHUNK == 0:
            self._chunks.append(self._next.new_empty(min(_CHUNK, most - count), self._next.shape[0]))
        self._chunks[-1][count % _CHUNK] = self._next
        self.products += 1
        return self._next

    def subtract_known(self, rest: Tensor) -> None:
        """Subtract from `A q_k`, in place, its part along earlier vectors that is known from their coefficients."""
        if self._betas:
            rest.sub_(self._previous, alpha=self._betas[-1])
        elif self._kept:
            # The first vector after a restart is coupled to all Ritz vectors that were kept.
            weights = self._couplings.to(rest.dtype).to(rest.device)
            rest.addmv_(self._kept[0].T, weights, alpha=-1.0)

    def close(self, alpha: float, beta: float, rest: Tensor) -> None:
        """Record the coefficients of the vector last appended, and the next vector, `rest / beta`."""
        self._alphas.append(alpha)
        self._betas.append(beta)
        self._previous = self._next
        self._next = rest / beta if beta > 0.0 else torch.zeros_like(rest)

    def tridiagonal(self, noise: float) -> Tridiagonal:
        """Return the coefficients in the matrix's own units."""
        found = (_float64(self._alphas), _float64(self._betas), self._values, self._couplings)
        alphas, betas, values, couplings = (times_power(x, self._matrix.exponent) for x in found)
        return Tridiagonal(alphas, betas, self._matrix.back(noise), values, couplings, self._before)

    def result(self, tridiagonal: Tridiagonal) -> LanczosResult:
        return LanczosResult(tridiagonal, tuple(self.blocks()), self._next)

    def restart(self, keep: Callable[[Tensor], list[int]]) -> None:
        """Replace the basis by some of its Ritz vectors (Wu & Simon 2000).

        A Ritz pair has `A u = theta u + c q_{k+1}`, where the coupling `c` is beta_k times the vector's last
        coordinate.
        """
        done = self.tridiagonal(0.0)
        values, coordinates = done.ritz()
        kept = keep(values)
        self._kept = [self.result(done).vectors(coordinates[:, kept])]
        couplings = done.betas[-1] * coordinates[-1, kept]
        self._values, self._couplings = (times_power(x, -self._matrix.exponent) for x in (values[kept], couplings))
        self._chunks, self._alphas, self._betas, self._before = [], [], [], done


def _first(start: Tensor, fixed: list[Tensor]) -> Tensor:
    """Return the start vector, projected and normalised."""
    vector = start.clone()
    vector = times_power(vector, -scale_of(vector))
    before = norm(vector)
    if fixed:
        _project(vector, fixed, 0)
    after = norm(vector)
    # Projection leaves rounding in proportion to the vector that it started from: below that nothing is left.
    if not after > 100.0 * torch.finfo(vector.dtype).eps * before:
        raise ValueError(
            f"start must be finite and have a part outside the deflated space, got one of norm {before:g}, {after:g} "
            "outside."
        )
    vector /= after
    return vector


def _project(vector: Tensor, blocks: list[Tensor], skip: int) -> float:
    """Subtract from the vector, in place and twice, its parts along the blocks' rows.

    Returns:
        The norm of the parts along `blocks[skip:]` that were subtracted first.
    """
    removed = []
    for sweep in range(2):
        for index, block in enumerate(blocks):
            coefficients = block @ vector
            vector.addmv_(block.T, coefficients, alpha=-1.0)
            if sweep == 0 and index >= skip:
                removed.append(norm(coefficients))
    return math.hypot(*removed)


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _check_finite(alpha: float, products: int) -> None:
    if not math.isfinite(alpha):
        raise FloatingPointError(
            f"Product number {products} with the operator is not finite, so nothing is known of its eigenvalues. Check "
            "that loss and gradient are finite at this point, compute products in float32 or float64 and not under "
            'autocast, and write products="finite_difference".'
        )
