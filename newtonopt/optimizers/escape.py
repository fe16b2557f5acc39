"""Steps away from saddles and maxima, where the gradient says nothing.

A search for negative curvature is made where the gradient is zero or below the tolerance, and where steps have stalled:
the loss, in its precision, can no longer tell their decrease. A run towards a minimum stalls too, so that a search
which finds nothing is remembered with its loss, and the next one waits for twice as many stalled steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from newtonopt.optimizers.model import Line, Proposal, QuadraticModel, Shorter
from newtonopt.optimizers.state import S
from newtonopt.optimizers.trials import Outcome
from newtonopt.solvers.lanczos import negative_curvature

STALLED = "steps no longer change the loss"
"""Why negative curvature is searched for where the gradient is not zero, in words."""

# Losses that differ by less, relative to their size, are taken for the same stationary point.
_SAME = 1e-6


def critical(gradient: Tensor, norm: float, tolerance: float) -> str | None:
    """Return in words why a gradient of this norm counts as zero, or None if it does not."""
    # Where the square underflows, no solver can tell the gradient from zero.
    if norm <= torch.finfo(gradient.dtype).tiny ** 0.5:
        dtype = str(gradient.dtype).removeprefix("torch.")
        underflows = f"the gradient's square underflows to zero in {dtype}: multiply the loss by a constant"
        return underflows if bool(gradient.any()) else "the gradient is zero"
    if float(gradient.abs().max()) <= tolerance:
        return "no entry of the gradient is above tolerance_gradient"
    return None


def is_settled(state: S, loss: float, norm: float) -> bool:
    """Return whether a search found nothing at this very point."""
    return (loss, norm) == (state.settled_loss, state.settled_norm)


def is_stalled(state: S, loss: float) -> bool:
    """Return whether a search is due: steps stalled often enough, away from where the last one found nothing."""
    if state.stalls < state.patience:
        return False
    settled = state.settled_loss
    return not (math.isfinite(settled) and abs(loss - settled) <= _SAME * abs(settled))


def settled(state: S, loss: float, norm: float) -> S:
    """Return the state that remembers that a search found nothing here."""
    return replace(state, settled_loss=loss, settled_norm=norm, stalls=0, patience=2 * state.patience)


def progressed(state: S, model: QuadraticModel, outcome: Outcome, leaves: bool, norm: float) -> S:
    """Return the state that counts steps whose predicted or actual decrease is below the rounding of the loss.

    Args:
        state: The optimizer's state.
        model: The model at the step's start.
        outcome: Outcome of the step.
        leaves: Whether the step was one along negative curvature that a search found.
        norm: Norm of the gradient at the step's start.
    """
    tells = min(abs(outcome.predicted), abs(model.loss - outcome.loss)) > 10 * model.eps * abs(model.loss)
    if not leaves:
        return replace(state, stalls=0 if tells else state.stalls + 1)
    if outcome.accepted and tells:
        return replace(state, stalls=0, patience=1)
    # An accepted one followed negative curvature so small that it changed nothing.
    return settled(state, model.loss, norm) if outcome.accepted else state


def leave(
    model: QuadraticModel, state: S, place: str, length_along: Callable[[float, float, float], float]
) -> Proposal[S]:
    """Propose a step along negative curvature, away from a point where the gradient is zero or nearly so.

    Args:
        model: The model at the point.
        state: The optimizer's state.
        place: Description of the point.
        length_along: From slope and curvature along a unit vector, and the control, to how far to go.

    Returns:
        The proposal; without a step if the curvature is nowhere negative, so that the point is a minimum.
    """
    A = model.curvature
    found = None if A.psd else negative_curvature(A, model.gradient)
    if found is None:
        more = "" if A.psd else ", and no negative curvature was found"
        return Proposal([], state, place + more, A.products, A.products)
    direction, bend = found
    slope = float(model.gradient @ direction)
    # The direction has two signs: take the one that leads downhill.
    if slope > 0:
        direction, slope = -direction, -slope
    length = length_along(slope, bend, state.control)
    first = model.scaled(Line(direction, slope, bend).at(length))
    away: _Away[S] = _Away(model.through(first), slope, bend, length, place, A.products, length_along)
    return away.proposal(state, length)


@dataclass(frozen=True, eq=False)
class _Away(Shorter[S], Generic[S]):
    """Steps along one direction of negative curvature.

    Attributes:
        line: The model through the longest of them, learning rates applied.
        slope: Slope along the unit vector.
        bend: Curvature along the unit vector.
        longest: Length of the longest step before learning rates were applied.
        place: Description of the point.
        products: Products that the search took.
        length_along: As for `leave`.
    """

    line: Line
    slope: float
    bend: float
    longest: float
    place: str
    products: int
    length_along: Callable[[float, float, float], float]

    def at(self, state: S) -> Proposal[S]:
        """Return the step as long as the state's control lets it be."""
        return self.proposal(state, self.length_along(self.slope, self.bend, state.control))

    def proposal(self, state: S, length: float) -> Proposal[S]:
        """Return the step of this length."""
        return Proposal(
            [self.line.at(length / self.longest)],
            state,
            f"{self.place}: left along negative curvature",
            self.products,
            self.products,
            length=length,
            follows_negative_curvature=True,
            leaves=True,
            shorter=self,
        )
