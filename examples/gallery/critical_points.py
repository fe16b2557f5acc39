"""Critical points told apart: minima, maxima, saddles, and points where eigenvalues cannot decide.

python examples/gallery/critical_points.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from newtonopt import Evaluation, evaluate, hessian
from newtonopt.curvature import critical_point

Function = Callable[[Tensor, Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "3x³ - 6y² + 3": lambda x, y: 3 * x**3 - 6 * y**2 + 3,
    "x² + y² - y³": lambda x, y: x**2 + y**2 - y**3,
    "-x² - y²": lambda x, y: -(x**2) - y**2,
    "x² - y²": lambda x, y: x**2 - y**2,
    "x² + y⁴": lambda x, y: x**2 + y**4,
    "x² - y⁴": lambda x, y: x**2 - y**4,
}
PLACES = [(1.2, 3.4), (-1.0, 1.0), (0.0, 0.0)]


def evaluation_at(function: Function, place: tuple[float, float]) -> Evaluation:
    """Evaluate a function of two numbers at a place."""
    point = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    return evaluate(lambda: function(point[0], point[1]), [point])


def shortcut(evaluation: Evaluation) -> str:
    """Return the verdict of the textbook shortcut, which takes "not negative" for "positive"."""
    values = torch.linalg.eigvalsh(hessian(evaluation).dense())
    if bool((values >= 0).all()):
        return "minimum"
    return "maximum" if bool((values <= 0).all()) else "saddle"


def main(folder: Path) -> dict[str, str]:
    """Write the picture and return the verdicts."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    said = {}
    for axes, (name, function) in zip(figure.subplots(2, 3).flat, FUNCTIONS.items(), strict=True):
        places = PLACES if name.startswith("3x") else [(0.0, 0.0)]
        reach = 5.0 if len(places) > 1 else 1.5
        line = torch.linspace(-reach, reach, 81, dtype=torch.float64)
        heights = function(line[None, :], line[:, None])
        axes.contourf(line, line, heights, levels=16, cmap="viridis")
        for place in places:
            found = critical_point(evaluation_at(function, place))
            said[f"{name} at {place}"] = found.kind
            print(f"{name} at {place}: {found}")
            axes.plot(*place, "wo", markeredgecolor="k")
            below = {"xytext": (0, -16 if found.kind == "degenerate" else 7), "textcoords": "offset points"}
            axes.annotate(found.kind, place, **below, ha="center", bbox={"color": "w", "alpha": 0.8, "pad": 1})
        naive = shortcut(evaluation_at(function, (0.0, 0.0)))
        lower = f"local: it falls to {float(heights.min()):.2f} elsewhere" if found.kind == "minimum" else ""
        remark = lower if naive == found.kind else f"the signs alone would say {naive}"
        said |= {f"{name}, shortcut": naive, f"{name}, remark": remark}
        axes.set(title=f"{name}\n{remark}", xlabel="x", ylabel="y", aspect="equal")
        axes.title.set_fontsize(9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "critical_points.png", dpi=80)
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gallery")
    numbers = main(parser.parse_args().output)
