"""Losses: which functions are convex in which outputs, how a loss is put together from them, and what to write instead.

- `CONVEX_LOSSES` lists the functions of `torch.nn.functional` whose arguments the tap records as outputs; `is_convex`
  says of a call with these arguments whether it is convex. A new convex loss, whose arguments must be called
  `input` and `target`, is a line in the first, three in the second if it is not convex for all arguments, a case of
  `mean_over` if its mean divides by something else than the number of entries, and a name in `advice`.
- The tap attaches a `ConvexNote` to the node of each such call, and of each square that `squares` finds.
- `decompose` walks from a loss back to these notes. A loss that is a sum of them, each with a weight that is not
  negative and does not depend on the outputs, has a positive semi-definite Gauss-Newton matrix.
- `independent_outputs` chooses the outputs of that matrix, so that no curvature counts twice.
- `advice` says what to write instead if there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import TensorWeakRef

from newtonopt.autodiff.graph import ahead, all_behind, chained, first_met, kind_of, notes, reached
from newtonopt.vectors.subclasses import plain

# Functions of torch.nn.functional.

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
"""Losses that are convex in the positional arguments with these numbers, which define a Gauss-Newton matrix.

A loss of a difference is convex in both of its arguments together. In the others a target that requires a gradient
counts as constant.
"""

LOG_PROBABILITY_LOSSES = frozenset({F.nll_loss, F.kl_div})
"""Losses that are linear in log-probabilities: convex, with curvature, only in the logits before `log_softmax`."""


def is_convex(loss: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether a call of a recognised loss, given its arguments by name, is convex: unless weights or targets are
    negative.
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


def mean_over(loss: Callable[..., Any], given: dict[str, Any]) -> Tensor | float | None:
    """Return the number by which a call of a recognised loss divides its sum; None if it returns the sum itself."""
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


# Outputs, and notes about them at the nodes of the graph.


class Root(NamedTuple):
    """The root of a sum of squares, of which a loss takes the square: `(z - y).norm() ** 2`.

    `node` computes the root, of squares summed over `dims` (None: all; empty: none, for an absolute value), which stay
    as dimensions of size one if `keep`.
    """

    node: Node
    dims: tuple[int, ...] | None
    keep: bool


class Output(NamedTuple):
    """A tensor that a loss is computed from, with the same number in every run, and its `Root` if the loss takes the
    square of that.
    """

    tensor: Tensor
    number: int
    root: Root | None = None


def own_view(z: Tensor) -> Tensor:
    """Return a view of `z` that nothing else uses, of real numbers: two in a last dimension for a complex one."""
    z = plain(z)
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z.view_as(z)


@dataclass(frozen=True, eq=False)
class ConvexNote:
    """The outputs in which the function that a node computes is convex.

    Attributes:
        outputs: The outputs; empty once the graph was let go.
        is_square: Whether the function is a square written by hand.
        diagonal: Whether only the diagonal of the result is convex, as for `d.T @ d`.
    """

    outputs: tuple[Output, ...]
    is_square: bool = False
    diagonal: bool = False

    def output_at(self, node: Node) -> Output:
        """Return the output that this node squares."""
        return self.outputs[0]

    def attach(self, result: Any) -> None:
        """Attach the note to the node that computed `result`, if there is one."""
        if isinstance(result, Tensor) and result.grad_fn is not None:
            notes(result.grad_fn)[_CONVEX] = self


@dataclass(frozen=True, eq=False)
class RootNote:
    """The output that a node computes a root of.

    Attributes:
        output: The output.
        dims: The dimensions summed over, as in `Root`.
        keep: Whether they stay.
        result: The root.
        version: The version of the root when it was computed: autograd does not see a change under `no_grad`.
    """

    output: Output
    dims: tuple[int, ...] | None
    keep: bool
    result: TensorWeakRef
    version: int

    def output_at(self, node: Node) -> Output:
        """Return the output, with the root that this node computes."""
        return self.output._replace(root=Root(node, self.dims, self.keep))

    def attach(self, result: Any) -> None:
        """Attach the note to the node that computed `result`."""
        notes(result.grad_fn)[_ROOT] = self


def forget(nodes: Iterable[Node]) -> None:
    """Drop the outputs that the notes at these nodes hold, where `backward` lets the graph go."""
    for node in nodes:
        found = notes(node)
        found.pop(_ROOT, None)
        if _CONVEX in found:
            found[_CONVEX] = ConvexNote(())


# The keys of the notes.
_CONVEX = "newtonopt: convex in these outputs"
_ROOT = "newtonopt: root of a sum of squares"


# The kinds of operations that a walk through a graph may pass.


# Operations that return some entries of their operand, in another order or another dtype.
_SELECTIONS = frozenset(
    {
        *("Alias", "Clone", "Conj", "Copy", "Expand", "Gather", "Index", "IndexSelect", "MaskedSelect", "Permute"),
        *("Repeat", "ReshapeAlias", "Roll", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "Take"),
        *("ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View", "ViewAsComplex"),
        *("ViewAsReal", "Flip"),
    }
)
# Operations that are linear in all of their operands.
_LINEAR = _SELECTIONS | {
    *("AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "AsStrided", "AvgPool2D", "AvgPool3D"),
    *("Cat", "ConstantPadNd", "Cumsum", "Diag", "Diagonal", "IndexAdd", "IndexCopy", "IndexFill", "IndexPut"),
    *("MaskedFill", "MaskedScatter", "Mean", "Nansum", "Neg", "Rsub", "Scatter", "ScatterAdd", "SelectScatter"),
    *("SliceScatter", "Stack", "Sub", "Sum", "Trace", "Tril", "Triu", "Unfold", "Where"),
}
# Operations that are linear in each of their first two operands; a quotient is so only in the first.
_BILINEAR = frozenset({"Mul", "Dot", "Mv", "Mm", "Bmm"})
_QUOTIENT = "Div"


# Log-probabilities: from the argument of `nll_loss` or `kl_div` back to the logits.


def logits_behind(
    log_probabilities: Tensor, log_softmaxes: Mapping[Node, Output], softmaxes: Mapping[Node, Output]
) -> tuple[Output, bool] | None:
    """Return the logits that log-probabilities are computed from, and whether a loss of these is convex in the logits;
    None if no softmax is met. On the way are reshapes and selections with a single operand, and one logarithm.

    Args:
        log_probabilities: The argument of `nll_loss` or `kl_div`.
        log_softmaxes: The logits of each `log_softmax`, by its node.
        softmaxes: The logits of each softmax, by its node.
    """
    node = log_probabilities.grad_fn
    passed: list[str] = []
    while node is not None and node not in log_softmaxes:
        if node in softmaxes:
            if passed.count("Log") != 1 or not (_LINEAR | {"Log"}).issuperset(passed):
                return None
            # The logarithm of a sum, of probabilities or of one and a small number, is not concave in the logits.
            return softmaxes[node], (_SELECTIONS | {"Log"}).issuperset(passed)
        passed.append(kind_of(node))
        following = [n for n, _ in node.next_functions if n is not None]
        node = following[0] if len(following) == 1 else None
    return None if node is None else (log_softmaxes[node], _SELECTIONS.issuperset(passed))


# The walk from a loss back to the convex functions of outputs that it is a sum of.


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The summands of a loss.

    Attributes:
        outputs: The outputs of squares written by hand that are not recorded yet.
        convex: The numbers of the outputs that the loss is a convex function of.
        stops: The other nodes that the loss is computed from through linear operations alone.
        linear: The numbers of the marked outputs that the loss is linear in.
    """

    outputs: list[Output] = field(default_factory=list)
    convex: set[int] = field(default_factory=set)
    stops: list[Node] = field(default_factory=list)
    linear: set[int] = field(default_factory=set)


