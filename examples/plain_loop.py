"""Curvature in TensorBoard from a plain training loop, without Lightning: `python examples/plain_loop.py`.

Gradient descent on handwritten digits. `measure` gives the values that `CurvatureMonitor` logs, and
`add_to_tensorboard` writes them for the Curvature tab: `tensorboard --logdir logs/plain_loop`. Each measurement
follows the one before, except the first and every tenth after it, which start at random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature import add_to_tensorboard, measure

STEPS, EVERY = 200, 20


def main(folder: str = "logs/plain_loop") -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, targets = images[:500].float() / 8 - 1, F.one_hot(labels[:500]).float()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = SummaryWriter(folder)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(images), targets, reduction="sum") / (2 * len(images))
        loss.backward()
        return loss

    last, losses = None, []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            certify = step % (10 * EVERY) == 0
            last = measure(closure, model.parameters(), optimizer, last=last, certify=certify, step_losses=losses)
            add_to_tensorboard(writer, last, step)
            print(f"step {step}", last.in_words(), sep="\n", end="\n\n")
            losses.clear()
        losses.append(optimizer.step(closure).item())
    writer.close()
    return last


if __name__ == "__main__":
    main()
