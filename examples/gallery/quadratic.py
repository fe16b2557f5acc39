"""The Hessian of f(x) = x'Ax is A + A' for any A: second derivatives are symmetric.

python examples/gallery/quadratic.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.func import hessian as dense_hessian

from newtonopt import evaluate, hessian


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return the largest differences."""
    torch.manual_seed(0)
    n = 6
    A = torch.randn(n, n, dtype=torch.float64)
    x = torch.randn(n, dtype=torch.float64, requires_grad=True)
    H = hessian(evaluate(lambda: x @ A @ x, [x]))

    analytic = A + A.T
    products = torch.stack([H @ unit for unit in torch.eye(n, dtype=torch.float64)])  # one forms no n x n matrix
    dense = dense_hessian(lambda x: x @ A @ x)(x.detach())

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("A", "A + A', by hand", "Hessian of x'Ax, by products")
    for axes, matrix, title in zip(panels, (A, analytic, products), titles, strict=True):
        drawn = axes.imshow(matrix.numpy(), cmap="RdBu", vmin=-6, vmax=6)
        for row in range(n):
            for column in range(n):
                entry = float(matrix[row, column])
                text, colour = f"{entry:.1f}".replace("-0.0", "0.0"), "w" if abs(entry) > 4 else "k"
                axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=7)
        gap = float((matrix - matrix.T).abs().max())
        axes.set(title=f"{title}\nlargest difference to its transpose {gap:.3g}", xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    figure.colorbar(drawn, ax=list(panels), shrink=0.9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "quadratic.png", dpi=90)
    return {
        "products against A + A'": float((products - analytic).abs().max()),
        "dense against A + A'": float((dense - analytic).abs().max()),
        "products against their transpose": float((products - products.T).abs().max()),
        "A against its transpose": float((A - A.T).abs().max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