def decompose(
    loss: Tensor, params: Sequence[Tensor], marked: Sequence[Output], recognised: Sequence[Output]
) -> Decomposition:
    """Find the recognised losses and squares that a loss is a sum of, with weights that are not negative.

    A function is left out if it enters in another way too, or with a weight that depends on a parameter that the
    function depends on; and a square if it is computed from another output, or another output from it.

    Args:
        loss: A live scalar.
        params: The parameters.
        marked: The outputs that the user marked.
        recognised: The outputs recorded already as arguments of recognised losses.
    """
    known = [*marked, *recognised]
    marks = {z.tensor.grad_fn: z.number for z in marked if z.tensor.grad_fn is not None}
    parts, others, ends = _summands(loss.grad_fn, {id(p) for p in params}, set(marks))
    # A mark in which the loss is linear is met through linear operations, and through nothing else.
    curved = reached([*parts, *others], ends) if ends else set()
    outputs = {node: _outputs_of(note) for node, note in parts.items()}
    # Outputs that the loss depends on in another way as well.
    entered = reached(others, {z.tensor.grad_fn for found in outputs.values() for z in found}) if others else set()
    # The derivative of the loss by a part is the weight of that part.
    edges = [GradientEdge(node, 0) for node in parts]
    weights = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) if edges else ()
    refused: set[int] = set()
    for (node, note), w in zip(parts.items(), weights, strict=True):
        if w is not None and not _is_weight(w, note):
            refused.update(z.number for z in outputs[node])
    refused.update(z.number for found in outputs.values() for z in found if z.tensor.grad_fn in entered)
    convex = {z.number for found in outputs.values() for z in found} - refused
    recorded = {z.number for z in known}
    squares = {z.number: z for node, note in parts.items() if note.is_square for z in outputs[node]}
    new = [z for number, z in squares.items() if number in convex - recorded]
    if new and len(new) + len(known) > 1:
        # A derivative by an output and by a tensor that it is computed from would count twice.
        behind, before = chained(z.tensor.grad_fn for z in (*known, *new))
        new = [z for z in new if z.tensor.grad_fn not in behind | before]
    return Decomposition(new, convex, others, {marks[node] for node in ends - curved})


