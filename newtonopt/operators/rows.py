"""Rows of an evaluation's Jacobian: all of them from a handful of backward passes through the graph that it keeps.

Most losses are sums over samples: a sample's outputs depend on that sample alone. One backward pass then holds every
sample's own gradient, before autograd sums them up at the parameters. `autodiff.samples` finds where the sums are taken
and which sample each entry belongs to; `autodiff.contributions` takes what each sample contributes; `operators.factors`
keeps that by parameter. A sample with several outputs takes a pass for each.

`jacobian_rows` gives the rows of the Jacobian `J`, `residual_rows` those of `R = S'J`, with `S S'` the loss's Hessian
by the outputs: `R'R` is the Gauss-Newton matrix. Both are compared with products by autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.contributions import Contribution, Outer, by_sample, contribution_of, dense
from newtonopt.autodiff.gradients import differentiable_kernels, grad
from newtonopt.autodiff.graph import behind, coarsest, kind_of, look_through
from newtonopt.autodiff.samples import CoupledError, Edge, Samples, Use, uses_of, weights_of
from newtonopt.closure.evaluation import Evaluation, Manner, Source, Verdict
from newtonopt.closure.losses import Output
from newtonopt.operators.factors import Factors, Formed, Gathered, gram, joined
from newtonopt.operators.products import curve_of, push_of
from newtonopt.vectors.flat import flat_dtype, flatten
from newtonopt.vectors.random import normals


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of `R = S'J`: `J` the outputs' Jacobian, `S S'` the loss's Hessian by the outputs.

    Attributes:
        residuals: `r`, `(m,)`: `R'r` is the gradient of the losses (without decay), less the remainder.
        remainder: `g - R'r`, `(n,)`: the part of the gradient outside the rows' range; None if it is rounding.
        count: Number of rows of the whole loss: more than `m` if rows were chosen at random.
        parts: The rows by parameter.
        sizes: Number of entries of each parameter.
        roots: `S'` by outputs, for this process's.
        source: The closure's source, which knows the other processes; None: there are none.
    """

    residuals: Tensor
    remainder: Tensor | None
    count: int
    parts: tuple[Factors | Formed, ...]
    sizes: tuple[int, ...]
    roots: tuple[Root, ...]
    source: Source | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of parameters."""
        return self.residuals.numel(), sum(self.sizes)

    def push(self, v: Tensor) -> Tensor:
        """Return `R v`, `(m,)`."""
        pieces = v.split(self.sizes)
        return torch.stack([part.push(piece) for part, piece in zip(self.parts, pieces, strict=True)]).sum(0)

    def pull(self, u: Tensor) -> Tensor:
        """Return `R'u`, `(n,)`."""
        return torch.cat([part.pull(u) for part in self.parts])

    def gram(self, weights: Sequence[float] | None = None, out: Tensor | None = None) -> Tensor:
        """Return `R W R'`, `(m, m)`.

        Args:
            weights: `W`, one number for each parameter tensor; None (default): ones.
            out: Memory for the result, overwritten; None (default): new memory.
        """
        m = self.residuals.numel()
        out = self.residuals.new_empty(m, m) if out is None else out
        return gram(self.parts, [1.0] * len(self.parts) if weights is None else weights, out)

    def parameter_gram(self) -> Tensor:
        """Return `R'R`, `(n, n)`."""
        rows = self.dense()
        n = rows.shape[1]
        out = rows.new_empty(n, n)
        for first in range(0, n, _COLUMNS):
            stop = min(first + _COLUMNS, n)
            # The other half is the transpose.
            torch.mm(rows[:, first:stop].T, rows[:, :stop], out=out[first:stop, :stop])
            out[:first, first:stop] = out[first:stop, :first].T
        return out

    def dense(self) -> Tensor:
        """Return `R`, `(m, n)`."""
        return torch.cat([part.dense() for part in self.parts], 1)

    def squares(self) -> Tensor:
        """Return the squared norms of the rows, `(m,)`: the diagonal of `R R'`."""
        return torch.stack([part.squares() for part in self.parts]).sum(0)

    def weigh(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Return `S't`, `(m,)`, for changes `t` of this process's outputs, by their numbers."""
        return _of_all(torch.cat([root.weigh(tangents) for root in self.roots]), self.source)


