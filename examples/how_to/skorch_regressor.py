"""skorch's regressor trained by HessianFree, Adam and L-BFGS: `python examples/how_to/skorch_regressor.py`.

The regressor is scikit-learn's interface to a network: it works in pipelines and cross-validation, and takes the
optimizer's class. A callback measures the curvature after training. Each method gets the same processor time. Needs
`pip install skorch`.
"""

from __future__ import annotations

import time

import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import make_friedman1
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

from newtonopt import HessianFree
from newtonopt.curvature import measure

OPTIMIZERS = {
    "Adam": {"optimizer": torch.optim.Adam, "lr": 1e-2},
    "L-BFGS": {"optimizer": torch.optim.LBFGS, "lr": 1.0, "optimizer__line_search_fn": "strong_wolfe"},
    # lr=1.0, because skorch's default of 0.01 would take a hundredth of each step.
    "HessianFree": {"optimizer": HessianFree, "lr": 1.0},
}


class Budget(Callback):
    """Stop training after so many seconds of processor time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, net, **given) -> None:
        self.end = time.process_time() + self.seconds

    def on_epoch_end(self, net, **given) -> None:
        if time.process_time() > self.end:
            raise KeyboardInterrupt  # skorch's way to stop


class Curvature(Callback):
    """Print the curvature of the loss on all data after training."""

    def on_train_end(self, net, X, y, **given) -> None:
        x, y = (torch.as_tensor(array) for array in (X, y))
        found = measure(lambda: net.get_loss(net.infer(x), y), net.module_.parameters(), net.optimizer_)
        print(found.in_words())


def main(seconds: float = 2.0) -> dict[str, float]:
    """Train by each optimizer, and return the mean squared errors of training."""
    x, y = make_friedman1(400, noise=0.1, random_state=0)
    split = train_test_split(x.astype("float32"), y.astype("float32")[:, None], random_state=0)
    train_x, test_x, train_y, test_y = split
    errors = {}
    for name, settings in OPTIMIZERS.items():
        torch.manual_seed(0)
        net = NeuralNetRegressor(
            nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1)),
            max_epochs=100_000,
            batch_size=-1,  # the whole data in each step
            train_split=None,
            verbose=0,
            callbacks=[Budget(seconds), *([Curvature()] if name == "Adam" else [])],
            **settings,
        )
        # Targets of order one: steps from a network's first weights are then of the right length.
        regressor = TransformedTargetRegressor(make_pipeline(StandardScaler(), net), transformer=StandardScaler())
        regressor.fit(train_x, train_y)
        (net,) = (step for _, step in regressor.regressor_.steps if isinstance(step, NeuralNetRegressor))
        errors[name] = net.history[-1, "train_loss"]
        score = regressor.score(test_x, test_y)
        print(f"{name:20s} training error {errors[name]:.2e}, R2 of test data {score:.4f}, {len(net.history)} steps")
    return errors


if __name__ == "__main__":
    main()
