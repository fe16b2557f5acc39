"""Restarts and dropped vectors keep the bounds, in bounded memory."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from spectra import diagonal, uniform
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from newtonopt.curvature import extreme_eigenvalues
from newtonopt.curvature.eigenvalues.bounds import Interval, Knowledge, Request, RitzBlock
from newtonopt.curvature.eigenvalues.search import _keep
from newtonopt.solvers.lanczos import lanczos

SLOW = torch.arange(1, 200, dtype=torch.float64) ** -0.5


SPECTRA = {
    "slow": SLOW,
    "edge": torch.cat([torch.tensor([3.0]).double(), 1.0 - torch.linspace(0.0, 1.0, 300).double() ** 2]),
    "graded": 10.0 ** torch.linspace(2.0, -8.0, 200).double(),
    "ninefold": torch.cat([torch.full((9,), 4.0).double(), uniform(150, 3)]),
    "clustered": torch.cat([5.0 - 1e-3 * uniform(6), uniform(150, 1), -1.0 - 1e-2 * uniform(4, 2)]),
}


def _coverage(values: Tensor, runs: int, **arguments: Any) -> float:
    truth = values.sort().values.tolist()
    held = []
    for seed in range(runs):
        spectrum = extreme_eigenvalues(diagonal(values), seed=seed, **arguments)
        ends = [*zip(spectrum.top, truth[::-1], strict=False), *zip(spectrum.bottom, truth, strict=False)]
        held.append([e.lower <= exact <= e.upper for e, exact in ends])
    return float(np.mean(held, axis=0).min())


@pytest.mark.parametrize(
    ("name", "runs"),
    [("edge", 20), *(pytest.param(name, 300, marks=pytest.mark.slow) for name in SPECTRA)],
)
def test_coverage_across_restarts(name: str, runs: int) -> None:
    least = 0.5 - 3.0 * 0.5 / runs**0.5
    assert _coverage(SPECTRA[name], runs, top=1, bottom=1, confidence=0.5, max_products=40, max_vectors=32) >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_coverage_of_several_across_restarts(name: str) -> None:
    arguments = {"top": 3, "bottom": 2, "confidence": 0.5, "max_products": 110, "max_vectors": 44}
    assert _coverage(SPECTRA[name], 150, **arguments) >= 0.5 - 3.0 * 0.5 / 150**0.5


def test_vectors_that_are_dropped_count_for_what_is_left() -> None:
    root = torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A = root + root.T
    result = lanczos(A, root[0], 12)
    left = torch.linalg.svd(result.basis).Vh[12:]
    inner = torch.linalg.eigvalsh(left @ A @ left.T)
    block = RitzBlock(torch.zeros(0).double(), A[:0], A[:0])
    rest, whole = Interval(float(inner[0]), float(inner[-1])), Interval(-math.inf, math.inf)
    request = Request(40, ((1.0, 1), (-1.0, 1)), 1e-3, 0.01, 2e-16, 100, 120)
    extension = block.extended(result, torch.eye(12, dtype=torch.float64))
    known = _keep(request, Knowledge(block, block.pairs(), whole, rest), extension, [0, 11])
    complement = torch.linalg.svd(known.block.vectors).Vh[2:]
    truth = torch.linalg.eigvalsh(complement @ A @ complement.T)
    assert float(truth[-1]) > rest.high + 1.0
    assert float(truth[-1]) <= known.rest.high + 1e-9
    assert float(truth[0]) >= known.rest.low - 1e-9
    assert known.rest.high < float(truth[-1]) + 5.0


@pytest.mark.parametrize("name", ["slow", "clustered", "ninefold"])
def test_few_vectors_cost_few_products_more(name: str) -> None:
    values = SPECTRA[name]
    truth = values.sort(descending=True).values
    small = extreme_eigenvalues(diagonal(values), top=3, bottom=1, max_vectors=80, max_products=1000)
    large = extreme_eigenvalues(diagonal(values), top=3, bottom=1, max_vectors=2000, max_products=1000)
    for spectrum in (small, large):
        assert spectrum.converged
        assert spectrum.certified
        np.testing.assert_allclose([e.value for e in spectrum.top], truth[:3], rtol=1e-3)
        assert all(e.lower <= exact <= e.upper for e, exact in zip(spectrum.top, truth.tolist(), strict=False))
    assert small.products <= 1.5 * large.products


class _Live(TorchFunctionMode):
    """Count the vectors of length n that are alive."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.now, self.most, self.known = n, 0, 0, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, vectors = storage._cdata, storage.nbytes() // (8 * self.n)
        if vectors == 0 or key in self.known:
            return
        self.known.add(key)
        self.now += vectors
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.known.remove(key)
            self.now -= vectors

        weakref.finalize(storage, gone)


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ({"top": 3, "bottom": 1, "max_vectors": 40}, 40),
        ({"top": 5, "bottom": 1}, 120),
    ],
)
def test_no_more_vectors_than_stated_are_alive(arguments: dict[str, int], most: int) -> None:
    values = torch.arange(1, 3001, dtype=torch.float64) ** -0.5
    operator = diagonal(values)
    with _Live(3000) as live:
        spectrum = extreme_eigenvalues(operator, max_products=150, **arguments)
    assert spectrum.products == 150
    assert 0.6 * most <= live.most <= most


def test_sixteen_vectors_certify_one_eigenvalue() -> None:
    """As a model that leaves no room for more needs them."""
    operator = diagonal(torch.arange(1, 3001, dtype=torch.float64) ** -0.2)
    with _Live(3000) as live:
        spectrum = extreme_eigenvalues(operator, top=1, bottom=0, max_vectors=16)
    [largest] = spectrum.top
    assert spectrum.certified
    assert largest.lower <= 1.0 <= largest.upper < 1.01
    assert live.most <= 16