def _summands(
    start: Node | None, params: set[int], marks: set[Node]
) -> tuple[dict[Node, ConvexNote], list[Node], set[Node]]:
    """Return the nodes with a note met through linear operations alone; the other nodes met so, with the factors that
    are weights; and the marks met so.
    """
    noted, consumers = _notes_in_reach(start)
    # The nodes on the way from the loss to a note, through which the walk may go.
    holding = set(noted) | ahead(noted, consumers)
    refused: set[Node] = set()
    while True:
        parts, stops, weights, ends = _walk_linear(start, noted, holding, refused, params, marks)
        dependent = _dependent(weights, parts, params)
        if not dependent:
            return parts, [*stops, *weights.values()], ends
        refused |= dependent


def _notes_in_reach(start: Node | None) -> tuple[dict[Node, ConvexNote], dict[Node, list[Node]]]:
    """Return the nodes with a note met through operations that are linear in an operand, and the consumers of each
    node on the way.
    """
    noted: dict[Node, ConvexNote] = {}
    consumers: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        note = notes(node).get(_CONVEX)
        if note is not None:
            noted[node] = note
        elif (kind := kind_of(node)) in _LINEAR or kind in _BILINEAR or kind == _QUOTIENT:
            for operand, _ in node.next_functions:
                if operand is not None:
                    consumers.setdefault(operand, []).append(node)
                    waiting.append(operand)
    return noted, consumers


def _walk_linear(
    start: Node | None,
    noted: dict[Node, ConvexNote],
    holding: set[Node],
    refused: set[Node],
    params: set[int],
    marks: set[Node],
) -> tuple[dict[Node, ConvexNote], list[Node], dict[Node, Node], set[Node]]:
    """Return the nodes with a note met, the nodes where the walk had to stop, the factor that is a weight by its
    product, and the marks met.
    """
    parts: dict[Node, ConvexNote] = {}
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
        if node in noted:
            parts[node] = noted[node]
        elif kind in _LINEAR:
            waiting.extend(operands)
        elif (kind in _BILINEAR or kind == _QUOTIENT) and node not in refused:
            live = [i for i, operand in enumerate(operands[:2]) if operand is not None]
            factors = live if len(live) == 1 else [i for i in live if operands[i] in holding]
            if len(factors) > 1:
                # One of two squares may be of the data alone.
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
    """Return the products whose weight depends on a parameter that one of the parts depends on."""
    if not weights or not (leaves := _leaves(parts, params)) & _leaves(weights.values(), params):
        return set()
    return {product for product, weight in weights.items() if leaves & _leaves([weight], params)}


def _leaves(start: Iterable[Node | None], params: set[int]) -> set[int]:
    found = {id(getattr(node, "variable", None)) for node in all_behind(start)}
    return found & params


