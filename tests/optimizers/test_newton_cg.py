"""NewtonCG alone: superlinear convergence, negative curvature followed, both line searches."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build as build_case
from problems import logistic_gradient_norms
from torch import Tensor, nn

from newtonopt import NewtonCG

SEARCHES = pytest.mark.parametrize("line_search", ["armijo", "strong_wolfe"])


def test_the_step_is_newtons_where_it_is_solved_to_the_end() -> None:
    case = build_case("linear", "mse")
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    optimizer = NewtonCG(case.params, weight_decay=1.0)
    for _ in range(12):
        optimizer.step(case.closure)
    A = case.dense_hessian() + torch.eye(len(g), dtype=g.dtype)
    torch.testing.assert_close(case.flat(), start - torch.linalg.solve(A, g + start), rtol=1e-8, atol=1e-8)


@SEARCHES
def test_convergence_is_superlinear(line_search: str) -> None:
    norms = logistic_gradient_norms(NewtonCG, 12, rows=60, columns=8, line_search=line_search)
    factors = [b / a for a, b in pairwise(norms) if b > 1e-13]
    assert factors[-1] < 0.02 * factors[0]
    assert norms[-1] < 1e-12


def saddle(theta: Tensor) -> Tensor:
    return theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4


@SEARCHES
@pytest.mark.parametrize("start", [[1.0, 1e-3], [1.0, 0.0], [0.0, 0.0], [0.0, 1e-30]])
def test_negative_curvature_is_followed_downhill(line_search: str, start: list[float]) -> None:
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta], line_search=line_search)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = saddle(theta)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(15)]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    torch.testing.assert_close(theta.detach().abs(), torch.tensor([0.0, 0.5**0.5]).double(), atol=1e-7, rtol=0)


def test_a_step_along_negative_curvature_is_doubled_while_that_helps() -> None:
    theta = torch.tensor([1e-3], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theta.cos().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and report.reason == "negative curvature"
    # Newton's step on the absolute curvature is 1e-3: eleven doublings lead to the minimum's neighbourhood.
    assert report.trials > 10
    assert abs(theta.item() - math.pi) < 1.5
    assert report.predicted_decrease == pytest.approx(
        math.sin(1e-3) * report.step_norm + math.cos(1e-3) * report.step_norm**2 / 2, rel=1e-9
    )


def test_trials_are_bounded() -> None:
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    for line_search in ("armijo", "strong_wolfe"):
        optimizer = NewtonCG([theta], max_trials=4, line_search=line_search)  # type: ignore[arg-type]

        def closure() -> Tensor:
            theta.grad = None
            loss = (theta.square() + (0.0 if theta.item() == 1.0 else 100.0)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert (optimizer.last_step.trials, optimizer.last_step.accepted) == (4, False)
        assert theta.item() == 1.0


def test_strong_wolfe_meets_both_conditions() -> None:
    """On `sqrt(1 + x^2)` Newton's step `-x (1 + x^2)` overshoots: halving it need not level the slope off."""
    theta = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta], line_search="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 + theta.square()).sqrt().sum()
        loss.backward()
        return loss

    first = float(optimizer.step(closure))
    slope = 3 / math.sqrt(10)
    report = optimizer.last_step
    assert report is not None and report.accepted and report.trials > 1
    assert report.trial_loss <= first - 1e-4 * slope * report.step_norm
    x = theta.item()
    assert abs(x / math.sqrt(1 + x * x)) <= 0.9 * slope


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_sketch_saves_iterations_and_changes_no_solution(curvature: Any) -> None:
    """A quadratic with a few large eigenvalues, to its minimum with and without the sketch."""
    torch.manual_seed(0)
    X = torch.randn(120, 60).double() * torch.cat([torch.logspace(2, 1, 15), torch.ones(45)]).double()
    y = torch.randn(120, 1).double()
    exact = torch.linalg.lstsq(X, y).solution[:, 0]
    iterations, products = {}, {}
    for preconditioner in ("nystrom", None):
        layer = nn.Linear(60, 1, bias=False).double()
        nn.init.zeros_(layer.weight)
        optimizer = NewtonCG(layer.parameters(), curvature=curvature, preconditioner=preconditioner, rank=20)
        iterations[preconditioner] = products[preconditioner] = 0
        norm = 1.0
        while norm > 1e-8:
            optimizer.step(lambda layer=layer: F.mse_loss(layer(X), y))
            assert optimizer.last_step is not None and optimizer.last_step.accepted
            norm = optimizer.last_step.gradient_norm
            iterations[preconditioner] += optimizer.last_step.iterations
            products[preconditioner] += optimizer.last_step.products
        torch.testing.assert_close(layer.weight[0].detach(), exact, rtol=1e-5, atol=1e-7)
    # With the Hessian, negative curvature is searched for once, where the loss no longer tells a decrease.
    searches = (0, 60) if curvature == "hessian" else (0,)
    assert products[None] - iterations[None] in searches
    assert products["nystrom"] - iterations["nystrom"] - (20 if curvature == "gauss_newton" else 40) in searches
    assert iterations["nystrom"] < 0.5 * iterations[None]


