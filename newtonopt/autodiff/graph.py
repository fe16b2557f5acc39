"""Walks through autograd graphs, and letting go of what they hold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


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


def bytes_handed_on(start: Iterable[Node | None]) -> int:
    """Total bytes of the gradients passed to the nodes reachable from `start`; nested tensors, whose shapes are no
    numbers, are left out.
    """
    total = 0

    def add(node: Node) -> bool:
        nonlocal total
        dense = [of for of in node._input_metadata if not of.is_nested_tensor]
        shapes = [(of.shape, of.dtype.itemsize) for of in dense if all(isinstance(size, int) for size in of.shape)]
        total += sum(math.prod(shape) * size for shape, size in shapes)
        return False

    reaches(start, add)
    return total


def coarsest(start: Iterable[Node | None], eps: float) -> float:
    """Return the eps of the coarsest floating dtype of the gradients passed to the nodes reachable from `start`, or
    `eps` if that is more.
    """

    def look(node: Node) -> bool:
        nonlocal eps
        eps = max([eps, *(torch.finfo(of.dtype).eps for of in node._input_metadata if of.dtype.is_floating_point)])
        return False

    reaches(start, look)
    return eps


def reached(start: Node | Iterable[Node | None] | None, nodes: set[Node | None] | set[Node]) -> set[Node]:
    """Those of `nodes` that are met going back from `start`."""
    met: set[Node] = set()

    def note(node: Node) -> bool:
        if node in nodes:
            met.add(node)
        return False

    if nodes:
        reaches(start, note)
    return met


def first_met(start: Node | None, nodes: set[Node]) -> set[Node]:
    """Return those of `nodes` that are met going back from `start` on a path that passes none of the others."""
    met: set[Node] = set()

    def note(node: Node) -> bool:
        met.update(following for following, _ in node.next_functions if following in nodes)
        return False

    if start is not None and nodes:
        if start in nodes:
            return {start}
        reaches(start, note, nodes)
    return met


def all_behind(start: Iterable[Node | None]) -> set[Node]:
    """Return every node met going back from `start`, itself included."""
    met: set[Node] = set()

    def add(node: Node) -> bool:
        met.add(node)
        return False

    reaches(start, add)
    return met


def chained(starts: Iterable[Node | None]) -> tuple[set[Node], set[Node]]:
    """Return those of `starts` that are met going back from another one, and those from which another one is met."""
    given = {node for node in starts if node is not None}
    consumers: dict[Node, list[Node]] = {}

    def note(node: Node) -> bool:
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(node)
        return False

    reaches(given, note)
    behind = {node for node in given if node in consumers}
    waiting, before = list(behind), set()
    while waiting:
        for consumer in consumers.get(waiting.pop(), ()):
            if consumer not in before:
                before.add(consumer)
                waiting.append(consumer)
    return behind, before & given


@dataclass(frozen=True)
class Graph:
    """Parts of a graph that may make a derivative wrong.

    Attributes:
        functions: Names of the autograd Functions in it that are not PyTorch's own.
        heads: Whether there are some between the loss and its outputs.
        has_hooks: Whether hooks may change gradients.
        eps: Rounding unit of the coarsest precision in it.
    """

    functions: tuple[str, ...]
    heads: bool
    has_hooks: bool
    eps: float

    @property
    def is_foreign(self) -> bool:
        """Whether it holds code that is not PyTorch's."""
        return bool(self.functions) or self.has_hooks

    def named(self, before: str, otherwise: str = "") -> str:
        """Return the functions' names after some words, or other words if there are none."""
        return f"{before}{', '.join(self.functions)}" if self.functions else otherwise


def look_through(loss: Tensor, outputs: Iterable[Tensor], eps: float) -> Graph:
    """Return what may make a derivative wrong in the graph of a loss; `eps` is the least rounding unit to report."""
    names: dict[str, None] = {}
    hooked = False

    def look(node: Any) -> bool:
        nonlocal eps, hooked
        name = _foreign(node)
        if name is not None:
            names[name] = None
        hooked = hooked or node.name() == "BackwardHookFunctionBackward"  # of a module with full backward hooks
        for of in node._input_metadata:
            if of.dtype.is_floating_point:
                eps = max(eps, torch.finfo(of.dtype).eps)
        return False

    reaches(loss.grad_fn, look)
    if loss.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        eps = max(eps, _TF32)
    barrier = {z.grad_fn for z in outputs if z.grad_fn is not None}
    heads = bool(names) and bool(barrier) and reaches(loss.grad_fn, lambda node: _foreign(node) is not None, barrier)
    return Graph(tuple(names), heads, hooked, eps)


def _foreign(node: Any) -> str | None:
    """The name of an autograd Function that is not PyTorch's own; None for another node."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        own: str = function.__name__
        return None if function.__module__.startswith("torch.") else own
    name: str = node.name()
    return name if "CppNode" in name else None


# Rounding unit of TensorFloat-32, in which cuDNN convolves by default.
_TF32 = 2.0**-11


def notes(node: Any) -> dict[str, Any]:
    """Return the dictionary that lives as long as the node: notes in it keep no graph alive that nobody else keeps."""
    found: dict[str, Any] = node.metadata
    return found


class SavedTensors:
    """What the graphs made since hold on to, so that it can be let go as `backward` would do, without running one."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[Held]] = []

    def pack(self, tensor: Tensor) -> Held:
        """Return a holder of a tensor that a node saves."""
        # A node is numbered just before it saves its tensors.
        held = Held(tensor, torch._C._autograd._get_sequence_nr() - 1)
        self._held.append(weakref.ref(held))
        return held

    def release(self, term: Tensor) -> None:
        """Let go what the graph of `term` saved."""
        numbers: set[int] = set()

        def note(node: Node) -> bool:
            numbers.add(node._sequence_nr())
            return False

        reaches(term.grad_fn, note)
        alive = [(ref, held) for ref in self._held if (held := ref()) is not None]
        for _, held in alive:
            if held.number in numbers:
                held.tensor = None
        self._held = [ref for ref, held in alive if held.tensor is not None]


class Held:
    """A tensor that a node saved, which can be taken from it."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.tensor: Tensor | None = tensor
        self.number = number

    def unpack(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: It was let go.
        """
        if self.tensor is None:
            raise RuntimeError(
                "The closure differentiates a graph a second time after loss.backward() freed it: call "
                "loss.backward(retain_graph=True)."
            )
        return self.tensor
