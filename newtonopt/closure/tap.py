"""The tap on a closure: sees `backward` and the loss functions as the closure calls them.

`Tap` is a `TorchFunctionMode`: it sees every call of torch in its thread, nests with the user's own modes, and is gone
when its `with` block ends, however that ends. `objective` makes one for each run of the closure. The tap hands a call
to whom it concerns, in this order (`Tap._called`):

- `backward`: the loss is handed to `on_term`, with the outputs that it is computed from.
- Writes to tensors: `writes.Writes` keeps the values from before.
- `.grad`: `accumulation.GradientTracker` follows which losses count.
- `register_hook`: `WatchedHooks`.
- Loss functions, squares, softmaxes and `mark_outputs`: `OutputRecorder` records their arguments as outputs. It knows
  from `losses` and `squares` what these calls are.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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

from newtonopt.autodiff.gradients import differentiable_kernels
from newtonopt.autodiff.graph import Held, SavedTensors, all_behind, reached
from newtonopt.closure.accumulation import GradientTracker
from newtonopt.closure.losses import (
    CONVEX_LOSSES,
    LOG_PROBABILITY_LOSSES,
    REMEDIES,
    ConvexNote,
    Decomposition,
    Output,
    RootNote,
    advice,
    decompose,
    forget,
    independent_outputs,
    is_convex,
    logits_behind,
    mean_over,
    own_view,
)
from newtonopt.closure.squares import ROOTS, SQUARES, first_operand, root, root_operand, square
from newtonopt.closure.writes import Writes, is_write
from newtonopt.vectors.subclasses import alike, is_wrapper, plain


def mark_outputs(z: Tensor) -> Tensor:
    """Mark `z` as the model's output for the Gauss-Newton matrix, and return it unchanged.

    Compute the loss from the tensor that this returns: a mark that the loss does not use is ignored.

    The losses of `torch.nn.functional` need no mark, nor do sums and means of squares written by hand. Call this inside
    a closure whose loss is written by hand in another way, on the tensor in which that loss is convex: raw predictions
    or logits. Do not mark the loss itself or a penalty: the loss is linear in these, so there is no matrix, which is an
    error.

    Args:
        z: The model's output, any shape.

    Returns:
        A tensor equal to `z`.

    Raises:
        TypeError: `z` is no tensor.
        ValueError: `z` is a nested tensor without a jagged layout, which has no shape.

    Example:
        A Poisson loss with the logarithm of the rate as output; its Hessian by the output is `exp(z)`, here one.

        >>> import torch
        >>> from newtonopt import evaluate, gauss_newton, mark_outputs
        >>> inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        >>> weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> def closure():
        ...     z = mark_outputs(inputs @ weights)
        ...     return (z.exp() - z).sum()
        >>> gauss_newton(evaluate(closure, [weights])).dense()
        tensor([[10., 14.],
                [14., 20.]], dtype=torch.float64)

    See Also:
        - `gauss_newton()`: the matrix that needs the outputs.
        - `jacobian()`: the derivative of the outputs.
        - `docs/setups.md`: which losses are recognised without a mark.
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


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A loss that the closure called `backward` on; the objective is the sum of them.

    Attributes:
        loss: A live scalar.
        outputs: The recorded outputs that it is computed from.
        keep: Whether an `OnLoss` function must leave the graph whole.
    """

    loss: Tensor
    outputs: tuple[Output, ...]
    keep: bool

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs' tensors."""
        return [z.tensor for z in self.outputs]


OnLoss = Callable[[LossTerm], None]
"""A function that is handed each loss."""


