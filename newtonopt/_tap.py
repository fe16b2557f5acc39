"""The tap on a closure: sees `backward` and the loss functions as the closure calls them.

A `TorchFunctionMode` is local to its thread, nests with the user's own modes, and is gone when its `with` block ends,
however it ends.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from newtonopt._advice import CALLED
from newtonopt._convexity import LINEAR, SELECTIONS, Found, Label, Output, apart, find, kind_of
from newtonopt._gradients import Gradients
from newtonopt._graph import Held, SavedTensors, all_behind, reached
from newtonopt._losses import CONVEX_LOSSES, LOG_PROBABILITY_LOSSES, is_convex, mean_over
from newtonopt._squares import ROOTS, SQUARES, first_operand, own_view, root, root_operand, square
from newtonopt._subclasses import alike, is_wrapper, plain
from newtonopt._writes import Writes, is_write

_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax})
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_UNRECOGNISED = frozenset(getattr(F, name) for name in CALLED) - LOG_PROBABILITY_LOSSES
# What takes a tensor for a constant: those on a tensor, `torch.no_grad` by its flag, and gradients without a graph.
_DATA: Any = Tensor.data
_HOLDING = frozenset(
    {Tensor.detach, torch.detach, Tensor.detach_, Tensor.item, Tensor.tolist, Tensor.__float__, _DATA.__get__}
    | {torch._C._set_grad_enabled, torch.autograd.grad}
)
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def mark_outputs(z: Tensor) -> Tensor:
    """Name `z` as the model's output for the Gauss-Newton matrix: an identity.

    The losses of `torch.nn.functional` need no mark, nor do sums and means of squares written by hand. Call this inside
    a closure whose loss is written by hand in another way, on the tensor in which that loss is convex (raw predictions
    or logits); not on the loss itself or a penalty, in which it is linear, so that there is no matrix, which is an
    error.

    Args:
        z: The model's output, any shape.

    Returns:
        A tensor equal to `z`.

    Raises:
        TypeError: `z` is no tensor.
        ValueError: It is a nested tensor without a jagged layout, which has no shape.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got a value of type {type(z).__name__}. Give the model's output.")
    if z.is_nested and z.layout == torch.strided:
        raise ValueError(
            "z must have a shape, got a nested tensor of strided layout. Mark torch.nested.to_padded_tensor(z, 0.0), "
            "or make it with layout=torch.jagged and mark z.values()."
        )
    if has_torch_function_unary(z):
        marked: Tensor = handle_torch_function(mark_outputs, (z,), z)
        return marked
    return z


