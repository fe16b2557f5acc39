"""Points without a gradient: saddles are left, minima recognised once and left alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from optimizer_db import GAUSS_NEWTON, OPTIMIZERS
from torch import Tensor

from newtonopt.optimizers import escape
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.solvers.lanczos import negative_curvature

ESCAPING = {
    name: build
    for name, build in OPTIMIZERS.items()
    if name not in GAUSS_NEWTON and "free" not in name and name != "newton_cg_nystrom"
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


def sums(x: Tensor) -> Tensor:
    """Four unknowns with given sums of their powers: with equal entries a saddle, and the gradient keeps them equal."""
    return sum((x.pow(k).sum() - b) ** 2 for k, b in enumerate((8.0, 18.0, 44.0, 114.0), 1))


def network(x: Tensor) -> Tensor:
    """Units that begin alike stay alike."""
    t = torch.linspace(-2, 2, 20, dtype=x.dtype)[:, None]
    return ((t * x[:3] + x[3:6]).tanh() @ x[6:] - (2 * t[:, 0]).sin() - 0.5).square().mean()


SYMMETRIC = {"sums": (sums, [0.7] * 4, 1e-1), "network": (network, [0.5] * 3 + [0.1] * 3 + [0.2] * 3, 0.3)}
SEARCHING = {
    name: build for name, build in OPTIMIZERS.items() if name not in GAUSS_NEWTON and name != "newton_cg_nystrom"
}


@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        ("sums", torch.float64),
        pytest.param("sums", torch.float32, marks=pytest.mark.slow),
        pytest.param("network", torch.float64, marks=pytest.mark.slow),
        pytest.param("network", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", SEARCHING)
def test_a_saddle_reached_along_a_symmetry_is_left(name: str, problem: str, dtype: torch.dtype) -> None:
    value, start, low = SYMMETRIC[problem]
    x = torch.tensor(start, dtype=dtype, requires_grad=True)
    settings = {"curvature": "hessian"} if "free" in name else {}
    optimizer = SEARCHING[name]([x], **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value(x)
        loss.backward()
        return loss

    for _ in range(150):
        optimizer.step(closure)
        if optimizer.last_step.loss < low:
            break
    assert optimizer.last_step.loss < low


@pytest.mark.parametrize("steps_per_call", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SEARCHING)
def test_a_minimum_costs_one_search(name: str, steps_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(escape, "negative_curvature", lambda *args: (searches.append(1), negative_curvature(*args))[1])
    x = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64, requires_grad=True)
    settings = {"curvature": "hessian"} if "free" in name else {}
    optimizer = SEARCHING[name]([x], steps_per_call=steps_per_call, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.cosh().sum() + x.sum().square() + x[0] * x[1]
        loss.backward()
        return loss

    for _ in range(60 // steps_per_call):
        optimizer.step(closure)
    assert optimizer.last_step.gradient_norm < 1e-7
    assert len(searches) == 1
