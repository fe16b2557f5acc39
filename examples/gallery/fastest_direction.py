"""
Along which direction does the loss curve most?
===============================================

The loss curves most along the eigenvector of the Hessian's largest eigenvalue. For a
trained network a unit step along it raises the loss a thousandfold, while along an
eigenvector of nearly no curvature the loss hardly moves.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from newtonopt import HessianFree, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, loss_slice

# %%
# Train a network
# ---------------
#
# The network has 49 parameters and learns a sine wave. Eigenvectors mean most where the
# gradient is nearly zero.

torch.manual_seed(0)
x = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None]
y = torch.sin(2 * x)
model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
optimizer = HessianFree(model.parameters())


def closure():
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


for _ in range(15):
    loss = optimizer.step(closure)
print(f"loss {float(loss):.2g}")

# %%
# The eigenvectors
# ----------------
#
# ``extreme_eigenvalues`` finds both ends of the spectrum from products. For so few
# parameters it can find all eigenvalues, and the one of smallest magnitude is among them.

H = hessian(evaluate(closure, model.parameters()))
ends = extreme_eigenvalues(H, top=1, bottom=1)
fastest = max((*ends.top, *ends.bottom), key=lambda e: abs(e.value))
everything = extreme_eigenvalues(H, top=H.shape[0], bottom=0)
flat = min(everything.top, key=lambda e: abs(e.value))
print(f"fastest: curvature {fastest}")
print(f"flat:    curvature {flat}")

# %%
# The loss along both
# -------------------
#
# ``loss_slice`` evaluates the loss along a direction, beside its quadratic model: loss +
# slope·s + curvature·s²/2. The model is right near the point and errs further out. The
# inset magnifies the flat direction.

slices = {
    name: loss_slice(closure, model.parameters(), e.vector, radius=1.0, points=61)
    for name, e in (("fastest", fastest), ("flat", flat))
}
for name, along in slices.items():
    rise, error = (
        along.losses.max() - along.loss,
        (along.losses - along.model).abs().max(),
    )
    print(
        f"{name}: the loss rises by up to {rise:.2g}, the model errs by up to {error:.2g}"
    )

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True, layout="constrained")
inset = panels[1].inset_axes([0.25, 0.35, 0.65, 0.5], title="magnified")
for axes, name in ((panels[0], "fastest"), (panels[1], "flat"), (inset, "flat")):
    along = slices[name]
    axes.plot(along.coordinates, along.losses, label="loss")
    axes.plot(along.coordinates, along.model, "--", label="quadratic model")
    axes.plot(0, along.loss, "ko", markersize=4)
    axes.set_xticks([-1, 0, 1])
panels[0].set(title=f"curvature {fastest.value:.3g}", xlabel="step", ylabel="loss")
panels[1].set(title=f"curvature {flat.value:.1g}", xlabel="step")
panels[0].legend(frameon=False)
plt.show()
