"""From a loss back to the convex functions of outputs that it is a sum of.

The tap labels the nodes in which a recognised loss or a square ends. A loss that is a sum of those, each with a weight
that is not negative and does not depend on the outputs, has a positive semi-definite Gauss-Newton matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import TensorWeakRef

from newtonopt._graph import all_behind, chained, first_met, notes, reached

# The names under which nodes carry notes, which live as long as the graph.
_LABEL = "newtonopt: convex in these outputs"
_ROOT = "newtonopt: root of a sum of squares"

# Operations that give some entries of their operand, in another order or another dtype.
SELECTIONS = frozenset(
    {
        *("Alias", "Clone", "Conj", "Copy", "Expand", "Gather", "Index", "IndexSelect", "MaskedSelect", "Permute"),
        *("Repeat", "ReshapeAlias", "Roll", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "Take"),
        *("ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View", "ViewAsComplex"),
        *("ViewAsReal", "Flip"),
    }
)
# Operations that are linear in all of their operands.
LINEAR = SELECTIONS | {
    *("AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "AsStrided", "AvgPool2D", "AvgPool3D"),
    *("Cat", "ConstantPadNd", "Cumsum", "Diag", "Diagonal", "IndexAdd", "IndexCopy", "IndexFill", "IndexPut"),
    *("MaskedFill", "MaskedScatter", "Mean", "Nansum", "Neg", "Rsub", "Scatter", "ScatterAdd", "SelectScatter"),
    *("SliceScatter", "Stack", "Sub", "Sum", "Trace", "Tril", "Triu", "Unfold", "Where"),
}
# Operations that are linear in each of their first two operands; a quotient only in the first.
_BILINEAR = frozenset({"Mul", "Dot", "Mv", "Mm", "Bmm"})
_QUOTIENT = "Div"


class Root(NamedTuple):
    """How an output is squared by way of the root of its sum of squares: `node` computes the root, of squares summed
    over `dims` (None: all; empty: none, for an absolute value), which are kept if `keep`.
    """

    node: Node
    dims: tuple[int, ...] | None
    keep: bool


class Output(NamedTuple):
    """A tensor that a loss is computed from, its number among all that the closure's runs meet, and its root if the
    loss takes the square of that.
    """

    tensor: Tensor
    number: int
    root: Root | None = None


@dataclass(eq=False)
class Label:
    """The outputs in which the function that a node computes is convex.

    Attributes:
        outputs: The outputs; none once the graph was let go.
        is_square: Whether the function is a square written by hand.
        diagonal: Whether only the diagonal of the result is convex, as for `d.T @ d`.
        sequence: The node's number among all nodes.
    """

    outputs: tuple[Output, ...]
    is_square: bool = False
    diagonal: bool = False
    sequence: int = -1

    def output_at(self, result: Tensor) -> Output:
        """Return the output of the square or root that computed `result`."""
        return self.outputs[0]

    def attach(self, result: Any) -> None:
        """Note at the node that computed `result` what it is convex in."""
        if isinstance(result, Tensor) and result.grad_fn is not None:
            self.sequence = result.grad_fn._sequence_nr()
            notes(result.grad_fn)[_LABEL] = self


@dataclass(eq=False)
class RootLabel(Label):
    """The output that the node computes a root of, and the root itself as it was then."""

    dims: tuple[int, ...] | None = None
    keep: bool = False
    result: Any = None
    version: int = 0

    def output_at(self, result: Tensor) -> Output:
        """Return the output of the square or root that computed `result`."""
        assert result.grad_fn is not None
        return self.outputs[0]._replace(root=Root(result.grad_fn, self.dims, self.keep))

    def attach(self, result: Any) -> None:
        """Note at the node that computed `result` that it is a root, and of what."""
        self.sequence, self.version = result.grad_fn._sequence_nr(), result._version
        self.result = TensorWeakRef(result)
        notes(result.grad_fn)[_ROOT] = self


@dataclass(frozen=True)
class Found:
    """The summands of a loss.

    Attributes:
        outputs: The outputs of squares written by hand.
        convex: The numbers of the outputs that the loss is a convex function of.
        stops: The other nodes that the loss is computed from, through linear operations alone.
        linear: The numbers of the marked outputs that the loss is linear in.
    """

    outputs: list[Output] = field(default_factory=list)
    convex: set[int] = field(default_factory=set)
    stops: list[Node] = field(default_factory=list)
    linear: set[int] = field(default_factory=set)


def kind_of(node: Node) -> str:
    """Return torch's name for the operation of a node; empty for a custom Function, whose name could be any."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return "Copy" if node.name() == "torch::autograd::CopyBackwards" else match[1] if match else ""


