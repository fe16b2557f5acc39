"""
Is it a minimum, a maximum or a saddle?
=======================================

Where the gradient is zero, the signs of the Hessian's eigenvalues tell the kind of a
critical point, unless one of them is zero. ``critical_point`` gives a verdict with its
evidence in words, and says "degenerate" where eigenvalues cannot decide.
"""

import textwrap

import matplotlib.pyplot as plt
import torch

from newtonopt import evaluate, hessian
from newtonopt.curvature import critical_point

functions = {
    "3x³ - 6y² + 3": lambda x, y: 3 * x**3 - 6 * y**2 + 3,
    "x² + y² - y³": lambda x, y: x**2 + y**2 - y**3,
    "-x² - y²": lambda x, y: -(x**2) - y**2,
    "x² - y²": lambda x, y: x**2 - y**2,
    "x² + y⁴": lambda x, y: x**2 + y**4,
    "x² - y⁴": lambda x, y: x**2 - y**4,
}


def at(name, place):
    """Evaluate a function at a place."""
    point = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    return evaluate(lambda: functions[name](*point), [point])


# %%
# A point whose gradient is not zero is not critical
# --------------------------------------------------
#
# Eigenvalues alone would call the first of these points a saddle.

cubic = "3x³ - 6y² + 3"
elsewhere = {
    place: critical_point(at(cubic, place)) for place in ((1.2, 3.4), (-1.0, 1.0))
}
for place, found in elsewhere.items():
    print(textwrap.fill(f"{cubic} at {place}: {found}", 84), end="\n\n")

# %%
# Six functions at the origin
# ---------------------------

verdicts = {name: critical_point(at(name, (0.0, 0.0))) for name in functions}
for name, found in verdicts.items():
    print(textwrap.fill(f"{name}: {found}", 84), end="\n\n")

# %%
# A zero eigenvalue leaves the kind open
# --------------------------------------
#
# x² + y⁴ and x² - y⁴ have the same Hessian at the origin, and only the first has a
# minimum there. The textbook shortcut "no eigenvalue is negative, so it is a minimum"
# guesses:


def shortcut(name):
    """Return the verdict that takes "not negative" for "positive"."""
    values = torch.linalg.eigvalsh(hessian(at(name, (0.0, 0.0))).dense())
    if bool((values >= 0).all()):
        return "minimum"
    return "maximum" if bool((values <= 0).all()) else "saddle"


guesses = {name: shortcut(name) for name in functions}
for name, guess in guesses.items():
    print(
        f"{name}: {verdicts[name].kind}"
        + (f", by the shortcut a {guess}" if guess != verdicts[name].kind else "")
    )

# %%
# A minimum is a local one
# ------------------------
#
# Curvature at a point knows nothing of other places, such as those where x² + y² - y³ is
# lower.

line = torch.linspace(-1.5, 1.5, 81, dtype=torch.float64)
heights = {
    name: function(line[None, :], line[:, None]) for name, function in functions.items()
}
print(f"x² + y² - y³ falls to {float(heights['x² + y² - y³'].min()):.2f} within this map")

figure, panels = plt.subplots(
    2, 3, figsize=(7.2, 5.2), sharex=True, sharey=True, layout="constrained"
)
for axes, name in zip(panels.flat, functions, strict=True):
    axes.contourf(line, line, heights[name], levels=16, cmap="viridis")
    axes.plot(0, 0, "wo", markeredgecolor="k")
    axes.annotate(
        verdicts[name].kind,
        (0, 0),
        (0, 9),
        textcoords="offset points",
        ha="center",
        bbox={"color": "w", "alpha": 0.85, "pad": 1.5},
    )
    axes.set(title=name, aspect="equal")
plt.show()
