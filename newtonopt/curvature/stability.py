"""The curvature at which an optimizer's iteration turns unstable."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

# AdamW before Adam, of which it is a subclass in some releases of torch.
_KINDS: tuple[type[Optimizer], ...] = (SGD, RMSprop, Adagrad, AdamW, Adam, NAdam, RAdam, Adamax)


def stability_threshold(optimizer: Optimizer) -> float:
    """Largest eigenvalue at which the iteration on a quadratic still contracts: of the loss's Hessian for SGD, of the
    Hessian that `preconditioned` makes of it for optimizers that adapt.

    On a quadratic each eigendirection follows a linear recursion of its own; this is where its larger root leaves the
    unit disk, at -1 (Cohen et al. 2021, arXiv 2103.00065, app. B; 2022, arXiv 2207.14484). With learning rate lr,
    momentum b, dampening d and weight decay w:

    - gradient descent: 2 / lr - w
    - heavy ball: (2 + 2 b) / (lr (1 - d)) - w. The buffer scales gradients by 1 - d: a learning rate of lr (1 - d).
    - Nesterov: (2 + 2 b) / (lr (1 + 2 b)) - w. With s = 1 - lr h the roots solve z^2 - (1 + b) s z + b s = 0, and one
      reaches -1 at s = -1 / (1 + 2 b).
    - Adagrad: 2 / lr. RMSprop: (2 + 2 b) / lr, with the momentum b or zero.
    - Adam, RAdam, Adamax, with b their first beta: (2 + 2 b) / ((1 - b) lr), which is 38 / lr at b = 0.9.
    - NAdam: (2 + 2 b) / ((1 - b) (1 + 2 b) lr).
    - decoupled decay, as in AdamW: 2 - lr w in place of 2, so (1 + b) (2 - lr w) / ((1 - b) lr).

    Weight decay in SGD is added to the gradient first, so an eigenvalue lambda acts as h = lambda + w. In the adaptive
    optimizers such decay is part of the preconditioned Hessian. So is their bias correction: the threshold is the same
    at every step.

    With several parameter groups the smallest of their thresholds is returned. For the Hessian's own eigenvalues it is
    sufficient, not necessary: curvature above it need not be unstable. Of a `preconditioned` operator it is necessary
    too, for that folds the ratios of the thresholds in. (Left-multiply the recursion z^2 - z (I + B - L H) + B by the
    inverse of L, the learning rates: each eigenvector then solves a scalar recursion of averaged coefficients. That
    holds for gradient descent and heavy ball in any mix, for Nesterov where the groups share one momentum.)

    Not for minibatches: noise makes an iteration unstable earlier. The adaptive optimizers' preconditioner is taken to
    stand still, as it nearly does over the few steps in which an instability grows.

    Args:
        optimizer: A `torch.optim` SGD, RMSprop, Adagrad, Adam, AdamW, NAdam, RAdam or Adamax, with momentum below 1, or
            a subclass that keeps its `step`.

    Returns:
        The threshold; infinite where the learning rate is zero, not positive where weight decay alone is unstable.

    Raises:
        TypeError: Another optimizer.
        ValueError: A group that maximizes, or whose momentum or dampening damps no curvature at all.
    """
    kind = kind_of(optimizer)
    return min(group_threshold(kind, group) for group in optimizer.param_groups)


def kind_of(optimizer: object) -> type[Optimizer]:
    """Whose `step` the optimizer makes.

    Raises:
        TypeError: None of those known.
    """
    for kind in _KINDS:
        # Unwrapped, for torch wraps the step of every class from which an optimizer is made.
        if isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step):
            return kind
    names = ", ".join(kind.__name__ for kind in _KINDS)
    raise TypeError(
        f"optimizer must be one for which a stability threshold is known, {names} or a subclass that keeps its step, "
        f"got a value of type {type(optimizer).__name__}."
    )


def is_decoupled(kind: type[Optimizer], group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the parameters and leaves the gradient alone."""
    return kind is AdamW or bool(group.get("decoupled_weight_decay", False))


def group_threshold(kind: type[Optimizer], group: dict[str, Any]) -> float:
    """The threshold of one parameter group.

    Raises:
        ValueError: It maximizes, or its momentum or dampening damps no curvature at all.
    """
    rate, decay, name = float(group["lr"]), float(group["weight_decay"]), _momentum_name(kind)
    momentum = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
    dampening = float(group.get("dampening", 0.0)) if momentum > 0.0 else 0.0
    if group["maximize"]:
        raise ValueError("maximize must be False, got True: ascent is unstable at every positive curvature.")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"{name} must be in [0, 1) for a stable iteration, got {momentum}.")
    if dampening > 1.0:
        raise ValueError(f"dampening must be at most 1, got {dampening}: above it the steps go uphill.")
    # torch.optim.SGD has no buffer, hence no dampening, without momentum.
    effective = rate * (1.0 - momentum if "betas" in group else 1.0 - dampening)
    if kind is NAdam or group.get("nesterov"):
        effective *= 1.0 + 2.0 * momentum
    if effective == 0.0:
        return math.inf
    reach = 2.0 - rate * decay if is_decoupled(kind, group) else 2.0
    return (1.0 + momentum) * reach / effective - (decay if kind is SGD else 0.0)


def _momentum_name(kind: type[Optimizer]) -> str:
    return "momentum" if kind in (SGD, RMSprop) else "the first of betas"
