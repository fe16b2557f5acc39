"""What is known of the losses in `torch.nn.functional`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import TensorWeakRef

from newtonopt.autodiff.graph import all_behind, chained, first_met, notes, reached
from newtonopt.vectors.subclasses import alike, is_wrapper, plain

# The losses whose second derivative with respect to these positional arguments is positive semi-definite, so that they
# define a Gauss-Newton matrix. A difference loss is convex in both of its arguments together; elsewhere a target that
# needs gradients counts as constant.
CONVEX_LOSSES: dict[Callable[..., Any], tuple[int, ...]] = {
    F.cross_entropy: (0,),
    F.binary_cross_entropy_with_logits: (0,),
    F.binary_cross_entropy: (0,),
    F.soft_margin_loss: (0,),
    F.multilabel_soft_margin_loss: (0,),
    F.poisson_nll_loss: (0,),
    F.mse_loss: (0, 1),
    F.huber_loss: (0, 1),
    F.smooth_l1_loss: (0, 1),
}
# Linear in the log-probabilities they are given: convex, with curvature, only in the logits in front of `log_softmax`.
LOG_PROBABILITY_LOSSES = frozenset({F.nll_loss, F.kl_div})


def mean_over(loss: Callable[..., Any], given: dict[str, Any]) -> Tensor | float | None:
    """What a loss of `torch.nn.functional` divides its sum by; None if it does not."""
    if given.get("reduction", "mean") not in ("mean", "batchmean"):
        return None
    z, target = given["input"], given["target"]
    if given.get("reduction") == "batchmean":
        return float(z.shape[0])
    if loss in (F.cross_entropy, F.nll_loss) and not target.is_floating_point():
        counted = target != given.get("ignore_index", -100)
        weight = given.get("weight")
        total: Tensor = counted.sum() if weight is None else (weight[target.clamp(min=0)] * counted).sum()
        return total
    return float(z.numel())


def is_convex(loss: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether a call of a recognised loss is convex, as it is unless weights or targets are negative.

    Args:
        loss: A function of `CONVEX_LOSSES` or `LOG_PROBABILITY_LOSSES`.
        given: Its arguments, by name.
    """
    weight, target = given.get("weight"), given["target"]
    if _is_negative(weight):
        return False
    if loss is F.binary_cross_entropy_with_logits and given.get("pos_weight") is not None:
        # The second derivative is the logistic function's slope times this.
        return not _is_negative(1 + (given["pos_weight"] - 1) * target)
    if loss is F.cross_entropy and target.is_floating_point():
        # The second derivative is the softmax's covariance times this.
        by_class = target.movedim(min(1, target.dim() - 1), -1)
        return not _is_negative((by_class if weight is None else by_class * weight).sum(-1))
    if loss is F.poisson_nll_loss and not given.get("log_input", True):
        return not _is_negative(target)
    return True


def _is_negative(t: Any) -> bool:
    return isinstance(t, Tensor) and bool((t.detach() < 0).any())


# From a loss back to the convex functions of outputs that it is a sum of.
#
# The tap labels the nodes in which a recognised loss or a square ends. A loss that is a sum of those, each with a
# weight
# that is not negative and does not depend on the outputs, has a positive semi-definite Gauss-Newton matrix.


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


# Squares written by hand: which calls square a tensor, as in `((z - y) ** 2).mean()` or `(z - y).norm() ** 2`.
#
# A square of residuals that enters the loss with a weight defines a Gauss-Newton matrix as `mse_loss` does. The tap
# asks
# here at each call; `_convexity` finds out later which of the squares enter the loss in that way.


_Functions = frozenset[Callable[..., Any]]

# What torch calls the first operand, and the second.
_FIRST = ("input", "self", "a", "x")
_SECOND = ("exponent", "other", "mat2", "tensor", "b", "y")