def _outputs_of(note: ConvexNote) -> tuple[Output, ...]:
    """Return the outputs of a note: for the square of a root, possibly scaled, the output that the root is of."""
    if not note.is_square or not note.outputs:
        return note.outputs
    view = note.outputs[0].tensor
    node, copied = view.grad_fn, False
    while node is not None:
        root: RootNote | None = notes(node).get(_ROOT)
        if root is not None:
            # A root that was changed in place, unseen by autograd, is none any more.
            then = root.result() if copied else view
            return note.outputs if then is not None and then._version != root.version else (root.output_at(node),)
        operands = [operand for operand, _ in node.next_functions]
        kind = kind_of(node)
        scales = kind in ("Mul", "Div", "Neg") and operands[0] is not None and operands[1:] in ([], [None])
        if not scales and kind not in _SELECTIONS:
            break
        copied = copied or scales or kind in ("ToCopy", "Clone")
        node = operands[0]
    return note.outputs


def _is_weight(w: Tensor, note: ConvexNote) -> bool:
    """Whether no entry is negative, and only the diagonal is not zero where only that holds squares."""
    if note.diagonal:
        diagonal = w.diagonal(dim1=-2, dim2=-1)
        if bool((w - torch.diag_embed(diagonal)).any()):
            return False
        w = diagonal
    if w.is_complex():
        return not bool((w.imag != 0).any() or (w.real < 0).any())
    return not bool((w < 0).any())


# The choice of the outputs of the Gauss-Newton matrix among those met.


def independent_outputs(
    marked: Sequence[Output], recognised: Sequence[Output], loss: Tensor
) -> tuple[list[Output], set[int]]:
    """Choose among the outputs met some that a loss is a function of and of which none is computed from another, so
    that no curvature counts twice.

    A recognised loss that is fed from marked outputs adds none of its own. Where one output is computed from another,
    the outer one counts if the loss depends on the inner one through it alone, as where cross-entropy is taken of the
    distances that `mse_loss` gives. Otherwise the inner one counts, and its Hessian holds what the outer one adds.

    Args:
        marked: The outputs that the user marked.
        recognised: The outputs that are arguments of recognised losses or squares.
        loss: A live scalar.

    Returns:
        The outputs, and the numbers of those that others were computed from, in which the loss need not be convex.
    """
    chosen, inner = _not_nested(list(marked), loss)
    marks = {z.tensor.grad_fn for z in chosen}
    # A mark was made on purpose: it also stands for the outputs that it is computed from.
    own = [z for z in recognised if not (marks and reached(z.tensor.grad_fn, marks))]
    behind = reached(marks, {z.tensor.grad_fn for z in own}) if marks else set()
    own, nested = _not_nested([z for z in own if z.tensor.grad_fn not in behind], loss)
    return [*chosen, *own], inner | nested


def _not_nested(outputs: list[Output], loss: Tensor) -> tuple[list[Output], set[int]]:
    """Return outputs of which none is computed from another, and the numbers of those that others came from."""
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


# Advice for losses without a recorded output.


def advice(called: Iterable[str], ends: Iterable[str], wrappers: Iterable[str]) -> str:
    """Return a message about a loss without recorded outputs: what was seen of it, and what to write instead.

    Args:
        called: The names of the loss functions called, in order.
        ends: The names of the nodes that the losses are computed from through linear operations alone.
        wrappers: The names of classes that wrap other tensors, of outputs that recognised losses were given.
    """
    called, ends, wrappers = (list(dict.fromkeys(names)) for names in (called, ends, wrappers))
    sentences = ["No model output was recorded for the Gauss-Newton matrix."]
    if called:
        sentences.append(f"The closure called {', '.join(called)}.")
    for name in wrappers:
        sentences.append(f"An output is a {name}, which has no Gauss-Newton matrix. Pass plain tensors to the loss.")
    remedies = [f"{name} {REMEDIES[name]}." for name in called if name in REMEDIES]
    if not remedies:
        found = dict.fromkeys(_ENDS[name] for name in sorted(ends) if name in _ENDS)
        remedies = [f"The loss ends in sums or means of {what}: {remedy}." for what, remedy in found]
    return " ".join([*sentences, *remedies, _RECOGNISED])


