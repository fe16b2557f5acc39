"""Sentences about the extreme eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from newtonopt.curvature import Eigenvalue, ExtremeEigenvalues, Measured, Spectrum, measure
from newtonopt.curvature.measurements.measurement import Plan


def entry(value: float, lower: float, upper: float) -> Eigenvalue:
    return Eigenvalue(value, lower, upper, 0.1, 1, torch.ones(1))


def said(spectrum: Spectrum, curvature: Any = "hessian") -> str:
    measurement = ExtremeEigenvalues()
    plan = Plan((measurement,), curvature)
    return Measured(plan, {}, "auto", {}, "", {ExtremeEigenvalues: spectrum}, {}).in_words()


def top(certified: bool = True, asymmetry: float = 0.0) -> Spectrum:
    return Spectrum((entry(12.4, 12.35, 12.5),), (), 5, True, 0.99, certified, asymmetry)


def bottom(value: float, lower: float, upper: float, certified: bool = True) -> Spectrum:
    return Spectrum((), (entry(value, lower, upper),), 5, True, 0.99, certified, 0.0)


def both(largest: float, smallest: float) -> Spectrum:
    ends = ((entry(value, value - 1e-4, value + 1e-4),) for value in (largest, smallest))
    return Spectrum(*ends, 5, True, 0.99, True, 0.0)


@pytest.mark.parametrize(
    ("spectrum", "words"),
    [
        (top(), "The largest eigenvalue is 12.4 within 0.1."),
        (
            top(False),
            "12.4 (not certified: some eigenvalue lies within 0.1 of it, but a larger one may have been missed).",
        ),
        (
            top(False, 0.02),
            "12.4 (not certified: the asymmetry of the products is 0.02 of the norm; measure in float64).",
        ),
        (
            bottom(-0.3, -0.4, -0.29),
            "The smallest eigenvalue is -0.3, between -0.4 and -0.29, which shows that this is not a minimum: the loss "
            "is concave",
        ),
        (
            bottom(-0.3, -0.4, -0.29, False),
            "The smallest eigenvalue is -0.3 (not certified: some eigenvalue lies between -0.4 and -0.29, "
            "but a smaller one may have been missed), which shows that this is not a minimum",
        ),
        (bottom(0.3, 0.2, 0.31), "0.3, between 0.2 and 0.31, which shows that the loss is convex here."),
        (bottom(0.3, 0.2, 0.31, False), "a smaller one may have been missed), so its sign is not known. Raise"),
        (both(12.0, -0.3), "not a minimum, and its size is 0.025 times the largest: as is usual"),
        (
            both(12.0, -3.0),
            "not a minimum, and its size is 0.25 times the largest. While the loss falls, train on. Where",
        ),
        (both(12.0, 3.0), "the loss is convex here, with a condition number of 4."),
        (both(12.0, 1e-3), "condition number of 12\u00a0000: gradient descent needs about that many steps to reduce"),
        (both(12.0, -9.0), "In short: not at a minimum."),
        (bottom(-0.3, -0.4, -0.29), "In short: not at a minimum."),
        (both(12.0, 3.0), "In short: convex here."),
        (bottom(0.0, -0.1, 0.1), "0, between -0.1 and 0.1, so its sign is not known."),
    ],
)
def test_words_say_what_the_eigenvalues_mean(spectrum: Spectrum, words: str) -> None:
    assert words in said(spectrum)


def test_the_verdict_leaves_out_negative_curvature_that_is_not_large() -> None:
    assert "In short" not in said(both(12.0, -3.0))


def test_words_draw_no_conclusion_from_the_smallest_eigenvalue_of_a_gauss_newton_matrix() -> None:
    assert "convex" in said(bottom(0.3, 0.2, 0.31))
    assert said(bottom(0.3, 0.2, 0.31), "gauss_newton") == ""


def test_without_a_bound_the_interval_is_that_of_some_eigenvalue() -> None:
    tracked = Spectrum((entry(2.0, 1.9, math.inf),), (), 5, True, 0.99, False, 0.0)
    values = ExtremeEigenvalues().values(tracked)
    assert values == {"certified": 0.0, "lambda_max": 2.0, "lambda_max_lower": 1.9, "lambda_max_upper": 2.1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"top": 0}, "top must be a whole number and at least 1"), ({"bottom": -1}, "bottom must be")],
)
def test_counts_out_of_range_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExtremeEigenvalues(**settings)


def test_slight_negative_curvature_is_called_usual_only_where_it_is_certified() -> None:
    weights = torch.cat([torch.linspace(1.0, 10.0, 30), torch.tensor([-0.2])]).double()
    w = torch.ones(31, dtype=torch.float64, requires_grad=True)
    settings: dict[str, Any] = {"top": 1, "bottom": 1, "sharpness": None, "tolerance": 1e-3}
    first = measure(lambda: 0.5 * (weights * w.square()).sum(), [w], **settings)
    tracked = measure(lambda: 0.5 * (weights * w.square()).sum(), [w], **settings, last=first)
    assert "as is usual while a network trains" in first.in_words()
    assert "as usual" not in tracked.in_words()
    assert "A certified measurement with more products tells whether that is all." in tracked.in_words()


def test_a_largest_eigenvalue_that_seems_to_have_fallen_far_is_looked_for_afresh() -> None:
    curvatures = torch.linspace(1.0, 2.0, 30, dtype=torch.float64)
    x = torch.ones(30, dtype=torch.float64).requires_grad_()
    settings = {"top": 1, "bottom": 0, "sharpness": None, "gradient": False, "max_products": 30}

    def closure() -> torch.Tensor:
        return (curvatures * x.square()).sum() / 2

    curvatures[0] = 1000.0
    before = measure(closure, [x], **settings)
    # The new largest one lies where neither the old eigenvector nor the gradient has a part.
    curvatures[0], curvatures[29] = -1.0, 5.0
    with torch.no_grad():
        x[29] = 0.0
    after = measure(closure, [x], last=before, **settings)
    assert before["curvature/lambda_max"] == pytest.approx(1000.0, rel=1e-2)
    assert after["curvature/lambda_max"] == pytest.approx(5.0, rel=1e-2)
    assert after["curvature-bookkeeping/certified"] == 1.0


@pytest.mark.parametrize(("ratio", "told"), [(0.5, True), (0.95, False), (3.0, False)])
def test_no_saddle_is_suspected_where_steps_overshoot(ratio: float, told: bool) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=ratio)  # the largest eigenvalue is 2
    found = measure(lambda: w[0] ** 2 - w[1] ** 2, [w], sgd, sharpness=None)
    assert ("this may be a saddle" in found.in_words()) is told
