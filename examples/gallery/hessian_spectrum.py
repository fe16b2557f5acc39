"""The Hessian's spectrum of a 2-2-1 tanh network, by its parameters alone and by parameters and input together.

python examples/gallery/hessian_spectrum.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import hessian as dense_hessian

from newtonopt import evaluate, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues


def reading(values: Tensor) -> str:
    """Describe the loss near the point from the eigenvalues."""
    sizes = values.abs()
    zeros = sizes <= 1e-10 * sizes.max()
    spread = float(sizes.max() / sizes[~zeros].min())
    said = [f"sizes differ {spread:.0f}-fold" + (": ill-conditioned" if spread > 100 else "")]
    if bool(zeros.any()):
        said.append(f"{int(zeros.sum())} zero: flat valleys or symmetry")
    if bool((values[~zeros] < 0).any()) and bool((values[~zeros] > 0).any()):
        said.append("mixed signs: curved as at a saddle")
    elif bool((values > 0).all()):
        said.append("all positive: locally convex")
    return "\n".join(said)


def spectra(network: nn.Module, x: Tensor, with_input: bool) -> tuple[Tensor, Spectrum]:
    """Return all eigenvalues from torch.func's dense Hessian, and three at each end with bounds from products."""
    named = dict(network.named_parameters()) | ({"x": x} if with_input else {})
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = {name: s.view(p.shape) for (name, p), s in zip(named.items(), flat.split(sizes), strict=True)}
        return (functional_call(network, pieces, (pieces.pop("x", x.detach()),)) - 1).square().sum() / 2

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    H = hessian(evaluate(lambda: (network(x) - 1).square().sum() / 2, named.values()))
    return torch.linalg.eigvalsh(dense_hessian(loss)(flat)), extreme_eigenvalues(H, top=3, bottom=3)


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return the errors of products against the dense truth."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    worst, outside, counts = 0.0, 0, []
    for axes, with_input in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        values, found = spectra(network, x, with_input)
        axes.stem(range(len(values)), values, basefmt="k-", label="dense, torch.func")
        places = [len(values) - 1 - i for i in range(3)] + [0, 1, 2]
        for place, e in zip(places, (*found.top, *found.bottom), strict=True):
            worst = max(worst, abs(e.value - float(values[place])))
            outside += not e.lower <= float(values[place]) <= e.upper
            axes.plot(place, e.value, "C1o", markersize=11, fillstyle="none")
        axes.plot([], [], "C1o", markersize=11, fillstyle="none", label="by products, with bounds")
        axes.set(title="parameters and input" if with_input else "parameters alone", xlabel="rank")
        axes.text(0.97, 0.05, reading(values), transform=axes.transAxes, ha="right", fontsize=9)
        counts.append(int((values < -1e-12).sum()))
    figure.axes[0].set(ylabel="eigenvalue")
    figure.axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "hessian_spectrum.png", dpi=90)
    return {"largest error": worst, "outside their bounds": outside, "negative": counts[0], "with input": counts[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