# Columns of `R'R` formed at once.
_COLUMNS = 1024


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
        """Return the least `r` for which `S r` is nearest to the loss's slopes by the outputs, `(rank samples,)`."""
        # The columns of a block are orthogonal.
        squares = self.blocks.square().sum(1).T.reshape(-1)
        return torch.where(squares > 0, self.weigh(slopes) / squares, 0)

    def only(self, chosen: Tensor) -> Root:
        """Return the blocks of these samples alone, weighted up."""
        weight = math.sqrt(len(self.blocks) / len(chosen))
        return Root(self.numbers, self.index[chosen], weight * self.blocks[chosen])


@torch.no_grad()
def jacobian_rows(evaluation: Evaluation) -> Rows:
    """Return the rows of the outputs' Jacobian, `R = J`, of an evaluation whose graph is kept.

    The rows are the entries of this process's outputs, each flattened, in the order of the outputs. There are no
    residuals: these are zero.

    Raises:
        RuntimeError: No output was recorded, or the evaluation was freed.
        RowsError: Samples are not independent.
        MemoryError: The rows would not fit in memory.
    """
    check_outputs(evaluation)
    outputs = [z for z in evaluation.graph[1] if z.tensor.numel()]
    gathered = [Gathered(p.numel()) for p in evaluation.params]
    roots, order, first = [], [], 0
    for z in outputs:
        group = _separated([z], evaluation, lambda index: True)
        units = torch.eye(group.columns, dtype=evaluation.gradient.dtype, device=z.tensor.device)
        roots.append(Root((z.number,), group.index, units.expand(group.count, -1, -1)))
        group.gather(roots[-1].blocks, None, gathered, first)
        order.append(first + group.index.T.reshape(-1).argsort())
        first += z.tensor.numel()
    r = evaluation.gradient.new_zeros(first)
    parts = tuple(found.rows(first, r) for found in gathered)
    rows = Rows(r, None, first, parts, tuple(p.numel() for p in evaluation.params), tuple(roots))
    _check_products(rows, evaluation)
    numbers = torch.cat(order)
    return replace(rows, parts=tuple(part.ordered(numbers) for part in parts), roots=())


@torch.no_grad()
def residual_rows(evaluation: Evaluation, most: int | None = None, seed: int = 0) -> Rows:
    """Return the residual rows of an evaluation whose graph is kept, with several processes those of all.

    Once per optimizer, products with a random vector are compared with those by autograd.

    Args:
        evaluation: The evaluation.
        most: Number of rows at most, chosen at random among the samples and weighted up; None (default): all.
        seed: Seed of the choice. Default 0.

    Raises:
        RuntimeError: No output was recorded, or the evaluation was freed.
        RowsError: Samples are not independent, or a loss is not convex in its outputs.
        MemoryError: The rows would not fit in memory.
    """
    source = evaluation.source
    if source is None:
        rows = _own_rows(evaluation, most, seed)
    else:
        rows = _of_processes(source.together(lambda: _own_rows(evaluation, most, seed)), source)
    rest = evaluation.data_gradient - rows.pull(rows.residuals)
    eps, size = torch.finfo(rest.dtype).eps, float(evaluation.data_gradient.norm())
    # Terms of the gradient that cancel are rounded before.
    rounding = _ORDER * eps * (float(rows.squares().sum().sqrt()) * float(rows.residuals.norm()) + size)
    return rows if float(rest.norm()) <= rounding else replace(rows, remainder=rest)


# How many rounding units a gradient may be off by, relative to its terms.
_ORDER = 64


