"""The largest eigenvalue as an adaptive optimizer sees it, among other measurements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from newtonopt.curvature import Preconditioned, measure


def test_it_is_the_largest_of_the_scaled_diagonal_of_a_quadratic() -> None:
    scales = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = torch.optim.RMSprop([theta], lr=0.1)
    theta.grad = scales * theta.detach()
    optimizer.step()
    found = measure(lambda: (scales * theta.square()).sum() / 2, [theta], optimizer, measurements=[Preconditioned()])
    divisors = optimizer.state[theta]["square_avg"].sqrt() + 1e-8
    assert found["curvature/preconditioned_lambda_max"] == pytest.approx(float((scales / divisors).max()), rel=1e-9)


def test_it_needs_an_optimizer() -> None:
    theta = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"optimizer must be given to measure Preconditioned, got None\. Pass"):
        measure(lambda: theta.square().sum(), [theta], measurements=[Preconditioned()])


def test_words_say_why_there_is_no_preconditioned_eigenvalue() -> None:
    p = nn.Parameter(torch.ones(2))
    for optimizer, why in (
        (
            torch.optim.Adam([p], lr=0.1),
            "optimizer must have a state (exp_avg_sq) for each parameter, got none for a parameter of shape (2,)",
        ),
        (torch.optim.LBFGS([p]), "optimizer must have a known stability threshold, "),
    ):
        found = measure(lambda: p.square().sum(), [p], optimizer, measurements=[Preconditioned()])
        assert f"Preconditioned is not measured: {why}" in found.in_words()
        assert "Preconditioned" not in measure(lambda: p.square().sum(), [p], optimizer).in_words()
