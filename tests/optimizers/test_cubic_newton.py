"""CubicNewton alone: the cubic model's minimiser, and the weight that adapts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from problems import build as build_case
from problems import logistic_gradient_norms
from torch import Tensor

from newtonopt import CubicNewton
from newtonopt.solvers.dense import solve_cubic

SUBPROBLEMS = pytest.mark.parametrize("subproblem", ["lanczos", "exact"])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 100.0])
def test_the_exact_step_is_the_dense_solution(sigma: float) -> None:
    case = build_case("mlp", "cross_entropy")
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    A = case.dense_hessian()
    expected = solve_cubic(*torch.linalg.eigh(A), g, sigma)
    optimizer = CubicNewton(case.params, sigma=sigma, subproblem="exact")
    optimizer.step(case.closure)
    report = optimizer.last_step
    assert report is not None and report.sigma == sigma and report.accepted
    s = case.flat() - start
    torch.testing.assert_close(s, expected.step, rtol=1e-6, atol=1e-8)
    # The promise is the quadratic model's.
    assert report.predicted_decrease == pytest.approx(-float(g @ s + s @ A @ s / 2), rel=1e-6)


@SUBPROBLEMS
def test_convergence_is_fast(subproblem: str) -> None:
    norms = logistic_gradient_norms(CubicNewton, 9, sigma=1e-8, subproblem=subproblem)
    assert norms[-1] < 1e-12
    if subproblem == "exact":
        assert math.log(norms[3] / norms[2]) / math.log(norms[2] / norms[1]) > 1.8
    factors = [after / before for before, after in pairwise(norms) if after > 1e-13]
    assert factors[-1] < 0.05 * factors[0]


def rosenbrock(v: Tensor) -> Tensor:
    return 100 * (v[1] - v[0] ** 2) ** 2 + (1 - v[0]) ** 2


@SUBPROBLEMS
def test_the_weight_follows_the_ratio(subproblem: str) -> None:
    theta = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = CubicNewton([theta], subproblem=subproblem)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(theta)
        loss.backward()
        return loss

    reports = []
    for _ in range(60):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
        if reports[-1].gradient_norm < 1e-10:
            break
    assert reports[-1].gradient_norm < 1e-10
    for now, later in pairwise(reports):
        assert now.accepted is (now.ratio >= 0.1)
        raised = min(max(2.0, 1.5 * (1 - now.ratio)), 100.0)
        factor = raised if now.ratio < 0.1 else 0.5 if now.ratio > 0.9 else 1.0
        assert later.sigma == pytest.approx(factor * now.sigma)


@SUBPROBLEMS
@pytest.mark.parametrize("groups", [False, True])
def test_a_rejected_step_is_tried_again_nearer_without_products(subproblem: str, groups: bool) -> None:
    """One step, several trials, one set of products."""
    spent = []
    for max_trials in (1, 60):
        start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        x, y = (v.clone().requires_grad_() for v in start.split(1))
        params = [{"params": [x], "lr": 1.0}, {"params": [y], "lr": 0.9 if groups else 1.0}]
        optimizer = CubicNewton(params, sigma=1e-3, subproblem=subproblem, max_trials=max_trials)  # type: ignore[arg-type]

        def closure(x: Tensor = x, y: Tensor = y, start: Tensor = start) -> Tensor:
            x.grad = y.grad = None
            far = (torch.cat([x, y]).detach() - start).norm() > 0.1
            # Only near the start is the loss what its derivatives say.
            loss = (100 * (y - x**2) ** 2 + (1 - x) ** 2 + (1e3 if far else 0.0)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        report = optimizer.last_step
        assert report is not None
        assert report.accepted is (max_trials > 1)
        spent.append(report.products)
    assert report.trials > 1
    assert spent[0] == spent[1]
    g = torch.autograd.functional.jacobian(rosenbrock, start)
    A = torch.autograd.functional.hessian(rosenbrock, start)
    s = torch.cat([x, y]).detach() - start
    assert report.predicted_decrease == pytest.approx(-float(g @ s + s @ A @ s / 2), rel=1e-6)
    assert report.ratio == pytest.approx((report.loss - report.trial_loss) / report.predicted_decrease, rel=1e-9)


def test_a_loop_that_runs_on_past_the_minimum_is_told_so() -> None:
    """The quadratic part's entry shrinks at every step, until powers of it leave the range of numbers."""
    theta = torch.tensor([1e-5, 10.0], dtype=torch.float64, requires_grad=True)
    optimizer = CubicNewton([theta])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theta[0] ** 2 + F.huber_loss(theta[1:], torch.zeros(1).double())
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    assert closure().item() < 1e-300
    report = optimizer.last_step
    # Whether the last gradient is zero or only its square is a matter of rounding.
    assert report is not None and report.reason.startswith(("the gradient is zero", "the gradient's square underflows"))


def test_a_gradient_of_1e150_has_a_step() -> None:
    theta = torch.tensor([1e-5, 30.0], dtype=torch.float64, requires_grad=True)
    optimizer = CubicNewton([theta], max_trials=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1e150 * (theta[0] ** 2 + F.huber_loss(theta[1:], torch.zeros(1).double()))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step is not None and optimizer.last_step.trials > 0


@pytest.mark.parametrize("subproblem", ["lanczos", "exact"])
def test_a_first_weight_that_is_too_low_is_raised_before_a_step_is_taken(subproblem: str) -> None:
    """NIST's BoxBOD: with the first weight of 1 the first step went 98 far, to a plateau with a loss of 9771."""
    t = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 10.0], dtype=torch.float64)
    y = torch.tensor([109.0, 149.0, 149.0, 191.0, 213.0, 224.0], dtype=torch.float64)
    b = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = CubicNewton([b], subproblem=subproblem)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (y - b[0] * (1 - torch.exp(-b[1] * t))).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and not report.accepted and report.ratio < 0.25
    for _ in range(80):
        optimizer.step(closure)
    assert optimizer.last_step.loss == pytest.approx(1168.0088766, rel=1e-8)