def _own_rows(evaluation: Evaluation, most: int | None, seed: int) -> Rows:
    """Return the rows of this process's outputs, checked."""
    if evaluation.parts:
        return _of_parts([(_own_rows(part, most, seed), mask) for part, mask in evaluation.parts])
    check_outputs(evaluation)
    loss, outputs = evaluation.graph[0], [z for z in evaluation.graph[1] if z.tensor.numel()]
    slopes = _slopes(loss, outputs)
    groups = [_rooted(loss, outputs, members, evaluation) for members in _coupled(loss, outputs)]
    count = sum(math.prod(root.shape) for _, root in groups)
    generator = torch.Generator().manual_seed(seed)
    gathered = [Gathered(p.numel()) for p in evaluation.params]
    residuals, roots, first = [], [], 0
    for group, root in groups:
        chosen = None
        if most is not None and count > most:
            kept = max(1, round(group.count * most / count))
            chosen = torch.randperm(group.count, generator=generator)[:kept].to(loss.device)
            root = root.only(chosen)
        residuals.append(root.residuals(slopes))
        group.gather(root.blocks, chosen, gathered, first)
        roots.append(root)
        first += math.prod(root.shape)
    r = torch.cat(residuals) if residuals else evaluation.gradient.new_zeros(0)
    parts = tuple(found.rows(len(r), r) for found in gathered)
    rows = Rows(r, None, count, parts, tuple(p.numel() for p in evaluation.params), tuple(roots))
    _check_products(rows, evaluation)
    if count == len(r) and not evaluation.leaves_outputs_out():
        _check_gradient(rows, evaluation, slopes)
    return rows


def _check_products(rows: Rows, evaluation: Evaluation) -> None:
    """Compare products of the rows with those by autograd, once per optimizer.

    Raises:
        RowsError: They differ.
    """
    if evaluation.standing.verdicts.get("rows") is not None:
        return
    loss, outputs = evaluation.graph[0], [z for z in evaluation.graph[1] if z.tensor.numel()]
    tensors, params = [z.tensor for z in outputs], evaluation.params
    eps = coarsest([loss.grad_fn], evaluation.coarse_eps)
    generator = torch.Generator().manual_seed(0)
    u, v = normals(rows.residuals, generator), normals(evaluation.gradient, generator)
    along = _spread(rows, u, outputs)
    pulled = flatten(grad(tensors, params, [along[z.number] for z in outputs], keep=True), params)
    error, cost = _difference(rows.pull(u), pulled), 1
    if not look_through(loss, tensors, eps).is_foreign:
        # Forms `J v` by a second differentiation, which may be wrong where the graph holds foreign code.
        pushed = dict(zip([z.number for z in outputs], push_of(tensors, params)(v), strict=True))
        error, cost = max(error, _difference(rows.push(v), rows.weigh(pushed))), 4
    if not error <= _tolerance(eps):
        raise RowsError(_OTHER.format("products with a random vector", error))
    evaluation.standing.judge("rows", Verdict(Manner("cached"), "", 0.0, cost))


def _check_gradient(rows: Rows, evaluation: Evaluation, slopes: Mapping[int, Tensor]) -> None:
    """Compare `R'r` with the gradient in every step, for samples may be coupled in another way than in the first.

    Raises:
        RowsError: They differ.
    """
    loss, outputs = evaluation.graph
    reached = _spread(rows, rows.residuals, outputs)
    eps = coarsest([loss.grad_fn], evaluation.coarse_eps)
    if any(_difference(reached[number], slope) > _tolerance(eps) for number, slope in slopes.items()):
        return  # slopes outside the range of `S` are no part of `R'r`
    gradient = evaluation.recording.gradient
    # Terms that cancel, as near a minimum, are rounded before.
    terms = float(rows.squares().sum().sqrt()) * float(rows.residuals.norm())
    error = float((rows.pull(rows.residuals) - gradient).norm())
    if error > _tolerance(eps) * float(gradient.norm()) + 1e4 * eps * terms:
        raise RowsError(_OTHER.format("the gradient", error / float(gradient.norm())))


def _spread(rows: Rows, u: Tensor, outputs: Sequence[Output]) -> dict[int, Tensor]:
    """Return `S u` by the outputs' numbers, zero where there is no row."""
    like = {z.number: z.tensor for z in outputs}
    pieces = u.split([math.prod(root.shape) for root in rows.roots])
    found = {number: torch.zeros_like(z) for number, z in like.items()}
    for root, piece in zip(rows.roots, pieces, strict=True):
        found.update(root.spread(piece, like))
    return found


