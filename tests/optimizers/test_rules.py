"""The rules, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newtonopt.optimizers.rules import (
    cubic_weight,
    hastened,
    levenberg_marquardt,
    reduction_ratio,
    run_of,
    shortening,
    strong_wolfe,
    sufficient_decrease,
    trust_radius,
)

EPS = torch.finfo(torch.float64).eps
rules = settings(max_examples=200, deadline=None, derandomize=True)
dampings = st.floats(-12, 8).map(lambda exponent: 10.0**exponent)
ratios = st.floats(-1e6, 1e6) | st.just(-math.inf)


def test_ratio_is_actual_over_predicted() -> None:
    assert reduction_ratio(10.0, 7.0, 4.0, EPS) == pytest.approx(0.75)
    assert reduction_ratio(10.0, 12.0, 4.0, EPS) == pytest.approx(-0.5)
    assert reduction_ratio(-10.0, -13.0, 4.0, EPS) == pytest.approx(0.75)


@rules
@given(st.floats(-1e8, 1e8).filter(lambda loss: abs(loss) > 1e-3), st.floats(0, 1e-3), st.floats(-1, 1))
def test_ratio_tends_to_one_at_rounding_level(loss: float, predicted_units: float, noise_units: float) -> None:
    """Decreases below the loss's rounding say nothing: a trial one unit up or down must not change the damping."""
    unit = EPS * abs(loss)
    ratio = reduction_ratio(loss, loss + noise_units * unit, predicted_units * unit, EPS)
    assert 0.75 < ratio < 1.25


def test_ratio_follows_the_dtypes_rounding() -> None:
    loss, trial, predicted = 1.0, 1.0 + 1e-7, 1e-7
    assert reduction_ratio(loss, trial, predicted, torch.finfo(torch.float32).eps) > 0.75
    assert reduction_ratio(loss, trial, predicted, EPS) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize("trial", [math.nan, math.inf, -math.inf])
def test_non_finite_trial_is_infinitely_bad(trial: float) -> None:
    assert reduction_ratio(1.0, trial, 0.5, EPS) == -math.inf
    assert not sufficient_decrease(1.0, trial, -0.5, EPS)


@pytest.mark.parametrize("predicted", [0.0, -1.0])
def test_ratio_without_a_promise_is_judged_by_the_loss(predicted: float) -> None:
    assert reduction_ratio(0.0, 1.0, predicted, EPS) == -math.inf
    assert reduction_ratio(0.0, 0.0, predicted, EPS) == 1.0
    assert reduction_ratio(0.0, -1.0, predicted, EPS) == 1.0


def test_sufficient_decrease_is_armijos() -> None:
    assert sufficient_decrease(1.0, 1.0 - 1.1e-4, -1.0, EPS)
    assert not sufficient_decrease(1.0, 1.0 - 0.9e-4, -1.0, EPS)
    assert not sufficient_decrease(1.0, 2.0, -1.0, EPS)
    # A step whose promise is below rounding may change the loss by rounding.
    assert sufficient_decrease(-1e6, -1e6 + 5 * EPS * 1e6, -1e-12, EPS)
    assert not sufficient_decrease(-1e6, -1e6 + 50 * EPS * 1e6, -1e-12, EPS)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(-math.inf, 3.0), (0.24, 3.0), (0.25, 2.0), (0.5, 2.0), (0.75, 2.0), (0.76, 4 / 3), (9.0, 4 / 3), (math.nan, 2.0)],
)
def test_levenberg_marquardt_rule(ratio: float, expected: float) -> None:
    damping = levenberg_marquardt(2.0, ratio, factor=1.5, minimum=1e-16, maximum=1e10)
    assert damping == pytest.approx(expected)


