"""
How many directions does a network learn?
=========================================

Near a point a network is linear in its parameters, with the Jacobian J of its outputs.
The Gauss-Newton matrix is made of J'J, and the neural tangent kernel is JJ'. Both have
the same eigenvalues, but for zeros. These tell which functions the network learns fast,
and how many directions of its parameters count at all.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from newtonopt import LevenbergMarquardt, evaluate
from newtonopt.curvature import gauss_newton_spectrum, neural_tangent_kernel

# %%
# A network, before and after training
# ------------------------------------
#
# The network has 673 parameters and learns a wave packet from 80 points. The rows of J
# come from a few backward passes, and all eigenvalues from those rows: no iteration and
# no sampling.

torch.manual_seed(0)
m = 80
x = torch.linspace(-3, 3, m, dtype=torch.float64)[:, None]
y = torch.sin(2 * x) * torch.exp(-(x**2) / 8)
hidden = [nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()]
model = nn.Sequential(*hidden, nn.Linear(24, 1)).double()
optimizer = LevenbergMarquardt(model.parameters())


def closure():
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


spectra, kernels = {}, {}
for when, steps in (("before training", 0), ("after training", 20)):
    for _ in range(steps):
        optimizer.step(closure)
    evaluation = evaluate(closure, model.parameters())
    spectra[when] = gauss_newton_spectrum(evaluation)
    kernels[when] = neural_tangent_kernel(evaluation)
    print(f"{when}: loss {float(evaluation.loss):.2g}, {spectra[when]}")

# %%
# Two matrices, one spectrum
# --------------------------
#
# The mean of m squares has the second derivative 2/m by each output. So the Gauss-Newton
# matrix is 2/m J'J, and its eigenvalues are those of the kernel times 2/m. Small ones are
# lost in the kernel, where they drown in rounding, and not in the rows of J, from which
# ``gauss_newton_spectrum`` computes them.

figure, axes = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
for colour, when in (("C0", "before training"), ("C1", "after training")):
    exact = spectra[when].nonzero
    by_kernel = 2 / m * torch.linalg.eigvalsh(kernels[when]).flip(0).clamp_min(1e-30)
    axes.semilogy(range(1, m + 1), by_kernel, "x", color=colour, alpha=0.5, markersize=4)
    axes.semilogy(range(1, len(exact) + 1), exact, ".-", color=colour, label=when)
axes.semilogy([], [], "x", color="0.5", label="2/m times the kernel's")
axes.set(xlabel="number", ylabel="eigenvalue", ylim=(1e-25, 1e3))
axes.legend(frameon=False)
plt.show()

# %%
# The kernel
# ----------
#
# The kernel's entry (x, x') tells how much a gradient step for the point x changes the
# output at x'. Before training distant points move together. Training narrows this.

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True, layout="constrained")
for axes, (when, kernel) in zip(panels, kernels.items(), strict=True):
    axes.imshow(kernel.numpy(), extent=(-3, 3, 3, -3))
    axes.set(title=when, xlabel="x")
panels[0].set(ylabel="x'")
plt.show()

# %%
# What gradient descent learns first
# ----------------------------------
#
# A small step of gradient descent shrinks the error along an eigenvector of the kernel by
# the learning rate times the eigenvalue. Eigenvectors are functions of x: the first ones
# are smooth, and each further one has one more zero. Were the network linear, halving the
# error along them with the learning rate 1 / (largest eigenvalue) would take so many
# steps:

values, waves = torch.linalg.eigh(kernels["before training"])
values, waves = values.flip(0), waves.flip(1)
numbers = (1, 2, 3, 5, 8)
for k in numbers:
    print(f"eigenvector {k}: {math.log(2) * float(values[0] / values[k - 1]):,.0f} steps")

# sphinx_gallery_thumbnail_number = 3
figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
for place, k in enumerate(numbers):
    colour = plt.cm.viridis(place / 4.5)
    axes.plot(x, waves[:, k - 1] * waves[0, k - 1].sign(), color=colour, label=k)
axes.set(xlabel="x", title="eigenvectors of the kernel before training")
axes.legend(title="number", frameon=False, bbox_to_anchor=(1, 1))
plt.show()

# %%
# How many directions count
# -------------------------
#
# The effective dimension at a damping is the sum of eigenvalue / (eigenvalue + damping):
# how many eigenvalues stand out of it. A few of 673 directions count, and training adds
# some.

for when, spectrum in spectra.items():
    print(f"{when}: {spectrum.effective_dimension(1e-3):.1f} at a damping of 0.001")

dampings = torch.logspace(-12, 2, 60, dtype=torch.float64).tolist()
figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
for when, spectrum in spectra.items():
    axes.semilogx(
        dampings, [spectrum.effective_dimension(d) for d in dampings], label=when
    )
axes.set(xlabel="damping", ylabel="effective dimension", ylim=(0, None))
axes.legend(frameon=False)
plt.show()
