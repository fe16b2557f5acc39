"""Signs of the Hessian's eigenvalues over the plane, for the monkey saddle x³ - 3xy² and, to compare, x³ + y³.

python examples/gallery/saddle_map.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import hessian, vmap

from newtonopt import evaluate
from newtonopt.curvature import critical_point

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x³ - 3xy²": lambda p: p[0] ** 3 - 3 * p[0] * p[1] ** 2,
    "x³ + y³": lambda p: p[0] ** 3 + p[1] ** 3,
}
KINDS = {"saddle": "#e6b84c", "convex": "#4c8fc7", "concave": "#b8567c", "degenerate": "#222222"}


def kinds(eigenvalues: Tensor) -> Tensor:
    """Return the index into KINDS for each row of ascending eigenvalues."""
    low, high = eigenvalues.unbind(-1)
    zero = 1e-9
    found = torch.full(low.shape, 3)
    found[(low < -zero) & (high > zero)] = 0
    found[low > zero] = 1
    found[high < -zero] = 2
    return found


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return the share of each kind over the grid of the monkey saddle."""
    line = torch.linspace(-1, 1, 41, dtype=torch.float64)
    plane = torch.cartesian_prod(line, line)
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    shares = {}
    for axes, (name, function) in zip(figure.subplots(1, 2), FUNCTIONS.items(), strict=True):
        eigenvalues = torch.linalg.eigvalsh(vmap(hessian(function))(plane)).view(41, 41, 2)
        found = kinds(eigenvalues)
        for index, kind in enumerate(KINDS):
            shares[f"{name}: {kind}"] = float((found == index).double().mean())
        axes.pcolormesh(
            line.numpy(), line.numpy(), found.T.numpy(), cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=3
        )
        levels = axes.contour(line, line, eigenvalues.abs().amax(-1).T, colors="k", linewidths=0.6, levels=5)
        axes.clabel(levels, fontsize=7)
        axes.set(title=f"{name}; lines: largest |eigenvalue|", xlabel="x", ylabel="y", aspect="equal")
        axes.title.set_fontsize(10)
        for kind, colour in KINDS.items():
            axes.plot([], [], "s", color=colour, label=kind)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    origin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    verdict = critical_point(evaluate(lambda: FUNCTIONS["x³ - 3xy²"](origin), [origin]))
    print(f"x³ - 3xy² at the origin: {verdict}")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "saddle_map.png", dpi=90)
    return {**shares, "the origin is degenerate": verdict.kind == "degenerate"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
