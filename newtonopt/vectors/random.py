"""Vectors to multiply a matrix by: random ones, and the unit vectors.

Random numbers are drawn in float64 on the CPU and converted afterwards, so that a seed means the same numbers for every
dtype, on every device and with any number of processes. The global random state is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from newtonopt.vectors.sharded import Sharded


def normals(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a vector of independent standard normal numbers.

    Args:
        like: Vector `(n,)`, or rows `(k, n)` with any k, of the dtype, device and sharding wanted.
        generator: Generator on the CPU, which this advances by n numbers.

    Returns:
        The vector, `(n,)`.
    """
    noise = _draw(like, generator)
    return noise.to(like.dtype).to(like.device)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a vector of independent entries that are 1 or -1 with equal probability; arguments as for `normals`."""
    noise = normals(like, generator)
    return torch.copysign(torch.ones_like(noise), noise)


def direction(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a unit vector drawn uniformly from the sphere; arguments as for `normals`."""
    noise = _draw(like, generator)
    # Divided in float64, before it is rounded to the dtype of `like`.
    unit: Tensor = noise / noise.norm()
    return unit.to(like.dtype).to(like.device)


def unit_vectors(like: Tensor) -> Iterator[Tensor]:
    """Yield the columns of the n x n identity matrix, one after the other.

    Args:
        like: As for `normals`.

    Yields:
        Vectors `(n,)` with a single entry that is not zero.
    """
    size = like.shape[-1]
    spans = like.placement.spans if isinstance(like, Sharded) else ((0, size),)
    # Position within this process's shard of each entry that the shard holds.
    offsets: dict[int, int] = {}
    for start, stop in spans:
        offsets.update(zip(range(start, stop), range(len(offsets), len(offsets) + stop - start), strict=True))
    for index in range(size):
        vector = like.new_zeros(size)
        if index in offsets:
            (vector.local if isinstance(vector, Sharded) else vector)[offsets[index]] = 1.0
        yield vector


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return like.new_empty(like.shape[-1], dtype=torch.float64, device="cpu").normal_(generator=generator)
