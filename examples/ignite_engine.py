"""Curvature from an ignite engine, whose code stays as it is: `python examples/ignite_engine.py`.

A small network learns handwritten digits under `create_supervised_trainer`. One handler measures the loss on the first
batch at every few iterations, prints what the values mean and writes them for TensorBoard. Needs
`pip install pytorch-ignite`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.utils import convert_tensor
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature import Measured, measure

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
        for tag, value in self.last.items():
            self.writer.add_scalar(tag, value, engine.state.iteration)
        print(f"iteration {engine.state.iteration}", self.last.in_words(), sep="\n", end="\n\n")


def main(folder: str = "logs/ignite_engine", watched: bool = True) -> nn.Module:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(images.float() / 8 - 1, labels), batch_size=128, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = create_supervised_trainer(model, optimizer, F.cross_entropy)
    if watched:
        CurvatureHandler(model, F.cross_entropy, optimizer, folder).attach(engine, EVERY)
    engine.run(loader, max_epochs=EPOCHS)
    return model


if __name__ == "__main__":
    main()
