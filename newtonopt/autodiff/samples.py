"""Samples of a gradient: which sample of an output each entry of a gradient inside its graph belongs to.

The outputs' entries are grouped into samples. A gradient is linear in the cotangent, and multiplying by a power of two
does not round. So the graph is differentiated along random weights, and again along these times `2^digit` of each
sample's number: an entry that belongs to one sample comes out multiplied by that power, and the exponents spell its
number. An entry to which several samples contribute comes out as something else, and is a *mixture*.

A walk from the outputs then finds where the samples end. A `Use` is an operation whose result has entries of single
samples while one of its operands is a mixture: a layer and its weight, or a layer and the batch's mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.gradients import Gradients, grad
from newtonopt.autodiff.graph import ahead, behind, consumers_behind

# A node, and the number of one of its results.
Edge = tuple[Node, int]


@dataclass(frozen=True, eq=False)
class Samples:
    """Outputs whose entries are grouped into samples.

    Attributes:
        outputs: The outputs, with their graph.
        index: `(samples, columns)`: numbers of each sample's entries among those of all outputs, flattened and joined.
    """

    outputs: tuple[Tensor, ...]
    index: Tensor

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.index.shape[0]

    @property
    def columns(self) -> int:
        """Number of entries of a sample."""
        return self.index.shape[1]

    @cached_property
    def weights(self) -> Tensor:
        """Random weights along which samples are told apart, `(samples, columns)`, of either sign, from 1 to 2.

        Along ones a sum over samples could be a power of two, and look like an entry of one sample.
        """
        coarsest = max((z.dtype for z in self.outputs), key=lambda dtype: torch.finfo(dtype).eps)
        dtype = torch.float64 if coarsest == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(self.index.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
        signed = drawn + torch.copysign(torch.ones_like(drawn), drawn)
        # As the outputs' cotangents will be rounded.
        return signed.to(coarsest).to(dtype).to(self.index.device)

    def cotangents(self, values: Tensor) -> list[Tensor]:
        """Return values `(samples, columns)` as one tensor for each output."""
        flat = values.new_empty(self.index.numel())
        flat[self.index.reshape(-1)] = values.reshape(-1)
        pieces = flat.split([z.numel() for z in self.outputs])
        return [piece.view(z.shape).to(z.dtype) for piece, z in zip(pieces, self.outputs, strict=True)]

    def gradients(self, values: Tensor, edges: Sequence[GradientEdge]) -> Gradients:
        """Return the gradients at these edges along values `(samples, columns)`; None where there is none."""
        by: Any = edges
        with _deterministic_convolutions():
            return grad(self.outputs, by, self.cotangents(values), keep=True)


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """Let cuDNN add in the same order each time, for entries are compared bit by bit."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@dataclass(frozen=True, eq=False)
class Labelled:
    """A gradient with the number of the sample that each entry belongs to.

    Attributes:
        gradient: The gradient along the samples' weights.
        samples: Numbers of the samples, shaped as the gradient; -1 where the gradient is zero or nearly underflows.
    """

    gradient: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """An operation that hands entries of single samples to an operand that is a mixture.

    Attributes:
        node: The operation's node.
        slot: Number of the operand.
        target: The operand's own node, and the number of its result.
        results: The gradients of the operation's results; None where there is none.
    """

    node: Node
    slot: int
    target: Edge
    results: tuple[Labelled | None, ...]

    @property
    def edges(self) -> list[GradientEdge]:
        """The operation's results."""
        return [GradientEdge(self.node, number) for number in range(len(self.results))]


def labels_at(samples: Samples, edges: Sequence[Edge]) -> list[Labelled | None]:
    """Return the gradients at these edges with their samples' numbers; None where there is a mixture.

    The gradients are taken along `samples.weights`.
    """
    if not edges:
        return []
    weights, by = samples.weights, [GradientEdge(*edge) for edge in edges]
    base = samples.gradients(weights, by)
    radix, digits = _radix(samples)
    numbers = torch.arange(samples.count, device=weights.device)
    found: list[Tensor | None] = [None if g is None else torch.zeros_like(g, dtype=torch.long) for g in base]
    for digit in range(digits):
        # Exponents around zero leave the most room on both sides.
        exponents = numbers // radix**digit % radix - radix // 2
        scaled = samples.gradients(torch.ldexp(weights, exponents[:, None]), by)
        for i, (one, two, label) in enumerate(zip(base, scaled, found, strict=True)):
            if one is not None and label is not None:
                exponent = None if two is None else _digits(one, two, radix)
                found[i] = None if exponent is None else label.add_(exponent, alpha=radix**digit)
    return [
        _nothing(edge)
        if g is None
        else None
        if label is None or bool((label >= samples.count).any())
        else Labelled(g, label.masked_fill_(g.abs() <= _least(g.dtype, radix), -1))
        for edge, g, label in zip(edges, base, found, strict=True)
    ]


def _nothing(edge: Edge) -> Labelled:
    """Return a zero gradient, for an edge to which an operation hands none."""
    of = edge[0]._input_metadata[edge[1]]
    zeros = torch.zeros((), dtype=of.dtype, device=of.device).expand(of.shape)
    return Labelled(zeros, torch.full((), -1, device=of.device).expand(of.shape))


