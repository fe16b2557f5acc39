"""Away from saddles and maxima, where the gradient says nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newtonopt.linear_operator import LinearOperator
from newtonopt.optimizers.rates import ray, scaled
from newtonopt.optimizers.trials import Proposal
from newtonopt.solvers.negative_curvature import negative_curvature
from newtonopt.solvers.solution import Iterate


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
            shrink=lambda _: propose(length_along(slope, bend)),
        )

    longest = length
    return propose(length)
