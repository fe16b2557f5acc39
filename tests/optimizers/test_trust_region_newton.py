"""TrustRegionNewton alone: the ball, its radius, and the three ways to solve for a step in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from problems import build as build_case
from problems import logistic_gradient_norms, unseen
from torch import Tensor

from newtonopt import TrustRegionNewton
from newtonopt.solvers.dense import solve_ball

SUBPROBLEMS = pytest.mark.parametrize("subproblem", ["steihaug", "lanczos", "exact"])


@pytest.mark.parametrize("radius", [0.01, 1.0, 100.0])
def test_the_exact_step_is_the_dense_solution(radius: float) -> None:
    case = build_case("mlp", "cross_entropy")
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    expected = solve_ball(*torch.linalg.eigh(case.dense_hessian()), g, radius)
    optimizer = TrustRegionNewton(case.params, radius=radius, subproblem="exact", max_trials=1)
    optimizer.step(case.closure)
    report = optimizer.last_step
    assert report is not None and report.radius == radius
    assert report.predicted_decrease == pytest.approx(expected.decrease, rel=1e-6)
    if report.accepted:
        torch.testing.assert_close(case.flat() - start, expected.step, rtol=1e-6, atol=1e-8)


@SUBPROBLEMS
def test_convergence_is_fast(subproblem: str) -> None:
    norms = logistic_gradient_norms(TrustRegionNewton, 9, radius=10.0, subproblem=subproblem)
    assert norms[-1] < 1e-12
    if subproblem == "exact":
        assert math.log(norms[3] / norms[2]) / math.log(norms[2] / norms[1]) > 1.8
    factors = [after / before for before, after in pairwise(norms) if after > 1e-13]
    assert factors[-1] < 0.05 * factors[0]


@SUBPROBLEMS
@pytest.mark.parametrize("groups", [False, True])
def test_a_rejected_step_is_tried_again_nearer_without_products(subproblem: str, groups: bool) -> None:
    """Rosenbrock's function, with a radius far too large: one step, several trials, one set of products."""
    spent = []
    for max_trials in (1, 12):
        x = torch.tensor([-1.2], dtype=torch.float64, requires_grad=True)
        y = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
        params = [{"params": [x], "lr": 1.0}, {"params": [y], "lr": 0.9 if groups else 1.0}]
        optimizer = TrustRegionNewton(params, radius=1e3, subproblem=subproblem, max_trials=max_trials)  # type: ignore[arg-type]
        calls: Callable[[], list[int]] = unseen([])

        def closure(x: Tensor = x, y: Tensor = y, calls: Callable[[], list[int]] = calls) -> Tensor:
            calls().append(1)
            x.grad = y.grad = None
            step = (torch.cat([x, y]).detach() - torch.tensor([-1.2, 1.0], dtype=torch.float64)).norm()
            # Only near the start is the loss what its derivatives say.
            loss = (100 * (y - x**2) ** 2 + (1 - x) ** 2 + (1e3 if step > 0.1 else 0.0)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        report = optimizer.last_step
        assert report is not None
        assert report.accepted is (max_trials > 1)
        # The first step sees whether the closure is one function, and compares products with two gradients.
        assert len(calls()) == 4 + report.trials
        spent.append(report.products)
        if max_trials > 1:
            assert report.trials > 1
            assert 0 < report.step_norm <= report.radius * (1 + 1e-9)
            assert report.radius < 0.5
            predicted = report.predicted_decrease
            assert report.ratio == pytest.approx((report.loss - report.trial_loss) / predicted, rel=1e-9)
            start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
            A = torch.autograd.functional.hessian(rosenbrock, start)
            g = torch.autograd.functional.jacobian(rosenbrock, start)
            s = torch.cat([x, y]).detach() - start
            assert predicted == pytest.approx(-float(g @ s + s @ A @ s / 2), rel=1e-6)
    assert spent[0] == spent[1]


def rosenbrock(v: Tensor) -> Tensor:
    return 100 * (v[1] - v[0] ** 2) ** 2 + (1 - v[0]) ** 2


@SUBPROBLEMS
def test_the_radius_follows_the_ratio(subproblem: str) -> None:
    theta = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = TrustRegionNewton([theta], radius=0.1, subproblem=subproblem)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(theta)
        loss.backward()
        return loss

    reports = []
    for _ in range(60):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
    assert reports[-1].gradient_norm < 1e-10
    for now, later in pairwise(reports):
        assert now.step_norm <= now.radius * (1 + 1e-9)
        assert now.accepted is (now.ratio >= 0.01) or math.isnan(now.ratio)
        if now.ratio > 0.75 and now.step_norm > 0.9999 * now.radius:
            assert later.radius == 2 * now.radius
        if now.accepted and now.ratio < 0.25:
            assert later.radius == pytest.approx(now.step_norm / 4)
