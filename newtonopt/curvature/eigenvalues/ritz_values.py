"""Ritz pairs, that is approximate eigenpairs from a subspace, and the bounds on eigenvalues that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.solvers.lanczos import LanczosResult


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Orthonormal approximate eigenvectors U of A, without the vectors: as much as bounds depend on.

    Attributes:
        values: Ritz values Theta `(m,)`, float64 on the CPU.
        gram: R'R `(m, m)`, float64 on the CPU, with the residuals R = A U - U Theta, which are orthogonal to U.
    """

    values: Tensor
    gram: Tensor

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def joined(self, values: Tensor, couplings: Tensor) -> RitzPairs:
        """Return these pairs and those of one Lanczos run, whose residuals are `couplings` times one unit vector."""
        old, new = self.gram.shape[0], couplings.shape[0]
        gram = torch.zeros(old + new, old + new, dtype=torch.float64, device="cpu")
        gram[:old, :old] = self.gram
        gram[old:, old:] = couplings[:, None] * couplings
        return RitzPairs(torch.cat([self.values, values]), gram)

    def chosen(self, indices: list[int]) -> RitzPairs:
        """Return the pairs with these indices."""
        return RitzPairs(self.values[indices], self.gram[indices][:, indices])

    def ceilings(self, rest: float, size: int, count: int) -> list[float]:
        """Return upper bounds on the largest eigenvalues of A, given a bound on the part B of A that U leaves over.

        In the basis (U, its complement) A is [[Theta, R'], [R, B]]. With B <= M I, A is at most
        [[Theta, R'], [R, M I]] in the order of quadratic forms, so each of its eigenvalues is at most the eigenvalue
        of the same rank of that matrix (Weyl's monotonicity, Horn & Johnson 2013, cor. 4.3.12), which follows from R'R
        alone. The bounds by |R| and by |R|^2 / gap (Li & Li 2005) are its two regimes.

        Args:
            rest: M, at least the largest eigenvalue of B.
            size: Dimension n of A.
            count: Number of bounds wanted, 0 to n.

        Returns:
            Bounds on the `count` largest eigenvalues, descending.
        """
        block = len(self)
        if rest == math.inf:
            return [rest] * count
        if block in (0, size):
            return sorted([*self.values.tolist(), *[rest] * (count - block)], reverse=True)[:count]
        # A root of R'R stands for R': rotating the complement changes no eigenvalue.
        weights, axes = torch.linalg.eigh(self.gram)
        root = axes * weights.clamp_min(0.0).sqrt()
        corner = rest * torch.eye(block, dtype=torch.float64, device="cpu")
        bordered = torch.cat([torch.cat([self.values.diag(), root], 1), torch.cat([root.T, corner], 1)])
        # The other n - 2m directions of the complement are not coupled to U: there the matrix is M I.
        bounds = [*torch.linalg.eigvalsh(bordered).tolist(), *[rest] * (size - 2 * block)]
        return sorted(bounds, reverse=True)[:count]

    def mirrored(self) -> RitzPairs:
        """Return the same pairs as Ritz pairs of -A."""
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
        """Return the pairs without their vectors."""
        return RitzPairs(self.values, (self.residuals @ self.residuals.T).to("cpu", torch.float64))

    def extended(self, result: LanczosResult, coordinates: Tensor) -> Extension:
        """Apply the Rayleigh-Ritz method to the span of this block and of vectors from a run on its complement.

        It needs no product. With W = Q S and the coupling C = R'W, in the notation of `LanczosResult`,
        A W = W (S'TS) + q tails + U C and A U = U Theta + R, so that the projected matrix is known.

        This block's residuals are overwritten, to save a copy: the block must not be used afterwards.

        Args:
            result: Lanczos run that deflates this block.
            coordinates: S `(k, j)`, orthonormal columns that span an invariant subspace of T, or everything.
        """
        tridiagonal, inner = result.tridiagonal, result.coordinates(self.residuals)
        # The projected matrix [[Theta, C], [C', S'TS]] and its eigenpairs.
        coupling = inner @ coordinates
        corner = coordinates.T @ tridiagonal.dense() @ coordinates
        upper = torch.cat([self.values.diag(), coupling], 1)
        values, rotation = torch.linalg.eigh(torch.cat([upper, torch.cat([coupling.T, corner], 1)]))
        # The parts of the old residuals along W are no residuals any more: W is in the new span.
        if len(self.values):
            result.add_to(self.residuals, -coupling @ coordinates.T)
        old = rotation[: len(self.values)]
        new = coordinates @ rotation[len(self.values) :]
        tails = tridiagonal.betas[-1] * new[-1]
        # The residual of pair i is R old_i + tails_i q: the Gram matrix has the squares of both parts and cross terms.
        left = (self.residuals @ self.residuals.T).to("cpu", torch.float64)
        along = (self.residuals @ result.next_vector).to("cpu", torch.float64)
        cross = torch.outer(old.T @ along, tails)
        gram = old.T @ left @ old + cross + cross.T + torch.outer(tails, tails)
        return Extension(self, result, RitzPairs(values, gram), old, new, tails)


@dataclass(frozen=True, eq=False)
class Extension:
    """Ritz pairs of a block and a Lanczos run together, known by small matrices; long vectors are not formed yet.

    Attributes:
        block: The block that was extended, its residuals without their parts along the run.
        result: The run.
        pairs: All m Ritz pairs.
        old: Coordinates `(k, m)` of the Ritz vectors in the block.
        new: Coordinates `(j, m)` of the Ritz vectors in the Lanczos vectors.
        tails: Parts `(m,)` of the residuals along the next Lanczos vector.
    """

    block: RitzBlock
    result: LanczosResult
    pairs: RitzPairs
    old: Tensor
    new: Tensor
    tails: Tensor

    def formed(self, keep: list[int]) -> RitzBlock:
        """Return the Ritz pairs with these indices, with their vectors."""
        block, result, rows = self.block, self.result, self.block.vectors
        turn = self.old[:, keep].T.to(rows.dtype).to(rows.device)
        vectors = turn @ rows
        result.add_to(vectors, self.new[:, keep].T)
        residuals = turn @ block.residuals
        tails = self.tails[keep].to(rows.dtype).to(rows.device)
        residuals.addmm_(tails[:, None], result.next_vector[None])
        return RitzBlock(self.pairs.values[keep], vectors, residuals)
