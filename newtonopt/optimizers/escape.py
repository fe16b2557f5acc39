"""Away from saddles and maxima, where the gradient says nothing.

A search for negative curvature is made where the gradient is zero or below the tolerance, and where steps have stalled:
the loss, in its precision, can no longer tell their decrease. A run towards a minimum stalls too, so that a search
which finds nothing is remembered with its loss, and the next one waits for twice as many stalled steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.rates import ray, scaled
from newtonopt.optimizers.trials import Outcome, Proposal
from newtonopt.solvers.lanczos import negative_curvature
from newtonopt.solvers.solution import Iterate

STALLED = "steps no longer change the loss"
"""In words, why negative curvature is searched for where the gradient is not zero."""

# A loss that differs by a smaller part from that of a fruitless search is of the same stationary point.
_SAME = 1e-6


def is_settled(memory: dict[str, Any], loss: float, norm: float) -> bool:
    """Whether a search found nothing at this very point."""
    return (loss, norm) == (memory.get("settled_loss"), memory.get("settled_norm"))


def is_stalled(memory: dict[str, Any], loss: float) -> bool:
    """Whether a search is due: steps stalled often enough, and at another point than the last fruitless search."""
    if memory.get("stalls", 0) < memory.get("patience", 1):
        return False
    settled = memory.get("settled_loss", math.inf)
    return not (math.isfinite(settled) and abs(loss - settled) <= _SAME * abs(settled))


def settle(memory: dict[str, Any], loss: float, norm: float) -> None:
    """Remember that a search found nothing here."""
    memory.update(settled_loss=loss, settled_norm=norm, stalls=0, patience=2 * memory["patience"])


def note_progress(memory: dict[str, Any], outcome: Outcome, leaves: bool, loss: float, norm: float, eps: float) -> None:
    """Count steps whose predicted or actual decrease is below the rounding of the loss.

    Args:
        memory: The optimizer's state.
        outcome: The outcome of the step.
        leaves: Whether the step was one along negative curvature that a search found.
        loss: At the step's start.
        norm: The gradient's, there.
        eps: The eps of the dtype in which the loss was computed.
    """
    tells = min(abs(outcome.predicted), abs(loss - outcome.loss)) > 10 * eps * abs(loss)
    if not leaves:
        memory["stalls"] = 0 if tells else memory.get("stalls", 0) + 1
    elif outcome.accepted and tells:
        memory.update(stalls=0, patience=1)
    elif outcome.accepted:
        # Negative curvature so small that following it changes nothing.
        settle(memory, loss, norm)


def critical(gradient: Tensor, norm: float, tolerance: float) -> str:
    """In words, why a gradient of this norm counts as zero; empty if it does not."""
    # Where the square underflows, no solver can tell the gradient from zero.
    if norm <= torch.finfo(gradient.dtype).tiny ** 0.5:
        dtype = str(gradient.dtype).removeprefix("torch.")
        underflows = f"the gradient's square is zero in {dtype}, not the gradient: multiply the loss by a constant"
        return underflows if bool(gradient.any()) else "the gradient is zero"
    if float(gradient.abs().max()) <= tolerance:
        return "no entry of the gradient is above tolerance_gradient"
    return ""


def leave(
    A: LinearOperator,
    gradient: Tensor,
    rates: float | Tensor,
    place: str,
    length_along: Callable[[float, float], float],
) -> Proposal:
    """A step along negative curvature away from a point where the gradient is zero or nearly so.

    Args:
        A: The curvature there.
        gradient: `(n,)`.
        rates: The learning rate, one number or one for each entry.
        place: In words, what the point is.
        length_along: From slope and curvature along a unit vector to how far to go, under the present control.

    Returns:
        The proposal; without a step if the curvature is nowhere negative, so that the point is a minimum.
    """
    found = None if A.psd else negative_curvature(A, gradient)
    if found is None:
        more = "" if A.psd else ", and no negative curvature was found"
        return Proposal([], [], A.products, A.products, place + more)
    direction, bend = found
    slope = float(gradient @ direction)
    if slope > 0:
        direction, slope = -direction, -slope
    length = length_along(slope, bend)
    first = scaled(Iterate(length * direction, -(length * slope + 0.5 * length * length * bend)), gradient, rates, A)
    products = A.products

    def propose(length: float) -> Proposal:
        there = ray(first, gradient, length / longest)
        return Proposal(
            [there.step],
            [there.decrease],
            products,
            products,
            f"{place}: left along negative curvature",
            length=length,
            follows_negative_curvature=True,
            leaves=True,
            shrink=lambda _: propose(length_along(slope, bend)),
        )

    longest = length
    return propose(length)
