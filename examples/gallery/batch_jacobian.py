"""The Jacobian of a tanh layer over a batch of inputs, three ways; and the chain rule on tanh(a x + b y).

python examples/gallery/batch_jacobian.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from newtonopt import evaluate, jacobian, mark_outputs


def by_newtonopt(layer: nn.Module, inputs: Tensor, variables: list[Tensor]) -> Tensor:
    """Return d outputs / d variables for all outputs and all variables at once."""
    return jacobian(evaluate(lambda: mark_outputs(layer(inputs)).sum(), variables)).dense()


def layer_jacobians() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the Jacobians of tanh(W x + b), 2 outputs at 4 inputs: by the inputs `(8, 8)`, and by W `(8, 4)`."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    inputs = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    W = layer[0].weight
    slopes = (1 - layer(inputs) ** 2).detach()  # tanh' = 1 - tanh^2
    by_inputs = {
        "analytic": torch.block_diag(*(slopes[:, :, None] * W.detach())),
        "torch.func": torch.block_diag(*vmap(jacrev(layer))(inputs)).detach(),
        "newtonopt": by_newtonopt(layer, inputs, [inputs]),
    }
    of_weights = jacrev(lambda w: functional_call(layer, {"0.weight": w}, inputs.detach()))
    by_weights = {
        "analytic": torch.einsum("no,op,ni->nopi", slopes, torch.eye(2).double(), inputs).reshape(8, 4).detach(),
        "torch.func": of_weights(W).reshape(8, 4).detach(),
        "newtonopt": by_newtonopt(layer, inputs.detach(), [W]),
    }
    return by_inputs, by_weights


def chain_rule(steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh/dx, dh/dy of h = tanh(a x + b y): chain rule, autograd, central differences `(steps, 2)`."""
    a_b, x_y = torch.tensor([[1.5, -0.7], [0.4, 0.2]], dtype=torch.float64)
    h, shifts = lambda x_y: torch.tanh(x_y @ a_b), steps[:, None, None] * torch.eye(2).double()
    numeric = (h(x_y + shifts) - h(x_y - shifts)) / (2 * steps[:, None])
    return a_b * (1 - h(x_y) ** 2), grad(h)(x_y), numeric


def main(folder: Path) -> dict[str, float]:
    """Write the picture and return the largest disagreements."""
    by_inputs, by_weights = layer_jacobians()
    steps = torch.logspace(-14, 0, 57, dtype=torch.float64)
    analytic, automatic, numeric = chain_rule(steps)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 0.75, 1.3])
    for axes, matrix, variables in ((left, by_inputs, "inputs"), (middle, by_weights, "weights")):
        drawn = axes.imshow(matrix["newtonopt"].numpy(), cmap="RdBu", vmin=-1.5, vmax=1.5)
        axes.set(title=f"d outputs / d {variables}", xlabel=f"entry of the {variables}", ylabel="output of the batch")
    figure.colorbar(drawn, ax=[left, middle], shrink=0.8)
    errors = (numeric - analytic).abs()
    right.loglog(steps.numpy(), (errors / analytic.abs()).clamp_min(1e-17).numpy(), label=("dh/dx", "dh/dy"))
    right.set(title="h = tanh(ax + by) by central differences", xlabel="step", ylabel="relative error")
    right.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "batch_jacobian.png", dpi=90)
    pairs = [(m["analytic"], m[way]) for m in (by_inputs, by_weights) for way in ("torch.func", "newtonopt")]
    worst = max(float((true - found).abs().max()) for true, found in pairs)
    chain = float((analytic - automatic).abs().max())
    return {"jacobians differ by": worst, "chain rule": chain, "best differences": float(errors.amin(0).max())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    print(numbers := main(parser.parse_args().output))
