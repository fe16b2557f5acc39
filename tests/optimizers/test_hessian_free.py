"""HessianFree alone: its steps against dense solves, negative curvature, backtracking, the sketch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from problems import build as build_case
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton
from newtonopt.optimizers.hessian_free import best_start
from newtonopt.solvers.cg import conjugate_gradients


@pytest.mark.parametrize("preconditioner", ["nystrom", "empirical_fisher", None])
def test_the_step_solves_the_damped_system(preconditioner: str | None) -> None:
    case = build_case("mlp", "mse")
    evaluation = evaluate(case.closure, case.params)
    G, g = gauss_newton(evaluation).dense(), evaluation.gradient
    start = case.flat()
    exact = -torch.linalg.solve(G + 0.3 * torch.eye(len(g), dtype=g.dtype), g)
    optimizer = HessianFree(case.params, damping=0.3, preconditioner=preconditioner, progress_tolerance=0.0)
    optimizer.step(case.closure)
    report = optimizer.last_step
    assert report is not None
    # Backtracking may prefer an iterate just before the last.
    assert float((case.flat() - start - exact).norm() / exact.norm()) < 1e-4
    assert report.predicted_decrease == pytest.approx(
        -float(g @ exact + exact @ G @ exact / 2), rel=1e-6
    )  # of the undamped model


def test_linear_least_squares_is_solved_as_the_damping_vanishes() -> None:
    torch.manual_seed(0)
    X, y = torch.randn(50, 5).double(), torch.randn(50, 1).double()
    layer = nn.Linear(5, 1).double()
    optimizer = HessianFree(layer.parameters(), damping_factor=10.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(layer(X), y)
        loss.backward()
        return loss

    for _ in range(15):
        optimizer.step(closure)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(50, 1).double()], 1), y).solution[:, 0]
    torch.testing.assert_close(torch.cat([layer.weight[0], layer.bias]).detach(), solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("preconditioner", ["nystrom", None])
def test_negative_curvature_is_followed_off_a_saddle(preconditioner: str | None) -> None:
    """x^2 - y^2 + y^4 near its saddle: the gradient points along x, and only curvature along y leads to a minimum (y^2
    = 1/2).
    """
    theta = torch.tensor([1.0, 1e-3], dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree([theta], curvature="hessian", damping=0.1, preconditioner=preconditioner)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4
        loss.backward()
        return loss

    reasons = []
    for _ in range(30):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        reasons.append(optimizer.last_step.reason)
    assert "negative curvature" in reasons
    torch.testing.assert_close(theta.detach().abs(), torch.tensor([0.0, 0.5**0.5]).double(), atol=1e-5, rtol=0)


def test_a_worse_last_iterate_is_walked_back() -> None:
    """The trial losses favour short steps: an earlier iterate of conjugate gradients is taken, not the last."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -4, 30).double()
    theta = torch.ones(30, dtype=torch.float64, requires_grad=True)
    start = theta.detach().clone()

    def closure() -> Tensor:
        theta.grad = None
        moved = theta.detach() - start
        loss = F.mse_loss(scale * theta, torch.zeros(30).double(), reduction="sum") + 10 * float(moved.norm() > 3.0)
        loss.backward()
        return loss

    optimizer = HessianFree([theta], damping=1e-9, preconditioner=None, progress_tolerance=0.0)
    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and report.accepted
    assert report.step_norm <= 3.0
    assert report.trials > 2
    assert report.ratio > 0


