"""Words on the training loss between measurements, with noise and without."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from newtonopt.curvature.measurements.course import Course, Trouble

FALL = [*[2.3] * 4, *(2.3 - 0.05 * k for k in range(25))]  # to 1.1
DEAD = [2.32] * 60


@pytest.mark.parametrize(
    ("losses", "trouble"),
    [
        ([], None),
        ([2.3], None),
        (FALL, None),
        ([*FALL, *DEAD], "lost"),
        ([*FALL, 41.0, 10.0, 5.0, *DEAD], "lost"),
        ([*FALL, 41.0, 10.0, 5.0, *FALL, *[0.5] * 30], "spiked"),
        ([*FALL, 41.0, 30.0, *[1.0] * 30], "jumped"),  # two bad batches
        ([*FALL, math.nan, *[1.0] * 30], "jumped"),
        ([math.inf], "jumped"),
        ([28.5, 18.1, 11.8, 6.7, 3.7, 1.8, *[0.7] * 60], None),  # a fast start is no jump
        (
            [40.0 if k % 20 == 19 else 2.0 - 0.005 * k for k in range(200)],
            None,
        ),  # neither are batches that always differ
        ([*[4.0] * 9, *[3.3] * 40, *[3.95] * 40], "lost"),  # of small gains too
        ([*[2.3] * 9, *[0.05] * 60, *[2.5] * 8, *[0.05] * 30], "spiked"),
        ([2.6, 1.8, 2.5, 2.7, 2.4, *[2.5, 2.3, 2.6, 2.4] * 9], None),  # the very first is low by chance
        ([2.3, 2.3, 2.2, 2.1, 2.0, 2.6, 2.8, 2.7, 2.7, *DEAD], "stuck"),
        ([2.3, 2.4, 90.0, 40.0, 60.0, *DEAD, *DEAD], "spiked"),
        ([2.3, 20.0, 90.0, 40.0, 60.0, *DEAD, *DEAD], "spiked"),
        (DEAD, "stuck"),
        ([*[2.3] * 9, *[2.7] * 20], "risen"),
        ([*[2.3, 2.1, 2.4, 2.2] * 3, *[2.7] * 5], None),  # noise
        ([*FALL, 3.0, *[1.0] * 30], None),
        (DEAD[:40], None),  # too early to tell
        ([-1.0 - 0.1 * k for k in range(60)], None),
        ([*(-1.0 - 0.1 * k for k in range(60)), *[-1.0] * 60], "lost"),
    ],
)
def test_trouble_is_seen_in_the_losses_of_the_steps(losses: list[float], trouble: Trouble | None) -> None:
    whole = Course().then(losses)
    assert whole.trouble == trouble
    assert (whole.verdict() == "") is (trouble is None) and (whole.advice() == "") is (trouble is None)


def test_a_spike_holds_until_the_next_measurement_and_a_loss_that_is_lost_for_good() -> None:
    spiked = Course().then([*FALL, 41.0, 30.0, 10.0, *[1.0] * 60])
    assert (spiked.trouble, spiked.then([0.9] * 10).trouble) == ("spiked", None)
    at_once = Course().then([2.3, 2.4, 90.0, 40.0, 60.0, *DEAD, *DEAD])
    assert (at_once.trouble, at_once.then(DEAD).trouble) == ("spiked", "stuck")
    lost = Course().then(FALL).then([41.0, 30.0]).then(DEAD).then(DEAD)
    assert lost.trouble == "lost" and lost.then([1.0] * 60).trouble is None
    assert lost.peak == 2.32 and lost.jump == 0.0, "since the last measurement"


def test_losses_come_in_portions_of_any_size() -> None:
    losses = [*FALL, 41.0, *DEAD]
    course = Course()
    for loss in losses:
        course = course.then([loss])
    whole = Course().then(losses)
    assert (course.lowest, course.now, course.trouble) == (whole.lowest, whole.now, whole.trouble)
    assert (whole.highest, whole.jump, course.jump) == (41.0, pytest.approx(39.8), 0.0)


def test_the_words_have_the_figures() -> None:
    lost = Course().then([*FALL, 41.0, 20.0, *DEAD])
    assert lost.verdict() == "the loss fell from 2.3 to 1.8, and is back at 2.3"
    assert "If the objective has not changed on purpose" in lost.advice()
    assert "3 to 10 times lower" in lost.advice() and "every_n_train_steps=2, at_start=True" in lost.advice()
    spiked = Course().then([*FALL, 41.0, 30.0, 10.0, *[1.0] * 60])
    assert spiked.verdict() == (
        "the loss has spiked to 41 since the last measurement; it was 2.3 at the start, and is 1 now"
    )
    assert (
        Course().then([*FALL, math.nan, 1.0]).verdict()
        == "the loss was infinity or NaN for a step or two, and is 1.1 now"
    )
    resumed = replace(Course(), from_start=False).then([*FALL, 41.0, 30.0, 10.0, *[1.0] * 60])
    assert resumed.verdict() == "the loss has spiked to 41 since the last measurement; it is 1 now"
    stuck = Course().then([2.3, 2.3, 2.3, 2.3, 2.2, 2.1, 2.0, 2.6, 2.8, 2.7, 2.7, *DEAD])
    assert stuck.verdict() == "the loss has hardly fallen: 2.3 at the start, 2.3 now"
    assert stuck.advice().startswith("The loss has been higher meanwhile")
    assert "at a tenth and at ten times the learning rate" in Course().then(DEAD).advice()
    risen = Course().then([*[2.3] * 9, *[2.7] * 20])
    assert risen.verdict() == "the loss has risen from 2.3 to 2.7 since the start"
    jumped = Course().then([*FALL, 41.0, *[1.0] * 18])
    assert jumped.verdict() == "the loss jumped to 41 for a step or two, and is 1 now"
    assert jumped.advice().endswith("look at the samples 18 steps before this measurement.")
    assert Course().then(FALL).then([41.0]).advice().endswith("look at the samples.")


@pytest.mark.parametrize(
    "loss",
    [
        lambda draw, k: 0.3 + 2.0 * 0.99**k + draw.gauss(0.0, 0.15),
        lambda draw, k: (0.05 + 2.25 * 0.99**k) * draw.expovariate(1.0),  # single samples
        lambda draw, k: max(0.3, 2.3 - 0.002 * k) + draw.gauss(0.0, 0.1),  # slow
        # Heavy tails: no variance, and one batch of fifty far off.
        lambda draw, k: 0.3 + 2.0 * 0.99**k + 0.2 * draw.gauss(0.0, 1.0) / math.sqrt(draw.expovariate(1.0)),
        lambda draw, k: (0.3 + 2.0 * 0.99**k) * (20.0 if draw.random() < 0.02 else 1.0 + draw.gauss(0.0, 0.05)),
    ],
)
def test_noise_is_no_trouble(loss: Callable[[random.Random, int], float]) -> None:
    troubles = []
    for seed in range(10):
        draw, course = random.Random(seed), Course()
        for start in range(0, 2000, 50):
            course = course.then([loss(draw, k) for k in range(start, start + 50)])
            troubles.append(course.trouble)
    # Heavy tails do jump.
    assert sum(trouble not in (None, "jumped") for trouble in troubles) <= len(troubles) // 50


def test_a_noisy_loss_that_need_not_fall_is_not_called_failed() -> None:
    troubles = []
    for seed in range(10):
        draw, course = random.Random(seed), Course()
        for _ in range(40):
            course = course.then([draw.gauss(0.01, 0.5) for _ in range(50)])
            troubles.append(course.trouble)
    assert sum(trouble in ("lost", "spiked") for trouble in troubles) <= len(troubles) // 25


@pytest.mark.parametrize("losses", [DEAD, [*[2.3] * 9, *[2.7] * 20]])
def test_a_run_whose_start_is_not_known_is_not_compared_with_it(losses: list[float]) -> None:
    assert Course().then(losses).trouble in ("stuck", "risen")
    assert replace(Course(), from_start=False).then(losses).trouble is None


def test_the_highest_ratio_is_told_until_a_higher_one_is_measured() -> None:
    course = Course().with_ratio(None, 0).with_ratio(1.2, 4)
    assert course.earlier(0.5) == ""
    course = course.with_ratio(2.8, 12).with_ratio(0.016, 100)
    assert course.earlier(0.016) == course.earlier(None) == "highest 2.8 at step 12"
    assert course.earlier(2.8) == ""
    assert Course().with_ratio(2.8).earlier(0.5) == "highest 2.8"


@pytest.mark.parametrize(
    ("losses", "overshoots"),
    [
        (FALL, False),
        (DEAD, False),  # a saddle looks the same
        ([*FALL, *DEAD], True),
        ([*[2.3] * 9, *[2.7] * 20], True),
        ([*[2.3] * 9, *[2.7] * 20, *DEAD], True),  # stuck, but higher before
        ([*FALL, 41.0, *[1.0] * 18], False),  # a bad batch
    ],
)
def test_losses_tell_whether_steps_are_too_long(losses: list[float], overshoots: bool) -> None:
    assert Course().then(losses).overshoots is overshoots
    assert Course().then(losses).with_ratio(2.8).overshoots


def test_a_run_recovers_from_a_high_ratio_when_its_loss_falls_below_the_lowest_before() -> None:
    course = Course().then(FALL).with_ratio(1.2)
    assert not course.was_unstable
    high = course.with_ratio(2.8)
    assert high.was_unstable and high.then([1.2] * 40).was_unstable and not high.then([0.9] * 40).was_unstable
    before = Course().with_ratio(2.8)
    assert before.then([2.3]).was_unstable and not before.then(FALL).was_unstable, "no loss is known from before"
