"""
How do I compute the Jacobian of a layer over a batch?
======================================================

A batch of four inputs goes through the layer y = tanh(Wx + b). Its Jacobian holds the
derivative of every output by every variable: by the inputs, or by the weights. Three ways
give the same numbers up to rounding: by hand, by ``torch.func``, and by
``newtonopt.jacobian``, which takes a closure as it stands.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from newtonopt import evaluate, jacobian, mark_outputs

torch.manual_seed(0)
layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
inputs = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
W = layer[0].weight
slopes = (1 - layer(inputs) ** 2).detach()  # the derivative of tanh is 1 - tanh^2


def by_newtonopt(inputs, variables):
    """Return the Jacobian of all outputs by all variables, as a matrix."""
    evaluation = evaluate(lambda: mark_outputs(layer(inputs)).sum(), variables)
    return jacobian(evaluation).dense()


def gap(one, other):
    return float((one - other).abs().max())


# %%
# By the inputs
# -------------
#
# Each output depends on its own input alone, so the Jacobian is block-diagonal: one block
# diag(1 - y²) W for each of the four inputs.

by_inputs = {
    "by hand": torch.block_diag(*(slopes[:, :, None] * W.detach())),
    "torch.func": torch.block_diag(*vmap(jacrev(layer))(inputs)).detach(),
    "newtonopt": by_newtonopt(inputs, [inputs]),
}

# %%
# By the weights
# --------------
#
# Each output depends on its own row of W, and every input of the batch contributes rows
# to the Jacobian.

x = inputs.detach()
of_weights = jacrev(lambda weight: functional_call(layer, {"0.weight": weight}, x))
own_rows = torch.einsum("no,op,ni->nopi", slopes, torch.eye(2).double(), x)
by_weights = {
    "by hand": own_rows.reshape(8, 4),
    "torch.func": of_weights(W).reshape(8, 4).detach(),
    "newtonopt": by_newtonopt(x, [W]),
}
both = {"inputs": by_inputs, "weights": by_weights}
for name, ways in both.items():
    for way in ("torch.func", "newtonopt"):
        print(
            f"by the {name}, {way} against by hand: {gap(ways[way], ways['by hand']):.1e}"
        )

figure, panels = plt.subplots(
    1, 2, figsize=(7.2, 3.7), width_ratios=[2, 1], layout="constrained"
)
for axes, (name, ways) in zip(panels, both.items(), strict=True):
    drawn = axes.imshow(ways["newtonopt"].numpy(), cmap="RdBu", vmin=-1.5, vmax=1.5)
    axes.set(title=f"outputs by {name}", xlabel=f"entry of the {name}")
panels[0].set(ylabel="output of the batch")
figure.colorbar(drawn, ax=panels, shrink=0.85)
plt.show()

# %%
# The chain rule, and why differences are not enough
# --------------------------------------------------
#
# The derivative of h = tanh(ax + by) by x is a(1 - h²). Automatic differentiation agrees
# with it to rounding. Central differences do not: a step that is too long truncates the
# series, a step that is too short rounds, and even the best one loses four digits.

coefficients, point = torch.tensor([[1.5, -0.7], [0.4, 0.2]], dtype=torch.float64)
steps = torch.logspace(-14, 0, 57, dtype=torch.float64)


def h(point):
    return torch.tanh(point @ coefficients)


analytic = coefficients * (1 - h(point) ** 2)
automatic = grad(h)(point)
shifts = steps[:, None, None] * torch.eye(2).double()
differences = (h(point + shifts) - h(point - shifts)) / (2 * steps[:, None])
errors = ((differences - analytic) / analytic).abs()
print(f"automatic differentiation: error {gap(automatic, analytic):.1e}")
print(f"best central difference:   relative error {float(errors.amin(0).max()):.1e}")

figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
axes.loglog(steps, errors.clamp_min(1e-17), label=("by x", "by y"))
axes.axhline(2.2e-16, color="0.5", linestyle="--", label="rounding")
axes.set(title="central differences", xlabel="step", ylabel="relative error")
axes.legend(frameon=False)
plt.show()
