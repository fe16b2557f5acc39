"""Central differences of a closure's gradient along one direction, and how far they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newtonopt._flat import flatten
from newtonopt._shards import is_sharded
from newtonopt.evaluation import Evaluation, source_of


@dataclass(frozen=True)
class Difference:
    """Differences of gradient and loss along a unit vector `w`.

    Attributes:
        product: `(g(theta + h w) - g(theta - h w)) / 2h`, `(n,)`.
        jump: `(g(theta + h w) - 2 g(theta) + g(theta - h w)) / h`, `(n,)`: proportional to `h` where the gradient is
            smooth, and constant where it has a kink at `theta`.
        slope: `(f(theta + h w) - f(theta - h w)) / 2h`; NaN for sharded parameters.
        length: `h`.
    """

    product: Tensor
    jump: Tensor
    slope: float
    length: float


def displacement(params: Sequence[Tensor]) -> float:
    """Return how far from the parameters central differences look at first: `h |v|`.

    Truncation grows as `h^2` and rounding as `eps / h`, so that `h` belongs near `eps^(1/3)` (Nocedal & Wright 2006,
    sec. 8.1), in proportion to the size of the parameters. Measured on some hundred small and large networks, the
    shorter `eps^0.4` with the root of their norm is as good on smooth ones and better where there are kinks: a step in
    proportion to the norm, which grows with the number of parameters, is 10 to 100 times too long on large ones.
    Where the norm, or the parameters' root mean square, is on the other side of one, in proportion to it.

    Raises:
        RuntimeError: The parameters are bfloat16.
    """
    if any(p.dtype == torch.bfloat16 for p in params):
        raise RuntimeError(
            "bfloat16 parameters are too coarse for finite differences: keep the weights in float32, or choose "
            'products="cached" or "streamed".'
        )
    point = flatten(params, params).detach()
    norm = float(point.norm()) or 1.0
    eps: float = max(torch.finfo(p.dtype).eps for p in params)
    usual = norm if norm < 1.0 else math.sqrt(norm * max(1.0, norm / math.sqrt(point.numel())))
    return float(eps**0.4) * usual


def lengths_from(start: float, count: int) -> list[float]:
    """Return lengths to try, the longest first, each a quarter of the one before."""
    return [start / 4.0**k for k in range(count)]


def difference(evaluation: Evaluation, w: Tensor, length: float) -> Difference:
    """Return the differences along `w`, `(n,)`, for two gradients."""
    evaluation.check_unchanged()
    (above, high), (below, low) = (gradient_at(evaluation, sign * length * w) for sign in (1.0, -1.0))
    middle = evaluation.slope
    jump = (above - middle + (below - middle)) / length
    return Difference((above - below) / (2 * length), jump, (high - low) / (2 * length), length)


def gradient_at(evaluation: Evaluation, step: Tensor) -> tuple[Tensor, float]:
    """Return the mean gradient and loss over the processes at a step from the point."""
    source, like = source_of(evaluation), evaluation.slope
    sharded = is_sharded(evaluation.params)

    def compute() -> Tensor:
        gradient = torch.zeros_like(like)
        loss = source.add_gradient(gradient, step)
        return gradient if sharded else torch.cat([gradient, loss.reshape(1).to(gradient)])

    if sharded:
        return source.mean(compute), math.nan
    both = source.mean(compute, like.new_empty(like.numel() + 1))
    return both[:-1], float(both[-1])
