"""The curvature at which an optimizer's iteration turns unstable, and the Hessian as adaptive optimizers see it.

`stability_threshold` and the largest eigenvalue of `preconditioned` are the two numbers to compare.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.vectors.flat import flat_dtype, flatten, trained_parameters
from newtonopt.vectors.sharded import local_part

# AdamW stands before Adam, because it is a subclass of Adam in some releases of torch.
_KINDS: tuple[type[Optimizer], ...] = (SGD, RMSprop, Adagrad, AdamW, Adam, NAdam, RAdam, Adamax)
# Name of each optimizer's state from which the preconditioner P is computed.
_SECOND_MOMENT = {
    RMSprop: "square_avg",
    Adagrad: "sum",
    AdamW: "exp_avg_sq",
    Adam: "exp_avg_sq",
    NAdam: "exp_avg_sq",
    RAdam: "exp_avg_sq",
    Adamax: "exp_inf",
}


def stability_threshold(optimizer: Optimizer) -> float:
    """Return the largest eigenvalue at which the optimizer's iteration on a quadratic still contracts.

    The eigenvalue is that of the loss's Hessian for SGD, and that of the Hessian that `preconditioned` makes of it for
    optimizers that adapt. On a quadratic each eigendirection follows a linear recursion of its own; the threshold is
    where its larger root leaves the unit disk, at -1 (Cohen et al. 2021, arXiv 2103.00065, app. B; 2022, arXiv
    2207.14484). With learning rate `lr`, momentum `b`, dampening `d` and weight decay `w`:

    - gradient descent: `2 / lr - w`
    - heavy ball: `(2 + 2 b) / (lr (1 - d)) - w`. The buffer scales gradients by `1 - d`, as a learning rate of
      `lr (1 - d)` does.
    - Nesterov: `(2 + 2 b) / (lr (1 + 2 b)) - w`. With `s = 1 - lr h` the roots solve `z^2 - (1 + b) s z + b s = 0`, and
      one reaches -1 at `s = -1 / (1 + 2 b)`.
    - Adagrad: `2 / lr`. RMSprop: `(2 + 2 b) / lr`, with the momentum `b` or zero.
    - Adam, RAdam, Adamax, with `b` their first beta: `(2 + 2 b) / ((1 - b) lr)`, which is `38 / lr` at `b = 0.9`.
    - NAdam: `(2 + 2 b) / ((1 - b) (1 + 2 b) lr)`.
    - decoupled decay, as in AdamW: `2 - lr w` in place of 2, so `(1 + b) (2 - lr w) / ((1 - b) lr)`.

    SGD adds weight decay to the gradient first, so an eigenvalue `lambda` acts as `h = lambda + w`. In the adaptive
    optimizers such decay is part of the preconditioned Hessian. So is their bias correction: the threshold is the same
    at every step.

    With several parameter groups the smallest of their thresholds is returned. It is sufficient for the Hessian's own
    eigenvalues, not necessary: curvature above it need not be unstable. For a `preconditioned` operator it is necessary
    too, because the ratios of the thresholds are part of that operator. (Left-multiply the recursion
    `z^2 - z (I + B - L H) + B` by the inverse of `L`, the learning rates: each eigenvector then solves a scalar
    recursion of averaged coefficients. That holds for gradient descent and heavy ball in any mix, for Nesterov if
    the groups share one momentum.)

    Do not use this for minibatches: noise makes an iteration unstable earlier. The preconditioner of an adaptive
    optimizer is assumed to stand still, as it nearly does over the few steps in which an instability grows.

    Args:
        optimizer: A `torch.optim` SGD, RMSprop, Adagrad, Adam, AdamW, NAdam, RAdam or Adamax, with momentum below 1, or
            a subclass that keeps its `step`.

    Returns:
        The threshold; infinite if the learning rate is zero, not positive if weight decay alone is unstable.

    Raises:
        TypeError: The optimizer is none of these.
        ValueError: A group maximizes, or its momentum or dampening damps no curvature at all.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import stability_threshold
        >>> params = [torch.zeros(2, requires_grad=True)]
        >>> stability_threshold(torch.optim.SGD(params, lr=0.5))
        4.0
        >>> round(stability_threshold(torch.optim.Adam(params, lr=0.01)))
        3800

    See Also:
        - `preconditioned()`: the matrix whose eigenvalue to compare with it for Adam and its kin.
        - `Stability`: threshold and ratio in a training run.
        - `docs/edge_of_stability.md`: a run that goes there.
        - `docs/reference/mathematics.md`: a threshold derived.
    """
    kind = _kind_of(optimizer)
    return min(_group_threshold(kind, group) for group in optimizer.param_groups)


def preconditioned(operator: LinearOperator, optimizer: Optimizer, params: Iterable[Tensor]) -> LinearOperator:
    """Return `P^-1/2 H P^-1/2`, with the diagonal matrix P by which the optimizer's last step divided.

    Its largest eigenvalue, against `stability_threshold(optimizer)`, decides whether the iteration with this P is
    stable: training with Adam settles where it is `38 / lr` (Cohen et al. 2022, arXiv 2207.14484). After t steps, with
    betas `b` and `c`, second moment `v` and eps `e`, the diagonal of P is:

    - Adam, AdamW: `(1 - b^t) (sqrt(v / (1 - c^t)) + e)`, `v` the maximum so far with `amsgrad`
    - RMSprop: `sqrt(v) + e`, `v` minus the squared mean gradient with `centered`
    - Adagrad: `(1 + (t - 1) lr_decay) (sqrt(v) + e)`, `v` the sum
    - NAdam: `(sqrt(v / (1 - c^t)) + e) / m`, where `m` tends to one: the momenta of this step against the last ones
    - RAdam: `(1 - b^t) (sqrt(v) + e) / (r sqrt(1 - c^t))` with the rectification `r`, `1 - b^t` before that sets in
    - Adamax: `(1 - b^t) u`, `u` the infinity norm
    - SGD: one

    Weight decay that is added to the gradient, other than SGD's, is added to H; decoupled decay is not. P is scaled by
    each group's threshold over the smallest one, so that one number decides with several learning rates or betas too; a
    group with learning rate zero takes no part.

    An eigenvector y belongs to the direction `P^-1/2 y` of the parameters. The optimizer's state is read now, H when a
    product is formed: measure before the next step.

    Args:
        operator: The Hessian or the Gauss-Newton matrix H, `(n, n)`, without the optimizer's weight decay.
        optimizer: An optimizer that `stability_threshold` takes, after one step at least.
        params: The parameters that were given to `evaluate`, in that order.

    Returns:
        The operator, which shares H's count of products.

    Raises:
        TypeError: The optimizer is of another kind, or `operator` is no `LinearOperator`.
        ValueError: The parameters are not the operator's, or the optimizer does not train one of them or has no state
            of it yet, or P is not positive, or weight decay alone is unstable.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> from newtonopt.curvature import preconditioned
        >>> theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> loss = lambda: (theta**2).sum()
        >>> optimizer = torch.optim.Adagrad([theta], lr=0.1)
        >>> loss().backward()
        >>> optimizer.step()
        >>> H = preconditioned(hessian(evaluate(loss, [theta])), optimizer, [theta])
        >>> H.dense().diagonal().round(decimals=6).tolist()  # the Hessian 2 I over the gradient's size, 2
        [1.0, 1.0]

    See Also:
        - `stability_threshold()`: what to compare the largest eigenvalue with.
        - `Preconditioned`: the same in a training run.
        - `docs/edge_of_stability.md`: a run that goes there.
    """
    check_operator(operator)
    weights, decay = preconditioner(optimizer, params)
    size = weights.shape[0]
    if operator.shape != (size, size):
        raise ValueError(
            f"params must be the parameters passed to evaluate, with {operator.shape[0]} entries in total, got "
            f"{size} entries."
        )
    return scaled(operator, weights, decay)


def scaled(operator: LinearOperator, weights: Tensor, decay: Tensor) -> LinearOperator:
    """Return `P^-1/2 (H + decay) P^-1/2` from what `preconditioner` returns."""
    shifted = operator.shift(decay) if bool(decay.any()) else operator
    return shifted.scale(weights)


def preconditioner(optimizer: Optimizer, params: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the diagonal of `P^-1/2` in `preconditioned`, and the weight decay that is added to H, each `(n,)`.

    Raises:
        TypeError: The optimizer is of another kind.
        ValueError: The optimizer does not train one of the parameters or has no state of it yet, or P is not positive,
            or weight decay alone is unstable.
    """
    kind, lowest = _kind_of(optimizer), stability_threshold(optimizer)
    if lowest <= 0.0:
        raise ValueError(
            f"optimizer must have a positive stability threshold, got {lowest:g}: weight decay alone makes it "
            "unstable. Lower lr or weight_decay."
        )
    trained = trained_parameters(params)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    weights, decays = [], []
    for p in trained:
        if id(p) not in groups:
            raise ValueError(f"params must belong to the optimizer, got one of shape {tuple(p.shape)} that does not.")
        group = groups[id(p)]
        own = _group_threshold(kind, group)
        weight = _inverse_root(_divisor(kind, group, optimizer.state.get(p, {}), p), p)
        weights.append(weight * math.sqrt(1.0 if own == lowest else lowest / own))
        added = 0.0 if kind is SGD or _is_decoupled(kind, group) else float(group["weight_decay"])
        decays.append(torch.full_like(weight, added))
    return flatten(weights, trained), flatten(decays, trained)