_UNARY: _Functions = frozenset({torch.square, Tensor.square})
_POWERS: _Functions = frozenset({torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power})
_PRODUCTS: _Functions = frozenset(
    {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
)
_INNER_PRODUCTS: _Functions = frozenset({torch.dot, Tensor.dot, torch.inner, Tensor.inner})
# The first operand is conjugated.
_HERMITIAN_PRODUCTS: _Functions = frozenset({torch.vdot, Tensor.vdot, torch.linalg.vecdot})
_MATRIX_PRODUCTS: _Functions = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
)
_CONTRACTIONS: _Functions = frozenset({torch.einsum, torch.tensordot})
SQUARES = _UNARY | _POWERS | _PRODUCTS | _INNER_PRODUCTS | _HERMITIAN_PRODUCTS | _MATRIX_PRODUCTS | _CONTRACTIONS
"""Functions of which some calls square their first operand."""

_DISTANCES: _Functions = frozenset({torch.dist, Tensor.dist, F.pairwise_distance})
ROOTS: _Functions = frozenset(
    {
        torch.norm,
        Tensor.norm,
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.linalg.matrix_norm,
        torch.abs,
        torch.absolute,
        Tensor.abs,
        Tensor.absolute,
        Tensor.__abs__,
        *_DISTANCES,
    }
)
"""Functions of which some calls compute the root of a sum of squares, to be squared again."""


def first_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor that a call of one of `SQUARES` would square."""
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return operands[0] if operands else None
    return args[0] if args else next((kwargs[name] for name in _FIRST if name in kwargs), None)


def square(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int
) -> tuple[Any, Label | None]:
    """Call one of `SQUARES`; where it squares its first operand, on a view that only this call uses.

    Returns:
        The result, and the label for its node; None if the call is no square.
    """
    operand = first_operand(func, args, kwargs)
    if not may_be_output(operand):
        return func(*args, **kwargs), None
    found = _squaring(func, args, kwargs, operand)
    if found is None:
        return func(*args, **kwargs), None
    call, diagonal = found
    view = own_view(operand)
    result = call(_as_given(view, operand))
    return result, Label((Output(view, number),), is_square=True, diagonal=diagonal)


def root(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int
) -> tuple[Any, RootLabel | None]:
    """Call one of `ROOTS`; where it computes the root of a sum of squares, on a view that only this call uses.

    Returns:
        The result, and the label for its node; None if the call is no such root.
    """
    if not may_be_output(first_operand(func, args, kwargs)) or not may_be_output(
        operand := root_operand(func, args, kwargs)
    ):
        return func(*args, **kwargs), None
    view = own_view(operand)
    given = _as_given(view, operand)
    if func in _DISTANCES:
        result, distance = _norm_as_distance(func, args, kwargs, given), func(*args, **kwargs)
        if result is None or not torch.equal(result, distance):
            return distance, None
    elif args:
        result = func(given, *args[1:], **kwargs)
    else:
        result = func(**{name: given if value is operand else value for name, value in kwargs.items()})
    node: Any = plain(result).grad_fn
    kind = kind_of(node)
    power = getattr(node, "_saved_ord", getattr(node, "_saved_p", 2))
    if kind == "Abs":
        return result, RootLabel((Output(view, number),), dims=())
    if kind not in ("LinalgVectorNorm", "Norm") or power not in (None, 2):
        return result, None
    dims = tuple(_signed(dim) for dim in getattr(node, "_saved_dim", None) or ()) or None
    return result, RootLabel((Output(view, number),), dims=dims, keep=bool(getattr(node, "_saved_keepdim", False)))


def _norm_as_distance(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], difference: Tensor
) -> Tensor | None:
    """Return a distance as the norm of a difference; None if it is another norm than the Euclidean one."""
    given = _given_to_distance(func, args, kwargs)
    if given.get("p", 2) != 2:
        return None
    of_rows = func is F.pairwise_distance
    norm: Tensor = torch.linalg.vector_norm(
        difference, dim=-1 if of_rows else None, keepdim=bool(given.get("keepdim", False))
    )
    return norm


def own_view(z: Tensor) -> Tensor:
    """Return a view of `z` with one consumer, of real numbers: two in a last dimension for a complex one."""
    z = plain(z)
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z.view_as(z)


def _as_given(view: Tensor, operand: Tensor) -> Tensor:
    """Return an own view of `operand` as a tensor of the operand's kind."""
    return alike(torch.view_as_complex(view) if operand.is_complex() else view, operand)


