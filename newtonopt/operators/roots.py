"""Roots of a loss's Hessian by its outputs: `S` with `S S' = H_L`, sample by sample.

`Head` is the part of an evaluation's graph between the outputs and the loss. `Head.groups` gives the outputs that the
loss couples, `Head.blocks` the Hessian's block of each sample, and `root_of` its root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import grad
from newtonopt.autodiff.graph import Graph, look_through
from newtonopt.closure.evaluation import Evaluation
from newtonopt.closure.losses import Output
from newtonopt.operators.products import curve_of
from newtonopt.vectors.random import normals


@dataclass(frozen=True, eq=False)
class Head:
    """The part of an evaluation's graph between its outputs and its loss.

    Attributes:
        loss: The live loss.
        outputs: The recorded outputs that have entries.
        slopes: The loss's gradient by them, by their numbers.
        curve: `t -> H_L t`, in the outputs.
        graph: Parts of the whole graph that may make a derivative wrong.
        like: A vector of the dtype of flat vectors.
    """

    loss: Tensor
    outputs: tuple[Output, ...]
    slopes: Mapping[int, Tensor]
    curve: Callable[[Sequence[Tensor]], list[Tensor]]
    graph: Graph
    like: Tensor

    @classmethod
    def of(cls, evaluation: Evaluation) -> Head:
        """Return the head of an evaluation whose graph is kept."""
        loss, every = evaluation.graph
        outputs = tuple(z for z in every if z.tensor.numel())
        found = grad(loss, [z.tensor for z in outputs], keep=True) if outputs else ()
        pairs = zip(outputs, found, strict=True)
        slopes = {z.number: torch.zeros_like(z.tensor) if g is None else g for z, g in pairs}
        curve = curve_of(loss, outputs) if outputs else lambda pushed: []
        graph = look_through(loss, [z.tensor for z in outputs], evaluation.coarse_eps)
        return cls(loss, outputs, slopes, curve, graph, evaluation.gradient)

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs' tensors."""
        return [z.tensor for z in self.outputs]

    def groups(self) -> list[list[Output]]:
        """Return the outputs in groups: the loss's Hessian couples no output with one of another group."""
        if len(self.outputs) == 1:
            return [list(self.outputs)]
        groups: list[set[int]] = []
        for i, z in enumerate(self.outputs):
            along = [torch.zeros_like(other) for other in self.tensors]
            flat = z.tensor.detach().reshape(-1)
            along[i] = normals(flat, torch.Generator().manual_seed(i)).view(z.tensor.shape)
            touched = {j for j, bent in enumerate(self.curve(along)) if bool((bent != 0).any())} | {i}
            joined = touched.union(*(group for group in groups if group & touched))
            groups = [*(group for group in groups if not group & touched), joined]
        return [[self.outputs[i] for i in sorted(group)] for group in sorted(groups, key=min)]

    def blocks(self, members: Sequence[Output], index: Tensor) -> Tensor | None:
        """Return the Hessian's block of each sample, `(samples, columns, columns)`; None if there are other entries.

        Args:
            members: A group of outputs.
            index: The samples' entries among those of the group, `(samples, columns)`.
        """
        n, k = index.shape
        v = normals(self.like.new_zeros(n * k), torch.Generator().manual_seed(0)).view(n, k)
        numbers = torch.arange(n, device=index.device)
        for bit in range((n - 1).bit_length()):
            # Any two samples differ in a bit of their numbers. Without an entry that couples them, a product along
            # those with the bit is zero at the others, without rounding.
            has = (numbers >> bit & 1).bool()
            flat = v.new_zeros(n * k)
            flat[index[has]] = v[has]
            if bool((self._curved(members, flat)[index[~has]] != 0).any()):
                return None
        found = v.new_zeros(n, k, k)
        for c in range(k):
            unit = found.new_zeros(n * k)
            unit[index[:, c]] = 1
            found[:, :, c] = self._curved(members, unit)[index]
        return found

    def _curved(self, members: Sequence[Output], flat: Tensor) -> Tensor:
        """Return the product with the Hessian in the entries of a group of outputs."""
        along = {z.number: torch.zeros_like(z.tensor) for z in self.outputs}
        for z, piece in zip(members, flat.split([z.tensor.numel() for z in members]), strict=True):
            along[z.number] = piece.view(z.tensor.shape).to(z.tensor.dtype)
        bent = dict(zip(along, self.curve(list(along.values())), strict=True))
        return torch.cat([bent[z.number].reshape(-1) for z in members]).to(flat.dtype)


@dataclass(frozen=True, eq=False)
class Root:
    """`S` for outputs whose samples are independent: a block `(columns, rank)` for each sample.

    Attributes:
        numbers: Numbers of the outputs.
        index: The samples' entries among those of these outputs, `(samples, columns)`.
        blocks: `(samples, columns, rank)`.
    """

    numbers: tuple[int, ...]
    index: Tensor
    blocks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rank and number of samples."""
        return self.blocks.shape[2], self.blocks.shape[0]

    def weigh(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Return `S't`, the rows of a rank after each other, `(rank samples,)`."""
        flat = torch.cat([tangents[number].reshape(-1) for number in self.numbers]).to(self.blocks.dtype)
        return torch.einsum("nc,ncr->rn", flat[self.index], self.blocks).reshape(-1)

    def spread(self, u: Tensor, like: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return `S u` for `u` of `(rank samples,)`, by the outputs' numbers and shaped as these."""
        flat = u.new_zeros(sum(like[number].numel() for number in self.numbers))
        flat[self.index.reshape(-1)] = torch.einsum("rn,ncr->nc", u.view(self.shape), self.blocks).reshape(-1)
        pieces = flat.split([like[number].numel() for number in self.numbers])
        pairs = zip(self.numbers, pieces, strict=True)
        return {number: piece.view(like[number].shape).to(like[number].dtype) for number, piece in pairs}

    def residuals(self, slopes: Mapping[int, Tensor]) -> Tensor:
        """Return the least `r` for which `S r` is nearest to the loss's slopes by the outputs, `(rank, samples)`."""
        # The columns of a block are orthogonal.
        squares = self.blocks.square().sum(1).T
        return torch.where(squares > 0, self.weigh(slopes).view(self.shape) / squares, 0)

    def only(self, chosen: Tensor, weight: float) -> Root:
        """Return the blocks of these samples alone, times a weight."""
        return Root(self.numbers, self.index[chosen], weight * self.blocks[chosen])


def root_of(blocks: Tensor, *, is_convex: bool) -> Tensor | None:
    """Return `S` with `S S'` the blocks, `(samples, columns, rank)`, orthogonal columns; None if one is indefinite.

    Args:
        blocks: `(samples, columns, columns)`.
        is_convex: Whether the loss is known to be convex, so that negative eigenvalues are rounding, as those of a
            saturated softmax are.
    """
    values, vectors = torch.linalg.eigh(0.5 * (blocks + blocks.mT)) if blocks.shape[1] > 1 else _of_numbers(blocks)
    rounding = values.abs().amax(1, keepdim=True) * values.shape[1] * torch.finfo(values.dtype).eps
    if not is_convex and bool((values < -4 * rounding).any()):
        return None
    roots = torch.where(values > rounding, values, 0).sqrt()
    used = (roots > 0).any(0)
    # A loss that is flat here keeps one row.
    used[-1] = True
    root: Tensor = (vectors * roots[:, None, :])[:, :, used]
    return root


def _of_numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks[:, 0], torch.ones_like(blocks)
