"""The tap on a closure: sees `backward` and the loss functions as the closure calls them.

A `TorchFunctionMode` is local to its thread, nests with the user's own modes, and is gone when its `with` block ends,
however it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

# The losses whose second derivative with respect to these positional arguments is positive semi-definite, so that they
# define a Gauss-Newton matrix. A difference loss is convex in both of its arguments together; elsewhere a target that
# needs gradients counts as constant.
_CONVEX_LOSSES: dict[Callable[..., Any], tuple[int, ...]] = {
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
_LOG_PROBABILITY_LOSSES = frozenset({F.nll_loss, F.kl_div})
_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax})
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def mark_outputs(z: Tensor) -> Tensor:
    """Name `z` as the model's output for the Gauss-Newton matrix: an identity.

    The losses of `torch.nn.functional` need no mark. Call this inside a closure whose loss is written by hand, on the
    tensor in which that loss is convex (raw predictions or logits).

    Args:
        z: The model's output, any shape.

    Returns:
        A tensor equal to `z`.
    """
    if has_torch_function_unary(z):
        marked: Tensor = handle_torch_function(mark_outputs, (z,), z)
        return marked
    return z


class Tap(TorchFunctionMode):
    """Notes the scalars that a closure calls `backward` on, and the outputs that its losses are computed from.

    Args:
        params: The parameters.
        backward: Whether `backward` runs (its graph retained) or is left out.
    """

    def __init__(self, params: Sequence[Tensor], *, backward: bool) -> None:
        super().__init__()
        self._params = params
        self._backward = backward
        self._log_softmax: dict[Node, Tensor] = {}
        self._marked: list[Tensor] = []
        self._recognised: list[Tensor] = []
        self.terms: list[Tensor] = []
        self.losses_seen: list[str] = []

    def outputs(self) -> tuple[Tensor, ...]:
        """The recorded outputs; a recognised loss that is fed from marked ones adds none of its own."""
        marked = {z.grad_fn for z in self._marked}
        fresh = [z for z in self._recognised if not (marked and reaches(z.grad_fn, lambda node: node in marked))]
        return (*self._marked, *fresh)

    def has_marks(self) -> bool:
        """Whether the closure called `mark_outputs` on something that needs gradients."""
        return bool(self._marked)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._on_backward(func, *args, **kwargs)
        if func is mark_outputs:
            return self._own_view(args[0], self._marked)
        if func in _CONVEX_LOSSES:
            self.losses_seen.append(func.__name__)
            places = _CONVEX_LOSSES[func]
            args = tuple(self._own_view(a, self._recognised) if i in places else a for i, a in enumerate(args))
        elif func in _LOG_SOFTMAX:
            return self._on_log_softmax(func, *args, **kwargs)
        elif func in _LOG_PROBABILITY_LOSSES:
            self._on_log_probabilities(args[0])
        elif func in _RECURRENT:
            # cuDNN's recurrent networks have no double backward.
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _on_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        names = ("gradient", "retain_graph", "create_graph", "inputs")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        gradient = given.get("gradient")
        self.terms.append(loss if gradient is None else (loss * gradient).sum())
        if self._backward:
            backward(loss, **{**given, "retain_graph": True})
            return
        for p in self._params:
            if p.grad is None and p.requires_grad:
                # What the closure does with gradients next (clip them, print their norm) finds some.
                p.grad = torch.zeros_like(p)

    def _own_view(self, z: Any, into: list[Tensor]) -> Any:
        """A view of `z` that only its consumer uses, so that a derivative by it is that consumer's alone."""
        if not isinstance(z, Tensor) or not z.requires_grad or not z.is_floating_point():
            return z
        view = z.view_as(z)
        into.append(view)
        return view

    def _on_log_softmax(self, func: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not z.requires_grad:
            return func(z, *args, **kwargs)
        view = z.view_as(z)
        log_probabilities = func(view, *args, **kwargs)
        self._log_softmax[log_probabilities.grad_fn] = view
        return log_probabilities

    def _on_log_probabilities(self, log_probabilities: Tensor) -> None:
        # Back through reshapes and selections, each with a single input, to the softmax.
        node = log_probabilities.grad_fn
        while node is not None and node not in self._log_softmax:
            following = [n for n, _ in node.next_functions if n is not None]
            node = following[0] if len(following) == 1 else None
        if node is not None and all(self._log_softmax[node] is not z for z in self._recognised):
            self._recognised.append(self._log_softmax[node])


@contextmanager
def tapped(params: Sequence[Tensor], *, backward: bool) -> Iterator[Tap]:
    """Run what follows under a tap, with the kernels that can be differentiated twice."""
    with ExitStack() as stack:
        # The fused attention kernels have no double backward, nor have graphs compiled by an ahead-of-time backend.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before it is imported, and importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        yield stack.enter_context(Tap(params, backward=backward))


def reaches(
    start: Node | Iterable[Node | None] | None,
    goal: Callable[[Node], bool],
    barrier: frozenset[Node] | set[Node] = frozenset(),
) -> bool:
    """Whether a node that is a `goal` is met going back from `start` (one or several) without passing `barrier`."""
    seen: set[Node] = set()
    waiting = list(start) if isinstance(start, Iterable) else [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in barrier:
            continue
        if goal(node):
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False
