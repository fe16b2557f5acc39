"""A Fabric loop with HessianFree, and its curvature: `python examples/how_to/fabric_loop.py`.

The loop is Fabric's own: `setup`, `fabric.backward` inside the closure, `optimizer.step(closure)`. HessianFree and Adam
get the same processor time. Needs `pip install '/path/to/newtonopt[lightning]'`.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import HessianFree
from newtonopt.curvature import measure


def main(seconds: float = 3.0) -> dict[str, float]:
    """Train by each optimizer, and return the losses on all data."""
    fabric = Fabric(accelerator="cpu", devices=1)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 8 - 1, labels)
    losses = {}
    for name, make in {"Adam": torch.optim.Adam, "HessianFree": HessianFree}.items():
        fabric.seed_everything(0, verbose=False)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        model, optimizer = fabric.setup(model, make(model.parameters()))
        loader = fabric.setup_dataloaders(DataLoader(data, batch_size=len(data)))
        (batch,) = loader

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            x, y = batch  # noqa: B023
            loss = F.cross_entropy(model(x), y)  # noqa: B023
            fabric.backward(loss)
            return loss

        steps, end = 0, time.process_time() + seconds
        while time.process_time() < end:
            optimizer.step(closure)
            steps += 1
        losses[name] = closure().item()
        print(f"{name:12s} loss {losses[name]:.2e} after {steps} steps")
        if name == "Adam":
            print(measure(closure, model.parameters(), optimizer.optimizer).in_words())
    return losses


if __name__ == "__main__":
    main()
