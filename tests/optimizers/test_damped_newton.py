"""DampedNewton alone: exact steps, quadratic convergence, eigenvalues of either sign."""

from __future__ import annotations

import math

import pytest
import torch
from problems import build as build_case
from problems import logistic_gradient_norms
from torch import Tensor

from newtonopt import DampedNewton

EIGENVALUES = pytest.mark.parametrize("eigenvalues", ["absolute", "shifted", "clamped"])


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@EIGENVALUES
def test_the_step_is_the_dense_solution(curvature: str, eigenvalues: str) -> None:
    case = build_case("mlp", "cross_entropy")
    A = case.dense_hessian() if curvature == "hessian" else case.dense_gauss_newton()
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    values, vectors = torch.linalg.eigh(A)
    if curvature == "hessian":
        assert values[0] < -1e-6
    bent = values.abs() + 2.0 if eigenvalues == "absolute" else values + 2.0 + max(0.0, float(-values[0] - 2.0) * 2)
    bent = values.clamp(min=2.0) if eigenvalues == "clamped" else bent
    DampedNewton(case.params, damping=2.0, curvature=curvature, eigenvalues=eigenvalues).step(case.closure)  # type: ignore[arg-type]
    torch.testing.assert_close(case.flat() - start, -vectors @ (vectors.T @ g / bent), rtol=1e-8, atol=1e-10)


def test_convergence_is_quadratic_once_the_damping_is_small() -> None:
    norms = logistic_gradient_norms(DampedNewton, 5, damping=1e-14, min_damping=1e-15)
    order = math.log(norms[3] / norms[2]) / math.log(norms[2] / norms[1])
    assert order > 1.8
    assert norms[4] < 1e-12


@EIGENVALUES
def test_a_saddle_is_left(eigenvalues: str) -> None:
    theta = torch.tensor([1.0, 1e-3], dtype=torch.float64, requires_grad=True)
    optimizer = DampedNewton([theta], eigenvalues=eigenvalues)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    torch.testing.assert_close(theta.detach().abs(), torch.tensor([0.0, 0.5**0.5]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("products", ["cached", "streamed"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("lrs", [(1.0, 1.0), (0.5, 0.2)])
def test_blocks_are_solved_one_by_one_and_judged_by_the_whole_model(
    curvature: str, products: str, lrs: tuple[float, float]
) -> None:
    case = build_case("mlp", "cross_entropy")
    A = case.dense_hessian() if curvature == "hessian" else case.dense_gauss_newton()
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    sizes = [p.numel() for p in case.params]
    expected, first = torch.zeros_like(g), 0
    for number, size in enumerate(sizes):
        part = slice(first, first + size)
        values, vectors = torch.linalg.eigh(A[part, part])
        newton = -vectors @ (vectors.T @ g[part] / (values.abs() + 2.0))
        expected[part] = lrs[number >= 2] * newton
        first += size
    groups = [{"params": case.params[:2], "lr": lrs[0]}, {"params": case.params[2:], "lr": lrs[1]}]
    optimizer = DampedNewton(groups, damping=2.0, curvature=curvature, blocks="parameter", products=products)  # type: ignore[arg-type]
    optimizer.step(case.closure)
    report = optimizer.last_step
    assert report is not None and report.accepted
    torch.testing.assert_close(case.flat() - start, expected, rtol=1e-8, atol=1e-10)
    true = -float(expected @ (g + A @ expected / 2))
    assert report.predicted_decrease == pytest.approx(true, rel=1e-8)
    # One along the step, and where they are formed at once one more for each block.
    assert report.products == sum(sizes) + 1 + (len(sizes) if products == "cached" else 0)


@pytest.mark.parametrize("blocks", ["whole", "parameter"])
@EIGENVALUES
def test_a_rejected_step_is_solved_again_with_more_damping_without_products(eigenvalues: str, blocks: str) -> None:
    reports = []
    for max_trials in (1, 30):
        x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        y = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        start = torch.cat([x, y]).detach()
        settings = {"damping": 1e-3, "damping_factor": 10.0, "min_damping": 1e-6, "max_trials": max_trials}
        optimizer = DampedNewton([x, y], eigenvalues=eigenvalues, blocks=blocks, **settings)  # type: ignore[arg-type]

        def loss_at(v: Tensor) -> Tensor:
            return 100 * (v[1] - v[0] ** 2) ** 2 + (1 - v[0]) ** 2 + (v[0] * v[2] - 1) ** 2

        def closure(x: Tensor = x, y: Tensor = y, start: Tensor = start) -> Tensor:
            x.grad = y.grad = None
            theta = torch.cat([x, y])
            # Only near the start is the loss what its derivatives say.
            loss = loss_at(theta) + (1e3 if float((theta.detach() - start).norm()) > 1e-4 else 0.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        report = optimizer.last_step
        assert report is not None and report.damping is not None
        reports.append(report)
        assert report.accepted is (max_trials > 1)
        if report.accepted:
            s = torch.cat([x, y]).detach() - start
            A = torch.autograd.functional.hessian(loss_at, start)
            g = torch.autograd.functional.jacobian(loss_at, start)
            assert report.predicted_decrease == pytest.approx(-float(g @ s + s @ A @ s / 2), rel=1e-6)
            assert report.damping >= 1e-2
    extra = 29 if blocks == "parameter" else 0  # the products of blocks' steps with the whole matrix are made before
    assert reports[1].products == reports[0].products + extra
    assert reports[1].trials > reports[0].trials