def adapts(optimizer: Optimizer, params: Iterable[Tensor]) -> bool:
    """Return whether an optimizer scales parameters differently, by its state or its groups, in a way that is known."""
    try:
        if _kind_of(optimizer) is SGD and len({_group_threshold(SGD, g) for g in optimizer.param_groups}) == 1:
            return False
        preconditioner(optimizer, params)
    except (TypeError, ValueError):  # an unknown optimizer, no step so far, or never stable
        return False
    return True


def _kind_of(optimizer: object) -> type[Optimizer]:
    """Return the class of torch's whose `step` the optimizer makes.

    Raises:
        TypeError: The class is not known.
    """
    for kind in _KINDS:
        # torch wraps the step of every class from which an optimizer is made.
        if isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step):
            return kind
    names = ", ".join(kind.__name__ for kind in _KINDS)
    raise TypeError(
        f"optimizer must have a known stability threshold, as {names} and subclasses that keep their step do, got a "
        f"value of type {type(optimizer).__name__}."
    )


def _is_decoupled(kind: type[Optimizer], group: dict[str, Any]) -> bool:
    """Return whether weight decay shrinks the parameters and leaves the gradient alone."""
    return kind is AdamW or bool(group.get("decoupled_weight_decay", False))


def _group_threshold(kind: type[Optimizer], group: dict[str, Any]) -> float:
    """Return the threshold of one parameter group.

    Raises:
        ValueError: The group maximizes, or its momentum or dampening damps no curvature at all.
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
    # `effective` is the learning rate of an equivalent heavy ball, z^2 - (1 + b - effective h) z + b = 0, whose root
    # reaches -1 at effective h = 2 + 2 b. Without momentum torch.optim.SGD has no buffer, hence no dampening.
    effective = rate * (1.0 - momentum if "betas" in group else 1.0 - dampening)
    if kind is NAdam or group.get("nesterov"):
        effective *= 1.0 + 2.0 * momentum
    if effective == 0.0:
        return math.inf
    reach = 2.0 - rate * decay if _is_decoupled(kind, group) else 2.0
    return (1.0 + momentum) * reach / effective - (decay if kind is SGD else 0.0)


def _momentum_name(kind: type[Optimizer]) -> str:
    return "momentum" if kind in (SGD, RMSprop) else "the first of betas"


def _inverse_root(divisor: Tensor, p: Tensor) -> Tensor:
    part = local_part(divisor)
    if not bool(((part > 0.0) & part.isfinite()).all()):
        raise ValueError(
            "optimizer must divide by positive and finite numbers, got other ones for a parameter of shape "
            f"{tuple(p.shape)}. Give it an eps above zero, and check that the gradients were finite."
        )
    return divisor.rsqrt()


def _divisor(kind: type[Optimizer], group: dict[str, Any], state: dict[str, Any], p: Tensor) -> Tensor:
    """Return what the last step of a parameter was divided by, in P's units."""
    if kind is SGD:
        return torch.ones_like(p.detach())
    name = "max_exp_avg_sq" if group.get("amsgrad") else _SECOND_MOMENT[kind]
    if name not in state or float(state["step"]) < 1.0:
        raise ValueError(
            f"optimizer must have a state ({name}) for each parameter, got none for a parameter of shape "
            f"{tuple(p.shape)}. Take a step with the optimizer first, and leave out parameters that get no gradient."
        )
    t, eps = float(state["step"]), float(group["eps"])
    moment: Tensor = state[name].detach().to(flat_dtype([p]))
    if kind is RMSprop:
        mean: Tensor = state["grad_avg"].detach() if group["centered"] else torch.zeros_like(moment)
        return moment.addcmul(mean, mean, value=-1.0).sqrt().add(eps)
    if kind is Adagrad:
        return moment.sqrt().add(eps).mul(1.0 + (t - 1.0) * float(group["lr_decay"]))
    beta, gamma = map(float, group["betas"])
    started, root = 1.0 - math.pow(beta, t), math.sqrt(1.0 - math.pow(gamma, t))
    if kind is NAdam:
        return moment.sqrt().div(root).add(eps).div(_nadam_momenta(group, beta, t, float(state["mu_product"])))
    if kind is Adamax:
        return moment.mul(started)
    if kind is RAdam:
        rectification = _rectification(gamma, t)
        if rectification is None:
            return torch.full_like(moment, started)
        return moment.sqrt().add(eps).mul(started / (rectification * root))
    return moment.sqrt().div(root).add(eps).mul(started)


