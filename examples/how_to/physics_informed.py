"""A physics-informed network by Levenberg-Marquardt steps: `python examples/how_to/physics_informed.py`.

The convection equation `u_t + 10 u_x = 0` with `u(x, 0) = sin x` and periodic ends; the solution is `sin(x - 10 t)`.
The closure is the one that `torch.optim.LBFGS` takes. Adam, L-BFGS and LevenbergMarquardt get the same processor time.
The points are drawn anew before each step; L-BFGS keeps its points, because its memory does not survive new ones.
"""

from __future__ import annotations

import time
from functools import partial
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import LevenbergMarquardt

SPEED = 10.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(30, 30), nn.Tanh())]
    return nn.Sequential(nn.Linear(2, 30), nn.Tanh(), *hidden, nn.Linear(30, 1)).double()


def train(make, draws_anew: bool, seconds: float) -> tuple[float, float, int]:
    """Return the last loss, the relative error of the solution and the number of steps."""
    model = network()
    optimizer = make(model.parameters())
    places = torch.linspace(0, 2 * pi, 100).double()[:, None]
    times = torch.linspace(0, 1, 50).double()[:, None]
    start = torch.cat([places, 0 * places], dim=1)
    left, right = (torch.cat([torch.full_like(times, end), times], dim=1) for end in (0.0, 2 * pi))
    points = torch.empty(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(points)
        (slopes,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        residual = slopes[:, 1] + SPEED * slopes[:, 0]
        loss = residual.square().mean() + F.mse_loss(model(start), places.sin()) + F.mse_loss(model(left), model(right))
        loss.backward()
        return loss

    steps, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        if draws_anew or steps == 0:
            points = (torch.rand(500, 2).double() * torch.tensor([2 * pi, 1.0])).requires_grad_()
        optimizer.step(closure)
        steps += 1
    grid = torch.cartesian_prod(torch.linspace(0, 2 * pi, 101), torch.linspace(0, 1, 101)).double()
    exact = torch.sin(grid[:, :1] - SPEED * grid[:, 1:])
    return closure().item(), float((model(grid) - exact).norm().detach() / exact.norm()), steps


def main(seconds: float = 8.0) -> dict[str, float]:
    """Train by each optimizer, and return the relative errors."""
    errors = {}
    for name, make, draws_anew in [
        ("Adam", torch.optim.Adam, True),
        ("L-BFGS", partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"), False),
        ("LevenbergMarquardt", LevenbergMarquardt, True),
    ]:
        loss, errors[name], steps = train(make, draws_anew, seconds)
        print(f"{name:20s} loss {loss:.1e}, relative error {errors[name]:.1e} after {steps} steps")
    return errors


if __name__ == "__main__":
    main()
