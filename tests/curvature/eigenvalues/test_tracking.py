"""Tracking is cheap, and honest about what it does not know."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spectra import diagonal, uniform
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues
from newtonopt.curvature.eigenvalues.extreme import keeps_up, track_roughly
from newtonopt.curvature.eigenvalues.tracking import estimated_errors

SLOW = torch.arange(1, 200, dtype=torch.float64) ** -0.5


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


def test_errors_are_estimated_from_residuals_and_the_nearest_ritz_value() -> None:
    values, residuals = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 5.0], [0.1, 4.0, 0.6]))
    assert estimated_errors(values, residuals).tolist() == pytest.approx([0.01, 4.0, 0.12])
    assert estimated_errors(values[:1], residuals[:1]).tolist() == [0.1]


def test_rough_tracking_ends_early_with_values_that_are_accurate() -> None:
    """The largest within 1 %, the others within a tenth, for fewer products than a tracking to the tolerance."""
    training = _Training()
    spectrum = extreme_eigenvalues(training.hessian(), 3, 1, tolerance=1e-2)
    rough_products = tracked_products = 0
    for _ in range(4):
        training.steps(3)
        A, gradient = training.hessian(), evaluate(training.closure, training.model.parameters()).gradient
        truth = torch.linalg.eigvalsh(A.dense()).flip(0)
        tracked = extreme_eigenvalues(A, 3, 1, tolerance=1e-2, start=spectrum)
        rough = track_roughly(A, spectrum, 3, 1, 1e-2, 30, 0, gradient)
        assert rough is not None
        assert not rough.certified
        assert rough.top[0].value == pytest.approx(float(truth[0]), rel=1e-2)
        for entry, expected in zip((*rough.top[1:], *rough.bottom), truth[[1, 2, -1]].tolist(), strict=True):
            assert entry.value == pytest.approx(expected, rel=0.1, abs=0.01 * float(truth[0]))
            assert entry.error <= entry.residual
        rough_products += rough.products
        tracked_products += tracked.products
        spectrum = rough
    assert rough_products < 0.9 * tracked_products


def test_the_gradient_leads_to_an_eigenvector_that_the_last_measurement_lacks() -> None:
    n = 300
    values = torch.cat([torch.tensor([5.0, 4.0]).double(), uniform(n - 2)])
    before = extreme_eigenvalues(diagonal(values), top=1, bottom=0)
    values[-1] = 20.0
    gradient = torch.zeros(n, dtype=torch.float64)
    gradient[[0, -1]] = torch.tensor([1.0, 0.1], dtype=torch.float64)
    found = track_roughly(diagonal(values), before, 1, 0, 1e-2, 6, 0, gradient)
    assert found is not None
    assert found.top[0].value == pytest.approx(20.0, rel=1e-2)


def test_an_unchanged_operator_is_tracked_at_once() -> None:
    operator = diagonal(torch.cat([torch.tensor([5.0, 4.0, -3.0]).double(), uniform(300)]))
    before = extreme_eigenvalues(operator, top=2, bottom=1, tolerance=1e-6)
    after = extreme_eigenvalues(operator, top=2, bottom=1, start=before)
    assert after.products <= 12
    np.testing.assert_allclose(_values(after), [5.0, 4.0, -3.0], rtol=1e-6)


@pytest.mark.parametrize("budget", [3, 5, 200])
def test_what_tracking_says_of_another_spectrum_is_no_more_than_residuals_do(budget: int) -> None:
    n = 150
    axes = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    before = extreme_eigenvalues(diagonal(torch.cat([torch.tensor([9.0, 8.0]).double(), uniform(n - 2)])), 2, 1)
    values = torch.cat([torch.tensor([30.0, 25.0, -7.0]).double(), uniform(n - 3, 4) - 0.5])
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
    operator = diagonal(torch.cat([torch.full((9,), 4.0).double(), uniform(150, 3)]))
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


def test_a_start_of_another_length_is_refused() -> None:
    other = extreme_eigenvalues(diagonal(SLOW[:50]), top=1, bottom=1)
    with pytest.raises(ValueError, match=r"start must hold vectors of length 199, .*, got 2 vectors of lengths \[50\]"):
        extreme_eigenvalues(diagonal(SLOW), start=other)
    with pytest.raises(ValueError, match=r"start must hold vectors of length .* got 0 vectors"):
        extreme_eigenvalues(diagonal(SLOW), start=replace(other, top=(), bottom=()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("budget", [6, 10, 24])
def test_tracked_values_are_those_of_their_own_end(sign: float, budget: int) -> None:
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


def test_a_start_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="start must be a Spectrum, or None, got 'last'"):
        extreme_eigenvalues(diagonal(SLOW), start="last")  # type: ignore[arg-type]


def test_the_smallest_value_is_never_shown_as_the_next_largest() -> None:
    """A short run has fewer values than are asked for, and one of them cannot be both."""
    values = torch.cat([torch.tensor([66.0]), torch.linspace(1e-7, -1e-6, 99)]).double()
    first = extreme_eigenvalues(diagonal(values), top=3, bottom=1)
    found = track_roughly(diagonal(values), first, 3, 1, 1e-2, 3, 0, None)
    assert found is not None and found.top[0].value == pytest.approx(66.0, rel=1e-2)
    assert found.bottom and all(entry.value != found.bottom[0].value for entry in found.top)


def test_tracking_keeps_up_where_its_vectors_contain_the_largest_eigenvector() -> None:
    values = torch.cat([torch.tensor([5.0, 4.0, 3.0]).double(), uniform(50)])
    now = extreme_eigenvalues(diagonal(values), top=1, bottom=0)
    for order, kept_up in (([0, 1, 2], True), ([1, 0, 2], True), ([2, 1, 0], False)):
        before = extreme_eigenvalues(diagonal(torch.cat([values[order], values[3:]])), top=2, bottom=0)
        assert keeps_up(before, now) == kept_up
    assert not keeps_up(extreme_eigenvalues(diagonal(values[:-1]), top=2, bottom=0), now)
