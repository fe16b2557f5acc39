"""Pyro's Laplace approximation by Newton steps: `python examples/how_to/pyro_laplace.py`.

Bayesian logistic regression with `AutoLaplaceApproximation`. The model and the guide are Pyro's; a closure that
computes the loss of `SVI` takes the place of `SVI`, which calls `backward` itself and gives the optimizer no closure.
Prints the distance from the mode, in standard deviations of the posterior. Needs `pip install pyro-ppl`.
"""

from __future__ import annotations

import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from newtonopt import DampedNewton


def model(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]).double(), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(torch.tensor(0.0).double(), 1.0))
    with pyro.plate("patients", len(x)):
        pyro.sample("malignant", dist.Bernoulli(logits=x @ weights + bias), obs=y)


def by_svi(guide: AutoLaplaceApproximation, x: Tensor, y: Tensor, steps: int) -> None:
    """Train as Pyro's tutorials do."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)


def by_newton(guide: AutoLaplaceApproximation, x: Tensor, y: Tensor, steps: int) -> None:
    """Train by the same loss, differentiated in a closure."""
    elbo = Trace_ELBO()
    optimizer = DampedNewton(guide.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, x, y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def main(newton_steps: int = 15, svi_steps: int = 500) -> dict[str, float]:
    """Train by both, and return the distance of each from the mode."""
    x, y = (torch.from_numpy(array).double() for array in load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    modes, posterior = {}, None
    for name, train, steps in (("SVI with Adam", by_svi, svi_steps), ("DampedNewton", by_newton, newton_steps)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoLaplaceApproximation(model)
        guide(x, y)  # makes the guide's parameters
        start = time.process_time()
        train(guide, x, y, steps)
        loss = Trace_ELBO().loss(model, guide, x, y)
        modes[name] = guide.loc.detach().clone()
        print(f"{name:15s} loss {loss:.8f} after {steps} steps, {time.process_time() - start:.2f} s")
    posterior = guide.laplace_approximation(x, y).get_posterior()
    deviations = posterior.covariance_matrix.diagonal().sqrt()
    distances = {name: float(((mode - posterior.mean) / deviations).abs().max()) for name, mode in modes.items()}
    print(f"SVI's weights are up to {distances['SVI with Adam']:.1e} standard deviations away from the mode")
    return distances


if __name__ == "__main__":
    main()
