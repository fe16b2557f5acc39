"""Rows of a Jacobian, kept by parameter: as factors of outer products where that is cheaper, else as they are.

A weight of a linear layer that is used `s` times for one row has `sum over a of outer(left[a], right[a])` there. So its
part of `R R'` is the sum over pairs of uses of `(left_a left_b') * (right_a right_b')`, entry by entry: no row is
formed, and all products are small matrix products (Goodfellow 2015, arXiv 1510.01799, for norms of rows).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.vectors.memory import check_room

# Rows of a block of `R R'`: blocks of 128 took 1.3 times as long, and blocks of 1024, which leave the cache, 1.4 times.
_BLOCK = 192
# On a GPU launching a kernel takes as long as a small block, and there is no cache to stay in.
_GPU_BLOCK = 2048
# Entries of a parameter from which on its rows are multiplied alone.
_WIDE = 256
_REMEDY = "Use fewer samples, or HessianFree, which needs products alone."


# Weights of a parameter's entries: a number, or the factors `(p,)` and `(q,)` of an outer product; None: ones.
Weight = float | tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows `sum over a of outer(left[a], right[a])`, flattened.

    Attributes:
        left: `(s, m, p)`.
        right: `(s, m, q)`.
    """

    left: Tensor
    right: Tensor

    @property
    def height(self) -> int:
        """First dimension of the parameter."""
        return self.left.shape[2]

    def gram(self, out: Tensor) -> None:
        """Add the rows' inner products to the lower half of `out`, `(m, m)`, block by block."""
        size = min(_block_of(out), len(out))
        one, other = out.new_empty(size * size), out.new_empty(size * size)
        # Blocks whose rows use the parameter fewer times than others do are filled up with zeros, which add nothing.
        uses = {
            i.start: [a for a, left in enumerate(self.left[:, i]) if bool(left.any())]
            for i, j in _lower_blocks(out)
            if i == j
        }
        for i, j in _lower_blocks(out):
            block = out[i, j]
            for a, b in itertools.product(uses[i.start], uses[j.start]):
                left = torch.mm(self.left[a, i], self.left[b, j].T, out=one[: block.numel()].view(block.shape))
                right = torch.mm(self.right[a, i], self.right[b, j].T, out=other[: block.numel()].view(block.shape))
                block.addcmul_(left, right)

    def scaled(self, weight: Weight) -> Factors:
        """Return the rows times the roots of the weights, column by column."""
        if isinstance(weight, tuple):
            left, right = weight
            return Factors(self.left * left.sqrt(), self.right if right is None else self.right * right.sqrt())
        return Factors(self.left * math.sqrt(weight), self.right)

    def column_squares(self, is_matrix: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the columns' squares over rows `(p,)` and columns `(q,)` of the parameter."""
        left, right = self.left.new_zeros(self.left.shape[2]), self.right.new_zeros(self.right.shape[2])
        for a, b in itertools.product(range(len(self.left)), repeat=2):
            left += (self.right[a] * self.right[b]).sum(1) @ (self.left[a] * self.left[b])
            right += (self.left[a] * self.left[b]).sum(1) @ (self.right[a] * self.right[b])
        return left, right

    def double(self) -> Factors:
        """Return the rows in float64."""
        return Factors(self.left.double(), self.right.double())

    def ordered(self, order: Tensor) -> Factors:
        """Return the rows of these numbers."""
        return Factors(self.left[:, order], self.right[:, order])

    def squares(self) -> Tensor:
        """Return the rows' squared norms, `(m,)`."""
        pairs = itertools.product(zip(self.left, self.right, strict=True), repeat=2)
        return torch.stack([(a * c).sum(1) * (b * d).sum(1) for (a, b), (c, d) in pairs]).sum(0)

    def push(self, v: Tensor) -> Tensor:
        """Return the rows' products with `v`, `(m,)`."""
        matrix = v.view(self.left.shape[2], self.right.shape[2])
        return ((self.left @ matrix) * self.right).sum((0, 2))

    def pull(self, u: Tensor) -> Tensor:
        """Return the sum of the rows times the entries of `u`, `(p q,)`."""
        weighted = (self.left * u[:, None]).flatten(0, 1)
        return (weighted.T @ self.right.flatten(0, 1)).reshape(-1)

    def dense(self) -> Tensor:
        """Return the rows, `(m, p q)`."""
        return torch.einsum("smp,smq->mpq", self.left, self.right).flatten(1)


@dataclass(frozen=True, eq=False)
class Formed:
    """Rows as they are.

    Attributes:
        rows: `(m, size)`.
        height: First dimension `p` of the parameter.
    """

    rows: Tensor
    height: int = 1

    def scaled(self, weight: Weight) -> Formed:
        """Return the rows times the roots of the weights, column by column."""
        if not isinstance(weight, tuple):
            return Formed(self.rows * math.sqrt(weight), self.height)
        left, right = weight
        whole = left if right is None else torch.outer(left, right).reshape(-1)
        return Formed(self.rows * whole.sqrt(), self.height)

    def column_squares(self, is_matrix: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the columns' squares over rows `(p,)` and columns `(q,)` of the parameter."""
        squares = self.rows.square().sum(0)
        if not is_matrix:
            return squares, None
        matrix = squares.view(self.height, -1)
        return matrix.sum(1), matrix.sum(0)

    def double(self) -> Formed:
        """Return the rows in float64."""
        return Formed(self.rows.double(), self.height)

    def ordered(self, order: Tensor) -> Formed:
        """Return the rows of these numbers."""
        return Formed(self.rows[order], self.height)

    def squares(self) -> Tensor:
        """Return the rows' squared norms, `(m,)`."""
        return self.rows.square().sum(1)

    def push(self, v: Tensor) -> Tensor:
        """Return the rows' products with `v`, `(m,)`."""
        return self.rows @ v

    def pull(self, u: Tensor) -> Tensor:
        """Return the sum of the rows times the entries of `u`, `(size,)`."""
        return u @ self.rows

    def dense(self) -> Tensor:
        """Return the rows, `(m, size)`."""
        return self.rows


def joined(parts: Sequence[Factors | Formed]) -> Factors | Formed:
    """Return the rows of several parts of one parameter, one below the other."""
    if len(parts) == 1:
        return parts[0]
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) < len(parts) or len({(f.left.shape[2], f.right.shape[2]) for f in factors}) > 1:
        height = parts[0].height
        return Formed(torch.cat([part.dense() for part in parts]), height)
    s = max(len(part.left) for part in factors)
    left, right = (
        torch.cat([torch.cat([f, f.new_zeros(s - len(f), *f.shape[1:])]) for f in side], 1)
        for side in ([part.left for part in factors], [part.right for part in factors])
    )
    return Factors(left, right)


@dataclass(frozen=True, eq=False)
class Outers:
    """Rows of one parameter that are sums of outer products.

    Attributes:
        first: Number of the first row.
        left: `(rows, times, p)`.
        right: `(rows, times, q)`.
    """

    first: int
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one parameter as they are.

    Attributes:
        first: Number of the first row.
        rows: `(rows, size)`.
    """

    first: int
    rows: Tensor


Piece = Outers | Block


def assembled(pieces: Sequence[Piece], shape: torch.Size, m: int, like: Tensor) -> Factors | Formed:
    """Return all `m` rows of a parameter of this shape in the cheaper form, the sums of these pieces.

    Raises:
        MemoryError: They are to be formed, and would not fit.
    """
    outers = merged([piece for piece in pieces if isinstance(piece, Outers)])
    blocks = [piece for piece in pieces if isinstance(piece, Block)]
    times: dict[int, int] = {}
    for piece in outers:
        times[piece.first] = times.get(piece.first, 0) + piece.left.shape[1]
    widths = {(piece.left.shape[2], piece.right.shape[2]) for piece in outers}
    s = max(times.values(), default=0)
    p = shape[0] if shape else 1
    size, q = math.prod(shape), math.prod(shape[1:])
    if widths == {(p, q)} and not blocks and s * s * (p + q) < size:
        return _factors(outers, m, s, like)
    check_room(m * size, like.dtype, like.device, f"{m} rows of a parameter of {size} entries", _REMEDY)
    rows = like.new_zeros(m, size)
    for piece in outers:
        formed = torch.einsum("ntp,ntq->npq", piece.left, piece.right).flatten(1)
        rows[piece.first : piece.first + len(formed)] += formed
    for block in blocks:
        rows[block.first : block.first + len(block.rows)] += block.rows
    return Formed(rows, p)


def merged(outers: Sequence[Outers]) -> list[Outers]:
    """Return the pieces; those of the same rows become one where their left or right factors are multiples."""
    found: list[Outers] = []
    for new in outers:
        for place, old in enumerate(found):
            both = _made_one(old, new)
            if both is not None:
                found[place] = both
                break
        else:
            found.append(new)
    return found


def _made_one(old: Outers, new: Outers) -> Outers | None:
    """Return the sum of two pieces of the same rows that share a factor, up to multiples; None if they do not."""
    if (old.first, old.left.shape, old.right.shape) != (new.first, new.left.shape, new.right.shape):
        return None
    if (times := _multiple(new.left, old.left)) is not None:
        return Outers(old.first, old.left, old.right + times * new.right)
    if (times := _multiple(new.right, old.right)) is not None:
        return Outers(old.first, old.left + times * new.left, old.right)
    return None


def _multiple(new: Tensor, old: Tensor) -> Tensor | None:
    """Return `c`, a number for each vector, with `new = c old` up to rounding; None if there is none."""
    # Scaled to entries of at most one, so that no square underflows.
    (a, old_size), (b, new_size) = _scaled(old), _scaled(new)
    c = (b * a).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True).clamp(min=1)  # one or more but for zeros
    rounding = _ROUNDING * torch.finfo(new.dtype).eps * b.norm(dim=-1)
    times = c * (new_size / old_size)
    is_multiple = ((b - c * a).norm(dim=-1) <= rounding).all() & times.isfinite().all()
    return times if bool(is_multiple) else None


def _scaled(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors divided by their largest entries, and these, one for a vector of zeros."""
    size = vectors.abs().amax(-1, keepdim=True)
    size = size.where(size > 0, 1)
    return vectors / size, size


# Rounding units by which multiples may differ: second derivatives compute one factor in two ways, up to 10 units apart.
_ROUNDING = 64


def _factors(outers: Sequence[Outers], m: int, s: int, like: Tensor) -> Factors:
    left, right = (like.new_zeros(s, m, side.shape[2]) for side in (outers[0].left, outers[0].right))
    used: dict[int, int] = {}
    for piece in outers:
        start = used.get(piece.first, 0)
        used[piece.first] = stop = start + piece.left.shape[1]
        rows = slice(piece.first, piece.first + len(piece.left))
        left[start:stop, rows] = piece.left.transpose(0, 1)
        right[start:stop, rows] = piece.right.transpose(0, 1)
    return Factors(left, right)


def gram(parts: Sequence[Factors | Formed], out: Tensor) -> Tensor:
    """Return the rows' inner products, `(m, m)`; `out` is overwritten."""
    formed = [part.rows for part in parts if isinstance(part, Formed)]
    # Thin parameters, such as biases, are one; copying wide ones would take longer than it saves.
    thin = torch.cat([out.new_empty(len(out), 0), *(rows for rows in formed if rows.shape[1] < _WIDE)], 1)
    size = _block_of(out)
    for rows in (thin, *(rows for rows in formed if rows.shape[1] >= _WIDE)):
        for first in range(0, len(out), size):
            stop = min(first + size, len(out))
            out[first:stop, :stop].addmm_(rows[first:stop], rows[:stop].T, beta=float(rows is not thin))
    for part in parts:
        if isinstance(part, Factors):
            part.gram(out)
    for i, j in _lower_blocks(out):
        out[j, i] = out[i, j].tril() + out[i, j].tril(-1).T if i == j else out[i, j].T
    return out


def _block_of(out: Tensor) -> int:
    return _BLOCK if out.device.type == "cpu" else _GPU_BLOCK


def _lower_blocks(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of a matrix `(m, m)` on the diagonal and below it."""
    m, size = len(out), _block_of(out)
    blocks = [slice(first, min(first + size, m)) for first in range(0, m, size)]
    return ((i, j) for i in blocks for j in blocks if j.start <= i.start)
