"""Routes from operands to the parameters behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from newtonopt.autodiff.routes import cost_behind, leaves_of, pulled_back, route_to, viewed
from newtonopt.autodiff.samples import Edge

D = torch.float64


def numbers(*shape: int, shift: float = 0.0) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=D) ** 2 + shift).view(shape)


def edge_of(t: Tensor) -> Edge:
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def test_leaves_are_numbered() -> None:
    params = [numbers(2).requires_grad_() for _ in range(3)]
    assert leaves_of(params) == {get_gradient_edge(p).node: i for i, p in enumerate(params)}


View = Callable[[Tensor], Tensor]

VIEWS: dict[str, View] = {
    "itself": lambda w: w,
    "transpose": lambda w: w.mT,
    "transpose of a transpose": lambda w: w.mT.mT,
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "transpose by names of dimensions": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "view": lambda w: w.view(2, 6),
    "flat": lambda w: w.reshape(-1),
    "view of a transpose": lambda w: w.T.unsqueeze(0),
    "reshaped transpose, which is a clone": lambda w: w.T.reshape(2, 6),
    "three dimensions permuted": lambda w: w.view(3, 2, 2).permute(2, 0, 1),
    "unsqueezed": lambda w: w[:, None].squeeze(1),
    "view as": lambda w: w.view_as(w),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_route_through_views(name: str) -> None:
    """Whatever is put at the operand arrives at the parameter as autograd would put it there."""
    other, w = numbers(2).requires_grad_(), numbers(3, 4).requires_grad_()
    operand = VIEWS[name](w)
    route = route_to(edge_of(operand), leaves_of([other, w]))
    assert route is not None and route.number == 1
    g = numbers(*operand.shape, shift=1.0)
    found = g.mT.reshape(-1) if route.is_transposed else g.reshape(-1)
    if route.order is not None:
        found = found[route.order]
    (true,) = torch.autograd.grad(operand, w, g)
    assert torch.equal(found, true.reshape(-1))


@pytest.mark.parametrize(
    ("name", "transposed", "ordered"),
    [("itself", False, False), ("T", True, False), ("transpose of a transpose", False, False), ("view", False, False)]
    + [("permute", True, False), ("three dimensions permuted", False, True)],
)
def test_factors_keep_their_form_through_transposes(name: str, transposed: bool, ordered: bool) -> None:
    w = numbers(3, 4).requires_grad_()
    route = route_to(edge_of(VIEWS[name](w)), leaves_of([w]))
    assert route is not None
    assert (route.is_transposed, route.order is not None) == (transposed, ordered)


@pytest.mark.parametrize(
    "function",
    [lambda w: 2 * w, lambda w: w[1:], lambda w: w.expand(2, 3, 4), lambda w: torch.cat([w, w]), lambda w: w.exp().T],
)
def test_other_functions_have_no_route(function: View) -> None:
    w = numbers(3, 4).requires_grad_()
    operand = edge_of(function(w))
    assert route_to(operand, leaves_of([w])) is None
    assert cost_behind(operand, leaves_of([w])) > 0


@pytest.mark.parametrize("name", VIEWS)
def test_entries_of_a_view_in_the_order_of_what_it_shows(name: str) -> None:
    w = numbers(3, 4).requires_grad_()
    h = w * 1
    z = VIEWS[name](h)
    found = viewed(z)
    assert found.shape == h.shape and torch.equal(z.reshape(-1)[found], h)
    part = h[1:]
    assert torch.equal(viewed(part), torch.arange(8).view(2, 4))


def test_another_parameter_has_no_route() -> None:
    w = numbers(3, 4).requires_grad_()
    assert route_to(edge_of(w.T), leaves_of([numbers(2).requires_grad_()])) is None


def test_passes_back_through_more_cost_more() -> None:
    w = numbers(3, 4).requires_grad_()
    leaves = leaves_of([w])
    assert cost_behind(edge_of(w.T), leaves) == 0
    once, twice = w.exp(), w.exp().sin()
    assert 0 < cost_behind(edge_of(once), leaves) < cost_behind(edge_of(twice), leaves)


class Single(torch.autograd.Function):
    """Twice the argument; the derivative takes no batches."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(2 * g.numpy())


@pytest.mark.parametrize(
    "function",
    [
        lambda u, v: u @ v,
        lambda u, v: torch.cat([u, v.T]),
        lambda u, v: u * u.exp(),
        lambda u, v: u / u.norm(dim=1, keepdim=True),
        lambda u, v: torch.complex(u, u.sin()),
        lambda u, v: Single.apply(u).sin(),
        lambda u, v: torch.linalg.qr(u @ v)[0],
    ],
)
@pytest.mark.parametrize("count", [1, 5])
def test_rows_are_pulled_back_as_by_autograd(
    function: Callable[[Tensor, Tensor], Tensor], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, v, other = numbers(3, 2).requires_grad_(), numbers(2, 3).requires_grad_(), numbers(1).requires_grad_()
    operand = function(u, v)
    rows = numbers(count, operand.numel()).to(operand.dtype)
    for size in (2**27, 1):  # one batch, and one row at a time
        monkeypatch.setattr("newtonopt.autodiff.routes._BATCH_BYTES", size)
        found = dict(pulled_back(edge_of(operand), rows, leaves_of([u, other, v])))
        for number, p in ((0, u), (2, v)):
            true = [
                torch.autograd.grad(operand, p, row.view(operand.shape), retain_graph=True, allow_unused=True)[0]
                for row in rows
            ]
            if number not in found:
                assert true == [None] * count
                continue
            torch.testing.assert_close(found[number], torch.stack([g for g in true if g is not None]).flatten(1))
        assert 1 not in found