def _tolerance(eps: float) -> float:
    """Return the relative difference of products that is rounding."""
    return min(math.sqrt(eps), 0.1)


_OTHER = (
    "The rows of the Jacobian differ from autograd's derivatives, {} by {:.2g} of its norm: an operation of the model "
    "treats samples in a way that newtonopt does not know. Use HessianFree, which needs products alone."
)


def _difference(a: Tensor, b: Tensor) -> float:
    size = float(b.norm())
    return float((a - b).norm()) / size if size else float(a.norm())


def _of_parts(found: Sequence[tuple[Rows, Tensor]]) -> Rows:
    """Return the rows of losses that count for some of the parameters only, with a mask `(n,)` for each."""
    every, columns = [rows for rows, _ in found], []
    for number in range(len(every[0].parts)):
        pieces = []
        for rows, mask in found:
            counts = bool(mask.split(rows.sizes)[number].any())
            zeros = rows.residuals.new_zeros(len(rows.residuals), rows.sizes[number])
            pieces.append(rows.parts[number] if counts else Formed(zeros))
        columns.append(joined(pieces))
    r = torch.cat([rows.residuals for rows in every])
    roots = tuple(root for rows in every for root in rows.roots)
    return Rows(r, None, sum(rows.count for rows in every), tuple(columns), every[0].sizes, roots)


def _of_processes(own: Rows, source: Source) -> Rows:
    """Return the rows of all processes, one below the other: `R'R` is the mean of theirs. Factors travel, not rows."""
    weight = math.sqrt(source.share)
    r = _of_all(own.residuals, source)
    if len(r) == len(own.residuals):
        return own
    parts = []
    for part in own.parts:
        are_factors = torch.cat(source.collect(r.new_tensor([isinstance(part, Factors)])))
        if isinstance(part, Factors) and bool(are_factors.all()):
            sides = source.collect(part.left * weight), source.collect(part.right)
            parts.append(joined([Factors(left, right) for left, right in zip(*sides, strict=True)]))
        else:
            parts.append(Formed(torch.cat(source.collect(part.dense() * weight))))
    count = int(torch.cat(source.collect(r.new_tensor([own.count]))).sum())
    return Rows(r, None, count, tuple(parts), own.sizes, own.roots, source)


def _of_all(values: Tensor, source: Source | None) -> Tensor:
    """Return the values of all processes, one after the other, each weighted by the root of its process's share."""
    return values if source is None else torch.cat(source.collect(values * math.sqrt(source.share)))


def check_outputs(evaluation: Evaluation) -> None:
    """Raise a RuntimeError if the closure has no recorded outputs, or the evaluation was freed."""
    evaluation.check_alive()
    if not evaluation.output_sizes:
        raise RuntimeError(evaluation.recording.advice)


class RowsError(RuntimeError):
    """The rows of the Jacobian cannot be formed."""


# The loss by the outputs.


def _slopes(loss: Tensor, outputs: Sequence[Output]) -> dict[int, Tensor]:
    found = grad(loss, [z.tensor for z in outputs], keep=True)
    pairs = zip(outputs, found, strict=True)
    return {z.number: torch.zeros_like(z.tensor) if g is None else g for z, g in pairs}


def _coupled(loss: Tensor, outputs: Sequence[Output]) -> list[list[Output]]:
    """Return the outputs in groups: the loss's Hessian couples no output with one of another group."""
    curve = curve_of(loss, outputs)
    groups: list[set[int]] = []
    for i, z in enumerate(outputs):
        along = [torch.zeros_like(other.tensor) for other in outputs]
        flat = z.tensor.detach().reshape(-1)
        along[i] = normals(flat, torch.Generator().manual_seed(i)).view(z.tensor.shape)
        touched = {j for j, bent in enumerate(curve(along)) if bool((bent != 0).any())} | {i}
        joined = touched.union(*(group for group in groups if group & touched))
        groups = [*(group for group in groups if not group & touched), joined]
    return [[outputs[i] for i in sorted(group)] for group in sorted(groups, key=min)]


