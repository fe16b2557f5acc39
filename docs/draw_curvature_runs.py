"""Draw the pictures of read_your_curvature.md: `python docs/draw_curvature_runs.py [NAME ...]`.

Each picture is a training run on one of scikit-learn's data sets, measured by `measure`: the loss, the
largest eigenvalue against the optimizer's stability threshold, and the smallest eigenvalue or the curvature along the
gradient. The program prints the words of one measurement of each run. It takes a minute of processor time.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from newtonopt import TrustRegionNewton
from newtonopt.curvature import Measured, measure

BLUE, ORANGE, GREEN, GREY, RED = "#1446a0", "#e8720c", "#3a9a4a", "#777777", "#c22f3d"

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        model: The model.
        losses: Yields the loss of each step's batch.
        probe: The loss that is measured.
        optimizer: The optimizer.
        steps: Number of steps.
        every: Steps between measurements.
        told: Step of the measurement whose words are printed.
        remedy: Name and maker of the optimizer that its words advise; None for a run that needs none.
    """

    model: nn.Module
    losses: Iterator[Loss]
    probe: Loss
    optimizer: Optimizer
    steps: int
    every: int
    told: int
    remedy: tuple[str, Callable[[Iterable[Tensor]], Optimizer]] | None = None


@dataclass(frozen=True)
class Record:
    """Record of a run: the loss at each step, and the measurements by their step."""

    losses: list[float]
    measured: dict[int, Measured]

    def line(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a value by its name."""
        found = [(step, value) for step, m in self.measured.items() if (value := m.read(name)) is not None]
        return [step for step, _ in found], [value for _, value in found]


def healthy() -> Run:
    """Return a classifier of digits on small batches, with a learning rate that works."""
    x, y = digits()
    model = network(64, 40, 40, 10)
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    return Run(
        model, batches(model, x, y, F.cross_entropy), fixed(model, x, y, F.cross_entropy), optimizer, 300, 10, 30
    )


def edge() -> Run:
    """Return gradient descent on all digits, whose largest eigenvalue rises to 2 / lr."""
    x, y = digits()
    model = network(64, 40, 40, 10)
    probe = fixed(model, x, y, half_squared_distance)
    remedy = ("lr 0.15", partial(SGD, lr=0.15))
    return Run(model, repeated(probe), probe, SGD(model.parameters(), lr=0.3), 600, 15, 450, remedy)


def ill_conditioned() -> Run:
    """Return logistic regression on features of very different size, as they come."""
    x, y = load_breast_cancer(return_X_y=True)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y).double()
    model = network(30, 1)
    probe = fixed(model, inputs / inputs.std(), labels, lambda z, t: F.binary_cross_entropy_with_logits(z[:, 0], t))
    remedy = ("Adam, lr 0.1", partial(Adam, lr=0.1))
    return Run(model, repeated(probe), probe, SGD(model.parameters(), lr=0.2), 1000, 25, 500, remedy)


def saddle() -> Run:
    """Return an autoencoder of digits that starts next to the saddle at zero."""
    x, _ = digits()
    model = network(64, 20, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.02)
    probe = fixed(model, x - x.mean(0), x - x.mean(0), lambda z, t: (z - t).square().sum(1).mean() / 2)
    remedy = ("TrustRegionNewton", partial(TrustRegionNewton, max_iterations=50))
    return Run(model, repeated(probe), probe, SGD(model.parameters(), lr=0.03), 400, 10, 100, remedy)


def diverging() -> Run:
    """Return the healthy run's network and data at a learning rate that is too large."""
    x, y = digits()
    model = network(64, 40, 40, 10)
    probe = fixed(model, x, y, F.cross_entropy)
    remedy = ("lr 1.03", partial(SGD, lr=1.03, momentum=0.9))
    return Run(model, repeated(probe), probe, SGD(model.parameters(), lr=1.5, momentum=0.9), 60, 1, 4, remedy)


RUNS = {run.__name__: run for run in (healthy, edge, ill_conditioned, saddle, diverging)}


def digits() -> tuple[Tensor, Tensor]:
    """Return 600 digits with values from 0 to 1, and their labels."""
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:600]) / 16, torch.from_numpy(y[:600])


