"""Which terms of a physics-informed loss pull against each other: `python examples/loss_terms.py`.

The network and the closure of `examples/convection.py`, trained by Adam. `measure` compares the gradients of the three
terms every 25 steps: the equation, the initial values and the periodic ends. It takes about a minute, and leaves a
picture in loss_terms.png.
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

from newtonopt.curvature import Alignment, Measured, measure

NAMES = ("equation", "start", "ends")


def main(beta: float = 30.0, steps: int = 2000, every: int = 25, picture: str = "loss_terms.png") -> list[Measured]:
    """Train, draw, and return the measurements."""
    torch.manual_seed(0)
    widths = (2, 30, 30, 30, 1)
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    x = (2 * pi * torch.rand(600, 1, dtype=torch.float64)).requires_grad_()
    t = torch.rand(600, 1, dtype=torch.float64).requires_grad_()
    places, times = line(0.0, 2 * pi, 100), line(0.0, 1.0, 50)
    start = torch.cat([places, torch.zeros_like(places)], dim=1)
    left, right = (torch.cat([torch.full_like(times, end), times], dim=1) for end in (0.0, 2 * pi))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

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

    found: list[Measured] = []
    for step in track(range(steps + 1), "training"):
        if step % every == 0:
            terms = Alignment(NAMES)
            last = found[-1] if found else None
            found.append(
                measure(closure, model.parameters(), top=1, bottom=0, sharpness=None, measurements=[terms], last=last)
            )
        optimizer.step(closure)
    print(found[-1].in_words())
    draw(found, every, picture)
    return found


def line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)[:, None]


def draw(found: list[Measured], every: int, path: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [every * i for i in range(len(found))]
    for first, second in (("equation", "start"), ("equation", "ends"), ("start", "ends")):
        left.plot(steps, [one[f"curvature/alignment_of/{first}_{second}"] for one in found], label=f"{first}, {second}")
    left.plot(steps, [one["curvature/conflict"] for one in found], "k--", label="share that cancels")
    left.axhline(0.0, color="gray", linewidth=0.8)
    left.set(xlabel="step", title="cosines between the terms' gradients", ylim=(-1.05, 1.05))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
    result = found[-1].of(Alignment)
    if result is not None:
        result.plot(ax=right)
        right.set_title(f"step {steps[-1]}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, default=30.0, help="speed of the convection (default: 30)")
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    args = parser.parse_args()
    main(args.beta, args.steps)
