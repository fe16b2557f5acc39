"""Restarts keep the bounds in bounded memory; tracking is cheap, and honest about what it does not know."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues
from newtonopt.curvature.eigenvalues.bounds import Knowledge, Range, Request, _cycles, _growth
from newtonopt.curvature.eigenvalues.ritz_values import RitzBlock
from newtonopt.curvature.eigenvalues.search import _kept
from newtonopt.solvers.lanczos import Restarts, lanczos


def _diagonal(values: Tensor, psd: bool = False) -> LinearOperator:
    return LinearOperator(lambda v: values * v, (values.shape[0], values.shape[0]), values, psd=psd)


def _uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SLOW = torch.arange(1, 200, dtype=torch.float64) ** -0.5
SPECTRA = {
    "slow": SLOW,
    "edge": torch.cat([torch.tensor([3.0]).double(), 1.0 - torch.linspace(0.0, 1.0, 300).double() ** 2]),
    "graded": 10.0 ** torch.linspace(2.0, -8.0, 200).double(),
    "ninefold": torch.cat([torch.full((9,), 4.0).double(), _uniform(150, 3)]),
    "clustered": torch.cat([5.0 - 1e-3 * _uniform(6), _uniform(150, 1), -1.0 - 1e-2 * _uniform(4, 2)]),
}


def _coverage(values: Tensor, runs: int, **arguments: Any) -> float:
    truth = values.sort().values.tolist()
    held = []
    for seed in range(runs):
        spectrum = extreme_eigenvalues(_diagonal(values), seed=seed, **arguments)
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


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_the_polynomial_of_the_bound_is_that_of_the_run(keep: int) -> None:
    # v_{k+1} = p(A) v_1: along an eigenvector the components' ratio is p at its eigenvalue.
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(199, generator=generator, dtype=torch.float64)
    restarts = Restarts(12, lambda values: list(range(len(values) - keep, len(values))))
    for products in (11, 12, 13, 20, 37):
        result = lanczos(torch.diag(-SLOW), start, products, restarts=restarts)
        ratio = float((result.next_vector[-1] / (start[-1] / start.norm())).abs())
        assert math.exp(_growth(list(_cycles(result.tridiagonal)), float(-SLOW[-1]))) == pytest.approx(ratio, rel=1e-6)


def test_vectors_that_are_dropped_count_for_what_is_left() -> None:
    root = torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A = root + root.T
    result = lanczos(A, root[0], 12)
    left = torch.linalg.svd(result.basis).Vh[12:]
    inner = torch.linalg.eigvalsh(left @ A @ left.T)
    block = RitzBlock(torch.zeros(0).double(), A[:0], A[:0])
    rest, whole = Range(float(inner[0]), float(inner[-1])), Range(-math.inf, math.inf)
    request = Request(40, ((1.0, 1), (-1.0, 1)), 1e-3, 0.01, 2e-16, 100, 120)
    extension = block.extended(result, torch.eye(12, dtype=torch.float64))
    known = _kept(request, Knowledge(block, block.pairs(), whole, rest), extension, [0, 11])
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
    small = extreme_eigenvalues(_diagonal(values), top=3, bottom=1, max_vectors=80, max_products=1000)
    large = extreme_eigenvalues(_diagonal(values), top=3, bottom=1, max_vectors=2000, max_products=1000)
    for spectrum in (small, large):
        assert spectrum.converged
        assert spectrum.certified
        np.testing.assert_allclose([e.value for e in spectrum.top], truth[:3], rtol=1e-3)
        assert all(e.lower <= exact <= e.upper for e, exact in zip(spectrum.top, truth.tolist(), strict=False))
    assert small.products <= 1.5 * large.products


class _Live(TorchFunctionMode):
    """Counts the vectors of length n that are alive."""

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
    ("arguments", "most"), [({"top": 3, "bottom": 1, "max_vectors": 40}, 40), ({"top": 5, "bottom": 1}, 120)]
)
def test_no_more_vectors_than_stated_are_alive(arguments: dict[str, int], most: int) -> None:
    values = torch.arange(1, 3001, dtype=torch.float64) ** -0.5
    operator = _diagonal(values)
    with _Live(3000) as live:
        spectrum = extreme_eigenvalues(operator, max_products=150, **arguments)
    assert spectrum.products == 150
    assert 0.6 * most <= live.most <= most


def test_a_tiny_end_does_not_use_up_the_budget() -> None:
    values = torch.cat([torch.arange(1, 301).double() ** -1.5, torch.zeros(2000).double()])
    spectrum = extreme_eigenvalues(_diagonal(values, psd=True), top=3, bottom=1, tolerance=1e-2)
    assert spectrum.converged
    assert spectrum.products <= 40
    assert spectrum.bottom[0].lower == pytest.approx(0.0, abs=1e-12)
    assert 0.0 <= spectrum.bottom[0].upper <= 1e-4
    # Above the tolerance times the norm widths stay relative.
    assert all(e.upper - e.lower <= 1e-2 * e.value for e in spectrum.top)


def test_multiplicity_is_what_was_seen() -> None:
    spectrum = extreme_eigenvalues(_diagonal(SPECTRA["ninefold"]), top=10, bottom=1)
    assert [e.multiplicity for e in spectrum.top] == [9] * 9 + [1]
    assert spectrum.bottom[0].multiplicity == 1
    assert [e.multiplicity for e in extreme_eigenvalues(_diagonal(SLOW), top=3, bottom=0).top] == [1, 1, 1]


class _Training:
    """A small classifier under gradient descent, whose Hessian moves a little at every step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.X, self.y = torch.randn(80, 6).double(), torch.arange(80) % 4
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.steps(60)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.X), self.y)
        loss.backward()
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.closure()
            self.optimizer.step()

    def hessian(self) -> LinearOperator:
        return hessian(evaluate(self.closure, self.model.parameters()))


