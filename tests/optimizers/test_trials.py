"""Trials of proposals on functions of one variable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from newtonopt.optimizers.model import Proposal, QuadraticModel
from newtonopt.optimizers.state import State
from newtonopt.optimizers.trials import backtracking, no_longer, strong_wolfe, threshold
from newtonopt.solvers.solution import Iterate

EPS = torch.finfo(torch.float64).eps


class Function:
    """A stand-in for the objective: losses and gradients at steps from zero."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f
        self.tried: list[float] = []

    def loss_at(self, step: Tensor) -> float:
        self.tried.append(step.item())
        return self.f(step).item()

    def gradient_at(self, step: Tensor) -> tuple[float, Tensor]:
        step = step.clone().requires_grad_()
        self.tried.append(step.item())
        with torch.enable_grad():
            loss = self.f(step).sum()
        return loss.item(), torch.autograd.grad(loss, step)[0]

    def model(self) -> QuadraticModel:
        loss, gradient = self.gradient_at(torch.zeros(1).double())
        self.tried.clear()
        return QuadraticModel(gradient, 1.0, loss, EPS)


def proposal(*steps: tuple[float, float], **more: Any) -> Proposal[State]:
    tried = [Iterate(torch.tensor([step], dtype=torch.float64), decrease) for step, decrease in steps]
    return Proposal(tried, State(), "solved", **more)


def bowl(x: Tensor) -> Tensor:
    return (x - 1).square()


def test_steps_are_tried_until_the_next_is_no_better() -> None:
    function: Any = Function(bowl)
    outcome = backtracking(function, function.model(), proposal((3.0, 1.0), (1.5, 0.9), (1.6, 0.8), (1.0, 1.0)))
    assert function.tried == [3.0, 1.5, 1.6]
    assert outcome.accepted and outcome.step.item() == 1.5 and outcome.trials == 3
    assert outcome.ratio == outcome.first_ratio == pytest.approx(0.75 / 0.9)


def test_a_step_that_is_too_long_is_halved_and_judged_anew() -> None:
    function: Any = Function(bowl)
    # A model without curvature promises 16; a step of 2 does not raise the loss, and 1 is the first to lower it.
    outcome = backtracking(function, function.model(), proposal((8.0, 16.0)))
    assert function.tried == [8.0, 4.0, 2.0, 1.0]
    assert outcome.accepted and outcome.step.item() == 1.0 and outcome.predicted == pytest.approx(2.0)
    assert outcome.first_ratio == pytest.approx(-48 / 16) and outcome.ratio == pytest.approx(0.5)


def test_changes_are_bounded_and_a_rejected_step_is_the_last_one_tried() -> None:
    function: Any = Function(lambda x: x.abs().sqrt() - 1e-12 * x)
    model = replace(function.model(), gradient=torch.tensor([-1e-12], dtype=torch.float64))
    outcome = backtracking(function, model, proposal((1.0, 1e-12)), max_changes=3)
    assert not outcome.accepted and outcome.trials == 4 and outcome.step.item() == 0.125
    leaving = backtracking(function, model, proposal((1.0, 1e-12), leaves=True), max_changes=3)
    assert leaving.trials == 26


def test_a_step_along_negative_curvature_is_doubled_while_that_helps() -> None:
    function: Any = Function(lambda x: -x.square() + x.pow(4) / 1000)
    outcome = backtracking(function, function.model(), proposal((1.0, 1.0), follows_negative_curvature=True))
    assert function.tried == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert outcome.step.item() == 16.0 and outcome.accepted


@pytest.mark.parametrize(("least", "accepted"), [(0.3, True), (0.5, False)])
def test_the_threshold_is_a_part_of_the_promise(least: float, accepted: bool) -> None:
    function: Any = Function(bowl)
    outcome = threshold(function, function.model(), proposal((1.0, 2.5)), least)
    assert outcome.ratio == pytest.approx(0.4) and outcome.accepted is accepted
    assert outcome.refusal == f"the loss fell by less than {least:g} of the predicted decrease"
    assert threshold(function, function.model(), proposal((9.0, 2.5)), least).refusal == "the loss did not fall"


def test_strong_wolfe_levels_the_slope() -> None:
    function: Any = Function(bowl)
    outcome = strong_wolfe(function, function.model(), proposal((0.01, 0.02)), max_trials=10)
    assert outcome.accepted and abs(2 * (outcome.step.item() - 1)) <= 0.9 * 2
    assert math.isfinite(outcome.first_ratio) and len(function.tried) == outcome.trials > 1


def test_a_proposal_is_shortened_to_a_length() -> None:
    model, long = Function(bowl).model(), proposal((2.0, 0.0))
    assert no_longer(long, model, 3.0) is long
    (step,) = no_longer(long, model, 0.5).steps
    assert step.step.item() == 0.5 and step.decrease == pytest.approx(0.75)  # bowl is its own model
