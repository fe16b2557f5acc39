"""Curvature along the gradient, and alignments, against closed forms and dense truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from problems import build
from torch import Tensor

from newtonopt import Evaluation, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, gradient_curvature


def _at(function: Callable[[Tensor], Tensor], *place: float) -> Evaluation:
    theta = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    return evaluate(lambda: function(theta), [theta])


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


def test_the_stable_step_of_a_tracked_spectrum_is_that_of_its_value() -> None:
    evaluation = _at(lambda t: 2 * t[0] ** 2 + t[1] ** 2, 0.0, 0.0)
    H = hessian(evaluation)
    tracked = extreme_eigenvalues(H, top=1, bottom=1, start=extreme_eigenvalues(H, top=1, bottom=1))
    assert gradient_curvature(evaluation, tracked).stable_step == pytest.approx(0.5)


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
    with pytest.raises(FloatingPointError, match="The curvature along the gradient is nan"):
        gradient_curvature(_at(lambda t: t.sqrt().sum(), 0.0))
