"""Powers of two over the range of each dtype, and a matrix that none of them rounds."""

from __future__ import annotations

import torch
from torch import Tensor

# Powers of two over the ranges of both dtypes, down to numbers that have lost digits to underflow.
POWERS = [(torch.float32, k) for k in (-140, -120, -90, -66, 0, 66, 90, 115)] + [
    (torch.float64, k) for k in (-1060, -1010, -800, -530, 530, 800, 1000)
]
# The powers at which no digit is lost.
WHOLE = [(dtype, k) for dtype, k in POWERS if 2.0**k > 2.0**30 * torch.finfo(dtype).tiny]


def times(x: Tensor, power: int) -> Tensor:
    """`2^power x`, by numbers that are in range."""
    return x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


def matrix(n: int = 24, lowest: float = -1.0) -> Tensor:
    """Symmetric, float64, entries with few digits, so that no dtype rounds them."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64))[0]
    A = (Q * torch.linspace(lowest, 2, n, dtype=torch.float64)) @ Q.T
    return ((A + A.T) * 2**9).round() / 2**10
