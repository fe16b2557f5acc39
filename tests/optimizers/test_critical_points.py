"""Points without a gradient: saddles are left, minima recognised once and left alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS
from torch import Tensor

from newtonopt.optimizers.base import NewtonOptimizer

ESCAPING = {
    name: build
    for name, build in OPTIMIZERS.items()
    if "gauss_newton" not in name and "free" not in name and name != "newton_cg_nystrom"
}


def closure_of(optimizer: NewtonOptimizer, theta: Tensor, sign: float) -> Tensor:
    optimizer.zero_grad()
    loss = theta[0] ** 2 + sign * theta[1] ** 2 + theta[1] ** 4 + theta[2:].square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("name", ESCAPING)
def test_a_strict_saddle_is_left(name: str) -> None:
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = ESCAPING[name]([theta])
    state = torch.get_rng_state()
    for _ in range(3):  # a trust region may have to shrink first
        optimizer.step(lambda: closure_of(optimizer, theta, -1.0))
        report = optimizer.last_step
        assert report is not None
        if report.accepted:
            break
    assert report.accepted
    assert report.reason == "the gradient is zero: left along negative curvature"
    assert report.trial_loss < 0
    for _ in range(60):
        optimizer.step(lambda: closure_of(optimizer, theta, -1.0))
    assert float(theta.detach()[1].abs()) == pytest.approx(0.5**0.5, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ESCAPING)
def test_a_minimum_is_recognised_once(name: str) -> None:
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = ESCAPING[name]([theta])
    seen = []
    for _ in range(3):
        optimizer.step(lambda: closure_of(optimizer, theta, 1.0))
        assert optimizer.last_step is not None
        assert "the gradient is zero, and no negative curvature was found" in optimizer.last_step.reason
        seen.append(optimizer.last_step.products)
    assert seen[0] > 0
    assert seen[1:] == [0, 0]
    assert not theta.any()
    with torch.no_grad():
        theta[0] = 1.0
    optimizer.step(lambda: closure_of(optimizer, theta, 1.0))
    assert optimizer.last_step.accepted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tolerances_leave_the_parameters_alone(name: str) -> None:
    for tolerance, words in (("tolerance_gradient", "no entry of the gradient"), ("tolerance_step", "no entry of the")):
        theta = torch.full((3,), 1e-4, dtype=torch.float64, requires_grad=True)
        start = theta.detach().clone()

        def closure(theta: Tensor = theta) -> Tensor:
            theta.grad = None
            loss = torch.nn.functional.mse_loss(theta, torch.zeros_like(theta))
            loss.backward()
            return loss

        for value, moves in ((1e-2, False), (1e-9, True)):
            optimizer = OPTIMIZERS[name]([theta], **{tolerance: value})
            optimizer.step(closure)
            assert optimizer.last_step is not None
            assert optimizer.last_step.accepted is moves
            assert torch.equal(theta, start) is not moves
            assert moves or (words in optimizer.last_step.reason and tolerance in optimizer.last_step.reason)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", ESCAPING)
def test_a_loss_whose_gradient_has_no_square_in_float32_is_to_be_scaled(name: str, scale: float) -> None:
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = ESCAPING[name]([theta])

    def closure() -> Tensor:
        theta.grad = None
        loss = scale * F.mse_loss(theta, torch.zeros(2))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert re.search("(multiply|divide) the loss by a constant", optimizer.last_step.reason)
    assert theta.tolist() == [1.0, 2.0]