def _rooted(
    loss: Tensor, outputs: Sequence[Output], members: Sequence[Output], evaluation: Evaluation
) -> tuple[Group, Root]:
    """Return a group of outputs with samples that neither the network nor the loss couples, and the loss's root."""
    curve, own = curve_of(loss, outputs), {z.number for z in members}
    dtype = flat_dtype(evaluation.params)

    def curved(flat: Tensor) -> Tensor:
        pieces = dict(zip([z.number for z in members], flat.split([z.tensor.numel() for z in members]), strict=True))
        along = [
            pieces[z.number].view(z.tensor.shape).to(z.tensor.dtype) if z.number in own else torch.zeros_like(z.tensor)
            for z in outputs
        ]
        bent = {z.number: t for z, t in zip(outputs, curve(along), strict=True)}
        return torch.cat([bent[z.number].reshape(-1) for z in members]).to(dtype)

    def blocks(index: Tensor) -> Tensor | None:
        """Return the blocks of the Hessian, `(samples, columns, columns)`; None if it has entries beside them."""
        n, k = index.shape
        found = evaluation.gradient.new_zeros(n, k, k)
        for c in range(k):
            unit = found.new_zeros(n * k)
            unit[index[:, c]] = 1
            found[:, :, c] = curved(unit)[index]
        v = normals(found.new_zeros(n * k), torch.Generator().manual_seed(0))
        expected, bent = torch.einsum("nij,nj->ni", found, v[index]), curved(v)[index]
        size = expected.abs().sum(1) + found.abs().amax((1, 2))
        close = (bent - expected).abs().sum(1) <= _ORDER * k * evaluation.coarse_eps * size
        return found if bool(close.all()) else None

    kept: dict[int, Tensor] = {}

    def is_independent(index: Tensor) -> bool:
        found = blocks(index)
        if found is not None:
            kept[index.shape[1]] = found
        return found is not None

    group = _separated(members, evaluation, is_independent)
    return group, Root(tuple(z.number for z in members), group.index, _root(kept[group.columns]))


def _root(blocks: Tensor) -> Tensor:
    """Return `S` with `S S'` the blocks, `(samples, columns, rank)`; the columns of a block are orthogonal.

    Raises:
        RowsError: A block has a negative eigenvalue.
    """
    values, vectors = torch.linalg.eigh(0.5 * (blocks + blocks.mT))
    largest = values.abs().amax(1, keepdim=True)
    rounding = largest * values.shape[1] * torch.finfo(values.dtype).eps
    if bool((values < -4 * rounding).any()):
        raise RowsError(
            "The loss is not convex in its outputs, so the Gauss-Newton matrix has no rows. Use HessianFree with "
            'curvature="hessian", or NewtonCG.'
        )
    roots = torch.where(values > rounding, values, 0).sqrt()
    used = (roots > 0).any(0)
    # A loss that is flat here keeps one row.
    used[-1] = True
    root: Tensor = (vectors * roots[:, None, :])[:, :, used]
    return root


# The samples of the outputs.


