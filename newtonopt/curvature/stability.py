"""The curvature at which an optimizer's iteration turns unstable."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import SGD, Optimizer


def stability_threshold(optimizer: Optimizer) -> float:
    """Largest eigenvalue of the loss's Hessian at which the iteration on a quadratic still contracts.

    On a quadratic each eigendirection follows a linear recursion of its own; this is where its larger root leaves the
    unit disk (Cohen et al. 2021, arXiv 2103.00065, app. B). With learning rate lr, momentum b, dampening d and weight
    decay w:

    - gradient descent: 2 / lr - w
    - heavy ball: (2 + 2 b) / (lr (1 - d)) - w. The buffer scales gradients by 1 - d: a learning rate of lr (1 - d).
    - Nesterov: (2 + 2 b) / (lr (1 + 2 b)) - w. With s = 1 - lr h the roots solve z^2 - (1 + b) s z + b s = 0, and one
      reaches -1 at s = -1 / (1 + 2 b).

    Weight decay is added to the gradient first, so an eigenvalue lambda acts as h = lambda + w.

    With several parameter groups the smallest of their thresholds is returned. Curvature below it is stable, curvature
    above it need not be unstable: sufficient, not necessary. (Left-multiply the recursion z^2 - z (I + B - L H) + B by
    the inverse of L, the learning rates: each eigenvector then solves a scalar recursion of averaged coefficients. That
    holds for gradient descent and heavy ball in any mix, for Nesterov where the groups share one momentum.)

    Not for minibatches: noise makes an iteration unstable earlier.

    Args:
        optimizer: A `torch.optim.SGD` with momentum below 1, or a subclass that keeps its `step`.

    Returns:
        The threshold; infinite where the learning rate is zero, negative where weight decay alone is unstable.

    Raises:
        TypeError: Another optimizer.
        ValueError: A group that maximizes, or whose momentum or dampening damps no curvature at all.
    """
    if not isinstance(optimizer, SGD) or type(optimizer).step is not SGD.step:
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}: give a torch.optim.SGD (plain, heavy ball or Nesterov), for "
            "which the Hessian's own eigenvalues decide on stability; for Adam and its like they do not."
        )
    return min(_group_threshold(group) for group in optimizer.param_groups)


def _group_threshold(group: dict[str, Any]) -> float:
    rate, momentum, dampening = float(group["lr"]), float(group["momentum"]), float(group["dampening"])
    if group["maximize"]:
        raise ValueError("maximize must be False, got True: ascent is unstable at every positive curvature")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1) for a stable iteration, got {momentum}")
    if momentum > 0.0 and dampening > 1.0:
        raise ValueError(f"dampening must be at most 1, got {dampening}: above it the steps go uphill")
    if group["nesterov"]:
        effective, limit = rate * (1.0 + 2.0 * momentum), 2.0 + 2.0 * momentum
    else:
        # torch.optim.SGD has no buffer, hence no dampening, without momentum.
        effective, limit = rate * (1.0 - dampening if momentum > 0.0 else 1.0), 2.0 + 2.0 * momentum
    return math.inf if effective == 0.0 else limit / effective - float(group["weight_decay"])
