"""Tags, charts and the frame around all measurements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from newtonopt.curvature import Chart, Measurement, Tag, View, measure
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


def test_words_say_how_to_narrow_and_how_to_certify() -> None:
    p = nn.Parameter(torch.ones(60, dtype=torch.float64))

    def closure() -> torch.Tensor:
        return (torch.arange(1.0, 61.0) * p**2).sum() / 2

    found = measure(closure, [p], sharpness=None, max_products=8)
    assert (found.read("certified"), found.read("converged")) == (1.0, 0.0)
    assert "Some intervals are wider than 0.01 of their value: raise max_products above 8" in found.in_words()
    followed = measure(closure, [p], sharpness=None, max_products=8, last=found)
    assert followed.read("certified") == 0.0
    assert "This measurement followed the last one. CurvatureMonitor certifies each with" in followed.in_words()
    assert {tag.name for tag in COST_TAGS} <= set(found.names())


def test_a_bad_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix must consist of letters, .* got 'my tags'"):
        Plan((), prefix="my tags")


class Grouped(Measurement[float]):
    """Has a tag in a group of its own."""

    tags = (Tag("one", "", "always one", group="layers"),)

    def measure(self, view: View) -> float:
        return 1.0

    def values(self, result: float) -> dict[str, float]:
        return {"one": result}


def test_a_tag_may_be_in_a_group_and_its_name_stays_the_same() -> None:
    p = nn.Parameter(torch.ones(2))
    found = measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Grouped()], prefix="a/b")
    assert found["a/b-layers/one"] == found.read("one") == 1.0
    assert found["a/b/lambda_max"] == found.read("lambda_max")
    assert {"one", "lambda_max", "seconds"} <= set(found.names())
    with pytest.raises(ValueError, match=r"group must consist of .*, got 'a/b'\. Write"):
        Tag("one", "", "always one", group="a/b")