def _values(spectrum: Spectrum) -> list[float]:
    return [e.value for e in (*spectrum.top, *spectrum.bottom)]


def test_tracking_takes_a_fraction_of_the_products_and_agrees() -> None:
    training = _Training()
    settings: dict[str, Any] = {"top": 3, "bottom": 1, "tolerance": 1e-2}
    spectrum = extreme_eigenvalues(training.hessian(), **settings)
    tracked_products = certified_products = 0
    for _ in range(4):
        training.steps(3)
        truth = extreme_eigenvalues(training.hessian(), **settings)
        spectrum = extreme_eigenvalues(training.hessian(), start=spectrum, **settings)
        assert truth.certified
        assert not spectrum.certified
        assert spectrum.converged
        np.testing.assert_allclose(_values(spectrum), _values(truth), rtol=1e-2)
        assert all(e.upper == math.inf and e.lower <= e.value for e in spectrum.top)
        assert spectrum.bottom[0].lower == -math.inf
        tracked_products += spectrum.products
        certified_products += truth.products
    assert tracked_products <= 0.6 * certified_products


def test_an_unchanged_operator_is_tracked_at_once() -> None:
    operator = _diagonal(torch.cat([torch.tensor([5.0, 4.0, -3.0]).double(), _uniform(300)]))
    before = extreme_eigenvalues(operator, top=2, bottom=1, tolerance=1e-6)
    after = extreme_eigenvalues(operator, top=2, bottom=1, start=before)
    assert after.products <= 12
    np.testing.assert_allclose(_values(after), [5.0, 4.0, -3.0], rtol=1e-6)


