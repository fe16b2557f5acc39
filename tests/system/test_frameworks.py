"""Training loops of other libraries, where they are installed, and stand-ins for the loops that need care."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from newtonopt import DampedNewton, HessianFree


def data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)


def closure_of(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def test_a_step_without_a_closure_names_who_does_so_and_what_helps() -> None:
    model, x, y = data()
    optimizer = HessianFree(model.parameters())
    F.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"(?s)16-mixed.*Trainer.*ignite.*Pyro.*BoTorch.*docs/setups.md.*pre_hook"):
        optimizer.step()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure_of(opt, model, x, y)), {}))
    assert float(optimizer.step()) > float(optimizer.step())


# A stand-in for accelerate's optimizer, which runs no closure while gradients are accumulated.
ACCELERATE = """
class AcceleratedOptimizer:
    def __init__(self, optimizer, state):
        self.optimizer, self.gradient_state = optimizer, state

    def step(self, closure=None):
        if self.gradient_state.sync_gradients:
            self.optimizer.step(closure)
"""


def test_accelerates_accumulation_is_refused_before_anything_is_run() -> None:
    module = types.ModuleType("accelerate.optimizer")
    exec(ACCELERATE, vars(module))
    model, x, y = data()
    optimizer = HessianFree(model.parameters())
    before = model.weight.detach().clone()
    state = types.SimpleNamespace(sync_gradients=True, num_steps=2)
    with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps=2\) .*set it to 1, and loop over the micro"):
        module.AcceleratedOptimizer(optimizer, state).step(closure_of(optimizer, model, x, y))
    assert torch.equal(model.weight, before) and not optimizer.state
    state.num_steps = 1
    module.AcceleratedOptimizer(optimizer, state).step(closure_of(optimizer, model, x, y))
    assert not torch.equal(model.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_accelerate(count: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=count)
    model, x, y = data()
    inner = HessianFree(model.parameters())
    model, optimizer = accelerator.prepare(model, inner)
    losses = []
    for step in range(2):
        with accelerator.accumulate(model):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                return loss

            if count == 2 and step == 1:
                with pytest.raises(RuntimeError, match="gradient_accumulation_steps=2"):
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
                losses.append(inner.last_step.loss if inner.last_step else None)
    assert count == 2 or losses[1] < losses[0]


@pytest.mark.slow
def test_ignite() -> None:
    engine = pytest.importorskip("ignite.engine")
    model, x, y = data()
    optimizer = HessianFree(model.parameters())
    supervised = engine.create_supervised_trainer(model, optimizer, F.mse_loss)
    with pytest.raises(RuntimeError, match="create_supervised_trainer"):
        supervised.run([(x, y)], max_epochs=1)

    def update(engine: Any, batch: tuple[Tensor, Tensor]) -> float:
        return float(optimizer.step(closure_of(optimizer, model, *batch)))

    losses = [engine.Engine(update).run([(x, y)], max_epochs=1).output for _ in range(2)]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    model, x, y = data()
    settings = {"criterion": nn.MSELoss, "optimizer": HessianFree, "train_split": None, "verbose": 0, "max_epochs": 3}
    net = skorch.NeuralNetRegressor(model, lr=1.0, batch_size=16, **settings)
    net.fit(x.numpy(), y.numpy())
    assert net.history[-1, "train_loss"] < net.history[0, "train_loss"]
    with pytest.warns(UserWarning, match="lr=0.01"):
        skorch.NeuralNetRegressor(model, **settings).initialize()


@pytest.mark.slow
def test_pyro() -> None:
    pyro = pytest.importorskip("pyro")
    torch.manual_seed(0)
    observed = 3.0 + torch.randn(20)
    loc = nn.Parameter(torch.zeros(()))

    def model() -> None:
        mean = pyro.sample("mean", pyro.distributions.Normal(0.0, 10.0))
        with pyro.plate("data", 20):
            pyro.sample("obs", pyro.distributions.Normal(mean, 1.0), obs=observed)

    def guide() -> None:
        pyro.sample("mean", pyro.distributions.Normal(loc, 0.1))

    elbo = pyro.infer.Trace_ELBO().differentiable_loss
    optimizer = DampedNewton([loc])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo(model, guide)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert abs(loc.item() - observed.mean().item()) < 0.5


SMALL = r"lr=0\.0\d+ multiplies each Newton step.*Leave lr at 1"


def test_a_rate_far_below_one_warns_once_when_the_optimizer_is_made() -> None:
    model, x, y = data()
    for given in (0.01, torch.tensor(0.01)):
        with pytest.warns(UserWarning, match=SMALL) as seen:
            optimizer = HessianFree(model.parameters(), lr=given)
            for _ in range(2):
                optimizer.step(closure_of(optimizer, model, x, y))
            optimizer.load_state_dict(optimizer.state_dict())
        assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match=SMALL):
        HessianFree([{"params": [model.weight], "lr": 0.05}, {"params": [model.bias], "lr": 0.0}])


def test_rates_of_groups_and_of_schedulers_do_not_warn() -> None:
    model, x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianFree(model.parameters(), lr=0.1)
        HessianFree(model.parameters(), lr=0.0)
        HessianFree([{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-3}])
        for schedule in (
            lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 3),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
            lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.01 * step),
        ):
            optimizer = HessianFree(model.parameters())
            scheduler = schedule(optimizer)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, model, x, y))
                scheduler.step()
