"""Histories: evenly thinned, of numbers that can be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from newtonopt.curvature import Density, Measured, measure
from newtonopt.curvature.histories import MOST_STEPS, Log, Thinned, loss_tag, may_be_loss

WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def measured() -> Measured:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    return measure(lambda: 0.5 * (WEIGHTS * w**2).sum(), [w], sharpness=None, measurements=[Density()], prefix="mine")


def test_a_measurement_is_kept_in_numbers_words_and_counts() -> None:
    found, log = measured(), Log()
    log.add(7, found)
    history = log.history("run")
    assert history.name == "run" and history.words == tuple(found.in_words().splitlines())
    assert history.measured == {7: {name: found.read(name) for name in found.names()}}
    bars = history.densities[7]
    assert bars.counts.sum() == pytest.approx(3.0)
    assert len(bars.edges) == len(bars.counts) + 1 and bars.edges[0] == pytest.approx(1.0)


@pytest.mark.parametrize("count", [1, 10, 11, 12, 99, 1000])
def test_steps_are_thinned_evenly_and_the_last_one_is_kept(count: int) -> None:
    thinned: Thinned[int] = Thinned(10)
    for number in range(count):
        thinned.put(100 * number, number)
    kept = [*thinned.items()]
    assert kept[0] == 0 and kept[-1] == 100 * (count - 1)
    assert min(count, 6) <= len(kept) <= 11
    gaps = set(np.diff(kept[:-1]).tolist())
    assert len(gaps) <= 1
    assert all(step == 100 * number for step, number in thinned.items().items())


def test_a_step_that_comes_again_replaces_the_first() -> None:
    thinned: Thinned[str] = Thinned(4)
    for step, item in [(0, "a"), (1, "b"), (0, "c")]:
        thinned.put(step, item)
    assert thinned.items() == {0: "c", 1: "b"}
    assert thinned.get(1) == "b" and thinned.get(5) is None


def test_the_log_of_ten_thousand_measurements_is_as_large_as_that_of_two_thousand() -> None:
    def kept(count: int) -> int:
        log = Log()
        for step in range(count):
            log.add_value(step, "lambda_max", 1.0)
            log.add_training(step, "loss", 1.0)
            log.add_density(step, [0.0, 1.0], [1.0])
        history = log.history()
        return max(len(history.measured), len(history.densities), len(history.training["loss"]))

    assert kept(2_000) <= MOST_STEPS + 1 and kept(10_000) <= MOST_STEPS + 1


def test_values_of_one_step_come_together_and_series_are_in_order() -> None:
    log = Log()
    for step in (20, 10):
        log.add_value(step, "lambda_max", 2.0 * step)
    log.add_value(10, "lambda_max_upper", 21.0)
    history = log.history()
    steps, values = history.series("lambda_max")
    assert steps.tolist() == [10.0, 20.0] and values.tolist() == [20.0, 40.0]
    beside = history.beside("lambda_max", "lambda_max_upper")
    assert beside[0] == 21.0 and math.isnan(beside[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_cannot_be_drawn_are_passed_over(value: float) -> None:
    log = Log()
    log.add_value(0, "lambda_max", value)
    log.add_training(0, "loss", value)
    assert log.history().names() == set()


def test_names_without_end_are_passed_over() -> None:
    log = Log()
    for number in range(5_000):
        log.add_value(0, f"name_{number}", 1.0)
    assert len(log.history().names()) == 1000


@pytest.mark.parametrize(
    ("edges", "heights"),
    [
        ([0.0, 1.0], [1.0, 2.0]),
        ([0.0], []),
        ([1.0, 0.0], [1.0]),
        ([0.0, math.nan], [1.0]),
        ([0.0, 1.0], [-1.0]),
        ([0.0, 1.0], [1e9]),
        ([0.0, 1.0], [math.nan]),
        (np.arange(20_002.0), np.ones(20_001)),
    ],
)
def test_a_damaged_histogram_is_passed_over(edges: list[float], heights: list[float]) -> None:
    log = Log()
    log.add_density(0, edges, heights)
    assert log.history().densities == {}


def test_the_loss_is_that_of_training_and_of_steps() -> None:
    tags = ["val_loss", "loss_epoch", "train_loss_epoch", "train_loss_step", "accuracy", "test/loss"]
    assert loss_tag(tags) == "train_loss_step"
    assert loss_tag(["loss", "val_loss"]) == "loss"
    assert loss_tag(["accuracy"]) == ""
    assert may_be_loss("Loss/train") and not may_be_loss("eval_loss")


def test_the_loss_may_be_named() -> None:
    log = Log()
    for tag in ("energy", "train_loss"):
        log.add_training(3, tag, 1.0)
    assert log.history(loss="energy").loss == "energy"
    assert log.history(loss="other").loss == ""
    assert log.history().loss == "train_loss"
