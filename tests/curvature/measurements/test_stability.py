"""Sentences about the ratio to the stability threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from newtonopt.curvature import Measured, Stability, measure
from newtonopt.curvature.measurements.course import Course
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
        (
            StabilityRatio(6.2, 2.0, False),
            "halve the learning rates, and again until it does; or warm up from 0.05 of them.",
        ),
        (
            StabilityRatio(20.0, 1.6, False, 0.1),
            "halve lr to 0.05, and again until it does; or warm up to 0.1 from 0.00625.",
        ),
        (
            StabilityRatio(20.0, 9.9, False, 0.1),
            "halve lr to 0.05, and again until it does; or warm up to 0.1 from 0.00101.",
        ),
        (StabilityRatio(20.0, 800.0, False, 0.1), "start again from the beginning with a learning rate 3 to 10 times"),
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


def test_the_highest_ratio_is_told_to_the_end() -> None:
    result, course = (
        StabilityRatio(20.0, 0.05, False, 0.1),
        Course().then([2.3] * 5).with_ratio(2.8, 12).then([1.0] * 9),
    )
    measured = Measured(Plan((Stability(),)), {}, "auto", {}, "", {Stability: result}, {}, course=course)
    verdict, sentence = measured.in_words().splitlines()
    assert verdict == "In short: below the edge of stability (ratio 0.05, highest 2.8 at step 12)."
    assert sentence.endswith("the stability threshold 20 (highest 2.8 at step 12): steps are stable.")


def test_a_small_ratio_after_a_high_one_is_not_called_stable_until_the_loss_has_fallen() -> None:
    result, course = StabilityRatio(20.0, 0.05, False, 0.1), Course().then([2.3] * 5).with_ratio(2.8, 12)
    measured = Measured(
        Plan((Stability(),)), {}, "auto", {}, "", {Stability: result}, {}, course=course.then([2.3] * 9)
    )
    sentence = measured.in_words().splitlines()[1]
    assert "(highest 2.8 at step 12). A small ratio after a high one says little" in sentence
    assert "stable." not in sentence and "raise" not in sentence and measured.troubled


@pytest.mark.parametrize("losses", [[2.3] * 60, [2.3] * 10 + [40.0] * 5 + [1.0] * 10])
def test_a_small_ratio_is_no_reason_to_raise_the_learning_rate_where_the_loss_fails(losses: list[float]) -> None:
    result, course = StabilityRatio(20.0, 0.016, False, 0.5), Course().then(losses)
    measured = Measured(Plan((Stability(),)), {}, "auto", {}, "", {Stability: result}, {}, course=course)
    words = measured.in_words()
    assert words.splitlines()[:2] == [
        f"In short: {course.verdict()}; below the edge of stability (ratio 0.016).",
        course.advice(),
    ]
    assert words.endswith("is 0.016 times the stability threshold 20.") and "stable" not in words
    at_the_edge = replace(measured, by_class={Stability: StabilityRatio(20.0, 1.0, False, 0.5)})
    assert at_the_edge.in_words().endswith("is 1 times the stability threshold 20.")


def test_adam_has_no_ratio_before_its_first_step() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w])

    def found() -> Measured:
        return measure(lambda: w.square().sum(), [w], adam, sharpness=None)

    told = "Stability is not measured: Adam has taken no step yet. The ratio is known from the first step on."
    assert told in found().in_words().splitlines()
    w.grad = torch.ones_like(w)
    adam.step()
    assert "no step yet" not in found().in_words() and found().read("stability_ratio") is not None


@pytest.mark.parametrize(("rates", "lr"), [((0.1, 0.1), 0.1), ((0.1, 0.2), None)])
def test_the_learning_rate_is_named_where_all_groups_share_it(rates: tuple[float, ...], lr: float | None) -> None:
    params = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in rates]
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)], lr=1.0)
    found = measure(lambda: sum(p.square().sum() for p in params), params, optimizer, sharpness=None)
    result = found.of(Stability)
    assert result is not None and result.lr == lr


def test_before_the_first_step_a_ratio_at_the_edge_is_high() -> None:
    result, start = StabilityRatio(20.0, 1.0, False, 0.1), Course()
    measured = Measured(Plan((Stability(),)), {}, "auto", {}, "", {Stability: result}, {}, course=start)
    told = "before the first step that is high. If the loss rises, lower lr from 0.1 to 0.05, or warm up."
    assert measured.in_words().endswith(told)
    later = replace(measured, course=start.then([2.0, 1.9]))
    assert "normal at a constant learning rate" in later.in_words()


def test_rates_that_differ_are_part_of_the_ratio() -> None:
    """Neither the largest eigenvalue nor the highest rate decides, but their largest product."""
    flat, steep = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    closure = lambda: (25 * steep**2 + 0.05 * flat**2).sum()  # noqa: E731
    one = torch.optim.SGD([{"params": [steep], "lr": 0.01}, {"params": [flat], "lr": 1.0}], lr=1.0)
    assert measure(closure, [steep, flat], one, sharpness=None).read("stability_ratio") == pytest.approx(0.25)
    both = [torch.optim.SGD([steep], lr=0.01), torch.optim.SGD([flat], lr=1.0)]
    assert measure(closure, [steep, flat], both, sharpness=None).read("stability_ratio") is None
