"""Follows `.grad` through a closure's calls of `backward`, to find which losses count, and for which parameters.

An optimizer that reads `.grad` minimises the losses whose gradients are in it when the closure ends: not those that
`zero_grad` cleared away in between, and each by the parameters that `backward(inputs=...)` names. A closure that
computes with gradients, as one that perturbs its data by their signs does, needs them in every run.

The tap tells `GradientTracker` of each call of `backward` and of each call that may touch a gradient. At the end
`objective` asks it for the `Group`s of losses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from newtonopt.autodiff.graph import all_behind, reaches
from newtonopt.closure.writes import tensors_in
from newtonopt.vectors.subclasses import is_wrapper


@dataclass(frozen=True)
class Group:
    """Losses of a closure that count for the same parameters.

    Attributes:
        calls: The numbers of their calls of `backward`.
        params: The numbers of the parameters; the others are constants in these losses. None: all count.
    """

    calls: frozenset[int]
    params: frozenset[int] | None


class GradientTracker:
    """Follows what one run of a closure does with `.grad`.

    Args:
        params: The parameters.
        backward: Whether `backward` runs.
        fills: Whether a run without `backward` writes the gradients that it would write.
        follows: Whether to find which losses count, and whether the closure computes with gradients.

    Attributes:
        calls: How often `backward` was called.
        had_some: Whether there were gradients at the first `backward`.
        was_read: Whether the closure computed with gradients.
        reads: Whether it called `backward` again after that.
    """

    def __init__(self, params: Sequence[Tensor], *, backward: bool, fills: bool, follows: bool) -> None:
        self._params = params
        self._numbers = {id(p): number for number, p in enumerate(params)}
        self._backward = backward
        self._fills = fills
        self._follows = follows
        self.calls = 0
        self.had_some = False
        self.reads = False
        self.was_read = False
        # The numbers of the parameters that each `backward` named; None: all.
        self._inputs: list[frozenset[int] | None] = []
        # The number of the first `backward` since each parameter's gradient was cleared.
        self._since = [0] * len(params)
        # The name of an operation by which the closure wrote to a gradient; empty if there was none.
        self._altered = ""
        # The tensors whose gradients the closure has read, by the address of the gradient.
        self._read: dict[int, Tensor] = {}
        self._retained: list[weakref.ref[Tensor]] = []
        # Tensors that are no parameters, with their `.grad` from before the run, by identity.
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}
        # Address and version of the parameters' gradients after the last `backward`, and the numbers of the parameters
        # whose gradients were seen to change since.
        self._left: list[tuple[int, int] | None] = []
        self._noted: set[int] = set()
        # Tensors without a graph that were computed from gradients, and from parameters.
        self._derived = _WeakSet()
        self._detached = _WeakSet()
        # Identities of the tensors at which a loss of detached tensors alone was cut off from the parameters, and
        # whether the closure used the gradient of one.
        self._cut: set[int] = set()
        self._used_cut = False
        self._has_hooks = False

    # After the run.

    def groups(self) -> tuple[Group, ...] | None:
        """Return the losses that count, grouped by the parameters that they count for; None if all count for all.

        Raises:
            RuntimeError: No loss counts, or it cannot be told which do.
        """
        self._note_changes()
        if not any(self._since) and all(of is None for of in self._inputs):
            return None
        found: dict[frozenset[int], set[int]] = {}
        everything = frozenset(range(len(self._params)))
        for call, of in enumerate(self._inputs):
            live = frozenset(n for n in (everything if of is None else of) if self._since[n] <= call)
            if live:
                found.setdefault(live, set()).add(call)
        if self._altered and any(self._since):
            raise RuntimeError(_ALTERED.format(self._altered))
        if not found:
            raise RuntimeError(_CLEARED if any(self._since) else _OTHERS)
        if found.keys() == {everything} and len(found[everything]) == self.calls:
            return None
        return tuple(Group(frozenset(calls), None if of == everything else of) for of, calls in found.items())

    def restore(self) -> None:
        """Put back `.grad` of tensors that are no parameters."""
        for x, gradient in self._before.values():
            x.grad = gradient

    # At each `backward`.

    def on_backward(self, loss: Tensor, gradient: Any, inputs: Sequence[Tensor] | None) -> bool:
        """Take note of a call of `backward` before it runs; return whether the loss can count.

        Raises:
            RuntimeError: The loss is differentiated in two stages.
        """
        of = None
        if inputs is not None:
            of = frozenset(self._numbers[id(x)] for x in inputs if id(x) in self._numbers)
            of = None if len(of) == len(self._params) else of
        if self.calls == 0:
            self.had_some = any(p.grad is not None for p in self._params)
        if self._follows:
            if self._used_cut or (isinstance(gradient, Tensor) and self._is_gradient(gradient, loss)):
                raise RuntimeError(_SPLIT)
            self._note_changes()
            self.reads = self.reads or self.was_read
            self._inputs.append(of)
            if self._detached:
                leaves = _leaves_behind(loss)
                if not any(id(x) in self._numbers for x in leaves):
                    self._cut.update(id(x) for x in leaves if x in self._detached)
            # A hook may read a gradient.
            self.was_read = self.was_read or self._has_hooks
        self.calls += 1
        return of is None or bool(of)

    def fill(self, loss: Tensor, gradient: Any, inputs: Sequence[Tensor] | None, *, create_graph: bool) -> None:
        """Write the gradients that `backward` would write; zeros for the parameters if the closure reads none."""
        if not self._fills:
            for p in self._params if inputs is None else inputs:
                if id(p) in self._numbers and p.grad is None and p.requires_grad:
                    # Code that comes next, such as clipping or printing the norm, expects gradients.
                    p.grad = torch.zeros_like(p)
            return
        if inputs is None:
            retained = [x for ref in self._retained if (x := ref()) is not None]
            inputs = [*_leaves_behind(loss), *retained]
        if not inputs:
            return
        found = torch.autograd.grad(
            loss, inputs, gradient, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        for x, g in zip(inputs, found, strict=True):
            if g is None:
                continue
            self._keep(x, start=None)
            if create_graph or (x.grad is not None and x.grad.requires_grad):
                x.grad = g if x.grad is None else x.grad + g
            elif x.grad is None:
                x.grad = g.detach().clone()
            else:
                with torch.no_grad():
                    x.grad += g

    def cut_graphs(self) -> None:
        """Let `backward` add to copies of the gradients that a loss was computed from, whose graph is kept."""
        for x in self._read.values():
            if x.grad is not None and x.grad.requires_grad:
                x.grad = x.grad.detach().clone()

    def after_backward(self) -> None:
        """Remember how `backward`, or `fill` in its place, left the gradients."""
        if self._follows:
            self._left = [None if p.grad is None else (_address(p.grad), p.grad._version) for p in self._params]
            self._noted.clear()

    def _note_changes(self) -> None:
        """Find gradients that were cleared since the last `backward` through another view of their memory."""
        for number, (p, seen) in enumerate(zip(self._params, self._left, strict=False)):
            if p.grad is None or seen is None or number in self._noted:
                continue
            if seen[0] == _address(p.grad) and seen[1] != p.grad._version:
                # Without real gradients a clipped one looks like a cleared one.
                self.was_read = True
                if not bool(p.grad.any()):
                    self._since[number] = self.calls
        # A parameter without a gradient counts as cleared where others were.
        if self.calls and self.calls in self._since:
            pairs = zip(self._params, self._since, strict=True)
            self._since = [self.calls if p.grad is None else since for p, since in pairs]

    # At each other call.

    def on_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call that reads or writes `.grad`; NotImplemented for a call that does neither."""
        if func in _ACCESS:
            return self._on_access(func, args)
        if func is Tensor.retain_grad:
            self._retained.append(weakref.ref(args[0]))
        if not self._follows:
            return NotImplemented
        self._has_hooks = self._has_hooks or func is Tensor.register_hook
        if self._read and self.calls:
            return self._on_use(func, args, kwargs)
        return NotImplemented

    def on_result(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow results that are computed from gradients, or from parameters without a graph."""
        if not self._follows:
            return
        if func is torch.autograd.grad:
            self._derived.add(g for g in result if isinstance(g, Tensor))
        elif func in _DETACH:
            if args[0].grad_fn is not None and reaches(args[0].grad_fn, self._is_parameter):
                self._detached.add([result])
        elif self._derived or self._detached or not torch.is_grad_enabled():
            found = [x for x in tensors_in(result) if not x.requires_grad]
            given = list(tensors_in((*args, *kwargs.values()))) if found else []
            if any(x in self._derived for x in given):
                self._derived.add(found)
            if any(x in self._detached or id(x) in self._numbers for x in given) and func not in _ACCESS:
                self._detached.add(found)

    def _is_parameter(self, node: Node) -> bool:
        return id(getattr(node, "variable", None)) in self._numbers

    def _on_access(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        x = args[0]
        number = self._numbers.get(id(x))
        if number is None and not self._backward and x.requires_grad and (x.is_leaf or x.retains_grad):
            self._keep(x, start=x.grad)
            if func == _GET and x.grad is None and self.calls and not self._fills:
                # Zeros do until it is known whether the closure computes with them.
                x.grad = torch.zeros_like(x)
        if func == _GET:
            gradient = func(*args)
            if self._follows and isinstance(gradient, Tensor) and self.calls:
                self._read[_address(gradient)] = x
                if number is None:
                    self._derived.add([gradient])
            return gradient
        before = x.grad
        func(*args)
        now = x.grad
        if not (self._follows and self.calls) or number is None or now is before:
            return None
        kept = before is not None and now is not None and _same(before, now)
        if not kept and before is not None:
            self._since[number] = self.calls
        if not kept and now is not None and bool(now.any()):
            self._altered = "p.grad = ..."
        return None

    def _keep(self, x: Tensor, start: Tensor | None) -> None:
        """Remember the gradient of a tensor that is no parameter, and give the closure a copy of `start`."""
        if self._backward or id(x) in self._numbers or id(x) in self._before:
            return
        self._before[id(x)] = x, x.grad
        x.grad = None if start is None else start.detach().clone()

    def _on_use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        touched = list(self._touched((*args, *kwargs.values())))
        if not touched or func in _ABOUT:
            return NotImplemented
        name = getattr(func, "__name__", "")
        self._noted.update(self._numbers[id(x)] for x, _ in touched if id(x) in self._numbers)
        if name == "__get__":  # its shape, dtype or data is read
            return NotImplemented
        if func in _ZERO:
            self._clear(x for x, whole in touched if whole)
            self.was_read = self.was_read or not all(whole for _, whole in touched)
            return NotImplemented
        self.was_read = True
        self._used_cut = self._used_cut or any(id(x) in self._cut for x, _ in touched)
        # Setting the data of a gradient writes to it too.
        in_place = name in ("__setitem__", "__set__") or name.startswith("__i")
        written = list(self._touched(args[:1])) if in_place or (name.endswith("_") and name[-2:] != "__") else []
        if not written:
            return NotImplemented
        result = func(*args, **kwargs)
        if any(_is_zero(value) for value in (*args[1:], *kwargs.values())) or name.endswith(("copy_", "__set__")):
            cleared = [x for x, _ in written if x.grad is not None and not bool(x.grad.any())]
            self._clear(cleared)
            written = [(x, whole) for x, whole in written if all(x is not other for other in cleared)]
        if not name.startswith(_SHRINKING) and any(id(x) in self._numbers for x, _ in written):
            self._altered = name
        return result

    def _clear(self, cleared: Iterable[Tensor]) -> None:
        for x in cleared:
            number = self._numbers.get(id(x))
            if number is not None:
                self._since[number] = self.calls

    def _touched(self, values: Iterable[Any]) -> Iterator[tuple[Tensor, bool]]:
        """Yield the tensors whose gradients are among these values, each with whether that is the whole gradient."""
        for value in values:
            if isinstance(value, (list, tuple)):
                yield from self._touched(value)
            elif isinstance(value, Tensor):
                x = self._read.get(_address(value))
                if x is not None and x.grad is not None and _address(x.grad) == _address(value):
                    yield x, x.grad.shape == value.shape

    def _is_gradient(self, gradient: Tensor, of: Tensor) -> bool:
        """Whether an argument of `backward` is a gradient, or was computed from one. The factor of a single loss may
        be computed from gradients.
        """
        return any(True for _ in self._touched([gradient])) or (of.numel() > 1 and gradient in self._derived)


class _WeakSet:
    """A set of tensors that does not keep them alive."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._references)

    def __contains__(self, x: Tensor) -> bool:
        reference = self._references.get(id(x))
        return reference is not None and reference() is x

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors that require no gradient."""
        self._references.update({id(x): weakref.ref(x) for x in tensors if not x.requires_grad})


def _leaves_behind(loss: Tensor) -> list[Tensor]:
    """Return the leaves that a loss depends on."""
    found = [getattr(node, "variable", None) for node in all_behind([loss.grad_fn])]
    leaves = [x for x in found if isinstance(x, Tensor)]
    return [*leaves, loss] if loss.is_leaf and loss.requires_grad else leaves


def _address(t: Tensor) -> int:
    try:
        return id(t) if is_wrapper(t) else t.data_ptr() or id(t)
    except RuntimeError:  # without memory of its own, inside a transform of torch.func
        return id(t)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether a gradient was assigned again as it was, or in another layout or precision, and is not zero."""
    return a.shape == b.shape and bool((a == b.to(a.dtype)).all()) and bool(b.any())


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


_ATTRIBUTE: Any = Tensor.grad
_GET = _ATTRIBUTE.__get__
_ACCESS = frozenset({_GET, _ATTRIBUTE.__set__, _ATTRIBUTE.__delete__})
_DETACH = frozenset({Tensor.detach, torch.detach})
_ZERO = frozenset({Tensor.zero_, torch.zero_, torch._foreach_zero_})
# Calls that do not use the values of a gradient.
_ABOUT = frozenset(
    {
        *(Tensor.detach, Tensor.detach_, Tensor.requires_grad_, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride),
        *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.data_ptr, Tensor.is_complex),
    }
)
# Names of operations that clip or average gradients in place.
_SHRINKING = (
    *("mul", "div", "clamp", "clip", "nan_to_num", "__imul__", "__itruediv__"),
    *("_foreach_mul", "_foreach_div", "_foreach_clamp"),
)
_CLEARED = (
    "The closure clears the gradients after its last backward, so no gradient is left to step along. Call zero_grad() "
    "at the start of the closure, before the loss is computed."
)
_OTHERS = (
    "The closure calls backward(inputs=...) without the given parameters, so they get no gradient. Name these "
    "parameters among the inputs of the loss to be minimised."
)
_ALTERED = (
    "The closure clears the gradients between its losses and writes others to .grad itself ({}), so newtonopt cannot "
    "tell which function it minimises. Call backward once, on the weighted sum of the losses, or return that sum "
    "without calling backward."
)
_SPLIT = (
    "The closure differentiates its loss in two stages: it detaches a tensor, calls backward on the loss, and "
    "passes the gradient of that tensor on, as in z.backward(detached.grad). Second derivatives do not pass "
    "through the cut. Compute the loss from z itself, without detach, and call backward once. To save memory, use "
    'torch.utils.checkpoint, or loop over micro-batches with products="streamed".'
)
