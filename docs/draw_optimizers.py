"""Draw the pictures of docs/optimizers: `python docs/draw_optimizers.py [NAME ...]`, about a minute of processor time.

The left panel shows paths on a function of two variables, the right one a small model in training, beside peers. The
cost is the number of gradients and curvature products; forward passes at trial points are not counted.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from newtonopt import (
    CubicNewton,
    DampedNewton,
    HessianFree,
    NewtonCG,
    StepReport,
    TrustRegionNewton,
    evaluate,
    hessian,
    mark_outputs,
)

BLUE, CYAN, ORANGE, GREEN, GREY, RED = "#1446a0", "#25a5c4", "#e8720c", "#3a9a4a", "#777777", "#c22f3d"
TOLERANCE = 1e-10  # tolerance for the gradient's norm
PATIENCE = 10  # a run ends when this many points in a row are within the tolerance, or equal

Loss = Callable[[], Tensor]
Make = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer, and its style in a picture."""

    name: str
    make: Make
    colour: str


@dataclass(frozen=True)
class Paths:
    """A function of two variables, its start, the visible range, and the optimizers."""

    title: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    window: tuple[float, float, float, float]
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Training:
    """A model and its loss, the largest cost, and the optimizers; the picture shows "losses" or "norms"."""

    title: str
    build: Callable[[], tuple[nn.Module, Loss]]
    shown: str
    limit: int
    methods: tuple[Method, ...]


@dataclass
class Trace:
    """A run at the start of each step: the point, the cost so far, the loss and the gradient's norm."""

    points: list[Tensor] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    radii: list[float | None] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the number of steps after which the run stays within the tolerance."""
        return max((i + 1 for i, norm in enumerate(self.norms[:-1]) if norm > TOLERANCE), default=0)


def minimise(params: list[Tensor], loss: Loss, make: Make, limit: int) -> Trace:
    """Step until the end, or until the cost is at its limit."""
    optimizer, trace, calls, cost = make(params), Trace(), 0, 0

    def closure() -> Tensor:
        nonlocal calls
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if calls == 0:  # every optimizer starts at the present point
            trace.points.append(torch.cat([p.detach().flatten() for p in params]))
            trace.costs.append(cost)
            trace.losses.append(value.item())
            trace.norms.append(math.hypot(*(p.grad.norm().item() for p in params if p.grad is not None)))
        calls += 1
        return value

    while cost <= limit and not _is_over(trace):
        calls = 0
        optimizer.step(closure)
        report: StepReport | None = getattr(optimizer, "last_step", None)
        trace.radii.append(report.radius if report else None)
        if isinstance(optimizer, LBFGS):
            cost += calls - 1  # L-BFGS starts each step with the last gradient of the step before
        else:
            cost += 1 + (report.products if report else getattr(optimizer, "products", 0))
    return trace


def _is_over(trace: Trace) -> bool:
    last = trace.points[-PATIENCE:]
    rests = all(torch.equal(point, last[0]) for point in last)
    return len(last) == PATIENCE and (rests or max(trace.norms[-PATIENCE:]) <= TOLERANCE)


class PlainNewton(Optimizer):
    """Newton's method without any safeguard, for one parameter of two entries."""

    products = 2  # iterations in a step

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any) -> None:  # type: ignore[override]
        """Go to the stationary point of the quadratic model, whatever its kind."""
        (p,) = self.param_groups[0]["params"]
        closure()
        evaluation = evaluate(closure, [p])
        p.data -= torch.linalg.solve(hessian(evaluation).dense(), evaluation.gradient)


# Functions of a point `(2,)`, or of a grid of points `(2, ...)`.


def beale(p: Tensor) -> Tensor:
    """A sum of squares with its minimum at (3, 1/2) in a curved valley."""
    x, y = p
    residuals = torch.stack([1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3])
    return mark_outputs(residuals).square().sum(0)


def double_well(p: Tensor) -> Tensor:
    """Two minima with a saddle between them at the origin."""
    x, y = p
    return x**4 / 4 - x**2 / 2 + x * y / 4 + y**2 / 2


def himmelblau(p: Tensor) -> Tensor:
    """Four minima around a maximum."""
    x, y = p
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def rosenbrock(p: Tensor) -> Tensor:
    """A curved valley that leads to (1, 1)."""
    x, y = p
    return 100 * (y - x**2) ** 2 + (1 - x) ** 2


def pass_between(p: Tensor) -> Tensor:
    """Minima at (-1, 1) and (1, 1), and a saddle between them at the origin, to which the line x = 0 leads."""
    x, y = p
    return (x**2 - 1) ** 2 / 4 + (y - x**2) ** 2 / 2


