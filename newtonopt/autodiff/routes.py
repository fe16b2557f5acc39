"""Routes from an operand to the parameters that it is a function of.

An operand of a layer is a parameter itself, a view of one (a transpose), or a function of parameters alone (a mask, a
weight norm). Rows at the operand are put in the parameter's order, or pulled back through the function.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.gradients import grad
from newtonopt.autodiff.graph import behind, bytes_handed_on, kind_of
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
    passed = _views_before(target[0], leaves)
    if passed is None:
        return None
    node = passed[-1].next_functions[0][0] if passed else target[0]
    assert node is not None
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


def _views_before(start: Node, leaves: Container[Node]) -> list[Node] | None:
    """Return the views through which an operand shows one of the leaves; None if it is no view of one."""
    node: Node | None = start
    passed: list[Node] = []
    while node is not None and node not in leaves:
        if kind_of(node) not in _VIEWS or len(node.next_functions) != 1:
            return None
        passed.append(node)
        node = node.next_functions[0][0]
    return None if node is None else passed


def viewed(z: Tensor) -> Tensor:
    """Return the numbers of a tensor's entries, arranged as in the tensor that it is a view of."""
    node: Any = z.grad_fn
    numbers = torch.arange(z.numel(), dtype=torch.float64, device=z.device).view(z.shape)
    while node is not None and kind_of(node) in _VIEWS and len(node.next_functions) == 1:
        numbers, node = node(numbers), node.next_functions[0][0]
    return numbers.long()


def cost_behind(target: Edge, leaves: Container[Node]) -> int:
    """Return the bytes of the gradients in a pass from an operand back to the parameters; zero for views of one."""
    return 0 if _views_before(target[0], leaves) is not None else bytes_handed_on([target[0]])


def _device_of(leaf: Any) -> torch.device:
    device: torch.device = leaf.variable.device
    return device


# A clone is a view as far as numbers go.
_VIEWS = frozenset(
    {"Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze", "View"}
)


def pulled_back(target: Edge, rows: Tensor, leaves: Mapping[Node, int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers of the parameters behind an operand and the rows pulled back to them, `(rows, size)`."""
    node, number = target
    of = node._input_metadata[number]
    met = [leaf for leaf in behind(node) if leaf in leaves]
    start: Any = GradientEdge(node, number)
    ends: Any = [GradientEdge(leaf, 0) for leaf in met]
    parts = []
    for some in rows.split(max(1, _BATCH_BYTES // max(1, bytes_handed_on([node])))):
        along = some.view(len(some), *of.shape).to(of.dtype)
        try:
            parts.append(grad([start], ends, [along], keep=True, batched=True))
        except Exception:  # an operation allows no batches, or the error comes again
            singly = [grad([start], ends, [row], keep=True) for row in along]
            parts.append(tuple(_stacked(column) for column in zip(*singly, strict=True)))
    for leaf, pieces in zip(met, zip(*parts, strict=True), strict=True):
        if all(piece is not None for piece in pieces):
            yield leaves[leaf], torch.cat([piece for piece in pieces if piece is not None]).reshape(len(rows), -1)


def _stacked(gradients: Sequence[Tensor | None]) -> Tensor | None:
    like = next((g for g in gradients if g is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if g is None else g for g in gradients])


# Bytes that the gradients of a batch of rows may take.
_BATCH_BYTES = 2**27
