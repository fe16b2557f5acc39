"""
How do optimizers cross a curved valley and a saddle?
=====================================================

Nine optimizers walk over two functions of two variables: the six of newtonopt, gradient
descent, Adam and L-BFGS. In a curved valley curvature decides how many steps they take.
At a saddle it decides whether they get away at all.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.optim import LBFGS, SGD, Adam

import newtonopt

one_iteration = {"max_iter": 1, "max_eval": 25, "tolerance_change": 0}
one_iteration["line_search_fn"] = "strong_wolfe"
optimizers = {
    "gradient descent": partial(SGD, lr=0.002),
    "Adam": partial(Adam, lr=0.1),
    "L-BFGS": partial(LBFGS, **one_iteration),
    "HessianFree": newtonopt.HessianFree,
    "LevenbergMarquardt": newtonopt.LevenbergMarquardt,
    "DampedNewton": newtonopt.DampedNewton,
    "NewtonCG": newtonopt.NewtonCG,
    "TrustRegionNewton": newtonopt.TrustRegionNewton,
    "CubicNewton": newtonopt.CubicNewton,
}
# Gradients alone: grey; Gauss-Newton: orange; the Hessian: blue.
colours = dict(
    zip(optimizers, ["0.35"] * 3 + ["#d95f02"] * 2 + ["#1446a0"] * 4, strict=True)
)


def walk(residuals, start, make, steps=500):
    """Return the points that an optimizer visits, and the losses there."""
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([p])

    def closure():
        optimizer.zero_grad()
        loss = residuals(*p).square().sum()
        loss.backward()
        return loss

    points, losses = [p.detach().clone()], [closure().item()]
    while len(points) <= steps and losses[-1] > 1e-12:
        optimizer.step(closure)
        points.append(p.detach().clone())
        losses.append(residuals(*p).square().sum().item())
    return torch.stack(points), losses


def draw(residuals, walks, west, east, south, north):
    """Draw a map for each optimizer."""
    x, y = torch.linspace(west, east, 200), torch.linspace(south, north, 200)
    heights = residuals(x[None, :], y[:, None]).square().sum(0)
    levels = heights.max() * torch.linspace(0.05, 1, 10) ** 3
    _, panels = plt.subplots(
        3, 3, figsize=(7.2, 7.4), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (name, (points, losses)) in zip(panels.flat, walks.items(), strict=True):
        axes.contour(x, y, heights, levels=levels.tolist(), colors="#c4c9d4")
        axes.plot(*points.T, ".-", color=colours[name], linewidth=1.2, markersize=4)
        axes.plot(*points[0], "o", color="white", markeredgecolor="k", zorder=4)
        axes.plot(*points[-1], "x", color="k", markersize=8, markeredgewidth=2, zorder=4)
        lost = f", loss {losses[-1]:.2g}" if losses[-1] > 1e-12 else ""
        axes.set_title(f"{name}\n{len(losses) - 1} steps{lost}", fontsize=10)
        axes.set(xlim=(west, east), ylim=(south, north))
    plt.show()


# %%
# Rosenbrock's valley
# -------------------
#
# Rosenbrock's function is a sum of two squares, with a curved valley that leads to its
# minimum at (1, 1). The curvature there is 2500 times smaller along the valley than
# across. Gradient descent must choose its steps for the larger one, and creeps.
# Optimizers that know the curvature follow the valley. LevenbergMarquardt, made for sums
# of squares, takes the fewest steps. A circle marks the start, a cross the end.


def rosenbrock(x, y):
    return torch.stack(torch.broadcast_tensors(10 * (y - x**2), 1 - x))


valley = {name: walk(rosenbrock, (-1.2, 1.0), make) for name, make in optimizers.items()}
draw(rosenbrock, valley, -1.7, 1.6, -0.6, 1.6)

# %%
# The losses against the steps. A step of a second-order optimizer costs more than a
# gradient: some products or a small linear system besides.

# sphinx_gallery_thumbnail_number = 2
figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
dashes = ["-", "--", ":", "-", "--", "-", "--", "-.", ":"]
for (name, (_, losses)), dash in zip(valley.items(), dashes, strict=True):
    steps = range(1, len(losses) + 1)
    axes.loglog(steps, losses, dash, color=colours[name], label=name)
axes.set(xlabel="step, counted from 1", ylabel="loss", ylim=(1e-13, 100))
axes.legend(frameon=False, fontsize=9)
plt.show()

# %%
# A saddle
# --------
#
# This function has minima at (-1, 1) and (1, 1), and a saddle at the origin. The y-axis
# leads down to it. From a point on the axis the gradient never leaves the axis, and the
# Gauss-Newton matrix has no negative eigenvalue that would show the way out: the five
# optimizers that use nothing else stop at the saddle. The four that use the Hessian see
# that it curves down, and leave. Both ways out are equally good.


def saddle(x, y):
    return torch.stack(torch.broadcast_tensors((x**2 - 1) / 2, (y - x**2) / 2**0.5))


gentle = {**optimizers, "gradient descent": partial(SGD, lr=0.3)}
ends = {name: walk(saddle, (0.0, 1.5), make) for name, make in gentle.items()}
draw(saddle, ends, -1.5, 1.5, -0.6, 1.8)
for name, (points, losses) in ends.items():
    x, y = points[-1].tolist()
    print(f"{name:<18} ends at ({x:5.2f}, {y:5.2f}), loss {losses[-1]:.2g}")