@dataclass(frozen=True)
class Term:
    """A loss that the closure called `backward` on.

    Attributes:
        loss: A live scalar.
        outputs: The recorded outputs that it is computed from; an output has the same number in every run.
        keep: Whether the graph must outlive the call that this is given to.
    """

    loss: Tensor
    outputs: tuple[Output, ...]
    keep: bool

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs themselves."""
        return [z.tensor for z in self.outputs]


OnTerm = Callable[[Term], None]


class Hooks:
    """The hooks that a closure registers on what it computes; many only look at gradients.

    Attributes:
        change: Whether one has given another gradient.
    """

    def __init__(self) -> None:
        self.change = False

    def watched(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """Return the hook, with a look at what it returns."""

        @functools.wraps(hook)
        def watched(gradient: Tensor) -> Tensor | None:
            changed = hook(gradient)
            self.change = self.change or not (changed is None or torch.equal(changed, gradient))
            return changed

        return watched


class Tap(TorchFunctionMode):
    """Hands over the losses that a closure calls `backward` on, one by one, with the outputs they are computed from.

    An output is known by the place in the user's code where it was met, so that calls made in one run and not in
    another, as for a log, do no harm. Which of the tensors met are outputs is found out in the run that is recorded;
    later runs are told.

    Args:
        params: The parameters.
        numbers: The number of each place where an output may be met. Added to.
        wanted: The numbers of the outputs that the losses are handed over with; None: to be found.
        backward: Whether `backward` runs or is left out.
        pulled: Whether `on_term` does what `backward` would do.
        on_term: Called with each loss before its `backward`; None if only the sum of the losses is wanted.
        keep: Whether all graphs are kept.
        release: Whether a loss's graph is emptied where `backward` would have emptied it, for closures with several.
        weigh: Whether to count what the losses are means over.
        tangents: Where to put the tangents of the outputs, by number, in a run in forward mode.
        counted: The numbers of the calls of `backward` whose losses count; None: to be found out.
        fills: Whether a run without `backward` writes gradients to `.grad`, for a closure that computes with them.
        writes: Record that is told before a tensor is written to; None: there is none.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        numbers: dict[object, int],
        wanted: Collection[int] | None = None,
        backward: bool = False,
        pulled: bool = False,
        on_term: OnTerm | None = None,
        keep: bool = False,
        release: bool = False,
        weigh: bool = False,
        tangents: dict[int, Tensor] | None = None,
        counted: Collection[int] | None = None,
        fills: bool = False,
        writes: Writes | None = None,
    ) -> None:
        super().__init__()
        self._writes = writes
        self._params = params
        self.runs_backward = backward
        self._pulled = pulled
        self._on_term = on_term
        self._keep = keep
        self._weigh = weigh
        self._tangents = tangents
        self._numbers = numbers
        self._wanted = wanted
        self._met: Counter[object] = Counter()
        self._counted = counted
        self._fills = fills
        self.gradients = Gradients(
            params, backward=backward, fills=fills, follows=wanted is None and counted is None and not pulled
        )
        self._labels: list[weakref.ref[Label]] = []
        self._stops: list[Node] = []
        self._log_softmax: dict[Node, Output] = {}
        self._softmax: dict[Node, Output] = {}
        self._marked: list[Output] = []
        self._recognised: list[Output] = []
        self.saved: SavedTensors | None = SavedTensors() if release else None
        self.terms = 0
        self.losses_seen: list[str] = []
        self.wrappers: list[str] = []
        self.ends: set[str] = set()
        self.has_marks = False
        self.holds_constant = self._running = False
        self.hooks = Hooks()
        self.linear_marks = False
        self._convex: set[int] = set()
        self._other: set[int] = set()
        self._total: Tensor | None = None
        self._counts: list[Tensor | float | None] = []

    @property
    def is_forward(self) -> bool:
        """Whether the run is in forward mode, where there are no graphs."""
        return self._tangents is not None

    def total(self, returned: object) -> Tensor:
        """The sum of the losses, detached; `returned` is what the closure returned, for the error if there was none."""
        if self._total is None:
            what = type(returned).__name__ + (" without a graph" if isinstance(returned, Tensor) else "")
            raise RuntimeError(
                "The closure neither called loss.backward() nor returned a loss that requires a gradient (it returned "
                f"a {what}), so there is nothing to minimise. End it with `loss.backward(); return loss` "
                "(torch.autograd.backward is not seen: call the method), and check that the loss depends on the "
                "parameters and that no torch.no_grad() surrounds the forward pass. Under Lightning return the loss "
                "from training_step: None, which skips a batch for other optimizers, cannot be skipped within a step."
            )
        return self._total

    def weight(self) -> float:
        """How much the losses are means over, together; 0 if it is not known of one of them."""
        known = [float(count) for count in self._counts if count is not None]
        return sum(known) if len(known) == len(self._counts) else 0.0

    def run(self, closure: Callable[[], Any]) -> Any:
        """Run the closure; the places of outputs are looked for in the calls from here on."""
        self._running = True
        try:
            return closure()
        finally:
            self._running = False

    def outputs_of(self, loss: Tensor) -> tuple[Output, ...]:
        """Return the outputs that the sum of all losses, whose graphs were kept, is computed from, in their order."""
        self._look_at(loss)
        outputs, within = apart(self._marked, self._recognised, loss)
        self._other |= within
        return tuple(sorted(outputs, key=lambda z: z.number))

    def is_convex(self, numbers: Iterable[int]) -> bool:
        """Whether the losses are sums, with weights that are not negative, of convex functions of these outputs."""
        met = {z.tensor.grad_fn: z.number for z in self._recognised}
        other = {met[node] for node in reached(self._stops, set(met))} if self._stops and met else set()
        return (self._convex - self._other - other).issuperset(numbers)

    @property
    def called_backward(self) -> bool:
        """Whether the closure called `backward`."""
        return self.gradients.calls > 0

    def take(
        self, loss: Tensor, *, keep: bool = False, counts: bool = True, then: Callable[[], None] | None = None
    ) -> None:
        """Hand a loss over if it counts, and call `then`; without `keep` its graph may go."""
        if loss.numel() != 1:
            raise RuntimeError(f"The loss has shape {tuple(loss.shape)}: return a scalar, such as loss.mean().")
        loss = plain(loss).reshape(())
        keep = keep or self._keep
        if counts:
            self.terms += 1
            self._total = loss.detach() if self._total is None else self._total + loss.detach()
        if self._keep or self.is_forward:
            if counts:
                self._hand_over(loss, [], keep)
            if then is not None:
                then()
            return
        found = self._look_at(loss) if self._wanted is None else Found()
        recorded = {z.tensor.grad_fn for z in (*self._marked, *self._recognised, *self._softmax.values())}
        behind = all_behind([loss.grad_fn]) if recorded or self._labels else set()
        met = recorded & behind
        marked = [z for z in self._marked if z.tensor.grad_fn in met]
        outputs, within = apart(marked, [z for z in self._recognised if z.tensor.grad_fn in met], loss)
        self._other.update(z.number for z in outputs if z.number not in found.convex - within)
        if counts:
            self._hand_over(loss, outputs, keep)
        if then is not None:
            then()
        if keep:
            self._stops.extend(found.stops)
            return
        # What `backward` would have let go.
        self._marked = [z for z in self._marked if z.tensor.grad_fn not in met]
        self._recognised = [z for z in self._recognised if z.tensor.grad_fn not in met]
        self._log_softmax = {n: z for n, z in self._log_softmax.items() if z.tensor.grad_fn not in met}
        self._softmax = {n: z for n, z in self._softmax.items() if z.tensor.grad_fn not in met}
        self._let_go({node._sequence_nr() for node in behind})
        if self.saved is not None:
            self.saved.release(loss)

    def _hand_over(self, loss: Tensor, outputs: Sequence[Output], keep: bool) -> None:
        if self._on_term is not None:
            again = self._fills or (self.runs_backward and not self._pulled)
            self._on_term(Term(loss, tuple(outputs), keep or again))

    def _look_at(self, loss: Tensor) -> Found:
        """Record the squares written by hand that the loss is a weighted sum of, and what it is convex in."""
        found = find(loss, self._params, self._marked, self._recognised)
        self._recognised.extend(found.outputs)
        self._convex |= found.convex
        self.linear_marks = self.linear_marks or bool(found.linear)
        if not (self._marked or self._recognised):
            self.ends.update(node.name() for node in found.stops)
        return found

    def _let_go(self, sequence: set[int]) -> None:
        labels = [(ref, label) for ref in self._labels if (label := ref()) is not None]
        for _, label in labels:
            if label.sequence in sequence:
                label.outputs = ()
        self._labels = [ref for ref, label in labels if label.outputs]

    def _attach(self, label: Label | None, result: Any) -> Any:
        if label is not None:
            label.attach(result)
            self._labels.append(weakref.ref(label))
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._called(func, args, kwargs)
        self.gradients.on_result(func, args, kwargs, result)
        return result

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is Tensor.backward:
            return self._on_backward(func, *args, **kwargs)
        if self._writes is not None and is_write(func, kwargs):
            self._writes.before(func, args, kwargs)
        if (accessed := self.gradients.on_call(func, args, kwargs)) is not NotImplemented:
            return accessed
        if func is mark_outputs:
            self.has_marks = True
        if func is Tensor.register_hook:
            return func(args[0], self.hooks.watched(*args[1:], **kwargs))
        if self._running and func in _HOLDING and torch.is_grad_enabled() and _holds(args, kwargs):
            self.holds_constant = True
        if self._finds_outputs:
            if func is mark_outputs:
                return self._own_view(args[0], self._marked)
            if func in CONVEX_LOSSES:
                return self._on_convex_loss(func, *args, **kwargs)
            if func in LOG_PROBABILITY_LOSSES:
                return self._on_log_probability_loss(func, *args, **kwargs)
            if func in SQUARES or func in ROOTS:
                return self._on_square_or_root(func, *args, **kwargs)
            if func in _LOG_SOFTMAX:
                return self._on_softmax(self._log_softmax, func, *args, **kwargs)
            if func in _SOFTMAX and _is_over_classes(*args, **kwargs):
                return self._on_softmax(self._softmax, func, *args, **kwargs)
            if func in _UNRECOGNISED:
                self.losses_seen.append(func.__name__)
        if func in _RECURRENT:
            # cuDNN's recurrent networks have no double backward.
            with _without_cudnn():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _on_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        names = ("gradient", "retain_graph", "create_graph", "inputs")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if self.is_forward and self._fills:
            raise RuntimeError("The closure computes with gradients, which forward mode does not give.")
        gradient, inputs = given.get("gradient"), given.get("inputs")
        if inputs is not None:
            inputs = given["inputs"] = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        creates = bool(given.get("create_graph"))
        number = self.gradients.calls
        counts = self.gradients.on_backward(loss, gradient, inputs)
        counts = counts if self._counted is None else number in self._counted
        value = loss
        if gradient is not None:
            value = (loss * (gradient.detach() if isinstance(gradient, Tensor) else gradient)).sum()
        fill = functools.partial(self.gradients.fill, loss, gradient, inputs, create_graph=creates)
        self.take(
            value,
            keep=bool(given.get("retain_graph")) or creates,
            counts=counts,
            then=None if self.runs_backward else fill,
        )
        if self.runs_backward and not self._pulled:
            self.gradients.cut_graphs()
            backward(loss, **({**given, "retain_graph": True} if self._keep else given))
        self.gradients.after_backward()

    def _note(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.losses_seen.append(loss.__name__)
        if self._weigh:
            self._counts.append(mean_over(loss, inspect.signature(loss).bind(*args, **kwargs).arguments))

    @property
    def _finds_outputs(self) -> bool:
        """Whether outputs are looked for: not in a run for the loss or gradient alone, nor where they would have no
        graph, as inside an autograd Function.
        """
        return (self._wanted is None or bool(self._wanted)) and (self.is_forward or torch.is_grad_enabled())

    def _on_convex_loss(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note(func, args, kwargs)
        first, places = len(self._recognised), CONVEX_LOSSES[func]
        args = tuple(self._own_view(a, self._recognised) if i in places else a for i, a in enumerate(args))
        result = func(*args, **kwargs)
        return self._attach(self._label(func, args, kwargs, self._recognised[first:]), result)

    def _on_log_probability_loss(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note(func, args, kwargs)
        outputs = self._on_log_probabilities(args[0])
        # Targets may be computed from the same logits.
        others = [a.grad_fn for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
        if any(others) and reached(others, {z.tensor.grad_fn for z in outputs}):
            outputs = ()
        result = func(*args, **kwargs)
        return self._attach(self._label(func, args, kwargs, outputs), result)

    def _label(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Output]
    ) -> Label | None:
        """Return the label of a recognised loss in the run where outputs are found."""
        if self._wanted is not None or not outputs:
            return None
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        return Label(tuple(outputs)) if is_convex(func, given) else None

    def _on_square_or_root(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_square = func in SQUARES
        number = self._numbered(lambda: (first_operand if is_square else root_operand)(func, args, kwargs))
        if self.is_forward or not (self._wanted is None or number in self._wanted):
            return func(*args, **kwargs)
        result, label = (square if is_square else root)(func, args, kwargs, number)
        if self._wanted is None:
            return self._attach(label, result)
        if label is not None:
            self._recognised.append(label.output_at(result))
        return result

    def _numbered(self, operand: Callable[[], Any]) -> int:
        """Return the number of the place of this call; in forward mode note the operand's tangent, if it is wanted."""
        place = _place()
        number = self._numbers.setdefault((place, self._met[place]), len(self._numbers))
        self._met[place] += 1
        if self._tangents is not None and self._wanted is not None and number in self._wanted:
            z = own_view(operand())
            tangent = forward_ad.unpack_dual(z).tangent
            self._tangents[number] = torch.zeros_like(z) if tangent is None else tangent
        return number

    def _own_view(self, z: Any, into: list[Output]) -> Any:
        """Return a view of `z` that only its consumer uses, so that a derivative by it is that consumer's alone."""
        output = self._output(z)
        if output is None:
            return z
        into.append(output)
        return alike(output.tensor, z)

    def _output(self, z: Any) -> Output | None:
        number = self._numbered(lambda: z)
        if not isinstance(z, Tensor) or not z.is_floating_point() or not z.requires_grad:
            return None
        if is_wrapper(z):
            self.wrappers.append(type(z).__name__)
            return None
        if self._wanted is not None and number not in self._wanted:
            return None
        return Output(own_view(z), number)

    def _on_softmax(
        self, into: dict[Node, Output], func: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        output = self._output(z)
        if output is None:
            return func(z, *args, **kwargs)
        result = func(alike(output.tensor, z), *args, **kwargs)
        into[result.grad_fn] = output
        return result

    def _on_log_probabilities(self, log_probabilities: Tensor) -> tuple[Output, ...]:
        """Record the logits behind log-probabilities; return them if the loss is known to be convex in them."""
        # Back through reshapes and selections, each with a single input, to the softmax.
        node = log_probabilities.grad_fn
        passed: list[str] = []
        while node is not None and node not in self._log_softmax:
            if node in self._softmax:
                return self._on_log_of_softmax(self._softmax[node], passed)
            passed.append(kind_of(node))
            following = [n for n, _ in node.next_functions if n is not None]
            node = following[0] if len(following) == 1 else None
        if node is None:
            return ()
        logits = self._log_softmax[node]
        if all(logits is not z for z in self._recognised):
            self._recognised.append(logits)
        return (logits,) if SELECTIONS.issuperset(passed) else ()

    def _on_log_of_softmax(self, output: Output, passed: list[str]) -> tuple[Output, ...]:
        if passed.count("Log") != 1 or not (LINEAR | {"Log"}).issuperset(passed):
            return ()
        if all(output is not z for z in self._recognised):
            self._recognised.append(output)
        # The logarithm of a sum, of probabilities or of one and a small number, is not concave in the logits.
        return (output,) if (SELECTIONS | {"Log"}).issuperset(passed) else ()


def _holds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    held = args[0] if args else kwargs.get("outputs")
    if isinstance(held, Tensor):
        return held.requires_grad and not kwargs.get("create_graph")
    return held is False or (isinstance(held, Sequence) and not kwargs.get("create_graph"))


def _place() -> tuple[object, ...]:
    """Return where in the user's code a call was made: the innermost lines of it. (Positions within a line move when
    Python specialises the code.)

    Calls within torch and here are left out: they differ where a DistributedDataParallel is run as one process.
    """
    frame: FrameType | None = sys._getframe(1)
    place: list[object] = []
    while frame is not None and frame.f_code is not Tap.run.__code__ and len(place) < _DEPTH:
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES):
            place.append((code.co_filename, code.co_firstlineno, frame.f_lineno))
        frame = frame.f_back
    return tuple(place)


_DEPTH = 12
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


@contextmanager
def _without_cudnn() -> Iterator[None]:
    # torch.backends.cudnn.flags sets the precision too, and fails where the user has set that for one kind of layer.
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _is_over_classes(z: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> bool:
    """Whether a softmax is taken over the dimension of `nll_loss`'s classes; that of attention is over the last."""
    if "input" in kwargs or not isinstance(z, Tensor) or z.dim() == 0:
        return False
    classes = min(1, z.dim() - 1)
    return dim in (classes, classes - z.dim())


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run what follows with the kernels that can be differentiated twice.

    The fused attention kernels have no double backward, nor have graphs compiled by an ahead-of-time backend, and that
    of `torch._weight_norm` is wrong. No function mode does it: `torch.autograd.grad` hides those from a checkpoint.
    """
    cuda = torch.backends.cuda
    before = cuda.math_sdp_enabled(), *(enabled() for enabled, _ in _FUSED_ATTENTION)
    # As `sdpa_kernel(MATH)` does it, which takes too long for every derivative.
    cuda.enable_math_sdp(True)
    for _, enable in _FUSED_ATTENTION:
        enable(False)
    norms = [(vars(module), vars(module)["_weight_norm"]) for module in _WITH_WEIGHT_NORM]
    for names, _ in norms:
        names["_weight_norm"] = _weight_norm
    try:
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before it is imported, and importing it is slow
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        for names, original in norms:
            names["_weight_norm"] = original
        cuda.enable_math_sdp(before[0])
        for (_, enable), enabled in zip(_FUSED_ATTENTION, before[1:], strict=True):
            enable(enabled)


_FUSED_ATTENTION = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


# The module of this name is hidden behind its function.
_WITH_WEIGHT_NORM = (torch, sys.modules["torch.nn.utils.weight_norm"])


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, whose own double backward takes the norms as constants."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def tapped(tap: Tap) -> Iterator[Tap]:
    """Run what follows under a tap, with the kernels that can be differentiated twice."""
    with ExitStack() as stack:
        stack.enter_context(differentiable_kernels())
        stack.enter_context(torch.set_grad_enabled(not tap.is_forward))
        stack.callback(tap.gradients.restore)
        if tap.saved is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(tap.saved.pack, Held.unpack))
        yield stack.enter_context(tap)
