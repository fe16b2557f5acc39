"""Eigenvalues of real networks' Hessians, against dense truth and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import build
from torch import nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import extreme_eigenvalues


@pytest.mark.parametrize("budget", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", [("mlp", "cross_entropy"), ("conv", "mse"), ("words", "cross_entropy")], ids="-".join)
def test_intervals_contain_the_truth_as_often_as_they_say(pair: tuple[str, str], budget: int) -> None:
    case = build(*pair)
    matrix = hessian(evaluate(case.closure, case.params)).dense()
    values = torch.linalg.eigvalsh(matrix)
    n = len(values)
    hits, exact = [], []
    for seed in range(200):
        H = LinearOperator(lambda v: matrix @ v, (n, n), matrix)
        spectrum = extreme_eigenvalues(H, top=1, bottom=1, confidence=0.9, max_products=budget, seed=seed)
        for found, truth in ((spectrum.top[0], float(values[-1])), (spectrum.bottom[0], float(values[0]))):
            hits.append(found.lower <= truth <= found.upper)
            if spectrum.converged:
                exact.append(abs(found.value - truth) <= 1e-3 * abs(truth))
    assert sum(hits) / len(hits) >= 0.9
    assert budget == 8 or sum(exact) / len(exact) >= 0.9


def test_signs_are_right_where_the_most_negative_is_the_larger() -> None:
    theta = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0, 1.0, -9.0], dtype=torch.float64)
    spectrum = extreme_eigenvalues(hessian(evaluate(lambda: (scale * theta**2).sum() / 2, [theta])), top=1, bottom=1)
    assert spectrum.top[0].value == pytest.approx(2.0, rel=1e-9)
    assert spectrum.bottom[0].value == pytest.approx(-9.0, rel=1e-9)


def test_softmax_regression_at_zero_has_every_eigenvalue_nine_times() -> None:
    """There the Hessian is S (x) (I - 11'/C) / C, S the second moment of [x; 1]: eigenvalues of S/C, C - 1 times."""
    torch.manual_seed(0)
    x = torch.randn(60, 4).double() * torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    layer = nn.Linear(4, 10).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    evaluation = evaluate(lambda: F.cross_entropy(layer(x), torch.arange(60) % 10), layer.parameters())
    inputs = torch.cat([x, torch.ones(60, 1).double()], 1)
    exact = torch.linalg.eigvalsh(inputs.T @ inputs / 60).flip(0) / 10
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        spectrum = extreme_eigenvalues(A, top=12, bottom=0, max_products=300)
        found = torch.tensor([e.value for e in spectrum.top]).double()
        torch.testing.assert_close(found, torch.cat([exact[0].repeat(9), exact[1].repeat(3)]), rtol=1e-3, atol=0)
        assert spectrum.converged