def root_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor whose squares a call of one of `ROOTS` sums up; a distance is the norm of a difference."""
    if func not in _DISTANCES:
        return kwargs["A"] if "A" in kwargs else first_operand(func, args, kwargs)
    given = _given_to_distance(func, args, kwargs)
    if func is F.pairwise_distance:
        return given["x1"] - given["x2"] + given.get("eps", 1e-6)
    return given["input"] - given["other"]


def _given_to_distance(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("x1", "x2", "p", "eps", "keepdim") if func is F.pairwise_distance else ("input", "other", "p")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _squaring(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], base: Tensor
) -> tuple[Callable[[Tensor], Any], bool] | None:
    """Return the call as a function of its first operand, and whether only the diagonal of the result holds squares.

    None if the call does not square its first operand.
    """
    if func is torch.einsum:
        return _einsum(args) if not base.is_complex() else None
    if func in _UNARY:
        return (func, False) if not base.is_complex() else None
    other, more = _second_operand(args, kwargs), _further(args, kwargs)
    if func in _POWERS:
        return ((lambda v: func(v, other, **more)), False) if _is_two(other) and not base.is_complex() else None
    if not isinstance(other, Tensor):
        return None
    if base.is_complex() and func not in _HERMITIAN_PRODUCTS:
        squares_modulus = func in _PRODUCTS and _is_conjugate(base, other)
        return ((lambda v: func(v, v.conj(), **more)), False) if squares_modulus else None
    if func in _MATRIX_PRODUCTS and base.dim() > 1:
        return ((lambda v: func(v, v.mT, **more)), True) if other.dim() > 1 and _is_same(base, other.mT) else None
    if func in _INNER_PRODUCTS and base.dim() > 2:
        return None
    if func is torch.tensordot and more.get("dims", 2) != base.dim():
        return None
    if not _is_same(base, other):
        return None
    return (lambda v: func(v, v, **more)), func in _INNER_PRODUCTS and base.dim() > 1


def _second_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else next((kwargs[name] for name in _SECOND if name in kwargs), None)


def _further(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call is given besides its operands; only `tensordot` takes a third one by position."""
    more = {name: value for name, value in kwargs.items() if name not in (*_FIRST, *_SECOND)}
    return {"dims": args[2], **more} if len(args) > 2 else more


def may_be_output(z: Any) -> bool:
    """Whether `z` is a tensor of numbers with a graph: not inside a transform of torch.func, sparse or a wrapper."""
    if not isinstance(z, Tensor) or not torch.is_grad_enabled():
        return False
    z = plain(z)
    dense = z.requires_grad and z.layout == torch.strided and not z.is_nested
    numbers = z.is_floating_point() or z.is_complex()
    return dense and numbers and not is_wrapper(z) and not torch._C._functorch.is_functorch_wrapped_tensor(z)


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _is_two(exponent: Any) -> bool:
    if isinstance(exponent, Tensor):
        plain_number = exponent.dim() == 0 and not torch._C._functorch.is_functorch_wrapped_tensor(exponent)
        return plain_number and not exponent.requires_grad and float(exponent) == 2.0
    return isinstance(exponent, Real) and float(exponent) == 2.0


def _einsum(args: Sequence[Any]) -> tuple[Callable[[Tensor], Any], bool] | None:
    equation, *operands = args
    operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or len(operands) != 2 or not _is_same(operands[0], operands[1]):
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    one, _, other = inputs.partition(",")
    letters = one.replace(".", "")
    # Without an arrow the result has no dimension left where both operands have the same letters.
    if one != other or len(set(letters)) < len(letters) or not set(output) <= set(one):
        return None
    return (lambda v: torch.einsum(equation, v, v)), False