# Models and their losses.


def convection(beta: float = 10.0) -> tuple[nn.Module, Loss]:
    """A physics-informed network for u_t + beta u_x = 0, periodic in x, with sin x at the start."""
    model, period = _network(2, 20, 20, 1), 2 * math.pi
    inside = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([period, 1.0])
    s = torch.linspace(0, 1, 50)[:, None]
    zero = torch.zeros_like(s)
    begin, left, right = (torch.cat(pair, 1) for pair in ((period * s, zero), (zero, s), (zero + period, s)))

    def loss() -> Tensor:
        points = inside.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        residual = beta * slopes[:, 0] + slopes[:, 1]
        equation = F.mse_loss(residual, torch.zeros_like(residual))
        periodic = F.mse_loss(model(left) - model(right), zero)
        return equation + periodic + F.mse_loss(model(begin), torch.sin(period * s))

    return model, loss


def regression() -> tuple[nn.Module, Loss]:
    """A network with two hidden layers that learns a wave packet."""
    model, x = _network(1, 12, 12, 1), torch.linspace(-3, 3, 100)[:, None]
    y = torch.sin(3 * x) * torch.exp(-(x**2) / 8)
    return model, lambda: F.mse_loss(model(x), y)


def logistic_regression() -> tuple[nn.Module, Loss]:
    """Logistic regression on tumours, malignant or not: features of very different curvature, a weak penalty."""
    data, model = load_breast_cancer(), _network(30, 1)
    x, y = torch.tensor(data.data), torch.tensor(data.target, dtype=torch.float64)[:, None]
    x = (x - x.mean(0)) / x.std(0)
    return model, lambda: F.binary_cross_entropy_with_logits(model(x), y) + _penalty(model, 1e-4)


def softmax_regression() -> tuple[nn.Module, Loss]:
    """Softmax regression on three hundred handwritten digits, with a penalty."""
    data, model = load_digits(), _network(64, 10)
    x, y = torch.tensor(data.data[:300] / 16), torch.tensor(data.target[:300])
    return model, lambda: F.cross_entropy(model(x), y) + _penalty(model, 1e-3)


def _network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _penalty(model: nn.Module, coefficient: float) -> Tensor:
    return coefficient / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def _descent(lr: float) -> Method:
    return Method(f"gradient descent, lr {lr:g}", partial(SGD, lr=lr), GREY)


# One iteration a step, so that each is visible.
_one_iteration = {"max_iter": 1, "max_eval": 25, "tolerance_grad": 0.0, "tolerance_change": 0.0}
L_BFGS = Method("L-BFGS", partial(LBFGS, history_size=30, line_search_fn="strong_wolfe", **_one_iteration), ORANGE)
ADAM = Method("Adam, lr 0.03", partial(Adam, lr=0.03), GREEN)
ADAM_FASTER = Method("Adam, lr 1", partial(Adam, lr=1.0), GREEN)
PLAIN = Method("Newton without safeguards", PlainNewton, RED)
HESSIAN_FREE = Method("HessianFree", HessianFree, BLUE)
DAMPED = Method("DampedNewton", DampedNewton, BLUE)
DAMPED_LESS = Method("DampedNewton, damping=1e-6", partial(DampedNewton, damping=1e-6), CYAN)
NEWTON_CG = Method("NewtonCG", NewtonCG, BLUE)
TRUST_REGION = Method("TrustRegionNewton", TrustRegionNewton, BLUE)
KRYLOV = Method('TrustRegionNewton, subproblem="lanczos"', partial(TrustRegionNewton, subproblem="lanczos"), CYAN)
CUBIC = Method("CubicNewton", CubicNewton, BLUE)
ESCAPING = Method("CubicNewton", partial(CubicNewton, tolerance_gradient=1e-8), BLUE)
CUBIC_AGAIN = Method("CubicNewton, max_trials=10", partial(CubicNewton, max_trials=10), CYAN)

