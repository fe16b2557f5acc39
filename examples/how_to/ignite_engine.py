"""Curvature and Newton steps in ignite's engines: `python examples/how_to/ignite_engine.py`.

A small network learns handwritten digits under `create_supervised_trainer`, whose code stays as it is. One handler
measures the loss on the first batch at every few iterations, prints what the values mean and writes them for
TensorBoard. HessianFree needs a closure, which an engine's own update function gives it. Both take the same processor
time. Needs `pip install pytorch-ignite`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.utils import convert_tensor
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from newtonopt import HessianFree
from newtonopt.curvature import Measured, add_to_tensorboard, measure

EPOCHS, EVERY = 5, 20


class CurvatureHandler:
    """Measure curvature on the first batch that training sees, and again at every so many iterations."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, folder: str
    ) -> None:
        self.model, self.loss, self.optimizer, self.writer = model, loss, optimizer, SummaryWriter(folder)
        self.batch: tuple[Tensor, Tensor] | None = None
        self.last: Measured | None = None

    def attach(self, engine: Engine, every: int) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1) | Events.ITERATION_COMPLETED(every=every), self)
        engine.add_event_handler(Events.COMPLETED, self.writer.close)

    def __call__(self, engine: Engine) -> None:
        if self.batch is None:
            device = next(self.model.parameters()).device
            self.batch = convert_tensor(engine.state.batch, device)
        x, y = self.batch
        self.last = measure(
            lambda: self.loss(self.model(x), y),
            self.model.parameters(),
            self.optimizer,
            max_products=24,
            last=self.last,
        )
        add_to_tensorboard(self.writer, self.last, engine.state.iteration)
        print(f"iteration {engine.state.iteration}", self.last.in_words(), sep="\n", end="\n\n")


def data() -> TensorDataset:
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    return TensorDataset(images.float() / 8 - 1, labels)


def network(dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))


def main(folder: str = "logs/ignite_engine", watched: bool = True) -> nn.Module:
    """Train by stochastic gradients and return the network."""
    model = network(0.1)
    loader = DataLoader(data(), batch_size=128, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = create_supervised_trainer(model, optimizer, F.cross_entropy)
    if watched:
        CurvatureHandler(model, F.cross_entropy, optimizer, folder).attach(engine, EVERY)
    engine.run(loader, max_epochs=EPOCHS)
    return model


def compare(seconds: float = 3.0) -> dict[str, float]:
    """Train by Newton steps and by Adam on the whole data, and return the losses."""
    losses = {}
    for name, make in {"Adam": torch.optim.Adam, "HessianFree": HessianFree}.items():
        model = network(0.0)
        optimizer = make(model.parameters())

        def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
            x, y = batch

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss = F.cross_entropy(model(x), y)  # noqa: B023
                loss.backward()
                return loss

            return optimizer.step(closure).item()  # noqa: B023

        engine, end = Engine(update), time.process_time() + seconds
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, end=end: time.process_time() > end and engine.terminate()
        )
        losses[name] = engine.run([data().tensors], max_epochs=1_000_000).output
        print(f"{name:12s} loss {losses[name]:.2e} after {engine.state.iteration} iterations")
    return losses


if __name__ == "__main__":
    main()
    compare()
