"""Routes from an operand to the parameters that it is a function of.

An operand of a layer is a parameter itself, a view of one (a transpose), or a function of parameters alone (a mask, a
weight norm). Rows at the operand are put in the parameter's order, or pulled back through the function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.gradients import grad
from newtonopt.autodiff.graph import behind, kind_of
from newtonopt.autodiff.samples import Edge


def leaves_of(params: Sequence[Tensor]) -> dict[Node, int]:
    """Return the number of each parameter by its node, at which its gradient is accumulated."""
    return {torch.autograd.graph.get_gradient_edge(p).node: number for number, p in enumerate(params)}


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


def route_to(target: Edge, leaves: Mapping[Node, int]) -> Route | None:
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


def pulled_back(target: Edge, rows: Tensor, leaves: Mapping[Node, int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers of the parameters behind an operand and the rows pulled back to them, `(rows, size)`."""
    node, number = target
    of = node._input_metadata[number]
    met = [leaf for leaf in behind(node) if leaf in leaves]
    start: Any = GradientEdge(node, number)
    ends: Any = [GradientEdge(leaf, 0) for leaf in met]
    along = [rows.view(len(rows), *of.shape).to(of.dtype)]
    try:
        found = grad([start], ends, along, keep=True, batched=True)
    except Exception:  # an operation allows no batches, or the error comes again
        singly = [grad([start], ends, [row], keep=True) for row in along[0]]
        columns = [[g for g in column if g is not None] for column in zip(*singly, strict=True)]
        found = tuple(torch.stack(column) if column else None for column in columns)
    for leaf, g in zip(met, found, strict=True):
        if g is not None:
            yield leaves[leaf], g.reshape(len(rows), -1)
