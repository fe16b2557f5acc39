"""Tensors that a closure writes to: their values from before, kept when the first write comes, and put back.

The tap sees every operation in place. Nothing is copied before there is one, whatever the size of what the closure
holds.
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
from torch import Tensor, UntypedStorage
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from newtonopt.autodiff.gradients import differentiable_kernels
from newtonopt.autodiff.graph import Held, SavedTensors, all_behind, reached
from newtonopt.closure.accumulation import Gradients
from newtonopt.closure.losses import (
    CALLED,
    CONVEX_LOSSES,
    LINEAR,
    LOG_PROBABILITY_LOSSES,
    ROOTS,
    SELECTIONS,
    SQUARES,
    Found,
    Label,
    Output,
    apart,
    find,
    first_operand,
    is_convex,
    kind_of,
    mean_over,
    own_view,
    root,
    root_operand,
    square,
)
from newtonopt.vectors.subclasses import alike, is_wrapper, plain

# Functions that write to their arguments, or hand out memory that others may write to, and do not say so by their name.
_BY_NAME = frozenset(
    {"__setitem__", "numpy", "__array__", "__dlpack__", "storage", "typed_storage", "untyped_storage"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul")}
    | {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}
)
# What ends as the names of operations in place do, and leaves the memory as it is.
_NO_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
_SETTERS = ("data", "grad")
_WITH_STATISTICS = frozenset({"batch_norm", "instance_norm"})


def is_write(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of this function may write to a tensor that it is given."""
    try:
        known = _KNOWN.get(func)
    except TypeError:  # it cannot be hashed
        known = None
    if known is None:
        known = _KNOWN[func] = _writes(func)
    return known or "out" in kwargs or bool(kwargs.get("inplace"))


_KNOWN: dict[Any, bool] = {}


def _writes(func: Callable[..., Any]) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is not None:  # an operator, such as one of `torch.library.custom_op`
        return bool(schema.is_mutable)
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _SETTERS
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES
    return in_place or name in _BY_NAME or name in _WITH_STATISTICS


class Memory:
    """The memory of tensors that a closure can find, looked up when it first matters.

    Args:
        tensors: The tensors.
        params: The parameters, which others put back.
    """

    def __init__(self, tensors: Iterable[Tensor], params: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._params = list(params)
        self._param_ids = {id(p) for p in self._params}
        self._ids: set[int] = set()
        self._storages: dict[int, UntypedStorage] | None = None

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take further tensors in."""
        self._tensors.extend(tensors)
        self._storages = None

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors out that others put back."""
        away = {id(t) for t in tensors}
        self._tensors = [t for t in self._tensors if id(t) not in away]
        self._storages = None

    def has(self, t: Tensor) -> bool:
        """Whether this is one of the tensors, and no parameter."""
        if id(t) in self._param_ids:
            return False
        self._look_up()
        return id(t) in self._ids

    def of(self, t: Tensor) -> UntypedStorage | None:
        """Return the memory of `t` if one of the tensors has the same, and no parameter has."""
        storage = storage_of(t)
        return None if storage is None else self._look_up().get(storage._cdata)

    def _look_up(self) -> dict[int, UntypedStorage]:
        if self._storages is None:
            self._ids = {id(t) for t in self._tensors} - self._param_ids
            others = [t for t in self._tensors if id(t) in self._ids]
            found = [storage_of(t) for t in others]
            found += [storage_of(t.grad) for t in others if t.is_leaf and t.grad is not None]
            self._storages = {storage._cdata: storage for storage in found if storage is not None}
            for p in self._params:
                storage = storage_of(p)
                if storage is not None:
                    self._storages.pop(storage._cdata, None)
        return self._storages


class Writes:
    """The values from before a run of what it writes to.

    Args:
        memory: The tensors that the run finds when it begins; what it makes itself is nobody's concern.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._values: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}
        # Of `.data` and `.grad` that are assigned anew.
        self._assigned: dict[tuple[int, str], tuple[Tensor, str, Tensor | None]] = {}

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before a function writes."""
        name = func.__name__
        with torch._C.DisableTorchFunction():  # a subclass of Tensor may refuse to tell
            if name == "__set__":
                self._before_assignment(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
                return
            several = name.startswith("_fused") or hasattr(func, "_schema")
            first, last = (1, 3) if name in _WITH_STATISTICS else (0, None if several else 1)
            for t in _tensors_in((args[first:last], kwargs)):
                self.save(t)

    def save(self, t: Tensor) -> None:
        """Keep what a tensor holds now, unless it is known or the run has made it."""
        storage = self._memory.of(t)
        if storage is not None and storage._cdata not in self._values:
            self._values[storage._cdata] = storage, storage.clone()

    def _before_assignment(self, t: Tensor, name: str) -> None:
        if (id(t), name) not in self._assigned and self._memory.has(t):
            self._assigned[id(t), name] = t, name, _read(t, name)

    def swap(self) -> Writes:
        """Write the values from before; returns a record of those that were there, to be written back in turn."""
        now = Writes(self._memory)
        for key, (storage, value) in self._values.items():
            now._values[key] = storage, storage.clone()
            storage.copy_(value)
        for entry, (t, name, former) in self._assigned.items():
            now._assigned[entry] = t, name, _read(t, name)
            setattr(t, name, former)
        return now

    def used_by(self, start: Node | None) -> bool:
        """Whether the graph from here keeps a tensor that was written to."""
        if not self._values and not self._assigned:
            return False
        assigned = [storage_of(t) for t, name, _ in self._assigned.values() if name == "data"]
        keys = set(self._values) | {storage._cdata for storage in assigned if storage is not None}
        kept = map(storage_of, _saved_by(start))
        return any(storage is not None and storage._cdata in keys for storage in kept)


def _read(t: Tensor, name: str) -> Tensor | None:
    return t.data if name == "data" else t.grad


def storage_of(t: Tensor) -> UntypedStorage | None:
    """Return the memory of a tensor; None where it has none of its own."""
    if is_wrapper(t):
        return None
    with torch._C.DisableTorchFunction():
        try:
            return t.untyped_storage() if t.layout == torch.strided else None
        except (RuntimeError, NotImplementedError):  # a tensor inside a transform of torch.func
            return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors_in(entry)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _saved_by(start: Node | None) -> Iterator[Tensor]:
    """The tensors that the nodes of a graph keep for its derivatives."""
    for node in all_behind([start]):
        of_function = getattr(node, "saved_tensors", ())  # of a custom autograd.Function
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        for one in (*of_function, *(part for value in saved for part in (value if _is_list(value) else [value]))):
            held = one if isinstance(one, Tensor) else getattr(one, "data", None)
            if isinstance(held, Tensor):
                yield held


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


# The tap on a closure: sees `backward` and the loss functions as the closure calls them.
#
# A `TorchFunctionMode` is local to its thread, nests with the user's own modes, and is gone when its `with` block ends,
# however it ends.


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
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (Path(__file__).parent, torch.__file__))


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
def tapped(tap: Tap) -> Iterator[Tap]:
    """Run what follows under a tap, with the kernels that can be differentiated twice."""
    with ExitStack() as stack:
        stack.enter_context(differentiable_kernels())
        stack.enter_context(torch.set_grad_enabled(not tap.is_forward))
        stack.callback(tap.gradients.restore)
        if tap.saved is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(tap.saved.pack, Held.unpack))
        yield stack.enter_context(tap)
