"""Walks through autograd graphs, and letting go of what they hold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable

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
    """What the gradients take that the nodes met going back from `start` are handed, all taken together."""
    total = 0

    def add(node: Node) -> bool:
        nonlocal total
        total += sum(math.prod(of.shape) * of.dtype.itemsize for of in node._input_metadata)
        return False

    reaches(start, add)
    return total


def reached(start: Node | None, nodes: set[Node | None]) -> set[Node]:
    """Those of `nodes` that are met going back from `start`."""
    met: set[Node] = set()

    def note(node: Node) -> bool:
        if node in nodes:
            met.add(node)
        return False

    if nodes:
        reaches(start, note)
    return met


class SavedTensors:
    """What the graphs made since hold on to, so that it can be let go as `backward` would do, without running one."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[Held]] = []

    def pack(self, tensor: Tensor) -> Held:
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
        if self.tensor is None:
            raise RuntimeError(
                "The closure differentiates a graph a second time after loss.backward() freed it: call "
                "loss.backward(retain_graph=True)."
            )
        return self.tensor
