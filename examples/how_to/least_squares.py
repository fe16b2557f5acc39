"""Curve fitting by Levenberg-Marquardt steps, L-BFGS and SciPy: `python examples/how_to/least_squares.py`.

Two peaks on a decaying background with noise, eight parameters. The closure is the one that `torch.optim.LBFGS` takes.
Prints the fit with its standard errors, which agree with those of `scipy.optimize.curve_fit`.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor

from newtonopt import LevenbergMarquardt, evaluate, gauss_newton

TRUE = (100.0, 0.01, 100.0, 68.0, 20.0, 70.0, 150.0, 19.0)
START = (90.0, 0.012, 85.0, 65.0, 25.0, 60.0, 145.0, 25.0)


def curve(xp, x, a, decay, height1, place1, width1, height2, place2, width2):
    """Evaluate the curve with `xp`, which is torch or numpy."""
    background = a * xp.exp(-decay * x)
    first = height1 * xp.exp(-(((x - place1) / width1) ** 2))
    return background + first + height2 * xp.exp(-(((x - place2) / width2) ** 2))


def main(steps: int = 50) -> dict[str, float]:
    """Fit by each optimizer, and return the sums of squares."""
    x = torch.arange(1.0, 251.0, dtype=torch.float64)
    noise = 2.5 * torch.randn(250, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = curve(torch, x, *TRUE) + noise

    lbfgs = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")
    units, ones = torch.tensor(START, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    losses = {}
    for name, make, unit in [
        ("L-BFGS", lbfgs, ones),
        ("L-BFGS, parameters of order one", lbfgs, units),
        ("LevenbergMarquardt", LevenbergMarquardt, ones),
    ]:
        b = (units / unit).requires_grad_()
        optimizer, start = make([b]), time.process_time()

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = 0.5 * (curve(torch, x, *(unit * b)) - y).square().mean()  # noqa: B023
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        losses[name] = 2 * len(x) * closure().item()
        seconds = time.process_time() - start
        print(f"{name:32s} sum of squares {losses[name]:.6f} after {steps} steps, {seconds:.2f} s")

    # The Gauss-Newton matrix is J'J / m for the loss mean r^2 / 2; the covariance is s^2 (J'J)^-1.
    matrix = len(x) * gauss_newton(evaluate(closure, [b])).dense()
    variance = losses[name] / (len(x) - len(b))
    errors = (variance * torch.linalg.inv(matrix).diagonal()).sqrt()
    found, covariance = curve_fit(lambda x, *b: curve(np, x, *b), x.numpy(), y.numpy(), START)
    theirs = np.sqrt(np.diag(covariance))
    for one in zip(TRUE, b.tolist(), errors.tolist(), found, theirs, strict=True):
        print("true {:8g}  fitted {:12.7g} +- {:.4g}  SciPy {:12.7g} +- {:.4g}".format(*one))
    return losses


if __name__ == "__main__":
    main()
