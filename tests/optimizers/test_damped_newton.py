"""What is DampedNewton's own: exact steps, quadratic convergence, eigenvalues of either sign."""

from __future__ import annotations

import math

import pytest
import torch
from problems import build as build_case
from problems import logistic_gradient_norms
from torch import Tensor

from newtonopt import DampedNewton


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("eigenvalues", ["absolute", "shifted"])
def test_the_step_is_the_dense_solution(curvature: str, eigenvalues: str) -> None:
    case = build_case("mlp", "cross_entropy")
    A = case.dense_hessian() if curvature == "hessian" else case.dense_gauss_newton()
    start = case.flat()
    g = torch.autograd.functional.jacobian(case.loss_at, start)
    values, vectors = torch.linalg.eigh(A)
    if curvature == "hessian":
        assert values[0] < -1e-6
    bent = values.abs() + 2.0 if eigenvalues == "absolute" else values + 2.0 + max(0.0, float(-values[0] - 2.0) * 2)
    DampedNewton(case.params, damping=2.0, curvature=curvature, eigenvalues=eigenvalues).step(case.closure)  # type: ignore[arg-type]
    torch.testing.assert_close(case.flat() - start, -vectors @ (vectors.T @ g / bent), rtol=1e-8, atol=1e-10)


def test_convergence_is_quadratic_once_the_damping_is_small() -> None:
    norms = logistic_gradient_norms(DampedNewton, 5, damping=1e-14, min_damping=1e-15)
    order = math.log(norms[3] / norms[2]) / math.log(norms[2] / norms[1])
    assert order > 1.8
    assert norms[4] < 1e-12


@pytest.mark.parametrize("eigenvalues", ["absolute", "shifted"])
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
