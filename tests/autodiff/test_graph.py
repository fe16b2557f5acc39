"""Walks through small graphs whose nodes are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newtonopt.autodiff.graph import (
    Graph,
    SavedTensors,
    ahead,
    all_behind,
    behind,
    bytes_handed_on,
    chained,
    coarsest,
    consumers_behind,
    first_met,
    look_through,
    notes,
    reached,
    reaches,
    rounds_to_tf32,
)


class Diamond:
    """`loss = sum(left + right)`, both computed from `top = exp(x)`."""

    def __init__(self) -> None:
        self.x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        self.top = self.x.exp()
        self.left, self.right = self.top.sin(), self.top.cos()
        self.total = self.left + self.right
        self.loss = self.total.sum()

    def nodes(self, *names: str) -> set[Any]:
        return {getattr(self, name).grad_fn for name in names}


def test_every_node_is_met_once_and_none_behind_a_barrier() -> None:
    graph = Diamond()
    met = sorted(node.name().replace("Backward0", "") for node in behind(graph.loss.grad_fn))
    assert met == ["Add", "Cos", "Exp", "Sin", "Sum", "torch::autograd::AccumulateGrad"]
    assert len(all_behind([graph.loss.grad_fn, graph.left.grad_fn, None])) == 6
    left, right = graph.left.grad_fn, graph.right.grad_fn
    assert not reaches(graph.loss.grad_fn, lambda node: node is graph.top.grad_fn, {left, right})
    assert reaches(graph.loss.grad_fn, lambda node: node is graph.top.grad_fn, {left})
    assert list(behind(None)) == [] and not reaches([None], lambda node: True)


def test_which_of_some_nodes_are_met() -> None:
    graph = Diamond()
    some = graph.nodes("left", "top")
    assert reached(graph.loss.grad_fn, some) == some
    assert reached(graph.right.grad_fn, some) == graph.nodes("top")
    assert first_met(graph.left.grad_fn, some) == graph.nodes("left")
    # The path through `right` passes no other of them.
    assert first_met(graph.loss.grad_fn, some) == some
    assert first_met(graph.loss.grad_fn, graph.nodes("total", "top")) == graph.nodes("total")
    assert first_met(None, some) == set()


def test_starts_that_lie_behind_one_another() -> None:
    graph = Diamond()
    behind_others, before_others = chained([graph.left.grad_fn, graph.top.grad_fn, graph.right.grad_fn])
    assert behind_others == graph.nodes("top")
    assert before_others == graph.nodes("left", "right")


def test_bytes_and_rounding_of_the_gradients_handed_on() -> None:
    graph = Diamond()
    # A scalar to the sum, four numbers to each of four nodes, and to the leaf.
    assert bytes_handed_on([graph.loss.grad_fn]) == 8 * (1 + 4 * 5)
    assert coarsest([graph.loss.grad_fn], 0.0) == torch.finfo(torch.float64).eps
    mixed = (graph.total.float() * 2).sum()
    assert coarsest([mixed.grad_fn], 0.0) == torch.finfo(torch.float32).eps
    assert coarsest([mixed.grad_fn], 0.5) == 0.5


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_foreign_code_in_a_graph_is_named() -> None:
    x = torch.ones(3, requires_grad=True)
    eps = torch.finfo(torch.float32).eps
    assert look_through(x.exp().sum(), [], eps) == Graph((), False, False, eps)
    z = Own.apply(x)
    below = look_through(z.exp().sum(), [z.exp()], eps)
    assert below.functions == ("Own",) and below.is_foreign
    out = x.exp()
    above = look_through(Own.apply(out).sum(), [out], eps)
    assert above.heads and not look_through(z.sum(), [z], eps).heads
    assert above.named("through ") == "through Own" and Graph((), False, False, eps).named("x", "none") == "none"
    layer = nn.Linear(3, 1)
    layer.register_full_backward_hook(lambda *_: None)
    assert look_through(layer(x).sum(), [], eps).has_hooks


def test_notes_go_with_their_node() -> None:
    graph = Diamond()
    notes(graph.left.grad_fn)["seen"] = 1
    assert notes(graph.left.grad_fn) == {"seen": 1}


def test_saved_tensors_are_let_go_by_graph() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    saved = SavedTensors()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.unpack()):
        first, second = x.sin().sum(), x.cos().sum()
    saved.release(first)
    with pytest.raises(RuntimeError, match="a second time after"):
        torch.autograd.grad(first, x)
    torch.testing.assert_close(torch.autograd.grad(second, x)[0], -x.detach().sin())


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("dtype", "convolves", "matmul", "cudnn", "rounds"),
    [
        (torch.float32, False, "highest", True, False),
        (torch.float32, True, "highest", True, True),
        (torch.float32, True, "highest", False, False),
        (torch.float32, False, "high", False, True),
        (torch.float64, True, "high", True, False),
    ],
)
def test_tensor_float_32_matters_to_float32_products_and_convolutions(
    dtype: torch.dtype, convolves: bool, matmul: str, cudnn: bool, rounds: bool
) -> None:
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    layer = nn.Conv1d(2, 3, 2) if convolves else nn.Linear(4, 3)
    loss = layer.to(dtype)(torch.ones(5, 2, 4, dtype=dtype)).sum()
    assert rounds_to_tf32(list(behind(loss.grad_fn))) is rounds


def test_what_is_ahead_of_a_node_is_what_is_computed_from_it() -> None:
    w = torch.ones(2, requires_grad=True)
    square, double = w.square(), 2 * w
    total = (square + w).sum() + double.sum()
    consumers = consumers_behind([total.grad_fn])
    (node,) = (n for n in behind(total.grad_fn) if n is square.grad_fn)
    found = ahead([node], consumers)
    assert total.grad_fn in found and double.grad_fn not in found and node not in found
    leaf = node.next_functions[0][0]
    assert leaf is not None and ahead([leaf], consumers) == set(behind(total.grad_fn)) - {leaf}
    assert ahead([], consumers) == set()