def _nadam_momenta(group: dict[str, Any], beta: float, t: float, product: float) -> float:
    """Return the weight of NAdam's step t over the weight that it tends to, both at the root -1.

    At z = -1 the recursion (z - 1) (z - b) + k ((1 - mu) / (1 - M) (z - b) + nu / (1 - M nu) (1 - b) z) = 0, with the
    momenta mu now and nu next, their product M so far and k = lr h / p, weighs k by the numerator below; in the limit
    mu = nu = b and M = 0.
    """
    drop = float(group["momentum_decay"])
    now, following = (beta * (1.0 - 0.5 * math.pow(0.96, s * drop)) for s in (t, t + 1.0))
    gradient, mean = (1.0 - now) / (1.0 - product), following / (1.0 - product * following)
    return (gradient * (1.0 + beta) + mean * (1.0 - beta)) / ((1.0 - beta) * (1.0 + 2.0 * beta))


def _rectification(gamma: float, t: float) -> float | None:
    """Return RAdam's rectification (Liu et al. 2020, alg. 2); None while torch applies none.

    This differs from the paper in the limit for the variance's degrees of freedom: 5, as in torch, in place of 4.
    """
    most = 2.0 / (1.0 - gamma) - 1.0
    degrees = most - 2.0 * t * math.pow(gamma, t) / (1.0 - math.pow(gamma, t))
    if degrees <= 5.0:
        return None
    return math.sqrt((degrees - 4.0) * (degrees - 2.0) * most / ((most - 4.0) * (most - 2.0) * degrees))
