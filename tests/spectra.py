"""Symmetric operators whose eigenvalues are known, and the checks that all measurements of them share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import Evaluation, LinearOperator, evaluate


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(matrix: Tensor, psd: bool = False) -> LinearOperator:
    return LinearOperator(lambda v: matrix @ v, (matrix.shape[0], matrix.shape[0]), matrix, psd=psd)


def diagonal(values: Tensor, psd: bool = False) -> LinearOperator:
    # A random start is invariant to rotations: diagonal matrices lose no generality.
    return LinearOperator(lambda v: values * v, (values.shape[0], values.shape[0]), values, psd=psd)


def rotated(values: Tensor) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    n = values.shape[0]
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    return (Q * values) @ Q.T


SPECTRA = {
    "outliers": torch.cat([torch.tensor([50.0, 20.0, 10.0, 8.0, -2.0]).double(), 0.3 * uniform(195) ** 6]),
    "slow": torch.arange(1, 201).double() ** -0.5,
    "flat": 0.5 + uniform(200),
    "fast": torch.arange(1, 201).double() ** -2.0,
    "nine-fold": torch.cat([torch.full((9,), 4.0).double(), 0.1 * uniform(191)]),
}
MATRICES = {name: rotated(values) for name, values in SPECTRA.items()}

DEGENERATE = [torch.zeros(1, 1), torch.zeros(5, 5), torch.ones(40, 40), torch.eye(40)]

# Coverage of two standard errors is 95 % for normal errors: those here are skewed, and to stop on an estimated error is
# to prefer small estimates.
LEAST_COVERAGE = 0.83


def coverage(measure: Callable[[int], tuple[float, float]], truth: float, runs: int) -> float:
    """Return how often the truth is within two standard errors."""
    found = [measure(seed) for seed in range(runs)]
    return sum(abs(value - truth) <= 2.0 * doubt for value, doubt in found) / runs


def check_seeds_and_operators(measure: Callable[[LinearOperator, int], float]) -> None:
    """Check that the seed decides, that the global random state stays, and that only square operators are taken."""
    A = dense(MATRICES["slow"])
    before = torch.get_rng_state()
    first = measure(A, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == measure(A, 3)
    assert first != measure(A, 4)
    with pytest.raises(FloatingPointError, match="is not finite"):
        measure(dense(torch.full((50, 50), math.nan)), 0)
    with pytest.raises(TypeError, match=r"operator must be a LinearOperator, got .*Write hessian\(evaluation\)"):
        measure(torch.eye(3), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operator must be square"):
        measure(LinearOperator(lambda v: v, (3, 4), torch.zeros(0)), 0)


def softmax_regression() -> tuple[Evaluation, Tensor]:
    """Return softmax regression with zero weights, and the second moment S `(5, 5)` of its inputs [x; 1].

    The Hessian is S (x) (I - 11'/C) / C, with C = 10 classes.
    """
    torch.manual_seed(0)
    x = torch.randn(60, 4).double() * torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    layer = nn.Linear(4, 10).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    inputs = torch.cat([x, torch.ones(60, 1).double()], 1)
    evaluation = evaluate(lambda: F.cross_entropy(layer(x), torch.arange(60) % 10), layer.parameters())
    return evaluation, inputs.T @ inputs / 60


def softmax_eigenvalues(S: Tensor) -> Tensor:
    """Return all eigenvalues of that Hessian: the eigenvalues of S / C, C - 1 times each and ascending, then zeros."""
    distinct = torch.cat([torch.linalg.eigvalsh(S) / 10, torch.zeros(1).double()])
    return distinct.repeat_interleave(torch.tensor([9, 9, 9, 9, 9, 5]))
