"""Closures that clamp or normalise parameters: evaluated where they put them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning_problems import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import (
    CubicNewton,
    DampedNewton,
    HessianFree,
    LevenbergMarquardt,
    NewtonCG,
    TrustRegionNewton,
    evaluate,
    gauss_newton,
    hessian,
)
from newtonopt.callbacks import CurvatureMonitor

OPTIMIZERS = [HessianFree, NewtonCG, TrustRegionNewton, CubicNewton, DampedNewton, LevenbergMarquardt]
PLACES = ("before", "between", "after")


class Bounded:
    """Fits `a exp(b t)` to data, the closure keeping both entries in a box, as PINA keeps an inverse problem's."""

    def __init__(self, start: tuple[float, float], box: tuple[float, float], place: str, by_data: bool = True) -> None:
        self.p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.box, self.place, self.by_data = box, place, by_data
        self.t = torch.linspace(0, 1, 9, dtype=torch.float64)
        self.y = 2 * torch.exp(0.5 * self.t)

    def project(self) -> None:
        with torch.no_grad():
            (self.p.data if self.by_data else self.p).clamp_(*self.box)

    def loss(self) -> Tensor:
        return F.mse_loss(self.p[0] * torch.exp(self.p[1] * self.t), self.y)

    def closure(self) -> Tensor:
        self.p.grad = None
        if self.place == "before":
            self.project()
        loss = self.loss()
        if self.place == "between":
            self.project()
        loss.backward()
        if self.place == "after":
            self.project()
        return loss


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_minimum_inside_the_bounds_is_found_from_outside(optimizer: Any, place: str) -> None:
    problem = Bounded((5.0, -4.0), (0.1, 3.0), place)
    trained = optimizer([problem.p])
    for _ in range(25):
        # What the closure returned is the loss where it left the parameters.
        returned = float(trained.step(problem.closure))
        assert returned == trained.last_step.loss
        assert bool(((problem.p >= 0.1) & (problem.p <= 3.0)).all())
    assert problem.p.tolist() == pytest.approx([2.0, 0.5], abs=1e-4)


@pytest.mark.parametrize("products", ["cached", "streamed"])
@pytest.mark.parametrize(
    ("place", "by_data"), [(p, d) for p in PLACES for d in (True, False) if (p, d) != ("between", False)]
)
def test_on_a_bound_every_step_taken_decreases_the_loss(place: str, by_data: bool, products: Any) -> None:
    problem = Bounded((0.5, 0.1), (0.0, 1.5), place, by_data)
    trained = HessianFree([problem.p], products=products)
    losses = [float(trained.step(problem.closure)) for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert problem.p[0] == 1.5 and losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
def test_an_evaluation_within_the_bounds_is_that_of_the_loss_alone(products: Any) -> None:
    for place, by_data in (("before", False), ("between", True), ("after", False)):
        problem = Bounded((1.0, 0.2), (0.1, 3.0), place, by_data)
        found = evaluate(problem.closure, [problem.p], products=products)
        wanted = evaluate(problem.loss, [problem.p])
        assert torch.equal(found.gradient, wanted.gradient)
        for operator in (hessian, gauss_newton):
            assert torch.allclose(operator(found).dense(), operator(wanted).dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
def test_an_evaluation_outside_the_bounds_leaves_all_as_it_was_and_says_what_to_do(place: str) -> None:
    problem = Bounded((5.0, -4.0), (0.1, 3.0), place)
    before = problem.p.detach().clone()
    with pytest.raises(RuntimeError, match=r"call closure\(\) once first"):
        evaluate(problem.closure, [problem.p])
    assert torch.equal(problem.p, before)
    problem.closure()
    assert evaluate(problem.closure, [problem.p]).gradient.shape == (2,)


def test_differences_across_a_bound_are_an_error() -> None:
    problem = Bounded((0.1, 0.2), (0.1, 3.0), "before")
    evaluation = evaluate(problem.closure, [problem.p], products="finite_difference")
    with pytest.raises(RuntimeError, match=r'lies on its bound.*products="cached"'):
        hessian(evaluation) @ torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize("start", [(1.0, 0.2), (5.0, -4.0)])
def test_a_closure_that_trains_the_parameters_is_an_error(start: tuple[float, float]) -> None:
    problem = Bounded(start, (0.1, 3.0), "before")
    before = problem.p.detach().clone()

    def training() -> Tensor:
        loss = problem.closure()
        problem.p.data.mul_(0.99)
        return loss

    with pytest.raises(RuntimeError, match=r"changed them again.*Change them after the step"):
        HessianFree([problem.p]).step(training)
    assert torch.equal(problem.p, before)


@pytest.mark.parametrize("moves", ["loss", "curvature", "both"])
def test_a_curvature_closure_is_evaluated_where_the_closure_puts_the_parameters(moves: str) -> None:
    losses = []
    for start in ((5.0, -4.0), (3.0, 0.1)):
        problem = Bounded(start, (0.1, 3.0), "before")
        closures = [problem.closure if moves in (name, "both") else problem.loss for name in ("loss", "curvature")]
        if moves == "curvature" and start[0] > 3:
            with pytest.raises(RuntimeError, match=r"curvature_closure failed\. The closure changed the parameters"):
                HessianFree([problem.p]).step(*closures)
            continue
        trained = HessianFree([problem.p])
        losses.append([float(trained.step(*closures)) for _ in range(5)])
    assert all(run == losses[0] for run in losses)


def _renormed() -> tuple[nn.Module, Callable[[], Tensor]]:
    table = nn.Embedding(5, 3, max_norm=1.0).double()
    index, target = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3, dtype=torch.float64)
    return table, lambda: F.mse_loss(table(index), target)


def _normalised() -> tuple[nn.Module, Callable[[], Tensor]]:
    layer, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=torch.float64)

    def loss() -> Tensor:
        with torch.no_grad():
            layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))
        return F.mse_loss(layer(x), x[:, :2] * 2 + 1)

    return layer, loss


