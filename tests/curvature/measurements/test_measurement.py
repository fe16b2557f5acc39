"""Tags, charts and the frame around all measurements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from newtonopt.curvature import Chart, Tag, measure
from newtonopt.curvature.measurements.measurement import COST_TAGS, Plan


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("lambda_RANK", "lambda_12", True),
        ("lambda_RANK", "lambda_max", False),
        ("lambda_max_of/PART", "lambda_max_of/layers.0", True),
        ("trace", "trace", True),
        ("trace", "trace_error", False),
    ],
)
def test_a_tag_fits_its_values(name: str, value: str, fits: bool) -> None:
    assert Tag(name, "", "").fits(value) is fits


def test_a_chart_appears_once_each_of_its_patterns_matches() -> None:
    chart = Chart("Smallest", ("lambda_min", r"lambda_min_\d+"))
    assert chart.names(["lambda_min", "lambda_max"]) == []
    assert chart.names(["lambda_min", "lambda_min_2", "lambda_min_3"]) == ["lambda_min", "lambda_min_2", "lambda_min_3"]


def test_patterns_that_are_one_word_are_refused() -> None:
    with pytest.raises(TypeError, match=r"patterns must be a tuple, got 'gap'\. Write"):
        Chart("Gap", "gap")  # type: ignore[arg-type]


def test_words_say_what_measuring_cost() -> None:
    p = nn.Parameter(torch.ones(2))
    found = measure(lambda: p.square().sum(), [p], sharpness=None)
    assert f"Measured with {found.read('products'):.0f} products in " in found.in_words().splitlines()[-1]
    assert {tag.name for tag in COST_TAGS} <= set(found.names())


def test_a_bad_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix must consist of letters, .* got 'my tags'"):
        Plan((), prefix="my tags")
