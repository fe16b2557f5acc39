"""Which sharpness is measured, in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from newtonopt.curvature import Measured, Sharpness, SharpnessEstimate
from newtonopt.curvature.measurements.measurement import Plan


def words(measurement: Any, result: Any) -> str:
    return "\n".join(measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})))


@pytest.mark.parametrize(
    ("found", "meaning"),
    [
        (
            SharpnessEstimate(0.25, "ball", 0.05, 1.0, None, 5, True),
            "within distance 0.05 the loss rises by at least 0.25, the largest rise found.",
        ),
        (
            SharpnessEstimate(0.25, "adaptive_ball", 0.5, 1.0, None, 5, True),
            "within 0.5, relative to each parameter's size, the loss rises by at least 0.25",
        ),
        (
            SharpnessEstimate(0.25, "average", 2.0, 1.0, None, 64, True, 0.012),
            "at distance 2 the loss rises by 0.25 on average, with a standard error of 0.012.",
        ),
    ],
)
def test_words_name_the_kind_and_its_radius(found: SharpnessEstimate, meaning: str) -> None:
    assert meaning in words(Sharpness(found.kind, found.radius), found)


def test_a_rise_that_is_not_finite_is_not_told() -> None:
    assert words(Sharpness(), SharpnessEstimate(math.inf, "ball", 0.05, 1.0, None, 5, True)) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "cube"}, "kind must be 'ball' or"), ({"radius": None}, "radius must be positive and finite, got None")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharpness(**settings)
