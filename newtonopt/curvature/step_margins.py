"""`step_margin`: how far an optimizer's own step stays below the step at which the loss would rise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from newtonopt.checks import check_closure, check_flag, check_instance
from newtonopt.closure.isolation import Isolation
from newtonopt.closure.objective import Objective, Runs
from newtonopt.curvature.showing import as_table, as_text, written
from newtonopt.vectors.flat import flatten, trained_parameters
from newtonopt.vectors.scaling import dot

# The last relative move of the search for the crossing, whose error is far smaller then; the most losses that it may
# take beside the one at the end of the step, as for Kalra et al.; and the steps up to which a crossing is looked for.
_TOLERANCE, _MOST, _FARTHEST = 0.03, 5, 256.0
# One move of the search is at most this long, as a factor.
_FACTOR = 16.0
# Up to this margin a step that has overshot is called normal at the edge of stability.
_FAR = 2.0


@dataclass(frozen=True, repr=False)
class StepMargin:
    """The loss along an optimizer's last step d, with `phi(s) = L(theta + s d) - L(theta)`.

    Attributes:
        loss: The loss `L(theta)` before the step.
        slope: The derivative `g'd` of the loss along the step; below zero for a step downhill.
        rise: The change `phi(1)` of the loss; below zero where the loss has fallen.
        critical_step: The s at which the loss rises above `L(theta)`, in steps; None: not looked for, or too far.
        losses: Losses computed, one forward pass each.

    Example:
        >>> from newtonopt.curvature import StepMargin
        >>> StepMargin(loss=1.0, slope=-0.25, rise=-0.125, critical_step=None, losses=1).margin
        0.5

    See Also:
        - `step_margin()`: computes it.
        - `RelativeSharpness`: critical steps for two losses.
        - `docs/edge_of_stability.md`: where margins hover around one.
    """

    loss: float
    slope: float
    rise: float
    critical_step: float | None
    losses: int

    def __repr__(self) -> str:
        return as_text(self, {"margin": self.margin})

    def _repr_html_(self) -> str:
        return as_table(self, {"margin": self.margin}, [self.in_words()])

    @property
    def margin(self) -> float | None:
        """Return `1 - phi(1) / g'd`, which is `d'Hd / (2 |g'd|)` for a quadratic loss; None where that says nothing.

        It is 0 where the loss falls as its gradient foretells, 1/2 at the lowest point along the step, and 1 or more
        where the step has overshot, so that the loss has not fallen. None: the step does not go downhill, or the loss
        after it is not finite.
        """
        if not self.slope < 0.0 or not math.isfinite(self.rise / self.slope):
            return None
        return 1.0 - self.rise / self.slope

    def in_words(self) -> str:
        """Return a sentence that says what the margin means."""
        margin = self.margin
        if margin is None and self.slope < 0.0:
            return "The last step overshot: on its own batch it ended where the loss is not finite."
        if margin is None:
            return "The last step did not go downhill on its own batch, as happens with momentum, and has no margin."
        if margin > _FAR:
            # The crossing of a quadratic loss is 1 / margin.
            crossing, about = (1.0 / margin, "about ") if self.critical_step is None else (self.critical_step, "")
            return (
                f"The last step overshot far (step margin {written(margin, 3)}): on its own batch the loss would fall "
                f"only for steps shorter than {about}{written(crossing, 2)} of it. Divide the learning rate by "
                f"{written(1.0 / crossing, 2)} or more."
            )
        if margin >= 1.0:
            return (
                f"The last step overshot (step margin {written(margin, 3)}): on its own batch the loss has not "
                "fallen. Around 1 is normal at the edge of stability; lower the learning rate if it stays above or the "
                "loss spikes."
            )
        kept = f"The last step kept its margin ({written(margin, 3)}, below 1): on its own batch the loss has fallen."
        if self.critical_step is None:
            return kept
        return f"{kept} The loss would rise from {written(self.critical_step, 3)} steps on."


def step_margin(optimizer: Optimizer, closure: Callable[[], Any], critical: bool = False) -> StepMargin:
    """Take a step of any optimizer, `optimizer.step(closure)`, and return how near it came to raising the loss.

    Training is the same to the bit as with `optimizer.step(closure)`. Two further forward passes are run, at both ends
    of the step, on the closure's own batch and with its own random numbers, and a backward pass at its start; they
    leave no trace. No second derivative is taken.

    Below the edge of stability the margin tells nothing of the largest eigenvalue of the Hessian: only the curvature
    along the step counts. On another batch than the step's it has no meaning.

    Args:
        optimizer: The optimizer that takes the step.
        closure: Computes the loss and calls `backward`, as for `torch.optim.LBFGS`. It, and hooks on the
            parameters, may change gradients. It may clamp parameters, which ends the step where they are clamped to.
        critical: Whether to look for the critical step too, for up to five more forward passes. Default False.

    Returns:
        The loss along the step.

    Raises:
        TypeError: `optimizer` or `closure` is of another kind.
        ValueError: `critical` is neither True nor False, or the optimizer has no parameter that requires a gradient.
        RuntimeError: The optimizer does not run the closure, or as `evaluate`.

    Example:
        Gradient descent on `w^2` with a learning rate of 1/4 covers half the way to the minimum.

        >>> import torch
        >>> from newtonopt.curvature import step_margin
        >>> w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        >>> sgd = torch.optim.SGD([w], lr=0.25)
        >>> def closure():
        ...     sgd.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> found = step_margin(sgd, closure, critical=True)
        >>> found.margin, found.critical_step
        (0.25, 4.0)

    See Also:
        - `StepMargin`: the result.
        - `StepMarginMonitor`: the same in a Lightning run.
        - `stability_threshold()`: the threshold for the whole spectrum.
        - `docs/reference/mathematics.md`: margin and critical sharpness.
    """
    check_instance(
        "optimizer", optimizer, Optimizer, "a torch.optim.Optimizer", "Write torch.optim.SGD(params, lr=0.1)."
    )
    check_closure(closure)
    check_flag("critical", critical)
    params = trained_parameters([p for group in optimizer.param_groups for p in group["params"]])
    isolation = Isolation(closure, params)
    isolation.begin()
    first: list[Tensor] = []

    def watched() -> Any:
        returned = closure()
        if not first:
            with torch.no_grad():
                first.append(flatten(params, params).clone())
        return returned

    optimizer.step(watched)
    if not first:
        raise RuntimeError(
            "The optimizer has not run the closure, so there is no step to measure. Pass one that calls it."
        )
    before, runs = first[0], Runs(isolation)
    # "streamed": no graph is kept.
    objective = Objective(closure, params, products="streamed", runs=runs)
    after = objective.point
    try:
        # `.grad` may hold more than the gradient of the closure's loss, or less.
        objective.return_to(before)
        with _without_hooks(params):
            evaluation = objective.evaluate()
        objective.return_to(after)
        end = objective.loss_at(torch.zeros_like(after))
        if runs.moves:
            # A closure that clamps parameters ends the step where it clamps them to.
            objective.move(torch.zeros_like(after))
        step = objective.point - before
    finally:
        objective.return_to(after)
    start, rest = float(evaluation.loss), before + step - after

    def rise(s: float) -> float:
        return (end if s == 1.0 else objective.loss_at((s - 1.0) * step + rest)) - start

    return along(rise, dot(evaluation.gradient, step), start, critical)


@contextmanager
def _without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Take away the parameters' hooks on their gradients, which may clamp or centralise them."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in params if p._backward_hooks]
    try:
        for own, _ in hooks:
            own.clear()
        yield
    finally:
        for own, before in hooks:
            own.update(before)


def along(rise: Callable[[float], float], slope: float, loss: float, critical: bool) -> StepMargin:
    """Return the margin of a step.

    Args:
        rise: Returns phi(s), by one forward pass.
        slope: The derivative phi'(0).
        loss: The loss before the step.
        critical: Whether to look for the critical step.
    """
    count = 0

    def counted(s: float) -> float:
        nonlocal count
        count += 1
        return rise(s)

    at_end = counted(1.0)
    crossing = critical_step(counted, slope, at_end) if critical and slope < 0.0 else None
    return StepMargin(loss, slope, at_end, crossing, count)


def critical_step(rise: Callable[[float], float], slope: float, at_end: float) -> float | None:
    """Return the s > 0 where phi(s) crosses zero; None if it is farther than 256 or takes more than five losses.

    The secant method on phi(s) / s, which is `slope` at zero and a straight line for a quadratic loss, so that two
    values find its crossing and a third one confirms it.

    Args:
        rise: Returns phi(s), by one forward pass.
        slope: The derivative phi'(0), below zero.
        at_end: phi(1).
    """
    low, high = 0.0, math.inf
    before, here = (0.0, slope), (1.0, at_end)
    for count in range(_MOST + 1):
        low, high = (here[0], high) if here[1] < 0.0 else (low, here[0])
        place = _secant(before, here)
        if abs(place - here[0]) <= _TOLERANCE * here[0]:
            return place
        if low >= _FARTHEST or count == _MOST:
            return None
        least, most = max(low, here[0] / _FACTOR), min(high, here[0] * _FACTOR)
        if not least < place < most:
            place = math.sqrt(least * most) if high < math.inf else most
        before, here = here, (place, rise(place) / place)
    return None


def _secant(before: tuple[float, float], here: tuple[float, float]) -> float:
    """Return where the line through two points crosses zero; NaN where it leads nowhere."""
    (s, q), (t, r) = before, here
    return t - r * (t - s) / (r - q) if r != q and math.isfinite(r - q) else math.nan
