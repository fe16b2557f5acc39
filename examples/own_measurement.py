"""A curvature measurement of one's own, in a plain training loop: `python examples/own_measurement.py`.

The spectral gap of a small network on handwritten digits: how far the largest Hessian eigenvalue stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from newtonopt.curvature import Chart, ExtremeEigenvalues, Measured, Measurement, Tag, View, measure

STEPS, EVERY = 60, 20


@dataclass(frozen=True)
class SpectralGap(Measurement[float]):
    """The ratio of the largest eigenvalue to the one of a given rank."""

    rank: int = 2

    tags = (Tag("gap", "1", "the largest eigenvalue over the one of the rank"),)
    charts = (Chart("Spectral gap", ("gap",)),)

    def measure(self, view: View) -> float | None:
        spectrum = view.of(ExtremeEigenvalues)
        if spectrum is None or len(spectrum.top) < self.rank:
            return None
        return spectrum.top[0].value / spectrum.top[self.rank - 1].value

    def values(self, result: float) -> dict[str, float]:
        return {"gap": result}

    def sentences(self, result: float, measured: Measured) -> Sequence[str]:
        return [f"The largest eigenvalue is {result:.3g} times the one of rank {self.rank}."]


def main() -> Measured:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = images[:300].float() / 8 - 1, labels[:300]
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    for step in range(STEPS + 1):
        if step % EVERY == 0:
            found = measure(
                closure, model.parameters(), optimizer, bottom=0, sharpness=None, measurements=[SpectralGap(rank=3)]
            )
            print(f"step {step}", found.in_words(), sep="\n", end="\n\n")
        optimizer.step(closure)
    return found


if __name__ == "__main__":
    main()