@rules
@given(dampings, ratios, st.floats(1.01, 100), dampings, dampings)
def test_levenberg_marquardt_keeps_its_bounds(
    damping: float, ratio: float, factor: float, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    after = levenberg_marquardt(damping, ratio, factor=factor, minimum=low, maximum=high)
    assert low <= after <= high
    if low <= damping <= high:
        assert damping / factor * (1 - 1e-12) <= after <= damping * factor * (1 + 1e-12)
        assert after >= damping or ratio > 0.75
        assert after <= damping or ratio < 0.25


def test_raising_and_lowering_cancel() -> None:
    up = levenberg_marquardt(1.0, 0.0, factor=1.5, minimum=1e-16, maximum=1e10)
    assert levenberg_marquardt(up, 1.0, factor=1.5, minimum=1e-16, maximum=1e10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "length", "expected"),
    [
        (-math.inf, 0.0, 0.5),
        (-math.inf, 2.0, 0.5),
        (0.2, 0.4, 0.1),
        (0.25, 2.0, 2.0),
        (0.75, 2.0, 2.0),
        (0.76, 2.0, 4.0),
        (0.76, 1.9, 2.0),
        (math.nan, 2.0, 2.0),
    ],
)
def test_trust_radius_rule(ratio: float, length: float, expected: float) -> None:
    assert trust_radius(2.0, ratio, length, minimum=1e-16, maximum=1e10) == pytest.approx(expected)
    assert trust_radius(2.0, ratio, length, minimum=0.3, maximum=3.0) == pytest.approx(min(max(expected, 0.3), 3.0))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(-math.inf, 20.0), (-1e9, 200.0), (-9.0, 30.0), (0.09, 4.0), (0.1, 2.0), (0.9, 2.0), (0.91, 1.0), (math.nan, 2.0)],
)
def test_cubic_weight_rule(ratio: float, expected: float) -> None:
    assert cubic_weight(2.0, ratio, minimum=1e-16, maximum=1e10) == expected
    assert cubic_weight(2.0, ratio, minimum=1.5, maximum=3.0) == min(max(expected, 1.5), 3.0)


@rules
@given(st.floats(-3, 3), st.floats(0.01, 20), st.floats(0.1, 5))
def test_strong_wolfe_point(scale: float, width: float, bump: float) -> None:
    """On a line with several valleys the point that is found meets both conditions."""
    unit = 10.0**scale

    def along(t: float) -> tuple[float, float]:
        x = t / unit
        return x**2 / width - x + bump * math.sin(x) / 8, (2 * x / width - 1 + bump * math.cos(x) / 8) / unit

    loss, slope = along(0.0)
    found = strong_wolfe(along, loss, slope, EPS, 60)
    value, slope_there = along(found.t)
    assert found.trials < 60
    assert (found.value, found.first) == (value, along(1.0)[0])
    assert value <= loss + 1e-4 * found.t * slope + 1e-12
    assert abs(slope_there) <= 0.9 * abs(slope)


def test_strong_wolfe_comes_back_from_overflow() -> None:
    def along(t: float) -> tuple[float, float]:
        return (math.inf, math.nan) if t > 0.01 else (-t, -1.0 if t < 0.005 else -0.5)

    found = strong_wolfe(along, 0.0, -1.0, EPS, 40)
    assert 0.005 <= found.t <= 0.01
    assert found.first == math.inf
    nowhere = strong_wolfe(along, 0.0, -1.0, EPS, 2)
    assert (nowhere.t, nowhere.last) == (0.0, pytest.approx(0.1))


def test_a_step_is_shortened_to_the_minimum_of_a_parabola_within_bounds() -> None:
    assert shortening(1.0, -1.0) == pytest.approx(0.25), "f = 1 - t + 2 t^2"
    assert shortening(1e9, -1.0) == 0.1
    assert shortening(math.inf, -1.0) == shortening(math.nan, -1.0) == 0.1
    assert shortening(-0.9, -1.0) == shortening(-2.0, -1.0) == shortening(1.0, 2.0) == 0.5


def test_agreements_in_a_row_are_counted() -> None:
    run = 0
    for ratio, expected in (
        (1.0, 1),
        (0.95, 2),
        (1.09, 3),
        (1.2, 0),
        (1.0, 1),
        (0.5, 0),
        (-math.inf, 0),
        (math.nan, 0),
    ):
        run = run_of(run, ratio)
        assert run == expected


def test_a_control_is_lowered_faster_after_agreements_as_far_as_the_curvature() -> None:
    assert hastened(1.0, 0.5, 2, 1e-9, EPS) == 0.5
    assert hastened(1.0, 0.5, 3, 1e-9, EPS) == 0.25
    assert hastened(1.0, 0.5, 5, 1e-9, EPS) == 0.5**8
    assert hastened(1.0, 0.5, 9, 1e-9, EPS) == 1e-9  # no further at once
    assert hastened(1.0, 0.5, 9, 10.0, EPS) == 0.5  # below the curvature's size by the usual rule
    assert hastened(1e-20, 1e-21, 9, 1.0, EPS) == 1e-20  # not below the curvature's rounding
    assert hastened(1.0, 2.0, 9, 1e-9, EPS) == 2.0


def test_a_loss_that_stays_the_same_to_the_last_bit_does_not_speak_against_the_model() -> None:
    assert reduction_ratio(3.0, 3.0, 40 * EPS * 3.0, EPS) == 1.0
    assert reduction_ratio(3.0, 3.0, 1e4 * EPS * 3.0, EPS) < 0.01
