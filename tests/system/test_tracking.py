"""Tracked eigenvalues over real training runs, against certified ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from newtonopt.curvature import Measured, measure

Training = tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer, int]


def edge_of_stability() -> Training:
    """Full-batch gradient descent whose largest eigenvalue rises to 2 / lr and hovers there (Cohen et al. 2021)."""
    images, labels = _digits(400)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    targets = F.one_hot(labels, 10).float()

    def loss() -> Tensor:
        return 0.5 * (model(images) - targets).square().sum(1).mean()

    return model, loss, torch.optim.SGD(model.parameters(), lr=0.4), 20


def convolutions() -> Training:
    """Adam on a small convolutional network, with fifty steps between two measurements."""
    images, labels = _digits(128)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(128, 10))
    return (
        model,
        lambda: F.cross_entropy(model(images), labels),
        torch.optim.Adam(model.parameters(), lr=1e-3),
        50,
    )


def _digits(count: int) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(array)[:count] for array in load_digits(return_X_y=True))
    images = images.float()
    return (images - images.mean(0)) / (images.std(0) + 1e-3), labels


def _train(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _values(model: nn.Module, loss: Callable[[], Tensor], last: Measured | None, **settings: Any) -> Measured:
    return measure(loss, model.parameters(), sharpness=None, gradient=last is not None, last=last, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("run", [edge_of_stability, convolutions])
def test_tracked_values_agree_with_certified_ones(run: Callable[[], Training]) -> None:
    """The goal is 95 of 100 largest eigenvalues within 2 %; another processor may take away a little of that."""
    model, loss, optimizer, gap = run()
    first = last = _values(model, loss, None, max_products=24)
    errors, shown = [], 0
    for _ in range(40):
        _train(loss, optimizer, gap)
        last = _values(model, loss, last, max_products=24)
        truth = _values(model, loss, None, top=1, bottom=0, max_products=100)
        errors.append(abs(last["curvature/lambda_max"] / truth["curvature/lambda_max"] - 1.0))
        shown += "curvature/lambda_2" in last and "curvature/lambda_3" in last
    assert sum(error <= 0.03 for error in errors) >= 36, errors
    assert shown >= 36
    # The eigenvectors from before training have been lost altogether.
    found = _values(model, loss, first, max_products=24)
    assert found["curvature/lambda_max"] == pytest.approx(truth["curvature/lambda_max"], rel=0.03)
