"""Sentences about the curvature along the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from newtonopt.curvature import AlongGradient, Measured, measure
from newtonopt.curvature.measurements.gradient import GradientShare
from newtonopt.curvature.measurements.measurement import Plan


def words(measurement: Any, result: Any) -> str:
    return "\n".join(measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})))


@pytest.mark.parametrize(
    ("curvature", "meaning"),
    [
        (4.0, "is 4: plain gradient descent on this batch lowers the loss most at a learning rate of 0.25."),
        (-4.0, "the loss falls faster than linearly, and longer steps lower it more."),
        (0.0, "the curvature is zero: the loss falls linearly."),
    ],
)
def test_words_say_how_the_loss_falls(curvature: float, meaning: str) -> None:
    assert meaning in words(AlongGradient(), GradientShare(curvature, None, True))


def test_words_advise_no_longer_step_at_the_edge() -> None:
    for result, advice in (
        (GradientShare(-4.0, None, True), "longer steps"),
        (GradientShare(0.01, None, True), "Adam"),
    ):
        for ratio, told in ((0.5, True), (0.9, False), (2.0, False)):
            numbers = {"curvature/lambda_max": 5.0, "curvature/stability_ratio": ratio}
            measured = Measured(Plan((AlongGradient(),)), numbers, "auto", {}, "", {AlongGradient: result}, {})
            assert (advice in measured.in_words()) is told


@pytest.mark.parametrize(("curvature", "ill"), [(0.01, True), (0.1, False), (-0.01, False)])
def test_words_name_an_ill_conditioned_loss(curvature: float, ill: bool) -> None:
    result = GradientShare(curvature, None, True)
    numbers = {"curvature/lambda_max": 5.0}
    measured = Measured(Plan((AlongGradient(),)), numbers, "auto", {}, "", {AlongGradient: result}, {})
    short = "In short: ill conditioned for gradient descent (500 times)."
    assert (short in measured.in_words()) is ill
    said = "lowers the loss most at a learning rate of 100. The largest eigenvalue is 500 times as large and allows it "
    assert (said + "less than 0.4: for gradient descent the loss is ill" in measured.in_words()) is ill


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), True),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), False),
        (lambda params: torch.optim.Adam(params, lr=0.1), False),
        (lambda params: None, False),
    ],
)
def test_a_learning_rate_is_named_only_where_plain_sgd_trains(make: Any, named: bool) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: w[0] ** 2 + 1000.0 * w[1], [w], make([w]), sharpness=None, bottom=0)
    (sentence,) = (line for line in found.in_words().splitlines() if line.startswith("Along the gradient"))
    assert ("learning rate" in sentence) is ("allows" in sentence) is named
    assert "for gradient descent the loss is ill conditioned" in sentence


def test_without_eigenvectors_there_is_no_share() -> None:
    assert AlongGradient().values(GradientShare(2.0, None)) == {"gradient_curvature": 2.0}
    assert AlongGradient().values(GradientShare(2.0, 0.5))["gradient_alignment"] == 0.5
