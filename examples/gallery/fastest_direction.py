"""The direction in which a network's loss bends fastest, and a flat one: the loss and its quadratic model along each.

python examples/gallery/fastest_direction.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, loss_slice


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return both curvatures, and the largest error of the model along each."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = HessianFree(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(15):
        optimizer.step(closure)

    H = hessian(evaluate(closure, model.parameters()))
    ends = extreme_eigenvalues(H, top=1, bottom=1)
    fastest = max((*ends.top, *ends.bottom), key=lambda e: abs(e.value))
    everything = extreme_eigenvalues(H, top=H.shape[0], bottom=0)
    flat = min(everything.top, key=lambda e: abs(e.value))
    print(f"fastest: {fastest.value:.4g} within [{fastest.lower:.6g}, {fastest.upper:.6g}]; flat: {flat.value:.2g}")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    numbers = {}
    for axes, name, e in zip(figure.subplots(1, 2, sharey=True), ("fastest", "flat"), (fastest, flat), strict=True):
        found = loss_slice(closure, model.parameters(), e.vector, radius=1.0, points=61)
        closer = [axes.inset_axes([0.3, 0.4, 0.6, 0.45], title="magnified")] if name == "flat" else []
        for panel in (axes, *closer):
            panel.plot(found.coordinates, found.losses, label="loss")
            panel.plot(found.coordinates, found.model, "--", label="quadratic model")
            panel.plot(0, found.loss, "ko", markersize=4)
        axes.set(xlabel="step along the unit eigenvector", title=f"{name} direction: curvature {e.value:.3g}")
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        numbers[f"{name} curvature"] = e.value
        numbers[f"{name} model error"] = float((found.losses - found.model).abs().max())
        numbers[f"{name} rise"] = float(found.losses.max() - found.loss)
    figure.axes[0].set(ylabel="loss")
    figure.axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "fastest_direction.png", dpi=90)
    return {**numbers, "within its bounds": fastest.lower <= fastest.value <= fastest.upper}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