@dataclass(frozen=True, eq=False)
class Group:
    """Outputs with their samples, and the operations through which parameters enter them.

    Attributes:
        samples: The samples.
        uses: The uses of the parameters.
        leaves: Number of each parameter by its node.
    """

    samples: Samples
    uses: tuple[Use, ...]
    leaves: Mapping[Node, int]

    @property
    def index(self) -> Tensor:
        """The samples' entries, `(samples, columns)`."""
        return self.samples.index

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.samples.count

    @property
    def columns(self) -> int:
        """Number of entries of a sample."""
        return self.samples.columns

    def gather(self, blocks: Tensor, chosen: Tensor | None, gathered: Sequence[Gathered], first: int) -> None:
        """Add the rows along `blocks`, from the row `first` on, one column of the blocks after the other.

        Args:
            blocks: `(samples, columns, rank)`, for the samples chosen.
            chosen: Numbers of the samples; None: all.
            gathered: The rows by parameter.
            first: Number of the first row.
        """
        with differentiable_kernels():  # for checkpoints, which compute again what a node has saved
            self._gather(blocks, chosen, gathered, first)

    def _gather(self, blocks: Tensor, chosen: Tensor | None, gathered: Sequence[Gathered], first: int) -> None:
        rows = blocks.shape[0]
        place = None
        if chosen is not None:
            place = torch.full((self.count + 1,), -1, device=chosen.device)
            place[chosen] = torch.arange(rows, device=chosen.device)
        for j in range(blocks.shape[2]) if self.uses else ():
            scale, along = blocks.new_ones(rows), self._along(blocks[:, :, j], chosen)
            if self.columns == 1:
                # Known along random weights: gradients are linear in the cotangent, sample by sample.
                weights = weights_of(self.samples)[:, 0].to(blocks.dtype)
                scale = blocks[:, 0, j] / (weights if chosen is None else weights[chosen])
            for use, gradients in zip(self.uses, along, strict=True):
                if any(g is not None for g in gradients):
                    contribution = contribution_of(use, gradients)
                    if place is not None:
                        contribution = replace(contribution, samples=place[contribution.samples])
                    self._add(contribution, use, scale, gathered, first + j * rows)

    def _along(self, values: Tensor, chosen: Tensor | None) -> list[list[Tensor | None]]:
        """Return the gradients of each use's results along these values, `(samples, columns)`.

        If a sample has one entry they are those along `weights_of(self.samples)`.
        """
        if self.columns == 1:
            return [[None if one is None else one.gradient for one in use.results] for use in self.uses]
        whole = values.new_zeros(self.index.shape)
        whole[slice(None) if chosen is None else chosen] = values
        edges = list(dict.fromkeys(edge for use in self.uses for edge in use.edges))
        found = dict(zip(edges, self.samples.gradients(whole, edges), strict=True))
        return [[found[edge] for edge in use.edges] for use in self.uses]

    def _add(
        self, contribution: Contribution, use: Use, scale: Tensor, gathered: Sequence[Gathered], first: int
    ) -> None:
        """Add the rows of one use, sample `i` times `scale[i]`, `(samples,)`, from the row `first` on."""
        route = _route(use.target, self.leaves)
        if isinstance(contribution, Outer) and route is not None and route.order is None:
            left, right = (factor.to(scale.dtype) for factor in by_sample(contribution, len(scale)))
            right = right * scale[:, None, None]
            gathered[route.number].add_outer(first, *((right, left) if route.is_transposed else (left, right)))
            return
        whole = dense(contribution, len(scale)) * scale[:, None]  # complex where the operand is
        if route is None:
            for number, rows in _pulled(use.target, whole, self.leaves):
                gathered[number].add_formed(first, rows)
            return
        if route.is_transposed:
            p, q = use.target[0]._input_metadata[use.target[1]].shape
            whole = whole.view(-1, p, q).mT.reshape(len(whole), -1)
        gathered[route.number].add_formed(first, whole if route.order is None else whole[:, route.order])


def leaves_of(params: Sequence[Tensor]) -> dict[Node, int]:
    """Return the number of each parameter by its node, at which its gradient is accumulated."""
    return {torch.autograd.graph.get_gradient_edge(p).node: number for number, p in enumerate(params)}


def _separated(members: Sequence[Output], evaluation: Evaluation, is_independent: Callable[[Tensor], bool]) -> Group:
    """Return outputs with the samples that take the fewest passes.

    Args:
        members: The outputs.
        evaluation: The evaluation.
        is_independent: Whether samples with these entries may be taken for independent as far as the loss goes.

    Raises:
        RowsError: There are none, or too many passes would be needed.
    """
    tensors = tuple(z.tensor for z in members)
    leaves = leaves_of(evaluation.params)
    operation = ""
    for index in _groupings(tensors):
        samples = Samples(tensors, index)
        if samples.columns > _MOST_PASSES:
            break
        if not is_independent(index):
            continue
        try:
            return Group(samples, tuple(uses_of(samples, list(leaves))), leaves)
        except CoupledError as error:
            operation = operation or error.operation
    size = sum(z.numel() for z in tensors)
    why = f"the operation {operation} couples samples" if operation else "the loss couples its samples"
    raise RowsError(
        f"The rows of the Jacobian would take {size} backward passes, one for each of the outputs' entries, for {why}. "
        f"More than {_MOST_PASSES} are not made. Use HessianFree, which needs products alone."
    )


