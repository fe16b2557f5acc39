"""
What do the eigenvalues of a Hessian say?
=========================================

The eigenvalues of the Hessian are the curvatures of the loss along perpendicular
directions. How to read them:

- mixed signs: the loss curves up and down, as at a saddle;
- many zeros: flat valleys, or symmetry;
- all positive: locally convex;
- a wide range of sizes: ill-conditioned, slow for gradient descent.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call
from torch.func import hessian as dense_hessian

from newtonopt import evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues


def reading(values):
    """Describe the loss near the point from the eigenvalues."""
    sizes = values.abs()
    zeros = sizes <= 1e-10 * sizes.max()
    spread = float(sizes.max() / sizes[~zeros].min())
    said = [
        f"sizes differ {spread:.0f}-fold" + (": ill-conditioned" if spread > 100 else "")
    ]
    if bool(zeros.any()):
        said.append(f"{int(zeros.sum())} zero: flat valleys or symmetry")
    if bool((values[~zeros] < 0).any()) and bool((values[~zeros] > 0).any()):
        said.append("mixed signs: curved as at a saddle")
    elif bool((values > 0).all()):
        said.append("all positive: locally convex")
    return "\n".join(said)


# %%
# A small network
# ---------------
#
# A tanh network with two inputs, two hidden units and one output has nine parameters. Its
# loss at one input is half the squared distance of the output to one.

torch.manual_seed(1)
network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

H = hessian(evaluate(lambda: (network(x) - 1).square().sum() / 2, network.parameters()))
found = extreme_eigenvalues(H, top=3, bottom=3)
print("largest:", *found.top, sep="\n  ")
print("smallest:", *found.bottom, sep="\n  ")

# %%
# Each eigenvalue comes with an interval that holds it. In a notebook the result shows
# itself as a table:

found

# %%
# Against the dense truth
# -----------------------
#
# For nine parameters the Hessian can be formed, and all its eigenvalues computed. Every
# true eigenvalue lies within its bounds. With the input among the variables the matrix
# has two more rows and columns, and the spectrum interlaces with the one before.


def all_eigenvalues(named):
    """Return the eigenvalues of the dense Hessian by these variables, ascending."""
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        pairs = zip(named.items(), flat.split(sizes), strict=True)
        pieces = {name: piece.view(p.shape) for (name, p), piece in pairs}
        at = pieces.pop("x", x.detach())
        return (functional_call(network, pieces, (at,)) - 1).square().sum() / 2

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.linalg.eigvalsh(dense_hessian(loss)(flat))


alone = all_eigenvalues(dict(network.named_parameters()))
together = all_eigenvalues({**dict(network.named_parameters()), "x": x})
places = [8, 7, 6, 0, 1, 2]
entries = [*found.top, *found.bottom]
true = alone[places].tolist()
for entry, value in zip(entries, true, strict=True):
    print(f"{value:.4g} is within its bounds: {entry.lower <= value <= entry.upper}")

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.8), sharey=True, layout="constrained")
spectra = {"parameters": alone, "parameters and input": together}
for axes, (name, values) in zip(panels, spectra.items(), strict=True):
    axes.stem(range(len(values)), values, basefmt="k-", label="dense")
    axes.set(title=name, xlabel="rank")
    words = {"transform": axes.transAxes, "ha": "right", "fontsize": 9}
    axes.text(0.97, 0.04, reading(values), **words)
ring = {"markersize": 11, "fillstyle": "none", "label": "by products"}
panels[0].plot(places, [e.value for e in entries], "C1o", **ring)
panels[0].set(ylabel="eigenvalue")
panels[0].legend(frameon=False, loc="upper left")
plt.show()
