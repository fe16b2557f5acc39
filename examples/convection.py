"""A physics-informed network by exact Levenberg-Marquardt steps: `python examples/convection.py`.

The convection equation `u_t + beta u_x = 0` with `u(x, 0) = sin x` and periodic ends; the solution is
`sin(x - beta t)`. First-order methods stall here for large beta, at a wrong solution. The closure knows nothing of
newtonopt. It takes about 20 seconds, and leaves a picture of the solution and of the convergence in convection.png.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from newtonopt import LevenbergMarquardt


def main(beta: float = 10.0, steps: int = 150, picture: str = "convection.png") -> float:
    """Train, draw, and return the relative error."""
    torch.manual_seed(0)
    widths = (2, 30, 30, 30, 1)
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    x = (2 * pi * torch.rand(600, 1, dtype=torch.float64)).requires_grad_()
    t = torch.rand(600, 1, dtype=torch.float64).requires_grad_()
    places, times = line(0.0, 2 * pi, 100), line(0.0, 1.0, 50)
    start = torch.cat([places, torch.zeros_like(places)], dim=1)
    left, right = (torch.cat([torch.full_like(times, end), times], dim=1) for end in (0.0, 2 * pi))
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        loss = (
            (u_t + beta * u_x).square().mean()
            + F.mse_loss(model(start), places.sin())
            + F.mse_loss(model(left), model(right))
        )
        loss.backward()
        return loss

    grid = torch.cartesian_prod(line(0.0, 2 * pi, 128)[:, 0], line(0.0, 1.0, 64)[:, 0])
    exact = torch.sin(grid[:, 0] - beta * grid[:, 1])
    losses, errors = [], []
    for _ in track(range(steps), "training"):
        losses.append(float(optimizer.step(closure)))
        with torch.no_grad():
            found = model(grid)[:, 0]
        errors.append(float((found - exact).norm() / exact.norm()))
    print(f"loss {losses[-1]:.1e}, relative error {errors[-1]:.1e} after {steps} steps; see {picture}")
    draw(found.view(128, 64), losses, errors, picture)
    return errors[-1]


def line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)[:, None]


def draw(found: Tensor, losses: list[float], errors: list[float], path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(found.numpy(), origin="lower", extent=(0, 1, 0, 2 * pi), aspect="auto", cmap="RdBu")
    figure.colorbar(image, ax=left, label="u")
    left.set(xlabel="t", ylabel="x", title="the network's solution")
    right.semilogy(losses, label="loss")
    right.semilogy(errors, label="relative L2 error")
    right.set(xlabel="step", title="convergence")
    right.legend(frameon=False)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, default=10.0, help="speed of the convection (default: 10)")
    parser.add_argument("--steps", type=int, default=150, help="default: 150")
    args = parser.parse_args()
    main(args.beta, args.steps)
