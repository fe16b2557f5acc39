"""Sentences about the ratio to the stability threshold."""

from __future__ import annotations

from typing import Any

import pytest

from newtonopt.curvature import Measured, Stability
from newtonopt.curvature.measurements.measurement import Plan
from newtonopt.curvature.measurements.stability import StabilityRatio


def words(measurement: Any, result: Any) -> str:
    return "\n".join(measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})))


@pytest.mark.parametrize(
    ("result", "meaning"),
    [
        (
            StabilityRatio(12.157, 1.02, False),
            "The largest eigenvalue is 1.02 times the stability threshold 12.16: training is at the edge of stability.",
        ),
        (StabilityRatio(24.8, 0.5, False), "24.8: steps are stable."),
        (StabilityRatio(6.2, 2.0, False), "overshoot and grow"),
        (StabilityRatio(38e3, 0.5, True), "The largest eigenvalue of the preconditioned matrix is 0.5 times"),
    ],
)
def test_words_say_whether_steps_are_stable(result: StabilityRatio, meaning: str) -> None:
    assert meaning in words(Stability(), result)