_RECOGNISED = (
    "The recognised losses are cross_entropy, log_softmax followed by nll_loss or kl_div, mse_loss, huber_loss, "
    "smooth_l1_loss, binary_cross_entropy (also with logits), poisson_nll_loss and the soft margin losses of "
    "torch.nn.functional. For any other loss call `z = newtonopt.mark_outputs(z)` on the model's output inside the "
    'closure, or use curvature="hessian" (HessianFree and others).'
)
_HESSIAN = 'use curvature="hessian" (HessianFree and others)'
_PIECEWISE = f"is piecewise linear, so its Gauss-Newton matrix is zero or undefined: {_HESSIAN}"
_NO_LOG_SOFTMAX = "was given something other than the log-softmax over classes"
_EMBEDDINGS = f"is not convex in the embeddings: {_HESSIAN}"
_PROBABILITIES = (
    "return logits from the model, without its softmax or sigmoid, and use cross_entropy or "
    "binary_cross_entropy_with_logits on them (skorch: criterion=torch.nn.CrossEntropyLoss)"
)
_LIBRARY = (
    "if there is a single one for all the data, minimise its square with mse_loss, which has the same minimiser; "
    f"if there are many, {_HESSIAN}"
)

REMEDIES: dict[str, str] = {
    "nll_loss": f"{_NO_LOG_SOFTMAX}: {_PROBABILITIES}",
    "kl_div": f"{_NO_LOG_SOFTMAX}: use log_softmax on the logits",
    "l1_loss": f"{_PIECEWISE}, or use smooth_l1_loss or huber_loss, which are recognised",
    "hinge_embedding_loss": _PIECEWISE,
    "margin_ranking_loss": _PIECEWISE,
    "multi_margin_loss": f"{_PIECEWISE}, or use cross_entropy on the same scores",
    "multilabel_margin_loss": f"{_PIECEWISE}, or use multilabel_soft_margin_loss, which is recognised",
    "triplet_margin_loss": _EMBEDDINGS,
    "triplet_margin_with_distance_loss": _EMBEDDINGS,
    "cosine_embedding_loss": _EMBEDDINGS,
    "cosine_similarity": _EMBEDDINGS,
    "gaussian_nll_loss": (
        f"is convex in the mean but not in mean and variance together: {_HESSIAN}, or mark the mean if the variance is "
        "not an output of the model"
    ),
    "ctc_loss": f"has no second derivative: {_HESSIAN}, whose products are then formed by finite differences",
}
"""Remedies for functions of `torch.nn.functional` that the closure called, as the end of a sentence."""

_ELSEWHERE = (
    "a torch.nn.functional loss that was called outside the closure",
    "call the model and the loss inside the closure, each time it runs",
)
_LAYER = (
    "the model's output itself, as a critic's loss does",
    f"such a loss is linear in the output and has no Gauss-Newton matrix, so {_HESSIAN}",
)
# Names and remedies for the nodes that a loss is computed from through linear operations alone.
_ENDS: dict[str, tuple[str, str]] = {
    "LogBackward0": ("a logarithm", f"if it is taken of probabilities, {_PROBABILITIES}"),
    "LogSoftmaxBackward0": ("log-probabilities", "use cross_entropy on the logits"),
    "LogSigmoidBackward0": ("a log-sigmoid", "use binary_cross_entropy_with_logits on the logits"),
    "SoftplusBackward0": ("a softplus", "use binary_cross_entropy_with_logits or soft_margin_loss on the scores"),
    "LogsumexpBackward0": ("a logsumexp", "use cross_entropy on the scores (for a contrastive loss, on each row)"),
    "PowBackward0": (
        "a power",
        "if it is a square, use mse_loss on outputs and targets (DeepXDE: model.compile(optimizer, "
        "loss=torch.nn.functional.mse_loss))",
    ),
    "SqrtBackward0": ("a square root", _LIBRARY),
    "LinalgVectorNormBackward0": ("a norm", _LIBRARY),
    "AbsBackward0": ("an absolute value", f"use smooth_l1_loss or huber_loss, or {_HESSIAN}"),
    **dict.fromkeys(("ReluBackward0", "ClampMinBackward0", "ClampBackward1"), ("a hinge", _HESSIAN)),
    **dict.fromkeys(("MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "HuberLossBackward0"), _ELSEWHERE),
    **dict.fromkeys(("SmoothL1LossBackward0", "SoftMarginLossBackward0", "BinaryCrossEntropyBackward0"), _ELSEWHERE),
    "BinaryCrossEntropyWithLogitsBackward0": _ELSEWHERE,
    **dict.fromkeys(("AddmmBackward0", "MmBackward0", "MvBackward0", "BmmBackward0", "ConvolutionBackward0"), _LAYER),
}
