"""What crosses between a device and the host: scalars, once an iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, read_sizes, waits
from problems import build
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton, hessian
from newtonopt.solvers.cg import conjugate_gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", [hessian, gauss_newton], ids=lambda f: f.__name__)
def test_an_iteration_of_conjugate_gradients_waits_once(operator: Any, device: str) -> None:
    case = build("mlp", "mse", device=device)
    evaluation = evaluate(case.closure, case.params)
    A = operator(evaluation).shift(1.0)
    A @ evaluation.gradient
    counts = {}
    for iterations in (3, 8):
        with waits(device) as found:
            solution = conjugate_gradients(
                A, evaluation.gradient, max_iterations=iterations, progress_tolerance=1e-9, keep_path=True
            )
        assert solution.iterations == iterations
        counts[iterations] = found.total()
    assert counts[3] > 0
    assert counts[8] - counts[3] <= 5


@pytest.mark.parametrize("device", DEVICES)
def test_only_scalars_come_back(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(device)
    x, y = torch.randn(128, 64, device=device), torch.randint(0, 10, (128,), device=device)
    optimizer = HessianFree(model.parameters(), preconditioner=None, max_iterations=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with read_sizes(device) as sizes:
        optimizer.step(closure)
    assert sizes
    assert max(sizes) <= 16