def test_negative_curvature_is_followed_with_a_sketch() -> None:
    torch.manual_seed(0)
    weights = torch.linspace(-1, 3, 12).double()
    theta = (0.1 * torch.randn(12).double()).requires_grad_()
    optimizer = NewtonCG([theta], preconditioner="nystrom", rank=4)
    reasons = set()
    for _ in range(40):
        optimizer.step(lambda: (weights * theta**2 + 0.25 * theta**4).sum())
        assert optimizer.last_step is not None
        reasons.add(optimizer.last_step.reason)
    assert "negative curvature" in reasons
    lowest = (-2 * weights.clamp(max=0)).sqrt()
    torch.testing.assert_close(theta.detach().abs(), lowest, rtol=0, atol=1e-5)


def flat_problem(name: str) -> tuple[nn.Module, Any]:
    """A convex loss, flat or linear where it starts: the module and what computes it."""
    torch.manual_seed(0)
    x, layer = torch.randn(200, 5), nn.Linear(5, 1)
    if name == "root":
        layer = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(layer.weight, 1e4)
        return layer, lambda: (1 + layer.weight.square()).sqrt().sum()
    if name.startswith("huber"):
        y = x @ torch.randn(5, 1) * 30
        if name == "huber64":
            x, y, layer = x.double(), y.double(), layer.double()
        return layer, lambda: F.huber_loss(layer(x), y)
    if name == "logistic":
        y = (torch.rand(200, 1) < 0.5).float()
        nn.init.normal_(layer.weight, std=500.0)
        return layer, lambda: F.binary_cross_entropy_with_logits(layer(x), y)
    y = torch.poisson(torch.exp(x[:, :1]))
    nn.init.constant_(layer.bias, -20.0)
    return layer, lambda: F.poisson_nll_loss(layer(x), y)


@SEARCHES
@pytest.mark.parametrize("name", ["huber", "huber64", "root", "logistic", "poisson"])
def test_flat_and_linear_parts_are_crossed(name: str, line_search: str) -> None:
    """There the curvature is zero or rounding, and Newton's step too long by any factor."""
    layer, loss_of = flat_problem(name)
    optimizer = NewtonCG(layer.parameters(), line_search=line_search)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_of()
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and report.gradient_norm < 1e-3


@SEARCHES
def test_a_refused_step_is_not_repeated(line_search: str) -> None:
    """With two trials Newton's step of 1e12 is refused again and again, each time a shorter one, also when resumed."""
    theta = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta], max_trials=2, line_search=line_search)  # type: ignore[arg-type]

    def closure() -> Tensor:
        theta.grad = None
        loss = (1 + theta.square()).sqrt().sum()
        loss.backward()
        return loss

    predicted = []
    for _ in range(4):
        optimizer.step(closure)
        report = optimizer.last_step
        assert report is not None and not report.accepted and theta.item() == 1e4
        predicted.append(report.predicted_decrease)
        resumed = NewtonCG([theta], max_trials=2, line_search=line_search)  # type: ignore[arg-type]
        resumed.load_state_dict(optimizer.state_dict())
        optimizer = resumed
    assert all(0 < later < earlier for earlier, later in pairwise(predicted))
    for _ in range(5):
        optimizer.step(closure)
    assert abs(theta.item()) < 1e4


@SEARCHES
def test_curvature_that_is_rounding_sets_no_step(line_search: str) -> None:
    """Beside a quadratic entry one of slope one: what is left of `p'Ap` is 1e-300 or so."""
    theta = torch.tensor([1e-5, 30.0], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta], line_search=line_search)  # type: ignore[arg-type]

    def closure() -> Tensor:
        theta.grad = None
        loss = theta[0] ** 2 + F.huber_loss(theta[1:], torch.zeros(1).double())
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert closure().item() < 1e-12