class Tap(TorchFunctionMode):
    """Hands over the losses that a closure calls `backward` on, one by one, with the outputs they are computed from.

    Args:
        params: The parameters.
        numbers: The numbers of the outputs, shared by all runs of the closure.
        wanted: The numbers of the outputs to hand over with the losses; None: find which there are.
        backward: Whether `backward` runs or is left out.
        pulled: Whether `on_term` does what `backward` would do.
        on_term: Called with each loss before its `backward`; None if only the sum of the losses is wanted.
        keep: Whether all graphs are kept.
        release: Whether a loss's graph is emptied where `backward` would have emptied it, for closures with several.
        weigh: Whether to find the number of entries that the losses are means over.
        forward: Whether the run is in forward mode, where there are no graphs and the outputs' tangents are recorded.
        counted: The numbers of the calls of `backward` whose losses count; None: find which do.
        fills: Whether a run without `backward` writes gradients to `.grad`, for a closure that computes with them.
        writes: Told before a tensor is written to; None: nobody is.

    Attributes:
        terms: How many losses counted.
        holds_constant: Whether the closure took a tensor for a constant, by `detach`, `no_grad` or otherwise.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        numbers: OutputNumbers,
        wanted: Collection[int] | None = None,
        backward: bool = False,
        pulled: bool = False,
        on_term: OnLoss | None = None,
        keep: bool = False,
        release: bool = False,
        weigh: bool = False,
        forward: bool = False,
        counted: Collection[int] | None = None,
        fills: bool = False,
        writes: Writes | None = None,
    ) -> None:
        super().__init__()
        self.runs_backward = backward
        self.is_forward = forward
        self.outputs = OutputRecorder(params, numbers, wanted, forward=forward, weigh=weigh)
        self.gradients = GradientTracker(
            params, backward=backward, fills=fills, follows=wanted is None and counted is None and not pulled
        )
        self.hooks = WatchedHooks()
        self.saved: SavedTensors | None = SavedTensors() if release else None
        self.terms = 0
        self.holds_constant = False
        self._writes = writes
        self._pulled = pulled
        self._on_term = on_term
        self._keep = keep
        self._counted = counted
        self._fills = fills
        self._running = False
        self._total: Tensor | None = None

    def run(self, closure: Callable[[], Any]) -> Any:
        """Run the closure. `_place` looks for the places of outputs in the frames inside this one."""
        self._running = True
        try:
            return closure()
        finally:
            self._running = False

    @property
    def called_backward(self) -> bool:
        """Whether the closure called `backward`."""
        return self.gradients.calls > 0

    def total(self, returned: object) -> Tensor:
        """Return the sum of the losses, detached.

        Args:
            returned: The closure's return value, for the error.

        Raises:
            RuntimeError: There was no loss.
        """
        if self._total is None:
            what = type(returned).__name__ + (" without a graph" if isinstance(returned, Tensor) else "")
            raise RuntimeError(
                "The closure neither called loss.backward() nor returned a loss that requires a gradient (it "
                f"returned a {what}), so there is nothing to minimise. End it with `loss.backward(); return loss` "
                "(torch.autograd.backward is not seen: call the method). Check that the loss depends on the "
                "parameters and that no torch.no_grad() surrounds the forward pass. Under Lightning, return the "
                "loss from training_step: None skips a batch with other optimizers, but cannot be skipped within "
                "a step."
            )
        return self._total

    def take(
        self, loss: Tensor, *, keep: bool = False, counts: bool = True, then: Callable[[], None] | None = None
    ) -> None:
        """Hand a loss over if it counts, then let its graph go as `backward` would.

        Args:
            loss: A live loss with one entry.
            keep: Whether its graph stays.
            counts: Whether the loss is part of the objective.
            then: Called after it was handed over, before its graph goes.
        """
        if loss.numel() != 1:
            raise RuntimeError(f"The loss has shape {tuple(loss.shape)}: return a scalar, such as loss.mean().")
        loss = plain(loss).reshape(())
        keep = keep or self._keep
        if counts:
            self.terms += 1
            self._total = loss.detach() if self._total is None else self._total + loss.detach()
        # Where all graphs are kept, the outputs are those of the sum of the losses, and are looked for at the end.
        at_the_end = self._keep or self.is_forward
        with nullcontext(()) if at_the_end else self.outputs.of_one(loss, keep=keep) as outputs:
            if counts and self._on_term is not None:
                again = self._fills or (self.runs_backward and not self._pulled)
                self._on_term(LossTerm(loss, outputs, keep or again))
            if then is not None:
                then()
        if self.saved is not None and not (keep or at_the_end):
            self.saved.release(loss)

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
        if func is Tensor.register_hook:
            return func(args[0], self.hooks.watched(*args[1:], **kwargs))
        if self._running and func in _HOLDING and torch.is_grad_enabled() and _holds(args, kwargs):
            self.holds_constant = True
        if (recorded := self.outputs.on_call(func, args, kwargs)) is not NotImplemented:
            return recorded
        if func in _RECURRENT:
            with _without_cudnn():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _on_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        names = ("gradient", "retain_graph", "create_graph", "inputs")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if self.is_forward and self._fills:
            raise RuntimeError("The closure computes with gradients, which are not available in forward mode.")
        gradient, inputs = given.get("gradient"), given.get("inputs")
        if inputs is not None:
            inputs = given["inputs"] = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        creates = bool(given.get("create_graph"))
        number = self.gradients.calls
        counts = self.gradients.on_backward(loss, gradient, inputs)
        counts = counts if self._counted is None else number in self._counted
        value = loss
        if gradient is not None:
            # `backward(gradient)` differentiates the loss times this factor.
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


# The outputs.


class OutputNumbers:
    """The numbers of the outputs of a closure, which are the same in all of its runs.

    An output is known by the place in the user's code where it was met, and by how often that place was met before in
    the same run. So calls made in one run and not in another, as for a log, do no harm.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def at(self, place: object, before: int) -> int:
        """Return the number of the output at a place that was met so often before."""
        return self._numbers.setdefault((place, before), len(self._numbers))


