"""Walks through autograd graphs, and letting go of the tensors that they hold."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def behind(start: Node | Iterable[Node | None] | None, barrier: Collection[Node] = frozenset()) -> Iterator[Node]:
    """Go back from `start` (one node or several), and give each node once.

    Args:
        start: First nodes; None, the graph of a constant, leads nowhere.
        barrier: Nodes that are neither given nor passed.
    """
    seen: set[Node] = set(barrier)
    waiting = list(start) if isinstance(start, Iterable) else [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def reaches(
    start: Node | Iterable[Node | None] | None, goal: Callable[[Node], bool], barrier: Collection[Node] = frozenset()
) -> bool:
    """Whether a node that is a `goal` is met going back from `start` without passing `barrier`."""
    return any(goal(node) for node in behind(start, barrier))


def bytes_handed_on(start: Iterable[Node | None]) -> int:
    """Return the total bytes of the gradients passed to the nodes reachable from `start`.

    Nested tensors, whose shapes are no numbers, are left out.
    """
    dense = [of for node in behind(start) for of in node._input_metadata if not of.is_nested_tensor]
    shapes = [(of.shape, of.dtype.itemsize) for of in dense if all(isinstance(size, int) for size in of.shape)]
    return sum(math.prod(shape) * size for shape, size in shapes)


def coarsest(start: Iterable[Node | None], eps: float) -> float:
    """Return the rounding unit of the coarsest dtype of the gradients passed to the nodes reachable from `start`.

    Args:
        start: First nodes.
        eps: The least rounding unit to return.
    """
    return max([eps, *(unit for node in behind(start) for unit in _units(node))])


def _units(node: Node) -> list[float]:
    """Return the rounding units of the gradients passed to a node."""
    return [torch.finfo(of.dtype).eps for of in node._input_metadata if of.dtype.is_floating_point]


def reached(start: Node | Iterable[Node | None] | None, nodes: set[Node | None] | set[Node]) -> set[Node]:
    """Return the members of `nodes` that are met going back from `start`."""
    return {node for node in behind(start) if node in nodes} if nodes else set()


def first_met(start: Node | None, nodes: set[Node]) -> set[Node]:
    """Return the members of `nodes` that are met going back from `start` on a path that passes none of the others."""
    if start is None or not nodes:
        return set()
    if start in nodes:
        return {start}
    return {following for node in behind(start, nodes) for following, _ in node.next_functions if following in nodes}


def all_behind(start: Iterable[Node | None]) -> set[Node]:
    """Return every node met going back from `start`, itself included."""
    return set(behind(start))


def consumers_behind(starts: Iterable[Node | None]) -> dict[Node, list[Node]]:
    """Return for each node met going back from `starts`, but the first ones, the nodes that it is met from."""
    consumers: dict[Node, list[Node]] = {}
    for node in behind(starts):
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(node)
    return consumers


def ahead(nodes: Iterable[Node], consumers: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """Return every node met going from these nodes to their consumers, and on to theirs."""
    waiting, met = list(nodes), set[Node]()
    while waiting:
        for consumer in consumers.get(waiting.pop(), ()):
            if consumer not in met:
                met.add(consumer)
                waiting.append(consumer)
    return met


def chained(starts: Iterable[Node | None]) -> tuple[set[Node], set[Node]]:
    """Return the members of `starts` that are met going back from another one, and those from which one is met."""
    given = {node for node in starts if node is not None}
    consumers = consumers_behind(given)
    met = {node for node in given if node in consumers}
    return met, ahead(met, consumers) & given


@dataclass(frozen=True)
class Graph:
    """Parts of a graph that may make a derivative wrong.

    Attributes:
        functions: Names of the autograd Functions in it that are not PyTorch's own.
        heads: Whether there are some between the loss and its outputs.
        has_hooks: Whether hooks may change gradients.
        eps: Rounding unit of the coarsest precision in it.
        is_nested: Whether there are nested tensors. Default False.
    """

    functions: tuple[str, ...]
    heads: bool
    has_hooks: bool
    eps: float
    is_nested: bool = False

    @property
    def is_foreign(self) -> bool:
        """Whether it holds code that is not PyTorch's."""
        return bool(self.functions) or self.has_hooks

    def named(self, before: str, otherwise: str = "") -> str:
        """Return the functions' names after some words, or other words if there are none."""
        return f"{before}{', '.join(self.functions)}" if self.functions else otherwise


