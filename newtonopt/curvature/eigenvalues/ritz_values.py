"""Approximate eigenvectors, and what follows from them for the spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import LanczosResult


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Orthonormal approximate eigenvectors U of A, as far as bounds depend on them.

    Attributes:
        values: Ritz values Theta `(m,)`, float64 on the CPU.
        gram: R'R `(m, m)`, float64 on the CPU, with R = A U - U Theta orthogonal to U.
    """

    values: Tensor
    gram: Tensor

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def joined(self, values: Tensor, couplings: Tensor) -> RitzPairs:
        """With the Ritz pairs of one Lanczos run added, whose residuals are `couplings` times one unit vector."""
        old, new = self.gram.shape[0], couplings.shape[0]
        gram = torch.zeros(old + new, old + new, dtype=torch.float64, device="cpu")
        gram[:old, :old] = self.gram
        gram[old:, old:] = couplings[:, None] * couplings
        return RitzPairs(torch.cat([self.values, values]), gram)

    def chosen(self, indices: list[int]) -> RitzPairs:
        """Those of these indices."""
        return RitzPairs(self.values[indices], self.gram[indices][:, indices])

    def ceilings(self, rest: float, size: int, count: int) -> list[float]:
        """Upper bounds on the largest eigenvalues of A, from a bound on the part B that U leaves over.

        In the basis (U, its complement) A is [[Theta, R'], [R, B]]. With B <= M I, A is at most
        [[Theta, R'], [R, M I]] in the order of quadratic forms, so each of its eigenvalues is at most that matrix's
        (Weyl's monotonicity, Horn & Johnson 2013, cor. 4.3.12), and those follow from R'R alone. The bounds
        by |R| and by |R|^2 / gap (Li & Li 2005) are its two regimes.

        Args:
            rest: M, at least the largest eigenvalue of B.
            size: Dimension n of A.
            count: How many bounds are wanted, 0 to n.

        Returns:
            Bounds, descending, on the `count` largest eigenvalues.
        """
        block = len(self)
        if rest == math.inf:
            return [rest] * count
        if block in (0, size):
            return sorted([*self.values.tolist(), *[rest] * (count - block)], reverse=True)[:count]
        weights, axes = torch.linalg.eigh(self.gram)
        root = axes * weights.clamp_min(0.0).sqrt()
        corner = rest * torch.eye(block, dtype=torch.float64, device="cpu")
        bordered = torch.cat([torch.cat([self.values.diag(), root], 1), torch.cat([root.T, corner], 1)])
        bounds = [*torch.linalg.eigvalsh(bordered).tolist(), *[rest] * (size - 2 * block)]
        return sorted(bounds, reverse=True)[:count]

    def mirrored(self) -> RitzPairs:
        """The same pairs of -A."""
        return RitzPairs(-self.values, self.gram)


@dataclass(frozen=True, eq=False)
class RitzBlock:
    """Ritz pairs with their vectors.

    Attributes:
        values: Ritz values `(m,)`, float64 on the CPU, ascending.
        vectors: U as orthonormal rows `(m, n)`, in the operator's dtype.
        residuals: R = A U - U Theta as rows `(m, n)`, orthogonal to U.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def pairs(self) -> RitzPairs:
        """What bounds need of the block."""
        return RitzPairs(self.values, (self.residuals @ self.residuals.T).to("cpu", torch.float64))

    def extended(self, result: LanczosResult, coordinates: Tensor) -> Extension:
        """Rayleigh-Ritz on this block U and on W = Q S from a run on its complement; needs no product.

        A W = S' T S W + tails q + U (R'W) in the notation of `LanczosResult`, so all of the projected matrix is known.
        This block's residuals are overwritten, so that no copy is needed: it must not be used afterwards.

        Args:
            result: A run that deflates this block.
            coordinates: S `(k, j)`, orthonormal columns that span what is invariant under T or everything.
        """
        tridiagonal, inner = result.tridiagonal, result.coordinates(self.residuals)
        coupling = inner @ coordinates
        corner = coordinates.T @ tridiagonal.dense() @ coordinates
        upper = torch.cat([self.values.diag(), coupling], 1)
        values, rotation = torch.linalg.eigh(torch.cat([upper, torch.cat([coupling.T, corner], 1)]))
        if len(self.values):
            result.add_to(self.residuals, -coupling @ coordinates.T)
        old = rotation[: len(self.values)]
        new = coordinates @ rotation[len(self.values) :]
        tails = tridiagonal.betas[-1] * new[-1]
        left = (self.residuals @ self.residuals.T).to("cpu", torch.float64)
        along = (self.residuals @ result.next_vector).to("cpu", torch.float64)
        cross = torch.outer(old.T @ along, tails)
        gram = old.T @ left @ old + cross + cross.T + torch.outer(tails, tails)
        return Extension(self, result, RitzPairs(values, gram), old, new, tails)


@dataclass(frozen=True, eq=False)
class Extension:
    """Ritz pairs of a block and a run together, of which only small matrices are formed yet.

    Attributes:
        block: What was extended; its residuals are what the run left over of them.
        result: The run.
        pairs: All m Ritz pairs.
        old: Coordinates `(k, m)` of the Ritz vectors in the block.
        new: Coordinates `(j, m)` in the Lanczos vectors.
        tails: Parts `(m,)` of the residuals along the next Lanczos vector.
    """

    block: RitzBlock
    result: LanczosResult
    pairs: RitzPairs
    old: Tensor
    new: Tensor
    tails: Tensor

    def formed(self, keep: list[int]) -> RitzBlock:
        """The Ritz pairs of these indices with their vectors."""
        block, result, rows = self.block, self.result, self.block.vectors
        turn = self.old[:, keep].T.to(rows.dtype).to(rows.device)
        vectors = turn @ rows
        result.add_to(vectors, self.new[:, keep].T)
        residuals = turn @ block.residuals
        tails = self.tails[keep].to(rows.dtype).to(rows.device)
        residuals.addmm_(tails[:, None], result.next_vector[None])
        return RitzBlock(self.pairs.values[keep], vectors, residuals)
