"""DeepXDE trained by Levenberg-Marquardt steps, Adam and L-BFGS: `python examples/how_to/deepxde_model.py`.

The diffusion equation of DeepXDE's own examples, `y_t = y_xx - exp(-t) (sin(pi x) - pi^2 sin(pi x))`, with the solution
`exp(-t) sin(pi x)`. The model is DeepXDE's, as its documentation writes it; `compile` takes the optimizer. Each method
gets the same processor time. Needs `pip install deepxde`, and runs with `DDE_BACKEND=pytorch`.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch

from newtonopt import LevenbergMarquardt


def residual(x, y):
    dy_t = dde.grad.jacobian(y, x, i=0, j=1)
    dy_xx = dde.grad.hessian(y, x, i=0, j=0)
    source = torch.sin(np.pi * x[:, 0:1]) * (1 - np.pi**2)
    return dy_t - dy_xx + torch.exp(-x[:, 1:]) * source


def solution(x):
    return np.sin(np.pi * x[:, 0:1]) * np.exp(-x[:, 1:])


def diffusion() -> dde.Model:
    geometry, times = dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1)
    domain = dde.geometry.GeometryXTime(geometry, times)
    edges = dde.icbc.DirichletBC(domain, solution, lambda _, on_boundary: on_boundary)
    start = dde.icbc.IC(domain, solution, lambda _, on_initial: on_initial)
    data = dde.data.TimePDE(
        domain, residual, [edges, start], num_domain=200, num_boundary=40, num_initial=20,
        train_distribution="Hammersley", solution=solution, num_test=1000,
    )  # fmt: skip
    return dde.Model(data, dde.nn.FNN([2] + [32] * 3 + [1], "tanh", "Glorot uniform"))


class Budget(dde.callbacks.Callback):
    """Stop training after so many seconds of processor time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self) -> None:
        self.end = time.process_time() + self.seconds

    def on_epoch_end(self) -> None:
        self.model.stop_training = time.process_time() > self.end


def main(lbfgs_steps: int = 900) -> dict[str, float]:
    """Train by each optimizer, in the processor time that L-BFGS takes, and return the errors of the solutions."""
    dde.config.set_default_float("float64")
    dde.optimizers.set_LBFGS_options(maxiter=lbfgs_steps)
    points = np.stack(np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 1, 101)), axis=-1).reshape(-1, 2)
    seconds, errors = float("inf"), {}
    for name in ("L-BFGS", "adam", "LevenbergMarquardt"):
        dde.config.set_random_seed(0)
        model = diffusion()
        if name == "LevenbergMarquardt":
            model.compile(LevenbergMarquardt(model.net.parameters()), verbose=0)
        else:
            model.compile(name, lr=1e-3 if name == "adam" else None, verbose=0)
        start = time.process_time()
        _, state = model.train(iterations=1_000_000, callbacks=[Budget(seconds)], display_every=10_000_000, verbose=0)
        taken = time.process_time() - start
        seconds = min(seconds, taken)
        errors[name] = float(dde.metrics.l2_relative_error(solution(points), model.predict(points)))
        print(f"{name:20s} relative error {errors[name]:.1e} after {state.step} steps, {taken:.1f} s")
    return errors


if __name__ == "__main__":
    main()
