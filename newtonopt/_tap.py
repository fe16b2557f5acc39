"""The tap on a closure: sees `backward` and the loss functions as the closure calls them.

A `TorchFunctionMode` is local to its thread, nests with the user's own modes, and is gone when its `with` block ends,
however it ends.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from newtonopt._advice import CALLED, LINEAR, SELECTIONS, ends_of
from newtonopt._convexity import Label, Output, convex_parts, labelled
from newtonopt._graph import Held, SavedTensors, chained, reached
from newtonopt._losses import CONVEX_LOSSES, LOG_PROBABILITY_LOSSES, mean_over
from newtonopt._squares import ROOTS, SQUARES, first_operand, own_view, root, root_operand, square
from newtonopt._subclasses import alike, is_wrapper, plain

_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax})
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_UNRECOGNISED = frozenset(getattr(F, name) for name in CALLED) - LOG_PROBABILITY_LOSSES
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def mark_outputs(z: Tensor) -> Tensor:
    """Name `z` as the model's output for the Gauss-Newton matrix: an identity.

    The losses of `torch.nn.functional` need no mark, nor do sums and means of squares written by hand. Call this inside
    a closure whose loss is written by hand in another way, on the tensor in which that loss is convex (raw predictions
    or logits); not on the loss itself, in which it is linear, so that the matrix is zero.

    Args:
        z: The model's output, any shape.

    Returns:
        A tensor equal to `z`.

    Raises:
        TypeError: `z` is no tensor.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z is a {type(z).__name__}: give the model's output, a tensor.")
    if has_torch_function_unary(z):
        marked: Tensor = handle_torch_function(mark_outputs, (z,), z)
        return marked
    return z


@dataclass(frozen=True)
class Term:
    """A loss that the closure called `backward` on.

    Attributes:
        loss: A live scalar.
        outputs: The recorded outputs that it is computed from.
        numbers: Theirs, among all that the closure's run met; the same in every run.
        keep: Whether the graph must outlive the call that this is given to.
    """

    loss: Tensor
    outputs: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    keep: bool


OnTerm = Callable[[Term], None]