def _is_same(a: Tensor, b: Any) -> bool:
    """Whether `b` holds the elements of `a`: the same tensor, another view of it, or its difference computed again."""
    if a is b:
        return True
    if not isinstance(b, Tensor):
        return False
    a, b = plain(a), plain(b)
    if not b.requires_grad or a.dtype != b.dtype or _layout(a) != _layout(b):
        return False
    first, second = _behind_views(a.grad_fn, a.output_nr), _behind_views(b.grad_fn, b.output_nr)
    if first == second:
        return first[0] is not None and a.data_ptr() == b.data_ptr()
    # Differences from constants, which are equal too. Any other operation may differ elsewhere.
    return _is_repeated(first, second) and torch.equal(a.detach(), b.detach())


def _is_conjugate(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and b.is_conj() != a.is_conj() and _is_same(a, b.conj())


def _layout(z: Tensor) -> tuple[object, ...]:
    """How the entries are read from memory."""
    strides = [stride for stride, size in zip(z.stride(), z.shape, strict=True) if size > 1]
    return z.shape, z.storage_offset(), strides, z.is_conj(), z.is_neg()


def _behind_views(node: Node | None, number: int) -> tuple[Node | None, int]:
    """The node and the number of its result that a view is of."""
    while node is not None and node.name() in _VIEWS:
        node, number = node.next_functions[0]
    return node, number


def _is_repeated(first: tuple[Node | None, int], second: tuple[Node | None, int]) -> bool:
    """Whether two results are the same sum, difference, norm, absolute value or view of the same."""
    waiting = [(first, second)]
    while waiting:
        (m, i), (n, j) = waiting.pop()
        if m is n and i == j:
            continue
        if m is None or n is None or i != j or m.name() != n.name() or m.name() not in _VIEWS | _REPEATABLE:
            return False
        if _settings(m) != _settings(n):
            return False
        waiting.extend(zip(m.next_functions, n.next_functions, strict=True))
    return True


def _settings(node: Node) -> dict[str, Any]:
    """Return the settings of an operation, without its tensors."""
    tensors = ("_saved_self", "_saved_other", "_saved_result")
    names = (name for name in dir(node) if name.startswith("_saved_") and name not in tensors)
    return {name: getattr(node, name) for name in names}


_REPEATABLE = frozenset({"SubBackward0", "AddBackward0", "RsubBackward1", "AbsBackward0", "LinalgVectorNormBackward0"})
_VIEWS = frozenset(
    {
        *(
            "AliasBackward0",
            "ConjBackward0",
            "ExpandBackward0",
            "PermuteBackward0",
            "SelectBackward0",
            "SliceBackward0",
        ),
        *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "TBackward0", "TransposeBackward0"),
        *(
            "UnsafeViewBackward0",
            "UnsqueezeBackward0",
            "ViewAsComplexBackward0",
            "ViewAsRealBackward0",
            "ViewBackward0",
        ),
    }
)


# Which remedy fits a loss of which no model output was recorded.


_HESSIAN = 'use curvature="hessian"'
_PIECEWISE = f"is piecewise linear, so its Gauss-Newton matrix is zero or undefined: {_HESSIAN}"
_PROBABILITIES = (
    "return logits from the model, without its softmax or sigmoid, and take cross_entropy or "
    "binary_cross_entropy_with_logits of them (skorch: criterion=torch.nn.CrossEntropyLoss)"
)
_LIBRARY = (
    f"if it is one for all the data, minimise its square, which has the same minimum, by mse_loss; if many: {_HESSIAN}"
)

# By the functions of torch.nn.functional that the closure called.
CALLED: dict[str, str] = {
    "nll_loss": f"was given something else than the logarithm of a softmax over classes: {_PROBABILITIES}",
    "kl_div": "was given something else than the logarithm of a softmax over classes: take log_softmax of the logits",
    "l1_loss": f"{_PIECEWISE}, or use smooth_l1_loss or huber_loss, which are recognised",
    "hinge_embedding_loss": _PIECEWISE,
    "margin_ranking_loss": _PIECEWISE,
    "multi_margin_loss": f"{_PIECEWISE}, or use cross_entropy of the same scores",
    "multilabel_margin_loss": f"{_PIECEWISE}, or use multilabel_soft_margin_loss, which is recognised",
    "triplet_margin_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "triplet_margin_with_distance_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "cosine_embedding_loss": f"is not convex in the embeddings: {_HESSIAN}",
    "cosine_similarity": f"is not convex in the embeddings: {_HESSIAN}",
    "gaussian_nll_loss": (
        f"is convex in the mean but not in mean and variance together: {_HESSIAN}, or, if the variance is no output of "
        "the model, mark the mean"
    ),
    "ctc_loss": f"has no second derivative: {_HESSIAN}, whose products are then formed by finite differences",
}

