"""Tags, charts and the frame around all measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from newtonopt.closure.isolation import UnprotectedError
from newtonopt.closure.objective import ParametersMovedError
from newtonopt.curvature import Chart, ExtremeEigenvalues, Measured, Measurement, Tag, View, measure
from newtonopt.curvature.measurements.measurement import COST_TAGS, Losses, Plan, take


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


def test_a_chart_may_give_way_to_another() -> None:
    chart = Chart("Largest", ("lambda_max",), unless="preconditioned_lambda_max")
    assert chart.names(["lambda_max"]) == ["lambda_max"]
    assert chart.names(["lambda_max", "preconditioned_lambda_max"]) == []


def test_patterns_that_are_one_word_are_refused() -> None:
    with pytest.raises(TypeError, match=r"patterns must be a tuple, got 'gap'\. Write"):
        Chart("Gap", "gap")  # type: ignore[arg-type]


def test_words_say_what_measuring_cost() -> None:
    p = nn.Parameter(torch.ones(2))
    found = measure(lambda: p.square().sum(), [p], sharpness=None)
    assert f"Measured with {found.read('products'):.0f} products in " in found.in_words().splitlines()[-1]


class Leading(Measurement[float]):
    """A measurement whose words stand first."""

    tags = (Tag("lead", "", "always one"),)
    leads = True

    def measure(self, view: View) -> float:
        return 1.0

    def values(self, result: float) -> dict[str, float]:
        return {"lead": result}

    def verdict(self, result: float, measured: Measured) -> str:
        return "first"

    def sentences(self, result: float, measured: Measured) -> list[str]:
        return ["This leads."]


def test_words_begin_with_the_verdict_and_the_sentences_that_lead() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = measure(lambda: p.square().sum(), [p], sharpness=None, measurements=[Leading()])
    first, second, third, *_ = replace(found, doubt="Reason.").in_words().splitlines()
    assert first == "In short: first; convex here."
    assert second == "This leads." and third == "Nothing is certified: Reason."


def test_words_say_how_to_narrow_and_how_to_certify() -> None:
    p = nn.Parameter(torch.ones(60, dtype=torch.float64))

    def closure() -> torch.Tensor:
        return (torch.arange(1.0, 61.0) * p**2).sum() / 2

    found = measure(closure, [p], sharpness=None, max_products=8)
    assert (found.read("certified"), found.read("converged")) == (1.0, 0.0)
    assert "Some intervals are wider than 0.01 of their value: raise max_products above 8" in found.in_words()
    tracked = measure(closure, [p], sharpness=None, max_products=8, last=found)
    assert tracked.read("certified") == 0.0
    assert "This measurement tracked the last one's eigenvectors. CurvatureMonitor certifies" in tracked.in_words()
    assert {tag.name for tag in COST_TAGS} <= set(found.names())


@pytest.mark.parametrize(
    ("first", "lowest", "now", "diverged"),
    [
        (2.25, 2.25, 36.0, True),
        (2.3, 0.1, 36.0, True),
        (2.3, 0.05, 2.3, True),  # back where it started, as a network whose units have died
        (2.3, 0.05, 0.6, False),  # a spike
        (2.3, 1e-5, 1e-2, False),  # a bump near zero
        (2.3, 2.3, 2.9, False),
        (2.3, 1.9, 2.3, False),
        (0.0, 0.0, 0.0, False),
        (1.0, -3.0, 0.5, False),
        (1.0, -3.0, 30.0, True),
        (1.0, 0.0, 1.2, True),
        (1.0, 1.0, math.nan, True),
        (1.0, 1.0, math.inf, True),
    ],
)
def test_a_run_diverges_where_its_loss_is_far_above_its_lowest(
    first: float, lowest: float, now: float, diverged: bool
) -> None:
    assert Losses(first, lowest, now).diverged is diverged


def test_losses_name_the_lowest_one() -> None:
    assert Losses(2.25, 2.25, 36.0).in_words() == "the loss is 36, 16 times its lowest so far"
    assert Losses(1.0, -3.0, 30.0).in_words() == "the loss is 30, and -3 was its lowest so far"
    assert Losses(1.0, 1.0, math.inf).in_words() == "the loss is not finite"
    assert Losses(3.0, 2.0, 2.5).then(1.0) == Losses(3.0, 1.0, 1.0)


def test_where_a_run_has_diverged_words_say_what_to_do_and_draw_no_conclusion_from_curvature() -> None:
    w = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.1)

    def closure() -> torch.Tensor:  # bounded curvature far out, and next to none
        return (1.0 + w.square()).sqrt().sum()

    def at(place: float, last: Measured | None) -> Measured:
        with torch.no_grad():
            w.fill_(place)
        return measure(closure, [w], sgd, sharpness=None, last=last)

    start = at(1.0, None)
    low = at(0.0, start)
    far = at(100.0, low)
    assert low.losses == Losses(pytest.approx(2.0**1.5), 2.0, 2.0) and not low.diverged
    assert far.diverged and far.read("stability_ratio") is not None
    words = far.in_words().splitlines()
    assert words[:2] == [
        "In short: diverged: the loss is 200, 100 times its lowest so far.",
        "Curvature says little here. Go back to an earlier checkpoint, or restart with a lower learning rate or a "
        "warm-up.",
    ]
    assert "raise" not in "\n".join(words) and "HessianFree" not in "\n".join(words)
    alone = at(100.0, None)
    assert not alone.diverged and "raise the learning rate" in alone.in_words()


def test_the_words_of_a_plain_loop_remember_its_losses_and_its_highest_ratio() -> None:
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)

    def at(loss: float, lr: float, last: Measured | None, **settings: Any) -> Measured:
        sgd = torch.optim.SGD([w], lr=lr)
        return measure(lambda: w.square().sum() * 0.5 + loss - 0.5, [w], sgd, sharpness=None, last=last, **settings)

    high = at(2.0, 4.0, None)
    assert high.in_words().startswith("In short: beyond the edge of stability (ratio 2)")
    low = at(2.0, 0.01, high)
    assert "(ratio 0.005, highest 2)" in low.in_words() and "stable" not in low.in_words().splitlines()[1]
    certified = at(2.0, 0.01, low, certify=True)
    assert certified["curvature-bookkeeping/certified"] == 1.0 and low["curvature-bookkeeping/certified"] == 0.0
    assert "highest 2" in certified.in_words()
    told = at(2.0, 0.01, certified, step_losses=[*[2.0] * 20, torch.tensor(60.0), 50.0, 40.0, *[2.0] * 9])
    assert "the loss has spiked to 60 since the last measurement" in told.in_words()
    dead = low
    for _ in range(6):
        dead = at(3.0, 0.01, dead)
    assert dead.in_words().startswith("In short: the loss has risen from 2 to 3 since the start; below the edge")


@pytest.mark.parametrize("wrong", [[True], ["0.7"], [torch.ones(2)]])
def test_losses_of_steps_must_be_numbers(wrong: list[Any]) -> None:
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(TypeError, match=r"step_losses must hold numbers only, got .* in it\. Write \[0\.7, 0\.6\]\."):
        measure(lambda: w.square().sum(), [w], step_losses=wrong)
    with pytest.raises(TypeError, match=r"step_losses must be an iterable of numbers"):
        measure(lambda: w.square().sum(), [w], step_losses=0.7)  # type: ignore[arg-type]


def test_a_bad_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix must consist of letters, .* got 'my tags'"):
        Plan((), prefix="my tags")
    with pytest.raises(ValueError, match=r"prefix must not end like a group of tags .*, got 'curvature-more'"):
        Plan((), prefix="curvature-more")


class Flawed(Measurement[float]):
    """Raises the error given, while it measures or for its values."""

    tags = (Tag("flawed", "", "never written"),)

    def __init__(self, error: Exception, late: bool = False) -> None:
        self.error, self.late = error, late

    def measure(self, view: Any) -> float:
        if not self.late:
            raise self.error
        return 1.0

    def values(self, result: float) -> dict[str, float]:
        raise self.error


class Leaning(Measurement[bool]):
    """Depends on one that fails."""

    tags = (Tag("leaning", "", "whether the other has a result"),)

    def measure(self, view: Any) -> bool:
        return view.of(Flawed) is not None

    def values(self, result: bool) -> dict[str, float]:
        return {"leaning": float(result)}


def taken(*measurements: Measurement[Any], lenient: bool = True) -> Measured:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    return take(lambda: (p**3).sum(), [p], [], Plan(measurements), lenient=lenient)


@pytest.mark.parametrize("late", [False, True], ids=["measure", "values"])
def test_one_that_fails_leaves_the_values_of_the_others(late: bool) -> None:
    others = (ExtremeEigenvalues(1, 1), Leaning())
    found = taken(Flawed(KeyError("oops"), late), *others)
    alone = taken(*others)
    for name in set(alone.names()) - {"seconds", "leaning"}:
        assert found.read(name) == alone.read(name)
    assert found.read("leaning") == float(late) and found.of(Flawed) is None
    assert found.failed() == {"Flawed": "Flawed failed with KeyError: 'oops'."}
    assert "Flawed could not be measured: Flawed failed with KeyError: 'oops'." in found.in_words().splitlines()
    with pytest.raises(RuntimeError, match="Flawed failed with KeyError: 'oops'"):
        taken(Flawed(KeyError("oops"), late), *others, lenient=False)


def test_an_error_that_explains_itself_is_passed_on_as_it_is() -> None:
    error = torch.linalg.LinAlgError("no factor")
    assert taken(Leaning(), Flawed(error)).failed() == {"Flawed": "no factor"}
    with pytest.raises(torch.linalg.LinAlgError, match="no factor"):
        taken(Leaning(), Flawed(error), lenient=False)


def test_where_all_fail_and_where_training_would_change_nothing_is_measured() -> None:
    with pytest.raises(RuntimeError, match="no factor"):
        taken(Flawed(torch.linalg.LinAlgError("no factor")))
    for error in (UnprotectedError(["a queue"]), ParametersMovedError("moved", torch.zeros(2))):
        with pytest.raises(type(error)):
            taken(Leaning(), Flawed(error))


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


class Failing(Measurement[float]):
    """A measurement that takes no products and fails."""

    tags = (Tag("failing", "", "never written"),)
    uses_matrix = False

    def measure(self, view: View) -> float:
        raise RuntimeError("no luck")

    def values(self, result: float) -> dict[str, float]:
        return {"failing": result}


def test_a_measurement_that_fails_does_not_end_tracking_by_differences() -> None:
    p = nn.Parameter(torch.linspace(1.0, 2.0, 20, dtype=torch.float64))

    def closure() -> torch.Tensor:
        return p.pow(4).sum()

    plan = Plan((ExtremeEigenvalues(2, 0), Failing()))
    first = take(closure, [p], [], plan, lenient=True)
    found = take(closure, [p], [], plan, last=first, lenient=True)
    assert first.differenced and found.differenced
    assert found.read("certified") == 0.0
    assert found.failed() == {"Failing": "no luck"}
