"""A loss or parameters of another scale than the first damping, weight or radius: found in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newtonopt import CubicNewton, DampedNewton, HessianFree, NewtonCG, TrustRegionNewton

MEMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "free": (HessianFree, {"curvature": "hessian"}),
    "damped": (DampedNewton, {}),
    "truncated": (NewtonCG, {}),
    "trust": (TrustRegionNewton, {}),
    "cubic": (CubicNewton, {}),
}


def bowl(x: Tensor) -> Tensor:
    return (x - 1).square().sum()


def valley(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def wells(x: Tensor) -> Tensor:
    return (x - 1).cosh().sum()


PROBLEMS: dict[str, tuple[Callable[[Tensor], Tensor], list[float], int]] = {
    "bowl": (bowl, [0.0, 3.0], 60),
    "valley": (valley, [-1.2, 1.0], 150),
    "wells": (wells, [0.0, 3.0], 60),
}
SCALES = [
    ("bowl", 1e-20, 1.0),
    pytest.param("bowl", 1e20, 1.0, marks=pytest.mark.slow),
    pytest.param("valley", 1e-20, 1.0, marks=pytest.mark.slow),
    pytest.param("valley", 1e20, 1.0, marks=pytest.mark.slow),
    pytest.param("valley", 1.0, 1e8, marks=pytest.mark.slow),
    pytest.param("valley", 1.0, 1e-8, marks=pytest.mark.slow),
    pytest.param("wells", 1.0, 1e8, marks=pytest.mark.slow),
    ("wells", 1.0, 1e-8),
]


@pytest.mark.parametrize(("problem", "of_loss", "of_x"), SCALES)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_minimum_is_reached_at_any_scale(name: str, problem: str, of_loss: float, of_x: float) -> None:
    value, start, steps = PROBLEMS[problem]
    x = (torch.tensor(start, dtype=torch.float64) * of_x).requires_grad_()
    kind, settings = MEMBERS[name]
    optimizer = kind([x], **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = of_loss * value(x / of_x)
        loss.backward()
        return loss

    optimizer.step(closure)
    first = optimizer.last_step.gradient_norm
    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.last_step.gradient_norm < 1e-6 * first:
            break
    assert optimizer.last_step.gradient_norm < 1e-6 * first


def test_squares_that_overflow_in_float32_are_no_rounding() -> None:
    y = torch.tensor([5.0, -3.0], requires_grad=True)
    optimizer = TrustRegionNewton([y])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1e8 * ((y - 1).square().sum() + (y[0] * y[1] - 1) ** 2)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert losses[-1] < 1e-3 * losses[0]