# By the node of the loss's graph that is met behind sums, means, signs, scales and views.
ENDS: dict[str, tuple[str, str]] = {
    "LogBackward0": ("a logarithm", f"if it is that of probabilities, {_PROBABILITIES}"),
    "LogSoftmaxBackward0": ("log-probabilities", "take cross_entropy of the logits"),
    "LogSigmoidBackward0": ("a log-sigmoid", "take binary_cross_entropy_with_logits of the logits"),
    "SoftplusBackward0": ("a softplus", "take binary_cross_entropy_with_logits or soft_margin_loss of the scores"),
    "LogsumexpBackward0": ("a logsumexp", "take cross_entropy of the scores (contrastive ones: over each row)"),
    "PowBackward0": (
        "a power",
        "if it is a square, take mse_loss of outputs and targets "
        "(DeepXDE: model.compile(optimizer, loss=torch.nn.functional.mse_loss))",
    ),
    "SqrtBackward0": ("a square root", _LIBRARY),
    "LinalgVectorNormBackward0": ("a norm", _LIBRARY),
    "AbsBackward0": ("an absolute value", f"take smooth_l1_loss or huber_loss, or {_HESSIAN}"),
    "ReluBackward0": ("a hinge", _HESSIAN),
    "ClampMinBackward0": ("a hinge", _HESSIAN),
    "ClampBackward1": ("a hinge", _HESSIAN),
}
ENDS.update(
    dict.fromkeys(
        (
            *("MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "HuberLossBackward0"),
            *("SmoothL1LossBackward0", "SoftMarginLossBackward0", "BinaryCrossEntropyBackward0"),
            "BinaryCrossEntropyWithLogitsBackward0",
        ),
        (
            "a loss of torch.nn.functional that was called outside of the closure",
            "call the model and the loss inside the closure, each time it runs",
        ),
    )
)
_LAYER = (
    "the model's output itself, as a critic's does",
    f"it is linear in the output, so that there is no Gauss-Newton matrix: {_HESSIAN}",
)
ENDS.update(
    dict.fromkeys(("AddmmBackward0", "MmBackward0", "MvBackward0", "BmmBackward0", "ConvolutionBackward0"), _LAYER)
)


def unrecognised(called: Iterable[str], ends: Iterable[str], wrappers: Iterable[str] = ()) -> str:
    """Return what was seen of a loss without recorded outputs, and what to write instead.

    Args:
        called: The names of the loss functions called, in order.
        ends: The names of the nodes that the losses are computed from, through linear operations alone.
        wrappers: The names of classes that wrap other tensors, of outputs that recognised losses were given.
    """
    called, ends, wrappers = (list(dict.fromkeys(names)) for names in (called, ends, wrappers))
    sentences = ["No model output was recorded for the Gauss-Newton matrix."]
    if called:
        sentences.append(f"The closure called {', '.join(called)}.")
    for name in wrappers:
        sentences.append(f"An output is a {name}, which has no such matrix: give the loss plain tensors.")
    remedies = [f"{name} {CALLED[name]}." for name in called if name in CALLED]
    if not remedies:
        found = dict.fromkeys(ENDS[name] for name in sorted(ends) if name in ENDS)
        remedies = [f"The loss ends in sums or means of {what}: {remedy}." for what, remedy in found]
    return " ".join([*sentences, *remedies, _RECOGNISED])


_RECOGNISED = (
    "The losses recognised are cross_entropy, log_softmax followed by nll_loss or kl_div, mse_loss, huber_loss, "
    "smooth_l1_loss, binary_cross_entropy (also with logits), poisson_nll_loss and the soft margin losses of "
    "torch.nn.functional. For any other loss call `z = newtonopt.mark_outputs(z)` on the model's output inside the "
    'closure, or use curvature="hessian".'
)