def network(*widths: int) -> nn.Module:
    """Return a tanh network in float64."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def half_squared_distance(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return half the mean squared distance to one-hot targets."""
    return (outputs - F.one_hot(labels, 10)).square().sum(1).mean() / 2


def fixed(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Return the loss on all samples."""
    return lambda: loss(model(x), y)


def repeated(loss: Loss) -> Iterator[Loss]:
    """Yield one loss again and again."""
    while True:
        yield loss


def batches(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], size: int = 64
) -> Iterator[Loss]:
    """Yield the losses of random batches."""
    while True:
        chosen = torch.randperm(len(x))[:size]
        yield fixed(model, x[chosen], y[chosen], loss)


def trained(run: Run) -> Record:
    """Train, and measure every few steps."""
    losses: list[float] = []
    found: dict[int, Measured] = {}
    for step in range(run.steps + 1):
        if step % run.every == 0:
            params = list(run.model.parameters())
            found[step] = measure(run.probe, params, run.optimizer, top=1, sharpness=None, max_products=60)
        losses.append(float(run.probe().detach()))
        one_step(run.optimizer, next(run.losses))
    return Record(losses, found)


def remedied(run: Run, make: Callable[[Iterable[Tensor]], Optimizer]) -> list[float]:
    """Train with another optimizer, and return the losses."""
    optimizer, losses = make(run.model.parameters()), []
    # Ten steps of a second-order optimizer cost some hundred gradients.
    for _ in range(run.steps + 1 if isinstance(optimizer, SGD | Adam) else 11):
        losses.append(float(run.probe().detach()))
        one_step(optimizer, next(run.losses))
    return losses


def one_step(optimizer: Optimizer, loss: Loss) -> None:
    """Take a step of any optimizer."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


def drawn(name: str, record: Record, remedy: tuple[str, list[float]] | None) -> Figure:
    """Draw loss, largest eigenvalue with its threshold, and what else tells these runs apart."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(record.losses, color=GREY, label="the run")
    if remedy is not None:
        left.plot(remedy[1], color=GREEN, label=remedy[0])
        left.legend(fontsize=8)
    left.set_title("loss")
    middle.plot(*record.line("lambda_max"), color=BLUE, label="largest eigenvalue")
    middle.plot(*record.line("stability_threshold"), color=RED, linestyle="--", label="stability threshold")
    middle.set_title("largest eigenvalue")
    if name == "ill_conditioned":
        right.plot(*record.line("lambda_max"), color=BLUE, label="largest eigenvalue")
        right.plot(*record.line("gradient_curvature"), color=ORANGE, label="along the gradient")
        right.set_title("curvature")
        right.legend(fontsize=8)
    else:
        right.plot(*record.line("lambda_min"), color=ORANGE)
        right.axhline(0.0, color=GREY, linewidth=0.8)
        right.set_title("smallest eigenvalue")
    middle.legend(fontsize=8)
    for axes in (left, middle, right):
        seen = [abs(value) for line in axes.lines for value in line.get_ydata()]
        if axes.get_title() != "smallest eigenvalue" and max(seen) > 20 * min(seen):
            axes.set_yscale("log")
            axes.tick_params(which="minor", labelleft=False)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure with 64 colours, which takes a third of the space."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    """Train, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], help="runs; default: all")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "pictures" / "runs")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or RUNS:
        torch.manual_seed(0)
        run = RUNS[name]()
        record, remedy = trained(run), None
        if run.remedy is not None:
            torch.manual_seed(0)
            remedy = (run.remedy[0], remedied(RUNS[name](), run.remedy[1]))
        save(drawn(name, record, remedy), arguments.folder / f"{name}.png")
        print(
            f"{name}, step {run.told}, loss {record.losses[run.told]:.3g}, {record.losses[-1]:.3g} in the end", end=""
        )
        print("" if remedy is None else f", {remedy[1][-1]:.3g} with {remedy[0]}")
        print(record.measured[run.told].in_words(), end="\n\n")


if __name__ == "__main__":
    main()
