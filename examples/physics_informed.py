"""A physics-informed network by LevenbergMarquardt: `python examples/physics_informed.py`.

The convection equation u_t + 5 u_x = 0 with u(x, 0) = sin x, periodic in x, whose solution is sin(x - 5 t). The closure
differentiates the network inside, and is the one that any optimizer takes.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import LevenbergMarquardt

BETA, STEPS, EVERY = 5.0, 60, 10


def main(picture: str = "convection.png", steps: int = STEPS) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    points = torch.rand(300, 2, dtype=torch.float64) * torch.tensor([2 * math.pi, 1.0], dtype=torch.float64)
    x, t = points[:, :1].requires_grad_(), points[:, 1:].requires_grad_()
    start = torch.stack([torch.linspace(0, 2 * math.pi, 50, dtype=torch.float64), torch.zeros(50).double()], 1)
    times = torch.linspace(0, 1, 30, dtype=torch.float64)
    left, right = torch.stack([0 * times, times], 1), torch.stack([0 * times + 2 * math.pi, times], 1)
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(torch.cat([x, t], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        loss = F.mse_loss(u_t + BETA * u_x, torch.zeros_like(u))
        loss = loss + F.mse_loss(model(start), start[:, :1].sin()) + F.mse_loss(model(left), model(right))
        loss.backward()
        return loss

    losses, report = [], None
    for step in range(steps):
        losses.append(float(optimizer.step(closure)))
        report = optimizer.last_step
        if step % EVERY == 0 and report is not None:
            bend = f"|a|/|v| {report.acceleration:.2f}"
            print(f"step {step:3}  loss {report.loss:.1e}  damping {report.damping:.1e}  {bend}")
    grid = torch.cartesian_prod(torch.linspace(0, 2 * math.pi, 60).double(), torch.linspace(0, 1, 40).double())
    exact = torch.sin(grid[:, :1] - BETA * grid[:, 1:])
    with torch.no_grad():
        found = model(grid)
    error = float((found - exact).norm() / exact.norm())
    print(f"after {steps} steps  loss {losses[-1]:.1e}  relative L2 error {error:.1e}")
    draw(picture, losses, found.view(60, 40))
    return losses[-1], error


def draw(picture: str, losses: list[float], solution: Tensor) -> None:
    """Draw the loss by step and the solution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(losses)
    left.set(xlabel="step", ylabel="loss")
    image = right.imshow(solution.numpy(), origin="lower", aspect="auto", extent=(0, 1, 0, 2 * math.pi))
    right.set(xlabel="t", ylabel="x", title="u(x, t)")
    figure.colorbar(image)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
