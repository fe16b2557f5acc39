"""Several products at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from newtonopt._flat import flatten, flatten_rows

Product = Callable[[Tensor], Tensor]

# Measured on networks of 700 and 2,200 parameters, 64 and 512 rows of data: as fast as more.
_MOST_ROWS, _BATCH_BYTES = 128, 2**27


def batches(product: Callable[[Tensor], Sequence[Tensor | None]], params: Sequence[Tensor], size: int) -> Product:
    """Products with rows `(k, n)`, as many at once as memory allows; one by one if an operation allows no batches.

    Args:
        product: `v -> A v`, in pieces.
        params: The parameters.
        size: Bytes that one product takes.
    """
    at_once = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, size)))

    def all_rows(V: Tensor) -> Tensor:
        nonlocal at_once
        found = []
        for part in V.split(at_once):
            if at_once > 1:
                try:
                    found.append(flatten_rows(product(part), params, len(part)))
                    continue
                except Exception:  # one that has nothing to do with batches comes again
                    at_once = 1
            found.extend(flatten(product(v), params)[None] for v in part.unbind(0))
        return torch.cat(found)

    return all_rows


def one_by_one(product: Product) -> Product:
    """The same product, with rows one by one."""
    return lambda v: torch.stack([product(row) for row in v.unbind(0)]) if v.dim() == 2 else product(v)
