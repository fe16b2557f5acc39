"""The decrease that the gradient promises and the actual decrease, for negative, zero and positive curvature.

python examples/gallery/taylor.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from newtonopt import evaluate
from newtonopt.curvature import gradient_curvature

STEP = 0.8


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return promised and actual decreases, and the steps that curvature allows."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    numbers = {}
    cases = {"negative": -1.0, "zero": 0.0, "positive": 1.5}
    for axes, (name, bend) in zip(figure.subplots(1, 3, sharey=True), cases.items(), strict=True):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)

        def f(x: torch.Tensor, bend: float = bend) -> torch.Tensor:
            return -x + bend * x**2 / 2

        evaluation = evaluate(lambda x=x, f=f: f(x).sum(), [x])
        along = gradient_curvature(evaluation)
        promised = STEP * along.gradient_norm**2
        actual = promised - STEP**2 * along.gradient_norm**2 * along.curvature / 2  # Taylor, exact here
        there = -STEP * float(evaluation.gradient)
        line = torch.linspace(-0.3, 1.6, 100, dtype=torch.float64)
        axes.plot(line, f(line), label="loss")
        axes.plot(line, -line, "--", label="what the gradient promises")
        axes.plot(0, 0, "ko", markersize=4)
        axes.annotate("", (there, -promised), (there, 0), arrowprops={"arrowstyle": "->", "color": "C1"})
        axes.annotate("", (there + 0.06, -actual), (there + 0.06, 0), arrowprops={"arrowstyle": "->", "color": "C0"})
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set(title=f"{name} curvature\nfalls by {actual:.2f} of {promised:.2f}", xlabel="x", ylim=(-2.2, 0.9))
        axes.title.set_fontsize(10)
        if along.curvature > 0:
            for step, label in ((along.cauchy_step, "best"), (along.longest_step, "longest")):
                axes.axvline(step, color="0.6", linestyle=":", zorder=0)
                axes.text(step, 0.65, label, ha="center", fontsize=9, bbox={"color": "w"})
        numbers |= {f"{name}: promised": promised, f"{name}: actual": actual, f"{name}: best": along.cauchy_step}
        numbers[f"{name}: happened"] = float(evaluation.loss - f(torch.tensor(there, dtype=torch.float64)))
    figure.axes[0].set(ylabel="loss")
    figure.axes[0].legend(frameon=False, loc="lower left", fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "taylor.png", dpi=90)
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
