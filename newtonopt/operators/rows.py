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
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from newtonopt.autodiff.contributions import Contribution, Outer, by_sample, contribution_of, dense
from newtonopt.autodiff.gradients import NoSecondDerivativeError, differentiable_kernels, grad
from newtonopt.autodiff.graph import bytes_handed_on
from newtonopt.autodiff.routes import cost_behind, leaves_of, pulled_back, route_to, viewed
from newtonopt.autodiff.samples import Samples, Use, uses_of
from newtonopt.closure.evaluation import Evaluation, Manner, Source, Verdict
from newtonopt.closure.losses import Output
from newtonopt.operators.factors import Block, Factors, Formed, Outers, Piece, Weight, assembled, gram, joined
from newtonopt.operators.products import push_of
from newtonopt.operators.roots import Head, Root, root_of
from newtonopt.vectors.flat import flatten
from newtonopt.vectors.memory import check_room
from newtonopt.vectors.random import normals
from newtonopt.vectors.sharded import is_sharded


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of `R = S'J`: `J` the outputs' Jacobian, `S S'` the loss's Hessian by the outputs.

    Attributes:
        residuals: `r`, `(m,)`: `R'r` is the gradient of the losses (without decay), less the remainder.
        remainder: `g - R'r`, `(n,)`: the part of the gradient outside the rows' range; None if it is rounding.
        count: Number of rows of the whole loss: more than `m` if rows were chosen at random.
        parts: The rows by parameter.
        shapes: Shapes of the parameters.
        roots: `S'` by outputs, for this process's.
        source: The closure's source, which knows the other processes; None: there are none.
    """

    residuals: Tensor
    remainder: Tensor | None
    count: int
    parts: tuple[Factors | Formed, ...]
    shapes: tuple[torch.Size, ...]
    roots: tuple[Root, ...]
    source: Source | None = None

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

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

    def gram(self, weights: Sequence[Weight] | None = None, out: Tensor | None = None) -> Tensor:
        """Return `R W R'`, `(m, m)`.

        Args:
            weights: `W`: for each parameter tensor a number, or `w = outer(left, right)` of shape `(p, q)`, with `p`
                its first dimension, or `(left, None)` for a vector; None (default): ones.
            out: Memory for the result, overwritten; None (default): new memory.
        """
        m = self.residuals.numel()
        if out is None:
            remedy = "Choose fewer of the rows, or use HessianFree, which needs products alone."
            check_room(2 * m * m, self.residuals.dtype, self.residuals.device, f"A {m} x {m} matrix", remedy)
            out = self.residuals.new_empty(m, m)
        scaled = [
            part if w == 1.0 else part.scaled(w)
            for part, w in zip(self.parts, weights or [1.0] * len(self.parts), strict=True)
        ]
        return gram(scaled, out)

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

    def double(self) -> Rows:
        """Return the rows in float64, for equations whose conditioning float32 would not stand."""
        parts, rest = tuple(part.double() for part in self.parts), self.remainder
        residuals, remainder = self.residuals.double(), None if rest is None else rest.double()
        return replace(self, residuals=residuals, remainder=remainder, parts=parts)

    def squares(self) -> Tensor:
        """Return the squared norms of the rows, `(m,)`: the diagonal of `R R'`."""
        return torch.stack([part.squares() for part in self.parts]).sum(0)

    def column_squares(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Return the squared norms of the columns, summed up, for each parameter tensor.

        Returns:
            For a parameter of shape `(p, ...)` with `p q` entries, the sums over each row of that `p x q` matrix,
            `(p,)`, and over each column, `(q,)`; for a vector or a number the squared norms themselves, and None.
        """
        return tuple(part.column_squares(len(shape) > 1) for part, shape in zip(self.parts, self.shapes, strict=True))

    def terms(self) -> float:
        """Return `|R|_F |r|`: the size of the terms that `R'r` adds up."""
        return float(self.squares().sum().sqrt()) * float(self.residuals.norm())

    def weigh(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Return `S't`, `(m,)`, for changes `t` of this process's outputs, by their numbers."""
        return _of_all(torch.cat([root.weigh(tangents) for root in self.roots]), self.source)


# Columns of `R'R` formed at once.
_COLUMNS = 1024


@torch.no_grad()
def jacobian_rows(evaluation: Evaluation) -> Rows:
    """Return the rows of the outputs' Jacobian, `R = J`, of an evaluation whose graph is kept.

    The rows are the entries of this process's outputs, each flattened, in the order of the outputs. There are no
    residuals: these are zero.

    Raises:
        RuntimeError: No output was recorded, or the evaluation was freed.
        RowsError: Samples are not independent, or the graph was not kept.
        MemoryError: The rows would not fit in memory.
    """
    check_rows(evaluation)
    if evaluation.parts:
        raise RowsError("Some losses count for only some of the parameters")
    head, r = _head(evaluation), evaluation.gradient.new_zeros(0)
    pieces: list[tuple[int, Piece]] = []
    roots, order, first = [], [], 0
    for z in head.outputs:
        group, units = _separated([z], evaluation.params, lambda index: _units(index, r))
        roots.append(Root((z.number,), group.samples.index, units))
        pieces.extend(group.pieces(units, None, first))
        order.append(first + group.samples.index.T.reshape(-1).argsort())
        first += z.tensor.numel()
    rows = _rows(r.new_zeros(first), first, pieces, evaluation.params, roots)
    _check_products(rows, evaluation, head)
    numbers = torch.cat([torch.arange(0, device=r.device), *order])
    return replace(rows, parts=tuple(part.ordered(numbers) for part in rows.parts), roots=())


def _units(index: Tensor, like: Tensor) -> Tensor:
    """Return the identity for each sample, `(samples, columns, columns)`."""
    n, k = index.shape
    return torch.eye(k, dtype=like.dtype, device=like.device).expand(n, k, k)


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
        RowsError: Samples are not independent, a loss is not convex in its outputs, or the graph was not kept.
        MemoryError: The rows would not fit in memory.
    """
    source = evaluation.source
    if source is None or source.is_alone:
        return _own_rows(evaluation, most, seed)
    own = None if most is None else max(1, round(most * source.share))
    found = source.together(lambda: _attempt(evaluation, own, seed))
    if not agreed(source, isinstance(found, Rows), evaluation.gradient):
        raise found if isinstance(found, RowsError) else RowsError("Another process could not form its rows")
    assert isinstance(found, Rows)
    return _with_remainder(_of_processes(found, source), evaluation.data_gradient)


def _with_remainder(rows: Rows, gradient: Tensor) -> Rows:
    """Return the rows with the part of the gradient that is outside their range."""
    rest = gradient - rows.pull(rows.residuals)
    # Terms of the gradient that cancel are rounded before.
    rounding = _ORDER * torch.finfo(rest.dtype).eps * (rows.terms() + float(gradient.norm()))
    return replace(rows, remainder=None if float(rest.norm()) <= rounding else rest)


# How many rounding units a gradient may be off by, relative to its terms.
_ORDER = 64


def _attempt(evaluation: Evaluation, most: int | None, seed: int) -> Rows | RowsError:
    try:
        return _own_rows(evaluation, most, seed)
    except RowsError as error:
        return error


def agreed(source: Source | None, answer: bool, like: Tensor) -> bool:
    """Return whether all processes answer yes."""
    return answer if source is None else bool(torch.cat(source.collect(like.new_tensor([answer]))).all())


def _own_rows(evaluation: Evaluation, most: int | None, seed: int) -> Rows:
    """Return the rows of this process's outputs, checked."""
    check_rows(evaluation)
    if evaluation.parts:
        parts = [(_own_rows(part, most, seed), mask) for part, mask in evaluation.parts]
        return _with_remainder(_of_parts(parts), evaluation.data_gradient)
    head, params = _head(evaluation), evaluation.params
    if head.graph.heads:
        raise RowsError(head.graph.named("The loss's second derivative cannot be trusted, for it is computed by "))
    is_convex, groups = evaluation.recording.convex, []
    for members in head.groups() if head.outputs else ():
        groups.append(_rooted(members, head, params, is_convex=is_convex))
    count = sum(math.prod(root.shape) for _, root in groups)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[tuple[int, Piece]] = []
    residuals, roots, first = [evaluation.gradient.new_zeros(0)], [], 0
    for group, root in groups:
        chosen, r = None, root.residuals(head.slopes)
        if most is not None and count > most:
            samples = len(group.samples.index)
            kept = max(1, round(samples * most / count))
            chosen = torch.randperm(samples, generator=generator, device="cpu")[:kept].to(head.loss.device)
            # Weighted, `R'R` and `R'r` of the chosen rows have the expectation of those of all.
            weight = math.sqrt(samples / kept)
            root, r = root.only(chosen, weight), weight * r[:, chosen]
        residuals.append(r.reshape(-1))
        pieces.extend(group.pieces(root.blocks, chosen, first))
        roots.append(root)
        first += math.prod(root.shape)
    rows = _rows(torch.cat(residuals), count, pieces, params, roots)
    _check_products(rows, evaluation, head)
    rows = _with_remainder(rows, evaluation.recording.gradient)
    if count == first and not evaluation.leaves_outputs_out():
        _check_gradient(rows, evaluation, head)
    return rows


def _head(evaluation: Evaluation) -> Head:
    head = Head.of(evaluation)
    if head.graph.is_nested:
        raise RowsError("The model computes with nested tensors")
    return head


def _rows(
    residuals: Tensor,
    count: int,
    pieces: Sequence[tuple[int, Piece]],
    params: Sequence[Tensor],
    roots: Sequence[Root],
) -> Rows:
    """Return the rows made of these pieces, each with the number of its parameter."""
    own: list[list[Piece]] = [[] for _ in params]
    for number, piece in pieces:
        own[number].append(piece)
    pairs = zip(own, params, strict=True)
    parts = tuple(assembled(some, p.shape, len(residuals), residuals) for some, p in pairs)
    return Rows(residuals, None, count, parts, tuple(p.shape for p in params), tuple(roots))


_NO_GRAPH = (
    'Use products="cached", which says which operation has no second derivative if "auto" took differences, or '
    "HessianFree, which needs products alone."
)


def check_rows(evaluation: Evaluation) -> None:
    """Raise an error if an evaluation has no rows: it was freed, keeps no graph, or has no recorded outputs."""
    evaluation.check_alive()
    if is_sharded(evaluation.params):
        raise RowsError("The parameters are sharded")
    if evaluation.form != "cached":
        raise RowsError(f"Products are {evaluation.form}, so that no graph is kept", _NO_GRAPH)
    evaluation.check_unchanged()
    check_outputs(evaluation)


def check_outputs(evaluation: Evaluation) -> None:
    """Raise a RuntimeError if the closure has no recorded outputs."""
    if not evaluation.parts and not evaluation.output_sizes:
        raise RuntimeError(evaluation.recording.advice)


class RowsError(RuntimeError):
    """The rows of the Jacobian cannot be formed.

    Attributes:
        reason: Why, without a full stop.
    """

    def __init__(self, reason: str, remedy: str = "Use HessianFree, which needs products alone.") -> None:
        super().__init__(f"{reason}, so the rows of the Jacobian are not available. {remedy}")
        self.reason = reason


# The checks.


def _check_products(rows: Rows, evaluation: Evaluation, head: Head) -> None:
    """Compare products of the rows with those by autograd, once per optimizer.

    Raises:
        RowsError: They differ.
    """
    if evaluation.standing.verdicts.get("rows") is not None or not rows.roots:
        return
    tensors, params = head.tensors, evaluation.params
    generator = torch.Generator().manual_seed(0)
    u, v = normals(rows.residuals, generator), normals(evaluation.gradient, generator)
    along = _spread(rows, u, head)
    pulled = flatten(grad(tensors, params, [along[z.number] for z in head.outputs], keep=True), params)
    error, cost = _difference(rows.pull(u), pulled), 1
    # Autograd forms `J v` by a second differentiation, which may be missing, or wrong where the graph has foreign code.
    if not head.graph.is_foreign:
        with suppress(NoSecondDerivativeError):
            pushed = dict(zip(along, push_of(tensors, params)(v), strict=True))
            error, cost = max(error, _difference(rows.push(v), rows.weigh(pushed))), 4
    if not math.isfinite(error):
        raise FloatingPointError(
            "The rows of the Jacobian, or the loss's second derivative with respect to its outputs, are not finite. "
            "Look for a norm, a root or a logarithm at zero."
        )
    if not error <= _tolerance(head.graph.eps):
        raise RowsError(_OTHER.format("products with a random vector", error))
    evaluation.standing.judge("rows", Verdict(Manner("cached"), "", 0.0, cost))


def _check_gradient(rows: Rows, evaluation: Evaluation, head: Head) -> None:
    """Compare `R'r` with the gradient in every step, for samples may be coupled in another way than in the first.

    Raises:
        RowsError: They differ.
    """
    reached, close = _spread(rows, rows.residuals, head), _tolerance(head.graph.eps)
    if any(_difference(reached[number], slope) > close for number, slope in head.slopes.items()):
        return  # slopes outside the range of `S` are no part of `R'r`
    error = 0.0 if rows.remainder is None else float(rows.remainder.norm())
    size = float(evaluation.recording.gradient.norm())
    if error > close * size + 1e4 * head.graph.eps * rows.terms():
        raise RowsError(_OTHER.format("the gradient", error / size))


def _spread(rows: Rows, u: Tensor, head: Head) -> dict[int, Tensor]:
    """Return `S u` by the outputs' numbers."""
    pieces, like = u.split([math.prod(root.shape) for root in rows.roots]), {z.number: z.tensor for z in head.outputs}
    found: dict[int, Tensor] = {z.number: torch.zeros_like(z.tensor) for z in head.outputs}
    for root, piece in zip(rows.roots, pieces, strict=True):
        found.update(root.spread(piece, like))
    return found


def _tolerance(eps: float) -> float:
    """Return the relative difference of products that is rounding."""
    return min(math.sqrt(eps), 0.1)


def _difference(a: Tensor, b: Tensor) -> float:
    size = float(b.norm())
    return float((a - b).norm()) / size if size else float(a.norm())


_OTHER = (
    "Rows differ from autograd's derivatives, {} by {:.2g} of its norm: an operation of the model treats samples in a "
    "way that newtonopt does not know"
)


# Rows of several losses, and of several processes.


def _of_parts(found: Sequence[tuple[Rows, Tensor]]) -> Rows:
    """Return the rows of losses that count for some of the parameters only, with a mask `(n,)` for each."""
    every, columns = [rows for rows, _ in found], []
    for number, size in enumerate(every[0].sizes):
        pieces = []
        for rows, mask in found:
            counts = bool(mask.split(rows.sizes)[number].any())
            zeros = rows.residuals.new_zeros(len(rows.residuals), size)
            pieces.append(rows.parts[number] if counts else Formed(zeros, rows.parts[number].height))
        columns.append(joined(pieces))
    r = torch.cat([rows.residuals for rows in every])
    roots = tuple(root for rows in every for root in rows.roots)
    return Rows(r, None, sum(rows.count for rows in every), tuple(columns), every[0].shapes, roots)


def _of_processes(own: Rows, source: Source) -> Rows:
    """Return the rows of all processes, one below the other: `R'R` is the mean of theirs. Factors travel, not rows."""
    weight, r = math.sqrt(source.share), _of_all(own.residuals, source)
    parts = []
    for part in own.parts:
        are_factors = torch.cat(source.collect(r.new_tensor([isinstance(part, Factors)])))
        if isinstance(part, Factors) and bool(are_factors.all()):
            sides = source.collect(part.left * weight), source.collect(part.right)
            parts.append(joined([Factors(left, right) for left, right in zip(*sides, strict=True)]))
        else:
            parts.append(Formed(torch.cat(source.collect(part.dense() * weight)), part.height))
    count = int(torch.cat(source.collect(r.new_tensor([own.count]))).sum())
    return Rows(r, None, count, tuple(parts), own.shapes, own.roots, source)


def _of_all(values: Tensor, source: Source | None) -> Tensor:
    """Return the values of all processes, one after the other, each weighted by the root of its process's share."""
    return values if source is None else torch.cat(source.collect(values * math.sqrt(source.share)))


# Samples and their rows.


def _rooted(members: Sequence[Output], head: Head, params: Sequence[Tensor], *, is_convex: bool) -> tuple[Group, Root]:
    """Return a group of outputs with samples that neither the network nor the loss couples, and the loss's root."""
    group, blocks = _separated(members, params, lambda index: head.blocks(members, index))
    root = root_of(blocks, is_convex=is_convex)
    if root is None:
        raise RowsError(
            "The loss is not convex in its outputs", 'Use HessianFree with curvature="hessian", or NewtonCG.'
        )
    return group, Root(tuple(z.number for z in members), group.samples.index, root)


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

    def pieces(self, blocks: Tensor, chosen: Tensor | None, first: int) -> list[tuple[int, Piece]]:
        """Return the rows along `blocks`, one column of the blocks after the other, each with its parameter's number.

        Args:
            blocks: `(samples, columns, rank)`, for the samples chosen.
            chosen: Numbers of the samples; None: all.
            first: Number of the first row.
        """
        rows, place = len(blocks), None
        if chosen is not None:
            place = torch.full((self.samples.count + 1,), -1, device=chosen.device)
            place[chosen] = torch.arange(rows, device=chosen.device)
        found: list[tuple[int, Piece]] = []
        with differentiable_kernels():  # for checkpoints, which compute again what a node has saved
            for j in range(blocks.shape[2]) if self.uses else ():
                scale, along = blocks.new_ones(rows), self._along(blocks[:, :, j], chosen)
                if self.samples.columns == 1:
                    # Known along random weights: gradients are linear in the cotangent, sample by sample.
                    weights = self.samples.weights[:, 0].to(blocks.dtype)
                    scale = blocks[:, 0, j] / (weights if chosen is None else weights[chosen])
                for use, gradients in zip(self.uses, along, strict=True):
                    if any(g is not None for g in gradients):
                        contribution = contribution_of(use, gradients)
                        if place is not None:
                            contribution = replace(contribution, samples=place[contribution.samples])
                        found.extend(self._of_use(use, contribution, scale, first + j * rows))
        return found

    def _along(self, values: Tensor, chosen: Tensor | None) -> list[list[Tensor | None]]:
        """Return the gradients of each use's results along these values, `(samples, columns)`.

        If a sample has one entry they are those along `samples.weights`.
        """
        if self.samples.columns == 1:
            return [[None if one is None else one.gradient for one in use.results] for use in self.uses]
        whole = values.new_zeros(self.samples.index.shape)
        whole[slice(None) if chosen is None else chosen] = values
        edges = list(dict.fromkeys(edge for use in self.uses for edge in use.edges))
        found = dict(zip(edges, self.samples.gradients(whole, edges), strict=True))
        return [[found[edge] for edge in use.edges] for use in self.uses]

    def _of_use(self, use: Use, contribution: Contribution, scale: Tensor, first: int) -> Iterator[tuple[int, Piece]]:
        """Yield the rows of one use, sample `i` times `scale[i]`, `(samples,)`, from the row `first` on."""
        route = route_to(use.target, self.leaves)
        if isinstance(contribution, Outer) and route is not None and route.order is None:
            left, right = (factor.to(scale.dtype) for factor in by_sample(contribution, len(scale)))
            right = right * scale[:, None, None]
            yield route.number, Outers(first, *((right, left) if route.is_transposed else (left, right)))
            return
        whole = dense(contribution, len(scale)) * scale[:, None]  # complex where the operand is
        if route is None:
            for number, rows in pulled_back(use.target, whole, self.leaves):
                yield number, Block(first, rows)
            return
        if route.is_transposed:
            p, q = use.target[0]._input_metadata[use.target[1]].shape
            whole = whole.view(-1, p, q).mT.reshape(len(whole), -1)
        yield route.number, Block(first, whole if route.order is None else whole[:, route.order])


def _separated(
    members: Sequence[Output], params: Sequence[Tensor], blocks_of: Callable[[Tensor], Tensor | None]
) -> tuple[Group, Tensor]:
    """Return outputs with the samples that take the fewest passes, and the blocks of these samples.

    Args:
        members: The outputs.
        params: The parameters.
        blocks_of: Returns the blocks of samples with these entries; None if the loss couples the samples.

    Raises:
        RowsError: There are none, or too many passes would be needed.
    """
    tensors = tuple(z.tensor for z in members)
    leaves = leaves_of(params)
    best, least, refused, operation = None, float(_MOST_PASSES), math.inf, ""
    for index in _groupings(tensors):
        samples = Samples(tensors, index)
        if samples.columns > least:
            break
        blocks = blocks_of(index)
        if blocks is None:
            continue
        group = Group(samples, tuple(uses_of(samples, list(leaves))), leaves)
        behind = {use: cost_behind(use.target, leaves) for use in {use.target: use for use in group.uses}.values()}
        # Each column takes a pass, and each row one from where samples mix back to the parameters.
        passes = float(samples.columns)
        if any(behind.values()):
            passes += index.numel() * sum(behind.values()) / bytes_handed_on([z.grad_fn for z in tensors])
        if passes <= least:
            best, least = (group, blocks), passes
        elif passes < refused:
            refused, operation = passes, max(behind, key=lambda use: behind[use]).node.name()
    if best is not None:
        return best
    size = sum(z.numel() for z in tensors)
    why = f"The operation {operation} couples samples" if operation else "The loss couples its samples"
    raise RowsError(f"{why}, and {size} backward passes, one for each output, are more than {_MOST_PASSES}")


# Backward passes for one group of outputs at most.
_MOST_PASSES = 512


def _groupings(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield entries grouped into samples, `(samples, columns)`, by some of their dimensions, fewest columns first.

    Dimensions are those of the outputs, and those of tensors that the outputs are views of, as logits of sequences that
    were flattened for a loss.
    """
    offsets = [0]
    for z in tensors:
        offsets.append(offsets[-1] + z.numel())
    total = torch.arange(offsets[-1], device=tensors[0].device)
    numbers = [total[a:b].view(z.shape) for z, a, b in zip(tensors, offsets[:-1], offsets[1:], strict=True)]
    before = [
        number[order] for number, order in zip([n.reshape(-1) for n in numbers], map(viewed, tensors), strict=True)
    ]
    found = list(_by_dimensions(numbers))
    if [n.shape for n in before] != [n.shape for n in numbers]:
        found.extend(_by_dimensions(before))
    yield from sorted(found, key=lambda index: index.shape[1])


def _by_dimensions(numbers: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the entries with these numbers grouped by some of the dimensions, `(samples, columns)`."""
    sizes = dict(enumerate(numbers[0].shape)) if len({n.shape for n in numbers}) == 1 else {}
    if not sizes and len({n.shape[:1] for n in numbers}) == 1 and numbers[0].dim():
        numbers, sizes = [n.reshape(len(n), -1) for n in numbers], {0: numbers[0].shape[0]}
    dims = [dim for dim, size in sizes.items() if size > 1]
    for count in range(len(dims) + 1):
        for kept in itertools.combinations(dims, count):
            samples = math.prod(sizes[dim] for dim in kept)
            moved = [n.movedim(kept, tuple(range(len(kept)))).reshape(samples, -1) for n in numbers]
            yield torch.cat(moved, 1)
