"""Vectors to multiply by, and what all measurements of a whole spectrum check and count alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from newtonopt.checks import check_instance
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.vectors.sharded import Sharded

# A standard deviation from fewer samples is off by a quarter and more, and a test that stops on it stops too soon.
LEAST_SAMPLES = 10


def check_operator(operator: LinearOperator) -> int:
    """The size n of a square operator.

    Raises:
        TypeError: It is no `LinearOperator`.
        ValueError: It is not square, or has no row.
    """
    check_instance("operator", operator, LinearOperator, "a LinearOperator", "Write hessian(evaluation), for example.")
    rows, columns = operator.shape
    if rows != columns or rows < 1:
        raise ValueError(f"operator must be square with at least one row, got shape {tuple(operator.shape)}.")
    return rows


def check_finite(value: float, products: int) -> None:
    """Refuse with a FloatingPointError what came of a product that is not finite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"product number {products} with the operator is not finite, so nothing can be said of its spectrum; "
            "check that loss and gradient are finite at this point, compute products in float32 or float64 rather than "
            'under autocast, and where a norm is zero write products="finite_difference".'
        )


def normals(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries, drawn on the CPU so that a seed means the same on every device.

    Args:
        like: Rows `(k, n)`: an operator's `like`.
        generator: On the CPU.

    Returns:
        `(n,)`, of the kind of `like`.
    """
    noise = like.new_empty(like.shape[1], dtype=torch.float64, device="cpu").normal_(generator=generator)
    return noise.to(like.dtype).to(like.device)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent entries of plus or minus one, as `normals`."""
    noise = normals(like, generator)
    return torch.copysign(torch.ones_like(noise), noise)


def unit_vectors(like: Tensor) -> Iterator[Tensor]:
    """The n unit vectors `(n,)`, of the kind of `like`."""
    spans = like.placement.spans if isinstance(like, Sharded) else ((0, like.shape[1]),)
    offsets: dict[int, int] = {}
    for start, stop in spans:
        offsets.update(zip(range(start, stop), range(len(offsets), len(offsets) + stop - start), strict=True))
    for index in range(like.shape[1]):
        vector = like.new_zeros(like.shape[1])
        if index in offsets:
            (vector.local if isinstance(vector, Sharded) else vector)[offsets[index]] = 1.0
        yield vector


class Samples:
    """Mean and standard error of numbers that arrive one by one (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean, widened so that the truth is within two of them as often as with many; infinite for one."""
        return few(self.count) * math.sqrt(self._squares / max(self.count, 1)) if self.count > 1 else math.inf


def few(count: int) -> float:
    """What makes a standard error of the root of a mean square deviation: Student's t for normal numbers at 95 %.

    The quantile of Student's distribution over the normal one's z = 1.96 is 1 + (z^2 + 1) / (4 f) + (5 z^4 + 16 z^2 +
    3) / (96 f^2) + ... for f = count - 1 (Abramowitz & Stegun 1964, 26.7.5).
    """
    free = count - 1
    return (1.0 + 1.21 / free + 1.44 / free**2) / math.sqrt(free)