class OutputRecorder:
    """Records the outputs that a run of the closure meets: arguments of recognised losses and squares, and marks.

    Args:
        params: The parameters.
        numbers: The numbers of the outputs.
        wanted: The numbers of the outputs to record. None: all, and find which of them the losses are computed from.
        forward: Whether the run is in forward mode, where the outputs' tangents are recorded.
        weigh: Whether to find the number of entries that the losses are means over.

    Attributes:
        tangents: The tangents of the wanted outputs by number, in forward mode.
        has_marks: Whether the closure marked outputs.
        linear_marks: Whether a loss is linear in a marked output.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        numbers: OutputNumbers,
        wanted: Collection[int] | None,
        *,
        forward: bool,
        weigh: bool,
    ) -> None:
        self.tangents: dict[int, Tensor] = {}
        self.has_marks = self.linear_marks = False
        self._params = params
        self._numbers = numbers
        self._met: Counter[object] = Counter()
        self._wanted = wanted
        self._forward = forward
        self._weigh = weigh
        # Outputs whose graphs are alive.
        self._marked: list[Output] = []
        self._recognised: list[Output] = []
        # Logits, by the node of their softmax.
        self._log_softmaxes: dict[Node, Output] = {}
        self._softmaxes: dict[Node, Output] = {}
        self._has_notes = False
        # Numbers of the outputs that a loss is convex in, and of those that one depends on in another way.
        self._convex: set[int] = set()
        self._other: set[int] = set()
        # Nodes of graphs that were kept, from which losses are computed in another way.
        self._stops: list[Node] = []
        self._counts: list[Tensor | float | None] = []
        # Seen for the advice.
        self._called: list[str] = []
        self._ends: set[str] = set()
        self._wrappers: list[str] = []

    # After the run.

    def of_all(self, loss: Tensor) -> tuple[Output, ...]:
        """Return the outputs that the sum of all losses, whose graphs were kept, is computed from, by number."""
        self._decompose(loss)
        outputs, inner = independent_outputs(self._marked, self._recognised, loss)
        self._other |= inner
        return tuple(sorted(outputs, key=lambda z: z.number))

    def is_convex(self, numbers: Iterable[int]) -> bool:
        """Whether the losses are sums, with weights that are not negative, of convex functions of these outputs."""
        met = {z.tensor.grad_fn: z.number for z in self._recognised}
        other = {met[node] for node in reached(self._stops, set(met))} if self._stops and met else set()
        return (self._convex - self._other - other).issuperset(numbers)

    def weight(self) -> float:
        """Return the number of entries that all losses are means over; 0 if it is not known of one of them."""
        known = [float(count) for count in self._counts if count is not None]
        return sum(known) if len(known) == len(self._counts) else 0.0

    def advice(self) -> str:
        """Return what to write instead, if no output was recorded."""
        return advice(self._called, self._ends, self._wrappers)

    # At each loss.

    @contextmanager
    def of_one(self, loss: Tensor, *, keep: bool) -> Iterator[tuple[Output, ...]]:
        """Give the outputs that one loss is computed from. Afterwards, unless its graph is kept, forget the outputs in
        that graph, as `backward` lets it go.
        """
        found = self._decompose(loss) if self._wanted is None else Decomposition()
        recorded = [*self._marked, *self._recognised, *self._softmaxes.values()]
        nodes = all_behind([loss.grad_fn]) if recorded or self._has_notes else set()
        marked, recognised = ([z for z in one if z.tensor.grad_fn in nodes] for one in (self._marked, self._recognised))
        outputs, inner = independent_outputs(marked, recognised, loss)
        self._other.update(z.number for z in outputs if z.number not in found.convex - inner)
        yield tuple(outputs)
        if keep:
            self._stops.extend(found.stops)
            return
        self._marked = [z for z in self._marked if z.tensor.grad_fn not in nodes]
        self._recognised = [z for z in self._recognised if z.tensor.grad_fn not in nodes]
        self._log_softmaxes = {n: z for n, z in self._log_softmaxes.items() if z.tensor.grad_fn not in nodes}
        self._softmaxes = {n: z for n, z in self._softmaxes.items() if z.tensor.grad_fn not in nodes}
        if self._has_notes:
            forget(nodes)

    def _decompose(self, loss: Tensor) -> Decomposition:
        """Record the squares written by hand that the loss is a weighted sum of, and what it is convex in."""
        found = decompose(loss, self._params, self._marked, self._recognised)
        self._recognised.extend(found.outputs)
        self._convex |= found.convex
        self.linear_marks = self.linear_marks or bool(found.linear)
        if not (self._marked or self._recognised):
            self._ends.update(node.name() for node in found.stops)
        return found

    # At each call.

    def on_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call that may be given an output; NotImplemented for any other call."""
        if func is mark_outputs:
            self.has_marks = True
        # Outputs are not looked for in a run for the loss or gradient alone, nor where they would have no graph, as
        # inside an autograd Function.
        if (self._wanted is not None and not self._wanted) or not (self._forward or torch.is_grad_enabled()):
            return NotImplemented
        if func is mark_outputs:
            return self._on_mark(*args)
        if func in CONVEX_LOSSES:
            return self._on_convex_loss(func, *args, **kwargs)
        if func in LOG_PROBABILITY_LOSSES:
            return self._on_log_probability_loss(func, *args, **kwargs)
        if func in SQUARES or func in ROOTS:
            return self._on_square_or_root(func, *args, **kwargs)
        if func in _LOG_SOFTMAX or (func in _SOFTMAX and _is_over_classes(*args, **kwargs)):
            return self._on_softmax(func, *args, **kwargs)
        if func in _UNRECOGNISED:
            self._called.append(func.__name__)
        return NotImplemented

    def _on_mark(self, z: Tensor) -> Tensor:
        output = self._output(z)
        if output is None:
            return z
        self._marked.append(output)
        return alike(output.tensor, z)

    def _on_convex_loss(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note_call(func, args, kwargs)
        found = {i: output for i in CONVEX_LOSSES[func] if i < len(args) and (output := self._output(args[i]))}
        args = tuple(alike(found[i].tensor, a) if i in found else a for i, a in enumerate(args))
        self._recognised.extend(found.values())
        result = func(*args, **kwargs)
        self._attach_note(func, args, kwargs, tuple(found.values()), result)
        return result

    def _on_log_probability_loss(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note_call(func, args, kwargs)
        outputs: tuple[Output, ...] = ()
        if (behind := logits_behind(args[0], self._log_softmaxes, self._softmaxes)) is not None:
            logits, is_convex_in_logits = behind
            if all(logits is not z for z in self._recognised):
                self._recognised.append(logits)
            outputs = (logits,) if is_convex_in_logits else ()
        # Targets may be computed from the same logits.
        others = [a.grad_fn for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
        if any(others) and reached(others, {z.tensor.grad_fn for z in outputs}):
            outputs = ()
        result = func(*args, **kwargs)
        self._attach_note(func, args, kwargs, outputs, result)
        return result

    def _on_softmax(self, func: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._output(z)
        if output is None:
            return func(z, *args, **kwargs)
        result = func(alike(output.tensor, z), *args, **kwargs)
        (self._log_softmaxes if func in _LOG_SOFTMAX else self._softmaxes)[result.grad_fn] = output
        return result

    def _on_square_or_root(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_square = func in SQUARES
        number = self._numbered(lambda: (first_operand if is_square else root_operand)(func, args, kwargs))
        if self._forward or not (self._wanted is None or number in self._wanted):
            return func(*args, **kwargs)
        note: ConvexNote | RootNote | None
        result, note = (square if is_square else root)(func, args, kwargs, number)
        if note is None:
            return result
        if self._wanted is None:
            # Whether the loss is a sum of such squares is found out at its `backward`.
            note.attach(result)
            self._has_notes = True
        else:
            self._recognised.append(note.output_at(result.grad_fn))
        return result

    def _note_call(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called.append(loss.__name__)
        if self._weigh:
            self._counts.append(mean_over(loss, inspect.signature(loss).bind(*args, **kwargs).arguments))

    def _attach_note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[Output, ...],
        result: Any,
    ) -> None:
        """Attach a note to the result of a recognised loss that is convex in these outputs."""
        if self._wanted is None and outputs:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if is_convex(func, given):
                ConvexNote(outputs).attach(result)
                self._has_notes = True

    def _output(self, z: Any) -> Output | None:
        """Return a view of `z` that only its consumer uses, so that a derivative by it is that consumer's alone; None
        if `z` is no output, or is not wanted.
        """
        number = self._numbered(lambda: z)
        if not isinstance(z, Tensor) or not z.is_floating_point() or not z.requires_grad:
            return None
        if is_wrapper(z):
            self._wrappers.append(type(z).__name__)
            return None
        if self._wanted is not None and number not in self._wanted:
            return None
        return Output(own_view(z), number)

    def _numbered(self, operand: Callable[[], Any]) -> int:
        """Return the number of the output at this call; in forward mode record the tangent of a wanted one."""
        place = _place()
        number = self._numbers.at(place, self._met[place])
        self._met[place] += 1
        if self._forward and self._wanted is not None and number in self._wanted:
            z = own_view(operand())
            tangent = forward_ad.unpack_dual(z).tangent
            self.tangents[number] = torch.zeros_like(z) if tangent is None else tangent
        return number


def _place() -> tuple[object, ...]:
    """Return where in the user's code a call was made: the innermost lines of it.

    Positions within a line are left out, because they move when Python specialises the code; so are calls within torch
    and within newtonopt, because they differ where a DistributedDataParallel is run as one process.
    """
    frame: FrameType | None = sys._getframe(1)
    place: list[object] = []
    while frame is not None and frame.f_code is not Tap.run.__code__ and len(place) < _DEPTH:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS):
            place.append((code.co_filename, code.co_firstlineno, frame.f_lineno))
        frame = frame.f_back
    return tuple(place)


_DEPTH = 12
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (Path(__file__).parent, torch.__file__))

_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax})
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_UNRECOGNISED = frozenset(getattr(F, name) for name in REMEDIES) - LOG_PROBABILITY_LOSSES


def _is_over_classes(z: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> bool:
    """Whether a softmax is taken over the dimension of `nll_loss`'s classes; attention takes it over the last one."""
    if "input" in kwargs or not isinstance(z, Tensor) or z.dim() == 0:
        return False
    classes = min(1, z.dim() - 1)
    return dim in (classes, classes - z.dim())


# Other calls that the tap looks at.


class WatchedHooks:
    """The hooks that a closure registers on what it computes; many only look at gradients.

    The graph keeps its hooks alive, and these keep this alone, not the tap.

    Attributes:
        change: Whether one has returned another gradient.
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


# Calls that take a tensor for a constant: those on a tensor, `torch.no_grad` by its flag, gradients without a graph.
_DATA: Any = Tensor.data
_HOLDING = frozenset(
    {Tensor.detach, torch.detach, Tensor.detach_, Tensor.item, Tensor.tolist, Tensor.__float__, _DATA.__get__}
    | {torch._C._set_grad_enabled, torch.autograd.grad}
)


def _holds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    held = args[0] if args else kwargs.get("outputs")
    if isinstance(held, Tensor):
        return held.requires_grad and not kwargs.get("create_graph")
    return held is False or (isinstance(held, Sequence) and not kwargs.get("create_graph"))


# cuDNN's recurrent networks have no double backward.
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


@contextmanager
def _without_cudnn() -> Iterator[None]:
    # torch.backends.cudnn.flags sets the precision too, and fails where the user has set that for one kind of layer.
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
