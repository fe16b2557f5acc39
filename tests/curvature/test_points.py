"""Critical points, the gradient's curvature and loss slices against closed forms and dense truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Batches, build
from torch import Tensor, nn

from newtonopt import Evaluation, evaluate, hessian
from newtonopt.curvature import (
    critical_point,
    diagonal,
    extreme_eigenvalues,
    gradient_curvature,
    loss_slice,
    sharpness,
    spectral_density,
)


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
        ("bowl", "Strict local minimum: the gradient's norm is 0, .* All curvature is positive.*may lie lower"),
        ("dome", "Strict local maximum.*All curvature is negative"),
        ("saddle", "Saddle:.* between -2 .* and 2 .*The loss falls along the direction of the smallest"),
        ("monkey saddle", "Degenerate critical point.*undecided: higher derivatives decide"),
        ("quartic", "Degenerate.*It is no maximum.*no proof of a minimum"),
        ("textbook cubic", "Degenerate.*It is no minimum.*undecided"),
        ("slope", "Not a critical point: the gradient's norm is 1,.*above the tolerance of 1e-06"),
    ],
)
def test_verdict_in_words(name: str, words: str) -> None:
    function, place, _ = FUNCTIONS[name]
    text = str(critical_point(_at(function, *place)))
    assert __import__("re").search(words, text), text


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


def test_a_tracked_spectrum_proves_no_minimum() -> None:
    evaluation = _at(lambda t: 2 * t[0] ** 2 + t[1] ** 2, 0.0, 0.0)
    H = hessian(evaluation)
    tracked = extreme_eigenvalues(H, top=1, bottom=1, start=extreme_eigenvalues(H, top=1, bottom=1))
    found = critical_point(evaluation, spectrum=tracked)
    assert (found.kind, found.converged) == ("degenerate", False)
    assert gradient_curvature(evaluation, tracked).stable_step == pytest.approx(0.5)
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
    with pytest.raises(ValueError, match="spectrum must hold one eigenvalue at least of each end"):
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
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan, so the point cannot be classified"):
        critical_point(_at(lambda t: t.sqrt().sum() * 0, 0.0))


def test_gradient_curvature_of_a_quadratic() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, -2.0]).double()
    theta = torch.tensor([1.0, 2.0, -1.0, 1.0]).double()
    evaluation = _at(lambda t: 0.5 * (values * t * t).sum(), *theta.tolist())
    g = values * theta
    spectrum = extreme_eigenvalues(hessian(evaluation), top=3, bottom=0)
    found = gradient_curvature(evaluation, spectrum)
    curvature = float((values * g * g).sum() / (g * g).sum())
    assert found.curvature == pytest.approx(curvature)
    assert found.residual == pytest.approx(float((values * g - curvature * g).norm() / g.norm()))
    assert found.gradient_norm == pytest.approx(float(g.norm()))
    assert (found.cauchy_step, found.longest_step) == pytest.approx((1 / curvature, 2 / curvature))
    assert found.stable_step == pytest.approx(2 / 5, rel=1e-3)
    assert found.alignments == pytest.approx((g * g / (g @ g)).tolist()[:3], rel=1e-4)
    assert found.alignment == pytest.approx(float((g * g / (g @ g))[:3].sum()), rel=1e-4)
    assert max(found.alignment_errors[:2]) < 1e-12
    assert found.alignment_errors[2] == 1.0
    assert found.products == 1
    # The Cauchy step is the best one along -g, and the loss there and back is the same at the longest.
    loss = [float(0.5 * (values * (theta - s * g) ** 2).sum()) for s in (0.0, found.longest_step)]
    assert loss[1] == pytest.approx(loss[0])


def test_alignments_are_within_their_errors() -> None:
    case = build("mlp", "cross_entropy")
    evaluation = evaluate(case.closure, case.params)
    g = evaluation.gradient
    exact = (torch.linalg.eigh(case.dense_hessian()).eigenvectors.T @ g).square().flip(0) / (g @ g)
    spectrum = extreme_eigenvalues(hessian(evaluation), top=4, bottom=0, tolerance=0.2)
    found = gradient_curvature(evaluation, spectrum)
    errors = (torch.tensor(found.alignments).double() - exact[:4]).abs()
    assert bool((errors <= torch.tensor(found.alignment_errors).double() + 1e-12).all())
    assert found.alignment_errors[0] < 0.5
    everything = gradient_curvature(evaluation, extreme_eigenvalues(hessian(evaluation), top=len(g), bottom=0))
    assert everything.alignment == pytest.approx(1.0)


def test_gradient_curvature_where_there_is_none_or_it_is_negative() -> None:
    still = gradient_curvature(_at(lambda t: (t * t).sum(), 0.0, 0.0))
    assert (still.curvature, still.products, still.cauchy_step, still.stable_step) == (0.0, 0, math.inf, None)
    concave = gradient_curvature(_at(lambda t: -(t * t).sum(), 1.0))
    assert (concave.curvature, concave.cauchy_step, concave.longest_step) == (-2.0, math.inf, math.inf)
    wrong = extreme_eigenvalues(hessian(_at(lambda t: (t * t).sum(), 1.0, 2.0)), top=1, bottom=0)
    with pytest.raises(ValueError, match=r"spectrum must hold vectors of the gradient's shape, \(1,\), got \(2,\)"):
        gradient_curvature(_at(lambda t: (t * t).sum(), 1.0), wrong)
    with pytest.raises(FloatingPointError, match="g'Hg/g'g is nan"):
        gradient_curvature(_at(lambda t: t.sqrt().sum(), 0.0))


def test_a_slice_of_a_quadratic_is_its_model() -> None:
    H = torch.tensor([[2.0, 0.5], [0.5, -1.0]]).double()
    theta = torch.tensor([0.3, -0.2]).double().requires_grad_()
    axes = torch.eye(2).double()
    found = loss_slice(lambda: 0.5 * theta @ H @ theta, [theta], [axes[0], axes[1]], radius=2.0, points=9)
    torch.testing.assert_close(found.losses, found.model, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.curvatures, H)
    torch.testing.assert_close(found.slopes, H @ theta.detach())
    corner = torch.tensor([2.3, -2.2], dtype=torch.float64)
    assert float(found.losses[8, 0]) == pytest.approx(float(0.5 * corner @ H @ corner))
    assert found.coordinates.tolist() == torch.linspace(-2, 2, 9).double().tolist()
    assert (found.products, found.losses.shape) == (2, (9, 9))


def test_a_slice_follows_the_loss_and_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    H = hessian(evaluate(closure, model.parameters()))
    top = extreme_eigenvalues(H, top=1, bottom=0).top[0]
    found = loss_slice(closure, model.parameters(), top.vector, radius=0.5, points=5)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert float(found.losses[2]) == found.loss
    assert float(found.curvatures) == pytest.approx(top.value, rel=1e-3)
    torch.set_rng_state(random)
    with torch.no_grad():
        for p, piece in zip(model.parameters(), top.vector.split([p.numel() for p in model.parameters()]), strict=True):
            p.add_(0.25 * piece.view(p.shape))
    assert float(found.losses[3]) == pytest.approx(closure().item(), rel=1e-5)
    assert float(found.model[3]) == pytest.approx(
        found.loss + 0.25 * float(found.slopes) + 0.03125 * top.value, rel=1e-4
    )


def test_a_slice_of_a_whole_data_set() -> None:
    data, whole = Batches(), Batches()
    direction = torch.ones(sum(p.numel() for p in data.params)).double()
    streamed = loss_slice(data.closure, data.params, direction, points=3, products="streamed")
    cached = loss_slice(whole.closure, whole.params, direction, points=3)
    torch.testing.assert_close(streamed.losses, cached.losses)
    torch.testing.assert_close(streamed.model, cached.model)


def test_figures_of_slices() -> None:
    theta = torch.tensor([0.3, -0.2]).double().requires_grad_()
    axes = torch.eye(2).double()
    line = loss_slice(lambda: (theta**4).sum(), [theta], axes[0], points=5).plot()
    assert [text.get_text() for text in line.axes[0].get_legend().get_texts()] == ["loss", "quadratic model"]
    square = loss_slice(lambda: (theta**4).sum(), [theta], axes, points=5).plot()
    assert [panel.get_title() for panel in square.axes[:2]] == ["loss", "quadratic model"]
    assert [line.axes[0].get_xlabel(), square.axes[0].get_ylabel()] == [
        "step along the direction",
        "step along the second direction",
    ]
    assert loss_slice(lambda: 0 * theta.sum(), [theta], axes, points=3).plot().axes


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"directions": []}, ValueError, "directions must be one or two flat vectors, got 0"),
        ({"directions": torch.eye(3)}, ValueError, "directions must be one or two flat vectors, got 3"),
        ({"directions": torch.ones(2)}, ValueError, r"a flat vector, \(3,\), got \(2,\)"),
        ({"directions": [[1.0, 2.0, 3.0]]}, TypeError, "directions must hold flat tensors only, got \\[1.0"),
        ({"radius": 0.0}, ValueError, "radius must be positive and finite, got 0.0"),
        ({"points": 2}, ValueError, "points must be a whole number and at least 3, got 2"),
        ({"products": "all"}, ValueError, "products must be 'auto' or .*, got 'all'"),
    ],
)
def test_slices_check_their_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(kind, match=message):
        loss_slice(lambda: (theta**2).sum(), [theta], **{"directions": torch.ones(3), **arguments})


def test_a_spectrum_of_other_parameters_is_refused() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    others = extreme_eigenvalues(hessian(evaluate(lambda: q.square().sum(), [q])), top=1, bottom=1)
    evaluation = evaluate(lambda: p.square().sum(), [p])
    with pytest.raises(ValueError, match="spectrum must be of the evaluation's 3 parameters, got a spectrum of 2"):
        critical_point(evaluation, tolerance=10.0, spectrum=others)
    with pytest.raises(ValueError, match=r"confidence.*got 2"):
        critical_point(evaluation, confidence=2)


def test_a_slice_of_a_closure_that_takes_other_data_each_time_is_refused() -> None:
    p, data = torch.ones(3, requires_grad=True), iter(torch.randn(50, 3))
    with pytest.raises(RuntimeError, match="the same data"):
        loss_slice(lambda: (p * next(data)).square().sum(), [p], torch.ones(3))


def test_results_print_without_their_vectors() -> None:
    theta = torch.linspace(0.5, 1.5, 100).double().requires_grad_()

    def closure() -> Tensor:
        return (theta**4).sum()

    H = hessian(evaluate(closure, [theta]))
    spectrum, ones = extreme_eigenvalues(H, top=1, bottom=1), torch.ones(2, 100).double()
    slices = loss_slice(closure, [theta], ones[0], points=5), loss_slice(closure, [theta], ones, points=5)
    for result in (spectrum, spectral_density(H), diagonal(H), sharpness(closure, [theta]), *slices):
        assert len(repr(result)) < 500, repr(result)
    assert f"value={spectrum.top[0].value!r}" in repr(spectrum)