class Tap(TorchFunctionMode):
    """Hands over the losses that a closure calls `backward` on, one by one, with the outputs they are computed from.

    Args:
        params: The parameters.
        backward: Whether `backward` runs or is left out.
        pulled: Whether `on_term` does what `backward` would do.
        on_term: Called with each loss before its `backward`; None if only the sum of the losses is wanted.
        keep: Whether all graphs are kept.
        release: Whether a loss's graph is emptied where `backward` would have emptied it, for closures with several.
        weigh: Whether to count what the losses are means over.
        outputs: Whether the losses are handed over with their outputs.
        tangents: Where to put the tangents of the outputs, by number, in a run in forward mode.
        wanted: The numbers of these outputs.

    Attributes:
        convex: The numbers of the outputs that the losses are convex functions of: sums, with weights that are not
            negative, of recognised losses and squares.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        backward: bool = False,
        pulled: bool = False,
        on_term: OnTerm | None = None,
        keep: bool = False,
        release: bool = False,
        weigh: bool = False,
        outputs: bool = True,
        tangents: dict[int, Tensor] | None = None,
        wanted: Container[int] = (),
    ) -> None:
        super().__init__()
        self._params = params
        self.runs_backward = backward
        self._pulled = pulled
        self._on_term = on_term
        self._keep = keep
        self._weigh = weigh
        self._finds_outputs = outputs and on_term is not None and tangents is None
        self._tangents = tangents
        self._wanted = wanted
        self._met = 0
        self._log_softmax: dict[Node, Output] = {}
        self._softmax: dict[Node, Output] = {}
        self._marked: list[Output] = []
        self._recognised: list[Output] = []
        self.saved: SavedTensors | None = SavedTensors() if release else None
        self.terms = 0
        self.called_backward = False
        self.losses_seen: list[str] = []
        self.wrappers: list[str] = []
        self.ends: set[str] = set()
        self.has_marks = False
        self.convex: set[int] = set()
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

    def outputs(self) -> list[Output]:
        """The recorded outputs, in the order in which the closure produced them.

        A recognised loss that is fed from marked ones adds none of its own.
        """
        return sorted(_apart(self._marked, self._recognised), key=lambda z: z.number)

    def take(self, loss: Tensor, *, keep: bool = False) -> None:
        """Hand a loss over; without `keep` its graph may go."""
        if loss.numel() != 1:
            raise RuntimeError(f"The loss has shape {tuple(loss.shape)}: return a scalar, such as loss.mean().")
        loss = plain(loss).reshape(())
        keep = keep or self._keep
        self.terms += 1
        self._total = loss.detach() if self._total is None else self._total + loss.detach()
        if self._finds_outputs:
            self._recognised.extend(self._squares_in(loss))
        if not (self._marked or self._recognised):
            self.ends |= ends_of(loss)
        recorded = {z.tensor.grad_fn for z in (*self._marked, *self._recognised, *self._softmax.values())}
        met = set() if self._keep else reached(loss.grad_fn, recorded)
        if self._on_term is not None:
            marked = [z for z in self._marked if z.tensor.grad_fn in met]
            outputs = _apart(marked, [z for z in self._recognised if z.tensor.grad_fn in met])
            tensors, numbers = tuple(z.tensor for z in outputs), tuple(z.number for z in outputs)
            self._on_term(Term(loss, tensors, numbers, keep or (self.runs_backward and not self._pulled)))
        if keep:
            return
        # What `backward` would have let go.
        self._marked = [z for z in self._marked if z.tensor.grad_fn not in met]
        self._recognised = [z for z in self._recognised if z.tensor.grad_fn not in met]
        self._log_softmax = {n: z for n, z in self._log_softmax.items() if z.tensor.grad_fn not in met}
        self._softmax = {n: z for n, z in self._softmax.items() if z.tensor.grad_fn not in met}
        if self.saved is not None:
            self.saved.release(loss)

    def _squares_in(self, loss: Tensor) -> list[Output]:
        """Return the outputs of the squares written by hand that the loss is a weighted sum of."""
        parts = convex_parts(loss)
        known = {z.number for z in self._recognised}
        squares = {z.number: z for label in parts if label.is_square for z in label.outputs if z.number not in known}
        self.convex.update(z.number for label in parts for z in label.outputs)
        nodes = [z.tensor.grad_fn for z in (*self._marked, *self._recognised, *squares.values())]
        if not squares or len(nodes) == 1:
            return list(squares.values())
        # A derivative by an output and by what that is computed from would count twice.
        behind, before = chained(nodes)
        return [z for z in squares.values() if z.tensor.grad_fn not in behind | before]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._on_backward(func, *args, **kwargs)
        if func is mark_outputs:
            self.has_marks = True
            return self._own_view(args[0], self._marked)
        if func in CONVEX_LOSSES:
            return self._on_convex_loss(func, *args, **kwargs)
        if func in LOG_PROBABILITY_LOSSES:
            self._note(func, args, kwargs)
            outputs = self._on_log_probabilities(args[0])
            return labelled(func(*args, **kwargs), Label(outputs))
        if func in SQUARES:
            number = self._numbered(lambda: first_operand(func, args, kwargs))
            return func(*args, **kwargs) if self.is_forward else square(func, args, kwargs, number)
        if func in ROOTS:
            number = self._numbered(lambda: root_operand(func, args, kwargs))
            return func(*args, **kwargs) if self.is_forward else root(func, args, kwargs, number)
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
        gradient = given.get("gradient")
        keep = bool(given.get("retain_graph") or given.get("create_graph"))
        self.take(loss if gradient is None else (loss * gradient).sum(), keep=keep)
        if self.runs_backward and self._pulled:
            return
        if self.runs_backward:
            backward(loss, **({**given, "retain_graph": True} if self._keep else given))
            return
        for p in self._params:
            if p.grad is None and p.requires_grad:
                # What the closure does with gradients next (clip them, print their norm) finds some.
                p.grad = torch.zeros_like(p)

    def _note(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.losses_seen.append(loss.__name__)
        if self._weigh:
            self._counts.append(mean_over(loss, inspect.signature(loss).bind(*args, **kwargs).arguments))

    def _on_convex_loss(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note(func, args, kwargs)
        first, places = len(self._recognised), CONVEX_LOSSES[func]
        args = tuple(self._own_view(a, self._recognised) if i in places else a for i, a in enumerate(args))
        return labelled(func(*args, **kwargs), Label(tuple(self._recognised[first:])))

    def _numbered(self, operand: Callable[[], Any]) -> int:
        """Return the next number; in forward mode note the tangent of what has it, if that is wanted."""
        number = self._met
        self._met += 1
        if self._tangents is not None and number in self._wanted:
            z = own_view(operand())
            tangent = forward_ad.unpack_dual(z).tangent
            self._tangents[number] = torch.zeros_like(z) if tangent is None else tangent
        return number

    def _own_view(self, z: Any, into: list[Output]) -> Any:
        """A view of `z` that only its consumer uses, so that a derivative by it is that consumer's alone."""
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
        """Record the logits behind log-probabilities, and return them; none if they are not to be found."""
        # Back through reshapes and selections, each with a single input, to the softmax.
        node = log_probabilities.grad_fn
        passed: list[str] = []
        while node is not None and node not in self._log_softmax:
            if node in self._softmax:
                return self._on_log_of_softmax(self._softmax[node], passed)
            passed.append(node.name())
            following = [n for n, _ in node.next_functions if n is not None]
            node = following[0] if len(following) == 1 else None
        if node is None:
            return ()
        logits = self._log_softmax[node]
        if all(logits is not z for z in self._recognised):
            self._recognised.append(logits)
        return (logits,)

    def _on_log_of_softmax(self, output: Output, passed: list[str]) -> tuple[Output, ...]:
        others = {name for name in passed if name not in LINEAR}
        if passed.count("LogBackward0") != 1 or others != {"LogBackward0"}:
            return ()
        if all(output is not z for z in self._recognised):
            self._recognised.append(output)
        # The logarithm of a sum, of probabilities or of one and a small number, is not concave in the logits.
        return (output,) if SELECTIONS.issuperset({*passed} - {"LogBackward0"}) else ()


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


def _apart(marked: list[Output], recognised: list[Output]) -> list[Output]:
    from_marks = {z.tensor.grad_fn for z in marked}
    return [*marked, *(z for z in recognised if not (marked and reached(z.tensor.grad_fn, from_marks)))]


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
        if tap.saved is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(tap.saved.pack, Held.unpack))
        yield stack.enter_context(tap)
