"""Stability thresholds against runs of the optimizer itself on quadratics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newtonopt.curvature import stability_threshold


def _settings() -> st.SearchStrategy[dict[str, Any]]:
    rate = st.floats(1e-3, 10.0)
    decay = st.sampled_from([0.0, 0.01, 0.1])
    plain = st.fixed_dictionaries({"lr": rate, "weight_decay": decay, "dampening": st.sampled_from([0.0, 0.5])})
    momentum = st.floats(0.05, 0.95)
    ball = st.fixed_dictionaries(
        {"lr": rate, "weight_decay": decay, "momentum": momentum, "dampening": st.floats(-0.5, 0.9)}
    )
    nesterov = st.fixed_dictionaries(
        {"lr": rate, "weight_decay": decay, "momentum": momentum, "nesterov": st.just(True)}
    )
    return st.one_of(plain, ball, nesterov)


def _growth(arguments: dict[str, Any], curvature: float, steps: int = 1000) -> float:
    """log |theta| gained over the second half of a run on curvature * theta^2 / 2, as torch.optim.SGD makes it."""
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], **arguments)
    sizes = []
    for _ in range(steps):
        theta.grad = curvature * theta.detach()
        optimizer.step()
        sizes.append(theta.abs().item())
        if not 1e-100 < sizes[-1] < 1e100:
            break
    half = len(sizes) // 2
    return math.log(max(sizes[half:])) - math.log(max(sizes[: max(half, 1)]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(_settings())
def test_sgd_contracts_below_and_diverges_above(arguments: dict[str, Any]) -> None:
    threshold = stability_threshold(torch.optim.SGD([torch.zeros(1)], **arguments))
    total = threshold + arguments["weight_decay"]
    assert _growth(arguments, total * 0.99 - arguments["weight_decay"]) < 0.0
    assert _growth(arguments, total * 1.01 - arguments["weight_decay"]) > 0.0


@pytest.mark.parametrize(
    ("arguments", "threshold"),
    [
        ({"lr": 0.1}, 20.0),
        ({"lr": 0.1, "dampening": 0.5}, 20.0),
        ({"lr": 0.1, "momentum": 0.9}, 38.0),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.9}, 380.0),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, 38.0 / 2.8),
        ({"lr": 0.1, "weight_decay": 3.0}, 17.0),
        ({"lr": 1.0, "weight_decay": 3.0}, -1.0),
        ({"lr": 0.0}, math.inf),
        ({"lr": 0.1, "momentum": 0.5, "dampening": 1.0}, math.inf),
        ({"lr": torch.tensor(0.5)}, 4.0),
    ],
)
def test_closed_forms(arguments: dict[str, Any], threshold: float) -> None:
    assert stability_threshold(torch.optim.SGD([torch.zeros(1)], **arguments)) == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("kind", "arguments", "threshold"),
    [
        (torch.optim.Adam, {"lr": 0.1}, 380.0),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 3.0}, 60.0),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 1.0}, 361.0),
        (torch.optim.NAdam, {"lr": 0.1}, 380.0 / 2.8),
        (torch.optim.NAdam, {"lr": 0.1, "weight_decay": 1.0, "decoupled_weight_decay": True}, 361.0 / 2.8),
        (torch.optim.RAdam, {"lr": 0.1}, 380.0),
        (torch.optim.Adamax, {"lr": 0.1}, 380.0),
        (torch.optim.RMSprop, {"lr": 0.1}, 20.0),
        (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5}, 20.0),
    ],
)
def test_closed_forms_of_adaptive_optimizers(
    kind: type[torch.optim.Optimizer], arguments: dict[str, Any], threshold: float
) -> None:
    assert stability_threshold(kind([torch.zeros(1)], **arguments)) == pytest.approx(threshold)


def test_smallest_of_several_groups_is_sufficient() -> None:
    groups = [
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.3, "momentum": 0.2, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.5, "dampening": 0.5},
    ]
    make = [{"params": [torch.zeros(1)], **group} for group in groups]
    threshold = stability_threshold(torch.optim.SGD(make, lr=1.0))
    singles = [stability_threshold(torch.optim.SGD([torch.zeros(1)], **group)) for group in groups]
    assert threshold == min(singles)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
        H = Q @ torch.diag(threshold * torch.tensor([0.97, 0.5, 0.2], dtype=torch.float64)) @ Q.T
        thetas = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in groups]
        optimizer = torch.optim.SGD([{"params": [p], **g} for p, g in zip(thetas, groups, strict=True)], lr=1.0)
        for _ in range(800):
            for p, g in zip(thetas, H @ torch.cat(thetas).detach(), strict=True):
                p.grad = g[None]
            optimizer.step()
        assert torch.cat(thetas).norm().item() < 1e-3


def test_learning_rate_schedules_are_followed() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert stability_threshold(optimizer) == pytest.approx(40.0)


class _Sharpened(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Renamed(torch.optim.SGD):
    pass


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"optimizer must be one .*, SGD, RMSprop, Adagrad, AdamW, Adam, NAdam.* type Adadelta"
    ):
        stability_threshold(torch.optim.Adadelta([torch.zeros(1)]))
    with pytest.raises(TypeError, match="got a value of type _Sharpened"):
        stability_threshold(_Sharpened([torch.zeros(1)], lr=0.1))
    assert stability_threshold(_Renamed([torch.zeros(1)], lr=0.1)) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximize": True}, "maximize must be False"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) for a stable iteration, got 1.0"),
        ({"momentum": 0.5, "dampening": 1.5}, "dampening must be at most 1, got 1.5"),
    ],
)
def test_groups_without_a_threshold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability_threshold(torch.optim.SGD([torch.zeros(1)], lr=0.1, **arguments))