def find(loss: Tensor, params: Sequence[Tensor], marked: Sequence[Output], recognised: Sequence[Output]) -> Found:
    """Find the recognised losses and squares that a live loss is a sum of, with weights that are not negative.

    A function that enters in another way too, or whose weight depends on a parameter that the function depends on, is
    left out; so is a square that is computed from another output, or another output from it.

    Args:
        loss: A live scalar.
        params: The parameters.
        marked: The outputs that the user marked.
        recognised: The outputs recorded already as arguments of recognised losses.
    """
    known = [*marked, *recognised]
    marks = {z.tensor.grad_fn: z.number for z in marked if z.tensor.grad_fn is not None}
    parts, others, ends = _summands(loss.grad_fn, {id(p) for p in params}, set(marks))
    curved = reached([*parts, *others], ends) if ends else set()
    outputs = {node: _outputs_of(label) for node, label in parts.items()}
    entered = reached(others, {z.tensor.grad_fn for found in outputs.values() for z in found}) if others else set()
    edges = [GradientEdge(node, 0) for node in parts]
    weights = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) if edges else ()
    refused: set[int] = set()
    for (node, label), w in zip(parts.items(), weights, strict=True):
        if w is not None and not _is_weight(w, label):
            refused.update(z.number for z in outputs[node])
    refused.update(z.number for found in outputs.values() for z in found if z.tensor.grad_fn in entered)
    convex = {z.number for found in outputs.values() for z in found} - refused
    recorded = {z.number for z in known}
    squares = {z.number: z for node, label in parts.items() if label.is_square for z in outputs[node]}
    new = [z for number, z in squares.items() if number in convex - recorded]
    if new and len(new) + len(known) > 1:
        # A derivative by an output and by what that is computed from would count twice.
        behind, before = chained(z.tensor.grad_fn for z in (*known, *new))
        new = [z for z in new if z.tensor.grad_fn not in behind | before]
    return Found(new, convex, others, {marks[node] for node in ends - curved})


def apart(marked: Sequence[Output], recognised: Sequence[Output], loss: Tensor) -> tuple[list[Output], set[int]]:
    """Choose among the outputs met those that a loss is a function of, so that no curvature counts twice.

    A recognised loss that is fed from marked outputs adds none of its own. Where one output is computed from another,
    the outer one counts if the loss depends on the inner one through it alone, as where cross-entropy is taken of the
    distances that `mse_loss` gives. Otherwise the inner one counts, and what the outer one adds is in its Hessian.

    Args:
        marked: The outputs that the user marked.
        recognised: The outputs that are arguments of recognised losses or squares.
        loss: A live scalar.

    Returns:
        The outputs, and the numbers of those that the loss need not be convex in.
    """
    chosen, within = _front(list(marked), loss)
    marks = {z.tensor.grad_fn for z in chosen}
    # A mark was made on purpose: it stands before what it is computed from too.
    own = [z for z in recognised if not (marks and reached(z.tensor.grad_fn, marks))]
    behind = reached(marks, {z.tensor.grad_fn for z in own}) if marks else set()
    own, nested = _front([z for z in own if z.tensor.grad_fn not in behind], loss)
    return [*chosen, *own], within | nested


def _front(outputs: list[Output], loss: Tensor) -> tuple[list[Output], set[int]]:
    """Return the outputs, none of which is computed from another, and the numbers of those that others were."""
    within: set[int] = set()
    while outputs:
        nodes = {z.tensor.grad_fn for z in outputs if z.tensor.grad_fn is not None}
        met = first_met(loss.grad_fn, nodes)
        outputs = [z for z in outputs if z.tensor.grad_fn in met]
        inner, outer = chained(met) if len(met) > 1 else (set(), set())
        if not outer:
            break
        within |= {z.number for z in outputs if z.tensor.grad_fn in inner}
        outputs = [z for z in outputs if z.tensor.grad_fn not in outer]
    return outputs, within


def _summands(
    start: Node | None, params: set[int], marks: set[Node]
) -> tuple[dict[Node, Label], list[Node], set[Node]]:
    """Labelled nodes met through linear operations alone, the other nodes met so, factors that weigh included, and the
    marks met so.
    """
    labels, consumers = _labels_in_reach(start)
    holding = set(labels)
    waiting = list(labels)
    while waiting:
        for consumer in consumers.get(waiting.pop(), ()):
            if consumer not in holding:
                holding.add(consumer)
                waiting.append(consumer)
    refused: set[Node] = set()
    while True:
        parts, stops, weights, ends = _walk(start, labels, holding, refused, params, marks)
        dependent = _dependent(weights, parts, params)
        if not dependent:
            return parts, [*stops, *weights.values()], ends
        refused |= dependent


