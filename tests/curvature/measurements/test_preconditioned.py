"""The largest eigenvalue as an adaptive optimizer sees it, among other measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@pytest.mark.parametrize("centered", [False, True])
def test_tracking_keeps_up_with_a_preconditioner_that_changes_at_every_step(centered: bool) -> None:
    """The two largest eigenvalues cross; tracking one of them alone was 16 % off."""
    torch.manual_seed(1)
    x = torch.randn(40, 4, dtype=torch.float64)
    y = (2 * x.sum(1, keepdim=True)).sin()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, centered=centered, momentum=0.5, weight_decay=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    last, off = None, []
    for step in range(60):
        optimizer.step(closure)
        settings: dict[str, Any] = {"top": 1, "bottom": 0, "sharpness": None, "max_products": 24}
        tracked = measure(closure, model.parameters(), optimizer, **settings, last=last if step % 20 else None)
        certified = measure(closure, model.parameters(), optimizer, **settings)
        one, other = (found.read("preconditioned_lambda_max") for found in (tracked, certified))
        assert one is not None and other is not None
        off.append(abs(one / other - 1))
        last = tracked
    assert sum(error > 0.02 for error in off) <= 3
