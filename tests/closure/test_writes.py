"""Tensors that a closure writes to, where the graph of its loss keeps them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from keepers import content
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, hessian
from newtonopt.closure.writes import Memory, Writes, WriteTap


def test_inputs_that_a_closure_makes_leaves_are_not_written_to() -> None:
    """A physics-informed network does this with its collocation points in each run."""
    x, layer = torch.rand(6, 1), nn.Linear(1, 1)

    def closure() -> Tensor:
        points = x.requires_grad_()
        u = layer(points).tanh()
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return F.mse_loss(slope, torch.ones(6, 1))

    evaluation = evaluate(closure, layer.parameters(), products="cached")
    assert torch.isfinite(hessian(evaluation) @ torch.ones(2)).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["in place", "data", "assigned"])
def test_a_network_in_the_graph_that_the_closure_writes_to(when: str, how: str) -> None:
    """A target network through which the loss is differentiated, as an actor's is by its critic."""
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    critic, online = (nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double() for _ in range(2))
    critic.requires_grad_(False)
    online.requires_grad_(False)
    x = torch.randn(7, 3).double()

    def update(network: nn.Module) -> None:
        for q, p in zip(network.parameters(), online.parameters(), strict=True):
            if how == "assigned":
                q.data = 0.5 * q.data + 0.5 * p.data
            else:
                (q.data if how == "data" else q).mul_(0.5).add_(p, alpha=0.5)

    def closure() -> Tensor:
        actor.zero_grad()
        if when == "before":
            update(critic)
        loss = (critic(actor(x)) - 1).square().mean()
        loss.backward()
        if when == "after":
            update(critic)
        return loss

    start, fixed = copy.deepcopy(critic), copy.deepcopy(critic)
    if when == "before":
        update(fixed)
    truth = hessian(evaluate(lambda: (fixed(actor(x)) - 1).square().mean(), actor.parameters())).dense()
    evaluation = evaluate(closure, actor.parameters())
    torch.testing.assert_close(hessian(evaluation).dense(), truth)
    assert content(critic) == content(start)
    twin = copy.deepcopy(start)
    HessianFree(actor.parameters()).step(closure)
    update(twin)
    assert content(critic) == content(twin)
    if evaluation.form == "streamed":
        with pytest.raises(RuntimeError, match=r"writes in place to a tensor that its loss is computed from.*streamed"):
            evaluate(closure, actor.parameters(), products="cached")


def test_a_run_under_the_write_tap_is_taken_back() -> None:
    kept, own = torch.ones(3), torch.zeros(2)
    writes = Writes(Memory([kept], []))
    with WriteTap(writes):
        kept.add_(1.0)
        torch.mul(kept, 2.0, out=kept)
        own.add_(1.0)
    writes.swap()
    assert kept.tolist() == [1.0] * 3
    assert own.tolist() == [1.0] * 2, "it is not among the tensors"
