"""
Where does a function curve like a saddle?
==========================================

A function curves up and down where its Hessian has eigenvalues of both signs. Saddles are
only one such place: a map of the signs shows where a function is convex, concave or
indefinite. Where the Hessian is zero, higher derivatives decide.
"""

import textwrap

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch.func import hessian, vmap

from newtonopt import evaluate
from newtonopt.curvature import critical_point

functions = {
    "x³ - 3xy²": lambda p: p[0] ** 3 - 3 * p[0] * p[1] ** 2,
    "x³ + y³": lambda p: p[0] ** 3 + p[1] ** 3,
}
kinds = {
    "indefinite": "#e6b84c",
    "convex": "#4c8fc7",
    "concave": "#b8567c",
    "degenerate": "#222222",
}

# %%
# Eigenvalues all over the plane
# ------------------------------
#
# ``vmap`` forms the Hessians at all points of a grid at once; their eigenvalues are
# ascending.

line = torch.linspace(-1, 1, 41, dtype=torch.float64)
plane = torch.cartesian_prod(line, line)


def kind_of(eigenvalues, zero=1e-9):
    """Return the index of the kind for each pair of eigenvalues."""
    low, high = eigenvalues.unbind(-1)
    found = torch.full(low.shape, 3)
    found[(low < -zero) & (high > zero)] = 0
    found[low > zero] = 1
    found[high < -zero] = 2
    return found


eigenvalues = {
    name: torch.linalg.eigvalsh(vmap(hessian(f))(plane)).view(41, 41, 2)
    for name, f in functions.items()
}
found = {name: kind_of(values) for name, values in eigenvalues.items()}
shares = {
    name: [float((map == index).double().mean()) for index in range(4)]
    for name, map in found.items()
}
for name, parts in shares.items():
    for kind, share in zip(kinds, parts, strict=True):
        print(f"{name:<9} {kind:<10} {share:6.1%}")

# %%
# The monkey saddle
# -----------------
#
# The Hessian of the monkey saddle x³ - 3xy² has the eigenvalues ±6r at distance r from
# the origin. So it is indefinite everywhere but at the origin, where it is zero and the
# quadratic model is flat. The origin is no extremum, though no eigenvalue says so:

origin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
verdict = critical_point(evaluate(lambda: functions["x³ - 3xy²"](origin), [origin]))
print(textwrap.fill(str(verdict), 84))

# %%
# The second map, of x³ + y³, has all four kinds: its Hessian is diagonal, with the
# eigenvalues 6x and 6y. Lines show the magnitude of the larger one.

figure, panels = plt.subplots(1, 2, figsize=(7.2, 4.2), sharey=True, layout="constrained")
x, colours = line.numpy(), ListedColormap(list(kinds.values()))
for axes, name in zip(panels, functions, strict=True):
    axes.pcolormesh(x, x, found[name].T.numpy(), cmap=colours, vmin=0, vmax=3)
    heights = eigenvalues[name].abs().amax(-1).T
    lines = axes.contour(x, x, heights, colors="k", linewidths=0.6, levels=5)
    axes.clabel(lines, fontsize=8)
    axes.set(title=name, xlabel="x", aspect="equal")
panels[0].set(ylabel="y")
handles = [
    plt.Line2D([], [], marker="s", ls="", color=colour, label=kind)
    for kind, colour in kinds.items()
]
figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
plt.show()
