"""The edge of stability on real digits: the optimizer's step sets the level at which the sharpness settles.

    python examples/edge_of_stability.py --steps 1500

Full-batch training of one tanh network, measured every few steps (Cohen et al. 2021, arXiv 2103.00065; 2022, arXiv
2207.14484). Under gradient descent the largest eigenvalue of the Hessian rises until it reaches 2 / lr and stays there;
under heavy ball it stays at (2 + 2 b) / lr; under Adam, for the preconditioned Hessian, at 38 / lr. Two controls: with
the cross-entropy loss it falls again, and sharpness-aware steps (Foret et al. 2021) keep it lower.

The program prints a table and draws the ratio of eigenvalue to threshold against the steps. The table has the first and
the last largest eigenvalue, its mean ratio over the second half of the run, and the ratio of the largest eigenvalue of
the Hessian's mean over these steps, which is the curvature along directions that do not turn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, preconditioned, stability_threshold

Loss = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Run:
    """The training of one network, and its measurements: steps, eigenvalues and thresholds."""

    name: str
    optimizer: Make
    loss: Loss
    radius: float = 0.0  # of sharpness-aware steps
    steps: list[int] = field(default_factory=list)
    eigenvalues: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    mean_hessian: float = float("nan")  # largest eigenvalue of the second half's mean Hessian over the threshold

    @property
    def ratios(self) -> Tensor:
        """Return eigenvalue over threshold at each measurement."""
        return torch.tensor(self.eigenvalues) / torch.tensor(self.thresholds)

    @property
    def settled(self) -> float:
        """Return the mean ratio over the second half of the run."""
        return float(self.ratios[len(self.ratios) // 2 :].mean())


def half_squared_distance(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return half the mean squared distance to one-hot targets."""
    return F.mse_loss(outputs, F.one_hot(labels, 10).to(outputs), reduction="sum") / (2 * len(outputs))


def gradient_descent(lr: float, momentum: float = 0.0) -> Make:
    """Return a maker of gradient descent, or of heavy ball with a momentum."""
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


RUNS: dict[str, Callable[[], Run]] = {
    "gd-0.2": lambda: Run("gradient descent, lr 0.2", gradient_descent(0.2), half_squared_distance),
    "gd-0.3": lambda: Run("gradient descent, lr 0.3", gradient_descent(0.3), half_squared_distance),
    "gd-0.4": lambda: Run("gradient descent, lr 0.4", gradient_descent(0.4), half_squared_distance),
    "gd-0.6": lambda: Run("gradient descent, lr 0.6", gradient_descent(0.6), half_squared_distance),
    "heavy-ball": lambda: Run("heavy ball 0.9, lr 0.2", gradient_descent(0.2, 0.9), half_squared_distance),
    "adam": lambda: Run("Adam, lr 1e-3", lambda params: torch.optim.Adam(params, lr=1e-3), half_squared_distance),
    "cross-entropy": lambda: Run("cross-entropy, lr 0.3", gradient_descent(0.3), F.cross_entropy),
    "sharpness-aware": lambda: Run("sharpness-aware, lr 0.3", gradient_descent(0.3), half_squared_distance, 0.1),
}


def train(run: Run, steps: int, every: int, seed: int = 0) -> Run:
    """Train a network of 17,610 parameters on all digits at once, and measure it every `every` steps.

    Gradient descent at its threshold oscillates with period two: an odd `every` sees both phases.
    """
    torch.manual_seed(seed)
    digits = load_digits()
    inputs = torch.tensor(StandardScaler().fit_transform(digits.data), dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    params = list(model.parameters())
    optimizer = run.optimizer(params)
    kept: list[LinearOperator] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = run.loss(model(inputs), labels)
        loss.backward()
        return loss

    for step in track(range(1, steps + 1), description=run.name, transient=True):
        closure()
        if run.radius:
            climb(params, run.radius, closure)
        optimizer.step()
        if step % every == 0:
            H = curvature(*copy.deepcopy((model, optimizer)), lambda outputs: run.loss(outputs, labels), inputs)
            run.steps.append(step)
            run.eigenvalues.append(largest(H))
            run.thresholds.append(stability_threshold(optimizer))
            kept += [H] * (2 * step > steps)
    run.mean_hessian = largest(mean(kept)) / run.thresholds[-1]
    return run


def climb(params: list[nn.Parameter], radius: float, closure: Callable[[], Tensor]) -> None:
    """Leave in `.grad` the gradient at a distance of `radius` up the slope."""
    kept = [p.detach().clone() for p in params]
    norm = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()
    with torch.no_grad():
        for p in params:
            p.add_(p.grad, alpha=radius / float(norm))
    closure()
    with torch.no_grad():
        for p, old in zip(params, kept, strict=True):
            p.copy_(old)


def curvature(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], inputs: Tensor
) -> LinearOperator:
    """Return the Hessian, preconditioned if the optimizer is Adam."""
    H = hessian(evaluate(lambda: loss(model(inputs)), model.parameters()))
    return preconditioned(H, optimizer, model.parameters()) if isinstance(optimizer, torch.optim.Adam) else H


def mean(operators: list[LinearOperator]) -> LinearOperator:
    """Return the mean of matrices of one size."""
    one = operators[0]
    return LinearOperator(lambda v: sum(H @ v for H in operators) / len(operators), one.shape, one.like)


def largest(H: LinearOperator) -> float:
    """Return the largest eigenvalue."""
    return extreme_eigenvalues(H, top=1, bottom=0, tolerance=1e-2).top[0].value


# Larger steps of gradient descent are darker; the other runs also differ in line style.
COLOURS = ("#9ecae1", "#5ba3d0", "#2171b5", "#08306b", "#d95f02", "#e6ab02", "#7a0177", "#555555")
LINES = (*["-"] * 5, "-.", ":", "--")


def draw(runs: list[Run], path: Path) -> None:
    """Draw eigenvalue over threshold against the steps."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.set_prop_cycle(color=COLOURS, linestyle=LINES)
    axes.axhline(1.0, color="black", linewidth=0.8, label="the edge of stability")
    for run in runs:
        axes.plot(run.steps, run.ratios, linewidth=1.4, label=run.name)
    axes.set(xlabel="step", ylabel="largest eigenvalue / stability threshold", ylim=(0, 1.5))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Train all, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run (default 1500)")
    parser.add_argument("--every", type=int, default=25, help="steps between measurements, odd (default 25)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which (default all)")
    parser.add_argument("--output", type=Path, default=Path("edge_of_stability.png"), help="the picture")
    options = parser.parse_args()
    runs = [train(RUNS[name](), options.steps, options.every) for name in options.runs]
    table = Table(Column("run", no_wrap=True), "threshold", "first", "last", "ratio", "of the mean")
    for run in runs:
        numbers = (run.thresholds[-1], run.eigenvalues[0], run.eigenvalues[-1], run.settled, run.mean_hessian)
        table.add_row(run.name, *(f"{number:.4g}" for number in numbers))
    Console().print(table)
    draw(runs, options.output)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