def _labels_in_reach(start: Node | None) -> tuple[dict[Node, Label], dict[Node, list[Node]]]:
    """Labelled nodes met through operations that are linear in an operand, and who consumes each node on the way."""
    labels: dict[Node, Label] = {}
    consumers: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        label = notes(node).get(_LABEL)
        if label is not None:
            labels[node] = label
        elif (kind := kind_of(node)) in LINEAR or kind in _BILINEAR or kind == _QUOTIENT:
            for operand, _ in node.next_functions:
                if operand is not None:
                    consumers.setdefault(operand, []).append(node)
                    waiting.append(operand)
    return labels, consumers


def _walk(
    start: Node | None,
    labels: dict[Node, Label],
    holding: set[Node],
    refused: set[Node],
    params: set[int],
    marks: set[Node],
) -> tuple[dict[Node, Label], list[Node], dict[Node, Node], set[Node]]:
    """Labelled nodes met, nodes where the walk could not go on, by product the factor that is a weight, and marks."""
    parts: dict[Node, Label] = {}
    stops: list[Node] = []
    weights: dict[Node, Node] = {}
    ends: set[Node] = set()
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in marks:
            ends.add(node)
            continue
        operands = [operand for operand, _ in node.next_functions]
        kind = kind_of(node)
        if node in labels:
            parts[node] = labels[node]
        elif kind in LINEAR:
            waiting.extend(operands)
        elif (kind in _BILINEAR or kind == _QUOTIENT) and node not in refused:
            live = [i for i, operand in enumerate(operands[:2]) if operand is not None]
            factors = live if len(live) == 1 else [i for i in live if operands[i] in holding]
            if len(factors) > 1:
                # One may be a square of the data alone.
                factors = [i for i in factors if _leaves([operands[i]], params)]
            if len(factors) != 1 or (kind == _QUOTIENT and factors != [0]):
                stops.append(node)
                continue
            waiting.append(operands[factors[0]])
            weight = operands[1 - factors[0]] if len(operands) > 1 else None
            if weight is not None:
                weights[node] = weight
        elif not hasattr(node, "variable"):
            stops.append(node)
    return parts, stops, weights, ends


def _dependent(weights: dict[Node, Node], parts: Iterable[Node], params: set[int]) -> set[Node]:
    """The products whose weight depends on a parameter that one of the parts depends on."""
    if not weights or not (leaves := _leaves(parts, params)) & _leaves(weights.values(), params):
        return set()
    return {product for product, weight in weights.items() if leaves & _leaves([weight], params)}


def _leaves(start: Iterable[Node | None], params: set[int]) -> set[int]:
    found = {id(getattr(node, "variable", None)) for node in all_behind(start)}
    return found & params


def _outputs_of(label: Label) -> tuple[Output, ...]:
    """The outputs of a label: for the square of a root, possibly scaled, what the root is of."""
    if not label.is_square or not label.outputs:
        return label.outputs
    view = label.outputs[0].tensor
    node, copied = view.grad_fn, False
    while node is not None:
        root: RootLabel | None = notes(node).get(_ROOT)
        if root is not None and root.outputs:
            # Changed in place since, unseen by autograd?
            then = root.result() if copied else view
            if then is not None and then._version != root.version:
                return label.outputs
            z = root.outputs[0]
            return (Output(z.tensor, z.number, Root(node, root.dims, root.keep)),)
        operands = [operand for operand, _ in node.next_functions]
        kind = kind_of(node)
        scales = kind in ("Mul", "Div", "Neg") and operands[0] is not None and operands[1:] in ([], [None])
        if not scales and kind not in SELECTIONS:
            break
        copied = copied or scales or kind in ("ToCopy", "Clone")
        node = operands[0]
    return label.outputs


def _is_weight(w: Tensor, label: Label) -> bool:
    """Whether no entry is negative, and none besides the diagonal where only that holds squares."""
    if label.diagonal:
        diagonal = w.diagonal(dim1=-2, dim2=-1)
        if bool((w - torch.diag_embed(diagonal)).any()):
            return False
        w = diagonal
    if w.is_complex():
        return not bool((w.imag != 0).any() or (w.real < 0).any())
    return not bool((w < 0).any())