# Backward passes for one group of outputs at most.
_MOST_PASSES = 512


def _groupings(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield entries grouped into samples, `(samples, columns)`, by some of their dimensions, fewest columns first."""
    shapes = {z.shape for z in tensors}
    offsets = [0]
    for z in tensors:
        offsets.append(offsets[-1] + z.numel())
    total = torch.arange(offsets[-1], device=tensors[0].device)
    numbers = [total[a:b].view(z.shape) for z, a, b in zip(tensors, offsets[:-1], offsets[1:], strict=True)]
    sizes = dict(enumerate(tensors[0].shape)) if len(shapes) == 1 else {}
    if not sizes and len({z.shape[:1] for z in tensors}) == 1 and tensors[0].dim():
        numbers, sizes = [n.reshape(len(n), -1) for n in numbers], {0: tensors[0].shape[0]}
    dims = [dim for dim, size in sizes.items() if size > 1]
    found = []
    for count in range(len(dims) + 1):
        for kept in itertools.combinations(dims, count):
            samples = math.prod(sizes[dim] for dim in kept)
            order = range(len(kept))
            moved = [n.movedim(kept, tuple(order)).reshape(samples, -1) for n in numbers]
            found.append(torch.cat(moved, 1))
    yield from sorted(found, key=lambda index: index.shape[1])


# From an operand to the parameters behind it.


@dataclass(frozen=True, eq=False)
class Route:
    """A way from an operand to the parameter that it is a view of.

    Attributes:
        number: Number of the parameter.
        is_transposed: Whether the operand is the parameter's transpose.
        order: Number of the operand's entry for each of the parameter's; None: in order.
    """

    number: int
    is_transposed: bool = False
    order: Tensor | None = None


def _route(target: Edge, leaves: Mapping[Node, int]) -> Route | None:
    """Return the way to the one parameter whose entries an operand holds; None if there is none."""
    node: Node | None = target[0]
    passed: list[Node] = []
    while node is not None and node not in leaves:
        if kind_of(node) not in _VIEWS or len(node.next_functions) != 1:
            return None
        passed.append(node)
        node = node.next_functions[0][0]
    if node is None:
        return None
    number = leaves[node]
    kinds = [kind_of(one) for one in passed]
    if set(kinds) <= {"T"}:
        return Route(number, len(kinds) % 2 == 1)
    shape = target[0]._input_metadata[target[1]].shape
    count = torch.arange(math.prod(shape), dtype=torch.float64, device=_device_of(node))
    moved: Any = count.view(shape)
    for one in passed:
        step: Any = one
        moved = step(moved)
        moved = moved[0] if isinstance(moved, tuple) else moved
    order = moved.reshape(-1).long()
    if torch.equal(order, count.long()):
        return Route(number)
    if len(shape) == 2 and torch.equal(order, count.long().view(shape).T.reshape(-1)):
        return Route(number, True)
    return Route(number, False, order)


def _device_of(leaf: Any) -> torch.device:
    device: torch.device = leaf.variable.device
    return device


_VIEWS = frozenset({"Alias", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze", "View"})


def _pulled(target: Edge, rows: Tensor, leaves: Mapping[Node, int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers of the parameters behind an operand and the rows pulled back to them, `(rows, size)`."""
    node, number = target
    of = node._input_metadata[number]
    met = [leaf for leaf in behind(node) if leaf in leaves]
    start: Any = GradientEdge(node, number)
    ends: Any = [GradientEdge(leaf, 0) for leaf in met]
    pulled: list[list[Tensor | None]] = []
    for row in rows:
        along = [row.view(of.shape).to(of.dtype)]
        pulled.append(list(grad([start], ends, along, keep=True)))
    for leaf, column in zip(met, zip(*pulled, strict=True), strict=True):
        if any(g is not None for g in column):
            like = next(g for g in column if g is not None)
            stacked = torch.stack([torch.zeros_like(like) if g is None else g for g in column])
            yield leaves[leaf], stacked.reshape(len(rows), -1)
