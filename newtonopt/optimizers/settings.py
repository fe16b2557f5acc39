"""Checks of the settings that users give, and what they mean under other names."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from newtonopt.checks import (
    check_choice,
    check_not_negative,
    check_positive,
    check_whole,
    instead,
    shown,
    warn,
)
from newtonopt.closure.evaluation import check_products

# Settings that a parameter group may have of its own.
PER_GROUP = ("lr", "weight_decay")
# The replacement for each setting that other optimizers have: a setting here, or a sentence.
_FIRST_ORDER = "Leave it out: a Newton step takes the curvature instead."
_KERNELS = "Leave it out: it chooses among the implementations of torch's own optimizers."
_CONTROLS = (
    "Steps are bounded by damping=... in HessianFree, LevenbergMarquardt and DampedNewton, by radius=... in "
    "TrustRegionNewton, by sigma=... in CubicNewton, and by a line search in NewtonCG."
)
ELSEWHERE = {
    **dict.fromkeys(("momentum", "nesterov", "dampening", "betas", "beta1", "beta2", "alpha", "rho"), _FIRST_ORDER),
    **dict.fromkeys(("eps", "amsgrad", "centered", "lr_decay", "momentum_decay"), _FIRST_ORDER),
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), _KERNELS),
    "history_size": "Leave it out: products with the curvature take the place of a history of gradients.",
    "maximize": "Leave it out, and let the closure return the negative loss.",
    "max_iter": "Write steps_per_call=... for the Newton steps of one call, which torch.optim.LBFGS names so, or "
    "max_iterations=... for the iterations of the solver within one step.",
    "max_eval": "max_trials",
    "tolerance_grad": "tolerance_gradient",
    "tolerance_change": "tolerance_step",
    "line_search_fn": "line_search",
    "learning_rate": "lr",
    **dict.fromkeys(("damping", "radius", "sigma"), _CONTROLS),
    **dict.fromkeys(("max_damping", "min_damping", "max_radius", "min_radius", "max_sigma", "min_sigma"), _CONTROLS),
    "damping_factor": "HessianFree and DampedNewton have it.",
    "subproblem": "TrustRegionNewton and CubicNewton have it.",
    "line_search": "NewtonCG has it.",
    "max_iterations": "All but DampedNewton and LevenbergMarquardt, which solve directly, have it.",
    "curvature_closure": "Give it to the step: optimizer.step(closure, curvature_closure=...).",
    **dict.fromkeys(("blocks", "eigenvalues"), "DampedNewton has it."),
    **dict.fromkeys(("preconditioner", "rank", "refresh_every"), "HessianFree and NewtonCG have it."),
    "seed": "HessianFree, LevenbergMarquardt and NewtonCG have it.",
    **dict.fromkeys(("solve", "scaling", "acceleration", "rows"), "LevenbergMarquardt has it."),
    **dict.fromkeys(("warm_start", "progress_tolerance"), "HessianFree has it."),
}
# Rounding of schedules: LinearLR, for one, goes from 1 to -2e-17 where it should end at zero.
_ROUNDING = 1e-12
# At a rate of 0.1 it takes 22 Newton steps to reduce the error tenfold where one whole step solves a quadratic.
_SMALL_RATE = 0.1


def check_choices(settings: dict[str, Any], **allowed: Sequence[Any]) -> None:
    """Raise a ValueError if a setting is none of the values allowed for it."""
    for name, values in allowed.items():
        check_choice(name, settings[name], values)


def plain(settings: dict[str, Any], *, keep_rate: bool = False) -> dict[str, Any]:
    """Return the settings with scalars of NumPy's and tensors of one entry as Python numbers, exactly.

    `torch.load` takes only Python numbers out of a checkpoint.

    Args:
        settings: Settings by name, and perhaps `params`.
        keep_rate: Whether to leave an `lr` that is a tensor one, which schedulers of torch's fill in place.
    """

    def number(name: str, value: Any) -> Any:
        is_tensor = isinstance(value, Tensor) and value.numel() == 1 and not (keep_rate and name == "lr")
        return value.item() if is_tensor or isinstance(value, np.generic) else value

    return {name: number(name, value) for name, value in settings.items()}


def check_settings(settings: dict[str, Any], control: str | None) -> None:
    """Raise a ValueError if a setting that all optimizers share, or one of the control's, is out of its range."""
    check_products(settings["products"])
    check_choices(settings, curvature=("gauss_newton", "hessian"))
    for name in (*PER_GROUP, "tolerance_gradient", "tolerance_step"):
        check_not_negative(name, settings[name])
    check_whole("steps_per_call", settings["steps_per_call"], 1)
    if control is None:
        return
    least, most = f"min_{control}", f"max_{control}"
    for name in (control, least, most):
        check_positive(name, settings[name])
    value, low, high = settings[control], settings[least], settings[most]
    if not low <= high:
        raise ValueError(f"{least} must be at most {most}, {high!r}, got {low!r}.")
    if not low <= value <= high:
        raise ValueError(f"{control} must be between {least}, {low!r}, and {most}, {high!r}, got {value!r}.")


def check_names(group: dict[str, Any], names: Sequence[str]) -> None:
    """Raise a TypeError if an entry of a parameter group means a setting under another name.

    Other entries are left alone, as torch leaves them: schedulers and users keep what they like in a group.
    """
    for name in group:
        if name not in names and (remedy := instead(name, names, ELSEWHERE)) and not remedy.startswith("Its"):
            raise TypeError(f"A parameter group takes no {name}, got {shown(group[name])}. {remedy}")


def check_group(group: dict[str, Any], shared: dict[str, Any]) -> None:
    """Raise a ValueError if a parameter group has its own value of a setting that all groups share."""
    for name, value in shared.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"{name} must be the same in all parameter groups, {value!r} here, because a step couples them, got "
                f"{shown(group[name])}. Give a group only lr and weight_decay of its own."
            )


def check_groups(
    groups: Sequence[dict[str, Any]], names: Container[str], check: Callable[[dict[str, Any]], None]
) -> None:
    """Check the settings in the parameter groups, which schedulers and users change between steps.

    Args:
        groups: The parameter groups.
        names: Names of the settings.
        check: The optimizer's own check.

    Raises:
        ValueError: One is out of its range, or differs between groups and is the whole optimizer's.
    """
    shared = shared_settings(groups[0], names)
    for group in groups:
        check(plain({**group, "lr": rate_of(group)}))
        check_group(group, shared)


def warn_of_small_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Warn if no learning rate given is near 1, as first-order optimizers are given.

    Called when an optimizer is made: schedulers, which come later, may pass through small values. A rate of zero, which
    keeps a group where it is, does not count.
    """
    rates = [float(rate) for rate in (rate_of(group) for group in groups if group["params"]) if float(rate) > 0.0]
    if rates and max(rates) < _SMALL_RATE:
        warn(
            f"lr={max(rates):g} multiplies each Newton step by {max(rates):.2g}. Leave lr at 1, because the curvature "
            "gives the step its length; a scheduler may lower it later."
        )


def shared_settings(settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Return the settings of these names that no parameter group may have of its own."""
    return {name: value for name, value in settings.items() if name in names and name not in PER_GROUP}


def rate_of(group: dict[str, Any]) -> Any:
    """Return a group's learning rate: zero where a schedule that ends there has ended below it by rounding."""
    lr = float(group["lr"]) if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1 else group["lr"]
    return 0.0 if isinstance(lr, float) and -_ROUNDING < lr < 0.0 else lr
