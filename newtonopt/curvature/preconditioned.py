"""The Hessian as an adaptive optimizer sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from newtonopt.curvature.probes import check_operator
from newtonopt.curvature.stability import group_threshold, is_decoupled, kind_of, stability_threshold
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.vectors.flat import flat_dtype, flatten, trained_parameters
from newtonopt.vectors.sharded import local_part

# The state that P is made of.
_SECOND_MOMENT = {
    RMSprop: "square_avg",
    Adagrad: "sum",
    AdamW: "exp_avg_sq",
    Adam: "exp_avg_sq",
    NAdam: "exp_avg_sq",
    RAdam: "exp_avg_sq",
    Adamax: "exp_inf",
}


def preconditioned(operator: LinearOperator, optimizer: Optimizer, params: Iterable[Tensor]) -> LinearOperator:
    """`P^-1/2 H P^-1/2`, P the diagonal by which the optimizer's last step divided.

    Its largest eigenvalue, against `stability_threshold(optimizer)`, decides whether the iteration with this P is
    stable: training with Adam settles where it is 38 / lr (Cohen et al. 2022, arXiv 2207.14484). After t steps, with
    betas b and c, second moment v and eps e:

    - Adam, AdamW: (1 - b^t) (sqrt(v / (1 - c^t)) + e), v the maximum so far with `amsgrad`
    - RMSprop: sqrt(v) + e, v minus the squared mean gradient with `centered`
    - Adagrad: (1 + (t - 1) lr_decay) (sqrt(v) + e), v the sum
    - NAdam: (sqrt(v / (1 - c^t)) + e) / m, where m tends to one: the momenta of this step against the last ones
    - RAdam: (1 - b^t) (sqrt(v) + e) / (r sqrt(1 - c^t)) with the rectification r, 1 - b^t before that sets in
    - Adamax: (1 - b^t) u, u the infinity norm
    - SGD: one

    Weight decay that is added to the gradient, other than SGD's, is added to H; decoupled decay is not. P is scaled by
    each group's threshold over the smallest one, so that with several learning rates or betas one number decides too;
    a group with learning rate zero takes no part.

    An eigenvector y belongs to the direction `P^-1/2 y` of the parameters. H is read when a product is formed, the
    state now: measure before the next step.

    Args:
        operator: The Hessian or the Gauss-Newton matrix H, `(n, n)`, without the optimizer's weight decay.
        optimizer: As `stability_threshold` takes it, after one step at least.
        params: Those that were given to `evaluate`, in that order.

    Returns:
        The operator, which shares H's count of products.

    Raises:
        TypeError: Another optimizer, or `operator` is no `LinearOperator`.
        ValueError: The parameters are not the operator's, or the optimizer does not train one of them or has no state
            of it yet, or P is not positive, or weight decay alone is unstable.
    """
    check_operator(operator)
    kind, lowest = kind_of(optimizer), stability_threshold(optimizer)
    if lowest <= 0.0:
        raise ValueError(
            f"optimizer must have a positive stability threshold, got {lowest:g}: weight decay alone is unstable. "
            "Lower lr or weight_decay."
        )
    trained = trained_parameters(params)
    size = sum(p.numel() for p in trained)
    if operator.shape != (size, size):
        raise ValueError(
            f"params must be those given to evaluate, of {operator.shape[0]} entries together, got {size} entries."
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    weights, decays = [], []
    for p in trained:
        if id(p) not in groups:
            raise ValueError(f"params must be among the optimizer's, got one of shape {tuple(p.shape)} that is not.")
        group = groups[id(p)]
        own = group_threshold(kind, group)
        weight = _inverse_root(_divisor(kind, group, optimizer.state.get(p, {}), p), p)
        weights.append(weight * math.sqrt(1.0 if own == lowest else lowest / own))
        added = 0.0 if kind is SGD or is_decoupled(kind, group) else float(group["weight_decay"])
        decays.append(torch.full_like(weight, added))
    decay = flatten(decays, trained)
    shifted = operator.shift(decay) if bool(decay.any()) else operator
    return shifted.scale(flatten(weights, trained))


def _inverse_root(divisor: Tensor, p: Tensor) -> Tensor:
    part = local_part(divisor)
    if not bool(((part > 0.0) & part.isfinite()).all()):
        raise ValueError(
            "optimizer must divide by positive and finite numbers, got others for a parameter of shape "
            f"{tuple(p.shape)}. Give it an eps above zero, and check that the gradients were finite."
        )
    return divisor.rsqrt()


def _divisor(kind: type[Optimizer], group: dict[str, Any], state: dict[str, Any], p: Tensor) -> Tensor:
    """What the step of the parameter was divided by, in P's units."""
    if kind is SGD:
        return torch.ones_like(p.detach())
    name = "max_exp_avg_sq" if group.get("amsgrad") else _SECOND_MOMENT[kind]
    if name not in state or float(state["step"]) < 1.0:
        raise ValueError(
            f"optimizer must have a state ({name}) of each parameter, got none of one of shape {tuple(p.shape)}. Take "
            "a step with it first, and leave out parameters that get no gradient."
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
    """The step of this t against that of its last momenta, both at the root -1.

    There the recursion (z - 1) (z - b) + k ((1 - mu) / (1 - M) (z - b) + nu / (1 - M nu) (1 - b) z) = 0, with momenta
    mu now and nu next, M their product so far and k = lr h / p, weighs k by what this divides.
    """
    drop = float(group["momentum_decay"])
    now, following = (beta * (1.0 - 0.5 * math.pow(0.96, s * drop)) for s in (t, t + 1.0))
    gradient, mean = (1.0 - now) / (1.0 - product), following / (1.0 - product * following)
    return (gradient * (1.0 + beta) + mean * (1.0 - beta)) / ((1.0 - beta) * (1.0 + 2.0 * beta))


def _rectification(gamma: float, t: float) -> float | None:
    """RAdam's, with the variance's degrees of freedom at most 5 none (Liu et al. 2020, alg. 2, as torch has it)."""
    most = 2.0 / (1.0 - gamma) - 1.0
    degrees = most - 2.0 * t * math.pow(gamma, t) / (1.0 - math.pow(gamma, t))
    if degrees <= 5.0:
        return None
    return math.sqrt((degrees - 4.0) * (degrees - 2.0) * most / ((most - 4.0) * (most - 2.0) * degrees))
