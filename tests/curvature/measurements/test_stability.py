"""Sentences about the ratio to the stability threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from newtonopt.curvature import Measured, Stability, measure
from newtonopt.curvature.measurements.measurement import Plan
from newtonopt.curvature.measurements.stability import StabilityRatio


def words(measurement: Any, result: Any) -> str:
    return "\n".join(measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})))


@pytest.mark.parametrize(
    ("result", "meaning"),
    [
        (
            StabilityRatio(12.157, 1.02, False),
            "The largest eigenvalue is 1.02 times the stability threshold 12.16: training is at the edge of stability,",
        ),
        (StabilityRatio(12.157, 1.02, False), "if it spikes, halve the learning rates."),
        (StabilityRatio(20.0, 1.02, False, 0.1), "if it spikes, lower lr from 0.1 to 0.05."),
        (StabilityRatio(24.8, 0.5, False, 0.1), "24.8: steps are stable."),
        (
            StabilityRatio(20.0, 0.05, False, 0.1),
            "far shorter than the largest eigenvalue allows (lr=0.1). If the loss",
        ),
        (StabilityRatio(20.0, -0.5, False, 0.1), "-0.5 times the stability threshold 20: steps are stable, and far"),
        (StabilityRatio(6.2, 2.0, False), "overshoot and grow"),
        (StabilityRatio(6.2, 2.0, False), "divide the learning rates by 2; at the start"),
        (StabilityRatio(20.0, 1.6, False, 0.1), "lower lr from 0.1 to 0.0625; at the start of training, warm up"),
        (StabilityRatio(38e3, 0.5, True), "The largest eigenvalue of the preconditioned matrix is 0.5 times"),
    ],
)
def test_words_say_whether_steps_are_stable(result: StabilityRatio, meaning: str) -> None:
    assert meaning in words(Stability(), result)


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.5, "below the edge of stability (ratio 0.5)"), (1.02, "at the"), (1.3, "beyond the")]
)
def test_the_verdict_says_where_training_is(ratio: float, verdict: str) -> None:
    measured = Measured(Plan((Stability(),)), {}, "auto", {}, "", {Stability: StabilityRatio(1.0, ratio, False)}, {})
    assert StabilityRatio(1.0, ratio, False).state == {"at the": "edge"}.get(verdict, verdict.split()[0])
    assert measured.in_words().splitlines()[0].startswith(f"In short: {verdict}")


@pytest.mark.parametrize(("rates", "lr"), [((0.1, 0.1), 0.1), ((0.1, 0.2), None)])
def test_the_learning_rate_is_named_where_all_groups_share_it(rates: tuple[float, ...], lr: float | None) -> None:
    params = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in rates]
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)], lr=1.0)
    found = measure(lambda: sum(p.square().sum() for p in params), params, optimizer, sharpness=None)
    result = found.of(Stability)
    assert result is not None and result.lr == lr