def test_a_rejected_proposal_is_solved_again_with_the_raised_damping() -> None:
    """Within a radius the loss is a quadratic, and beyond it infinite: only a strongly damped step stays inside, which
    shortening the first one does not reach.
    """
    torch.manual_seed(0)
    scale = torch.logspace(0, -2, 20).double()
    start = torch.ones(20, dtype=torch.float64)
    reports = {}
    for most in (1, 3, 10):
        theta = start.clone().requires_grad_()

        def closure(theta: Tensor = theta) -> Tensor:
            theta.grad = None
            far = float((theta.detach() - start).norm()) > 0.01
            loss = F.mse_loss(scale * theta, torch.zeros(20).double(), reduction="sum") / (0.0 if far else 1.0)
            loss.backward()
            return loss

        optimizer = HessianFree(
            [theta], damping=1e-3, damping_factor=10.0, preconditioner=None, progress_tolerance=0.0, max_trials=most
        )
        optimizer.step(closure)
        reports[most], step = optimizer.last_step, theta.detach() - start
        assert optimizer.state[theta]["damping"] > optimizer.last_step.damping or optimizer.last_step.accepted
    assert [reports[most].damping for most in (1, 3)] == [1e-3, pytest.approx(1e-1)]
    assert not reports[1].accepted and not reports[3].accepted
    found = reports[10]
    assert found.accepted and found.damping > 0.1
    exact = -2 * scale**2 / (2 * scale**2 + found.damping)
    t = float(step.norm() / exact.norm())
    assert t == pytest.approx(2.0 ** round(math.log2(t)), rel=1e-6), "halved at most"
    torch.testing.assert_close(step, t * exact, rtol=1e-5, atol=1e-9)
    assert found.products >= found.iterations > reports[3].iterations > reports[1].iterations
    assert found.trials > reports[3].trials > reports[1].trials


def test_a_solution_is_continued_from_its_best_iterate_for_a_higher_damping() -> None:
    torch.manual_seed(0)
    A = torch.randn(30, 30).double()
    A = A @ A.T / 30
    g = torch.randn(30).double()
    low = conjugate_gradients(A + 1e-3 * torch.eye(30).double(), g, max_iterations=30, keep_path=True)
    steps = [i.step for i in low.path] + [low.step]
    for higher in (1e-2, 1.0, 100.0):
        damped = A + higher * torch.eye(30).double()
        values = [float(s @ (g + 0.5 * (damped @ s))) for s in steps]
        found = best_start(low, higher - 1e-3)
        if min(values) >= 0:
            assert found is None
        else:
            assert found is not None and torch.equal(found, steps[values.index(min(values))])


def test_the_first_damping_is_searched_for_once() -> None:
    theta = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree([theta], curvature="hessian", damping=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 + theta**2).sqrt().sum()
        loss.backward()
        return loss

    def step() -> tuple[float, bool]:
        optimizer.step(closure)
        report = optimizer.last_step
        assert report is not None
        return optimizer.state[theta]["damping"], report.accepted

    for damping in (1e-2, 1e-1, 1.0):
        assert step() == (pytest.approx(damping), False)
        assert optimizer.last_step is not None and "the first damping was too low" in optimizer.last_step.reason
        assert theta.item() == 3.0
    assert step() == (pytest.approx(2 / 3), True)
    # From here on the ordinary rule: backtracked steps are taken, and the damping rises by little.
    theta.data.fill_(3.0)
    optimizer.state[theta].update(damping=1e-3, solution=torch.zeros(1, dtype=torch.float64))
    assert step() == (pytest.approx(1.5e-3), True)


def test_an_unrecognised_loss_leaves_everything_as_it_was() -> None:
    theta = torch.ones(2, requires_grad=True)
    optimizer = HessianFree([theta])
    with pytest.raises(RuntimeError, match="mark_outputs"):
        optimizer.step(lambda: theta.cosh().sum())
    assert torch.equal(theta, torch.ones(2))


WAVES = {
    "sine": (lambda x: x.sin().sum(), [[20.4204], [1.6, 20.4]]),
    "cosine": (lambda x: (x.cos() + 0.1 * (2.3 * x).sin()).sum(), [[6.2, 0.2]]),
    # Conjugate gradients meet a residual whose square underflows far out here.
    "well": (
        lambda x: (1e-3 * x.square() - (-x.square() / 2).exp()).sum(),
        [[-3.380625729173567, -2.2910656842800936]],
    ),
}


@pytest.mark.parametrize("name", WAVES)
def test_a_stale_warm_start_is_not_followed_along_negative_curvature(name: str) -> None:
    """From 20.4204 on the sine each step was 0.95 of the last, to a point where the slope is 0.97."""
    value, starts = WAVES[name]
    for start in starts:
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = HessianFree([x], curvature="hessian")

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            x.grad = None
            loss = value(x)
            loss.backward()
            return loss

        for _ in range(50):
            optimizer.step(closure)
        assert optimizer.last_step.gradient_norm < 1e-6, start
