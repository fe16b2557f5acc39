"""Preconditioners are renewed when they are due, and refused where they do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import build as build_case
from torch import nn

from newtonopt import HessianFree, evaluate, gauss_newton
from newtonopt.optimizers.model import QuadraticModel
from newtonopt.optimizers.preconditioning import PreconditionedState, prepared
from newtonopt.vectors import memory


def model() -> QuadraticModel:
    case = build_case("mlp", "mse")
    evaluation = evaluate(case.closure, case.params)
    return QuadraticModel(evaluation.gradient, 1.0, float(evaluation.loss), 1e-16, gauss_newton(evaluation))


def test_the_running_mean_forgets_a_hundredth_of_the_past() -> None:
    here, settings = model(), {"preconditioner": "empirical_fisher"}
    old = torch.ones_like(here.gradient)
    _, first = prepared(here, PreconditionedState(), settings)
    precondition, second = prepared(here, PreconditionedState(squared_gradients=old), settings)
    squares = here.gradient.square()
    assert first.squared_gradients is not None and torch.equal(first.squared_gradients, squares)
    assert second.squared_gradients is not None
    torch.testing.assert_close(second.squared_gradients, 0.99 * old + 0.01 * squares)
    apply = precondition(2.0)
    assert apply is not None
    torch.testing.assert_close(apply(old), (second.squared_gradients + 2.0).pow(-0.75))


def test_without_a_preconditioner_there_is_none_and_the_state_stays() -> None:
    state = PreconditionedState()
    precondition, after = prepared(model(), state, {"preconditioner": None})
    assert precondition(1.0) is None and after is state


def test_the_sketch_is_kept_renewed_and_draws_no_global_numbers() -> None:
    case = build_case("mlp", "mse")
    optimizer = HessianFree(case.params, rank=8, refresh_every=30)
    state = torch.get_rng_state()
    since = 30
    for _ in range(12):
        optimizer.step(case.closure)
        assert optimizer.last_step is not None
        sketched = optimizer.last_step.products - optimizer.last_step.iterations >= 8
        assert sketched == (since >= 30)
        since = optimizer.last_step.iterations + (0 if sketched else since)
    assert torch.equal(state, torch.get_rng_state())
    assert optimizer.state_dict()["state"][0]["sketch_vectors"].shape == (43, 8)


def test_the_sketch_makes_conjugate_gradients_short() -> None:
    torch.manual_seed(0)
    X = torch.randn(200, 60).double() * torch.logspace(0, -3, 60).double()
    y = torch.randn(200, 1).double()
    iterations = {}
    for preconditioner in ("nystrom", None):
        layer = nn.Linear(60, 1, bias=False).double()
        nn.init.zeros_(layer.weight)
        optimizer = HessianFree(
            layer.parameters(), damping=1e-6, preconditioner=preconditioner, rank=30, progress_tolerance=1e-6
        )
        optimizer.step(lambda layer=layer: F.mse_loss(layer(X), y))
        assert optimizer.last_step is not None
        iterations[preconditioner] = optimizer.last_step.iterations
    assert iterations["nystrom"] < 0.7 * iterations[None]


def test_a_sketch_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build_case("mlp", "mse")
    optimizer = HessianFree(case.params, rank=20)
    start = case.flat()
    # Two matrices of 43 x 20 numbers.
    needed = 2 * 43 * 20 * 8
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match=r"rank=20, for 43 parameters, would take 13,760 bytes.*empirical_fisher"):
        optimizer.step(case.closure)
    assert torch.equal(case.flat(), start)
    assert not optimizer.state
    monkeypatch.setattr(memory, "available_memory", lambda device: needed)
    optimizer.step(case.closure)
    assert optimizer.last_step is not None and optimizer.last_step.accepted
