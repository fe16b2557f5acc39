"""A closure may keep state in every way that Python has: a step leaves what one run leaves, a measurement nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from keepers import KEEPERS, content, make
from problems import unseen
from torch import Tensor, nn

from newtonopt import DampedNewton, HessianFree, evaluate, hessian
from newtonopt.curvature import measure

KEPT = pytest.mark.parametrize("name", KEEPERS)


class Training:
    """A network, a keeper, and a closure whose loss depends on what the keeper draws."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 2)).double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        self.keeper = make(name)
        self.drawn: Callable[[], list[float]] = unseen([])

    def closure(self) -> Tensor:
        self.model.zero_grad()
        number = self.keeper.draw()
        self.drawn().append(number)
        loss = F.mse_loss((1 + 0.1 * number) * self.model(self.x), self.y)
        loss.backward()
        return loss


@KEPT
@pytest.mark.parametrize("kind", [HessianFree, DampedNewton])
def test_a_step_leaves_what_one_run_leaves_and_trials_repeat_it(kind: Any, name: str) -> None:
    once = Training(name)
    for _ in range(3):
        once.closure()
    expected, drawn = content(once.keeper.state()), once.drawn()
    assert len(set(drawn)) > 1, "a keeper draws other numbers each time"
    training = Training(name)
    optimizer = kind(training.model.parameters())
    for step in range(3):
        training.drawn().clear()
        optimizer.step(training.closure)
        assert len(training.drawn()) > 1, "trials run the closure"
        assert set(training.drawn()) == {drawn[step]}
    assert content(training.keeper.state()) == expected


@KEPT
def test_a_measurement_leaves_no_trace(name: str) -> None:
    training = Training(name)
    training.closure()
    before = content(training.keeper.state())
    H = hessian(evaluate(training.closure, training.model.parameters(), products="streamed"))
    training.drawn().clear()
    H @ torch.ones(H.shape[1], dtype=torch.float64)
    measure(training.closure, training.model.parameters(), top=1, bottom=0, max_products=2)
    assert len(set(training.drawn())) == 1
    assert content(training.keeper.state()) == before


@KEPT
def test_a_closure_that_raises_takes_its_state_back(name: str) -> None:
    training = Training(name)
    before = content(training.keeper.state())

    def failing() -> Tensor:
        training.closure()
        raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        HessianFree(training.model.parameters()).step(failing)
    assert content(training.keeper.state()) == before