@pytest.mark.parametrize("build", [_renormed, _normalised])
@pytest.mark.parametrize("products", ["cached", "streamed", "auto"])
def test_embeddings_with_a_norm_and_normalised_weights(build: Any, products: Any) -> None:
    torch.manual_seed(0)
    model, loss = build()
    optimizer = HessianFree(model.parameters(), products=products)
    losses = [float(optimizer.step(loss)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0] and losses == sorted(losses, reverse=True)
    assert math.isfinite(losses[-1])


class Inverse(L.LightningModule):
    """Clamps two unknowns after each forward pass; `hidden` keeps the second out of the module, as PINA does."""

    def __init__(self, optimizer: Any, hidden: bool) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.tensor([2.9]))
        unknown = nn.Parameter(torch.tensor([2.9]))
        self.unknown = [unknown] if hidden else nn.ParameterList([unknown])
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        t, y = batch
        loss = F.mse_loss(self.inner * torch.exp(self.unknown[0] * t), y)
        for p in (self.inner, self.unknown[0]):
            p.data.clamp_(0.1, 3.0)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer([self.inner, self.unknown[0]])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("optimizer", [lambda params: torch.optim.SGD(params, lr=0.003), HessianFree])
def test_a_monitor_measures_within_the_bounds_and_changes_nothing(optimizer: Any, hidden: bool) -> None:
    t = torch.linspace(0, 1, 8)[:, None]
    ends, values = [], []
    for callbacks in ([], [CurvatureMonitor(every_n_train_steps=1, top=1, bottom=1)]):
        module = Inverse(optimizer, hidden)
        trainer = quiet_trainer(max_epochs=6, callbacks=callbacks)
        trainer.fit(module, DataLoader(TensorDataset(t, 20 * torch.exp(3 * t)), batch_size=8))
        ends.append([module.inner.item(), module.unknown[0].item()])
        values.append(trainer.callback_metrics)
    assert ends[0] == ends[1]
    assert math.isfinite(float(values[1]["curvature/lambda_max"]))


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_a_closure_that_trains_by_its_gradients_is_refused(rate: float) -> None:
    x = torch.tensor([2.0, -1.5, 0.7], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=rate)

    def closure() -> Tensor:
        sgd.zero_grad()
        loss = ((x - 1) ** 2).sum()
        loss.backward()
        sgd.step()
        return loss

    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="changed them again"):
        HessianFree([x]).step(closure)
    assert torch.equal(x, before)


def test_a_projection_that_guards_its_division_is_one() -> None:
    x = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([x])

    def closure() -> Tensor:
        with torch.no_grad():
            x.clamp_(min=0).div_(x.sum() + 1e-12)
        optimizer.zero_grad()
        loss = ((x - torch.tensor([0.2, 0.5, 0.1]).double()) ** 2).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_run_in_forward_mode_leaves_the_parameters_to_the_bit() -> None:
    """A weight that is normalised again may differ by rounding, and forward mode gives up where one is written to."""
    torch.manual_seed(0)
    moved = 0
    for _ in range(20):
        weight = nn.Parameter(torch.randn(7))

        def closure(weight: nn.Parameter = weight) -> Tensor:
            with torch.no_grad():
                weight.div_(weight.norm())
            return F.mse_loss(weight * 2.0, torch.ones(7))

        closure()
        before = weight.detach().clone()
        moved += not torch.equal(before / before.norm(), before)
        G = gauss_newton(evaluate(closure, [weight], products="streamed"))
        assert torch.allclose(G @ torch.ones(7), torch.full((7,), 8 / 7))
        assert torch.equal(weight, before)
    assert moved
