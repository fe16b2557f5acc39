"""Sentences about the curvature along the gradient."""

from __future__ import annotations

from typing import Any

import pytest

from newtonopt.curvature import AlongGradient, Measured
from newtonopt.curvature.measurements.gradient import GradientShare
from newtonopt.curvature.measurements.measurement import Plan


def words(measurement: Any, result: Any) -> str:
    return "\n".join(measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})))


@pytest.mark.parametrize(
    ("curvature", "meaning"),
    [
        (4.0, "a gradient step decreases the loss most at a learning rate of 0.25."),
        (-4.0, "the loss falls faster than linearly, and longer steps lower it more."),
        (0.0, "the curvature is zero: the loss falls linearly."),
    ],
)
def test_words_say_how_the_loss_falls(curvature: float, meaning: str) -> None:
    assert meaning in words(AlongGradient(), GradientShare(curvature, None))


@pytest.mark.parametrize(("curvature", "ill"), [(0.01, True), (0.1, False), (-0.01, False)])
def test_words_name_an_ill_conditioned_loss(curvature: float, ill: bool) -> None:
    result = GradientShare(curvature, None)
    numbers = {"curvature/lambda_max": 5.0}
    measured = Measured(Plan((AlongGradient(),)), numbers, "auto", {}, "", {AlongGradient: result}, {})
    short = "In short: ill conditioned for gradient descent (5e+02 times)."
    assert (short in measured.in_words()) is ill
    said = "decreases the loss most at a learning rate of 100. The largest eigenvalue is 500 times as large and allows "
    assert (said + "gradient descent less than 0.4: the loss is ill" in measured.in_words()) is ill


def test_without_eigenvectors_there_is_no_share() -> None:
    assert AlongGradient().values(GradientShare(2.0, None)) == {"gradient_curvature": 2.0}
    assert AlongGradient().values(GradientShare(2.0, 0.5))["gradient_alignment"] == 0.5