@pytest.mark.parametrize("budget", [3, 5, 200])
def test_what_tracking_says_of_another_spectrum_is_no_more_than_residuals_do(budget: int) -> None:
    n = 150
    axes = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    before = extreme_eigenvalues(_diagonal(torch.cat([torch.tensor([9.0, 8.0]).double(), _uniform(n - 2)])), 2, 1)
    values = torch.cat([torch.tensor([30.0, 25.0, -7.0]).double(), _uniform(n - 3, 4) - 0.5])
    matrix = axes @ torch.diag(values) @ axes.T
    operator = LinearOperator(lambda v: matrix @ v, (n, n), matrix)
    after = extreme_eigenvalues(operator, 2, 1, start=before, max_products=budget)
    assert not after.certified
    for entry in (*after.top, *after.bottom):
        residual = float((matrix @ entry.vector - entry.value * entry.vector).norm())
        assert residual == pytest.approx(entry.residual, rel=1e-6, abs=1e-10)
        assert float((values - entry.value).abs().min()) <= entry.residual + 1e-10
        assert not after.converged or entry.residual <= 1e-3 * max(abs(entry.value), 0.03)
    assert after.converged == (budget > 5)
    if after.converged:
        np.testing.assert_allclose(_values(after), [30.0, 25.0, -7.0], rtol=1e-3)


def test_equal_eigenvalues_are_not_tracked() -> None:
    operator = _diagonal(SPECTRA["ninefold"])
    before = extreme_eigenvalues(operator, top=3, bottom=0)
    after = extreme_eigenvalues(operator, top=3, bottom=0, start=before)
    assert after.certified
    assert [e.multiplicity for e in after.top] == [3, 3, 3]


def test_semi_definite_operators_keep_their_certain_bound_when_tracked() -> None:
    training = _Training()
    G = gauss_newton(evaluate(training.closure, training.model.parameters()))
    before = extreme_eigenvalues(G, top=2, bottom=1, tolerance=1e-2)
    after = extreme_eigenvalues(G, top=2, bottom=1, tolerance=1e-2, start=before)
    assert after.bottom[0].lower == pytest.approx(0.0, abs=1e-9)
    assert not after.certified


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"max_vectors": 51},
            ValueError,
            "max_vectors must be a whole number and at least 52, got 51",
        ),
        ({"max_vectors": 60.0}, ValueError, "max_vectors must be a whole number"),
        ({"start": "last"}, TypeError, "start must be a Spectrum, or None, got 'last'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extreme_eigenvalues(_diagonal(SLOW), **arguments)


def test_a_start_of_another_length_is_refused() -> None:
    other = extreme_eigenvalues(_diagonal(SLOW[:50]), top=1, bottom=1)
    with pytest.raises(ValueError, match=r"start must hold vectors of length 199, .*, got 2 vectors of lengths \[50\]"):
        extreme_eigenvalues(_diagonal(SLOW), start=other)
    with pytest.raises(ValueError, match=r"start must hold vectors of length .* got 0 vectors"):
        extreme_eigenvalues(_diagonal(SLOW), start=replace(other, top=(), bottom=()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("budget", [6, 10, 24])
def test_followed_values_are_those_of_their_own_end(sign: float, budget: int) -> None:
    """A run sees eigenvalues that are nearly zero once: the next ones are not taken from the other end."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        n = 40
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        values = sign * torch.cat([torch.linspace(-10, -1, 8), torch.zeros(n - 8)]).double()
        noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
        A, B = ((Q * values) @ Q.T + size * (noise + noise.T) for size in (1e-4, 1e-3))
        ends = (3, 1) if sign > 0 else (1, 3)
        first = extreme_eigenvalues(LinearOperator(A.mv, (n, n), A[0]), *ends)
        found = extreme_eigenvalues(LinearOperator(B.mv, (n, n), B[0]), *ends, start=first, max_products=budget)
        truth = torch.linalg.eigvalsh(B)
        for end, expected in ((found.top, truth.flip(0)), (found.bottom, truth)):
            assert len(end) >= 1
            assert all(abs(e.value - t) < 0.05 * 10 for e, t in zip(end[1:], expected[1:].tolist(), strict=False))
        assert not (found.converged and (len(found.top) + len(found.bottom)) < 4)