def _radix(samples: Samples) -> tuple[int, int]:
    """Return how many exponents a pass may use, and the number of passes that number the samples."""
    nodes = behind([z.grad_fn for z in samples.outputs])
    dtypes = {of.dtype for node in nodes for of in node._input_metadata if of.dtype.is_floating_point}
    most = min((_EXPONENTS.get(dtype, 61) for dtype in dtypes), default=61)
    count = samples.count
    digits = max(0, math.ceil(math.log(count) / math.log(most) - 1e-9))
    radix = math.ceil(count ** (1 / digits) - 1e-9) if digits else 1
    return radix if radix**digits >= count else radix + 1, digits


# Exponents in a pass, by the coarsest dtype in the graph: half of its range or less.
_EXPONENTS = {torch.float64: 1001, torch.float16: 9}


def _digits(one: Tensor, two: Tensor, radix: int) -> Tensor | None:
    """Return `log2(two / one)` plus half the radix, zero where both are zero; None if an entry is a mixture."""
    if one.is_complex():
        real, imaginary = (_digits(a, b, radix) for a, b in ((one.real, two.real), (one.imag, two.imag)))
        if real is None or imaginary is None:
            return None
        both = (one.real != 0) & (one.imag != 0)
        if bool((both & (real != imaginary)).any()):
            return None
        return torch.where(one.real != 0, real, imaginary)
    least = _least(one.dtype, radix)
    exponent = _exponents(one, two, least)
    if exponent is None:
        return None
    digit = (exponent + radix // 2).masked_fill_(one.abs() <= least, 0)
    return digit if bool(((digit >= 0) & (digit < radix)).all()) else None


def _least(dtype: torch.dtype, radix: int) -> float:
    """Return the size up to which a number is taken for zero, for times the smallest power it is no normal number."""
    return torch.finfo(dtype).tiny * 2.0 ** (radix // 2) if radix > 1 else 0.0


def _exponents(one: Tensor, two: Tensor, least: float) -> Tensor | None:
    """Return `log2(two / one)`, anything where `one` is below `least`, which underflows; None if one is no integer."""
    kind, bits = _INTEGERS[one.dtype]
    if one.is_contiguous() and two.is_contiguous():
        # The exponent stands above the mantissa in a number's bits, and mantissas are equal.
        difference = two.view(kind) - one.view(kind)
        exponent = difference >> bits
        if torch.equal(exponent << bits, difference):
            return exponent.long()
    # Kernels that add in another order the second time round differently.
    small = one.abs() <= least
    ratio = torch.where(small, 1.0, two / one).to(torch.float64)
    exponent = torch.frexp(ratio * (1 + 1e-3))[1].long() - 1
    close = (torch.ldexp(ratio, -exponent) - 1).abs() <= min(_ORDER * torch.finfo(one.dtype).eps, _COARSEST)
    return exponent if bool(close.all()) else None


# Integers of the size of a number, and the bits of its mantissa.
_INTEGERS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
}
# How many rounding units a sum may differ by that was added in another order, and the most that this may be.
_ORDER, _COARSEST = 256, 0.01


# Where the samples end.


def uses_of(samples: Samples, leaves: Sequence[Node]) -> list[Use]:
    """Return the uses through which these leaves, the parameters' nodes, enter the outputs."""
    goals = set(leaves)
    starts = [_edge_of(z) for z in samples.outputs]
    live = _leading_to([node for node, _ in starts], goals)
    edges = dict.fromkeys(edge for edge in starts if edge[0] in live)
    edges.update(dict.fromkeys((n, i) for node in live for n, i in node.next_functions if n is not None and n in live))
    labelled = dict(zip(edges, labels_at(samples, list(edges)), strict=True))
    # Whatever is behind a mixture enters through it as a whole.
    mixed = set(behind({node for (node, _), found in labelled.items() if found is None})) & live
    uses: list[Use] = []
    waiting = list(dict.fromkeys(node for node, _ in starts if node in live))
    seen = set(waiting)

    def use(node: Node, slot: int, target: Edge) -> Use:
        results = tuple(labelled.get((node, number)) for number in range(len(node._input_metadata)))
        return Use(node, slot, target, results)

    while waiting:
        node = waiting.pop()
        if node in goals:
            uses.append(use(node, 0, (node, 0)))
        for slot, (following, number) in enumerate(node.next_functions):
            if following in mixed:
                uses.append(use(node, slot, (following, number)))
            elif following in live and following not in seen:
                seen.add(following)
                waiting.append(following)
    return uses


def _edge_of(z: Tensor) -> Edge:
    assert z.grad_fn is not None  # outputs have a graph
    return z.grad_fn, z.output_nr


def _leading_to(starts: Sequence[Node], goals: set[Node]) -> set[Node]:
    """Return the nodes behind `starts` from which one of the goals is reached, themselves included."""
    consumers = consumers_behind(starts)
    met = {goal for goal in goals if goal in consumers or goal in starts}
    return met | ahead(met, consumers)