_VALLEY, _WELLS, _PASS = "Rosenbrock's function", "A saddle between two minima", "A line that leads to a saddle"
_CONVECTION, _FIT = "Convection equation, 501 parameters", "Regression, 193 parameters"
_TUMOURS, _DIGITS = "Logistic regression, 31 parameters", "Softmax regression, 650 parameters"
PAGES = {
    "hessian_free": (
        Paths("Beale's function", beale, (1, 1), (0.5, 3.5, -0.9, 1.5), (_descent(0.03), L_BFGS, HESSIAN_FREE)),
        Training(_CONVECTION, convection, "losses", 1600, (ADAM, L_BFGS, HESSIAN_FREE)),
    ),
    "damped_newton": (
        Paths(_WELLS, double_well, (0.15, 1.4), (-1.8, 1.8, -1.2, 1.7), (_descent(0.5), PLAIN, DAMPED)),
        Training(_TUMOURS, logistic_regression, "norms", 800, (ADAM_FASTER, L_BFGS, DAMPED_LESS, DAMPED)),
    ),
    "newton_cg": (
        Paths("Himmelblau's function", himmelblau, (-0.5, 1.5), (-5, 0.6, 0, 4.5), (_descent(0.01), L_BFGS, NEWTON_CG)),
        Training(_DIGITS, softmax_regression, "norms", 200, (ADAM_FASTER, L_BFGS, NEWTON_CG)),
    ),
    "trust_region_newton": (
        Paths(_VALLEY, rosenbrock, (-1.2, 1), (-1.8, 1.7, -1, 1.8), (_descent(0.002), L_BFGS, TRUST_REGION)),
        Training(_FIT, regression, "losses", 1000, (ADAM, L_BFGS, KRYLOV, TRUST_REGION)),
    ),
    "cubic_newton": (
        Paths(_PASS, pass_between, (0, 1.5), (-1.6, 1.6, -0.75, 1.8), (_descent(0.5), L_BFGS, ESCAPING)),
        Training(_FIT, regression, "losses", 1000, (ADAM, L_BFGS, CUBIC_AGAIN, CUBIC)),
    ),
}


def draw(paths: Paths, training: Training, file: Path) -> None:
    """Draw the picture of a page."""
    figure = Figure(figsize=(9.6, 4.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_paths(left, paths)
    _draw_training(right, training)
    for axes, side in ((left, "left"), (right, "right")):
        axes.title.set_fontsize(11)
        figure.legend(
            handles=[line for line in axes.get_lines() if line.get_label()[0] != "_"],
            loc=f"outside lower {side}",
            frameon=False,
            fontsize=9,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    # A palette reduces the file to a third.
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def _draw_paths(axes: Axes, paths: Paths) -> None:
    west, east, south, north = paths.window
    x, y = torch.meshgrid(torch.linspace(west, east, 200), torch.linspace(south, north, 200), indexing="xy")
    heights = paths.function(torch.stack([x, y]))
    levels = heights.min() + (heights.max() - heights.min()) * torch.linspace(0.04, 1, 11) ** 2.5
    axes.contour(x, y, heights, levels=levels.tolist(), colors="#c4c9d4", linewidths=0.8, linestyles="-")
    for method in paths.methods:
        p = torch.tensor(paths.start, dtype=torch.float64, requires_grad=True)
        trace = minimise([p], partial(paths.function, p), method.make, 2000)
        label = f"{method.name}: {trace.steps} steps, cost {trace.costs[trace.steps]}"
        marker = "o" if trace.steps < 60 else None
        axes.plot(*torch.stack(trace.points).T, color=method.colour, lw=1.6, marker=marker, ms=3.5, label=label)
        axes.plot(*trace.points[-1], "x", color=method.colour, ms=8, mew=2, zorder=4)
        for centre, radius in zip(trace.points, trace.radii, strict=True):
            if radius:
                axes.add_patch(Circle(centre.tolist(), radius, fill=False, color=method.colour, alpha=0.25, lw=0.8))
    axes.scatter(*paths.start, s=50, color="white", edgecolor="black", zorder=5)
    axes.set(title=paths.title, xlim=(west, east), ylim=(south, north), xlabel="x", ylabel="y", aspect="equal")


def _draw_training(axes: Axes, training: Training) -> None:
    for method in training.methods:
        trace = _train(training.build, method.make, training.limit)
        axes.semilogy(trace.costs, getattr(trace, training.shown), color=method.colour, lw=1.6, label=method.name)
    what = {"losses": "training loss", "norms": "norm of the gradient"}[training.shown]
    axes.set(title=training.title, xlim=(0, training.limit), xlabel="cost: gradients + products", ylabel=what)
    axes.grid(color="#e4e6eb", lw=0.6)


@cache
def _train(build: Callable[[], tuple[nn.Module, Loss]], make: Make, limit: int) -> Trace:
    model, loss = build()
    return minimise(list(model.parameters()), loss, make, limit)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Draw the pictures of the optimizers' pages.")
    parser.add_argument("pages", nargs="*", metavar="page", help=f"pages: {', '.join(PAGES)} (default: all)")
    for name in parser.parse_args().pages or PAGES:
        if name not in PAGES:
            parser.error(f"there is no page {name!r}: give some of {', '.join(PAGES)}")
        draw(*PAGES[name], Path(__file__).parent / "pictures" / f"{name}.png")