def look_through(loss: Tensor, outputs: Iterable[Tensor], eps: float) -> Graph:
    """Return the parts of a loss's graph that may make a derivative wrong.

    Args:
        loss: The live loss.
        outputs: The recorded outputs that it is computed from.
        eps: The least rounding unit to report.
    """
    nodes = list(behind(loss.grad_fn))
    functions = tuple(dict.fromkeys(name for node in nodes if (name := _foreign(node)) is not None))
    hooked = any(node.name() == "BackwardHookFunctionBackward" for node in nodes)  # a module's full backward hooks
    eps = max([eps, *(unit for node in nodes for unit in _units(node))])
    if loss.device.type == "cuda" and rounds_to_tf32(nodes):
        eps = max(eps, _TF32)
    barrier = {z.grad_fn for z in outputs if z.grad_fn is not None}
    heads = bool(functions and barrier) and reaches(loss.grad_fn, lambda node: _foreign(node) is not None, barrier)
    is_nested = any(of.is_nested_tensor for node in nodes for of in node._input_metadata)
    return Graph(functions, heads, hooked, eps, is_nested)


def _foreign(node: Any) -> str | None:
    """Return the name of an autograd Function that is not PyTorch's own; None for another node."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        own: str = function.__name__
        return None if function.__module__.startswith("torch.") else own
    name: str = node.name()
    return name if "CppNode" in name else None


def rounds_to_tf32(nodes: Sequence[Node]) -> bool:
    """Return whether a GPU may round float32 factors of the products or convolutions of these nodes to TensorFloat-32.

    By default cuDNN convolves in it.
    """
    if not any(of.dtype == torch.float32 for node in nodes for of in node._input_metadata):
        return False
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
        convolves = any(kind_of(node).startswith(("Conv", "Cudnn")) for node in nodes)
        return convolves and torch.backends.cudnn.allow_tf32
    except RuntimeError:  # several precisions were set, one for each kind of operation
        return True


# Rounding unit of TensorFloat-32.
_TF32 = 2.0**-11


def kind_of(node: Node) -> str:
    """Return torch's name for the operation of a node; empty for a custom Function, which may have any name."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return "Copy" if node.name() == "torch::autograd::CopyBackwards" else match[1] if match else ""


def notes(node: Any) -> dict[str, Any]:
    """Return the dictionary that lives as long as the node: notes in it keep no graph alive that nobody else keeps."""
    found: dict[str, Any] = node.metadata
    return found


class SavedTensors:
    """The tensors that graphs made from now on save, so that they can be let go as `backward` does, without one."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[Held]] = []

    def pack(self, tensor: Tensor) -> Held:
        """Return a holder of a tensor that a node saves."""
        # A node is numbered just before it saves its tensors.
        held = Held(tensor, torch._C._autograd._get_sequence_nr() - 1)
        self._held.append(weakref.ref(held))
        return held

    def release(self, term: Tensor) -> None:
        """Let go of the tensors that the graph of `term` saved."""
        numbers = {node._sequence_nr() for node in behind(term.grad_fn)}
        alive = [(ref, held) for ref in self._held if (held := ref()) is not None]
        for _, held in alive:
            if held.number in numbers:
                held.tensor = None
        self._held = [ref for ref, held in alive if held.tensor is not None]


class Held:
    """A tensor that a node saved, which can be taken from it.

    Args:
        tensor: The tensor.
        number: Number of the node.
    """

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
