"""
How much does a gradient step lower the loss?
=============================================

A step of -ε g promises to lower the loss by ε g'g. Curvature decides what becomes of the
promise: the loss falls by ε g'g - ε² g'Hg / 2, up to third derivatives. Negative
curvature along the gradient gives more than was promised, zero curvature exactly that,
positive curvature less.
"""

import matplotlib.pyplot as plt
import torch

from newtonopt import evaluate
from newtonopt.curvature import gradient_curvature

step = 0.8
bends = {"negative": -1.0, "zero": 0.0, "positive": 1.5}


def f(x, bend):
    return -x + bend * x**2 / 2


# %%
# Promised and actual decrease
# ----------------------------
#
# The gradient at zero is -1 for all three functions. ``gradient_curvature`` measures g'Hg
# / g'g for one product.

decreases, curvatures = {}, {}
for name, bend in bends.items():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    evaluation = evaluate(lambda x=x, bend=bend: f(x, bend).sum(), [x])
    along = gradient_curvature(evaluation)
    promised = step * along.gradient_norm**2
    foretold = promised - step**2 * along.gradient_norm**2 * along.curvature / 2
    actual = float(evaluation.loss - f(-step * evaluation.gradient, bend))
    decreases[name], curvatures[name] = (promised, foretold, actual), along
    print(f"{name:<8} curvature: promised {promised:.2f}", end=", ")
    print(f"with curvature {foretold:.2f}, actual {actual:.2f}")

# %%
# Best and longest step
# ---------------------
#
# For positive curvature the quadratic model is lowest at ε = g'g / g'Hg, and back at its
# start at twice that: a longer step raises the loss. The largest eigenvalue bounds the
# curvature along any gradient, hence the rule that gradient descent is stable for
# learning rates below 2 over the largest eigenvalue.

for name, along in curvatures.items():
    print(f"{name:<8} curvature: best step {along.cauchy_step:.3g}", end=", ")
    print(f"longest step {along.longest_step:.3g}")

line = torch.linspace(-0.3, 1.6, 100, dtype=torch.float64)
figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.6), sharey=True, layout="constrained")
for axes, (name, bend) in zip(panels, bends.items(), strict=True):
    promised, _, actual = decreases[name]
    axes.plot(line, f(line, bend), label="loss")
    axes.plot(line, -line, "--", label="promised")
    axes.plot(0, 0, "ko", markersize=4)
    for x, fall, colour in ((step, promised, "C1"), (step + 0.08, actual, "C0")):
        arrow = {"arrowstyle": "->", "color": colour}
        axes.annotate("", (x, -fall), (x, 0), arrowprops=arrow)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylim=(-2.2, 0.7))
    title = f"{name} curvature\nfalls by {actual:.2f} of {promised:.2f}"
    axes.set_title(title, fontsize=10)
box = {"ha": "center", "fontsize": 9, "bbox": {"color": "w", "pad": 1}}
along = curvatures["positive"]
for place, label in ((along.cauchy_step, "best"), (along.longest_step, "longest")):
    panels[2].axvline(place, color="0.6", linestyle=":", zorder=0)
    panels[2].text(place, 0.45, label, **box)
panels[0].set(ylabel="loss")
panels[0].legend(frameon=False, loc="lower left", fontsize=9)
plt.show()
