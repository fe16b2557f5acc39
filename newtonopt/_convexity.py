"""From a loss back to the convex functions of outputs that it is a sum of.

The tap labels the nodes in which a recognised loss or a square ends. A loss that is a sum of those, each with a weight
that is not negative and does not depend on the outputs, has a positive semi-definite Gauss-Newton matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt._graph import all_behind, notes, reached, reaches

# The label hangs on the node itself, so that it lives as long as the graph and no longer.
_LABEL = "newtonopt: convex in these outputs"

# Operations that are linear in all of their operands.
_LINEAR = frozenset(
    {
        "AdaptiveAvgPool1D",
        "AdaptiveAvgPool2D",
        "AdaptiveAvgPool3D",
        "Add",
        "Alias",
        "AsStrided",
        "AvgPool2D",
        "AvgPool3D",
        "Cat",
        "Clone",
        "Conj",
        "ConstantPadNd",
        "Cumsum",
        "Diag",
        "Diagonal",
        "Expand",
        "Flip",
        "Gather",
        "Index",
        "IndexAdd",
        "IndexCopy",
        "IndexFill",
        "IndexPut",
        "IndexSelect",
        "MaskedFill",
        "MaskedScatter",
        "MaskedSelect",
        "Mean",
        "Nansum",
        "Neg",
        "Permute",
        "Repeat",
        "ReshapeAlias",
        "Roll",
        "Rsub",
        "Scatter",
        "ScatterAdd",
        "Select",
        "SelectScatter",
        "Slice",
        "SliceScatter",
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "Stack",
        "Sub",
        "Sum",
        "T",
        "Take",
        "ToCopy",
        "Trace",
        "Transpose",
        "Tril",
        "Triu",
        "Unbind",
        "Unfold",
        "UnsafeSplit",
        "UnsafeView",
        "Unsqueeze",
        "View",
        "ViewAsComplex",
        "ViewAsReal",
        "Where",
    }
)
_LINEAR_BY_NAME = frozenset({"torch::autograd::CopySlices", "torch::autograd::CopyBackwards"})
# Operations that are linear in each of their first two operands.
_BILINEAR = frozenset({"Mul", "Dot", "Mv", "Mm", "Bmm"})


class Output(NamedTuple):
    """A tensor that a loss is computed from, and its number among all that the closure's run met."""

    tensor: Tensor
    number: int


@dataclass(frozen=True)
class Label:
    """The outputs in which the function that a node computes is convex.

    Attributes:
        outputs: The outputs.
        is_square: Whether the function is a square written by hand.
        diagonal: Whether only the diagonal of the result is convex, as for `d.T @ d`.
    """

    outputs: tuple[Output, ...]
    is_square: bool = False
    diagonal: bool = False


def labelled(result: Any, label: Label) -> Any:
    """Label the node that computed `result`, and return `result`."""
    if isinstance(result, Tensor) and result.grad_fn is not None:
        notes(result.grad_fn)[_LABEL] = label
    return result


def convex_parts(loss: Tensor) -> list[Label]:
    """Return the labels of the functions that a live loss is a sum of, with weights that are not negative.

    A function that enters in another way too, or whose weight depends on its outputs, is left out.
    """
    parts, stops = _summands(loss.grad_fn)
    others = reached(stops, {node for node, _ in parts}) if parts and stops else set()
    parts = [(node, label) for node, label in parts if node not in others]
    if not parts:
        return []
    edges = [GradientEdge(node, 0) for node, _ in parts]
    weights = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    return [label for (_, label), w in zip(parts, weights, strict=True) if w is not None and _is_weight(w, label)]


def _summands(start: Node | None) -> tuple[list[tuple[Node, Label]], list[Node]]:
    """Labelled nodes met through linear operations alone, and the nodes where the walk could not go on."""
    parts: list[tuple[Node, Label]] = []
    stops: list[Node] = []
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = _kind(node)
        label = notes(node).get(_LABEL)
        operands = [following for following, _ in node.next_functions]
        if label is not None:
            parts.append((node, label))
        elif kind in _LINEAR or node.name() in _LINEAR_BY_NAME:
            waiting.extend(operands)
        elif kind in _BILINEAR or kind == "Div":
            weighted, rest = _weighted([*operands, None], is_quotient=kind == "Div")
            parts.extend(weighted)
            stops.extend(rest if weighted else [node])
        elif not hasattr(node, "variable"):
            stops.append(node)
    return parts, stops


def _kind(node: Node) -> str:
    """Torch's name for the operation; empty for a custom Function, whose name could be any."""
    match = re.fullmatch(r"(\w+)Backward\d+", node.name())
    return match[1] if match else ""


def _weighted(operands: Sequence[Node | None], *, is_quotient: bool) -> tuple[list[tuple[Node, Label]], list[Node]]:
    """The summands of one factor; none if the other one, its weight, depends on their outputs."""
    factor, weight = operands[:2]
    parts, stops = _summands(factor)
    if not parts and not is_quotient:
        factor, weight = weight, factor
        parts, stops = _summands(factor)
    if weight is None or not parts:
        return parts, stops
    behind = all_behind(node for node, _ in parts)
    # Met in a parameter, too: the model may have run once more for the weight.
    return ([], []) if reaches(weight, behind.__contains__) else (parts, [*stops, weight])


def _is_weight(w: Tensor, label: Label) -> bool:
    """Whether no entry is negative, and none besides the diagonal where only that holds squares."""
    if label.diagonal:
        w = w.to_dense()
        diagonal = w.diagonal(dim1=-2, dim2=-1)
        if bool((w - torch.diag_embed(diagonal)).any()):
            return False
        w = diagonal
    if w.is_complex():
        return not bool((w.imag != 0).any() or (w.real < 0).any())
    return not bool((w < 0).any())
