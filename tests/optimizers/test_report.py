"""Reports of steps: loss, predicted decrease and ratio are all of one step."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_db import GAUSS_NEWTON, OPTIMIZERS
from torch import Tensor

from newtonopt import HessianFree, NewtonCG, StepReport, TrustRegionNewton

EXACT = {name: build for name, build in OPTIMIZERS.items() if name not in GAUSS_NEWTON and "nystrom" not in name}


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's function, whose bend makes line searches shorten steps."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


@pytest.mark.parametrize("name", EXACT)
def test_loss_predicted_decrease_and_ratio_are_those_of_the_step_taken(name: str) -> None:
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    settings = {"curvature": "hessian"} if "free" in name else {}
    optimizer = EXACT[name]([x], **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = valley(x)
        loss.backward()
        return loss

    taken = 0
    for _ in range(12):
        start = x.detach().clone()
        gradient, hessian = torch.func.grad(valley)(start), torch.func.hessian(valley)(start)
        optimizer.step(closure)
        report, step = optimizer.last_step, x.detach() - start
        assert report is not None
        assert report.accepted is bool(step.any())
        if report.accepted:
            taken += 1
            promised = float(-(gradient @ step) - step @ hessian @ step / 2)
            assert report.trial_loss == pytest.approx(float(valley(x.detach())), rel=1e-9)
            assert report.step_norm == pytest.approx(float(step.norm()), rel=1e-6)
            assert report.predicted_decrease == pytest.approx(promised, rel=1e-6, abs=1e-10)
        if report.trials:
            actual = report.loss - report.trial_loss
            assert report.ratio == pytest.approx(actual / report.predicted_decrease, rel=1e-6, abs=1e-6)
    assert taken > 3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NewtonCG, {}),
        (NewtonCG, {"line_search": "strong_wolfe"}),
        (HessianFree, {"curvature": "hessian", "damping": 1e-8, "preconditioner": None}),
    ],
)
def test_the_first_ratio_is_that_of_the_step_before_it_was_shortened(kind: type, settings: dict[str, object]) -> None:
    """The square root of 1 + x^2 at 2: the Newton step goes to -8, where the loss is higher; only a part is taken."""
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = kind([x], **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 + x.square()).sqrt().sum()
        loss.backward()
        return loss

    for _ in range(20):  # HessianFree refuses steps until a first damping is high enough
        optimizer.step(closure)
        report = optimizer.last_step
        if report.accepted or "too low" not in report.reason:
            break
        assert report.first_ratio < 0.25
    if kind is NewtonCG:
        assert report.accepted
        assert report.first_ratio < 0 < report.ratio
    assert math.isfinite(report.ratio)


@pytest.mark.parametrize("line_search", ["armijo", "strong_wolfe"])
def test_a_rejected_step_is_reported_as_it_was_tried(line_search: str) -> None:
    """Trials that all raise the loss, because the gradient is another function's."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([x], line_search=line_search, max_trials=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x.square() / 2 + 3 * (x.detach() - 1).abs()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and not report.accepted and report.trials == 3
    assert report.trial_loss > report.loss
    assert report.ratio == pytest.approx((report.loss - report.trial_loss) / report.predicted_decrease, rel=1e-6)
    assert report.first_ratio == pytest.approx((0.5 - 3.0) / 0.5, rel=1e-6)


def test_a_step_that_falls_short_of_its_promise_is_rejected_in_these_words() -> None:
    x = torch.tensor([-2.05], dtype=torch.float64, requires_grad=True)
    optimizer = TrustRegionNewton([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((3 * x).sin() + 0.1 * x**2 + 0.2 * (7 * x).cos()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and not report.accepted
    assert report.trial_loss < report.loss
    assert report.reason.startswith("rejected, the loss fell by less than 0.01 of the predicted decrease")


def test_values_by_tag_are_those_that_a_chart_can_show() -> None:
    report = StepReport(1.0, 2.0, "converged", 0.5, damping=0.1, ratio=0.9, first_ratio=-math.inf, iterations=3)
    assert report.by_tag() == {
        "newton/damping": 0.1,
        "newton/ratio": 0.9,
        "newton/iterations": 3.0,
        "newton/products": 0.0,
        "newton/accepted": 0.0,
        "newton/gradient_norm": 2.0,
        "newton/step_norm": 0.0,
    }
