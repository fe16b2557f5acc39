"""Verdicts of the second-order test against closed forms and dense truth."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from problems import Batches
from torch import Tensor

from newtonopt import Evaluation, evaluate, hessian
from newtonopt.curvature import critical_point, extreme_eigenvalues


def _at(function: Callable[[Tensor], Tensor], *place: float) -> Evaluation:
    theta = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    return evaluate(lambda: function(theta), [theta])


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...], str]] = {
    "bowl": (lambda t: (t * t).sum(), (0.0, 0.0), "minimum"),
    "dome": (lambda t: -(t * t).sum(), (0.0, 0.0), "maximum"),
    "saddle": (lambda t: t[0] ** 2 - t[1] ** 2, (0.0, 0.0), "saddle"),
    "monkey saddle": (lambda t: t[0] ** 3 - 3 * t[0] * t[1] ** 2, (0.0, 0.0), "degenerate"),
    "its second derivatives elsewhere": (lambda t: t[0] ** 3 - 3 * t[0] * t[1] ** 2, (0.5, 0.0), "not critical"),
    "textbook cubic": (lambda t: 3 * t[0] ** 3 - 6 * t[1] ** 2 + 3, (0.0, 0.0), "degenerate"),
    "valley": (lambda t: t[0] ** 2 + 0 * t[1], (0.0, 0.0), "degenerate"),
    "quartic": (lambda t: t[0] ** 4 + t[1] ** 2, (0.0, 0.0), "degenerate"),
    "no minimum": (lambda t: t[0] ** 2 - t[1] ** 4, (0.0, 0.0), "degenerate"),
    "constant": (lambda t: 0 * t.sum(), (1.0,), "degenerate"),
    "double well": (lambda t: (t[0] ** 2 - 1) ** 2, (1.0,), "minimum"),
    "between the wells": (lambda t: (t[0] ** 2 - 1) ** 2, (0.0,), "maximum"),
    "slope": (lambda t: t[0] + t[1] ** 2, (0.0, 0.0), "not critical"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_verdict(name: str) -> None:
    function, place, kind = FUNCTIONS[name]
    evaluation = _at(function, *place)
    found = critical_point(evaluation)
    dense = torch.linalg.eigvalsh(hessian(evaluation).dense())
    assert found.kind == kind
    assert found.smallest.lower <= float(dense[0]) <= found.smallest.upper
    assert found.largest.lower <= float(dense[-1]) <= found.largest.upper
    assert found.gradient_norm == float(evaluation.gradient.norm())
    assert found.converged == bool((dense[[0, -1]].abs() > 1e-9).all())
    assert found.products <= len(place)
    assert found.loss == float(evaluation.loss)
    assert (found.direction is not None) == (float(dense[0]) < -1e-9)
    if found.direction is not None:
        along = float(found.direction @ (hessian(evaluation) @ found.direction))
        assert along == pytest.approx(float(dense[0]))
        assert float(found.direction @ evaluation.gradient) <= 0.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bowl", "Strict local minimum: the gradient's norm is 0, .* All eigenvalues are positive.*lower minima"),
        ("dome", "Strict local maximum.*All eigenvalues are negative"),
        ("saddle", "Saddle:.* between -2 .* and 2 .*The loss falls along the direction of the smallest"),
        ("monkey saddle", "Degenerate critical point.*inconclusive.*higher derivatives decide"),
        ("quartic", "Degenerate.*not a maximum.*do not prove a minimum"),
        ("textbook cubic", "Degenerate.*not a minimum.*cannot decide"),
        ("slope", "Not a critical point: the gradient's norm is 1,.*above the tolerance of 10⁻⁶"),
    ],
)
def test_verdict_in_words(name: str, words: str) -> None:
    function, place, _ = FUNCTIONS[name]
    text = str(critical_point(_at(function, *place)))
    assert re.search(words, text), text


def test_escape_direction_points_downhill_where_there_is_a_slope() -> None:
    for sign in (1.0, -1.0):
        found = critical_point(_at(lambda t, sign=sign: t[0] ** 2 - t[1] ** 2 + sign * 1e-8 * t[1], 0.0, 0.0))
        assert found.kind == "saddle"
        assert found.direction is not None
        assert float(found.direction[1]) == pytest.approx(-sign)


def test_a_small_gradient_says_how_far_the_minimum_is() -> None:
    evaluation = _at(lambda t: 2 * t[0] ** 2 + t[1] ** 2, 1e-8, 0.0)
    found = critical_point(evaluation)
    assert found.kind == "minimum"
    assert 1e-8 <= found.distance <= 5e-8  # 4e-8 / 2: the gradient over the smallest curvature
    assert "the quadratic model's minimum is at most" in str(found)
    assert critical_point(evaluation, tolerance=1e-9).kind == "not critical"
    assert critical_point(_at(lambda t: (t * t).sum(), 0.0)).distance == 0.0


def test_a_budget_too_small_for_a_sign_leaves_the_verdict_open() -> None:
    values = torch.linspace(-1e-3, 1.0, 300).double()
    evaluation = _at(lambda t: 0.5 * (values * t * t).sum(), *[0.0] * 300)
    short, long = critical_point(evaluation, max_products=5), critical_point(evaluation)
    assert (short.kind, short.converged, short.products) == ("degenerate", False, 5)
    assert (long.kind, long.converged) == ("saddle", True)
    assert long.products < 150


@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-8])
def test_signs_far_below_the_norm_are_told(smallest: float) -> None:
    values = torch.tensor([smallest, 0.5, 1.0, 3.0]).double()
    for sign, kind in ((1.0, "minimum"), (-1.0, "saddle")):
        ends = torch.cat([sign * values[:1], values[1:]])
        wide = torch.cat([ends, 1.0 + torch.rand(60, generator=torch.Generator().manual_seed(0)).double()])
        found = critical_point(_at(lambda t, wide=wide: 0.5 * (wide * t * t).sum(), *[0.0] * 64), max_products=200)
        assert found.kind == kind
        assert found.products <= 110


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigenvalue_within_the_rounding_of_products_has_no_sign(dtype: torch.dtype) -> None:
    """Products through a Cholesky factor have errors far above the rounding unit."""
    tiny = 300 * torch.finfo(dtype).eps if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    for sign in (1.0, -1.0):
        values = torch.tensor([sign * tiny, 0.5, 1.0], dtype=dtype)
        theta = torch.zeros(3, dtype=dtype, requires_grad=True)
        found = critical_point(evaluate(lambda v=values, t=theta: 0.5 * (v * t * t).sum(), [theta]))
        assert (found.kind, found.converged, found.direction) == ("degenerate", False, None)
        assert found.rounding == pytest.approx(torch.finfo(dtype).eps ** 0.75)
        assert sign * found.smallest.value > 0.0
        assert "This is not a maximum" in str(found)


def test_a_tracked_spectrum_proves_no_minimum() -> None:
    evaluation = _at(lambda t: 2 * t[0] ** 2 + t[1] ** 2, 0.0, 0.0)
    H = hessian(evaluation)
    tracked = extreme_eigenvalues(H, top=1, bottom=1, start=extreme_eigenvalues(H, top=1, bottom=1))
    found = critical_point(evaluation, spectrum=tracked)
    assert (found.kind, found.converged) == ("degenerate", False)
    saddle = _at(lambda t: t[0] ** 2 - t[1] ** 2, 0.0, 0.0)
    H = hessian(saddle)
    tracked = extreme_eigenvalues(H, top=1, bottom=1, start=extreme_eigenvalues(H, top=1, bottom=1))
    assert critical_point(saddle, spectrum=tracked).kind == "saddle"


def test_a_spectrum_at_hand_is_used() -> None:
    evaluation = _at(lambda t: t[0] ** 2 - t[1] ** 2, 0.0, 0.0)
    spectrum = extreme_eigenvalues(hessian(evaluation), top=1, bottom=1)
    found = critical_point(evaluation, spectrum=spectrum)
    assert (found.kind, found.products) == ("saddle", 0)
    assert found.smallest is spectrum.bottom[0]
    assert found.confidence == pytest.approx(0.98)
    with pytest.raises(ValueError, match="spectrum must hold at least one largest and one smallest"):
        critical_point(evaluation, spectrum=extreme_eigenvalues(hessian(evaluation), top=1, bottom=0))


def test_critical_point_of_a_whole_data_set() -> None:
    data = Batches()
    evaluation = evaluate(data.closure, data.params, products="streamed")
    found = critical_point(evaluation, tolerance=1e3, max_products=30)
    assert found.kind == "saddle"
    assert found.loss == pytest.approx(float(evaluation.loss))


def test_critical_point_checks_its_arguments() -> None:
    evaluation = _at(lambda t: (t * t).sum(), 0.0)
    with pytest.raises(ValueError, match="tolerance must be positive and finite, got 0"):
        critical_point(evaluation, tolerance=0)
    with pytest.raises(TypeError, match="evaluation must be an Evaluation, got a function"):
        critical_point(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="The gradient's norm is nan, so the point cannot be classified"):
        critical_point(_at(lambda t: t.sqrt().sum() * 0, 0.0))


def test_a_spectrum_of_other_parameters_is_refused() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    others = extreme_eigenvalues(hessian(evaluate(lambda: q.square().sum(), [q])), top=1, bottom=1)
    evaluation = evaluate(lambda: p.square().sum(), [p])
    with pytest.raises(ValueError, match="spectrum must belong to the evaluation's 3 parameters, got one of 2"):
        critical_point(evaluation, tolerance=10.0, spectrum=others)
    with pytest.raises(ValueError, match=r"confidence.*got 2"):
        critical_point(evaluation, confidence=2)
